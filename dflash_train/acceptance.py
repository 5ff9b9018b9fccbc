"""Acceptance length: how many tokens one pass of the target yields, the bonus token included (1..B).

Measured on held-out prompts without decoding speculatively. Speculative decoding does not change what the target says,
so let the target answer alone, then ask at every position of the answer what the drafter would have proposed:

- given the final text x, a drafted token is accepted with probability beta = min(1, q(x) / p(x)), independently of the
  others (rejection sampling emits a rejected position's token from max(p - q, 0), so that P(accepted | x) =
  min(p, q)(x) / p(x)); at temperature 0 that is 1 where the drafter's arg-max is the text's token, else 0;
- hence the expected number of rounds R from an anchor follows from the ones after it: R(a) = 1 + sum_n P(n accepted)
  R(a + n + 1), and the acceptance length of a text is its tokens / R(first). At T = 0 this *is* the loop's count; at
  T > 0 its expectation over the accept decisions, with no sampling noise but that of the text.

The usual formula 1 + sum_k prod_{j<=k} (sum min(p, q))_j, averaged over all positions, is reported too (`..._formula`);
it differs because rounds do not begin at all positions alike.

Prompt lookup (the most recent earlier occurrence of the last 3, 2 or 1 tokens, its continuation proposed) goes through
the same rule. So does whatever else proposes one token per position.

Greedy text of a small model loops and flatters everybody: `distinct_8gram` says how much.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from dflash_train.dialogues import read_jsonl, row_prompt
from dflash_train.features import run_dialogues
from dflash_train.reference_decoding import (
    best_path,
    by_length,
    generate,
    in_batches,
    in_token_batches,
    plain,
    probabilities,
    speculate,
)
from dflash_train.target import Target, TargetFiles
from modeling.dialogue_tokens import Rendering
from modeling.drafter import DFlashDraftModel
from recipes.schema import Recipe
from training.intervals import ratio_interval

TEXT_BATCH, TEXT_TOKENS = 64, 16384  # texts judged side by side, and their tokens, padded to the longest
ANCHOR_CHUNK = 512  # anchors whose [B - 1, V] logits are held at once
LOOKUP_GRAMS = (3, 2, 1)


@dataclass
class Text:
    """A prompt and the target's answer to it."""

    prompt: list[int]
    answer: list[int]
    beta: list[list[float]] = field(default_factory=list)  # of each anchor answer[0..-2]: P(accepted | text) per position
    overlap: list[list[float]] = field(default_factory=list)  # sum min(p, q) of the same


def expected_rounds(beta: list[list[float]], tokens: int) -> float:
    """Rounds expected until `tokens` more tokens follow the first anchor.

    Args:
        beta: for each anchor, the acceptance probabilities of its drafts given the text (up to B - 1; those past the end of
            the text are not looked at).
    """
    rounds = [0.0] * (tokens + 1)
    for anchor in range(tokens - 1, -1, -1):
        reach, total = 1.0, 1.0
        left = tokens - anchor
        drafts = beta[anchor][:left]
        for n, accept in enumerate(drafts):
            total += reach * (1 - accept) * rounds[min(anchor + n + 1, tokens)]
            reach *= accept
        total += reach * rounds[min(anchor + len(drafts) + 1, tokens)]
        rounds[anchor] = total
    return rounds[0]


def lookup_beta(prompt: list[int], answer: list[int], drafts: int) -> list[list[float]]:
    """Acceptance of prompt lookup at each anchor of an answer: 1.0 per draft that is the text's token, then 0.0."""
    text = prompt + answer
    latest: dict[tuple, int] = {}  # n-gram -> end of its most recent occurrence before the anchor
    found = []
    seen = 0
    for anchor in range(len(prompt), len(text) - 1):
        while seen < anchor:  # occurrences that end before the anchor
            seen += 1
            for n in LOOKUP_GRAMS:
                if seen >= n:
                    latest[tuple(text[seen - n:seen])] = seen
        match = next((latest[key] for n in LOOKUP_GRAMS
                      if (key := tuple(text[anchor + 1 - n:anchor + 1])) in latest and anchor + 1 >= n), None)
        proposal = [] if match is None else text[match:anchor + 1][:drafts]
        found.append([float(i < len(proposal) and anchor + 1 + i < len(text) and proposal[i] == text[anchor + 1 + i])
                      for i in range(drafts)])
    return found


