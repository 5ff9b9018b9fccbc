"""The shortcuts by which kernels are tested in Triton's interpreter change no bit of what it computes, and what they compute
otherwise does not depend on the size of a tile."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")

import triton.language as tl
from jobs import run_alone

from tests.runtime_ref.kernels.at_once import INTERPRETED

OPERATIONS = "tests.runtime_ref.triton_cpu.every_operation"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here: make test")


@interpreted
def test_every_operation_on_every_dtype_gives_the_interpreters_bits():
    plain, quick = (run_alone("-W", "ignore", "-m", OPERATIONS, how).splitlines() for how in ("plain", "quick"))
    assert len(plain) > 900
    assert quick == plain


@triton.jit
def product_kernel(a, b, out, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    row, k, column = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    x = tl.load(a + row[:, None] * K + k[None, :])
    y = tl.load(b + k[:, None] * N + column[None, :])
    tl.store(out + row[:, None] * N + column[None, :], tl.dot(x, y, tl.zeros((M, N), tl.float32)))


@interpreted
def test_bits_of_a_product_do_not_depend_on_its_number_of_rows():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).bfloat16().float() for shape in ((64, 128), (128, 8)))
    found = {}
    for rows in (1, 4, 16, 64):
        found[rows] = torch.full((rows, 8), float("nan"))
        product_kernel[(1,)](a, b, found[rows], M=rows, K=128, N=8)
    assert torch.equal(found[64], (a.double() @ b.double()).float())
    assert all(torch.equal(found[rows], found[64][:rows]) for rows in found)
