"""Codes of weights that already lie on the MXFP4 grid, and back: exact, without rounding, many times faster than the codec.

Trained experts are bf16 values on the grid, so an exporter need not round: the code of a value is in its bits. Multiplied by a
power of two that makes the block's unit 8, half a unit to six units have the exponents 129 to 132, and zero has 0; so the sign,
the exponent's three lowest bits and the highest of the mantissa tell all sixteen values apart, and those of two neighbours side
by side are an index into a table of bytes of codes. Whether a value was on the grid at all is not asked of its bits: every
chunk is decoded again and compared, bit for bit, while it is in the cache. That is contract C2 for the bytes about to be
written. If a value differs, nothing is returned, and the caller decides whether that is an error or work for `mxfp4.quantize`.

Decoding looks up the four values of two bytes at once in a table made by the codec (512 KiB, for the second-level cache), and
multiplies by the scale, a power of two.

Both equal `mxfp4` bit for bit where they answer (tested for all 256 x 256 bytes). Where a C compiler is, `mxfp4.compiled` does
all this in one pass, four times as fast; what follows is for machines without.

What costs time are passes over a chunk, starting them (some 5 us), and memory that is new on every call; so each thread keeps
scratch of 5 MiB. In ns a weight on one core: codes 1.4 (2.6 by clamps and shifts of int16), comparison with decoded codes 0.6
(0.95 with a table of single bytes and `torch.equal`). Maxima of blocks in int16 took 0.41, through float32 0.24; chunks of
2^17 weights 1.7 instead of 1.4. Rejected: torch's FP8 types and back (0.6 and 3.9).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator

import numpy
import torch

from mxfp4 import compiled, dequantize
from mxfp4.format import BLOCK_SIZE, E2M1_MAX_EXPONENT, E8M0_BIAS

CHUNK_BLOCKS = 16384
# Scale bytes between which half a unit is a normal bf16 number and six units are finite.
SAFE_SCALES = (2, 252)
# Exponent (with the bias) of a block's unit where codes are read off; no bits of two neighbours' values fall on each other.
UNIT = 130
INDEX_BITS = 14
# Block maxima as bits of float32: from where the power to `UNIT` is finite, up to where scale bytes are safe, and up to where
# that power is at least 1, so that no value vanishes and each has one product.
SMALLEST, LARGEST_END, EXACT_END = ((byte + E2M1_MAX_EXPONENT) << 23 for byte in (7, SAFE_SCALES[1] + 1, UNIT + 1))


class _Scratch(threading.local):
    """Memory of one thread for one chunk."""

    def __init__(self):
        self.wide = torch.empty((CHUNK_BLOCKS, BLOCK_SIZE), dtype=torch.float32)
        self.units = torch.empty((CHUNK_BLOCKS, BLOCK_SIZE), dtype=torch.bfloat16)
        self.decoded = torch.empty((CHUNK_BLOCKS, BLOCK_SIZE), dtype=torch.bfloat16)
        self.index = torch.empty(CHUNK_BLOCKS * BLOCK_SIZE // 2, dtype=torch.int32)


_scratch = _Scratch()


@functools.cache
def _values(unit: int) -> torch.Tensor:
    """For two bytes of codes, read as one little-endian number, their four values in bf16 as one int64: [65536].

    Args:
        unit: the scale byte of all of them.
    """
    codes = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, BLOCK_SIZE // 2).contiguous()
    values = dequantize(codes, torch.full((256, 1), unit, dtype=torch.uint8), dtype=torch.bfloat16)
    pairs = values[:, :2].contiguous().view(torch.int32).view(-1)
    return torch.stack((pairs.repeat(256), pairs.repeat_interleave(256)), 1).view(torch.int64).view(-1)


@functools.cache
def _bytes() -> torch.Tensor:
    """The byte of codes for each index that `_index` makes of two values; 0 for what no two values on the grid give."""
    pairs = _values(UNIT)[:256].view(torch.bfloat16).view(-1, 4)[:, :2].contiguous()
    table = torch.zeros(1 << INDEX_BITS, dtype=torch.uint8)
    table[_index(pairs, torch.empty(256, dtype=torch.int32))] = torch.arange(256, dtype=torch.uint8)
    return table


def pack_on_grid(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Codes and scales of bf16 weights on the grid, or None if one of them is not on it.

    Args:
        w: bfloat16 [rows, columns], columns a multiple of 32.

    Returns:
        codes uint8 [rows, columns / 2], scales uint8 [rows, columns / 32]; decoding them gives `w` bit for bit. None also
        for blocks with maxima below 2^-118, which the reference handles.
    """
    if w.dtype != torch.bfloat16 or w.shape[-1] % BLOCK_SIZE:
        return None
    rows, columns = w.shape
    blocks = w.contiguous().view(-1, BLOCK_SIZE)
    shapes = (rows, columns // 2), (rows, columns // BLOCK_SIZE)
    if compiled.blocks():
        codes, scales = (torch.empty(shape, dtype=torch.uint8) for shape in shapes)
        return (codes, scales) if compiled.pack_blocks(blocks, codes, scales) else None
    largest = _largest(blocks)
    low, high = (int(bound) for bound in torch.aminmax(largest))
    if high >= LARGEST_END or low < SMALLEST and bool(((largest > 0) & (largest < SMALLEST)).any()):
        return None
    base = (largest >> 23).sub_(E2M1_MAX_EXPONENT).clamp_(min=0)  # blocks of zeros: 0
    codes, scales = torch.empty(blocks.shape[0], BLOCK_SIZE // 2, dtype=torch.uint8), base.to(torch.uint8)
    up, down = _powers(UNIT + E8M0_BIAS - base.clamp_(min=3)), _powers(scales)
    for part in _chunks(blocks.shape[0]):
        values, units = blocks[part], _scratch.units[:part.stop - part.start]
        torch.mul(values, up[part], out=units)
        index = _index(units, _scratch.index[:units.numel() // 2])
        torch.index_select(_bytes(), 0, index, out=codes[part].view(-1))
        decoded = _look_up(codes[part], UNIT if high < EXACT_END else E8M0_BIAS, _scratch.decoded)
        if not (same_bits(decoded, units) if high < EXACT_END else same_bits(decoded.mul_(down[part]), values)):
            return None
    return codes.view(shapes[0]), scales.view(shapes[1])


def unpack(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`mxfp4.dequantize(codes, scales, dtype=torch.bfloat16)` bit for bit.

    Args:
        codes: uint8 [rows, columns / 2]; scales: uint8 [rows, columns / 32].
    """
    out = torch.empty((scales.numel(), BLOCK_SIZE), dtype=torch.bfloat16)
    if compiled.blocks() and compiled.unpack_blocks(*_flat(codes, scales), out) == out.shape[0]:
        return out.view(codes.shape[0], 2 * codes.shape[1])
    for part, decode in _decoders(codes, scales):
        decode(out[part])
    return out.view(codes.shape[0], 2 * codes.shape[1])


def decodes_to(codes: torch.Tensor, scales: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether `unpack(codes, scales)` has the bits of `expected`, without holding it: chunk by chunk, in the cache.

    Args:
        codes: uint8 [rows, columns / 2]; scales: uint8 [rows, columns / 32]; expected: bfloat16 [rows, columns].
    """
    values = expected.contiguous().view(-1, BLOCK_SIZE)
    if compiled.blocks():
        blocks, flat = _flat(codes, scales)
        equal = compiled.unpack_blocks(blocks, flat, values, compare=True)
        if equal == flat.numel() or _safe(flat[equal]):
            return equal == flat.numel()
    return all(same_bits(decode(_scratch.decoded), values[part]) for part, decode in _decoders(codes, scales))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two contiguous tensors of one shape, of any dtypes, hold the same bytes; rows a multiple of 8 bytes."""
    return numpy.array_equal(a.view(torch.int64).numpy(), b.view(torch.int64).numpy())


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and the same bytes; of any size, a piece at a time."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    pieces = (t.contiguous().view(-1).view(torch.uint8).split(CHUNK_BLOCKS * BLOCK_SIZE) for t in (a, b))
    return all(numpy.array_equal(x.numpy(), y.numpy()) for x, y in zip(*pieces, strict=True))


def _chunks(blocks: int) -> list[slice]:
    return [slice(start, min(start + CHUNK_BLOCKS, blocks)) for start in range(0, blocks, CHUNK_BLOCKS)]


def _largest(blocks: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each block of bf16 [n, 32] as bits of float32, which are in the same order: int32 [n, 1]."""
    largest = torch.empty((blocks.shape[0], 1), dtype=torch.int32)
    for part in _chunks(blocks.shape[0]):
        wide = _scratch.wide[:part.stop - part.start].copy_(blocks[part]).abs_()
        torch.amax(wide.view(torch.int32), 1, keepdim=True, out=largest[part])
    return largest


def _powers(exponents: torch.Tensor) -> torch.Tensor:
    """bf16 powers of two with these exponent fields, which have the bias of E8M0."""
    return exponents.to(torch.int16).bitwise_left_shift_(7).view(torch.bfloat16)


def _index(units: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """int32 below 2^14 for each two of the values: sign, exponent and highest bit of the mantissa of both.

    The even element lies in the lower half of 32 bits (little-endian machines only, as safetensors' files). The product adds
    it 12 bits further up: its bits 15 and 9 to 6 come to lie at 27 and 21 to 18, where the odd element (31 and 25 to 22) has
    zeros if it is on the grid, and what comes to lie at 26 is set for all values but zero.
    """
    words = units.view(-1).view(torch.int32)
    return torch.mul(words, (1 << 12) + 1, out=out).bitwise_right_shift_(18).bitwise_and_((1 << INDEX_BITS) - 1)


def _look_up(codes: torch.Tensor, unit: int, out: torch.Tensor) -> torch.Tensor:
    """bf16 [n, 32] of uint8 [n, 16], all with the scale byte `unit`, in the memory of `out`."""
    out = out[:codes.shape[0]]
    index = _scratch.index[:codes.numel() // 2].copy_(codes.view(-1).view(torch.uint16))
    torch.index_select(_values(unit), 0, index, out=out.view(-1).view(torch.int64))
    return out


def _flat(codes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As blocks: codes [n, 16] and scales [n, 1], contiguous."""
    return codes.contiguous().view(-1, BLOCK_SIZE // 2), scales.contiguous().view(-1, 1)


def _decoders(codes: torch.Tensor, scales: torch.Tensor) -> Iterator[tuple[slice, Callable]]:
    """For each chunk its place, and a function that decodes it into the memory it is given; for any scale bytes."""
    blocks, flat = _flat(codes, scales)
    powers, safe = _powers(flat), _safe(flat)
    for part in _chunks(blocks.shape[0]):
        if safe or _safe(flat[part]):
            yield part, lambda out, part=part: _look_up(blocks[part], E8M0_BIAS, out).mul_(powers[part])
        else:
            yield part, lambda out, part=part: out[:part.stop - part.start].copy_(
                dequantize(blocks[part], flat[part], dtype=torch.bfloat16))


def _safe(scales: torch.Tensor) -> bool:
    if not scales.numel():
        return True
    low, high = torch.aminmax(scales)
    return int(low) >= SAFE_SCALES[0] and int(high) <= SAFE_SCALES[1]
