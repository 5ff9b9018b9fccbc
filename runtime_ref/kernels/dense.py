"""Products of a few rows (tokens) with a weight matrix, and what stands around them: norms, rotation, residual, SwiGLU.

Every op exists twice: a *tile* (a device function that computes one tile for eight rows) and a thin kernel that calls it, one
program per (tile, group of eight rows). The megakernel (`experimental/megakernel.py`) calls the same tiles, so both make the
same numbers. A number of rows is one compilation for all its values (`do_not_specialize`): no access gets wider by its
divisors.

Tokens lie on the narrow side of the tensor-core instruction: [BN output rows of the weight, BK] x [BK, 8 tokens]. A group
always has eight columns, real or not, and K runs in one order: a row has the same bits alone and among others (C4).

Numbers, as in `backends.torch.ops`: the residual stream and the cache are bf16, sums are float32, weights are exact. Unlike
there, what enters a product is rounded to bf16 first (the tensor cores take nothing else), once per value. FP8 weights are
multiplied as bf16, exactly; each 128 values of K are summed and then take their block's scale, so nothing is rounded
that the decoded float32 weight would not round.

Weights: bf16 [N, K] or FP8 E4M3 [N, K] with float32 scales [N, K / 128 rounded up]: one row of scales per row of the
weight, because the 128 x 128 grid of a fused qkv restarts inside a rank's share.

References are functions of `runtime_ref.backends.torch.ops`, named in each kernel's docstring.

*Parts.* What ranks add up is cut along K into parts whose number the model fixes, not the ranks (C5): a rank computes its own
parts one by one, from zero, and parts are added to zero in order, in a register where one rank has them all.

Rejected: activations held as float32 (twice the shared memory, no tensor core), a split of K over programs (another join, and
at eight tokens the weights of the widest product already make 100 tiles), rotation by a second product with swapped rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from runtime_ref.kernels.mxfp4_decode import narrow

GROUP = 8
FP8_BLOCK = 128
_ROWS = tl.constexpr(GROUP)
_FP8_BLOCK = tl.constexpr(FP8_BLOCK)
_NORM_DEPTH = tl.constexpr(128)


@triton.jit
def row_scales(x, row, real, H, epsilon):
    """1 / root mean square of rows of x [., H]: float32 [8], with one order of the sum for whoever asks."""
    k = tl.arange(0, _NORM_DEPTH)
    total = tl.zeros((_ROWS, _NORM_DEPTH), tl.float32)
    for at in range(0, H, _NORM_DEPTH):
        part = tl.load(x + row[:, None] * H + (at + k)[None, :], mask=real[:, None] & (at + k < H)[None, :], other=0.0)
        part = part.to(tl.float32)
        total += part * part
    return tl.rsqrt(tl.sum(total, 1) / H + epsilon)


@triton.jit
def multiply(x, w, scales, gamma, inverse, row, real, n, keep, K, first_k, last_k, heads_stride, BN: tl.constexpr,
             BK: tl.constexpr, V: tl.constexpr, NORM: tl.constexpr, FLOAT_DOT: tl.constexpr):
    """float32 [BN, 8]: rows n (where keep) of w [N, K] times rows `row` (where real) of x, over K from first_k to last_k.

    x is [., K], or with V > 0 heads [., rows, V] of which `heads_stride` elements lie between two heads. NORM: x is
    multiplied by inverse [8] and gamma [K] first. uint8 weights are FP8 and take `scales`.
    """
    k = tl.arange(0, BK)
    acc = tl.zeros((BN, _ROWS), tl.float32)
    weight = w + n.to(tl.int64)[:, None] * K
    for at in range(first_k, last_k, BK):
        here = at + k
        inside = here < last_k
        if V > 0:
            source = x + (here // V * heads_stride + here % V)[:, None] + row[None, :] * V
        else:
            source = x + here[:, None] + row[None, :] * K
        values = tl.load(source, mask=inside[:, None] & real[None, :], other=0.0)
        if NORM:
            values = values.to(tl.float32) * inverse[None, :] * tl.load(gamma + here, mask=inside, other=0.0)[:, None]
        if values.dtype == tl.float32:
            values = narrow(values, tl.bfloat16, FLOAT_DOT)
        block = tl.load(weight + here[None, :], mask=keep[:, None] & inside[None, :], other=0)
        if w.dtype.element_ty == tl.uint8:
            block = block.to(tl.float8e4nv, bitcast=True)
            part = _dot(block, values, tl.zeros((BN, _ROWS), tl.float32), FLOAT_DOT)
            own = tl.load(scales + n * tl.cdiv(K, _FP8_BLOCK) + at // _FP8_BLOCK, mask=keep, other=0.0)
            acc += part * own[:, None]
        else:
            acc = _dot(block, values, acc, FLOAT_DOT)
    return acc


@triton.jit
def _dot(a, b, acc, FLOAT_DOT: tl.constexpr):
    if FLOAT_DOT:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a.to(tl.bfloat16), b, acc)


@triton.jit
def project_tile(tile, group, x, w, scales, gamma, head_gamma, cos, sin, positions, slots, q, k, v, R, H, epsilon, q_scale,
                 v_scale, k_stride, head_epsilon, QUERIES: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
                 HALF: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, HEAD_NORM: tl.constexpr,
                 FLOAT_DOT: tl.constexpr):
    """BN rows of one head of q, k or v for a group of rows: norm, product, norm of the head, rotation, store.

    Rows of w are the heads in the order q, k, v; the rows of a head stand in pairs (see `paired_rows`), so that a rotation
    happens inside a thread's registers. `project` documents the rest.
    """
    CHUNKS: tl.constexpr = ((D if D > V else V) + BN - 1) // BN
    head = tile // CHUNKS
    chunk = tile % CHUNKS
    is_v = head >= QUERIES + KEYS
    width = tl.where(is_v, V, D)
    first = tl.where(is_v, (QUERIES + KEYS) * D + (head - QUERIES - KEYS) * V, head * D)
    n = chunk * BN + tl.arange(0, BN)
    row = group * _ROWS + tl.arange(0, _ROWS)
    real = row < R
    inverse = tl.zeros((_ROWS,), tl.float32)
    if NORM:
        inverse = row_scales(x, row, real, H, epsilon)
    acc = multiply(x, w, scales, gamma, inverse, row, real, first + n, n < width, H, 0, H, 0, BN, BK, 0, NORM, FLOAT_DOT)
    if HEAD_NORM:
        length = tl.rsqrt(tl.sum(acc * acc, 0) / D + head_epsilon)
        own = tl.load(head_gamma + tl.minimum(head, QUERIES + KEYS - 1) * D + n, mask=n < D, other=0.0)
        acc = tl.where(is_v, acc, acc * length[None, :] * own[:, None])
    a, b = acc.reshape(BN // 2, 2, _ROWS).permute(0, 2, 1).split()
    pair = chunk * (BN // 2) + tl.arange(0, BN // 2)
    turned = (pair < HALF) & (head < QUERIES + KEYS)
    angle = tl.load(positions + row, mask=real, other=0)[None, :] * HALF + pair[:, None]
    c = tl.load(cos + angle, mask=turned[:, None] & real[None, :], other=1.0)
    s = tl.load(sin + angle, mask=turned[:, None] & real[None, :], other=0.0)
    # b s with a negative sign, then added: the same two roundings as in the reference.
    left, right = a * c + b * -s, b * c + a * s
    scale = tl.where(is_v, v_scale, tl.where(head < QUERIES, q_scale, 1.0))
    left, right = narrow(left * scale, tl.bfloat16, FLOAT_DOT), narrow(right * scale, tl.bfloat16, FLOAT_DOT)
    left_column = tl.where(turned, pair, 2 * pair)[:, None]
    right_column = tl.where(turned, HALF + pair, 2 * pair + 1)[:, None]
    inside = (2 * pair < width)[:, None] & real[None, :]
    if head < QUERIES:
        there = q + (head * R + row).to(tl.int64)[None, :] * D
        tl.store(there + left_column, left, mask=inside)
        tl.store(there + right_column, right, mask=inside)
    else:
        slot = tl.load(slots + row, mask=real, other=-1)
        inside = inside & (slot >= 0)[None, :]
        if is_v:
            there = v + ((head - QUERIES - KEYS) * k_stride + slot).to(tl.int64)[None, :] * V
            tl.store(there + left_column, left, mask=inside)
            tl.store(there + right_column, right, mask=inside)
        else:
            there = k + ((head - QUERIES) * k_stride + slot).to(tl.int64)[None, :] * D
            tl.store(there + left_column, left, mask=inside)
            tl.store(there + right_column, right, mask=inside)


@triton.jit(do_not_specialize=["R"])
def project_kernel(x, w, scales, gamma, head_gamma, cos, sin, positions, slots, q, k, v, R, H, epsilon, q_scale, v_scale,
                   k_stride, head_epsilon, QUERIES: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
                   HALF: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, HEAD_NORM: tl.constexpr,
                   FLOAT_DOT: tl.constexpr):
    """Reference: `model.norm`, `model.project_qkv` and `model.write_cache`. Program (tile, group)."""
    project_tile(tl.program_id(0), tl.program_id(1), x, w, scales, gamma, head_gamma, cos, sin, positions, slots, q, k, v, R, H,
                 epsilon, q_scale, v_scale, k_stride, head_epsilon, QUERIES, KEYS, D, V, HALF, BN, BK, NORM, HEAD_NORM,
                 FLOAT_DOT)


@triton.jit
def product_tile(tile, group, x, w, scales, gamma, rows, residual, out, R, N, K, epsilon, heads_stride, BN: tl.constexpr,
                 BK: tl.constexpr, V: tl.constexpr, NORM: tl.constexpr, PICK: tl.constexpr, RESIDUAL: tl.constexpr,
                 PARTS: tl.constexpr, KEEP: tl.constexpr, FLOAT_DOT: tl.constexpr):
    """BN columns of out [R, N] = x w^T for a group of rows, in PARTS runs of K that are added to zero in order.

    PICK: row r of out is of row rows[r] of x. RESIDUAL: out = bf16(residual + product), in place if they are the same.
    KEEP: out is float32 [PARTS, R, N], the runs one by one; whoever adds them in order to zero makes the same bits.
    """
    n = tile * BN + tl.arange(0, BN)
    keep = n < N
    target = group * _ROWS + tl.arange(0, _ROWS)
    real = target < R
    row = target
    if PICK:
        row = tl.load(rows + target, mask=real, other=0)
    inverse = tl.zeros((_ROWS,), tl.float32)
    if NORM:
        inverse = row_scales(x, row, real, K, epsilon)
    at = target.to(tl.int64)[None, :] * N + n[:, None]
    mask = keep[:, None] & real[None, :]
    if KEEP:
        for part in range(0, PARTS):
            acc = multiply(x, w, scales, gamma, inverse, row, real, n, keep, K, part * (K // PARTS), (part + 1) * (K // PARTS),
                           heads_stride, BN, BK, V, NORM, FLOAT_DOT)
            tl.store(out + part * R * N + at, acc, mask=mask)
    else:
        acc = tl.zeros((BN, _ROWS), tl.float32)
        if PARTS == 1:
            acc = multiply(x, w, scales, gamma, inverse, row, real, n, keep, K, 0, K, heads_stride, BN, BK, V, NORM, FLOAT_DOT)
        else:
            for part in range(0, PARTS):
                acc += multiply(x, w, scales, gamma, inverse, row, real, n, keep, K, part * (K // PARTS),
                                (part + 1) * (K // PARTS), heads_stride, BN, BK, V, NORM, FLOAT_DOT)
        if RESIDUAL:
            acc += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + at, narrow(acc, out.dtype.element_ty, FLOAT_DOT), mask=mask)


@triton.jit(do_not_specialize=["R"])
def product_kernel(x, w, scales, gamma, rows, residual, out, R, N, K, epsilon, heads_stride, BN: tl.constexpr,
                   BK: tl.constexpr, V: tl.constexpr, NORM: tl.constexpr, PICK: tl.constexpr, RESIDUAL: tl.constexpr,
                   PARTS: tl.constexpr, KEEP: tl.constexpr, FLOAT_DOT: tl.constexpr):
    """Reference: `model.merge_heads` (V > 0), `model.head_logits`, the down product of `model.dense_mlp`; with RESIDUAL
    `model.add_parts` after it. Program (tile, group)."""
    product_tile(tl.program_id(0), tl.program_id(1), x, w, scales, gamma, rows, residual, out, R, N, K, epsilon, heads_stride,
                 BN, BK, V, NORM, PICK, RESIDUAL, PARTS, KEEP, FLOAT_DOT)


@triton.jit
def swiglu_tile(tile, group, x, w, scales, gamma, out, R, I, H, epsilon, BN: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr,
                FLOAT_DOT: tl.constexpr):
    """BN columns of silu(gate) up, bf16 [R, I]; w holds I gate rows, then I up rows."""
    n = tile * BN + tl.arange(0, BN)
    keep = n < I
    row = group * _ROWS + tl.arange(0, _ROWS)
    real = row < R
    inverse = tl.zeros((_ROWS,), tl.float32)
    if NORM:
        inverse = row_scales(x, row, real, H, epsilon)
    gate = multiply(x, w, scales, gamma, inverse, row, real, n, keep, H, 0, H, 0, BN, BK, 0, NORM, FLOAT_DOT)
    up = multiply(x, w, scales, gamma, inverse, row, real, I + n, keep, H, 0, H, 0, BN, BK, 0, NORM, FLOAT_DOT)
    tl.store(out + row[None, :] * I + n[:, None], narrow(gate / (1.0 + tl.exp(-gate)) * up, tl.bfloat16, FLOAT_DOT),
             mask=keep[:, None] & real[None, :])


@triton.jit(do_not_specialize=["R"])
def swiglu_kernel(x, w, scales, gamma, out, R, I, H, epsilon, BN: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr,
                  FLOAT_DOT: tl.constexpr):
    """Reference: `model.gated(model.spread(x, gate_up))`. Program (tile, group)."""
    swiglu_tile(tl.program_id(0), tl.program_id(1), x, w, scales, gamma, out, R, I, H, epsilon, BN, BK, NORM, FLOAT_DOT)


@triton.jit(do_not_specialize=["R"])
def norm_kernel(x, gamma, out, rounded, R, H, epsilon, BK: tl.constexpr, FLOAT_DOT: tl.constexpr):
    """float32 out and bf16 `rounded` [R, H] of bf16 or float32 x. Reference: `model.norm`. Program: a group of eight rows."""
    row = tl.program_id(0) * _ROWS + tl.arange(0, _ROWS)
    real = row < R
    inverse = row_scales(x, row, real, H, epsilon)
    for at in range(0, H, BK):
        k = at + tl.arange(0, BK)
        mask = real[:, None] & (k < H)[None, :]
        there = row[:, None] * H + k[None, :]
        values = tl.load(x + there, mask=mask, other=0.0).to(tl.float32) * inverse[:, None]
        values = values * tl.load(gamma + k, mask=k < H, other=0.0)[None, :]
        tl.store(out + there, values, mask=mask)
        tl.store(rounded + there, narrow(values, tl.bfloat16, FLOAT_DOT), mask=mask)


@triton.jit
def gather_tile(row, table, ids, spare, out, H, BK: tl.constexpr):
    """Row ids[row] of table [., H], or `spare` [H] if that is negative, to row `row` of out, unchanged."""
    found = tl.load(ids + row)
    source = table + found.to(tl.int64) * H
    for at in range(0, H, BK):
        k = at + tl.arange(0, BK)
        values = tl.load(source + k, mask=(k < H) & (found >= 0))
        other = tl.load(spare + k, mask=(k < H) & (found < 0))
        tl.store(out + row.to(tl.int64) * H + k, tl.where(found < 0, other, values), mask=k < H)


@triton.jit
def gather_kernel(table, ids, spare, out, H, BK: tl.constexpr):
    """Reference: `ops.embed`, the first rows of `TorchDrafter.logits`, the choice of rows before the head. Program: a row."""
    gather_tile(tl.program_id(0), table, ids, spare, out, H, BK)


@triton.jit
def round_kernel(x, out, N, BLOCK: tl.constexpr, FLOAT_DOT: tl.constexpr):
    """bf16 of float32 [N]. Reference: `row_rules.rounded`."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, narrow(tl.load(x + at, mask=at < N, other=0.0), tl.bfloat16, FLOAT_DOT), mask=at < N)


@triton.jit(do_not_specialize=["R"])
def write_kernel(source, store, slots, R, stride, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """Rows of source [heads, R, WIDTH] to slots of store [heads, stride, WIDTH]; a negative slot is no slot.

    Reference: `model.write_cache`. Program (row, head)."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    slot = tl.load(slots + row)
    column = tl.arange(0, WIDE)
    values = tl.load(source + (head * R + row) * WIDTH + column, mask=column < WIDTH)
    tl.store(store + (head.to(tl.int64) * stride + slot) * WIDTH + column, values, mask=(column < WIDTH) & (slot >= 0))


@triton.jit
def add_kernel(x, partial, out, N, PARTS: tl.constexpr, BLOCK: tl.constexpr, FLOAT_DOT: tl.constexpr):
    """bf16 out = x + (0 + partial[0] + partial[1] + ...), float32 [PARTS, N], in this order. Reference: `model.add_parts`."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(partial + part * N + at, mask=at < N, other=0.0)
    total += tl.load(x + at, mask=at < N, other=0.0).to(tl.float32)
    tl.store(out + at, narrow(total, tl.bfloat16, FLOAT_DOT), mask=at < N)
