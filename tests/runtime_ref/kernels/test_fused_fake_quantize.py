"""Fake quantization in one launch equals the reference bit for bit (C1), and hands over what it cannot do."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")

from mxfp4 import fake_quant, fake_quant_triton
from mxfp4.fake_quant import fake_quantize, fake_quantize_
from mxfp4.fake_quant_triton import fake_quantize_fused_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(shape, dtype, seed=0):
    """All magnitudes, ties of the E2M1 grid, zeros of both signs, an empty block."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-8, 6, shape, generator=generator)
    w.view(-1)[:64] = torch.arange(64) * 0.125 - 4.0
    w.view(-1)[64:70] = torch.tensor([0.0, -0.0, 6.0, -7.0, 0.25, -0.75])
    if w.shape[-1] % 32 == 0:
        w.view(-1, 32)[5] = 0.0
    return w.to(dtype)


def same(a, b):
    kind = torch.int32 if a.dtype is torch.float32 else torch.int16
    return torch.equal(a.view(kind), b.view(kind))


@pytest.mark.parametrize("rule", ["floor", "rceil", "even"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_equals_the_reference_bit_for_bit(rule, dtype, out_dtype):
    w = weights((9, 7, 64), dtype)
    found = fake_quantize_fused_(torch.full(w.shape, float("nan"), dtype=out_dtype), w, scale_rule=rule)
    assert same(found, fake_quantize_(torch.empty_like(found), w, scale_rule=rule))


@pytest.mark.parametrize("axis", [0, 1])
def test_blocks_lie_along_any_axis(axis):
    w = weights((64, 96, 3), torch.bfloat16)
    found = fake_quantize_fused_(torch.full_like(w, float("nan")), w, axis=axis)
    assert same(found, fake_quantize_(torch.empty_like(w), w, axis=axis))


@pytest.mark.parametrize("value", [2.0**101, 1e-38, 2.0**-120])
def test_blocks_beyond_its_range_are_the_codecs(value):
    w = weights((4, 64), torch.float32)
    w[2, 3] = value
    w[2, 32:] = value
    found = fake_quantize_fused_(torch.empty_like(w), w)
    assert same(found, fake_quantize_(torch.empty_like(w), w))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value):
    w = weights((4, 64), torch.bfloat16)
    w[1, 7] = value
    with pytest.raises(ValueError):
        fake_quantize_fused_(torch.empty_like(w), w)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Tensors count as a GPU's; the list of what the fused kernel was given."""
    given, fused = [], fake_quant_triton.fake_quantize_fused_

    def counted(out, w, **options):
        given.append(tuple(w.shape))
        return fused(out, w, **options)

    monkeypatch.setattr(fake_quant, "fuses", lambda w: True)
    monkeypatch.setattr(fake_quant_triton, "fake_quantize_fused_", counted)
    return given


def test_training_on_a_gpu_rounds_in_one_launch_and_elsewhere_does_not(on_a_gpu, monkeypatch):
    masters = weights((4, 9, 64), torch.float32)
    found = fake_quantize_(torch.empty(masters.shape, dtype=torch.bfloat16), masters)
    differentiable = fake_quantize(masters.requires_grad_(), axis=-1)
    differentiable.sum().backward()
    assert on_a_gpu == [(4, 9, 64)] * 2 and torch.equal(masters.grad, torch.ones_like(masters))
    monkeypatch.undo()
    assert same(found, fake_quantize_(torch.empty_like(found), masters))
    assert same(differentiable.detach(), fake_quantize(masters.detach()))


def test_what_the_kernel_does_not_do_stays_with_the_chunks(on_a_gpu):
    w = weights((4, 64), torch.bfloat16)
    expected = fake_quantize_(torch.empty_like(w), w, scale_rule="mse")
    in_place = w.clone()
    fake_quantize_(in_place, in_place)
    w[1, 2] = float("inf")
    assert fake_quantize_(torch.empty_like(w), w, nan_scale=True)[1, :32].isnan().all()
    assert on_a_gpu == [] and not expected.isnan().any() and not in_place.isnan().any()
    with pytest.raises(ValueError, match="index"):
        fake_quantize_(torch.empty_like(w), w)
    assert on_a_gpu == [(4, 64)]


def test_mse_and_outputs_that_cannot_be_are_refused():
    w = weights((4, 64), torch.bfloat16)
    with pytest.raises(ValueError, match="'mse'"):
        fake_quantize_fused_(torch.empty_like(w), w, scale_rule="mse")
    with pytest.raises(ValueError, match="another contiguous"):
        fake_quantize_fused_(w, w)
    assert fake_quantize_fused_(torch.empty(0, 32), torch.empty(0, 32)).shape == (0, 32)
