"""Tiles of the expert kernel's two products for tensor cores that read E2M1 themselves: Blackwell's, through `tl.dot_scaled`.

Such a tensor core takes codes and scale bytes as they are, so nothing is decoded: 0.8 lane-instructions per weight instead of
3.2, where memory at full speed leaves 2.3 on a B200 (`static_gates` counts both). The price is that the other operand must be
MXFP8, so activations are rounded to four significant bits, twice: what enters the experts, and what lies between SwiGLU and
down (`mxfp4.mxfp8`). So this path has other numbers than the rest of the project and is never taken unasked.

Pages are of `Tile(hw_fp4=True)`. Rounded rows lie in one buffer of bytes: the codes of all rows, then their scales. 16 columns
of tokens, because the hardware's instruction takes no eight; the upper eight stay empty.

References: `mxfp4.mxfp8.quantize_mxfp8` for rounding, bit for bit; for products `modeling.modeling_mimo_v2.Experts`
between rounded activations. Triton's interpreter knows no scaled product: with FLOAT_DOT both operands are decoded and
multiplied in float32.

Rejected: bf16 activations with `tl.dot_scaled` (the compiler decodes the weights in 6.4 instructions each); activations on the
wide side (128 rows of which 120 are empty, 1.6 instructions and up to four times the registers); rounding activations where
they are loaded (each program again, for every tile).
"""

import triton
import triton.language as tl

from mxfp4.format import BLOCK_SIZE
from mxfp4.mxfp8 import CEILING, E4M3_MAX_EXPONENT
from runtime_ref.kernels.expert_tiles import TOKENS_PER_SLOT, open_chunk

COLUMNS = 16
_COLUMNS = tl.constexpr(COLUMNS)
_WIDE = tl.constexpr(TOKENS_PER_SLOT)
_BLOCK = tl.constexpr(BLOCK_SIZE)
_CEILING = tl.constexpr(CEILING)
_TOP = tl.constexpr(E4M3_MAX_EXPONENT)


@triton.jit
def rounded_blocks(value):
    """MXFP8 of float32 [blocks, 32, n], along the middle: codes uint8 of that shape and scale bytes uint8 [blocks, n]."""
    bits = value.to(tl.int32, bitcast=True)
    top = tl.max(bits & 0x7FFFFFFF, 1)
    byte = tl.maximum(((top + _CEILING) >> 23) - _TOP, 0)
    byte = tl.where(top >= 0x7F800000, 255, byte)
    reciprocal = tl.where(byte == 255, 0, (254 - byte) << 23).to(tl.float32, bitcast=True)
    unit = value * reciprocal[:, None, :]
    size = unit.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    # To nearest even: numbers from 2^-6 on by their bits, smaller ones (steps of 2^-9) by a sum whose last bit is that step.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    small = (tl.abs(unit) + 16384.0).to(tl.int32, bitcast=True) & 15
    code = tl.where(size < (121 << 23), small, normal) | ((bits >> 24) & 0x80)
    return tl.where((byte == 255)[:, None, :], 0, code).to(tl.uint8), byte.to(tl.uint8)


