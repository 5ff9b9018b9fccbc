"""Draft, verify, accept: what a round of speculation emits.

The target is asked about [anchor, drafts]; row i of its answer is its distribution after i accepted drafts. Two rules, both
with exactly the target's distribution:

    equality    The target samples its own token at every position and the draft is accepted if it is that token. The emitted
                tokens *are* the target's samples: with counted randomness they are the same tokens as without a drafter.
    rejection   A draft x, sampled from q, is accepted with probability min(1, p(x) / q(x)); a rejected position emits a token
                from max(p - q, 0). Accepts more often when q is close to p but not sharp.

At temperature 0 both are "equal to the arg-max".

How many drafts to ask for (`DraftLength`): from running means of the conditional acceptance by position follow the tokens
expected of a round; the count with the most tokens per unit of cost wins, 0 (plain decoding) included. Costs are relative
to a plain step; the engine measures them once, on rank 0, and tells the others, so that all ranks decide alike. A sequence
starts from what the engine's sequences accepted last. One that does not draft tries again ever more rarely, and gives up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from runtime_ref.drafter import Wanted
from runtime_ref.markov import MarkovHead
from runtime_ref.sampler import SamplingParams, distribution, draw, penalize, sample, uniform

# Plain tokens after which a sequence that does not draft tries again (twice as many each time), and how often it does.
RETRY_AFTER, RETRIES = 32, 3
# Weight of the newest round in a sequence's means and in the engine's; what is assumed before anything was measured.
NEWEST, NEWEST_OF_ENGINE, ASSUMED = 0.15, 0.02, 0.7
# Where the engine's sequences show that drafts do not pay, one in so many new ones finds out whether that still holds.
EXPLORE = 16
# Tokens per cost that a round must be able to reach, all drafts accepted, to be tried at all.
WORTH_TRYING = 1.1


class Proposer(Protocol):
    """What the engine asks for drafts."""

    block: int
    taps: list[int]

    def logits(self, wanted: list[Wanted]) -> list[torch.Tensor]:
        """Draft logits [count, vocabulary] of each sequence."""


@dataclass
class Proposal:
    """Drafted tokens; `q` [n, vocabulary] float64 is what they were sampled from (rule "rejection" above temperature 0)."""

    tokens: list[int]
    q: torch.Tensor | None = None


def propose(logits: torch.Tensor, params: SamplingParams, position: int, markov: MarkovHead | None = None,
            anchor: int = 0) -> Proposal:
    """Drafts from draft logits [n, V] for the positions after the anchor's `position`; `markov` if the drafter has one."""
    if params.temperature == 0 or params.rule == "equality":
        if markov is None:
            return Proposal(logits.argmax(-1).tolist())
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
class Verdict:
    """Tokens that a round emits (the last one is the target's own), and how many of them were drafts."""

    tokens: list[int]
    accepted: int


def accept(logits: torch.Tensor, proposal: Proposal, params: SamplingParams, position: int, prompt: list[int],
           answer: list[int]) -> Verdict:
    """Judges drafts.

    Args:
        logits: the target's [1 + drafts, V] float32: row i is its answer after i drafts.
        position: of the anchor; the token of row i stands at position + 1 + i.
        prompt, answer: the request's tokens up to the anchor (for penalties).
    """
    drafts = proposal.tokens
    if params.plain_greedy:
        own = logits.argmax(-1).tolist()
        n = next((i for i, draft in enumerate(drafts) if draft != own[i]), len(drafts))
        return Verdict(own[:n + 1], n)
    said = list(answer)
    for i, draft in enumerate(drafts):
        token = _judge(logits[i], draft, proposal, i, params, position, prompt, said)
        said.append(token)
        if token != draft:
            return Verdict(said[len(answer):], i)
    said.append(sample(logits[len(drafts)], params, position + 1 + len(drafts), prompt, said))
    return Verdict(said[len(answer):], len(drafts))


def _judge(logits, draft, proposal, i, params, position, prompt, said) -> int:
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


@dataclass
class DraftLength:
    """Number of drafts of a sequence's next round.

    Attributes:
        costs: number of drafts -> cost of a round of that many (drafting and verifying), a plain step being 1.
        rates: P(draft i accepted | all before it were), running means.
    """

    costs: dict[int, float]
    rates: list[float] = field(default_factory=list)
    plain: int = 0
    retries: int = 0

    def __post_init__(self):
        if not self.rates:
            self.rates = [ASSUMED] * max(self.costs)

    def next(self) -> int:
        best = self.best
        if best == 0 and self.plain >= RETRY_AFTER << self.retries:
            return min((c for c in self.costs if c), default=0)
        return best

    @property
    def best(self) -> int:
        return max(self.costs, key=lambda count: self.expected(count) / self.costs[count])

    @property
    def hopeless(self) -> bool:
        """Whether the sequence should stop to ask for drafts for good."""
        return self.retries >= RETRIES or not worth_trying(self.costs)

    def expected(self, count: int) -> float:
        """Tokens of a round of `count` drafts."""
        reached, total = 1.0, 1.0
        for rate in self.rates[:count]:
            reached *= rate
            total += reached
        return total

    def update(self, drafted: int, accepted: int) -> None:
        if not drafted:
            self.plain += 1
            return
        tried, self.plain = self.plain > 0, 0
        weigh_in(self.rates, drafted, accepted, NEWEST)
        if self.best:
            self.retries = 0
        elif tried:
            self.retries += 1


def worth_trying(costs: dict[int, float]) -> bool:
    """Whether any round would pay if all of its drafts were accepted."""
    return any((count + 1) / cost >= WORTH_TRYING for count, cost in costs.items() if count)


def weigh_in(rates: list[float], drafted: int, accepted: int, weight: float) -> None:
    """Moves running means by one round's outcome."""
    for i in range(min(accepted + 1, drafted)):
        rates[i] += weight * ((i < accepted) - rates[i])
