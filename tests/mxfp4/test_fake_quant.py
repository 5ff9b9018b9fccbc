"""Fake quantization equals the codec bit for bit, on every path, and its gradient is straight through."""

import contextlib
from contextlib import contextmanager

import pytest
import torch

from mxfp4 import compiled, dequantize, fake_quantize, fake_quantize_, quantize
from mxfp4 import fake_quant as implementation
from mxfp4.codec import scale_values
from mxfp4.fake_quant import saturated

pytestmark = pytest.mark.usefixtures("way")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reference(w, rule="even", axis=-1, dtype=None):
    return dequantize(*quantize(w, scale_rule=rule, axis=axis), dtype=dtype or w.dtype, axis=axis)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks that end in the middle of rows, so that a small tensor has many, the last one partial; three threads."""
    monkeypatch.setattr(implementation, "_CHUNK", 544)
    monkeypatch.setattr(compiled, "BLOCKS_PER_THREAD", 17)
    monkeypatch.setattr(compiled, "OTHER_BLOCKS", 5)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


SHAPES = [(32,), (63, 64), (100, 96), (3, 5, 7, 32), (8, 63, 160), (1000, 256), (0, 32), (4, 0)]


@pytest.mark.parametrize("shape", SHAPES)
def test_random_tensors_equal_the_codec(shape, dtype, rule, weights, same_bits):
    w = weights(dtype, *shape)
    assert same_bits(fake_quantize(w, scale_rule=rule), reference(w, rule))


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_every_axis_and_chunk_boundary_equals_the_codec(axis, dtype, rule, weights, same_bits, small_chunks):
    w = weights(dtype, 32, 96, 64)
    assert same_bits(fake_quantize(w, scale_rule=rule, axis=axis), reference(w, rule, axis))


def test_edge_blocks_equal_the_codec_alone_and_together(edge_blocks, rule, same_bits, small_chunks):
    for dtype in DTYPES:
        blocks = edge_blocks(dtype)
        for name, block in blocks.items():
            assert same_bits(fake_quantize(block, scale_rule=rule), reference(block, rule)), (name, dtype)
        together = torch.stack(list(blocks.values()))
        assert same_bits(fake_quantize(together, scale_rule=rule), reference(together, rule))
        assert same_bits(fake_quantize(together.t(), scale_rule=rule, axis=0), reference(together.t(), rule, 0))


def test_every_bfloat16_value_equals_the_codec(rule, same_bits):
    bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    every = bits.view(torch.bfloat16)
    every = every[torch.isfinite(every)]
    for block_maximum in (None, 0.7, 1.0, 2.0**90):
        w = every.view(-1, 32).clone()
        if block_maximum is not None:
            w = torch.cat([w.clamp(-block_maximum, block_maximum), torch.full_like(w, block_maximum)], 1)
            w = w[:, torch.arange(64).view(2, 32).t().flatten()].contiguous()
        assert same_bits(fake_quantize(w, scale_rule=rule), reference(w, rule))


@pytest.mark.parametrize("exponent", [-126, -124, -101, -100, -99, 98, 99, 100, 101, 125])
def test_both_sides_of_the_fast_path_limits_equal_the_codec(exponent, dtype, rule, weights, same_bits):
    w = weights(torch.float32, 8, 64).tanh().double()
    w = (w / w.abs().amax() * 1.96875 * 2.0**exponent).to(dtype)
    assert same_bits(fake_quantize(w, scale_rule=rule), reference(w, rule))


def test_blocks_of_zeros_among_others_equal_the_codec(dtype, rule, weights, same_bits, small_chunks):
    w = weights(dtype, 6, 63, 64)
    w[2] = 0.0
    w[4, 10:20] = -0.0
    assert same_bits(fake_quantize(w, scale_rule=rule), reference(w, rule))


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_writing_into_another_dtype_equals_decoding_into_it(source, target, rule, weights, edge_blocks, same_bits):
    w = torch.cat([weights(source, 100, 32).clamp(-60, 60), torch.stack(list(edge_blocks(source).values()))])
    out = torch.full(w.shape, torch.nan, dtype=target)
    assert fake_quantize_(out, w, scale_rule=rule) is out
    assert same_bits(out, reference(w, rule, dtype=target))


def test_writing_into_the_weights_themselves_and_into_strided_memory(dtype, rule, weights, same_bits, small_chunks):
    w = weights(dtype, 63, 96)
    w[5, :32] *= 2.0**-110  # one chunk takes the reference path
    expected = reference(w, rule)
    strided = torch.empty(96, 63, dtype=dtype).t()
    assert same_bits(fake_quantize_(strided, w, scale_rule=rule), expected)
    assert same_bits(fake_quantize_(w, w, scale_rule=rule), expected)


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.inference_mode])
def test_unusual_blocks_on_several_threads_are_rounded_whatever_records_gradients(mode, rule, weights, same_bits, small_chunks):
    w = weights(torch.float32, 63, 96)
    w[50, 32:64] *= 2.0**-110
    expected = reference(w, rule)
    with mode():
        parameter = torch.nn.Parameter(w.clone())
        assert same_bits(fake_quantize(w, scale_rule=rule), expected)
        assert same_bits(fake_quantize_(parameter, parameter, scale_rule=rule).data, expected)


def test_writing_into_a_parameter_leaves_no_graph(weights):
    parameter = torch.nn.Parameter(torch.zeros(4, 32, dtype=torch.bfloat16))
    master = weights(torch.float32, 4, 32).requires_grad_(True)
    fake_quantize_(parameter.data, master)
    assert parameter.is_leaf and parameter.grad_fn is None


def test_strided_weights_equal_the_codec(dtype, rule, weights, same_bits):
    w = weights(dtype, 100, 64, 63).transpose(1, 2)[::3]
    assert same_bits(fake_quantize(w, scale_rule=rule), reference(w, rule))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_value_is_refused_by_index(bad, dtype, rule, weights, small_chunks):
    w = weights(dtype, 4, 63, 96)
    w[3, 62, 95] = bad
    with pytest.raises(ValueError, match=r"at index \[3, 62, 95\] of a tensor of shape \[4, 63, 96\]"):
        fake_quantize(w, scale_rule=rule)
    w = weights(dtype, 64, 63)
    w[40, 21] = bad
    with pytest.raises(ValueError, match=r"at index \[40, 21\]"):
        fake_quantize(w, scale_rule=rule, axis=0)


def test_nan_scale_makes_exactly_the_bad_blocks_nan(dtype, rule, weights, same_bits):
    w = weights(dtype, 10, 96)
    expected = reference(w, rule)
    w[7, 40] = float("inf")
    expected[7, 32:64] = torch.nan
    got = fake_quantize(w, scale_rule=rule, nan_scale=True)
    assert torch.equal(got.isnan(), expected.isnan())
    assert same_bits(got.nan_to_num(0.0), expected.nan_to_num(0.0))


def test_identity_gradient_is_the_output_gradient_even_where_saturated(dtype, rule):
    w = torch.linspace(-7.5, 7.5, 64).to(dtype).requires_grad_(True)
    g = torch.randn(64, generator=torch.Generator().manual_seed(3)).to(dtype)
    fake_quantize(w, scale_rule=rule).backward(g)
    assert torch.equal(w.grad, g)


def test_clipped_gradient_is_zero_exactly_beyond_six_units(dtype, rule, weights):
    for axis in (0, 1, -1):
        w = weights(dtype, 64, 96, 32).requires_grad_(True)
        g = torch.rand(w.shape, generator=torch.Generator().manual_seed(3)).add(0.5).to(dtype)
        fake_quantize(w, scale_rule=rule, axis=axis, ste="clip").backward(g)
        scale = scale_values(quantize(w, scale_rule=rule, axis=axis)[1])
        beyond = w.detach().abs() > 6 * scale.repeat_interleave(32, dim=axis)
        assert torch.equal(w.grad, torch.where(beyond, 0.0, g)) and torch.equal(
            saturated(w, scale_rule=rule, axis=axis), beyond)
        assert bool(beyond.any()) == (rule != "rceil")


def test_nan_scale_with_a_clipped_gradient_leaves_the_other_blocks_as_they_are(dtype, rule, weights, same_bits):
    w = weights(dtype, 10, 96)
    whole = w.clone().requires_grad_(True)
    fake_quantize(whole, scale_rule=rule, ste="clip").sum().backward()
    w[7, 40] = float("nan")
    w.requires_grad_(True)
    out = fake_quantize(w, scale_rule=rule, ste="clip", nan_scale=True)
    out.sum().backward()
    bad = torch.zeros(10, 96, dtype=torch.bool)
    bad[7, 32:64] = True
    assert torch.equal(out.isnan(), bad) and torch.equal(w.grad[~bad], whole.grad[~bad])


def test_the_gradient_reaches_strided_weights(weights):
    w = weights(torch.float32, 63, 64).requires_grad_(True)
    (fake_quantize(w.t(), axis=0) * 3).sum().backward()
    assert torch.equal(w.grad, torch.full_like(w, 3.0))


def test_the_fused_kernel_is_launched_on_the_gpu_of_its_tensor(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")
    from mxfp4 import fake_quant_triton

    current = []

    @contextmanager
    def device_of(w):
        current.append(w.device)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda w, out, *_, **__: launched.append((w.device, list(current)))

    launched = []
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(fake_quant_triton, "fake_quantize_kernel", Kernel())
    w = torch.zeros(4, 32)
    fake_quant_triton.fake_quantize_fused_(torch.empty_like(w), w)
    assert launched == [(w.device, [w.device])] and not current


@pytest.mark.parametrize("call, message", [
    (lambda: fake_quantize(torch.zeros(4, 63)), "has 63 values"),
    (lambda: fake_quantize(torch.zeros(32), ste="round"), "ste 'round' is not known; expected identity or clip"),
    (lambda: fake_quantize(torch.zeros(32), scale_rule="up"), "'up' is not known"),
    (lambda: fake_quantize_(torch.zeros(64), torch.zeros(32)), r"out is torch.float32 \[64\].*shape \[32\]"),
    (lambda: fake_quantize_(torch.zeros(32).int(), torch.zeros(32)), "out is torch.int32"),
])
def test_mistakes_are_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()
