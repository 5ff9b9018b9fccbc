"""What the quantized all-gather sends and what arrives: fake_quantize(master), bit for bit, in 17 bytes per 32 weights."""

import pytest
import torch

from mxfp4 import fake_quantize, quantize
from training.sharding.quantized_gather import QuantizedGather, decode


def master(shape, seed=0):
    """Rows of very different size, an empty expert, a block of zeros, negative zeros, ties and the smallest scales."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    w *= torch.logspace(-30, 30, shape[1])[:, None]
    w[-1] = 0.0
    w[0, 0, :32] = -0.0
    w[0, 1] = torch.tensor([0.25, 0.75, 1.25, -2.5, 5.0, -6.0, 7.0, 1.0]).repeat(shape[2] // 8)
    w[0, 2] = 1e-39
    return w


def gather_of(w, axis, rule="even", even=True, dtype=torch.bfloat16, padded=None):
    gather = QuantizedGather(w, axis=axis, scale_rule=rule, even=even, compute_dtype=dtype, padded_rows=padded or len(w))
    gather.encode(w)
    return gather


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("axis, shape", [(-1, (3, 7, 96)), (1, (3, 64, 40))])
@pytest.mark.parametrize("rule", ["even", "floor", "rceil", "mse"])
def test_the_gathered_weights_are_the_rounded_masters_bit_for_bit(rule, axis, shape, dtype):
    w = master(shape)
    gather = gather_of(w, axis, rule, dtype=dtype)
    expected = fake_quantize(w, scale_rule=rule, axis=axis).to(dtype)
    (sent,), _ = w.fsdp_pre_all_gather(None, None, None, None, None)
    first, inner = w.fsdp_post_all_gather((sent,), None, dtype)
    again = torch.full_like(expected, torch.nan)
    w.fsdp_post_all_gather((sent,), None, dtype, out=again)
    for found in (first, again, gather.rounded(dtype)):
        assert torch.equal(found, expected) and torch.equal(found.signbit(), expected.signbit())
    assert inner == (first,)
    assert all(torch.equal(a, b) for a, b in zip(gather.codes(), quantize(w, scale_rule=rule, axis=axis), strict=True))


def test_a_gather_sends_17_bytes_for_32_weights_and_counts_them():
    w = master((4, 8, 64))
    gather = gather_of(w, -1)
    for _ in range(3):
        (sent,), _ = w.fsdp_pre_all_gather(None, None, None, None, None)
    assert sent.dtype is torch.uint8 and sent.nbytes == w.numel() * 17 // 32
    assert (gather.sent, gather.gathers) == (3 * sent.nbytes, 3)


def test_all_bytes_decode_as_the_codec_does():
    from mxfp4 import dequantize

    codes = torch.arange(256, dtype=torch.uint8).repeat_interleave(16).view(1, 256, 16)
    scales = torch.arange(253, dtype=torch.uint8).repeat(2)[:256].view(1, 256, 1)
    for dtype in (torch.bfloat16, torch.float32):
        out = decode(torch.cat((codes, scales), dim=2), 2, torch.empty(1, 256, 32, dtype=dtype))
        assert torch.equal(out, dequantize(codes, scales, dtype=dtype))


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_a_shard_of_another_size_sends_rounded_values_in_the_padded_shape(rows):
    w = master((2, 7, 64))[:rows].clone()
    gather = gather_of(w, -1, even=False, padded=2)
    (sent,), _ = w.fsdp_pre_all_gather(None, None, None, None, None)
    assert sent.shape == (2, 7, 64) and not sent[rows:].any()
    assert torch.equal(gather.rounded(torch.bfloat16), fake_quantize(w).bfloat16() if rows else sent[:0])


def test_a_non_finite_master_is_refused():
    w = master((2, 4, 32))
    w[1, 2, 3] = torch.inf
    with pytest.raises(ValueError, match="inf"):
        gather_of(w, -1)
