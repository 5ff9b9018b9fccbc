"""Measuring tools: limits, static gates of compiled kernels, the GPU suite."""
