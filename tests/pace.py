"""What tests of whole engines ask for where a step takes a second: with the kernels in Triton's interpreter."""

import os
from typing import TypeVar

# FP4_TEST_KERNELS: engines run the embedded model on the Triton kernels, "1" compiled for the CPU or "interpreted".
KERNELS = os.environ.get("FP4_TEST_KERNELS", "") in ("1", "interpreted")
INTERPRETED = os.environ.get("FP4_TEST_KERNELS") == "interpreted"
T = TypeVar("T")


def paced(usual: T, interpreted: T) -> T:
    """A size (tokens, requests, clients)."""
    return interpreted if INTERPRETED else usual


def seconds(usual: float) -> float:
    """A limit of time: how long to wait for what must happen. Machines of CI stand still for seconds."""
    return paced(4 * usual, 40 * usual)
