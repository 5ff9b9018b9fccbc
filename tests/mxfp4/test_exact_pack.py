"""Codes read off weights on the grid, and back: the codec's, in every way that computes them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxfp4 import dequantize, fake_quantize, quantize
from mxfp4.exact_pack import decodes_to, pack_on_grid, unpack

pytestmark = pytest.mark.usefixtures("way")


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), blocks=st.integers(1, 5), spread=st.floats(0, 12), seed=st.integers(0, 999),
       trained=st.sampled_from(["floor", "even", "rceil", "mse"]), rule=st.sampled_from(["floor", "even", "rceil", "mse"]))
def test_codes_read_off_grid_weights_are_those_of_the_reference(rows, blocks, spread, seed, trained, rule):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, 32 * blocks, generator=generator) * torch.exp(spread * torch.randn(rows, 1, generator=generator))
    w[torch.rand(w.shape, generator=generator) < 0.2] = -0.0
    w = fake_quantize(w.clamp(-1e30, 1e30).bfloat16(), scale_rule=trained)
    packed, reference = pack_on_grid(w), quantize(w, scale_rule=rule)
    if packed is not None:  # blocks with tiny maxima are left to the reference
        assert torch.equal(packed[0], reference[0]) and torch.equal(packed[1], reference[1])
    else:
        assert float(w.abs().view(rows, -1, 32).amax(-1).min()) < 2.0**-118


def test_weights_off_the_grid_are_never_packed():
    w = fake_quantize(torch.randn(8, 64).bfloat16())
    for value in (5.0, 0.75, 2.5, 0.25, 1.0078125):
        off = w.clone()
        off[3, :32] = torch.tensor([6.0, -4.0, 0.5] + [1.0] * 29)
        off[3, 7] = value
        assert pack_on_grid(off) is None


@pytest.mark.parametrize("exponent", [-116, -80, -1, 2, 3, 4, 80, 124])
def test_any_changed_bit_of_a_weight_on_the_grid_is_seen_at_any_scale(exponent):
    """Codes are read off a product; where it could vanish or have a neighbour's bits, the proof must still see it."""
    block = torch.tensor([6.0, -4.0, 3.0, -2.0, 1.5, -1.0, 0.5, -0.5, 0.0, -0.0]).repeat(4)[:32]
    w = (torch.cat((block, torch.zeros(32), -block)).double() * 2.0**exponent).bfloat16().view(1, -1)
    packed = pack_on_grid(w)
    assert packed is not None and torch.equal(packed[0], quantize(w)[0]) and torch.equal(packed[1], quantize(w)[1])
    for place in range(w.numel()):
        for bit in range(16):
            other = w.clone()
            other.view(torch.int16)[0, place] ^= -(2**15) if bit == 15 else 1 << bit
            packed = pack_on_grid(other)
            if packed is not None:  # another value of the grid
                assert torch.equal(dequantize(*packed, dtype=torch.bfloat16).view(torch.int16), other.view(torch.int16))


def test_decoded_codes_are_compared_to_the_last_bit_of_every_chunk(monkeypatch):
    monkeypatch.setattr("mxfp4.exact_pack.CHUNK_BLOCKS", 4)
    w = fake_quantize(torch.randn(7, 64).bfloat16())
    codes, scales = pack_on_grid(w)
    scales[3] = 0  # subnormal units: the reference decodes them
    w = dequantize(codes, scales, dtype=torch.bfloat16)
    assert decodes_to(codes, scales, w) and torch.equal(unpack(codes, scales), w)
    for place in range(w.numel()):
        other = w.clone()
        other.view(torch.int16).view(-1)[place] ^= 1
        assert not decodes_to(codes, scales, other)


def test_decoding_of_the_verifier_equals_the_codec_for_every_code_and_scale():
    codes = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16).contiguous()
    for scale in range(256):
        scales = torch.full((256, 1), scale, dtype=torch.uint8)
        ours, expected = unpack(codes, scales), dequantize(codes, scales, dtype=torch.bfloat16)
        assert torch.equal(ours.isnan(), expected.isnan())
        assert torch.equal(ours.nan_to_num(0).view(torch.int16), expected.nan_to_num(0).view(torch.int16)), scale


def test_tensors_that_do_not_belong_together_or_lie_elsewhere_are_refused_and_none_are_decoded(way):
    codes, scales = pack_on_grid(fake_quantize(torch.randn(4, 64).bfloat16()))
    assert unpack(codes[:0], scales[:0]).shape == (0, 64)
    if way == "torch":
        return
    for wrong in ((codes[:2], scales), (codes, scales.int()), (codes.to("meta"), scales)):
        with pytest.raises(ValueError, match="do not belong together"):
            unpack(*wrong)
    with pytest.raises(ValueError, match="do not belong together"):
        pack_on_grid(torch.empty(4, 64, dtype=torch.bfloat16, device="meta"))
