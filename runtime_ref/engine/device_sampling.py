"""Penalties, filters and draws of many rows at once, where the logits are: `engine.sampler`, batched, no read by the host.

Row i of a round stands after i accepted drafts. What was said before it is the answer and the first i drafts: a row that is
reached has seen all of them accepted, and what the others give is never looked at. So drafts need not be known to the host.

References: `sampler.penalize`, `distribution` and `draw`, and `speculative.accept`. Tokens are theirs unless a uniform number
lies within the rounding of a float64 sum of a boundary between two tokens (a device may add in another order).

Rejected: a kernel of its own. A vocabulary-wide sort is what torch has; only requests that ask for filters, penalties or the
rule "rejection" come here, a few dozen launches for all of them together.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from runtime_ref.core.sampling_params import SamplingParams
from runtime_ref.engine.sampler import FINITE, uniform

ROWS = 64  # at a time: each takes several float64 copies of the vocabulary


@dataclass
class Round:
    """One sequence's rows of logits.

    Attributes:
        first: its first row. drafts: how many there are; the one at place i stands at row first + i of `drafts` below.
        position: of its anchor. prompt, answer: tokens up to the anchor.
        q: float64 [drafts, V], what drafts were drawn from; None if they are the drafter's likeliest tokens.
    """

    params: SamplingParams
    first: int
    drafts: int
    position: int
    prompt: list[int]
    answer: list[int]
    q: torch.Tensor | None = None


def choose(logits: torch.Tensor, rounds: list[Round], drafts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The token that each row of these sequences emits if it is reached.

    Args:
        logits: float32 [R, V]. drafts: int32 [R] on the same device.

    Returns:
        rows int64 [n] of logits, and their tokens int64 [n]: -1 where logits are not finite.
    """
    found, block = [], []
    for own in rounds:
        if block and sum(other.drafts + 1 for other in block) + own.drafts + 1 > ROWS:
            found.append(_choose(logits, block, drafts))
            block = []
        block.append(own)
    found.append(_choose(logits, block, drafts))
    rows, tokens = zip(*found, strict=True)
    return torch.cat(rows), torch.cat(tokens)


