"""Ways to compute a step: torch ops (reference), compiled C, Triton kernels."""
