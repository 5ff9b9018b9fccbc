"""Kernels that have not proved themselves on a GPU."""