def _choose(logits: torch.Tensor, rounds: list[Round], drafts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    device = logits.device
    places = [(s, own.first + i, i) for s, own in enumerate(rounds) for i in range(own.drafts + 1)]
    rows = torch.tensor([row for _, row, _ in places], device=device)
    own = logits[rows]
    finite = own.isfinite().all(-1)
    if any(r.params.penalized for r in rounds):
        own = penalized(own, rounds, drafts)
    params = [rounds[s].params for s, _, _ in places]
    p = distributions(own, params)
    tokens = draws(p, _uniform(rounds, places, "token", device))
    greedy = torch.tensor([one.temperature == 0 for one in params], device=device)
    tokens = torch.where(greedy, own.argmax(-1), tokens)
    at = [k for k, (s, _, i) in enumerate(places) if rounds[s].q is not None and i < rounds[s].drafts]
    if at:
        here = torch.tensor(at, device=device)
        q = torch.cat([r.q for r in rounds if r.q is not None])
        tokens[here] = _rejected_or_kept(p[here], q, drafts[rows[here]].long(), rounds, [places[k] for k in at])
    return rows, torch.where(finite, tokens, -1)


def _rejected_or_kept(p: torch.Tensor, q: torch.Tensor, drafted: torch.Tensor, rounds: list[Round],
                      places: list) -> torch.Tensor:
    """Rule "rejection": a draft with probability min(1, p / q), else a token of max(p - q, 0)."""
    own = drafted[:, None]
    kept = _uniform(rounds, places, "accept", p.device) * q.gather(1, own)[:, 0] < p.gather(1, own)[:, 0]
    rest = (p - q).clamp_min_(0)
    # p and q differ by rounding only: the draft was rejected with a probability of about 0, and p is the answer.
    rest = torch.where((rest > 0).any(-1, keepdim=True), rest, p)
    return torch.where(kept, drafted, draws(rest, _uniform(rounds, places, "token", p.device)))


def _uniform(rounds: list[Round], places: list, purpose: str, device) -> torch.Tensor:
    """float64 [n]: the number of each row's position."""
    numbers = [uniform(rounds[s].params.seed, rounds[s].position + 1 + i, purpose) for s, _, i in places]
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def _column(values: list, device, dtype=torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)[:, None]


def _cells(cells: list[tuple[int, int, float]], device) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """(rows, columns) and float32 values of a list of (row, column, value)."""
    rows, columns, values = zip(*cells, strict=True)
    return ((torch.tensor(rows, device=device), torch.tensor(columns, device=device)),
            torch.tensor(values, dtype=torch.float32, device=device))


def penalized(own: torch.Tensor, rounds: list[Round], drafts: torch.Tensor) -> torch.Tensor:
    """Logits float32 [n, V] of all rows of `rounds`, after each one's penalties."""
    device, V = own.device, own.shape[1]
    rows = [(s, i) for s, r in enumerate(rounds) for i in range(r.drafts + 1)]
    of = torch.tensor([s for s, _ in rows], device=device)
    said = torch.zeros(len(rounds), V, device=device)
    prompts = torch.zeros(len(rounds), V, device=device)
    for into, cells in (
            (said, [(s, token, count) for s, r in enumerate(rounds) for token, count in Counter(r.answer).items()]),
            (prompts, [(s, token, 1) for s, r in enumerate(rounds) if r.params.repetition_penalty != 1.0
                       for token in set(r.prompt)])):
        if cells:
            into.index_put_(*_cells(cells, device))
    counts = said[of]
    earlier = [(k, rounds[s].first + j) for k, (s, i) in enumerate(rows) for j in range(i)]
    if earlier:
        at, standing = (torch.tensor(column, device=device) for column in zip(*earlier, strict=True))
        counts.index_put_((at, drafts[standing].long()), torch.ones(len(earlier), device=device), accumulate=True)
    repetition, presence, frequency = (_column([getattr(rounds[s].params, name) for s, _ in rows], device, torch.float32)
                                       for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"))
    seen = (counts > 0) | (prompts[of] > 0)
    own = torch.where(seen & (repetition != 1), torch.where(own > 0, own / repetition, own * repetition), own)
    own = torch.where(counts > 0, own - (presence + frequency * counts), own)
    bias = [(k, token, value) for k, (s, _) in enumerate(rows) for token, value in rounds[s].params.logit_bias]
    if bias:
        own.index_put_(*_cells(bias, device), accumulate=True)
    own.clamp_(-FINITE, FINITE)
    held = [(k, token, -torch.inf) for k, (s, i) in enumerate(rows) for token in rounds[s].params.held_back
            if len(rounds[s].answer) + i < rounds[s].params.min_tokens]
    if held:
        own.index_put_(*_cells(held, device))
    return own


def distributions(logits: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """float64 [n, V] that sum to 1: what a token of each row [n, V] is drawn from, above temperature 0."""
    device, V = logits.device, logits.shape[1]
    p = logits.double()
    p = ((p - p.amax(-1, keepdim=True)) / _column([one.temperature or 1.0 for one in params], device)).softmax(-1)
    cut = [one.top_k if 0 < one.top_k < V else 0 for one in params]
    if any(cut):
        best = p.topk(max(cut)).values
        least = best.gather(1, _column([max(k - 1, 0) for k in cut], device, torch.int64))
        p = torch.where((p < least) & (_column(cut, device, torch.int64) > 0), 0.0, p)
    if any(one.min_p for one in params):
        p = torch.where(p < _column([one.min_p for one in params], device) * p.amax(-1, keepdim=True), 0.0, p)
    nucleus = [k for k, one in enumerate(params) if one.top_p < 1]
    if nucleus:
        rows = torch.tensor(nucleus, device=device)
        ordered, index = p[rows].sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        kept = before < _column([params[k].top_p for k in nucleus], device) * p[rows].sum(-1, keepdim=True)
        kept[:, 0] = True  # whatever rounding made of a tiny top_p
        p[rows] = torch.zeros_like(ordered).scatter_(1, index, torch.where(kept, ordered, 0.0))
    return p / p.sum(-1, keepdim=True)


def draws(p: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """int64 [n]: where the cumulative distribution of each row of p [n, V] passes u [n]; never a token of probability 0."""
    last = p.shape[1] - 1
    total = p.cumsum(-1)
    found = torch.searchsorted(total, (u * total[:, -1])[:, None], right=True)
    inside = found.clamp(max=last)
    fine = (found <= last) & (p.gather(1, inside) > 0)
    highest = torch.where(p > 0, torch.arange(last + 1, device=p.device), 0).amax(-1, keepdim=True)
    return torch.where(fine, inside, highest)[:, 0]
