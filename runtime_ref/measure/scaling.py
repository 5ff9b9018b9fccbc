"""`bench.py --scaling`: tokens per second and price of 1, 8 and 64 users on eight GPUs, from the limit model (`roofline`).

A step verifies one block of every user (or, plain, computes one token of each). Its time is

    the longer of  reading (weights once for all users, keys and values of each) and  arithmetic
    + sums over ranks (a fixed time, and what their bytes take over the links) + barriers between ops

With many users arithmetic and links count, which a single user's step may forget. What a GPU has measured takes the place of an
assumption, and the page says which figure is which: `measured` reads the JSON of `bench.py --suite gpu`.

Units are bytes, seconds and dollars. Nothing here is a measurement but what was read from such a file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from runtime_ref.measure import roofline

USERS = (1, 8, 64)
# Dense bf16 operations per second, and bytes per second that a GPU sends to its peers, as the vendors state them.
FLOPS = {"H200": 0.99e15, "B200": 2.25e15, "MI355X": 2.5e15}
LINKS = {"H200": 450e9, "B200": 900e9, "MI355X": 538e9}
# Tokens of a step: of the published drafter on code, and on open questions (model card of MiMo-V2.5-Pro-FP4-DFlash).
ACCEPTANCES = (6.30, 3.18)


@dataclass(frozen=True)
class Assumptions:
    """What no measurement has replaced.

    Attributes:
        share: of the stated bandwidth that reading reaches. arithmetic: of the stated operations.
        reduce_seconds: of one sum over ranks, beside its bytes. barrier_seconds: of one between ops; barriers: of a step.
        context: tokens of each user whose keys and values a step reads. distinct_share: as of `roofline.step_bytes`.
        dollars: per GPU and hour, by card.
        source: where measured figures come from, by what they are of.
    """

    share: float = roofline.GOALS["goal"]
    arithmetic: float = 0.5
    reduce_seconds: float = 5e-6
    barrier_seconds: float = 1.5e-6
    context: int = 8192
    distinct_share: float = 1.0
    dollars: tuple[tuple[str, float], ...] = tuple((card, 3.0) for card in roofline.BANDWIDTH)
    source: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Step:
    """Seconds of a step's parts; `total` counts reading or arithmetic, whichever is longer."""

    reading: float
    arithmetic: float
    sums: float
    barriers: float

    @property
    def total(self) -> float:
        return max(self.reading, self.arithmetic) + self.sums + self.barriers


def cache_bytes(config: dict, context: int) -> float:
    """bf16 keys and values that a step of one sequence reads."""
    total = 0.0
    for window in config["hybrid_layer_pattern"]:
        kind = "swa_" if window else ""
        seen = min(context, config["sliding_window"]) if window else context
        total += 2 * seen * config[f"{kind}num_key_value_heads"] * (config[f"{kind}head_dim"] + config[f"{kind}v_head_dim"])
    return total


def operations(config: dict, context: int) -> float:
    """Of one token: two per weight that it meets, and of its attention."""
    hidden, total = config["hidden_size"], config["vocab_size"] * config["hidden_size"]
    for window, moe in zip(config["hybrid_layer_pattern"], config["moe_layer_freq"], strict=True):
        kind = "swa_" if window else ""
        heads, keys = config[f"{kind}num_attention_heads"], config[f"{kind}num_key_value_heads"]
        qk, v = config[f"{kind}head_dim"], config[f"{kind}v_head_dim"]
        total += hidden * (heads * qk + keys * (qk + v) + heads * v)
        total += heads * (qk + v) * (min(context, config["sliding_window"]) if window else context)
        total += hidden * (config["n_routed_experts"] + 3 * config["num_experts_per_tok"] * config["moe_intermediate_size"]
                           if moe else 3 * config["intermediate_size"])
    return 2.0 * total


def step(config: dict, card: str, users: int, block: int, assumed: Assumptions, gpus: int = 8) -> Step:
    """One step of `users` blocks of `block` tokens; 1: plain decoding, without a drafter."""
    rows, drafts = users * block, block > 1
    read = roofline.step_bytes(config, rows, distinct_share=assumed.distinct_share, drafter=drafts).total
    read += users * cache_bytes(config, assumed.context)
    work = rows * operations(config, assumed.context)
    layers, reduces = len(config["moe_layer_freq"]), roofline.all_reduces_per_step(config)
    barriers = 5 * layers + 1
    if drafts:
        work += rows * roofline.drafter_bytes(config)  # bf16: two bytes and two operations a weight
        reduces += 2 * roofline.DRAFT_LAYERS
        barriers += 6 * roofline.DRAFT_LAYERS + 3
    # Every rank sends its part of a sum and then its share of the result: twice (n - 1) / n of the rows.
    sent = 2 * (gpus - 1) / gpus * rows * config["hidden_size"] * 2
    return Step(read / (gpus * assumed.share * roofline.BANDWIDTH[card]), work / (gpus * assumed.arithmetic * FLOPS[card]),
                reduces * (assumed.reduce_seconds + sent / LINKS[card]), barriers * assumed.barrier_seconds)


