"""Check 2b, drafts: what the engine asks its drafter and what it answers, round by round, against the drafter's model.

The engine itself decodes a text, so that what it captures, where it puts it and what it keeps is judged too: prompts in chunks,
features of accepted tokens, rejected ones rolled back, and a second answer to the same prompt, which takes the prompt's pages
from the prefix cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runtime_ref.backends.base import Backend
from runtime_ref.core.kv_cache import PAGE
from runtime_ref.core.sampling_params import SamplingParams
from runtime_ref.engine.engine import Engine, EngineOptions
from runtime_ref.validation.checks.reference import ENGINE_CAUSE, Probe, features, name_causes, target_bases
from runtime_ref.validation.context import ValidationContext
from runtime_ref.validation.diagnosis.fault_table import drafter_faults
from runtime_ref.validation.diagnosis.faults import SAME, difference, matching_faults
from runtime_ref.validation.diagnosis.feed_faults import (
    HIT_CAUSE,
    RecordingDrafter,
    Round,
    drafted,
    fed_right,
    feed_faults,
    matching_feed_faults,
)
from runtime_ref.validation.quantities import Number
from runtime_ref.validation.result import Check

ANSWER = 12


@dataclass(frozen=True)
class Rounds:
    """The rounds of one answer, of the answer to the same prompt from the prefix cache (None: no page was full), the text."""

    first: list[Round]
    again: list[Round] | None
    tokens: list[int]


def engine_rounds(exact: Backend, drafter, probe: Probe) -> Rounds:
    """Rounds of an engine in float32 on its backend; to be called on all ranks alike."""
    limit = exact.config.max_position_embeddings - ANSWER - drafter.block - 1
    prompt = (probe.ids * (1 + 2 * PAGE // len(probe.ids)))[:max(1, min(limit, max(len(probe.ids), PAGE + 21)))]
    recorder = RecordingDrafter(drafter)
    engine = Engine(exact, recorder, EngineOptions(max_running=1, max_context=len(prompt) + ANSWER + drafter.block + 1))
    params = SamplingParams(max_tokens=ANSWER, ignore_eos=True)
    answer = engine.generate([prompt], params)[0]
    first, recorder.rounds = recorder.rounds, []
    engine.generate([prompt], params)
    hit = engine.stats()["prefix_hits"] > 0
    engine.cache.clear_prefixes()  # the pages belong to whoever uses the pools next
    return Rounds(first, recorder.rounds if hit else None, prompt + answer)


@torch.no_grad()
def check_rounds(check: Check, context: ValidationContext, probe: Probe, rounds: Rounds) -> None:
    """Adds what is wrong with the rounds of a runtime whose target is right."""
    target, drafter = probe.target, probe.drafter
    ids, embed = torch.tensor([rounds.tokens]), target.model.embed_tokens
    depth = context.config.num_hidden_layers
    outputs = torch.cat((embed(ids)[0][:, None], features(target, ids, list(range(depth)))), dim=1)
    worst = 0.0
    for number, one in enumerate(rounds.first):
        fed, count = fed_right(outputs, drafter, one.anchor, one.position), one.logits.shape[0]

        def logits(model, given=fed, count=count):
            return target.lm_head(drafted(model, given, embed, count))

        error = difference(one.logits, logits(drafter))
        worst = max(worst, error)
        if not error < SAME:
            check.fail(f"the runtime's drafts differ from the drafter model in round {number + 1} (relative error {error:.2g})")
            faults = matching_faults(drafter, drafter_faults(drafter, embed.weight[drafter.mask_token_id],
                                                             target_bases(context)), logits, one.logits)
            faults = faults or matching_feed_faults(feed_faults(drafter, depth), lambda f: logits(drafter, f), fed, one.logits)
            name_causes(check, faults, "the drafter; no known bug explains it", f"{ENGINE_CAUSE}: ")
            break
    check.measure(Number.DRAFT_LOGITS_ERROR, worst, SAME)
    check.measure(Number.DRAFT_ROUNDS, len(rounds.first))
    if rounds.again is None:
        check.unchecked.append("drafts after a prefix-cache hit: the model's context is shorter than a page of the cache")
    elif check.status != "failed" and not difference(rounds.again[0].logits, rounds.first[0].logits) < SAME:
        check.fail("the first drafts of a prompt from the prefix cache are not those of the prompt computed anew",
                   f"{ENGINE_CAUSE}: {HIT_CAUSE}")
