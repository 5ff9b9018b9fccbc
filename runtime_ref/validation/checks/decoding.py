"""Checks 4 to 7: decoding as a user sees it. Losslessness, sampling, acceptance, and what a step costs."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from pathlib import Path

import torch

from modeling.prompt_files import prompt_ids, read_rows
from runtime_ref.checkpoints.host_weights import Moe
from runtime_ref.core.batch import SequenceChunk
from runtime_ref.core.program import Op
from runtime_ref.core.sampling_params import SamplingParams
from runtime_ref.engine.engine import Engine
from runtime_ref.validation.quantities import Number, Table
from runtime_ref.validation.result import Check
from storage.terminal import counted

RANDOM = "random tokens"
# Fewer tokens of text than this decide nothing about a tokenizer.
LEAST_TEXT = 64
# Acceptance under this share of what training measured fails; contract C7 asks for more of equal prompts.
ACCEPTANCE_SHARE = 0.8
# An acceptance length that drafts of another model's drafter reach by chance.
CHANCE = 1.15
OTHER_TARGET_CAUSE = "the drafter was trained for another target, or for the target before quantization"
NODE = {"GPUs": 8, "bytes per second of one GPU": 4.8e12, "share of it that a good kernel reaches": 0.7,
        "all-reduce seconds": 5e-6}


class Prompts:
    """Prompts by domain: token ids. From a JSONL file (fields prompt or messages, domain), or random tokens."""

    def __init__(self, by_domain: dict[str, list[list[int]]], shortened: int = 0):
        self.by_domain, self.shortened = by_domain, shortened

    @property
    def all(self) -> list[list[int]]:
        return [p for prompts in self.by_domain.values() for p in prompts]


def read_prompts(path: Path | None, tokenizer, vocabulary: int, *, per_domain: int, longest: int) -> Prompts:
    """At most `per_domain` prompts of each domain.

    Raises:
        ValueError: no such file, a line that is not JSON, a row without a prompt.
    """
    if path is None or tokenizer is None:
        generator = torch.Generator().manual_seed(2)
        sizes = [1, 5, 9, 30, 64, 80][:max(2, per_domain)]
        return Prompts({RANDOM: [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in sizes]})
    if not path.is_file():
        raise ValueError(f"--prompts: {path}: no such file")
    found: dict[str, list[list[int]]] = defaultdict(list)
    shortened = 0
    for where, row in read_rows(path, "--prompts"):
        group = found[str(row.get("domain", "all"))]
        if len(group) < per_domain and row.get("kind", "task") != "open":
            ids = prompt_ids(row, tokenizer, f"--prompts: {where}")
            shortened += len(ids) > longest
            group.append(ids[:longest])
    if not any(found.values()):
        raise ValueError(f"--prompts: {path}: no prompts, expected lines with prompt or messages (kind 'open' is left out)")
    return Prompts({domain: prompts for domain, prompts in found.items() if prompts}, shortened)


def check_text(check: Check, engine: Engine, prompts: Prompts, trained: dict | None) -> None:
    """Does the model know the text of its own tokenizer? One that was trained beats a uniform guess on any text.

    Only for prompts of a file: random tokens are no text. A few tokens decide nothing, and without values of a trainer it may
    be a model of random weights: then the finding is a note.
    """
    if list(prompts.by_domain) == [RANDOM]:
        check.leave_out("no prompts were given (--prompts FILE)")
        return
    uniform, rows = math.log(engine.backend.config.vocab_size), [["domain", "nats per token", "uniform guess", "tokens"]]
    for domain, group in prompts.by_domain.items():
        losses = [loss for prompt in group[:4] if len(prompt) > 1 for loss in _nats(engine, prompt).tolist()]
        if losses:
            rows.append([domain, sum(losses) / len(losses), uniform, len(losses)])
    check.tables[Table.LIKELIHOOD] = rows
    count = sum(row[3] for row in rows[1:])
    if not count or not all(row[1] > uniform for row in rows[1:]):
        return
    finding = f"the model finds the prompts less likely than a uniform guess ({rows[1][1]:.2f} nats, {uniform:.2f})"
    if count < LEAST_TEXT:
        check.unchecked.append(f"{finding}, but {counted(count, 'token')} can decide nothing: give at least {LEAST_TEXT}")
    elif trained is None:
        check.notes.append(f"{finding}: a model of random weights, or another tokenizer's")
    else:
        check.fail(finding, "the tokenizer is not this model's: its tokens have other ids")


def _nats(engine: Engine, prompt: list[int]) -> torch.Tensor:
    """Negative log-likelihoods [n - 1] of a prompt's tokens after the first."""
    logits = prompt_logits(engine, prompt)[:-1]
    return torch.nn.functional.cross_entropy(logits.float(), torch.tensor(prompt[1:]), reduction="none")


