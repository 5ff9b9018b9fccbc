"""The GPU backend: a step on Triton kernels, op by op or in one megakernel launch."""
