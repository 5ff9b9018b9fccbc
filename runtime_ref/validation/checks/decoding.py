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
from runtime_ref.engine.sampler import distribution
from runtime_ref.engine.speculative import accept, propose
from runtime_ref.validation.result import Check

RANDOM = "random tokens"
SAMPLES = 2000
LEAST_ENTROPY = 1.5  # nats
# Standard normal quantile of one false alarm in 100,000 for the chi-square statistic (Wilson-Hilferty).
CHI_SQUARE_Z = 4.3
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


def check_text(engine: Engine, prompts: Prompts, trained: dict | None) -> Check:
    """Does the model know the text of its own tokenizer? One that was trained beats a uniform guess on any text.

    Only for prompts of a file: random tokens are no text. Without values of a trainer it may be a model of random weights, and
    the finding is a note.
    """
    check = Check("text", "the model expects the text that its tokenizer makes")
    if list(prompts.by_domain) == [RANDOM]:
        return check.skip("no prompts were given (--prompts FILE)")
    uniform, rows = math.log(engine.backend.config.vocab_size), [["domain", "nats per token", "uniform guess"]]
    for domain, group in prompts.by_domain.items():
        losses = [_nats(engine, prompt) for prompt in group[:4] if len(prompt) > 1]
        if losses:
            rows.append([domain, sum(losses) / len(losses), uniform])
    check.tables["negative log-likelihood of the prompts"] = rows
    worse = [row[0] for row in rows[1:] if row[1] > uniform]
    if len(rows) > 1 and len(worse) == len(rows) - 1:
        finding = f"the model finds the prompts less likely than a uniform guess ({rows[1][1]:.2f} nats, {uniform:.2f})"
        if trained is None:
            check.notes.append(f"{finding}: a model of random weights, or another tokenizer's")
        else:
            check.fail(finding, "the tokenizer is not this model's: its tokens have other ids")
    return check


def _nats(engine: Engine, prompt: list[int]) -> float:
    """Mean negative log-likelihood of a prompt's tokens after the first."""
    cache = engine.cache
    tables, kinds = cache.tables(), [k for k in cache.pools if k != "draft"]
    cache.extend(tables, kinds, len(prompt))
    logits = engine.backend.run(engine.program, engine.backend.plan([SequenceChunk(tables, 0, prompt, "all")]))["logits"]
    cache.release(tables)
    return float(torch.nn.functional.cross_entropy(logits[:len(prompt) - 1].float(), torch.tensor(prompt[1:])))


def check_lossless(engine: Engine, prompts: Prompts, tokens: int) -> tuple[Check, list[list[int]]]:
    """Check 4; also the greedy answers."""
    check = Check("lossless", "greedy with the drafter = without, alone = batched, token for token")
    greedy = SamplingParams(max_tokens=tokens)
    plain = SamplingParams(max_tokens=tokens, speculate=False)
    alone = [engine.generate([p], plain)[0] for p in prompts.all]
    ways = {"batched": engine.generate(prompts.all, plain)}
    if engine.drafter is not None:
        ways |= {"with drafts": [engine.generate([p], greedy)[0] for p in prompts.all],
                 "with drafts, batched": engine.generate(prompts.all, greedy)}
    rows = [["way", "equal answers", "of"]]
    for way, answers in ways.items():
        same = sum(a == b for a, b in zip(answers, alone, strict=True))
        rows.append([way, same, len(alone)])
        if same != len(alone):
            first = next(i for i, (a, b) in enumerate(zip(answers, alone, strict=True)) if a != b)
            check.fail(f"{way}: {same} of {len(alone)} answers equal, the first that is not is prompt {first}",
                       "an op of the backend is not row-invariant, or rejected tokens are not rolled back")
    check.tables["greedy answers"] = rows
    check.numbers = {"prompts": len(alone), "tokens": sum(map(len, alone))}
    if prompts.shortened:
        check.notes.append(f"{prompts.shortened} prompts were cut to what the engine's context holds here")
    return check, alone


def check_sampler(engine: Engine, prompts: Prompts) -> Check:
    """Check 5: chi-square of one emitted token against the target's distribution, both rules, on real logits."""
    check = Check("sampling", "sampled tokens with the drafter have the target's distribution (chi-square)")
    # The widest distribution of some prompts, flattened if need be: one that is certain of its token would pass any sampler.
    candidates = [_last_logits(engine, prompt).float() for prompt in prompts.all[:16]]
    logits, flattened = max(candidates, key=_entropy), 1.0
    while _entropy(logits) < LEAST_ENTROPY and flattened < 1e6:
        logits, flattened = logits / 1.25, flattened * 1.25
    check.numbers |= {"entropy of the distribution (nats)": _entropy(logits), "logits divided by": flattened}
    generator = torch.Generator().manual_seed(5)
    drafts = logits + torch.randn(logits.shape, generator=generator)  # a drafter that is near, but not equal
    rows = [["rule", "temperature", "chi-square z", "accepted"]]
    for rule in ("equality", "rejection"):
        for temperature in (1.0, 0.7):
            counts, accepted = torch.zeros(logits.shape[-1], dtype=torch.float64), 0
            for seed in range(SAMPLES):
                params = SamplingParams(temperature=temperature, rule=rule, seed=seed)
                verdict = accept(torch.stack((logits, logits)), propose(drafts[None], params, 10), params, 10, [], [])
                counts[verdict.tokens[0]] += 1
                accepted += verdict.accepted
            z = chi_square_z(counts, distribution(logits, SamplingParams(temperature=temperature)))
            rows.append([rule, temperature, z, accepted / SAMPLES])
            if z > CHI_SQUARE_Z:
                check.fail(f"{rule} at temperature {temperature}: chi-square z {z:.1f}, expected at most {CHI_SQUARE_Z}",
                           f"the acceptance rule {rule} changes the distribution")
    check.tables[f"{SAMPLES} samples each"] = rows
    return check


