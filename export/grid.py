"""Codes of weights that already lie on the MXFP4 grid, and back: exact, without rounding, several times faster than the codec.

Trained experts are bf16 values on the grid, so an exporter need not round: the code of a value is in its bits. With b the
scale byte (the exponent of the block's maximum, less 2) and the six lowest mantissa bits removed, h = 2 * exponent + top
mantissa bit, the magnitude code is h - 2 b + 2, except that half a unit (h - 2 b = -2) has code 1. Whether a value was on the
grid at all is not asked of its bits: every chunk is decoded again and compared, bit for bit, while it is in the cache. That is
contract C2 for the bytes about to be written, and it is cheaper than four tests of each value would be. If a value differs,
nothing is returned, and the caller decides whether that is an error or work for `mxfp4.quantize`.

Decoding looks up both values of a byte at once in a table made by the codec, and multiplies by the scale, a power of two.

Both equal `mxfp4` bit for bit where they answer (tested for all 256 x 256 bytes).
"""

from __future__ import annotations

import functools

import torch

from mxfp4 import dequantize
from mxfp4.format import BLOCK_SIZE, E2M1_MAX_EXPONENT, E8M0_BIAS

# Blocks of one chunk. Some 25 operations of 5 us to start stand against the cache: one core took 10.1 ns a weight with 512
# blocks, 4.5 with 2048, 3.1 with 8192, and no less with more.
CHUNK_BLOCKS = 8192
# Scale bytes between which half a unit is a normal bf16 number and six units are finite.
SAFE_SCALES = (2, 252)


@functools.cache
def _pairs() -> torch.Tensor:
    """For each byte its two values in bf16, the even element in the lower half, as int32 [256]."""
    codes = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, BLOCK_SIZE // 2).contiguous()
    values = dequantize(codes, torch.full((256, 1), E8M0_BIAS, dtype=torch.uint8), dtype=torch.bfloat16)
    return values[:, :2].contiguous().view(torch.int32).view(-1)


def pack_on_grid(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Codes and scales of bf16 weights on the grid, or None if one of them is not on it.

    Args:
        w: bfloat16 [rows, columns], columns a multiple of 32.

    Returns:
        codes uint8 [rows, columns / 2], scales uint8 [rows, columns / 32]; decoding them gives `w` bit for bit. None also
        for blocks with maxima below 2^-120, which the reference handles.
    """
    if w.dtype != torch.bfloat16 or w.shape[-1] % BLOCK_SIZE:
        return None
    rows, columns = w.shape
    blocks = w.contiguous().view(torch.int16).view(-1, BLOCK_SIZE)
    codes = torch.empty(blocks.shape[0], BLOCK_SIZE // 2, dtype=torch.uint8)
    scales = torch.empty(blocks.shape[0], dtype=torch.uint8)
    values = torch.empty((min(CHUNK_BLOCKS, blocks.shape[0]), BLOCK_SIZE), dtype=torch.bfloat16)
    for start in range(0, blocks.shape[0], CHUNK_BLOCKS):
        part = slice(start, start + CHUNK_BLOCKS)
        if not _pack(blocks[part], codes[part], scales[part]):
            return None
        if not same_bits(_unpack(codes[part], scales[part], values), blocks[part]):
            return None
    return codes.view(rows, columns // 2), scales.view(rows, columns // BLOCK_SIZE)


def unpack(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`mxfp4.dequantize(codes, scales, dtype=torch.bfloat16)` bit for bit.

    Args:
        codes: uint8 [rows, columns / 2]; scales: uint8 [rows, columns / 32].
    """
    blocks, flat = codes.contiguous().view(-1, BLOCK_SIZE // 2), scales.contiguous().view(-1)
    out = torch.empty((blocks.shape[0], BLOCK_SIZE), dtype=torch.bfloat16)
    for start in range(0, blocks.shape[0], CHUNK_BLOCKS):
        part = slice(start, start + CHUNK_BLOCKS)
        low, high = (int(bound) for bound in torch.aminmax(flat[part]))
        if low < SAFE_SCALES[0] or high > SAFE_SCALES[1]:
            out[part] = dequantize(blocks[part], flat[part, None], dtype=torch.bfloat16)
        else:
            _unpack(blocks[part], flat[part], out[part])
    return out.view(codes.shape[0], -1)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two contiguous tensors of one shape, of any dtypes, hold the same bytes; rows a multiple of 8 bytes."""
    return torch.equal(a.view(torch.int64), b.view(torch.int64))  # a fourth of the comparisons of int16


def _pack(bits: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> bool:
    """Packs int16 [n, 32] into `codes` and `scales`; False for blocks out of range. Values off the grid become others.

    Integer sums and clamps only: on a CPU, comparisons and masks of int16 cost ten times as much.
    """
    magnitude = bits & 0x7FFF
    largest = magnitude.amax(1)
    base = (largest >> 7) - E2M1_MAX_EXPONENT
    empty = largest == 0
    if bool(((base < 7) & ~empty).any()) or int(base.max()) > SAFE_SCALES[1]:
        return False
    base.masked_fill_(empty, 0)
    # Half a unit: 0; one unit: 2; 1.5: 3; ... 6: 7; zeros: below 0 after the shift, as every true exponent is at least 7.
    code = (magnitude >> 6).sub_((2 * base - 2).clamp_(min=1)[:, None]).clamp_(-1, 7)
    code.sub_(code.clamp(0, 1)).add_(1)  # -1, 0, 2, 3, ... -> 0, 1, 2, 3, ...
    code |= (bits >> 12) & 8
    pair = code.view(torch.int32)  # the even element in the lower half (little-endian machines only, as safetensors' files)
    codes.copy_(pair | (pair >> 12))  # narrowing keeps the lowest eight bits
    scales.copy_(base)
    return True


def _unpack(codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """bf16 [n, 32] of uint8 [n, 16] and [n], in the memory of `out`; scale bytes 0 (of zeros only) or within SAFE_SCALES."""
    n = codes.shape[0]
    values = torch.index_select(_pairs(), 0, codes.reshape(-1).to(torch.int32)).view(torch.bfloat16).view(n, BLOCK_SIZE)
    powers = (scales.to(torch.int16) << 7).view(torch.bfloat16)  # the exponent field of bf16 has the bias of E8M0
    return torch.mul(values, powers[:, None], out=out[:n])
