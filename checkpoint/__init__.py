"""Checkpoint folders: how they are read, in every format."""
