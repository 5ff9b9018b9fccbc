"""Which tokens a step computes: continuous batching with chunked prefill.

- Decoding sequences come first, each with its anchor and drafts, so a long prompt never stalls a running answer.
- Prompts share what is left of the step's rows evenly, in multiples of eight: a short prompt behind a long one is not kept
  waiting, and a long one still moves on.
- Admission in order of arrival, when there is room for the whole prompt and one round.
- When pages run out, the sequence that came last gives up its pages and starts again later from its tokens (recomputation
  has the bits of the first computation, so nobody can tell).

The scheduler knows pages and counts, no tensors; ranks run it alike.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from runtime_ref.core.kv_cache import PAGE, KvCache, OutOfPages
from runtime_ref.engine.sequence import Sequence

ROWS = 8


@dataclass
class ScheduledSequence:
    """`count` tokens of a sequence from `computed` on: a piece of what is read (a prompt, or all of a sequence that comes back
    after a preemption), or, decoding, the newest token and drafts after it."""

    sequence: Sequence
    count: int
    drafts: int = 0
    reads_prompt: bool = True

    @property
    def completes(self) -> bool:
        """Whether the step ends with the newest token, so that its logits give the next one."""
        return self.count == self.sequence.waiting_tokens


class Scheduler:
    """Queues and the page budget.

    Args:
        max_running: sequences that decode side by side.
        rows: tokens of a step; at least max_running * block.
        block: tokens of a round of speculation (1 without a drafter).
    """

    def __init__(self, cache: KvCache, *, max_running: int = 8, rows: int = 256, block: int = 1):
        if rows < max(ROWS, max_running * block):
            raise ValueError(f"rows: {rows} tokens per step, expected at least max_running x block = {max_running * block}")
        self.cache, self.max_running, self.rows, self.block = cache, max_running, rows, block
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens could run if it were alone."""
        return all(self._pages(kind, tokens) <= pool.pages for kind, pool in self.cache.pools.items())

    def _pages(self, kind: str, tokens: int) -> int:
        """Pages of a kind that a sequence holds at most until it has `tokens` tokens."""
        window = self.cache.pools[kind].window
        end = -(-(tokens + self.block) // PAGE)
        return end if window is None else min(end, -(-(window + self.rows) // PAGE) + 2)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and gives its pages back."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.cache.release(sequence.tables)

    def plan(self) -> list[ScheduledSequence]:
        """Sequences of the next step, with pages for all of it; empty when there is nothing to do."""
        self._admit()
        scheduled = self._divide()
        planned: list[ScheduledSequence] = []
        for item in sorted(scheduled, key=lambda w: (w.reads_prompt, w.sequence.arrival)):
            if item.sequence in self.running and self._reserve(item):
                planned.append(item)
        return [w for w in planned if w.sequence in self.running]

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_running:
            sequence = self.waiting[0]
            needed = {kind: self._pages(kind, len(sequence.tokens)) for kind in self.kinds(sequence)}
            if self.running and any(self._available(kind) < count for kind, count in needed.items()):
                return
            self.waiting.popleft()
            full = (len(sequence.tokens) - 1) // PAGE
            known = [] if sequence.unscored else sequence.hashes[:full]  # what is to be scored has to be computed
            sequence.cached = self.cache.match_prefix(sequence.tables, known, self.kinds(sequence))
            sequence.computed = sequence.hidden_from = sequence.cached
            sequence.remembered = sequence.cached // PAGE
            self.running.append(sequence)

    def kinds(self, sequence: Sequence) -> list[str]:
        return [kind for kind in self.cache.pools if kind != "draft" or sequence.drafting]

    def _available(self, kind: str) -> int:
        """Free pages, and those that only the prefix cache holds."""
        pool = self.cache.pools[kind]
        return len(pool.free) + sum(1 for entry in self.cache.entries()
                                    if kind in entry.pages and pool.references[entry.pages[kind]] == 1)

    def _divide(self) -> list[ScheduledSequence]:
        decoding = [s for s in self.running if s.answered and s.waiting_tokens == 1]
        reading = [s for s in self.running if not (s.answered and s.waiting_tokens == 1)]
        scheduled = [ScheduledSequence(s, 1, self._drafts(s), reads_prompt=False) for s in decoding]
        left = self.rows - sum(w.count + w.drafts for w in scheduled)
        for i, sequence in enumerate(reading):
            share = max(ROWS, left // (len(reading) - i) // ROWS * ROWS)
            count = min(sequence.waiting_tokens, share, left)
            if count > 0:
                scheduled.append(ScheduledSequence(sequence, count))
                left -= count
        return scheduled

    def _drafts(self, sequence: Sequence) -> int:
        """Drafts of its next round: no more than could be emitted beside the target's own token."""
        if not sequence.drafting or sequence.params.drafts == 0:
            return 0
        most = self.block - 1 if sequence.params.drafts is None else min(sequence.params.drafts, self.block - 1)
        if sequence.length is not None:
            most = min(most, sequence.length.next())
        return max(0, min(most, sequence.left - 1))

    def _reserve(self, item: ScheduledSequence) -> bool:
        """Pages for an item; preempts those that came last until there is room. False if the item itself had to go."""
        sequence = item.sequence
        end = sequence.computed + item.count + item.drafts
        while True:
            try:
                self.cache.extend(sequence.tables, self.kinds(sequence), end)
                return True
            except OutOfPages:
                victim = max(self.running, key=lambda s: s.arrival)
                self._preempt(victim)
                if victim is sequence:
                    return False

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.cache.release(sequence.tables)
        sequence.reset()
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(sequence)
