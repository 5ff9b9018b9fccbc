"""From logits to accepted tokens on the device: the third launch of a step, for requests at temperature 0.

Each program takes a chunk of the vocabulary for one row and leaves its best value and place; whoever delivers the last
chunk of a row has the row's token (the lowest of equal ones), whoever delivers the last row counts how many drafts in a
row were the target's own tokens. A token per row and a count per sequence leave the device instead of 600 KB of logits a row.

Reference twin: `torch.argmax` and the greedy branch of `runtime_ref.speculative.accept`.

Sampling above temperature 0 stays with `runtime_ref.sampler`: its order of penalties, top-k, top-p and min-p over float64
probabilities is the contract that drafting must not change, and a vocabulary-wide sort belongs to no walk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

CHUNK = 4096


@triton.jit
def judge_kernel(logits, drafts, first, count, best, place, arrived, tokens, accepted, rows_left, vocabulary, R, sequences,
                 CHUNKS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row, chunk). `judge` documents and fills the arguments."""
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(logits + row.to(tl.int64) * vocabulary + at, mask=at < vocabulary, other=float("-inf"))
    tl.store(best + row * CHUNKS + chunk, tl.max(values, 0))
    tl.store(place + row * CHUNKS + chunk, chunk * BLOCK + tl.argmax(values, 0, tie_break_left=True).to(tl.int32))
    tl.debug_barrier()
    if tl.atomic_add(arrived + row, 1, sem="acq_rel", scope="gpu") == CHUNKS - 1:
        tl.debug_barrier()
        c = tl.arange(0, WIDE)
        found = tl.load(best + row * CHUNKS + c, mask=c < CHUNKS, other=float("-inf"))
        tl.store(tokens + row, tl.load(place + row * CHUNKS + tl.argmax(found, 0, tie_break_left=True)))
        tl.store(arrived + row, 0)
        tl.debug_barrier()
        if tl.atomic_add(rows_left, 1, sem="acq_rel", scope="gpu") == R - 1:
            tl.debug_barrier()
            for s in range(0, sequences):
                begin = tl.load(first + s)
                right = 0
                same = 1
                for i in range(0, tl.load(count + s)):
                    same = same * (tl.load(tokens + begin + i) == tl.load(drafts + begin + i)).to(tl.int32)
                    right += same
                tl.store(accepted + s, right)
            tl.store(rows_left, 0)


def judge(logits: torch.Tensor, drafts: torch.Tensor, first: torch.Tensor, count: torch.Tensor, *, chunk: int = CHUNK,
          ) -> tuple[torch.Tensor, torch.Tensor]:
    """The target's token of every row, and how many drafts of each sequence are accepted.

    Args:
        logits: float32 [R, V]. drafts: int32 [R], the draft that stands at row + 1 (anything in a sequence's last row).
        first, count: int32 [S]: a sequence's first row and its drafts.

    Returns:
        tokens int32 [R], accepted int32 [S].
    """
    (R, V), device = logits.shape, logits.device
    chunks = triton.cdiv(V, chunk)
    best = torch.empty((R, chunks), dtype=torch.float32, device=device)
    place = torch.empty((R, chunks), dtype=torch.int32, device=device)
    counters = torch.zeros(R + 1, dtype=torch.int32, device=device)
    tokens, accepted = torch.empty(R, dtype=torch.int32, device=device), torch.empty_like(first)
    judge_kernel[(R, chunks)](logits, drafts, first, count, best, place, counters, tokens, accepted, counters[R:], V, R,
                              first.shape[0], CHUNKS=chunks, WIDE=triton.next_power_of_2(chunks), BLOCK=chunk)
    return tokens, accepted
