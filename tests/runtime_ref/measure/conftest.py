"""Kernel tests run in Triton's interpreter, chosen by tests/conftest.py before triton is first imported; with
FP4_TEST_KERNELS=1 on the CPU, compiled: bf16 products, inline PTX, programs as threads."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def no_gpu_needed(kernels_without_a_gpu):
    """The kernels run on this machine."""