def prompt_logits(engine: Engine, prompt: list[int]) -> torch.Tensor:
    """The target's logits [n, vocabulary] over a prompt, in one step on fresh pages."""
    cache = engine.cache
    tables, kinds = cache.tables(), [k for k in cache.pools if k != "draft"]
    cache.extend(tables, kinds, len(prompt))
    buffers = engine.backend.run(engine.program, engine.backend.plan([SequenceChunk(tables, 0, prompt, "all")]))
    cache.release(tables)
    return buffers["logits"][:len(prompt)]


def check_lossless(check: Check, engine: Engine, prompts: Prompts, tokens: int) -> list[list[int]]:
    """Check 4; returns the greedy answers."""
    greedy = SamplingParams(max_tokens=tokens)
    plain = SamplingParams(max_tokens=tokens, speculate=False)
    alone, seconds = _timed(engine, prompts, plain)
    ways = {"batched": engine.generate(prompts.all, plain)}
    if engine.drafter is not None:
        drafted, drafted_seconds = _timed(engine, prompts, greedy)
        ways |= {"with drafts": drafted, "with drafts, batched": engine.generate(prompts.all, greedy)}
        check.measure(Number.SPEED_DRAFTS, sum(map(len, drafted)) / drafted_seconds)
    rows = [["way", "equal answers", "of"]]
    for way, answers in ways.items():
        same = sum(a == b for a, b in zip(answers, alone, strict=True))
        rows.append([way, same, len(alone)])
        if same != len(alone):
            first = next(i for i, (a, b) in enumerate(zip(answers, alone, strict=True)) if a != b)
            check.fail(f"{way}: {same} of {len(alone)} answers equal, the first that is not is prompt {first}",
                       "an op of the backend is not row-invariant, or rejected tokens are not rolled back")
    check.tables[Table.GREEDY] = rows
    check.measure(Number.PROMPTS, len(alone))
    check.measure(Number.TOKENS, sum(map(len, alone)))
    check.measure(Number.SPEED_PLAIN, sum(map(len, alone)) / seconds)
    if prompts.shortened:
        check.notes.append(f"{counted(prompts.shortened, 'prompt')} cut to what the engine's context holds here")
    return alone


def _timed(engine: Engine, prompts: Prompts, params: SamplingParams) -> tuple[list[list[int]], float]:
    """Answers to the prompts one by one, and the seconds of all of them."""
    began = time.perf_counter()
    answers = [engine.generate([p], params)[0] for p in prompts.all]
    return answers, time.perf_counter() - began


