"""Kernel tests run in Triton's interpreter, which must be chosen before triton is first imported in the process."""

import os
import sys

if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"
assert os.environ.get("TRITON_INTERPRET") == "1", (
    "triton was imported before the kernel tests could choose its interpreter: run pytest with TRITON_INTERPRET=1")
