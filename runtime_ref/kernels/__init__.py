"""Triton kernels of the runtime. Each names its reference twin; `bench.py` proves and measures them."""
