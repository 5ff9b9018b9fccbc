"""Tiles of the expert kernel's two products, for pages that are decoded with integer arithmetic (`repack`).

Tokens lie on the narrow side (8 columns) of a tensor-core instruction whose wide side are 16 rows of weights.
Reference: the two products of `modeling.modeling_mimo_v2.Experts`. `blackwell_mxfp4` has the same for tensor cores that read
E2M1 themselves.
"""

import triton
import triton.language as tl

from runtime_ref.kernels.mxfp4_decode import decode_tile, narrow, scale_tiles
from runtime_ref.kernels.sync import wait_for

TOKENS_PER_SLOT = 8
_WIDE = tl.constexpr(TOKENS_PER_SLOT)


@triton.jit
def _multiply(page, lower_x, upper_x, acc, at, ROWS: tl.constexpr, DEPTH: tl.constexpr, PTX: tl.constexpr,
              FLOAT_DOT: tl.constexpr):
    """acc [ROWS, 8] += page x (lower_x, upper_x), each [DEPTH / 2, 8]."""
    codes = tl.load(page + at)
    lower_scale, upper_scale = scale_tiles(page + ROWS * DEPTH // 2, ROWS, DEPTH, PTX)
    lower, upper = decode_tile(codes, lower_scale, upper_scale, ROWS, DEPTH, PTX)
    if FLOAT_DOT:
        acc = tl.dot(lower.to(tl.float32), lower_x.to(tl.float32), acc)
        return tl.dot(upper.to(tl.float32), upper_x.to(tl.float32), acc)
    else:
        acc = tl.dot(lower.to(tl.bfloat16), lower_x, acc)
        return tl.dot(upper.to(tl.bfloat16), upper_x, acc)


@triton.jit
def prefetch(lines):
    """Asks for lines (pointers) to be brought into the second-level cache; changes nothing else. Only where PTX is."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def prefetch_lines(page, BYTES: tl.constexpr, SIZE: tl.constexpr, PTX: tl.constexpr):
    """Asks for a power of two of bytes of SIZE that there are."""
    if PTX and BYTES > 0:
        at = tl.arange(0, BYTES // 128) * 128
        if BYTES > SIZE:
            at = tl.minimum(at, SIZE - 1)
        prefetch(page + at)


@triton.jit
def gate_up_tile(x, up, plan, inner, slot, tile, H, K_UP, A: tl.constexpr, M: tl.constexpr, UP: tl.constexpr,
                  ROWS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
                  FLOAT_DOT: tl.constexpr):
    """SwiGLU of ROWS / 2 inner columns for a slot's rows -> inner[slot] (bf16 [8, UP * ROWS / 2]); empty rows become zeros."""
    HALF: tl.constexpr = DEPTH // 2
    PAGE: tl.constexpr = ROWS * DEPTH // 2 + ROWS * DEPTH // 32
    WIDTH: tl.constexpr = UP * ROWS // 2
    row = tl.arange(0, _WIDE)
    k = tl.arange(0, HALF)
    at = tl.arange(0, ROWS)[:, None] * HALF + k[None, :]
    filled = row < tl.load(plan + 3 * M + slot)
    token = tl.load(plan + 4 * M + slot * _WIDE + row, mask=filled, other=0) // A
    page = up + (tl.load(plan + 2 * M + slot).to(tl.int64) * UP + tile) * K_UP * PAGE
    source = x + token[None, :] * H + k[:, None]
    acc = tl.zeros((ROWS, _WIDE), tl.float32)
    for q in tl.range(0, K_UP, num_stages=STAGES):
        if EVEN:
            lower = tl.load(source + q * DEPTH, mask=filled[None, :], other=0.0)
            upper = tl.load(source + q * DEPTH + HALF, mask=filled[None, :], other=0.0)
        else:
            lower = tl.load(source + q * DEPTH, mask=filled[None, :] & (q * DEPTH + k < H)[:, None], other=0.0)
            upper = tl.load(source + q * DEPTH + HALF, mask=filled[None, :] & (q * DEPTH + HALF + k < H)[:, None], other=0.0)
        acc = _multiply(page + q * PAGE, lower, upper, acc, at, ROWS, DEPTH, PTX, FLOAT_DOT)
    gate, up_ = acc.reshape(ROWS // 16, 2, 8, _WIDE).permute(0, 2, 3, 1).split()
    hidden = (gate / (1.0 + tl.exp(-gate)) * up_).reshape(ROWS // 2, _WIDE)
    column = tile * (ROWS // 2) + tl.arange(0, ROWS // 2)
    tl.store(inner + (slot * _WIDE + row)[None, :] * WIDTH + column[:, None], narrow(hidden, tl.bfloat16, FLOAT_DOT))


@triton.jit
def open_chunk(down, plan, ready, failed, slot, chunk, row, M: tl.constexpr, UP: tl.constexpr, DOWN: tl.constexpr,
               BYTES: tl.constexpr, PREFETCH: tl.constexpr, WAIT: tl.constexpr, POLL_LIMIT: tl.constexpr, PTX: tl.constexpr):
    """A down chunk's first page (BYTES a chunk), which of the rows are filled, and their assignments. The pages are on their
    way while it waits for the slot's gate-up tiles."""
    page = down + (tl.load(plan + 2 * M + slot).to(tl.int64) * DOWN + chunk) * BYTES
    prefetch_lines(page, PREFETCH, BYTES, PTX)
    filled = row < tl.load(plan + 3 * M + slot)
    assignment = tl.load(plan + 4 * M + slot * _WIDE + row, mask=filled, other=0)
    if WAIT:
        wait_for(ready + slot, UP, failed, POLL_LIMIT, False)
        tl.debug_barrier()
    return page, filled, assignment


@triton.jit
def down_chunk(down, plan, inner, partial, ready, failed, slot, chunk, assignments, H, M: tl.constexpr, UP: tl.constexpr,
                WIDTH: tl.constexpr, TILES: tl.constexpr, DOWN: tl.constexpr, K_DOWN: tl.constexpr, PARTS: tl.constexpr,
                ROWS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, PREFETCH: tl.constexpr, WAIT: tl.constexpr,
                POLL_LIMIT: tl.constexpr, PTX: tl.constexpr, FLOAT_DOT: tl.constexpr):
    """TILES row tiles of an expert's down projection for a slot's rows -> partial (float32 [PARTS, assignments, H]).

    K_DOWN pages make a part of K; with several parts they are full (`repack_experts`)."""
    HALF: tl.constexpr = DEPTH // 2
    PAGE: tl.constexpr = ROWS * DEPTH // 2 + ROWS * DEPTH // 32
    row = tl.arange(0, _WIDE)
    k = tl.arange(0, HALF)
    at = tl.arange(0, ROWS)[:, None] * HALF + k[None, :]
    page, filled, assignment = open_chunk(down, plan, ready, failed, slot, chunk, row, M, UP, DOWN,
                                          TILES * PARTS * K_DOWN * PAGE, PREFETCH, WAIT, POLL_LIMIT, PTX)
    source = inner + (slot * _WIDE + row)[None, :] * WIDTH + k[:, None]
    if K_DOWN * PARTS == 1:
        lower = tl.load(source, mask=(k < WIDTH)[:, None] & filled[None, :], other=0.0)
        upper = tl.load(source + HALF, mask=(HALF + k < WIDTH)[:, None] & filled[None, :], other=0.0)
    target = partial + assignment[None, :] * H + tl.arange(0, ROWS)[:, None]
    n = chunk * (TILES * ROWS) + tl.arange(0, ROWS)
    acc = tl.zeros((ROWS, _WIDE), tl.float32)
    for q in tl.range(0, TILES * PARTS * K_DOWN, num_stages=STAGES):
        tile = q // (PARTS * K_DOWN)
        keep = (n + tile * ROWS < H)[:, None] & filled[None, :]
        if K_DOWN * PARTS == 1:
            acc = _multiply(page + q * PAGE, lower, upper, tl.zeros((ROWS, _WIDE), tl.float32), at, ROWS, DEPTH, PTX, FLOAT_DOT)
            tl.store(target + (chunk * TILES + tile) * ROWS, acc, mask=keep)
        else:
            step = q % K_DOWN
            first = q % (PARTS * K_DOWN) * DEPTH
            lower = tl.load(source + first, mask=(first + k < WIDTH)[:, None] & filled[None, :], other=0.0)
            upper = tl.load(source + first + HALF, mask=(first + HALF + k < WIDTH)[:, None] & filled[None, :], other=0.0)
            acc = _multiply(page + q * PAGE, lower, upper, acc, at, ROWS, DEPTH, PTX, FLOAT_DOT)
            into = target + q // K_DOWN % PARTS * assignments * H
            tl.store(into + (chunk * TILES + tile) * ROWS, acc, mask=keep & (step == K_DOWN - 1))
            acc = acc * (step < K_DOWN - 1).to(tl.float32)
