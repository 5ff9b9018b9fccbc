"""How many drafts to ask for, by what rounds cost and what was accepted.

From running means of the conditional acceptance by position follow the tokens expected of a round; the count with the most
tokens per unit of cost wins, 0 (plain decoding) included. Costs are relative to a plain step; the engine measures them once,
on rank 0, and tells the others, so that all ranks decide alike. A sequence starts from what the engine's sequences accepted
last, greedy ones and drawn ones apart. One that does not draft tries again ever more rarely, and gives up.

Where the backend makes drafts and judges them in one call, a round also leaves out those that the target will hardly come to:
the drafter's own probabilities say which, corrected by how often they were right.
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from runtime_ref.backends.base import Backend, Cut, Drafter
from runtime_ref.core.batch import DraftRequest, SequenceChunk
from runtime_ref.core.kv_cache import PAGE, KvCache, OutOfPages
from runtime_ref.core.program import Op
from runtime_ref.core.sampling_params import SamplingParams
from runtime_ref.engine.speculative import Proposal, accept, propose

# Rounds of three or seven drafts against a plain step, where they are not measured (drafters without weights).
DRAFT_COSTS = {0: 1.0, 3: 1.6, 7: 2.2}
MEASURED_ROUNDS = 24
# Plain tokens after which a sequence that does not draft tries again (twice as many each time), and how often it does.
RETRY_AFTER, RETRIES = 32, 3
# Weight of the newest round in a sequence's means and in the engine's; what is assumed before anything was measured.
NEWEST, NEWEST_OF_ENGINE, ASSUMED = 0.15, 0.02, 0.7
# The same of a step's cost; plain steps of a sequence that begins before any was timed.
NEWEST_COST, PLAIN_FIRST = 0.05, 4
# Where the engine's sequences show that drafts do not pay, one in so many new ones finds out whether that still holds.
EXPLORE = 8
# Tokens per cost that a round must be able to reach, all drafts accepted, to be tried at all, and that are expected of it: what
# a round does to the plain steps around it (caches, and features that are kept) is not in its cost.
WORTH_TRYING = 1.1


@dataclass
class DraftLength:
    """Number of drafts of a sequence's next round.

    Attributes:
        costs: number of drafts -> cost of a round of that many (drafting and verifying), a plain step being 1. row: what
            verifying one draft less saves of it.
        lead: plain steps before anything else. rounds: so far; the first ones weigh most.
        explores: whether the next round is a whole block of drafts whatever is expected of it: the first one of some sequences,
            and one after a round that paid.
        rates: P(draft i accepted | all before it were), running means.
        kept: number of drafts -> how many of so many were put before the target, running means.
    """

    costs: dict[int, float]
    rates: list[float] = field(default_factory=list)
    plain: int = 0
    retries: int = 0
    row: float = 0.0
    explores: bool = False
    lead: int = 0
    rounds: int = 0
    kept: dict[int, float] = field(default_factory=dict)

    def __post_init__(self):
        if not self.rates:
            self.rates = [ASSUMED] * max(self.costs)

    def next(self) -> int:
        best = self.best
        if self.lead:
            return 0
        if best == 0 and (self.explores or self.plain >= RETRY_AFTER << self.retries):
            return (max if self.explores else min)((c for c in self.costs if c), default=0)
        return best

    @property
    def best(self) -> int:
        count = max(self.costs, key=self.value)
        return count if self.value(count) >= WORTH_TRYING else 0

    def value(self, count: int) -> float:
        """Tokens per cost of rounds of `count` drafts, a plain step's being 1."""
        kept = self.kept.get(count, count)
        return self.expected(kept) / (self.costs[count] - self.row * (count - kept))

    @property
    def worth(self) -> float:
        """How likely a draft has to be reached and right to pay for its row."""
        return self.row * max(map(self.value, self.costs))

    @property
    def disabled(self) -> bool:
        """Whether the sequence should stop to ask for drafts for good."""
        return self.retries >= RETRIES or not worth_trying(self.costs)

    def expected(self, count: float) -> float:
        """Tokens of a round of `count` drafts (a mean)."""
        reached, total = 1.0, 1.0
        for i, rate in enumerate(self.rates[:math.ceil(count)]):
            reached *= rate
            total += reached * min(1.0, count - i)
        return total

    def update(self, drafted: int, accepted: int, beyond: Iterable[float] = ()) -> None:
        """Takes in a round. `beyond`: how likely each draft that was left out behind the others was to be right."""
        beyond = list(beyond)
        asked = drafted + len(beyond)
        if not asked:
            self.plain, self.lead = self.plain + (not self.lead), max(0, self.lead - 1)
            return
        tried, self.plain = self.plain > 0, 0
        self.explores = accepted + 1 > self.costs.get(asked, asked + 1)
        self.rounds += 1
        weigh_in(self.rates, drafted, accepted, max(NEWEST, 1 / (1 + self.rounds)), beyond)
        kept = self.kept.get(asked, asked)
        self.kept[asked] = kept + NEWEST * (drafted - kept)
        if self.best:
            self.retries = 0
        elif tried:
            self.retries += 1


