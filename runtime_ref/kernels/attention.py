"""Attention of verification and draft blocks over paged keys and values: full and window layers, sinks, one launch per layer.

Reference: `runtime_ref.backends.torch.ops.attend_pages` on the same pages.

The drafter's rows (`draft`) see the context before their block, within the window, and the whole block: it is drafted at once.

A block is up to T (8) consecutive tokens of a sequence; its pages come from the sequence's table, whose window kind is a ring
(the table says which logical page it begins with). Query heads of a key head and all rows of a block form one tile of
M = G T rows; with more than MOST_ROWS of them, several tiles (a larger one does not fit in registers beside the rest of a
megakernel; their keys meet in the cache). A program takes a chunk of `CHUNK` logical pages, at absolute multiples of
CHUNK: the cut does not depend on the block. Partial results are joined in the order of chunks by whoever delivers the last.

*Row invariance* (C4): pages and chunks that a row can't see leave its maximum, sum and values exactly as they are (factors
exp(0) and additions of zero), so a row has the same bits alone, among eight, and behind a longer or shorter table.

Rejected: splits of equal size (the cut would move with the context's length), masks in memory (positions are enough), a second
launch for the join.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runtime_ref.kernels.counters import arrivals
from runtime_ref.kernels.mxfp4_decode import narrow

PAGE = 64
CHUNK_PAGES = 16
MOST_ROWS = 32


@triton.jit
def _product(a, b, FLOAT_DOT: tl.constexpr):
    if FLOAT_DOT:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b)


@triton.jit
def _join(partial, stats, sink, out, slot, chunks, head, R, first_row, count, M: tl.constexpr, G: tl.constexpr,
          T: tl.constexpr, V: tl.constexpr, V_WIDE: tl.constexpr, MAX_CHUNKS, HAS_SINK: tl.constexpr, FLOAT_DOT: tl.constexpr):
    """Sums the chunks' partial results in their order and divides."""
    m = tl.arange(0, M)
    v = tl.arange(0, V_WIDE)
    real = (m // T < G) & (m % T < count)
    top = tl.full((M,), float("-inf"), tl.float32)
    for c in range(0, chunks):
        top = tl.maximum(top, tl.load(stats + (slot * MAX_CHUNKS + c) * 2 * M + m))
    below = tl.zeros((M,), tl.float32)
    if HAS_SINK:
        own = tl.load(sink + head * G + m // T, mask=m // T < G, other=0.0)
        top = tl.maximum(top, own)
    total = tl.zeros((M, V_WIDE), tl.float32)
    for c in range(0, chunks):
        at = slot * MAX_CHUNKS + c
        share = tl.exp(tl.load(stats + at * 2 * M + m) - top)
        below += share * tl.load(stats + at * 2 * M + M + m)
        part = tl.load(partial + at.to(tl.int64) * (M * V_WIDE) + (m[:, None] * V_WIDE + v[None, :]))
        total += share[:, None] * part
    if HAS_SINK:
        below += tl.exp(own - top)
    row = (head * G + m // T) * R + first_row + m % T
    tl.store(out + row[:, None] * V + v[None, :], narrow(total / below[:, None], out.dtype.element_ty, FLOAT_DOT),
             mask=real[:, None] & (v < V)[None, :])


@triton.jit
def attend_tile(slot, part, q, keys, values, sink, tables, first, start, count, row, partial, stats, arrived, out,
                R, POSITIONS, TABLE, MAX_CHUNKS, HEADS: tl.constexpr, G: tl.constexpr, SPLIT: tl.constexpr, T: tl.constexpr,
                M: tl.constexpr, D: tl.constexpr, D_HEAD: tl.constexpr, D_TAIL: tl.constexpr, V: tl.constexpr,
                V_WIDE: tl.constexpr, PAGE_: tl.constexpr, CHUNK: tl.constexpr, WINDOW: tl.constexpr, HAS_SINK: tl.constexpr,
                DRAFT: tl.constexpr, FLOAT_DOT: tl.constexpr):
    """Chunk `part` of slot = block * HEADS + head: SPLIT heads share a key head and have G query heads each.

    `attend` documents the arguments; D = D_HEAD + at most D_TAIL.
    """
    block = slot // HEADS
    head = slot % HEADS
    begin = tl.load(start + block)
    tokens = tl.load(count + block)
    first_row = tl.load(row + block)
    seen_from = 0
    if WINDOW > 0:
        seen_from = tl.maximum(begin - WINDOW + 1, 0) // PAGE_
    last = (begin + tokens - 1) // PAGE_
    chunk = seen_from // CHUNK + part
    chunks = last // CHUNK - seen_from // CHUNK + 1
    if part < chunks:
        m = tl.arange(0, M)
        j = tl.arange(0, PAGE_)
        d = tl.arange(0, D_HEAD)
        tail = D_HEAD + tl.arange(0, D_TAIL)
        v = tl.arange(0, V_WIDE)
        real = (m // T < G) & (m % T < tokens)
        position = begin + m % T
        at = ((head * G + m // T) * R + first_row + m % T)[:, None] * D
        q_head = tl.load(q + at + d[None, :], mask=real[:, None], other=0.0)
        q_tail = tl.load(q + at + tail[None, :], mask=real[:, None] & (tail < D)[None, :], other=0.0)
        top = tl.full((M,), float("-inf"), tl.float32)
        below = tl.zeros((M,), tl.float32)
        total = tl.zeros((M, V_WIDE), tl.float32)
        for page in range(tl.maximum(chunk * CHUNK, seen_from), tl.minimum(chunk * CHUNK + CHUNK, last + 1)):
            # Addresses are a scalar and 32-bit distances: tensors of 64-bit pointers would cost a hundred registers.
            logical = page - tl.load(first + block)
            place = (head // SPLIT).to(tl.int64) * POSITIONS + tl.load(tables + block * TABLE + logical) * PAGE_
            key = keys + place * D
            scores = _product(q_head, tl.trans(tl.load(key + (j[:, None] * D + d[None, :]))), FLOAT_DOT)
            scores += _product(q_tail, tl.trans(tl.load(key + (j[:, None] * D + tail[None, :]),
                                                     mask=(tail < D)[None, :], other=0.0)), FLOAT_DOT)
            there = (page * PAGE_ + j)[None, :]
            if DRAFT:
                seen = there < begin + tokens
            else:
                seen = there <= position[:, None]
            if WINDOW > 0:
                near = there > position[:, None] - WINDOW
                seen = seen & (near | (there >= begin) if DRAFT else near)
            seen = seen & real[:, None]
            scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            finite = tl.where(higher == float("-inf"), 0.0, higher)
            keep = tl.exp(top - finite)
            weights = tl.exp(scores - finite[:, None])
            below = below * keep + tl.sum(weights, 1)
            # Positions nobody has written yet hold anything, NaN too: zero times that must stay zero.
            written = (page * PAGE_ + j < begin + tokens)[:, None] & (v < V)[None, :]
            value = tl.load(values + place * V + (j[:, None] * V + v[None, :]), mask=written, other=0.0)
            total = total * keep[:, None] + _product(narrow(weights, q.dtype.element_ty, FLOAT_DOT), value, FLOAT_DOT)
            top = higher
        mine = slot * MAX_CHUNKS + part
        tl.store(stats + mine * 2 * M + m, top)
        tl.store(stats + mine * 2 * M + M + m, below)
        tl.store(partial + mine.to(tl.int64) * (M * V_WIDE) + (m[:, None] * V_WIDE + v[None, :]), total)
        tl.debug_barrier()
        if tl.atomic_add(arrived + slot, 1, sem="acq_rel", scope="gpu") == chunks - 1:
            tl.debug_barrier()
            _join(partial, stats, sink, out, slot, chunks, head, R, first_row, tokens, M, G, T, V, V_WIDE, MAX_CHUNKS, HAS_SINK,
                  FLOAT_DOT)
            tl.store(arrived + slot, 0)


@triton.jit(do_not_specialize=["R", "TABLE", "MAX_CHUNKS"])
def attend_kernel(q, keys, values, sink, tables, first, start, count, row, partial, stats, arrived, out,
                  R, POSITIONS, TABLE, MAX_CHUNKS, HEADS: tl.constexpr, G: tl.constexpr, SPLIT: tl.constexpr, T: tl.constexpr,
                  M: tl.constexpr, D: tl.constexpr, D_HEAD: tl.constexpr, D_TAIL: tl.constexpr, V: tl.constexpr,
                  V_WIDE: tl.constexpr, PAGE_: tl.constexpr, CHUNK: tl.constexpr, WINDOW: tl.constexpr, HAS_SINK: tl.constexpr,
                  FLOAT_DOT: tl.constexpr, DRAFT: tl.constexpr = False):
    """Program (block * HEADS + head, chunk)."""
    attend_tile(tl.program_id(0), tl.program_id(1), q, keys, values, sink, tables, first, start, count, row, partial, stats,
                arrived, out, R, POSITIONS, TABLE, MAX_CHUNKS, HEADS, G, SPLIT, T, M, D, D_HEAD, D_TAIL, V, V_WIDE, PAGE_,
                CHUNK, WINDOW, HAS_SINK, DRAFT, FLOAT_DOT)


def attention_constants(heads: int, group: int, rows: int, d: int, v: int, window: int | None, sink: bool, *,
                        chunk: int = CHUNK_PAGES, float_dot: bool = False, draft: bool = False) -> dict:
    """Compile-time arguments for `heads` key heads with `group` query heads each and blocks of `rows` tokens."""
    d_head = 1 << (d.bit_length() - 1)
    split = next(n for n in range(1, group + 1) if group % n == 0 and (group // n * rows <= MOST_ROWS or n == group))
    heads, group = heads * split, group // split
    return {"HEADS": heads, "G": group, "SPLIT": split, "T": rows, "D": d, "D_HEAD": d_head,
            "M": max(16, triton.next_power_of_2(group * rows)),
            "D_TAIL": max(16, triton.next_power_of_2(d - d_head)), "V": v, "V_WIDE": max(16, triton.next_power_of_2(v)),
            "PAGE_": PAGE, "CHUNK": chunk, "WINDOW": window or 0, "HAS_SINK": sink, "FLOAT_DOT": float_dot, "DRAFT": draft}


def most_chunks(longest: int, window: int | None, rows: int, chunk: int = CHUNK_PAGES) -> int:
    """Chunks that a block of `rows` tokens can reach into before position `longest`."""
    reach = longest if window is None else min(longest, window + rows + PAGE * chunk)
    return -(-reach // (PAGE * chunk)) + (window is not None)


def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sink: torch.Tensor | None, tables: torch.Tensor,
           first: torch.Tensor, start: torch.Tensor, count: torch.Tensor, row: torch.Tensor, *, rows: int, window: int | None,
           longest: int, out: torch.Tensor | None = None, chunk: int = CHUNK_PAGES, float_dot: bool = False,
           draft: bool = False, warps: int = 8) -> torch.Tensor:
    """Heads of the blocks' rows.

    Args:
        q: bfloat16 [Q, R, D], scaled and rotated. keys, values: bfloat16 [K, positions, D], [K, positions, V], the pool; the
            rows' own keys and values are in it.
        sink: float32 [Q], or None.
        tables: int32 [B, n] page numbers; first: int32 [B], the logical page of tables[b, 0].
        start, count, row: int32 [B]: position of a block's first token, its tokens (at most `rows`), its first row in q.
        window: positions a query sees, itself included; None for all.
        longest: positions before the end of the longest block; an upper bound will do (on the host: no synchronization).
        chunk, float_dot: pages of a chunk (changes bits of long contexts); True in the interpreter.
        draft: the rows of a block see all of it, and `window` ends only what they see of the context before it.

    Returns:
        `out`, by default a new bfloat16 tensor: [Q, R, V].

    Raises:
        ValueError: key heads that do not divide the query heads.
    """
    (Q, R, D), (K, positions, V), B = q.shape, values.shape, start.shape[0]
    if Q % K:
        raise ValueError(f"{Q} query heads over {K} key heads; expected a multiple")
    constants = attention_constants(K, Q // K, rows, D, V, window, sink is not None, chunk=chunk, float_dot=float_dot,
                                    draft=draft)
    chunks = most_chunks(longest, window, rows, chunk)
    scratch = {"dtype": torch.float32, "device": q.device}
    slots = B * constants["HEADS"]
    partial = torch.empty((slots * chunks, constants["M"], constants["V_WIDE"]), **scratch)
    stats = torch.empty((slots * chunks, 2, constants["M"]), **scratch)
    out = torch.empty((Q, R, V), dtype=q.dtype, device=q.device) if out is None else out
    options = {} if float_dot else {"num_warps": warps}
    with arrivals(slots, q.device) as arrived:
        attend_kernel[(slots, chunks)](q, keys, values, stats if sink is None else sink, tables, first, start, count, row,
                                       partial, stats, arrived, out, R, positions, tables.shape[1], chunks, **constants,
                                       **options)
    return out
