"""The loop: requests in, tokens out, one step at a time.

    engine = Engine.from_folder("checkpoint")
    request = engine.add(prompt_ids, SamplingParams(max_tokens=64))
    while engine.busy:
        for output in engine.step():
            ...

A step is planned by the scheduler, drafted by the drafter, computed by the backend as one program for all sequences,
verified by the acceptance rule. Nothing here blocks or waits, so a server can call `step` from a thread of its own and add or
abort requests between steps. With several ranks every rank holds an engine and makes the same calls in the same order.
"""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from checkpoint.findings import one_line
from runtime_ref.backends.base import DRAFTER_PRECISIONS, Backend, Drafter
from runtime_ref.backends.load import known_backend, load_backend
from runtime_ref.checkpoints.folder import drafter_folder, end_ids, read_geometry
from runtime_ref.checkpoints.host_weights import DECODED_BYTES
from runtime_ref.core.batch import KIND, DraftRequest, SequenceChunk, logit_rows
from runtime_ref.core.kv_cache import PAGE, KvCache
from runtime_ref.core.launch_report import LAUNCHES, LaunchReport
from runtime_ref.core.program import check_program, target_program
from runtime_ref.core.sampling_params import SamplingParams
from runtime_ref.core.tensor_parallel import SINGLE_RANK, RankLost, Ranks
from runtime_ref.engine.accept_likeliest import verify_likeliest
from runtime_ref.engine.detokenizer import TextStream
from runtime_ref.engine.draft_length import Adaptive
from runtime_ref.engine.grammar import Grammars
from runtime_ref.engine.sampler import logprob_of, logprobs_of
from runtime_ref.engine.scheduler import ScheduledSequence, Scheduler
from runtime_ref.engine.sequence import Finish, Output, Sequence
from runtime_ref.engine.speculative import Proposal, VerifyResult, accept, likeliest, propose


@dataclass
class EngineOptions:
    """Sizes.

    Attributes:
        max_running: sequences decoded side by side. rows: tokens per step (prompts included).
        max_context: longest prompt and answer; with max_running it decides how many pages there are, unless `pages` does.
        prefix_pages: pages kept beyond that for beginnings of prompts.
        draft_costs: see `adaptive.DraftLength`; None: measured when the first adaptive request comes.
    """

    max_running: int = 8
    rows: int = 256
    max_context: int = 4096
    pages: dict[str, int] | None = None
    prefix_pages: int = 64
    prefix_cache: bool = True
    decoded_bytes: int = DECODED_BYTES
    draft_costs: dict[int, float] | None = None