def worth_trying(costs: dict[int, float]) -> bool:
    """Whether any round would pay if all of its drafts were accepted."""
    return any((count + 1) / cost >= WORTH_TRYING for count, cost in costs.items() if count)


def weigh_in(rates: list[float], drafted: int, accepted: int, weight: float, beyond: Sequence[float] = ()) -> None:
    """Moves running means by one round's outcome; if all its drafts were accepted also those behind: of drafts that were left
    out by how likely they were (`beyond`), of positions without a draft towards the last one with one."""
    for i in range(min(accepted + 1, drafted)):
        rates[i] += weight * ((i < accepted) - rates[i])
    asked = drafted + len(beyond)
    if accepted == drafted and asked:
        for i, chance in enumerate(beyond, drafted):
            rates[i] += weight * (chance - rates[i])
        for i in range(asked, len(rates)):
            rates[i] += weight * (rates[asked - 1] - rates[i])


class Adaptive:
    """What an engine knows of its drafter: costs of rounds, measured once, and what its sequences accepted last.

    Args:
        costs: None: measured when the first adaptive request comes.
        context: the longest sequence; where it is too short to measure in, costs are taken as usual.
    """

    def __init__(self, backend: Backend, drafter: Drafter, cache: KvCache, program: list[Op], costs: dict[int, float] | None,
                 context: int):
        self.backend, self.drafter, self.cache, self.program, self.context = backend, drafter, cache, program, context
        self.given, self.costs = costs, costs
        # By whether tokens are drawn: who is right about the likeliest token may be wrong about samples.
        self.rates = {drawn: [ASSUMED] * max(DRAFT_COSTS) for drawn in (False, True)}
        self.rounds = {drawn: 0 for drawn in (False, True)}
        self.truth = {drawn: array("f", [(i + 0.5) / 16 for i in range(16)]) for drawn in (False, True)}
        self.row = 0.0
        # Of plain steps and of rounds of so many drafts: running means, and of how many each.
        self.seconds: dict[int, float] = {}
        self.timed: dict[int, int] = {}
        self.skipped = 0

    def begin(self, params: SamplingParams) -> tuple[DraftLength, bool]:
        """What decides on a new sequence's drafts, and whether it may draft at all: its features cost something even while it
        decodes plainly.

        Under the rule "rejection" the number of drafts shows in the tokens (not in their distribution), so nothing that was
        measured decides there: the same seed gives the same answer.
        """
        fixed = params.rule == "rejection" and params.temperature > 0
        if fixed:
            costs, rates = self._possible(self.given or DRAFT_COSTS), []
        else:
            if self.costs is None:
                self.costs = self._measured()
            costs, rates = self._possible(self.costs or DRAFT_COSTS), list(self.rates[params.temperature > 0])
        length = DraftLength(costs, rates, row=0.0 if fixed else self.row)
        length.lead = PLAIN_FIRST if length.row and self.timed.get(0, 0) <= PLAIN_FIRST else 0
        length.explores = not (fixed or length.best or length.disabled) and self._explores()
        return length, not length.disabled and (fixed or bool(length.best) or length.explores)

    def _possible(self, costs: dict[int, float]) -> dict[int, float]:
        """Those of the drafter's block: the very same dictionary if they all are, so that sequences see what is learned."""
        return costs if max(costs) < self.drafter.block else {n: cost for n, cost in costs.items() if n < self.drafter.block}

    def took(self, asked: int, kept: int, seconds: float) -> None:
        """Takes in what a step of one sequence cost, `asked` drafts of which `kept` were judged (0: a plain step).

        What was measured beforehand is the best case; beside other work rounds lose more than plain steps.
        """
        if not self.row or asked not in self.costs or asked and 0 not in self.seconds:
            return
        if asked:
            seconds += (asked - kept) * self.row * self.seconds[0]
        known = self.seconds.setdefault(asked, seconds)
        count = self.timed[asked] = self.timed.get(asked, 0) + 1
        self.seconds[asked] = known + max(NEWEST_COST, 1 / count) * (min(seconds, 3 * known) - known)
        for n, mean in self.seconds.items():
            # Not beyond what is worth trying at all: nothing would be tried, and nothing learned, any more.
            self.costs[n] = min(mean / self.seconds[0], (n + 1) / WORTH_TRYING) if n else 1.0

    def cut(self, params: SamplingParams, length: DraftLength) -> Cut | None:
        """Which drafts of a sequence's next round are worth their rows; None: all."""
        return Cut(length.worth, self.truth[params.temperature > 0]) if length.row else None

    def learn(self, params: SamplingParams, length: DraftLength, asked: int, proposal: Proposal, accepted: int) -> None:
        """Takes in one round's outcome, of `asked` drafts."""
        drawn, drafted = params.temperature > 0, len(proposal.tokens)
        chances, truth = proposal.chances or [], self.truth[drawn]
        bins = [min(int(16 * chance), 15) for chance in chances]
        for i, own in enumerate(bins[:min(accepted + 1, drafted)]):
            truth[own] += NEWEST_OF_ENGINE * ((i < accepted) - truth[own])
        beyond = [truth[own] for own in bins[drafted:asked]]
        length.update(drafted, accepted, beyond)
        self.rounds[drawn] += 1
        weigh_in(self.rates[drawn], drafted, accepted, max(NEWEST_OF_ENGINE, 1 / (2 + self.rounds[drawn])), beyond)

    def _explores(self) -> bool:
        self.skipped += 1
        return self.skipped % EXPLORE == 1

    def _measured(self) -> dict[int, float] | None:
        """Seconds of rounds over those of a plain step, for one sequence; None if there is no room to measure now."""
        if self.drafter.pool is None or self.context < PAGE + self.drafter.block:
            return DRAFT_COSTS
        tables, start = self.cache.tables(), PAGE
        try:
            self.cache.extend(tables, list(tables), start + self.drafter.block)
        except OutOfPages:
            return None
        width = self.backend.config.hidden_size * len(self.drafter.target_layers)
        seconds = {n: [] for n in DRAFT_COSTS if n < self.drafter.block}
        # One rank on a CPU in CPU time: whatever else the machine does is not this engine's cost. Ranks also wait for each
        # other, and GPUs compute while their process sleeps.
        device = self.backend.device
        alone = self.backend.ranks.count == 1 and device == "cpu"
        clock = time.process_time if alone else time.perf_counter
        params, markov = SamplingParams(temperature=0.0), self.drafter.markov
        # Drafts that differ, as in a text: equal ones all go to the same experts, which is cheaper.
        random = torch.Generator().manual_seed(0)
        features = {n: torch.randn(1 + n // 2, width, generator=random).to(device) for n in seconds}
        rows = []
        for _ in range(MEASURED_ROUNDS):
            for n, found in seconds.items():
                began = clock()
                if n and self.drafter.one_call:
                    self.backend.run_round(self.program, [SequenceChunk(tables, start, [0] * (1 + n))], self.drafter, [0],
                                           [DraftRequest(tables, 0, start, n, features[n])], [None])
                    found.append(clock() - began)
                    continue
                proposal = Proposal([])
                if n:
                    drafts = self.drafter.logits([DraftRequest(tables, 0, start, n, features[n])])[0]
                    proposal = propose(drafts, params, start, markov)
                step = self.backend.plan([SequenceChunk(tables, start, [0, *proposal.tokens])])
                buffers = self.backend.run(self.program, step)
                accept(buffers["logits"], proposal, params, start, [0], [])
                found.append(clock() - began)
            if self.drafter.one_call:
                began, block = clock(), SequenceChunk(tables, start, list(range(self.drafter.block)))
                self.backend.run(self.program, self.backend.plan([block]))
                rows.append(clock() - began)
        self.cache.release(tables)
        plain = min(seconds[0])
        costs = {n: min(found) / plain for n, found in seconds.items()}
        if rows:
            self.seconds, self.timed = {n: min(found) for n, found in seconds.items()}, dict.fromkeys(seconds, 1)
            self.row = max(0.0, min(rows) / plain - 1) / (self.drafter.block - 1)
        return self.backend.ranks.broadcast(costs)
