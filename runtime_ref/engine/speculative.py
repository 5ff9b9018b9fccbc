"""Draft, verify, accept: what a round of speculation emits.

The target is asked about [anchor, drafts]; row i of its answer is its distribution after i accepted drafts. Two rules, both
with exactly the target's distribution:

    equality    The target samples its own token at every position and the draft is accepted if it is that token. The emitted
                tokens *are* the target's samples: with counted randomness they are the same tokens as without a drafter.
    rejection   A draft x, sampled from q, is accepted with probability min(1, p(x) / q(x)); a rejected position emits a token
                from max(p - q, 0). Accepts more often when q is close to p but not sharp.

At temperature 0 both are "equal to the arg-max".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime_ref.core.markov import MarkovHead
from runtime_ref.core.sampling_params import SamplingParams
from runtime_ref.engine.grammar import Constraint
from runtime_ref.engine.sampler import distribution, draw, penalize, sample, uniform


@dataclass
class Proposal:
    """Drafted tokens; `q` [n, vocabulary] float64 is what they were sampled from (rule "rejection" above temperature 0).
    `chances`: the drafter's own probabilities of its drafts, also of those that were cut off behind `tokens`."""

    tokens: list[int]
    q: torch.Tensor | None = None
    chances: list[float] | None = None


def likeliest(params: SamplingParams) -> bool:
    """Whether drafts are the drafter's likeliest tokens (else they are drawn)."""
    return params.temperature == 0 or params.rule == "equality"


def propose(logits: torch.Tensor, params: SamplingParams, position: int, markov: MarkovHead | None = None,
            anchor: int = 0) -> Proposal:
    """Drafts from draft logits [n, V] for the positions after the anchor's `position`; `markov` if the drafter has one."""
    greedy = likeliest(params)
    if greedy and markov is None:
        return Proposal(logits.argmax(-1).tolist())
    logits = logits.cpu()  # what is drawn, or depends on the token before, is chosen on the host
    if greedy:
        if params.temperature == 0 and markov.candidates:
            return Proposal(markov.path(logits, anchor))
        return Proposal(markov.chain(logits, anchor, lambda row, i: int(row.argmax())))
    q = []

    def drawn(row: torch.Tensor, i: int) -> int:
        q.append(distribution(row, params))
        return draw(q[-1], uniform(params.seed, position + 1 + i, "draft"))

    tokens = [drawn(row, i) for i, row in enumerate(logits)] if markov is None else markov.chain(logits, anchor, drawn)
    return Proposal(tokens, torch.stack(q))


@dataclass
class VerifyResult:
    """Tokens that a round emits (the last one is the target's own), and how many of them were drafts."""

    tokens: list[int]
    accepted: int


def accept(logits: torch.Tensor, proposal: Proposal, params: SamplingParams, position: int, prompt: list[int],
           answer: list[int], constraint: Constraint | None = None) -> VerifyResult:
    """Judges drafts.

    Args:
        logits: the target's [1 + drafts, V] float32: row i is its answer after i drafts.
        position: of the anchor; the token of row i stands at position + 1 + i.
        prompt, answer: the request's tokens up to the anchor (for penalties).
        constraint: of the answer's grammar; moves on by what is emitted. What it forbids has probability 0 in the target's
            distribution at each position, so that both rules stay exact; the round ends where the grammar does.
    """
    drafts = proposal.tokens
    if params.plain_greedy:
        return matched(drafts, logits.argmax(-1).tolist())
    said = list(answer)
    for i, draft in enumerate(drafts):
        row = logits[i] if constraint is None else constraint.masked(logits[i])
        token = _verified(row, draft, proposal, i, params, position, prompt, said)
        said.append(token)
        if constraint is not None:
            constraint.take(token)
        if token != draft or constraint is not None and constraint.ended:
            return VerifyResult(said[len(answer):], i)
    row = logits[len(drafts)] if constraint is None else constraint.masked(logits[len(drafts)])
    said.append(sample(row, params, position + 1 + len(drafts), prompt, said))
    if constraint is not None:
        constraint.take(said[-1])
    return VerifyResult(said[len(answer):], len(drafts))


def matched(drafts: list[int], own: Sequence[int]) -> VerifyResult:
    """Drafts up to the first that is not the target's `own` token [1 + drafts], and that token."""
    n = next((i for i, draft in enumerate(drafts) if draft != own[i]), len(drafts))
    return VerifyResult(list(own[:n + 1]), n)


def _verified(logits, draft, proposal, i, params, position, prompt, said) -> int:
    """The token emitted at draft i: the draft itself, or the one that takes its place."""
    where = position + 1 + i
    if proposal.q is None:
        return sample(logits, params, where, prompt, said)
    p, q = distribution(penalize(logits, params, prompt, said), params), proposal.q[i]
    if uniform(params.seed, where, "accept") * float(q[draft]) < float(p[draft]):
        return draft
    rest = (p - q).clamp_min_(0)
    # p and q differ by rounding only: the draft was rejected with a probability of about 0, and p is the answer.
    return draw(rest if float(rest.sum()) > 0 else p, uniform(params.seed, where, "token"))