@torch.no_grad()
def judge(target: Target, drafter: DFlashDraftModel, texts: list[Text], temperature: float, seen: dict | None = None) -> None:
    """Fills `beta` and `overlap` of every text: all anchors of a batch of answers in one pass of target and drafter.

    seen: what the target computed of these texts, by batch: filled, and used by a further drafter's call.
    """
    seen = {} if seen is None else seen
    order = [i for i in by_length(texts, lambda t: len(t.prompt) + len(t.answer)) if len(texts[i].answer) > 1]
    lengths = [len(t.prompt) + len(t.answer) for t in texts]
    for batch in in_token_batches(order, lengths, TEXT_BATCH, TEXT_TOKENS):
        chosen = [texts[i] for i in batch]
        target_hidden, last = found = seen.get(tuple(batch)) or run_dialogues(target, [t.prompt + t.answer for t in chosen])
        seen[tuple(batch)] = found
        B, S = target_hidden.shape[:2]
        count = max(len(t.answer) - 1 for t in chosen)
        anchors = torch.full((B, count), -1)
        ids = torch.zeros(B, count, dtype=torch.long)
        for b, text in enumerate(chosen):
            n = len(text.answer) - 1
            anchors[b, count - n:] = torch.arange(len(text.prompt), len(text.prompt) + n)
            ids[b, count - n:] = torch.tensor(text.answer[:n])
        device = target.device
        starts = torch.zeros(B, S, dtype=torch.long, device=device)
        hidden = drafter(target_hidden, ids.to(device), anchors.to(device), starts, target.embed_tokens)
        hidden = hidden[:, :, 1:].contiguous()  # of a slice the head's product is one per anchor, each with a copy of the head
        for b, text in enumerate(chosen):
            n = len(text.answer) - 1
            _judge_one(target, drafter, text, hidden[b, count - n:], last[b, len(text.prompt):], temperature)


def _judge_one(target, drafter, text: Text, hidden_NTH: torch.Tensor, last_XH: torch.Tensor, temperature: float) -> None:
    """hidden: of the n anchors' masked positions; last: the target's states from the first answer token on."""
    answer = torch.tensor(text.answer, device=hidden_NTH.device)
    text.beta, text.overlap = [], []
    for begin in range(0, len(hidden_NTH), ANCHOR_CHUNK):
        hidden = hidden_NTH[begin:begin + ANCHOR_CHUNK]
        beta, overlap = _judge_anchors(target, drafter, answer, hidden, last_XH, begin, temperature)
        text.beta += beta.tolist()
        text.overlap += overlap.tolist()


def _judge_anchors(target, drafter, answer_X, hidden_CTH, last_XH, begin: int, temperature: float):
    """(acceptance, overlap) [C, T] of the anchors `begin`, `begin` + 1, ... of an answer."""
    C, drafts = hidden_CTH.shape[:2]
    n = len(answer_X) - 1
    logits = target.head(hidden_CTH.to(target.head.weight.dtype)).float()
    index = begin + torch.arange(C, device=answer_X.device)[:, None] + torch.arange(drafts, device=answer_X.device)
    inside = index < n
    index = index.clamp_max(n - 1)
    if temperature == 0 and drafter.selector_top_k:
        q = torch.nn.functional.one_hot(best_path(drafter, logits, answer_X[begin:begin + C]), logits.shape[-1]).float()
    else:
        if drafter.markov_next is not None:
            logits = logits + drafter.markov_bias(answer_X[index]).float()
        q = probabilities(logits, temperature)
    near = slice(begin, min(n, begin + C + drafts))  # what these anchors look at
    p = probabilities(target.head(last_XH[near]), temperature)
    labels, index = answer_X[1:][index][..., None], index - begin
    p_label = p.gather(-1, answer_X[1:][near][:, None])[:, 0][index]
    ratio = q.gather(-1, labels)[..., 0] / p_label.clamp_min(1e-30)
    if temperature == 0:  # the text is the target's arg-max by construction, whatever this batch's rounding says
        ratio = q.gather(-1, labels)[..., 0]
    overlap = torch.stack([torch.minimum(p[row], q[:, k]).sum(-1) for k, row in enumerate(index.T)], dim=1)
    return torch.where(inside, ratio.clamp_max(1), 0), torch.where(inside, overlap, 0)