def check_acceptance(check: Check, engine: Engine, prompts: Prompts, tokens: int, trained: dict | None) -> float | None:
    """Check 6: acceptance length and by position, by domain, against what training measured; returns the mean of the domains.

    Counted as in training: tokens after the first of each answer, by rounds of drafting. With the prompts and the answer
    length of training (dflash.acceptance in the recipe) the two agree within one percent (contract C7).
    """
    if engine.drafter is None:
        check.not_applicable("the folder has no drafter")
        return None
    tokens = min(tokens, engine.options.max_context // 2)
    rows, positions = [["domain", "acceptance length", "standard error", "trained", "share", "rounds"]], []
    for domain, group in prompts.by_domain.items():
        before = engine.stats()
        answers = engine.generate(group, SamplingParams(max_tokens=tokens))
        after = engine.stats()
        rounds = after["rounds"] - before["rounds"]
        if not rounds:
            continue
        length = sum(len(answer) - 1 for answer in answers) / rounds
        counts = zip(before["accepted_per_position"], after["accepted_per_position"], strict=True)
        reached = [(b - a) / rounds for a, b in counts]
        stored = ((trained or {}).get(domain) or {}).get("task_t0")
        error = standard_error(reached, rounds)
        rows.append([domain, length, error, stored if stored is not None else "-", length / stored if stored else "-", rounds])
        positions.append([domain, *reached])
        if stored and length + 2 * error < ACCEPTANCE_SHARE * stored:  # few prompts may be hard ones
            check.fail(f"{domain}: acceptance length {length:.2f} (standard error {error:.2f}), training measured {stored:.2f}",
                       OTHER_TARGET_CAUSE if length < CHANCE else
                       "the drafter is fed something else than in training (features, positions, mask embedding, causality)")
    check.tables[Table.ACCEPTANCE] = rows
    if positions:
        check.tables[Table.POSITIONS] = [["domain", *range(1, len(positions[0]))], *positions]
    if len(rows) > 1 and all(row[1] < CHANCE for row in rows[1:]) and check.status == "passed":
        check.notes.append(f"drafts are hardly ever right (acceptance below {CHANCE}): {OTHER_TARGET_CAUSE}, or is not trained")
    if trained is None:
        check.unchecked.append("whether it is the acceptance of training: the folder does not say (--trained SUMMARY.json)")
    if len(rows) == 1:
        return None
    mean = sum(row[1] for row in rows[1:]) / (len(rows) - 1)
    check.measure(Number.ACCEPTANCE, mean)
    return mean


def standard_error(reached: list[float], rounds: int) -> float:
    """Of the mean number of accepted drafts, from the shares of rounds that accept at least 1, 2, ... (rounds taken as
    independent)."""
    mean = sum(reached)
    square = sum((2 * i - 1) * share for i, share in enumerate(reached, 1))
    return max(0.0, square - mean * mean) ** 0.5 / rounds**0.5


def check_cost(check: Check, engine: Engine, answers: list[list[int]], prompts: Prompts, acceptance: float | None,
               speeds: dict[Number, float], node_hour: float | None) -> None:
    """Check 7: experts that eight neighbouring tokens touch, bytes and time of a step, and what that means elsewhere.

    Args:
        speeds: tokens/s measured with and without drafts. node_hour: price of an hour of the node, for prices of tokens.
    """
    text = max((p + a for p, a in zip(prompts.all, answers, strict=True)), key=len)
    text = (text * (1 + 64 // len(text)))[:min(200, engine.options.max_context - 16)]
    touched, seconds, plain_seconds = _measure_steps(engine, text)
    layers = [i for i, layer in enumerate(engine.backend.weights.layers) if isinstance(layer.mlp, Moe)]
    if layers:
        check.tables[Table.EXPERTS] = [
            ["layer", "mean", "of"], *([i, sum(touched[i]) / len(touched[i]), engine.backend.config.n_routed_experts]
                                      for i in layers)]
    moved = _step_bytes(engine, touched, layers)
    rate = _read_bandwidth()
    bound = moved["held"] / rate
    reads = 2 * engine.backend.config.num_hidden_layers
    step = (moved["stored"] / NODE["GPUs"] / NODE["bytes per second of one GPU"] /
            NODE["share of it that a good kernel reaches"] + reads * NODE["all-reduce seconds"])
    length = acceptance or 1.0
    check.numbers |= {
        Number.STEP_STORED: moved["stored"], Number.STEP_HELD: moved["held"], Number.BANDWIDTH: rate,
        Number.STEP_BOUND: bound * 1e3, Number.STEP_8: seconds * 1e3, Number.STEP_1: plain_seconds * 1e3,
        Number.BOUND_SHARE: bound / seconds, **speeds, Number.PROJECTED_STEP: step * 1e3,
        Number.NODE_BANDWIDTH: NODE["GPUs"] * NODE["bytes per second of one GPU"], Number.PROJECTED_SPEED: length / step,
        Number.FORMULA: "acceptance length / (stored bytes / 8 / (4.8e12 x 0.7) + 2 x layers x 5e-6 s); modelled, not measured",
        Number.LENGTH_USED: length}
    if node_hour is not None:
        check.numbers |= prices(speeds, node_hour) | {Number.PROJECTED_PRICE: price(length / step, node_hour)}


def price(tokens_per_second: float, node_hour: float) -> float:
    """Price of a million tokens on a node of this price per hour that gives so many tokens per second."""
    return node_hour / 3600 / tokens_per_second * 1e6


def prices(speeds: dict[Number, float], node_hour: float) -> dict[Number, float]:
    pairs = {Number.SPEED_DRAFTS: Number.PRICE_DRAFTS, Number.SPEED_PLAIN: Number.PRICE_PLAIN,
             Number.SPEED_SERVED: Number.PRICE_SERVED, Number.SPEED_EIGHT: Number.PRICE_EIGHT}
    return {pairs[key]: price(value, node_hour) for key, value in speeds.items() if value}


def _measure_steps(engine: Engine, text: list[int]) -> tuple[dict[int, list[int]], float, float]:
    """Distinct experts by layer over windows of eight tokens; median seconds of a step of eight tokens and of one."""
    backend, cache = engine.backend, engine.cache
    tables, kinds = cache.tables(), [k for k in cache.pools if k != "draft"]
    touched: dict[int, list[int]] = defaultdict(list)

    def watch(op: Op, buffers: dict):
        if op.name == "route":
            touched[op.layer].append(len(set(buffers["index"][:8].flatten().tolist())))

    times: dict[int, list[float]] = {8: [], 1: []}
    cache.extend(tables, kinds, len(text))
    for start in range(0, len(text) - 8, 8):
        for count in (1, 8):
            step = backend.plan([SequenceChunk(tables, start, text[start:start + count])])
            began = time.perf_counter()
            backend.run(engine.program, step)
            times[count].append(time.perf_counter() - began)
        backend.run(engine.program, step, watch)
    cache.release(tables)
    return dict(touched), *(sorted(times[n])[len(times[n]) // 2] for n in (8, 1))


def _step_bytes(engine: Engine, touched: dict[int, list[int]], layers: list[int]) -> dict[str, float]:
    """Weights that a step of eight tokens reads: as stored in the file, and as this backend holds them on one rank."""
    weights, config = engine.backend.weights, engine.backend.config
    ranks = weights.ranks.count
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    mean = {i: sum(touched[i]) / len(touched[i]) for i in layers}
    experts = sum(mean.values())
    dense = sum(t.numel() for layer in weights.layers for t in (layer.attention.qk, layer.attention.v, layer.attention.o))
    dense += sum(t.numel() for layer in weights.layers if not isinstance(layer.mlp, Moe)
                 for t in (layer.mlp.gate_up, layer.mlp.down)) + weights.head.numel()
    packed = engine.backend.capabilities.packed_weights
    held = experts * expert * 4.25 / 8 / ranks + dense * 2 if packed else experts * expert * 4 / ranks + dense * 4
    return {"stored": experts * expert * 4.25 / 8 + dense * ranks * 2, "held": held}


def _read_bandwidth() -> float:
    """Bytes per second of reading a tensor that no cache holds."""
    block = torch.ones(1 << 26)  # 256 MiB
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        block.sum()
        best = min(best, time.perf_counter() - began)
    return block.numel() * 4 / best
