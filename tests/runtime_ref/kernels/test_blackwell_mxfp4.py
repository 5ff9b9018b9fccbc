"""Rounding to MXFP8 in a kernel equals its reference, and products of hw_fp4 pages the codec (C3)."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")

import triton
import triton.language as tl

from mxfp4 import dequantize
from mxfp4.format import BLOCK_SIZE
from mxfp4.mxfp8 import quantize_mxfp8
from runtime_ref.kernels.experimental.blackwell_mxfp4 import COLUMNS, multiply_scaled
from runtime_ref.kernels.experts import Workspace, round_rows
from runtime_ref.kernels.repack import Tile, pack_pages, unpack_pages
from tests.runtime_ref.kernels import expert_cases as cases
from tests.runtime_ref.kernels.at_once import INTERPRETED


def rounded(x):
    """Codes and scales of x as the launch writes them."""
    pages = cases.make_pages(cases.make_weights(hidden=x.shape[1]), tile=cases.HW_FP4)
    space = Workspace(pages, x.shape[0], cases.A, cases.launched())
    out = round_rows(x, space).flatten()
    return out[:x.numel()].view(x.shape), out[x.numel():].view(x.shape[0], -1)


@pytest.mark.parametrize("hidden", [32, 160, 1056])
def test_rounding_is_that_of_the_reference_bit_for_bit(hidden):
    generator = torch.Generator().manual_seed(hidden)
    x = (torch.randn(9, hidden, generator=generator) * torch.exp2(torch.linspace(-130, 120, 9))[:, None]).to(torch.bfloat16)
    if INTERPRETED:  # the interpreter takes subnormal bf16 for zero
        x[x.abs() < 2.0**-126] = 0
    x[0, :7] = torch.tensor([448.0, 17.0, 19.0, -0.0, -17.0, 2**-10, 3 * 2**-10])
    x[3] = 0
    x[4, 5], x[5, 6] = float("nan"), float("-inf")
    codes, scales = rounded(x)
    expected, expected_scales = quantize_mxfp8(x)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(codes, expected.view(torch.uint8))


@triton.jit
def times_identity(pages, x, x_scales, out, ROWS: tl.constexpr, DEPTH: tl.constexpr, N: tl.constexpr, FLOAT_DOT: tl.constexpr):
    """Page p times DEPTH columns of x uint8 [DEPTH, DEPTH] under bytes [DEPTH, DEPTH / 32] -> out [p, ROWS, DEPTH]."""
    PAGE: tl.constexpr = ROWS * DEPTH // 2 + ROWS * DEPTH // 32
    p = tl.program_id(0)
    for first in range(0, DEPTH, N):
        column = first + tl.arange(0, N)
        codes = tl.load(x + tl.arange(0, DEPTH)[:, None] * DEPTH + column[None, :])
        scales = tl.load(x_scales + column[:, None] * (DEPTH // 32) + tl.arange(0, DEPTH // 32)[None, :])
        acc = multiply_scaled(pages + p * PAGE, codes, scales, tl.zeros((ROWS, N), tl.float32), ROWS, DEPTH, FLOAT_DOT)
        tl.store(out + (p * ROWS + tl.arange(0, ROWS))[:, None] * DEPTH + column[None, :], acc)


def times(codes, scales, tile, x, x_scales):
    out = torch.full((codes.shape[0], tile.rows, tile.depth), float("nan"))
    times_identity[(codes.shape[0],)](pack_pages(codes, scales, tile), x, x_scales, out, ROWS=tile.rows, DEPTH=tile.depth,
                                      N=COLUMNS, FLOAT_DOT=INTERPRETED)
    return out


def test_every_code_under_every_scale_means_what_the_codec_says():
    # 128 rows' blocks of a page have 128 of the bytes, all 16 codes in each. Under 253 and 254 large codes are infinite, and
    # infinity times zero is NaN.
    tile, pages, bytes_ = Tile(64, 64, hw_fp4=True), 4, 253
    element = (torch.arange(tile.depth)[None] + torch.arange(tile.rows)[:, None]) % 16
    codes = (element[:, 0::2] | element[:, 1::2] << 4).to(torch.uint8).expand(pages, -1, -1).contiguous()
    shift = torch.arange(tile.rows)[:, None] * 2 + torch.arange(2)[None]
    scales = ((torch.arange(pages)[:, None, None] * 64 + shift) % bytes_).to(torch.uint8)
    assert scales.unique().numel() == bytes_
    one = torch.eye(tile.depth).to(torch.float8_e4m3fn).view(torch.uint8)
    plain = torch.full((tile.depth, tile.depth // BLOCK_SIZE), 127, dtype=torch.uint8)
    out = times(codes, scales, tile, one, plain)
    assert torch.equal(out, dequantize(codes, scales, dtype=torch.float32))


def test_every_e4m3_code_and_scale_of_the_other_operand_counts():
    tile = Tile(64, 64, hw_fp4=True)
    weight = torch.zeros(4, tile.rows, tile.depth // 2, dtype=torch.uint8)
    for row in range(tile.rows):  # row r is 1.0 at k = r
        weight[:, row, row // 2] = 2 << 4 * (row % 2)
    scales = torch.full((4, tile.rows, 2), 127, dtype=torch.uint8)
    every = torch.arange(256, dtype=torch.uint8).view(4, 64)
    for p in range(4):
        x = torch.zeros(64, 64, dtype=torch.uint8)
        value = every[p].where(every[p] & 127 < 127, 0)  # NaN would reach all rows
        x.diagonal().copy_(value)
        x_scales = (torch.arange(64)[:, None] + 100).expand(64, 2).to(torch.uint8).contiguous()
        out = times(weight[p:p + 1], scales[p:p + 1], tile, x, x_scales)[0]
        expected = value.view(torch.float8_e4m3fn).float() * torch.exp2(x_scales[:, 0].float() - 127)
        assert torch.equal(out, torch.diag(expected))


def test_the_nan_byte_makes_its_rows_nan_and_no_others():
    tile = Tile(64, 64, hw_fp4=True)
    codes, scales = torch.full((1, 64, 32), 0x22, dtype=torch.uint8), torch.full((1, 64, 2), 127, dtype=torch.uint8)
    scales[0, 5, 1] = 255
    ones = torch.full((64, 64), 0x38, dtype=torch.uint8)
    out = times(codes, scales, tile, ones, torch.full((64, 2), 127, dtype=torch.uint8))[0]
    assert out[5].isnan().all() and (out[torch.arange(64) != 5] == 64).all()


@pytest.mark.parametrize("n, k", [(64, 128), (65, 160), (200, 96)])
def test_native_pages_hold_every_scale_and_can_be_taken_apart(n, k):
    generator = torch.Generator().manual_seed(n)
    codes = torch.randint(0, 256, (3, n, k // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 256, (3, n, k // 32), dtype=torch.uint8, generator=generator)
    tile = Tile(64, 128, hw_fp4=True)
    pages = pack_pages(codes, scales, tile)
    assert pages.shape == (3, -(-n // 64), -(-k // 128), tile.page_bytes)
    assert all(torch.equal(a, b) for a, b in zip(unpack_pages(pages, tile, n, k), (codes, scales), strict=True))


def test_tiles_too_low_for_whole_blocks_are_refused():
    with pytest.raises(ValueError, match="tile rows 32: expected a power of two of at least 64"):
        Tile(32, 128, hw_fp4=True)