def summarize(betas: list[list[list[float]]], counts: list[int], seed: int = 0) -> dict:
    """Acceptance length over texts with its interval; counts = tokens after the first of each text.

    `of_texts` has [tokens, rounds] of each, so that two drafters can be compared text by text.
    """
    rounds = [expected_rounds(b, n) for b, n in zip(betas, counts, strict=True)]
    texts = list(zip(counts, rounds, strict=True))
    return {"length": sum(counts) / sum(rounds), "interval": ratio_interval([texts], seed), "rounds": sum(rounds),
            "tokens": sum(counts), "texts": len(counts), "of_texts": [[n, r] for n, r in texts]}


def per_position(betas: list[list[list[float]]]) -> list[float]:
    """Mean over anchors of the probability that drafts 1..k are all accepted, k = 1..B-1."""
    reached = [_running_product(row) for beta in betas for row in beta]
    return [sum(column) / len(column) for column in zip(*reached, strict=True)]


def _running_product(row: list[float]) -> list[float]:
    out, product = [], 1.0
    for value in row:
        product *= value
        out.append(product)
    return out


def distinct_8gram(answers: list[list[int]]) -> float | None:
    """Share of different 8-grams within answers (None if none has eight tokens)."""
    grams = [tuple(a[i:i + 8]) for a in answers for i in range(len(a) - 7)]
    return len(set(grams)) / len(grams) if grams else None


def groups(recipe: Recipe, target: TargetFiles) -> dict[tuple[str, str], list[list[int]]]:
    """Prompts by (domain, "task_t0" or "open_t1"), at most `prompts_per_group` each.

    Raises:
        ValueError: no prompts; one that leaves no room for an answer in the target's positions.
    """
    settings = recipe.dflash.acceptance
    room = None if target.positions is None else target.positions - settings.max_new_tokens
    if not settings.prompts:
        raise ValueError("dflash.acceptance.prompts: required (JSONL files of held-out prompts)")
    found: dict[tuple[str, str], list[list[int]]] = defaultdict(list)
    rendering = Rendering(recipe.chat.prompts, recipe.chat.template_options)
    for row in read_jsonl(settings.prompts, "dflash.acceptance.prompts"):
        kinds = {"task": ["task_t0"], "open": ["open_t1"]}.get(row.get("kind"), ["task_t0", "open_t1"])
        for kind in kinds:
            group = found[row.get("domain", "all"), kind]
            if len(group) < settings.prompts_per_group:
                ids = row_prompt(row, settings.prompt_field, target.tokenizer, "dflash.acceptance.prompts", rendering)
                if room is not None and len(ids) > room:
                    raise ValueError(f"dflash.acceptance.prompts: {row['_where']}: {len(ids)} tokens and max_new_tokens="
                                     f"{settings.max_new_tokens} are more than the target's {target.positions} positions")
                group.append(ids)
    if not found:
        raise ValueError(f"dflash.acceptance.prompts: {', '.join(settings.prompts)}: no prompt there")
    return dict(found)


def measure(recipe: Recipe, target: Target, drafter: DFlashDraftModel, say: Callable[[str], None] = print,
            answered: dict | None = None) -> dict:
    """The acceptance tables: `acceptance`, `speedup` and `detail` by domain (see docs/results/drafter.md).

    answered: the target's answers and states, which are filled and used again by a further drafter's call with the same recipe.
    """
    settings, answered = recipe.dflash.acceptance, {} if answered is None else answered
    acceptance: dict[str, dict] = defaultdict(dict)
    speedup: dict[str, dict] = defaultdict(dict)
    detail: dict[str, dict] = defaultdict(dict)
    for (domain, kind), prompts in groups(recipe, target).items():
        began, temperature = time.monotonic(), 1.0 if kind == "open_t1" else 0.0
        if (domain, kind) not in answered:
            answered[domain, kind] = answer_all(target, prompts, settings.max_new_tokens, temperature, recipe.seed), {}
        texts, seen = answered[domain, kind]
        long = [t for t in texts if len(t.answer) > 1]
        if not long:
            say(f"{domain} {kind}: no answer of two tokens, nothing to accept")
            continue
        judge(target, drafter, long, temperature, seen)
        counts = [len(t.answer) - 1 for t in long]
        ours = summarize([t.beta for t in long], counts)
        drafts = drafter.block_size - 1
        lookup = summarize([lookup_beta(t.prompt, t.answer, drafts) for t in long], counts)
        overlaps = per_position([t.overlap for t in long])
        acceptance[domain] |= {kind: ours["length"], f"lookup_{kind}": lookup["length"],
                               f"{kind}_formula": 1 + sum(overlaps)}
        distinct = distinct_8gram([t.answer for t in texts])
        acceptance[domain]["distinct_8gram" if kind == "task_t0" else "distinct_8gram_open_t1"] = distinct
        detail[domain][kind] = {"drafter": ours, "lookup": lookup, "per_position": per_position([t.beta for t in long]),
                                "ended": sum(t.answer[-1] in target.end_ids for t in texts) / len(texts)}
        if settings.timed_prompts:
            some = long[:settings.timed_prompts]
            timed = wall_clock(target, drafter, some, settings.max_new_tokens, temperature, recipe.seed)
            speedup[domain][kind] = timed["speedup"]
            detail[domain][kind]["decoded"] = timed
        say(f"{domain} {kind}: acceptance {ours['length']:.2f}, lookup {lookup['length']:.2f}"
            + (f", {speedup[domain][kind]:.2f}x" if settings.timed_prompts else "") + f" ({time.monotonic() - began:.0f} s)")
    return {"acceptance": dict(acceptance), "speedup": dict(speedup), "detail": dict(detail)}


