"""Triton kernels of the runtime. Each names its reference; `bench.py` proves and measures them."""
