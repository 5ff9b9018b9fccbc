"""The router: scores of all experts for a few tokens, then the best of them.

Reference: `backends.torch.ops.route`. Scores are float32 products of float32 operands (`ieee`, no tensor core): a router
that rounds its input to bf16 would choose other experts wherever two scores are close, and the choice is not continuous. At
eight tokens this costs a thousandth of the layer's bytes.

Who computes the last tile of scores of a group of rows chooses: sigmoid, correction bias, groups of experts if the model has
them, the A best, their weights. The rule for ties is that of `torch.topk` on the CPU for distinct values; equal values go
to the lower index, which torch does not promise.

SOFTMAX (Qwen3) instead: the best by logit, weighted by their share of all experts' exponentials, or (NORMED) of the chosen.

Rejected: a launch (in the megakernel: a barrier) of its own for the choice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from runtime_ref.kernels.dense import row_scales
from runtime_ref.kernels.mxfp4_decode import narrow

_ROWS = tl.constexpr(8)


@triton.jit
def score_tile(tile, group, x, w, gamma, scores, rounded, R, E, H, epsilon, TILES, BN: tl.constexpr, BK: tl.constexpr,
               NORM: tl.constexpr, FLOAT_DOT: tl.constexpr, SOFTMAX: tl.constexpr = False):
    """sigmoid(x w^T) of BN experts for a group of rows -> scores float32 [R, E]; w is float32 [E, H]. SOFTMAX: x w^T itself.

    With NORM x is normed first, and tile t also writes its share of the normed rows to bf16 `rounded` [R, H].
    """
    n = tile * BN + tl.arange(0, BN)
    row = group * _ROWS + tl.arange(0, _ROWS)
    real = row < R
    k = tl.arange(0, BK)
    inverse = tl.zeros((_ROWS,), tl.float32)
    if NORM:
        inverse = row_scales(x, row, real, H, epsilon)
    acc = tl.zeros((BN, _ROWS), tl.float32)
    for at in range(0, H, BK):
        here = at + k
        values = tl.load(x + here[:, None] + row[None, :] * H, mask=(here < H)[:, None] & real[None, :], other=0.0)
        values = values.to(tl.float32)
        if NORM:
            values = values * inverse[None, :] * tl.load(gamma + here, mask=here < H, other=0.0)[:, None]
            tl.store(rounded + here[:, None] + row[None, :] * H, narrow(values, tl.bfloat16, FLOAT_DOT),
                     mask=(here < H)[:, None] & real[None, :] & (at // BK % TILES == tile))
        block = tl.load(w + n[:, None] * H + here[None, :], mask=(n < E)[:, None] & (here < H)[None, :], other=0.0)
        acc = tl.dot(block, values, acc, input_precision="ieee")
    if not SOFTMAX:
        acc = 1.0 / (1.0 + tl.exp(-acc))
    tl.store(scores + row[None, :] * E + n[:, None], acc, mask=(n < E)[:, None] & real[None, :])


@triton.jit
def _best_groups(choice, e, E, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr):
    """choice [8, WIDE] with minus infinity outside the TOP_GROUPS groups whose two best experts sum highest."""
    low = float("-inf")
    own = e // (E // GROUPS)
    rank = tl.zeros(choice.shape, tl.int32)
    mine = tl.full(choice.shape, low, tl.float32)
    for g in tl.static_range(GROUPS):
        members = tl.where((own == g)[None, :], choice, low)
        first = tl.max(members, 1)
        at = tl.argmax(members, 1, tie_break_left=True)
        total = first + tl.max(tl.where(e[None, :] == at[:, None], low, members), 1)
        mine = tl.where((own == g)[None, :], total[:, None], mine)
    for g in tl.static_range(GROUPS):
        total = tl.max(tl.where((own == g)[None, :], mine, low), 1)[:, None]
        rank += ((total > mine) | ((total == mine) & (g < own)[None, :])).to(tl.int32)
    return tl.where(rank < TOP_GROUPS, choice, low)


@triton.jit
def choose_tile(group, scores, correction, index, weight, R, E, factor, A: tl.constexpr, WIDE: tl.constexpr,
                GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, NORMED: tl.constexpr, SOFTMAX: tl.constexpr = False):
    """The A best experts by score + correction, best first, and their weights, for a group of rows."""
    low = float("-inf")
    COLUMNS: tl.constexpr = triton.next_power_of_2(A)
    e = tl.arange(0, WIDE)
    row = group * _ROWS + tl.arange(0, _ROWS)
    real = row < R
    score = tl.load(scores + row[:, None] * E + e[None, :], mask=real[:, None] & (e < E)[None, :], other=0.0)
    choice = score + tl.load(correction + e, mask=e < E, other=0.0)[None, :]
    choice = tl.where((e < E)[None, :], choice, low)
    if SOFTMAX:
        score = tl.exp(choice - tl.max(choice, 1)[:, None])
        if not NORMED:
            score = score / tl.sum(score, 1)[:, None]
    if GROUPS > 1:
        choice = _best_groups(choice, e, E, GROUPS, TOP_GROUPS)
    column = tl.arange(0, COLUMNS)
    chosen = tl.zeros((_ROWS, COLUMNS), tl.int32)
    own = tl.zeros((_ROWS, COLUMNS), tl.float32)
    total = tl.zeros((_ROWS,), tl.float32)
    # A loop of the program, not of the compiler: unrolled, all maxima would be held in registers at once.
    for a in tl.range(0, A, loop_unroll_factor=1):
        at = tl.argmax(choice, 1, tie_break_left=True)
        here = e[None, :] == at[:, None]
        found = tl.sum(tl.where(here, score, 0.0), 1)
        total += found
        chosen = tl.where((column == a)[None, :], at[:, None].to(tl.int32), chosen)
        own = tl.where((column == a)[None, :], found[:, None], own)
        choice = tl.where(here, low, choice)
    if NORMED:
        own = own / (total[:, None] + 1e-20)
    there = row[:, None] * A + column[None, :]
    mask = real[:, None] & (column < A)[None, :]
    tl.store(index + there, chosen, mask=mask)
    tl.store(weight + there, own * factor, mask=mask)


@triton.jit
def route_tile(tile, group, x, w, gamma, correction, scores, rounded, arrived, index, weight, R, E, H, epsilon, factor, TILES,
               A: tl.constexpr, WIDE: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, NORMED: tl.constexpr,
               BN: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, FLOAT_DOT: tl.constexpr,
               SOFTMAX: tl.constexpr = False):
    """A tile of scores; the last one of a group of rows chooses and puts the group's counter back to zero."""
    score_tile(tile, group, x, w, gamma, scores, rounded, R, E, H, epsilon, TILES, BN, BK, NORM, FLOAT_DOT, SOFTMAX)
    tl.debug_barrier()
    if tl.atomic_add(arrived + group, 1, sem="acq_rel", scope="gpu") == TILES - 1:
        tl.debug_barrier()
        choose_tile(group, scores, correction, index, weight, R, E, factor, A, WIDE, GROUPS, TOP_GROUPS, NORMED, SOFTMAX)
        tl.store(arrived + group, 0)


@triton.jit(do_not_specialize=["R"])
def route_kernel(x, w, gamma, correction, scores, rounded, arrived, index, weight, R, E, H, epsilon, factor, A: tl.constexpr,
                 WIDE: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, NORMED: tl.constexpr, BN: tl.constexpr,
                 BK: tl.constexpr, NORM: tl.constexpr, FLOAT_DOT: tl.constexpr, SOFTMAX: tl.constexpr = False):
    """Reference: `model.route`. Program (tile of experts, group of rows)."""
    route_tile(tl.program_id(0), tl.program_id(1), x, w, gamma, correction, scores, rounded, arrived, index, weight, R, E, H,
               epsilon, factor, tl.num_programs(0), A, WIDE, GROUPS, TOP_GROUPS, NORMED, BN, BK, NORM, FLOAT_DOT,
               SOFTMAX)