def _entropy(logits: torch.Tensor) -> float:
    return float(torch.distributions.Categorical(logits=logits).entropy())


def chi_square_z(counts: torch.Tensor, p: torch.Tensor) -> float:
    """Chi-square of counts against p as a standard normal deviate; tokens expected less than five times form one class."""
    n = float(counts.sum())
    order = p.argsort(descending=True)
    expected, observed = p[order] * n, counts[order]
    common = int((expected >= 5).sum())
    expected = torch.cat((expected[:common], expected[common:].sum()[None]))
    observed = torch.cat((observed[:common], observed[common:].sum()[None]))
    if float(expected[-1]) < 1:  # too thin a class: join it to the last common one
        expected, observed = (torch.cat((t[:-2], t[-2:].sum()[None])) for t in (expected, observed))
    freedom = max(1, expected.shape[0] - 1)
    statistic = float(((observed - expected) ** 2 / expected.clamp_min(1e-12)).sum())
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5


def _last_logits(engine: Engine, prompt: list[int]) -> torch.Tensor:
    cache = engine.cache
    tables, kinds = cache.tables(), [k for k in cache.pools if k != "draft"]
    cache.extend(tables, kinds, len(prompt))
    buffers = engine.backend.run(engine.program, engine.backend.plan([SequenceChunk(tables, 0, prompt, "last")]))
    cache.release(tables)
    return buffers["logits"][0]


def check_acceptance(engine: Engine, prompts: Prompts, tokens: int, trained: dict | None) -> Check:
    """Check 6: acceptance length and by position, by domain, against what training measured.

    Counted as in training: tokens after the first of each answer, by rounds of drafting. With the prompts and the answer
    length of training (dflash.acceptance in the recipe) the two agree within one percent (contract C7).
    """
    check = Check("acceptance", "acceptance length by domain")
    if engine.drafter is None:
        return check.not_applicable("the folder has no drafter")
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
                       "the drafter is fed something else than in training (taps, positions, mask embedding, causality)")
    check.tables["acceptance length (1 to block size, bonus token included)"] = rows
    if positions:
        check.tables["% of rounds that accept the draft at position 1, 2, ..."] = [
            ["domain", *range(1, len(positions[0]))], *positions]
    if len(rows) > 1 and all(row[1] < CHANCE for row in rows[1:]) and check.status == "passed":
        check.notes.append(f"drafts are hardly ever right (acceptance below {CHANCE}): {OTHER_TARGET_CAUSE}, or is not trained")
    if trained is None:
        check.reason = "no values of the trainer to compare with (--trained SUMMARY.json)"
    return check


def standard_error(reached: list[float], rounds: int) -> float:
    """Of the mean number of accepted drafts, from the shares of rounds that accept at least 1, 2, ... (rounds taken as
    independent)."""
    mean = sum(reached)
    square = sum((2 * i - 1) * share for i, share in enumerate(reached, 1))
    return max(0.0, square - mean * mean) ** 0.5 / rounds**0.5


def check_cost(engine: Engine, answers: list[list[int]], prompts: Prompts, acceptance: float | None) -> Check:
    """Check 7: experts that eight neighbouring tokens touch, bytes and time of a step, and what that means elsewhere."""
    check = Check("cost", "experts touched, bytes and time of a step, against the memory bound")
    text = max((p + a for p, a in zip(prompts.all, answers, strict=True)), key=len)
    text = (text * (1 + 64 // len(text)))[:min(200, engine.options.max_context - 16)]
    touched, seconds, plain_seconds = _measure_steps(engine, text)
    layers = [i for i, layer in enumerate(engine.backend.weights.layers) if isinstance(layer.mlp, Moe)]
    if layers:
        check.tables["distinct experts per layer for 8 tokens"] = [
            ["layer", "mean", "of"], *([i, sum(touched[i]) / len(touched[i]), engine.backend.config.n_routed_experts]
                                      for i in layers)]
    moved = _step_bytes(engine, touched, layers)
    rate = _read_bandwidth()
    bound = moved["held"] / rate
    check.numbers |= {"bytes of a step, as stored": moved["stored"],
                      "bytes of a step, as this backend holds them": moved["held"],
                      "memory bandwidth of this machine (bytes/s)": rate, "memory bound of a step (ms)": bound * 1e3,
                      "measured step of 8 tokens (ms)": seconds * 1e3, "measured step of 1 token (ms)": plain_seconds * 1e3,
                      "share of the bound": bound / seconds}
    reads = 2 * engine.backend.config.num_hidden_layers
    step = (moved["stored"] / NODE["GPUs"] / NODE["bytes per second of one GPU"] /
            NODE["share of it that a good kernel reaches"] + reads * NODE["all-reduce seconds"])
    length = acceptance or 1.0
    check.numbers |= {"projected step (ms)": step * 1e3,
                      "bytes/s of 8 x H200": NODE["GPUs"] * NODE["bytes per second of one GPU"],
                      "projected tokens/s of 8 x H200": length / step, "formula": "acceptance length / (stored bytes / 8 / "
                      "(4.8e12 x 0.7) + 2 x layers x 5e-6 s); modelled, not measured", "acceptance length used": length}
    return check


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