def measured(path: Path, assumed: Assumptions) -> tuple[str, Assumptions]:
    """The card of a report of `bench.py --suite gpu`, and the assumptions with what it measured in their place.

    Raises:
        ValueError: no such report, or of a card that the model does not know.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        device, where = report["device"], f"{path.name}, {report['date'][:10]}, revision {report['revision']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--measured {path}: {type(error).__name__}, expected the JSON of `bench.py --suite gpu`") from None
    card = next((name for name in roofline.BANDWIDTH if name in device), None)
    if card is None:
        raise ValueError(f"--measured {path}: {device!r}, expected one of {', '.join(roofline.BANDWIDTH)}")
    source = []
    rows = [row for row in report.get("experts", []) if not row["failed"] and card in row.get("share_of_stated", {})]
    if rows:
        best = max(row["share_of_stated"][card] for row in rows)
        assumed = replace(assumed, share=best)
        source.append(("share", f"{best:.0%} of the stated bandwidth, experts at 8 tokens ({where})"))
    barrier = (report.get("step") or {}).get("barrier_seconds")
    if barrier:
        assumed = replace(assumed, barrier_seconds=barrier)
        source.append(("barrier_seconds", f"{1e6 * barrier:.2f} us ({where})"))
    return card, replace(assumed, source=(*assumed.source, *source))


def page(name: str, config: dict, by_card: dict[str, Assumptions], command: str, gpus: int = 8, block: int = 8) -> str:
    """Markdown: what is assumed and what was measured, then a table for every card."""
    lines = [f"# {name} for 1, 8 and 64 users", "",
             "**Modelled**, by the bytes, operations and sums of a step (`runtime_ref/measure/scaling.py`), but where a line",
             "below says **measured**. Written by", "", f"    {command}", "",
             f"{gpus} GPUs, tensor-parallel, one step for all users; blocks of {block}; tokens per step as published for the",
             f"drafter: {ACCEPTANCES[0]:g} on code, {ACCEPTANCES[1]:g} on open questions.", ""]
    for card, assumed in by_card.items():
        own, price = dict(assumed.source), dict(assumed.dollars)[card]
        lines += [f"## {gpus} x {card}", "", "| figure | value | |", "|---|---|---|"]
        for what, value, key in (
                ("bandwidth reached", f"{assumed.share:.0%} of {roofline.BANDWIDTH[card] / 1e12:.1f} TB/s", "share"),
                ("arithmetic reached", f"{assumed.arithmetic:.0%} of {FLOPS[card] / 1e12:.0f} TFLOP/s (bf16)", ""),
                ("a sum over ranks", f"{1e6 * assumed.reduce_seconds:g} us and its bytes at {LINKS[card] / 1e9:.0f} GB/s", ""),
                ("a barrier", f"{1e6 * assumed.barrier_seconds:.2f} us", "barrier_seconds"),
                ("context of a user", f"{assumed.context} tokens", ""),
                ("distinct experts", f"{assumed.distinct_share:.0%} of independent routing", ""),
                ("price", f"${price:.2f} per GPU and hour", "")):
            lines.append(f"| {what} | {value} | {'**measured**: ' + own[key] if key in own else 'assumed'} |")
        lines += ["", "| users | tokens per step | step, ms | reading / arithmetic, ms | sums + barriers, ms "
                  "| tokens/s of each | of all | $ per million |", "|---|---|---|---|---|---|---|---|"]
        for users in USERS:
            for tokens, size in (*((a, block) for a in ACCEPTANCES), (1.0, 1)):
                own_step = step(config, card, users, size, assumed, gpus)
                each = tokens / own_step.total
                dollars = gpus * price / 3600 / (users * each) * 1e6
                what = f"{tokens:.2f} of {size}" if size > 1 else "1, no drafter"
                reading, arithmetic, rest = (1e3 * s for s in (own_step.reading, own_step.arithmetic,
                                                               own_step.sums + own_step.barriers))
                lines.append(f"| {users} | {what} | {1e3 * own_step.total:.2f} | {reading:.2f} / {arithmetic:.2f} | {rest:.2f} "
                             f"| {each:.0f} | {users * each:.0f} | {dollars:.2f} |")
        lines.append("")
    return "\n".join([*lines, *_reading(config, by_card, gpus, block)])


def slower(config: dict, card: str, tokens: float, block: int, assumed: Assumptions, gpus: int, most: int = 256) -> list[int]:
    """Numbers of users at which a drafter that gives so many tokens a step makes answers slower than plain decoding."""
    def seconds(users: int, size: int) -> float:
        return step(config, card, users, size, assumed, gpus).total

    return [users for users in range(1, most + 1) if seconds(users, block) > tokens * seconds(users, 1)]


def _reading(config: dict, by_card: dict[str, Assumptions], gpus: int, block: int) -> list[str]:
    """Where a drafter loses, by card and tokens per step."""
    lines = ["## Where a drafter loses", "", "Eight users' blocks touch nearly all experts, their single tokens few of them;",
             "with many users both read everything. Numbers of users, up to 256, at which plain decoding is faster:", "",
             "| | " + " | ".join(f"{a:g} tokens per step" for a in ACCEPTANCES) + " |", "|---|" + "---|" * len(ACCEPTANCES)]
    for card, assumed in by_card.items():
        found = [slower(config, card, tokens, block, assumed, gpus) for tokens in ACCEPTANCES]
        cells = [f"{lost[0]} to {lost[-1]}" if lost else "none" for lost in found]
        lines.append(f"| {card} | {' | '.join(cells)} |")
    return [*lines, "", "Steps of more than 64 rows run op by op in this runtime, whose launches are not counted here.", ""]
