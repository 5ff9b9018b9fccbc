"""Quantization-aware training of MoE expert weights (stage 1 of 4)."""
