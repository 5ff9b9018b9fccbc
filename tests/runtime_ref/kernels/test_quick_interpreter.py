"""The shortcuts by which kernels are tested in Triton's interpreter change no bit of what it computes."""

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")

from jobs import run_alone

from tests.runtime_ref.kernels.at_once import INTERPRETED

OPERATIONS = "tests.runtime_ref.kernels.every_operation"


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here: make test")
def test_every_operation_on_every_dtype_gives_the_interpreters_bits():
    plain, quick = (run_alone("-W", "ignore", "-m", OPERATIONS, how).splitlines() for how in ("plain", "quick"))
    assert len(plain) > 900
    assert quick == plain
