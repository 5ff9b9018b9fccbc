"""Kernel tests run in Triton's interpreter, chosen by tests/conftest.py before triton is first imported."""

import os

assert os.environ.get("TRITON_INTERPRET") == "1", "kernel tests need TRITON_INTERPRET=1; tests/conftest.py sets it"
