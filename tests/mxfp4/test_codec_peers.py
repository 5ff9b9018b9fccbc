"""The codec against torchao and compressed-tensors, byte for byte; and who is right where they differ.

Measured with torchao 0.18 and compressed-tensors 0.20. OCP Microscaling Formats v1.0: section 5.3 (E8M0 holds 2^-127
to 2^127, E2M1 has subnormals and no infinity), section 6.3 (conversion: scale from the largest magnitude, elements
rounded to nearest, ties to even, magnitudes beyond the largest element clamped).
"""

import math

import pytest
import torch

from mxfp4 import dequantize, quantize

to_mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor").to_mx
ScaleCalculationMode = pytest.importorskip("torchao.prototype.mx_formats.config").ScaleCalculationMode
compressed = pytest.importorskip("compressed_tensors.compressors.mxfp4.base").MXFP4PackedCompressor
quantization = pytest.importorskip("compressed_tensors.quantization")

# Below this block maximum torchao divides by 2^-126 where the scale byte it writes says 2^-127.
TORCHAO_SMALLEST = 2.0**-124
# From here the least scale that avoids saturation makes 4 units infinite; peers write it.
OVERFLOW = 6 * 2.0**125


def torchao_bytes(w, rule):
    mode = {"floor": ScaleCalculationMode.FLOOR, "rceil": ScaleCalculationMode.RCEIL, "even": ScaleCalculationMode.EVEN}
    scales, codes = to_mx(w, torch.float4_e2m1fn_x2, 32, mode[rule])
    return codes.view(torch.uint8), scales.view(torch.uint8)


def compressed_bytes(w):
    """Packed codes and scales of [N, 32 n] weights through the library's own scale calculation and compressor."""
    args = quantization.QuantizationArgs(
        num_bits=4, type="float", strategy="group", group_size=32, symmetric=True, scale_dtype=torch.uint8,
        zp_dtype=torch.uint8,
    )
    blocks = w.unflatten(-1, (-1, 32))
    scale, _ = quantization.utils.calculate_qparams(blocks.amin(-1), blocks.amax(-1), args)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    packed = compressed.compress({"weight": w, "weight_scale": scale}, scheme)
    return packed["weight_packed"], packed["weight_scale"]


def finite_edges(blocks):
    """The edge blocks on which all peers follow the specification."""
    return {n: b for n, b in blocks.items() if TORCHAO_SMALLEST <= float(b.abs().amax()) <= OVERFLOW or not b.any()}


@pytest.mark.parametrize("rule", ["floor", "rceil", "even"])
def test_bytes_equal_torchao_on_random_weights(rule, dtype, weights):
    w = weights(dtype, 300, 256)
    for ours, theirs in zip(quantize(w, scale_rule=rule), torchao_bytes(w, rule), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rule", ["floor", "rceil", "even"])
def test_bytes_equal_torchao_on_edge_blocks(rule, dtype, edge_blocks):
    for name, block in finite_edges(edge_blocks(dtype)).items():
        for ours, theirs in zip(quantize(block, scale_rule=rule), torchao_bytes(block, rule), strict=True):
            assert torch.equal(ours, theirs), name


def test_bytes_equal_compressed_tensors_on_random_weights(dtype, weights):
    w = weights(dtype, 300, 256) + torch.finfo(dtype).tiny  # without blocks of zeros, see below
    for ours, theirs in zip(quantize(w), compressed_bytes(w), strict=True):
        assert torch.equal(ours, theirs)


def test_bytes_equal_compressed_tensors_on_edge_blocks(dtype, edge_blocks):
    for name, block in finite_edges(edge_blocks(dtype)).items():
        codes, scales = quantize(block)
        their_codes, their_scales = compressed_bytes(block[None])
        if block.any():
            assert torch.equal(scales[None], their_scales), name
            assert torch.equal(codes[None], their_codes), name
        else:
            assert not bool((their_codes & 0x77).any()), name


def test_torchao_misreads_its_own_smallest_scale_and_we_do_not(dtype):
    """2^-126 is 2 units of 2^-127, an E2M1 value, so 6.3 makes it exact. torchao writes byte 0, uses 2^-126."""
    w = torch.full((32,), 2.0**-126, dtype=dtype)
    for rule in ("floor", "rceil", "even"):
        assert torch.equal(dequantize(*quantize(w, scale_rule=rule), dtype=dtype), w)
        theirs = dequantize(*torchao_bytes(w, rule), dtype=dtype)
        assert float(theirs[0]) == (0.0 if rule == "rceil" else 2.0**-127)


def test_peers_turn_the_largest_finite_weights_into_infinity_or_zero_and_we_saturate(dtype):
    """Section 6.3 clamps values beyond the largest representable one; in these dtypes that is 6 * 2^125."""
    w = torch.full((1, 32), torch.finfo(dtype).max, dtype=dtype)
    for rule in ("rceil", "even"):
        assert float(dequantize(*quantize(w, scale_rule=rule), dtype=dtype)[0, 0]) == 6 * 2.0**125
        assert math.isinf(float(dequantize(*torchao_bytes(w, rule), dtype=dtype)[0, 0]))
    assert float(dequantize(*compressed_bytes(w), dtype=dtype)[0, 0]) == 0.0


def test_compressed_tensors_loses_the_sign_of_zero_and_we_keep_it(dtype):
    """Section 5.3.3 gives E2M1 both zeros, and rounding to nearest keeps the sign, as torchao and hardware do."""
    w = torch.full((1, 32), -0.0, dtype=dtype)
    assert quantize(w)[0].tolist() == torchao_bytes(w, "even")[0].tolist() == [[0x88] * 16]
    assert compressed_bytes(w)[0].tolist() == [[0x00] * 16]