@triton.jit(do_not_specialize=["N"])
def round_rows_kernel(x, out, N, H, BLOCKS: tl.constexpr):
    """Row and run of BLOCKS blocks of x bf16 [N, H] -> out (codes [N, H], then scales [N, H / 32])."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < H // _BLOCK
    at = row * H + block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    keep = inside[:, None] & (tl.arange(0, _BLOCK) >= 0)[None, :]
    codes, scales = rounded_blocks(tl.load(x + at, mask=keep, other=0.0).to(tl.float32)[:, :, None])
    tl.store(out + at, codes.reshape(BLOCKS, _BLOCK), mask=keep)
    tl.store(out + tl.num_programs(0).to(tl.int64) * H + row * (H // _BLOCK) + block, scales.reshape(BLOCKS), mask=inside)


@triton.jit
def _scale(byte):
    """float32 2^(byte - 127) of a scale byte."""
    wide = byte.to(tl.int32)
    value = tl.where(wide == 0, 1 << 22, wide << 23).to(tl.float32, bitcast=True)
    return tl.where(wide == 255, float("nan"), value)


@triton.jit
def _decoded(codes, scales, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """float32 [ROWS, DEPTH] of E2M1 codes [ROWS, DEPTH / 2] and scale bytes."""
    pair = (codes[:, :, None] >> (tl.arange(0, 2) * 4).to(tl.uint8)[None, None, :]).reshape(ROWS, DEPTH).to(tl.int32)
    unit = (((pair & 8) << 28) | ((pair & 7) << 22)).to(tl.float32, bitcast=True) * 2.0**126
    spread = tl.broadcast_to(_scale(scales)[:, :, None], (ROWS, DEPTH // _BLOCK, _BLOCK)).reshape(ROWS, DEPTH)
    return unit * spread


@triton.jit
def _decoded_rows(codes, scales, DEPTH: tl.constexpr):
    """float32 [DEPTH, 16] of E4M3 codes of that shape and scale bytes [16, DEPTH / 32]."""
    wide = codes.to(tl.int32)
    size = wide & 0x7F
    value = tl.where(size < 8, size.to(tl.float32) * 2.0**-9, ((size + (120 << 3)) << 20).to(tl.float32, bitcast=True))
    value = tl.where(wide >= 128, -value, value)
    spread = tl.broadcast_to(tl.trans(_scale(scales))[:, None, :], (DEPTH // _BLOCK, _BLOCK, _COLUMNS))
    return value * spread.reshape(DEPTH, _COLUMNS)


@triton.jit
def multiply_scaled(page, x, x_scales, acc, ROWS: tl.constexpr, DEPTH: tl.constexpr, FLOAT_DOT: tl.constexpr):
    """acc [ROWS, 16] += page x rows; x: E4M3 codes uint8 [DEPTH, 16], x_scales: bytes [16, DEPTH / 32]."""
    row = tl.arange(0, ROWS)[:, None]
    codes = tl.load(page + row * (DEPTH // 2) + tl.arange(0, DEPTH // 2)[None, :])
    scales = tl.load(page + ROWS * DEPTH // 2 + row * (DEPTH // _BLOCK) + tl.arange(0, DEPTH // _BLOCK)[None, :])
    if FLOAT_DOT:
        return tl.dot(_decoded(codes, scales, ROWS, DEPTH), _decoded_rows(x, x_scales, DEPTH), acc)
    else:
        return tl.dot_scaled(codes, scales, "e2m1", x, x_scales, "e4m3", acc)


@triton.jit
def native_gate_up_tile(x, up, plan, inner, slot, tile, N, H, K_UP, slots, A: tl.constexpr, M: tl.constexpr, UP: tl.constexpr,
                        ROWS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
                        FLOAT_DOT: tl.constexpr):
    """SwiGLU of ROWS / 2 inner columns for a slot's rows, rounded -> inner (codes [slots, 8, UP ROWS / 2], then scales).

    x: rounded rows [N, H]; slots: that `inner` has room for. Rows >= 64, so that a tile holds whole blocks.
    """
    PAGE: tl.constexpr = ROWS * DEPTH // 2 + ROWS * DEPTH // _BLOCK
    WIDTH: tl.constexpr = UP * ROWS // 2
    HALF: tl.constexpr = ROWS // 2
    row = tl.arange(0, _COLUMNS)
    k = tl.arange(0, DEPTH)
    block = tl.arange(0, DEPTH // _BLOCK)
    filled = row < tl.load(plan + 3 * M + slot)
    token = tl.load(plan + 4 * M + slot * _WIDE + row, mask=filled, other=0) // A
    page = up + (tl.load(plan + 2 * M + slot).to(tl.int64) * UP + tile) * K_UP * PAGE
    source = x + token[None, :] * H + k[:, None]
    scales = x + N * H + token[:, None] * (H // _BLOCK) + block[None, :]
    acc = tl.zeros((ROWS, _COLUMNS), tl.float32)
    for q in tl.range(0, K_UP, num_stages=STAGES):
        if EVEN:
            codes = tl.load(source + q * DEPTH, mask=filled[None, :], other=0)
            bytes_ = tl.load(scales + q * (DEPTH // _BLOCK), mask=filled[:, None], other=0)
        else:
            codes = tl.load(source + q * DEPTH, mask=filled[None, :] & (q * DEPTH + k < H)[:, None], other=0)
            bytes_ = tl.load(scales + q * (DEPTH // _BLOCK),
                             mask=filled[:, None] & (block + q * (DEPTH // _BLOCK) < H // _BLOCK)[None, :], other=0)
        acc = multiply_scaled(page + q * PAGE, codes, bytes_, acc, ROWS, DEPTH, FLOAT_DOT)
    gate, up_ = acc.reshape(ROWS // 16, 2, 8, _COLUMNS).permute(0, 2, 3, 1).split()
    hidden = (gate / (1.0 + tl.exp(-gate)) * up_).reshape(HALF // _BLOCK, _BLOCK, _COLUMNS)
    codes, bytes_ = rounded_blocks(hidden)
    place = slot * _WIDE + row
    keep = (row < _WIDE)[None, :]
    column = tile * HALF + tl.arange(0, HALF)
    tl.store(inner + place[None, :] * WIDTH + column[:, None], codes.reshape(HALF, _COLUMNS), mask=keep)
    block = tile * (HALF // _BLOCK) + tl.arange(0, HALF // _BLOCK)
    tl.store(inner + slots * _WIDE * WIDTH + place[None, :] * (WIDTH // _BLOCK) + block[:, None], bytes_, mask=keep)


@triton.jit
def native_down_chunk(down, plan, inner, partial, ready, failed, slot, chunk, assignments, H, slots, M: tl.constexpr,
                      UP: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, DOWN: tl.constexpr, K_DOWN: tl.constexpr,
                      PARTS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
                      PREFETCH: tl.constexpr, WAIT: tl.constexpr, POLL_LIMIT: tl.constexpr, PTX: tl.constexpr,
                      FLOAT_DOT: tl.constexpr):
    """As `expert_tiles.down_chunk`, from rounded rows."""
    PAGE: tl.constexpr = ROWS * DEPTH // 2 + ROWS * DEPTH // _BLOCK
    row = tl.arange(0, _COLUMNS)
    k = tl.arange(0, DEPTH)
    block = tl.arange(0, DEPTH // _BLOCK)
    page, filled, assignment = open_chunk(down, plan, ready, failed, slot, chunk, row, M, UP, DOWN,
                                          TILES * PARTS * K_DOWN * PAGE, PREFETCH, WAIT, POLL_LIMIT, PTX)
    place = slot * _WIDE + row
    source = inner + place[None, :] * WIDTH + k[:, None]
    scales = inner + slots * _WIDE * WIDTH + place[:, None] * (WIDTH // _BLOCK) + block[None, :]
    if K_DOWN * PARTS == 1:
        codes = tl.load(source, mask=(k < WIDTH)[:, None] & filled[None, :], other=0)
        bytes_ = tl.load(scales, mask=(block < WIDTH // _BLOCK)[None, :] & filled[:, None], other=0)
    target = partial + assignment[None, :] * H + tl.arange(0, ROWS)[:, None]
    n = chunk * (TILES * ROWS) + tl.arange(0, ROWS)
    # Zeros that the compiler does not recognize: triton 3.6 fails on a constant accumulator inside a loop (sm_100a).
    zeros = tl.broadcast_to(tl.where(row < 0, 1.0, 0.0)[None, :], (ROWS, _COLUMNS))
    acc = tl.zeros((ROWS, _COLUMNS), tl.float32)
    for q in tl.range(0, TILES * PARTS * K_DOWN, num_stages=STAGES):
        tile = q // (PARTS * K_DOWN)
        keep = (n + tile * ROWS < H)[:, None] & filled[None, :]
        if K_DOWN * PARTS == 1:
            acc = multiply_scaled(page + q * PAGE, codes, bytes_, zeros, ROWS, DEPTH, FLOAT_DOT)
            tl.store(target + (chunk * TILES + tile) * ROWS, acc, mask=keep)
        else:
            step = q % K_DOWN
            first = q % (PARTS * K_DOWN) * DEPTH
            codes = tl.load(source + first, mask=(first + k < WIDTH)[:, None] & filled[None, :], other=0)
            bytes_ = tl.load(scales + first // _BLOCK,
                             mask=(block + first // _BLOCK < WIDTH // _BLOCK)[None, :] & filled[:, None], other=0)
            acc = multiply_scaled(page + q * PAGE, codes, bytes_, acc, ROWS, DEPTH, FLOAT_DOT)
            into = target + q // K_DOWN % PARTS * assignments * H
            tl.store(into + (chunk * TILES + tile) * ROWS, acc, mask=keep & (step == K_DOWN - 1))
            acc = acc * (step < K_DOWN - 1).to(tl.float32)
