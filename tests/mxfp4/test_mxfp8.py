"""MXFP8 rounding: what a block is promised, and what becomes of values that are not finite."""

import pytest
import torch

from mxfp4.format import BLOCK_SIZE
from mxfp4.mxfp8 import dequantize_mxfp8, quantize_mxfp8


@pytest.fixture(scope="module")
def x():
    """bfloat16 of all magnitudes, a block of each."""
    generator = torch.Generator().manual_seed(0)
    size = torch.exp2(torch.linspace(-133, 127, 131))[:, None]
    return (torch.randn(131, 4 * BLOCK_SIZE, generator=generator).clamp(-1.9, 1.9) * size).to(torch.bfloat16)


def test_the_scale_is_the_least_under_which_nothing_saturates(x):
    codes, scales = quantize_mxfp8(x)
    top = x.double().unflatten(-1, (-1, BLOCK_SIZE)).abs().amax(-1)
    unit = torch.exp2(scales.double() - 127)
    assert (top <= 448 * unit).all()
    assert ((top > 448 * unit / 2) | (scales == 0)).all()
    assert not codes.float().isnan().any()


def test_values_are_rounded_to_the_nearest_of_the_grid(x):
    codes, scales = quantize_mxfp8(x)
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    grid = grid[grid.isfinite()]
    units = x.double() / torch.exp2(scales.double() - 127).repeat_interleave(BLOCK_SIZE, -1)
    nearest = (units[..., None] - grid).abs().amin(-1)
    assert torch.equal((units - codes.double()).abs(), nearest)


def test_rounding_what_is_rounded_changes_nothing(x):
    once = dequantize_mxfp8(*quantize_mxfp8(x))
    assert torch.equal(dequantize_mxfp8(*quantize_mxfp8(once)), once)


def test_ties_go_to_the_even_code_and_zeros_keep_their_sign():
    block = torch.zeros(BLOCK_SIZE)
    block[:6] = torch.tensor([448.0, 17.0, 19.0, -0.0, -17.0, 2**-10])  # steps of 2 between 16 and 32; 2^-9 is the least number
    codes, scales = quantize_mxfp8(block)
    assert scales.tolist() == [127]
    assert codes.float()[:6].tolist() == [448.0, 16.0, 20.0, 0.0, -16.0, 0.0]
    assert codes.view(torch.uint8)[3] == 0x80


def test_a_block_of_zeros_has_the_least_scale():
    codes, scales = quantize_mxfp8(torch.zeros(2, BLOCK_SIZE))
    assert not codes.view(torch.uint8).any() and not scales.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_block_that_is_not_finite_is_nan_and_the_next_one_is_not(bad):
    x = torch.ones(2 * BLOCK_SIZE)
    x[5] = bad
    out = dequantize_mxfp8(*quantize_mxfp8(x))
    assert out[:BLOCK_SIZE].isnan().all() and torch.equal(out[BLOCK_SIZE:], x[BLOCK_SIZE:])


def test_rows_that_are_not_whole_blocks_are_refused():
    with pytest.raises(ValueError, match=r"x \[3, 40\]: expected a last dimension that is a multiple of 32"):
        quantize_mxfp8(torch.zeros(3, 40))