class Engine:
    """See the module's text. Build it with `from_folder`."""

    def __init__(self, backend: Backend, drafter: Drafter | None, options: EngineOptions, *, end_ids=(), tokenizer=None):
        self.backend, self.drafter, self.options = backend, drafter, options
        self.end_ids, self.tokenizer = frozenset(end_ids), tokenizer
        pools = dict(backend.pools)
        if drafter is not None and drafter.pool is not None:
            pools[KIND] = drafter.pool
        self.cache = KvCache(pools, prefix=options.prefix_cache)
        self.program = target_program(backend.config, drafter.target_layers if drafter is not None else ())
        check_program(self.program)
        self.scheduler = Scheduler(self.cache, max_running=options.max_running, rows=options.rows,
                                   block=drafter.block if drafter is not None else 1)
        self._ids = itertools.count()
        self._grammars: Grammars | None = None
        self._sequences: dict[int, Sequence] = {}
        self._streams: dict[int, TextStream] = {}
        self._counts = dict.fromkeys(("steps", "prompt_tokens", "cached_tokens", "tokens", "rounds", "drafted", "accepted",
                                      "finished", "aborted"), 0)
        self._layers_ascend = drafter is not None and list(drafter.target_layers) == sorted(set(drafter.target_layers))
        self.context = min(options.max_context, backend.config.max_position_embeddings)
        self.adaptive = None
        if drafter is not None:
            self.adaptive = Adaptive(backend, drafter, self.cache, self.program, options.draft_costs, self.context)
        self.launch = LaunchReport()
        self._per_position = [0] * (drafter.block - 1 if drafter is not None else 0)

    @classmethod
    def from_folder(cls, path: str | Path, *, backend: str = "auto", ranks: Ranks = SINGLE_RANK,
                    dtype: torch.dtype = torch.bfloat16, drafter: bool = True, options: EngineOptions | None = None,
                    launch: str = "auto", drafter_precision: str = "bf16", checksum: bool = False, tokenizer=None,
                    progress: Callable[[int, int], None] | None = None) -> Engine:
        """An engine on an exported folder, with its drafter if it has one.

        Args:
            backend: see `backends.load.load_backend`.
            drafter_precision: "bf16", or "int8": half the time of a draft on the c backend, and other drafts.
            launch: how steps and drafts reach the device, one of `core.launch_report.LAUNCHES`; see `Backend.choose_launch`.

        Raises:
            ValueError: a folder that cannot be served (what is wrong with it is said), an unknown backend.
        """
        if launch not in LAUNCHES:
            raise ValueError(f"launch {launch!r}: expected {', '.join(LAUNCHES)}")
        if drafter_precision not in DRAFTER_PRECISIONS:
            raise ValueError(f"drafter_precision {drafter_precision!r}: expected {', '.join(DRAFTER_PRECISIONS)}")
        backend, options = known_backend(backend), options or EngineOptions()
        with one_line(Path(path), passed=(RankLost,)):
            engine = cls._read(path, backend, ranks, dtype, drafter, options, drafter_precision, checksum, tokenizer, progress)
        engine.choose_launch(launch)
        return engine

    @classmethod
    def _read(cls, path, backend, ranks, dtype, drafter, options, drafter_precision, checksum, tokenizer, progress) -> Engine:
        config, raw = read_geometry(path)
        context = min(options.max_context, config.max_position_embeddings)
        per_sequence = {"full": -(-context // PAGE) + 1,
                        "window": min(-(-context // PAGE), -(-((config.sliding_window or 0) + options.rows) // PAGE)) + 2}
        pages = options.pages or {kind: n * options.max_running + options.prefix_pages for kind, n in per_sequence.items()}
        found = drafter_folder(path) if drafter else None
        runner = load_backend(backend, path, ranks, dtype=dtype, pages=pages, context=context,
                              decoded_bytes=options.decoded_bytes, checksum=checksum, progress=progress)
        own = None if found is None else runner.load_drafter(found, pages.get(KIND, max(pages.values())), context,
                                                               precision=drafter_precision)
        return cls(runner, own, options, end_ids=end_ids(path, raw), tokenizer=tokenizer)

    def choose_launch(self, asked: str) -> None:
        """Decides how steps and drafts are launched from now on (`launch` says what was chosen), on all ranks alike.

        Warns where a way computes something else than ops; then ops serve.
        """
        self.launch, self.drafter = self.backend.choose_launch(asked, self.program, self.drafter, self.cache,
                                                               self.options.max_running, self.context)
        if self.adaptive is not None:
            self.adaptive.drafter = self.drafter
        for part, way in self.launch.different:
            warnings.warn(f"--launch {asked}: {part} {way}: {self.launch.refused[part, way]}; ops serve", stacklevel=2)

    @property
    def busy(self) -> bool:
        return bool(self._sequences)

    def add(self, prompt: list[int], params: SamplingParams | None = None) -> int:
        """Queues a request; returns its id.

        Raises:
            ValueError: an empty or too long prompt, a token that the vocabulary does not have, stop strings without a
                tokenizer.
        """
        params = params or SamplingParams()
        vocabulary = self.backend.config.vocab_size
        if not prompt:
            raise ValueError("prompt: no tokens, expected at least one")
        wrong = next((t for t in prompt if type(t) is not int or not 0 <= t < vocabulary), None)
        if wrong is not None:
            raise ValueError(f"prompt: token {wrong!r}, expected 0 to {vocabulary - 1}")
        limit = self.context
        total = len(prompt) + params.max_tokens
        if total > limit or not self.scheduler.fits(total):
            raise ValueError(f"prompt of {len(prompt)} tokens and max_tokens {params.max_tokens}: expected at most {limit} "
                             "together, and no more than the cache's pages hold")
        wrong = next((t for t, _ in params.logit_bias if not 0 <= t < vocabulary), None)
        if wrong is not None:
            raise ValueError(f"logit_bias: token {wrong!r}, expected 0 to {vocabulary - 1}")
        if params.min_tokens:
            held = {*params.stop_ids, *(() if params.ignore_eos else self.end_ids)}
            params = replace(params, held_back=tuple(sorted(t for t in held if t < vocabulary)))
        constraint = None
        if params.grammar is not None:
            if self._grammars is None:
                self._grammars = Grammars(self.tokenizer, vocabulary, self.end_ids)
            constraint = self._grammars.begin(params.grammar)
        if params.stop and self.tokenizer is None:
            raise ValueError("stop: strings need a tokenizer, this engine has none (stop_ids work)")
        drafting = self.drafter is not None and params.speculate and params.drafts != 0
        length = None
        if drafting and params.adaptive:
            length, drafting = self.adaptive.begin(params)
        sequence = Sequence(next(self._ids), list(prompt), params, len(self._sequences), self.cache.tables(), drafting, length)
        sequence.arrival = sequence.id
        sequence.constraint = constraint
        self._sequences[sequence.id] = sequence
        if self.tokenizer is not None:
            self._streams[sequence.id] = TextStream(self.tokenizer, params.stop, params.skip_special)
        self.scheduler.add(sequence)
        return sequence.id

    def abort(self, request: int) -> None:
        """Ends a request and frees what it holds; unknown and finished ids are ignored."""
        sequence = self._sequences.pop(request, None)
        if sequence is None:
            return
        sequence.finish = Finish.ABORT
        self._streams.pop(request, None)
        self.scheduler.remove(sequence)
        self._counts["aborted"] += 1

    def step(self) -> list[Output]:
        """Computes one step; what it gave each request, in the order of their ids. Nothing to do: an empty list.

        Raises:
            FloatingPointError: logits that are not finite. RankLost: another rank has ended. Whatever is raised here ends the
                other ranks too: they would wait for this one. WaitGivenUp: inside a launch; nothing of the step is used.
        """
        done = False
        try:
            outputs = self._step()
            done = True
            return outputs
        finally:
            if not done:
                self.backend.ranks.abandon()

    def _step(self) -> list[Output]:
        scheduled, began = self.scheduler.plan(), time.thread_time()
        if not scheduled:
            return []
        chunks = []
        for item in scheduled:
            sequence, start = item.sequence, item.sequence.computed
            logits = "all" if not item.reads_prompt or sequence.unscored else "last" if item.completes else "none"
            chunks.append(SequenceChunk(sequence.tables, start, sequence.tokens[start:start + item.count], logits))
        drafting = [i for i, item in enumerate(scheduled) if item.drafts]
        if drafting and self.drafter.one_call and all(likeliest(scheduled[i].sequence.params) for i in drafting):
            buffers, proposals = self._round(scheduled, chunks, drafting)
            verified = verify_likeliest(buffers["best"], scheduled, chunks, proposals)
        elif self.backend.capabilities.verifies_on_device:
            from runtime_ref.engine.accept_on_device import run_on_device

            requests = dict(zip(drafting, self._requests([scheduled[i] for i in drafting]), strict=True))
            buffers, proposals, verified = run_on_device(self.backend, self.program, self.drafter, scheduled, chunks, requests)
        else:
            proposals = self._draft([scheduled[i] for i in drafting])
            for i in drafting:
                chunks[i].tokens += proposals[scheduled[i].sequence.id].tokens
            buffers = self.backend.run(self.program, self.backend.plan(chunks))
            verified = verify_likeliest(buffers["best"], scheduled, chunks, proposals) if "best" in buffers else {}
        self._counts["steps"] += 1
        outputs, row = [], 0
        for item, chunk in zip(scheduled, chunks, strict=True):
            own = slice(row, row := row + logit_rows(chunk))
            output = self._commit(item, chunk, own, buffers, proposals.get(item.sequence.id, Proposal([])),
                                  verified.get(item.sequence.id))
            if output is not None:
                outputs.append(output)
        if self.adaptive is not None and len(scheduled) == 1 and not scheduled[0].reads_prompt:
            self.adaptive.took(scheduled[0].drafts, len(chunks[0].tokens) - 1, time.thread_time() - began)
        return sorted(outputs, key=lambda o: o.id)

    def _requests(self, drafting: list[ScheduledSequence]) -> list[DraftRequest]:
        """What the drafter is asked; from then on it has seen what was pending."""
        requests = []
        for sequence, drafts in ((item.sequence, item.drafts) for item in drafting):
            requests.append(DraftRequest(sequence.tables, sequence.tokens[-1], sequence.computed, drafts,
                                         sequence.pending_hidden()))
            sequence.target_hidden, sequence.hidden_from = [], sequence.computed
        return requests

    def _round(self, scheduled: list[ScheduledSequence], chunks: list[SequenceChunk],
               drafting: list[int]) -> tuple[dict, dict[int, Proposal]]:
        """Drafts and the step in one call: its buffers, and the proposals by sequence."""
        cuts = []
        for i in drafting:
            sequence, chunk = scheduled[i].sequence, chunks[i]
            cuts.append(None if sequence.length is None else self.adaptive.cut(sequence.params, sequence.length))
            chunk.tokens += [0] * scheduled[i].drafts
        buffers, chances = self.backend.run_round(self.program, chunks, self.drafter, drafting,
                                                  self._requests([scheduled[i] for i in drafting]), cuts)
        return buffers, {scheduled[i].sequence.id: Proposal(chunks[i].tokens[1:], chances=found)
                         for i, found in zip(drafting, chances, strict=True)}

    def _draft(self, drafting: list[ScheduledSequence]) -> dict[int, Proposal]:
        if not drafting:
            return {}
        proposals = {}
        for item, logits in zip(drafting, self.drafter.logits(self._requests(drafting)), strict=True):
            sequence = item.sequence
            proposals[sequence.id] = propose(logits, sequence.params, sequence.computed, self.drafter.markov,
                                             sequence.tokens[-1])
        return proposals

    def _commit(self, item: ScheduledSequence, chunk: SequenceChunk, own: slice, buffers: dict, proposal: Proposal,
                verified: VerifyResult | None) -> Output | None:
        """Takes over what a step gave a sequence: the rows `own` of the logits, unless they are verified already."""
        sequence, anchor = item.sequence, chunk.start + item.count - 1
        emitted, accepted, logits = [], 0, None
        completes = item.completes or not item.reads_prompt
        if verified is not None:
            emitted, accepted = verified.tokens, verified.accepted
        elif chunk.logits != "none":
            logits = buffers["logits"][own].cpu()
            if not math.isfinite(float(logits.sum())):
                row = int((~logits.isfinite()).any(-1).nonzero()[0])
                raise FloatingPointError(f"request {sequence.id}: the logits after position {chunk.start + row} are not finite "
                                         f"(token {int((~logits[row].isfinite()).nonzero()[0])} is the first)")
            if item.reads_prompt and sequence.unscored:
                self._score(sequence, chunk.start, logits)
                logits = logits[-1:]
            if completes and sequence.left > 0:
                verified = accept(logits, proposal, sequence.params, anchor, sequence.prompt, sequence.answer,
                                  sequence.constraint)
                emitted, accepted = verified.tokens, verified.accepted
        if sequence.drafting and self.drafter.target_layers:
            rows = slice(chunk.row, chunk.row + item.count + accepted)
            if self._layers_ascend and "target_hidden" in buffers:
                target_hidden = buffers["target_hidden"][rows]
            else:
                target_hidden = torch.cat([buffers[f"target_hidden.{i}"][rows] for i in self.drafter.target_layers], dim=-1)
            sequence.add_hidden(target_hidden, chunk.start)
        sequence.computed += item.count + accepted
        if item.reads_prompt:
            self._counts["prompt_tokens"] += item.count
        if item.drafts:
            self._count_round(sequence, item.drafts, proposal, accepted)
        elif sequence.length is not None and not item.reads_prompt:
            sequence.length.update(0, 0)
        output = self._emit(sequence, emitted, logits)
        if completes and sequence.params.max_tokens == 0:
            output, sequence.finish = Output(sequence.id, [], Finish.LENGTH, ""), Finish.LENGTH
        if output is not None:
            output.prompt_logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, []
            output.drafted, output.accepted = len(proposal.tokens), accepted
        if sequence.finish is None:
            self._housekeep(sequence, item.reads_prompt)
        else:
            self._finish(sequence)
        return output

    def _score(self, sequence: Sequence, start: int, logits: torch.Tensor) -> None:
        """Log-probabilities of the prompt's tokens after `start`, from its rows of logits [n, V]; some may
        be known from before a preemption."""
        known = sequence.scored + 1  # position of the next token whose log-probability is wanted
        end = min(start + len(logits) + 1, len(sequence.prompt))
        if known >= end:
            return
        rows = logits[known - 1 - start:end - 1 - start]
        found = logprobs_of(rows, sequence.prompt[known:end], sequence.params.prompt_logprobs)
        sequence.prompt_logprobs += found
        sequence.scored += len(found)

    def _count_round(self, sequence: Sequence, asked: int, proposal: Proposal, accepted: int) -> None:
        drafted = len(proposal.tokens)
        sequence.drafted, sequence.accepted = sequence.drafted + drafted, sequence.accepted + accepted
        sequence.rounds += 1
        for key, n in (("rounds", 1), ("drafted", drafted), ("accepted", accepted)):
            self._counts[key] += n
        for i in range(accepted):
            self._per_position[i] += 1
        if sequence.length is not None:
            self.adaptive.learn(sequence.params, sequence.length, asked, proposal, accepted)
            if sequence.length.disabled:
                sequence.drafting, sequence.length, sequence.target_hidden = False, None, []

    def _emit(self, sequence: Sequence, emitted: list[int], logits: torch.Tensor | None) -> Output | None:
        """Takes over tokens until one of them ends the answer; `logits` are needed where log-probabilities are wanted."""
        if not emitted:
            return None
        params, stream = sequence.params, self._streams.get(sequence.id)
        output = Output(sequence.id, [])
        for i, token in enumerate(emitted):
            sequence.tokens.append(token)
            output.tokens.append(token)
            if params.logprobs is not None:
                output.logprobs.append(logprob_of(logits[i], token, params.logprobs))
            ended = token in params.stop_ids or (token in self.end_ids and not params.ignore_eos)
            piece = stream.push(token) if stream is not None and not ended else ""
            output.pieces.append(piece)
            if ended or stream is not None and stream.stopped:
                output.finish = Finish.STOP
            elif sequence.left <= 0:
                output.finish = Finish.LENGTH
            elif sequence.constraint is not None and sequence.constraint.ended and i == len(emitted) - 1:
                output.finish = Finish.ERROR if sequence.constraint.error else Finish.STOP
            if output.finish is not None:
                break
        if output.finish is not None and stream is not None:
            output.pieces[-1] += stream.finish()
        if stream is not None:
            output.text = "".join(output.pieces)
        sequence.finish = output.finish
        self._counts["tokens"] += len(output.tokens)
        return output

    def _housekeep(self, sequence: Sequence, reads_prompt: bool) -> None:
        """Features of prompts go to the drafter at once; full pages become known; pages behind windows go back."""
        if reads_prompt and sequence.target_hidden and KIND in self.cache.pools:
            self.drafter.extend_tables(sequence.pending_hidden(), sequence.hidden_from, sequence.tables[KIND])
            sequence.target_hidden, sequence.hidden_from = [], sequence.computed
        kinds = self.scheduler.kinds(sequence)
        for logical in sequence.full_pages(KIND in kinds):
            self.cache.cache_page(sequence.tables, sequence.hashes, logical, kinds)
            sequence.remembered = logical + 1
        lengths = {kind: sequence.computed for kind in kinds if kind != KIND}
        if KIND in kinds:
            lengths[KIND] = sequence.seen_by_drafter
        self.cache.evict_outside_window(sequence.tables, lengths)

    def _finish(self, sequence: Sequence) -> None:
        self._sequences.pop(sequence.id)
        self._streams.pop(sequence.id, None)
        self.scheduler.remove(sequence)
        self._counts["finished"] += 1
        self._counts["cached_tokens"] += sequence.cached

    def stats(self) -> dict:
        """Counters since the start, queue lengths, pages in use; acceptance_length counts the bonus token."""
        rounds = self._counts["rounds"]
        return self._counts | {
            "waiting": len(self.scheduler.waiting), "running": len(self.scheduler.running),
            "preemptions": self.scheduler.preemptions, "pages": self.cache.used(), "prefix_hits": self.cache.prefix_hits,
            "accepted_per_position": list(self._per_position), "launch": dict(self.launch.chosen),
            "acceptance_length": 1 + self._counts["accepted"] / rounds if rounds else None}

    def generate(self, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]) -> list[list[int]]:
        """Answers to all prompts, decoded side by side, in their order."""
        params = params if isinstance(params, list) else [params] * len(prompts)
        ids = [self.add(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
        answers: dict[int, list[int]] = {i: [] for i in ids}
        while any(i in self._sequences for i in ids):
            for output in self.step():
                if output.id in answers:
                    answers[output.id] += output.tokens
        return [answers[i] for i in ids]