def answer_all(target: Target, prompts: list[list[int]], max_new_tokens: int, temperature: float, seed: int) -> list[Text]:
    """The target's own answers, in the order of the prompts."""
    order = by_length(prompts, len)
    answers: dict[int, list[int]] = {}
    generator = torch.Generator(target.device).manual_seed(seed)
    for batch in in_batches(order, TEXT_BATCH):
        found = generate(target, [prompts[i] for i in batch], max_new_tokens=max_new_tokens, temperature=temperature,
                         generator=generator)
        answers |= dict(zip(batch, found, strict=True))
    return [Text(prompts[i], answers[i]) for i in range(len(prompts))]


def wall_clock(target: Target, drafter: DFlashDraftModel, texts: list[Text], max_new_tokens: int, temperature: float,
               seed: int) -> dict:
    """Decodes prompts one at a time, plainly and speculatively in turn; tokens/s of both, and the loop's own count.

    `measured` is the acceptance length that the loop counted, `predicted` that of the same prompts by `expected_rounds`;
    at temperature 0 the texts are the same. `same_text` is the share of prompts with equal tokens (meaningful at 0).
    """
    seconds, tokens, lengths, same = [0.0, 0.0], [0, 0], [], 0
    for i, text in enumerate(texts):
        runs = []
        for method in (0, 1):
            generator = torch.Generator(target.device).manual_seed(seed * 1000 + i)
            settings = dict(max_new_tokens=max_new_tokens, temperature=temperature, generator=generator)
            began = time.perf_counter()
            runs.append(speculate(target, drafter, text.prompt, **settings) if method
                        else plain(target, text.prompt, **settings))
            seconds[method] += time.perf_counter() - began
            tokens[method] += len(runs[-1].tokens)
        lengths += runs[1].lengths
        same += runs[0].tokens == runs[1].tokens
    rates = [t / s for t, s in zip(tokens, seconds, strict=True)]
    predicted = summarize([t.beta for t in texts], [len(t.answer) - 1 for t in texts])
    return {"speedup": rates[1] / rates[0], "plain_tokens_per_second": rates[0], "draft_tokens_per_second": rates[1],
            "measured": sum(lengths) / max(1, len(lengths)), "predicted": predicted["length"], "rounds": len(lengths),
            "same_text": same / len(texts), "prompts": len(texts), "threads": torch.get_num_threads()}


def without_nan(value):
    """A result as JSON can hold it: figures that are not finite are None."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(summary: dict):
    """rich table of `measure`'s result."""
    from rich.table import Table

    out = Table(title="acceptance length (1 to block size, bonus token included)")
    for column in ("domain", "prompts", "drafter", "95 %", "lookup", "wall clock", "distinct 8-grams"):
        out.add_column(column, justify="left" if column in ("domain", "prompts") else "right")
    for domain, kinds in summary["detail"].items():
        for kind, row in kinds.items():
            low, high = row["drafter"]["interval"]
            distinct = summary["acceptance"][domain]["distinct_8gram" if kind == "task_t0" else "distinct_8gram_open_t1"]
            gain = summary["speedup"].get(domain, {}).get(kind)
            out.add_row(domain, {"task_t0": "task, T=0", "open_t1": "open, T=1"}[kind], f"{row['drafter']['length']:.2f}",
                        f"{low:.2f}-{high:.2f}", f"{row['lookup']['length']:.2f}", "-" if gain is None else f"{gain:.2f}x",
                        "-" if distinct is None else f"{distinct:.0%}")
    return out
