"""Correctness and speed on a GPU, as one program."""
