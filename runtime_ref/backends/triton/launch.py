"""Which way steps and drafts are launched: `--launch auto|persistent|graph|ops`.

Ways are compared before the first request: real steps (a random text is read first, then rounds of every number of sequences
that will be served, with one token, whole blocks and mixed lengths) are computed op by op and by each other way, and every bit
of logits and target hidden states must be the same. What is equal is timed, and the fastest serves. What differs is named by
the first op that differs, and ops serve. Ranks decide together: a way that one of them refuses is refused by all.

On a GPU the megakernel has eight warps to a program and ops have four, which adds a row's products in another order; so where
the megakernel is to be compared, ops get its number of warps, and keep it if it serves: prompts, longer than a launch of the
megakernel, go op by op and must have its bits.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from runtime_ref.backends.base import Drafter
from runtime_ref.backends.triton.backend import TritonBackend
from runtime_ref.backends.triton.graphs import GraphedDrafter, GraphedSteps
from runtime_ref.backends.triton.megakernel import Megakernel
from runtime_ref.backends.triton.megakernel_drafter import MegakernelDrafter
from runtime_ref.checkpoints.device_shapes import interpreted
from runtime_ref.core.batch import KIND, DraftRequest, SequenceChunk
from runtime_ref.core.kv_cache import PAGE, KvCache, OutOfPages
from runtime_ref.core.launch_report import LaunchReport
from runtime_ref.core.program import Op
from runtime_ref.kernels.experimental.megakernel import WARPS
from runtime_ref.kernels.experts import MAX_TOKENS

TIMED = 3  # passes over the compared steps; the fastest counts
READ = PAGE + 6  # tokens of each sequence before the compared steps: more than a page
PENDING = 3  # positions whose features a drafter has not seen yet
SEED = 20


class Rounds:
    """Sequences that have read a text, and the steps and rounds over them.

    Raises:
        OutOfPages: no room for one sequence.
    """

    def __init__(self, backend: TritonBackend, drafter: Drafter | None, program: list[Op], cache: KvCache, running: int,
                 context: int):
        self.backend, self.drafter, self.cache, self.program = backend, drafter, cache, program
        self.block = 1 if drafter is None else drafter.block
        self.read = max(PENDING + 1, min(READ, context - self.block))
        generator = torch.Generator().manual_seed(SEED)
        shape = running, self.read + self.block
        self.texts = torch.randint(0, backend.config.vocab_size, shape, generator=generator).tolist()
        self.tables, self.features = [], []
        for text in self.texts:
            tables = cache.tables()
            try:
                cache.extend(tables, list(tables), self.read + self.block)
            except OutOfPages:
                if not self.tables:
                    raise
                break
            self.tables.append(tables)
            self.features.append(self._prefill(tables, text))

    def _prefill(self, tables: dict, text: list[int]) -> torch.Tensor | None:
        """Reads a sequence's text; the features that its drafter has not seen."""
        step = self.backend.plan([SequenceChunk(tables, 0, text[:self.read], "last")])
        buffers = self.backend.run(self.program, step)
        if self.drafter is None:
            return None
        features = torch.cat([buffers[f"target_hidden.{i}"][:self.read] for i in self.drafter.target_layers], dim=-1)
        self.drafter.extend_tables(features[:-PENDING], 0, tables[KIND])
        return features[-PENDING:].clone()

    def counts(self) -> list[list[int]]:
        """Tokens of each sequence, of every step to compare."""
        found = []
        for n in range(1, len(self.tables) + 1):
            ways = [[1] * n, [self.block] * n, [self.block if i % 2 else 1 + i % self.block for i in range(n)]]
            found += [way for i, way in enumerate(ways) if way not in ways[:i] and sum(way) <= MAX_TOKENS]
        return found

    def step(self, counts: list[int]):
        """The planned step of the first len(counts) sequences."""
        return self.backend.plan([SequenceChunk(tables, self.read, text[self.read:self.read + n])
                                  for tables, text, n in zip(self.tables, self.texts, counts, strict=False)])

    def requests(self, counts: list[int]) -> list[DraftRequest]:
        """Of the drafter, for the same sequences; with pending features and without, in turn."""
        return [DraftRequest(tables, text[self.read], self.read, max(1, n - 1), None if i % 3 == 2 else features)
                for i, (tables, text, n, features) in enumerate(zip(self.tables, self.texts, counts, self.features,
                                                                    strict=False))]

    def release(self) -> None:
        for tables in self.tables:
            self.cache.release(tables)


def choose_launch(asked: str, backend: TritonBackend, program: list[Op], drafter: Drafter | None, cache: KvCache, running: int,
                  context: int) -> tuple[LaunchReport, Drafter | None]:
    """Makes a backend and its drafter launch the way that was asked for, or the best one.

    Args:
        running: sequences that will be served side by side. context: tokens of the longest.

    Returns:
        What was chosen and why, and the drafter to use.

    Raises:
        ValueError: a way that this model, drafter or machine does not have, asked for by name.
    """
    report, ops_drafter = LaunchReport(), drafter
    parts = ["target"] + ["drafter"] * (drafter is not None)
    report.chosen = dict.fromkeys(parts, "ops")
    if asked == "ops":
        return report, drafter
    if asked == "auto" and interpreted():
        report.refused = {(part, "persistent"): "not compared in Triton's interpreter" for part in parts}
        return report, drafter
    tiling = backend.tiling
    ways = [asked] if asked != "auto" else ["persistent", "graph"] if backend.device == "cuda" else ["persistent"]
    if "persistent" in ways and backend.device == "cuda":
        backend.tiling = replace(tiling, warps=WARPS)
    rounds = Rounds(backend, drafter, program, cache, running, context)
    report.sequences = len(rounds.tables)
    for part in parts:
        made = {way: found for way in ways
                if (found := _made(part, way, asked, backend, program, ops_drafter, report)) is not None}
        equal = {way: runner for way, runner in made.items() if _equal(part, way, runner, rounds, report)}
        way, runner = _fastest(part, asked, equal, rounds, report)
        if runner is not None and part == "target":
            backend.runner = runner
        elif runner is not None:
            drafter = runner
        report.chosen[part] = way
    rounds.release()
    if report.chosen["target"] != "persistent":
        backend.tiling = tiling
    return report, drafter


