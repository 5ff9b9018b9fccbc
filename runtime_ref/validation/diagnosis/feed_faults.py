"""Rounds of drafting as an engine feeds them, the reference of each, and what engines get wrong in feeding a drafter.

A round is what the drafter was asked (anchor, position, number of drafts) and what it answered. Its reference needs nothing of
the engine: the target's features of all tokens before the anchor, at their positions, and the drafter's own model. What a fault
does to that input (features of other layers, positions that restart, rows that are padding) is a change of `Fed`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from modeling.drafter import DFlashDraftModel
from runtime_ref.core.batch import DraftRequest
from runtime_ref.validation.diagnosis.faults import SAME, difference

CAPTURE_CAUSE = "the capture offset is wrong by one: features are the outputs of neighbouring layers of target_layer_ids"
STALE_CAUSE = ("the newest keys are left out: the attention's split schedule was computed before they were written, or for "
               "another length")
CHUNK_CAUSE = "keys of a long prompt are written at wrong positions: positions restart in each chunk of the fused context keys"
LENGTH_CAUSE = "positions beyond the drafter's trained length (max_position_embeddings) are clamped or extrapolated"
PADDED_CAUSE = "padded rows of a batch or graph are taken for tokens: the drafter's context and its positions run ahead"
HIT_CAUSE = "a prefix-cache hit leaves the drafter without the features of the cached tokens"
BLOCK_CAUSE = "positions of the drafter's block are off by one: the anchor's is the number of tokens before it"


@dataclass(frozen=True)
class Round:
    """What a drafter was asked and what it answered: logits [count, vocabulary] of the drafts after `anchor`."""

    anchor: int
    position: int
    logits: torch.Tensor


class RecordingDrafter:
    """A drafter that remembers its rounds; everything else is the recorded drafter's."""

    one_call = False  # whose logits nobody sees; its bits are those of drafts that are made apart

    def __init__(self, drafter):
        self._drafter, self.rounds = drafter, []

    def __getattr__(self, name: str):
        return getattr(self._drafter, name)

    def logits(self, requests: list[DraftRequest]) -> list[torch.Tensor]:
        found = self._drafter.logits(requests)
        self.rounds += [Round(w.anchor, w.position, rows.float().cpu().clone())
                        for w, rows in zip(requests, found, strict=True)]
        return found


@dataclass(frozen=True)
class Fed:
    """A drafter's input.

    Attributes:
        outputs: [S, depth + 1, H] of the embedding and of every layer at `positions` [S]. layers: whose outputs are features.
        anchor, start: first token of the block, and its position.
        angles: positions [S] that the context's keys are rotated by. longest: rotation stops at this position.
    """

    outputs: torch.Tensor
    positions: torch.Tensor
    layers: list[int]
    anchor: int
    start: int
    angles: torch.Tensor
    longest: int | None = None


@dataclass(frozen=True)
class FeedFault:
    """A fault hypothesis about a drafter's input; `change` returns None where it changes nothing."""

    name: str
    cause: str
    change: Callable[[Fed], Fed | None]


@torch.no_grad()
def drafted(model: DFlashDraftModel, fed: Fed, embed: torch.nn.Module, count: int) -> torch.Tensor:
    """Hidden states [count, H] of the block's drafts; the block ends with them (its positions see each other)."""
    target_hidden = fed.outputs[:, [i + 1 for i in fed.layers]].flatten(1)[None]
    block = fed.start + torch.arange(count + 1)[None]
    if fed.longest is not None:
        right, model = model.cos_sin, copy.copy(model)
        model.cos_sin = lambda positions: right(positions.clamp_max(fed.longest - 1))
    context = model.context_keys_values(model.fuse(target_hidden), fed.angles[None])
    embeds = model.embed_block(torch.tensor([fed.anchor]), embed)[:, :count + 1]
    return model.block_hidden(embeds, block, context, fed.positions[None])[0, 1:]


def fed_right(outputs: torch.Tensor, drafter: DFlashDraftModel, anchor: int, position: int) -> Fed:
    """The right input of a round at `position`, from outputs [at least position, depth + 1, H]."""
    positions = torch.arange(position)
    return Fed(outputs[:position], positions, list(drafter.target_layer_ids), anchor, position, positions)


def feed_faults(drafter: DFlashDraftModel, depth: int) -> Iterator[FeedFault]:
    """What engines get wrong between the target's layers and the drafter."""
    for by in (1, -1):
        yield FeedFault(f"capture {by:+d}", CAPTURE_CAUSE, lambda f, n=by: replace(
            f, layers=[min(max(i + n, -1), depth - 1) for i in f.layers]))
        yield FeedFault(f"block positions {by:+d}", BLOCK_CAUSE, lambda f, n=by: replace(f, start=f.start + n))
    for count in range(1, 17):
        yield FeedFault(f"newest {count} left out", STALE_CAUSE, lambda f, n=count: _rows(f, slice(0, -n)))
    for chunk in (8, 16, 32, 64, 128, 256, 512):
        yield FeedFault(f"positions restart after {chunk}", CHUNK_CAUSE, lambda f, n=chunk: None if len(f.positions) <= n
                        else replace(f, angles=f.positions % n))
        yield FeedFault(f"last {chunk} only", HIT_CAUSE, lambda f, n=chunk: _rows(f, slice(len(f.positions) // n * n, None)))
    yield FeedFault("no context", HIT_CAUSE, lambda f: _rows(f, slice(0, 0)))
    longest = drafter.config.max_position_embeddings
    yield FeedFault("positions clamped", LENGTH_CAUSE, lambda f: None if f.start + drafter.block_size <= longest
                    else replace(f, longest=longest))
    for multiple in (8, 16, 32, 64):
        yield FeedFault(f"padded to {multiple}", PADDED_CAUSE, lambda f, n=multiple: _padded(f, -len(f.positions) % n))


def _rows(fed: Fed, rows: slice) -> Fed | None:
    kept = fed.positions[rows]
    return None if len(kept) == len(fed.positions) else replace(fed, outputs=fed.outputs[rows], positions=kept, angles=kept)


def _padded(fed: Fed, count: int) -> Fed | None:
    if not count:
        return None
    outputs = torch.cat((fed.outputs, fed.outputs[-1:].expand(count, -1, -1)))
    positions = torch.arange(len(outputs))
    return replace(fed, outputs=outputs, positions=positions, angles=positions, start=fed.start + count)


def matching_feed_faults(faults: Iterator[FeedFault], run: Callable[[Fed], torch.Tensor], fed: Fed,
                         observed: torch.Tensor) -> list[FeedFault]:
    """The first fault of each cause whose input gives what was observed."""
    found: dict[str, FeedFault] = {}
    for fault in faults:
        wrong = fault.change(fed) if fault.cause not in found else None
        if wrong is not None and difference(run(wrong), observed) < SAME:
            found[fault.cause] = fault
    return list(found.values())
