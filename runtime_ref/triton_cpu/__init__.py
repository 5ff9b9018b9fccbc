"""Kernels on a machine without a GPU: Triton's own IR of them, turned into C, compiled and run."""
