"""Started by test_quick_interpreter.py with "plain" or "quick": what a kernel of many operations stores, as hexadecimal text,
one line for each of its results."""

import contextlib
import sys

import torch
import triton
import triton.language as tl

from tests.runtime_ref.kernels.quick_interpreter import quick_interpreter

ROWS, COLUMNS = 4, 8
INPUTS = {torch.int8: [-128, -1, 0, 3], torch.uint8: [0, 1, 127, 255], torch.int16: [-32768, -7, 0, 99],
          torch.int32: [-2**31, -5, 0, 17], torch.int64: [-2**40, -1, 0, 9],
          torch.float32: [-1.5, 0.0, 3.25e-30, 7e20], torch.bfloat16: [-2.0, 0.0, 1e-30, 3.0]}


@triton.jit
def store(out, place, value, N: tl.constexpr):
    """Whatever it is, as the two words of a 64-bit number."""
    flat = tl.broadcast_to(value, (4, 8)).reshape(32)
    if flat.dtype == tl.float32:
        flat = flat.to(tl.int32, bitcast=True)
    if flat.dtype == tl.bfloat16:
        flat = flat.to(tl.int16, bitcast=True)
    tl.store(out + place * 32 + tl.arange(0, 32), flat.to(tl.int64))
    return place + 1


@triton.jit
def binary(out, place, a, b, INTEGER: tl.constexpr, N: tl.constexpr):
    place = store(out, place, a + b, N)
    place = store(out, place, a - b, N)
    place = store(out, place, a * b, N)
    place = store(out, place, a < b, N)
    place = store(out, place, a <= b, N)
    place = store(out, place, a > b, N)
    place = store(out, place, a >= b, N)
    place = store(out, place, a == b, N)
    place = store(out, place, a != b, N)
    place = store(out, place, tl.where(a < b, a, b), N)
    place = store(out, place, (a < b) & (b != a) | (a == b), N)
    if INTEGER:
        place = store(out, place, a & b, N)
        place = store(out, place, a | b, N)
        place = store(out, place, a ^ b, N)
    return place


@triton.jit
def operations(x, y, out, few, INTEGER: tl.constexpr, N: tl.constexpr):
    row, column = tl.arange(0, 4), tl.arange(0, 8)
    at = row[:, None] * 8 + column[None, :]
    block, tall, wide = tl.load(x + at), tl.load(x + row)[:, None], tl.load(y + column)[None, :]
    scalar = tl.load(y + 1)
    if x.dtype.element_ty == tl.bfloat16:
        block, tall, wide, scalar = block.to(tl.float32), tall.to(tl.float32), wide.to(tl.float32), scalar.to(tl.float32)
    place = binary(out, 0, block, block, INTEGER, N)
    place = binary(out, place, tall, wide, INTEGER, N)
    place = binary(out, place, block, wide, INTEGER, N)
    place = binary(out, place, block, scalar, INTEGER, N)
    place = binary(out, place, scalar, tall, INTEGER, N)
    place = binary(out, place, block, 3, INTEGER, N)
    place = binary(out, place, 2, wide, INTEGER, N)
    place = binary(out, place, block, few, INTEGER, N)  # another dtype, unless it is int32
    place = binary(out, place, block.to(tl.int64), few, True, N)
    if not INTEGER:
        place = binary(out, place, block, 1.5, INTEGER, N)
    if INTEGER:
        place = store(out, place, block << 1, N)
        place = store(out, place, block >> 2, N)
        place = store(out, place, block.to(tl.uint32) >> 3, N)
        place = store(out, place, (block < 5) ^ (block > 1), N)
    for kind in tl.static_range(6):
        place = store(out, place, block.to((tl.int32, tl.uint8, tl.int64, tl.float32, tl.uint16, tl.int32)[kind]), N)
    place = store(out, place, block.to(tl.float32).to(tl.bfloat16), N)
    place = store(out, place, tl.load(x + at, mask=(column < few)[None, :], other=1), N)
    place = store(out, place, tl.load(x + at.to(tl.int64) // 2 + tl.arange(0, 1)[None, :]), N)
    floats = block.to(tl.float32) * 1e-3
    place = store(out, place, tl.sum(floats, 1)[:, None], N)
    place = store(out, place, tl.max(floats, 0)[None, :], N)
    place = store(out, place, tl.cumsum(column, 0)[None, :], N)
    tl.store(out + N - 1, place.to(tl.int64))


def main(how: str) -> None:
    with quick_interpreter() if how == "quick" else contextlib.nullcontext():
        for dtype, values in INPUTS.items():
            x = torch.tensor(values, dtype=dtype).repeat(ROWS * COLUMNS // len(values))
            y = torch.tensor(values[::-1], dtype=dtype).repeat(COLUMNS)
            out = torch.full((32 * 256,), 2**62, dtype=torch.int64)
            operations[(1,)](x, y, out, 5, not dtype.is_floating_point, out.numel())
            stored = int(out[-1])
            assert 90 < stored < 250, f"{stored} results"
            for line in out[:32 * stored].view(stored, 32).tolist():
                print(dtype, *(f"{value & (2**64 - 1):x}" for value in line))


if __name__ == "__main__":
    main(sys.argv[1])
