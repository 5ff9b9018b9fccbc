"""What a step computes: chunks of sequences, and what is asked of a drafter."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runtime_ref.core.kv_cache import Table


@dataclass
class SequenceChunk:
    """Consecutive tokens of one sequence in a step: their ids begin at position `start`."""

    tables: dict[str, Table]
    start: int
    tokens: list[int]
    logits: str = "all"  # "all", "last" or "none"
    row: int = 0  # first row, set by `plan_rows`


def logit_rows(chunk: SequenceChunk) -> int:
    """How many of a chunk's rows want logits."""
    return {"all": len(chunk.tokens), "last": 1, "none": 0}[chunk.logits]


def lay_out(chunks: list[SequenceChunk]) -> tuple[list[int], list[int], list[int]]:
    """(ids, positions, rows whose logits are wanted) of the chunks' rows side by side. Sets `chunk.row`."""
    ids, positions, head = [], [], []
    for chunk in chunks:
        chunk.row, n = len(ids), len(chunk.tokens)
        ids += chunk.tokens
        positions += range(chunk.start, chunk.start + n)
        head += range(chunk.row + n - logit_rows(chunk), chunk.row + n)
    return ids, positions, head


@dataclass
class DraftRequest:
    """One sequence that wants drafts.

    Attributes:
        tables: its page tables; "draft" must reach to `position` + `count` + 1.
        anchor, position: the last committed token and where it stands.
        count: drafts wanted, 1 to block - 1.
        target_hidden: features [n, target layers * H] of the positions position - n .. position - 1 that the drafter has not
            seen yet.
    """

    tables: dict[str, Table]
    anchor: int
    position: int
    count: int
    target_hidden: torch.Tensor | None


KIND = "draft"