def _made(part: str, way: str, asked: str, backend, program, drafter, report: LaunchReport):
    """The runner of a way, or None and a line in the report."""
    programs = 1 if backend.device == "cpu" else torch.cuda.get_device_properties(0).multi_processor_count
    makers = {("target", "persistent"): lambda: Megakernel(backend, program, programs),
              ("drafter", "persistent"): lambda: MegakernelDrafter(drafter, programs),
              ("target", "graph"): lambda: GraphedSteps(backend, program),
              ("drafter", "graph"): lambda: GraphedDrafter(drafter)}
    try:
        return makers[part, way]()
    except ValueError as error:
        if asked == way:
            raise
        report.refused[part, way] = str(error)
        return None


def _equal(part: str, way: str, runner, rounds: Rounds, report: LaunchReport) -> bool:
    """Whether a way makes the bits of ops in every round, on all ranks."""
    for counts in rounds.counts():
        report.compared[part] = report.compared.get(part, 0) + 1
        expected, found = _computed(part, None, rounds, counts), _computed(part, runner, rounds, counts)
        same = all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)) and not runner.failed()
        if _all_ranks(rounds.backend, same):
            continue
        where = (first_difference(runner, rounds, counts) if part == "target" and way == "persistent" else
                 "a rank's or program's wait was given up" if runner.failed() else "its logits")
        report.refused[part, way] = f"{len(counts)} sequences of {counts} tokens: differs from ops, first in {where}"
        report.different.append((part, way))
        return False
    return True


def _computed(part: str, runner, rounds: Rounds, counts: list[int]) -> list[torch.Tensor]:
    """What a way (None: ops) makes of a round: logits, and of the target its hidden states."""
    if part == "drafter":
        found = (rounds.drafter if runner is None else runner).logits(rounds.requests(counts))
        return [t.clone() for t in found]
    step = rounds.step(counts)
    buffers = rounds.backend.launch_ops(rounds.program, step) if runner is None else runner.run(step)
    return [buffers[name].clone() for name in sorted(buffers) if name == "logits" or name.startswith("target_hidden.")]


def _all_ranks(backend: TritonBackend, here: bool) -> bool:
    return bool(backend.ranks.gather(torch.tensor([here])).all())


def _fastest(part: str, asked: str, equal: dict, rounds: Rounds, report: LaunchReport) -> tuple[str, object]:
    """(way, runner): the one that was asked for if it is equal, or the fastest; ranks take that of rank 0."""
    if not equal:
        return "ops", None
    if asked != "auto":
        return asked, equal[asked]
    seconds = {way: _seconds(part, runner, rounds) for way, runner in {"ops": None, **equal}.items()}
    report.seconds[part] = seconds = rounds.backend.ranks.broadcast(seconds)
    way = min(seconds, key=seconds.get)
    return way, equal.get(way)


def _seconds(part: str, runner, rounds: Rounds) -> float:
    """Of the first, the last and the middle round, launched one after another; the fastest of several passes."""
    counts = rounds.counts()
    best = float("inf")
    for _ in range(TIMED):
        began = time.perf_counter()
        for i in sorted({0, len(counts) // 2, len(counts) - 1}):
            _computed(part, runner, rounds, counts[i])
        if rounds.backend.device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def first_difference(megakernel: Megakernel, rounds: Rounds, counts: list[int]) -> str:
    """The first op whose result differs between the megakernel and ops, in words; to be called on all ranks alike.

    The megakernel runs the first op, then the first two, and so on: what it leaves after each is compared with what ops left
    there. (Sums over ranks are one op of the megakernel and several of ops.)
    """
    step, kept = rounds.step(counts), []
    rounds.backend.launch_ops(rounds.program, step, lambda op, buffers: kept.append(
        (op, {name: buffers[name].clone() for name in op.writes})), fuse=True)
    at = 0
    for count, op in enumerate(megakernel.program, 1):
        while at < len(kept) and not (kept[at][0].layer == op.layer and set(op.writes) & set(kept[at][0].writes)):
            at += 1
        rounds.backend.ranks.barrier()
        found = megakernel.run_first(step, count)
        here = all(torch.equal(t, kept[at][1][name]) for name, t in found.items() if name in kept[at][1])
        given_up = not _all_ranks(rounds.backend, not megakernel.failed())
        if given_up:
            return f"{op}: a program or rank gave up waiting"
        if not _all_ranks(rounds.backend, here):
            return str(op)
        at += 1
    return "what no op shows alone: a wait between ops is missing"
