"""Kernel tests run in Triton's interpreter, chosen by tests/conftest.py before triton is first imported."""

import os

import pytest

assert os.environ.get("TRITON_INTERPRET") == "1", "kernel tests need TRITON_INTERPRET=1; tests/conftest.py sets it"


@pytest.fixture(autouse=True, scope="session")
def fast_interpreter():
    pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")
    from tests.runtime_ref.kernels.patched_once import patched_once

    with patched_once():
        yield
