"""The reference codec against the text of the format."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxfp4 import BLOCK_SIZE, ScaleRule, dequantize, quantize
from mxfp4.codec import block_scales, pack, round_to_scales, scale_values, unpack
from mxfp4.format import E2M1_VALUES, MAX_SCALE_EXPONENT
from tests.tolerance import MSE_CHOICE

GOLDEN = Path(__file__).with_name("golden_blocks.json")
RULES = [rule.value for rule in ScaleRule]


def test_the_format_is_importable_without_torch():
    program = "import sys, mxfp4.format as f; f.ScaleRule('even'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2]).returncode == 0


def test_every_code_under_every_scale_byte_decodes_to_its_product(dtype):
    codes = pack(torch.arange(16, dtype=torch.uint8).repeat(2)).expand(256, 16)
    scales = torch.arange(256, dtype=torch.int32).to(torch.uint8)[:, None]
    decoded = dequantize(codes, scales, dtype=dtype)
    for byte in range(255):
        exact = [value * 2.0 ** (byte - 127) for value in E2M1_VALUES] * 2
        expected = torch.tensor(exact, dtype=torch.float64).to(dtype)
        assert torch.equal(decoded[byte], expected), byte
        assert torch.equal(decoded[byte].signbit(), expected.signbit()), byte
        assert bool(torch.isfinite(decoded[byte]).all()) == (byte <= 127 + MAX_SCALE_EXPONENT)
        if byte <= 127 + MAX_SCALE_EXPONENT:
            assert decoded[byte].double().tolist() == exact, f"byte {byte} is not exact"
    assert bool(decoded[255].isnan().all())


def test_even_elements_are_in_low_nibbles_and_unpack_inverts_pack():
    codes = torch.arange(16, dtype=torch.uint8)
    assert pack(codes).tolist() == [odd << 4 | even for even, odd in zip(range(0, 16, 2), range(1, 16, 2), strict=True)]
    every_byte = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    assert torch.equal(pack(unpack(every_byte)), every_byte)


def test_elements_round_to_the_nearest_value_and_ties_to_the_even_code():
    values = torch.tensor(E2M1_VALUES[:8], dtype=torch.float64)
    x = torch.linspace(-6, 6, 3073)  # multiples of 2^-8: all midpoints and both neighbours of each
    distance = (x.double().abs()[:, None] - values).abs()
    nearest = distance == distance.amin(1, keepdim=True)
    even_codes = torch.arange(8) % 2 == 0
    choice = torch.where(nearest.sum(1, keepdim=True) > 1, nearest & even_codes, nearest)
    assert bool((choice.sum(1) == 1).all())
    expected = values[choice.to(torch.int8).argmax(1)].to(torch.float32).copysign(x)
    rounded = round_to_scales(x, torch.tensor(1.0))
    assert torch.equal(rounded, expected) and torch.equal(rounded.signbit(), x.signbit())


@pytest.mark.parametrize("amax, exponents", [
    (4.0, (0, 0, 0)), (6.0, (0, 0, 0)), (6.25, (0, 1, 0)), (6.96875, (0, 1, 0)), (7.0, (0, 1, 1)), (7.96875, (0, 1, 1)),
    (8.0, (1, 1, 1)), (3.0, (-1, -1, -1)), (2.0**-126, (-127, -127, -127)), (0.0, (-127, -127, -127)),
    (torch.finfo(torch.bfloat16).max, (125, 125, 125)), (1.5 * 2.0**127, (125, 125, 125)),
])
def test_scale_exponents_follow_the_rules_and_their_clamp(amax, exponents, dtype):
    w = torch.zeros(32, dtype=dtype)
    w[7] = -amax
    for rule, exponent in zip(("floor", "rceil", "even"), exponents, strict=True):
        assert int(quantize(w, scale_rule=rule)[1]) - 127 == exponent, rule


def test_mse_picks_the_better_of_rceil_and_one_below(weights, dtype):
    w = torch.cat([weights(dtype, 500, 64), weights(dtype, 500, 64).tanh()])
    blocks = w.double().view(-1, 32)
    coarse = block_scales(w, scale_rule="rceil").view(-1).int()
    chosen = block_scales(w, scale_rule="mse").view(-1).int()
    errors = []
    for scales in (coarse, coarse - 1):
        scale = scale_values(scales)[:, None]
        errors.append((round_to_scales(blocks.float(), scale).double() - blocks) / scale_values(coarse)[:, None])
    coarse_error, fine_error = (e.square().sum(1) for e in errors)
    took_fine = chosen == coarse - 1
    assert bool((took_fine | (chosen == coarse)).all()) and 0.05 < float(took_fine.float().mean()) < 0.95
    regret = torch.where(took_fine, fine_error - coarse_error, coarse_error - fine_error)
    assert float(regret.max()) <= MSE_CHOICE


def test_mse_does_not_depend_on_the_dtype_or_on_a_power_of_two(weights):
    w = weights(torch.bfloat16, 200, 64)
    codes, scales = quantize(w, scale_rule="mse")
    for other, shift in ((w.float(), 0), (w * 2.0**40, 40), (w.float() * 2.0**-90, -90)):
        other_codes, other_scales = quantize(other, scale_rule="mse")
        live = (scales > 0).repeat_interleave(16, -1)
        assert torch.equal(other_codes[live], codes[live])
        assert torch.equal(other_scales[scales > 0].int(), scales[scales > 0].int() + shift)


def test_mse_has_no_more_error_than_any_other_rule():
    w = torch.randn(512, 512, generator=torch.Generator().manual_seed(1)) * 0.02
    error = {r: float((dequantize(*quantize(w, scale_rule=r), dtype=torch.float64) - w).square().sum()) for r in RULES}
    assert error["mse"] < error["even"] < error["floor"] < error["rceil"]


def test_finite_blocks_stay_finite(edge_blocks, rule):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, block in edge_blocks(dtype).items():
            decoded = dequantize(*quantize(block, scale_rule=rule), dtype=dtype)
            assert bool(torch.isfinite(decoded).all()), (name, dtype)
            assert torch.equal(decoded.signbit(), block.signbit()), (name, dtype)


def test_subnormals_round_on_the_grid_of_the_smallest_scale():
    step = 2.0**-128  # half of 2^-127, the smallest nonzero MXFP4 magnitude
    w = torch.tensor([0.0, 0.5, 0.75, 1.0, 1.5, 2.5, 4.0, -0.25] * 4, dtype=torch.float64).mul(step).float()
    decoded = dequantize(*quantize(w), dtype=torch.float32)
    expected = torch.tensor([0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, -0.0] * 4, dtype=torch.float64).mul(step).float()
    assert torch.equal(decoded, expected) and bool((decoded != 0).any())


def test_golden_bytes_are_unchanged():
    golden = json.loads(GOLDEN.read_text())
    for case in golden:
        storage = bytearray.fromhex(case["input"])
        w = torch.frombuffer(storage, dtype=getattr(torch, case["dtype"]))
        for rule, (codes, scales) in case["rules"].items():
            got_codes, got_scales = quantize(w, scale_rule=rule)
            assert (bytes(got_codes.tolist()).hex(), bytes(got_scales.tolist()).hex()) == (codes, scales), (
                case["name"], case["dtype"], rule)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_an_axis_is_a_transpose(axis, rule, weights, same_bits):
    w = weights(torch.bfloat16, 64, 96, 32)
    codes, scales = quantize(w, scale_rule=rule, axis=axis)
    last_codes, last_scales = quantize(w.movedim(axis, -1), scale_rule=rule)
    assert codes.is_contiguous() and scales.is_contiguous()
    assert torch.equal(codes, last_codes.movedim(-1, axis)) and torch.equal(scales, last_scales.movedim(-1, axis))
    decoded = dequantize(codes, scales, dtype=torch.bfloat16, axis=axis)
    assert same_bits(decoded, dequantize(last_codes, last_scales, dtype=torch.bfloat16).movedim(-1, axis))


@pytest.mark.parametrize("shape", [(0, 63, 64), (5, 0, 32), (3, 63, 32), (100, 64), (32,), (1, 100, 7, 96)])
def test_leading_dimensions_are_free_and_may_be_empty(shape, weights):
    w = weights(torch.float32, *shape)
    codes, scales = quantize(w)
    assert codes.shape == (*shape[:-1], shape[-1] // 2) and scales.shape == (*shape[:-1], shape[-1] // 32)
    assert dequantize(codes, scales, dtype=torch.float32).shape == shape


def test_strides_and_chunking_do_not_matter(weights, rule, monkeypatch):
    w = weights(torch.float32, 100, 128)
    expected = quantize(w[::3, 64:], scale_rule=rule)
    monkeypatch.setattr("mxfp4.codec.BLOCKS_PER_CHUNK", 7)
    for view in (w[::3, 64:], w[::3, 64:].contiguous(), w.t().contiguous().t()[::3, 64:]):
        assert all(torch.equal(a, b) for a, b in zip(quantize(view, scale_rule=rule), expected, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_value_is_refused_by_index_or_becomes_a_nan_block(bad, weights, dtype, rule):
    w = weights(dtype, 4, 63, 96)
    w[2, 61, 70] = bad
    with pytest.raises(ValueError, match=r"at index \[2, 61, 70\] of a tensor of shape \[4, 63, 96\]"):
        quantize(w, scale_rule=rule)
    codes, scales = quantize(w, scale_rule=rule, nan_scale=True)
    assert (scales == 255).nonzero().tolist() == [[2, 61, 2]] and not bool(codes[2, 61, 32:].any())
    decoded = dequantize(codes, scales, dtype=dtype)
    assert bool(decoded[2, 61, 64:].isnan().all()) and int(decoded.isnan().sum()) == BLOCK_SIZE


def test_the_index_of_a_refusal_follows_the_axis(weights):
    w = weights(torch.float32, 64, 33)
    w[40, 21] = float("nan")
    with pytest.raises(ValueError, match=r"at index \[40, 21\]"):
        quantize(w, axis=0)


@pytest.mark.parametrize("call, message", [
    (lambda: quantize(torch.zeros(4, 63)), r"dimension 1 of shape \[4, 63\] has 63 values.*32"),
    (lambda: quantize(torch.zeros(100, 32), axis=0), r"dimension 0 of shape \[100, 32\] has 100 values"),
    (lambda: quantize(torch.zeros(32), axis=1), "axis 1 does not exist"),
    (lambda: quantize(torch.zeros(32, dtype=torch.float64)), "torch.float64 cannot be quantized"),
    (lambda: quantize(torch.zeros(32), scale_rule="ceil"), "'ceil' is not known; expected one of floor, rceil, even"),
    (lambda: dequantize(torch.zeros(4, 16, dtype=torch.uint8), torch.zeros(4, 2, dtype=torch.uint8),
                        dtype=torch.float32), r"expected one scale per 16 bytes"),
    (lambda: dequantize(torch.zeros(4, 16), torch.zeros(4, 1, dtype=torch.uint8), dtype=torch.float32), "uint8"),
])
def test_mistakes_are_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
ordinary = st.floats(min_value=-8.0, max_value=8.0, width=32)
blocks = st.one_of(st.lists(finite, min_size=32, max_size=32), st.lists(ordinary, min_size=32, max_size=32))
fast = settings(max_examples=150, deadline=None)


@fast
@given(blocks, st.sampled_from(RULES))
def test_quantization_is_idempotent_in_values(values, rule):
    once = dequantize(*quantize(torch.tensor(values), scale_rule=rule), dtype=torch.float32)
    twice = dequantize(*quantize(once, scale_rule=rule), dtype=torch.float32)
    assert torch.equal(once, twice) and torch.equal(once.signbit(), twice.signbit())


@fast
@given(blocks, st.sampled_from(RULES))
def test_order_within_a_block_is_kept(values, rule):
    ordered = torch.tensor(sorted(values))
    decoded = dequantize(*quantize(ordered, scale_rule=rule), dtype=torch.float32)
    assert bool((decoded.diff() >= 0).all())


@fast
@given(blocks, st.sampled_from(RULES))
def test_negation_flips_only_sign_bits(values, rule):
    w = torch.tensor(values)
    codes, scales = quantize(w, scale_rule=rule)
    negated_codes, negated_scales = quantize(-w, scale_rule=rule)
    assert torch.equal(negated_scales, scales) and torch.equal(negated_codes, codes ^ 0x88)
