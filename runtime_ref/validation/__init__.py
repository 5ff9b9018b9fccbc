"""Judges an exported folder and the runtime on it."""
