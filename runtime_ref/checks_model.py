"""Checks 2 and 3: the model against references that share no code with the runtime.

2a  The stored reference of the folder (`dflash_reference.safetensors`: features of the target and logits of the drafter,
    made from the weights that were trained) against the folder's own model, run by modeling/ in float32. A difference means
    the folder is wrong.
2b  The runtime against the folder's model, layer by layer. A difference means the runtime is wrong.
3   Every op of the backend against its float64 twin (`naive.py`), on the inputs that it really had.

A difference is explained by trying the suspects of `suspects.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from modeling.drafter import DFlashDraftModel, load_drafter
from modeling.load import load_model
from runtime_ref import naive
from runtime_ref.checks_folder import HEAD_CAUSE, Facts
from runtime_ref.drafter import KIND, Drafter, Wanted
from runtime_ref.kv_cache import KvCache
from runtime_ref.model import Span
from runtime_ref.suspects import CLAMP_CAUSE, SAME, culprits, difference, drafter_suspects, target_suspects
from runtime_ref.tasks import Task, TorchBackend, target_tasks
from runtime_ref.verdict import Check
from runtime_ref.weights import Dense

# Relative error of one float32 op against float64: sums of a few thousand terms.
OP_ERROR = 2e-5
ENGINE_CAUSE = "the runtime computes it otherwise"


@dataclass
class Probe:
    """Text and references that the checks share; the models exist on rank 0 only."""

    ids: list[int]
    target: torch.nn.Module | None = None
    drafter: DFlashDraftModel | None = None


def probe_for(facts: Facts, *, rank: int, limit_gib: float) -> Probe:
    """Text long enough to leave the windows, and float32 references if they fit into `limit_gib`.

    Raises:
        ValueError: weights that cannot be decoded.
    """
    config = facts.config
    window = config.sliding_window if any(config.hybrid_layer_pattern) else 0
    length = min(config.max_position_embeddings, max(48, window + 24))
    generator = torch.Generator().manual_seed(11)
    probe = Probe(torch.randint(0, config.vocab_size, (min(length, 400),), generator=generator).tolist())
    if rank == 0 and decoded_gib(facts.folder) <= limit_gib:
        probe.target = load_model(facts.folder, dtype=torch.float32)
        if facts.drafter_loadable:
            probe.drafter = load_drafter(facts.folder / "dflash", torch.float32)
    return probe


def decoded_gib(folder: Path) -> float:
    """Size of a folder's weights in float32, at most (packed codes hold two values in a byte)."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) * 8 / 2**30


@torch.no_grad()
def check_reference(facts: Facts, probe: Probe) -> Check:
    """Check 2a."""
    check = Check("reference", "stored reference outputs against the folder's model")
    if facts.reference is None:
        _count_suspicions(check, facts, "the folder has no stored reference to clear it", grave=True)
        return check if check.status == "failed" else check.skip("the folder has no dflash_reference.safetensors")
    if probe.target is None:
        return check.skip("the model in float32 does not fit (--reference-gib)")
    before = len(check.findings)
    if facts.reference_facts.get("features") == "target":
        _stored_features(check, facts, probe)
    if probe.drafter is not None:
        _stored_drafts(check, facts, probe)
    if len(check.findings) > before and not check.causes:
        _count_suspicions(check, facts, "and the stored reference disagrees", grave=False)
    return check


def _count_suspicions(check: Check, facts: Facts, why: str, *, grave: bool) -> None:
    for finding, cause, is_grave in facts.suspicions:
        if is_grave or not grave:
            check.fail(f"{finding}; {why}", cause)


def _features(model, ids: torch.Tensor, layers: list[int]) -> torch.Tensor:
    """Outputs [S, n, H] of decoder layers."""
    return torch.stack(model.model(input_ids=ids, tap_layers=layers, use_cache=False).taps, dim=2)[0]


def _stored_features(check: Check, facts: Facts, probe: Probe) -> None:
    stored, ids = facts.reference["taps"][0], facts.reference["input_ids"][:, :-1]
    layers = facts.reference_facts.get("target_layer_ids") or probe.drafter.target_layer_ids
    found = _features(probe.target, ids, layers)
    errors = [difference(found[:, k], stored[:, k]) for k in range(len(layers))]
    check.tables["features of the target: relative error by layer"] = [["layer", "error"], *zip(layers, errors, strict=True)]
    check.numbers["worst feature error"] = max(errors)
    if max(errors) < SAME:
        return
    first = next(k for k, error in enumerate(errors) if error >= SAME)
    check.fail(f"the target's features differ from the stored ones from layer {layers[first]} on "
               f"(relative error {errors[first]:.2g})")
    every = _features(probe.target, ids, list(range(facts.config.num_hidden_layers)))
    moved = [next((i for i in range(every.shape[1]) if difference(every[:, i], stored[:, k]) < SAME), None)
             for k in range(len(layers))]
    if None not in moved:
        check.fail(f"the stored features are those of layers {moved}, not {layers}",
                   "taps are off by one or of other layers: an id i means the output of decoder layer i, counted from 0")
        return
    bases = [facts.drafter_config.get("dflash_config", {}).get("backbone_rotary_base") or 1e4, facts.config.swa_rope_theta,
             facts.config.rope_theta]
    _name(check, culprits(probe.target, target_suspects(facts.config, bases), lambda m: _features(m, ids, layers), stored),
          f"between layer {layers[first - 1] if first else 'embedding'} and the output of layer {layers[first]}")


def _name(check: Check, found: list, where: str) -> None:
    """Adds the causes of a difference, or where it begins."""
    if found:
        for suspect in found:
            check.fail(f"explained by: {suspect.name}", suspect.cause)
    elif where:
        check.fail(f"no known bug explains it; it begins {where}")


def _stored_drafts(check: Check, facts: Facts, probe: Probe) -> None:
    stored, ids = facts.reference["draft_hidden"][0], facts.reference["input_ids"]
    taps = facts.reference["taps"]
    if taps.shape[2] * taps.shape[3] != probe.drafter.fc.in_features:
        check.fail(f"the stored reference has {taps.shape[2]} tapped layers, the drafter {len(probe.drafter.target_layer_ids)}",
                   "number of tapped layers (target_layer_ids)")
        return
    embed = probe.target.model.embed_tokens

    def run(drafter):
        return draft_round(drafter, taps, ids[0, -1], ids.shape[1] - 1, embed)

    hidden = run(probe.drafter)
    error = difference(hidden, stored)
    check.numbers["error of the drafter's hidden states"] = error
    if error >= SAME:
        check.fail(f"the drafter's hidden states differ from the stored ones (relative error {error:.2g})")
        row = embed.weight[probe.drafter.mask_token_id]
        bases = [facts.config.rope_theta, facts.config.swa_rope_theta,
                 (facts.drafter_config.get("rope_theta") or 1e4)]
        _name(check, culprits(probe.drafter, drafter_suspects(probe.drafter, row, bases), run, stored), "in the drafter")
        return
    logits = probe.target.lm_head(hidden[1:])
    if difference(logits, facts.reference["draft_logits"][0]) >= SAME:
        check.fail("draft logits differ from the stored ones although the hidden states agree", HEAD_CAUSE)


@torch.no_grad()
def draft_round(drafter: DFlashDraftModel, taps: torch.Tensor, anchor: torch.Tensor, position: int, embed) -> torch.Tensor:
    """Hidden states [T, H] of one block of the reference drafter, given features [1, S, n, H]."""
    S = taps.shape[1]
    positions = torch.arange(position - S, position)[None]
    context = drafter.context_keys_values(drafter.fuse(taps.flatten(2)), positions)
    embeds = drafter.embed_block(anchor[None], embed)
    return drafter.block_hidden(embeds, position + torch.arange(drafter.block_size)[None], context, positions)[0]


def run_watched(backend: TorchBackend, ids: list[int], *, taps=(), watch=None) -> tuple[dict, Span, KvCache]:
    """Buffers of one step over `ids` on a fresh cache, the span, and the cache (still holding it)."""
    cache = KvCache(backend.pools, prefix=False)
    tables = cache.tables()
    cache.extend(tables, list(tables), len(ids))
    span = Span(tables, 0, ids)
    return backend.run(target_tasks(backend.config, taps), backend.plan([span]), watch), span, cache


def check_runtime(facts: Facts, probe: Probe, exact: TorchBackend, served: TorchBackend | None,
                  drafter: Drafter | None) -> Check:
    """Check 2b: the runtime in float32 (`exact`) layer by layer, and how far the dtype that is served rounds."""
    check = Check("logits", "logits and layers against the independent model (float32)")
    layers, n = facts.config.num_hidden_layers, len(probe.ids)
    runs = []
    for backend in (exact, served):
        if backend is not None:
            buffers, span, cache = run_watched(backend, probe.ids, taps=range(layers))
            cache.release(span.tables)
            runs.append((torch.stack([buffers[f"tap.{i}"][:n] for i in range(layers)], dim=1), buffers["logits"][:n]))
    drafts = _runtime_drafts(probe, exact, drafter, runs[0][0]) if drafter is not None else None
    if probe.target is None:
        return check.skip("the model in float32 does not fit (--reference-gib)")
    ids = torch.tensor([probe.ids])
    with torch.no_grad():
        expected = _features(probe.target, ids, list(range(layers)))
        logits = probe.target(input_ids=ids).logits[0]
    rows = [["layer", "float32", *(["as served"] if len(runs) > 1 else [])]]
    for i in range(layers):
        rows.append([i, *(difference(taps[:, i], expected[:, i]) for taps, _ in runs)])
    rows.append(["logits", *(difference(found, logits) for _, found in runs)])
    check.tables["relative error by layer"] = rows
    check.numbers |= {"logits error": rows[-1][1], "tokens": n}
    if len(runs) > 1:
        served_logits = runs[1][1].log_softmax(-1)
        kl = torch.nn.functional.kl_div(served_logits, logits.log_softmax(-1), log_target=True, reduction="batchmean")
        same = (served_logits.argmax(-1) == logits.argmax(-1)).float().mean()
        check.numbers |= {"KL of the served dtype": float(kl), "same arg-max": float(same)}
    if rows[-1][1] >= SAME or any(row[1] >= SAME for row in rows[1:]):
        first = next(row[0] for row in rows[1:] if row[1] >= SAME)
        check.fail(f"the runtime parts from the model at layer {first} (relative error of the logits {rows[-1][1]:.2g})")
        _blame_runtime(check, facts, probe, ids, runs[0][1], first)
    if drafts is not None and probe.drafter is not None:
        _compare_drafts(check, facts, probe, drafts, expected)
    return check


@torch.no_grad()
def _blame_runtime(check: Check, facts: Facts, probe: Probe, ids, found, first) -> None:
    bases = (facts.config.swa_rope_theta, facts.config.rope_theta)
    suspects = culprits(probe.target, target_suspects(facts.config, bases), lambda m: m(input_ids=ids).logits[0], found)
    for suspect in suspects:
        check.fail(f"explained by: {suspect.name}", f"{ENGINE_CAUSE}: {suspect.cause}")
    if not suspects:
        check.causes.append(f"{ENGINE_CAUSE}: no known bug explains it; it begins in layer {first}")


def _runtime_drafts(probe: Probe, exact: TorchBackend, drafter: Drafter, taps: torch.Tensor) -> torch.Tensor:
    """The runtime's draft logits after the probe's text but its last token, which is the anchor."""
    n = len(probe.ids) - 1
    cache = KvCache({KIND: drafter.pool}, prefix=False)
    tables = cache.tables()
    cache.extend(tables, [KIND], n + drafter.block)
    features = torch.cat([taps[:n, i] for i in drafter.taps], dim=-1)
    drafter.extend_tables(features[:n - 3], 0, tables[KIND])
    logits = drafter.logits([Wanted(tables, probe.ids[n], n, drafter.block - 1, features[n - 3:])])[0]
    cache.release(tables)
    return logits


@torch.no_grad()
def _compare_drafts(check: Check, facts: Facts, probe: Probe, found: torch.Tensor, layers: torch.Tensor) -> None:
    n, embed = len(probe.ids) - 1, probe.target.model.embed_tokens
    taps, anchor = layers[None, :n][:, :, probe.drafter.target_layer_ids], torch.tensor(probe.ids[n])

    def run(drafter):
        return probe.target.lm_head(draft_round(drafter, taps, anchor, n, embed)[1:])

    error = difference(found, run(probe.drafter))
    check.numbers["draft logits error"] = error
    if error < SAME:
        return
    check.fail(f"the runtime's drafts differ from the drafter model (relative error {error:.2g})")
    row = embed.weight[probe.drafter.mask_token_id]
    bases = (facts.config.rope_theta, facts.config.swa_rope_theta)
    suspects = culprits(probe.drafter, drafter_suspects(probe.drafter, row, bases), run, found)
    for suspect in suspects:
        check.fail(f"explained by: {suspect.name}", f"{ENGINE_CAUSE}: {suspect.cause}")
    if not suspects:
        check.causes.append(f"{ENGINE_CAUSE}: the drafter")


def check_ops(probe: Probe, exact: TorchBackend) -> Check:
    """Check 3."""
    check = Check("ops", f"every op of the {exact.name} backend against its float64 twin")
    if exact.weights.ranks.count > 1:
        return check.skip("a rank holds shares of the weights; run it with one rank")
    worst: dict[str, float] = {}
    ids, kept, spans = probe.ids[:40], {}, []

    def watch(task, buffers):
        inputs = {name: kept[name] for name in task.reads if name in kept}
        if spans and task.op != "pick_rows":
            wanted = naive.expected(exact, task, inputs, spans[0], len(ids))
            if wanted is not None:
                got = naive.found(task, buffers, exact.config)
                if task.op.startswith("attend"):
                    got = got[:, :len(ids)]
                worst[task.op] = max(worst.get(task.op, 0.0), difference(got.double().float(), wanted.float()))
        kept.clear()
        kept.update({name: value.clone() for name, value in buffers.items()})

    cache = KvCache(exact.pools, prefix=False)
    tables = cache.tables()
    cache.extend(tables, list(tables), len(ids))
    spans.append(Span(tables, 0, ids))
    exact.run(target_tasks(exact.config), exact.plan(spans), watch)
    cache.release(tables)
    check.tables["worst relative error by op"] = [["op", "error"], *sorted(worst.items())]
    for op, error in worst.items():
        if error > OP_ERROR:
            check.fail(f"{op}: relative error {error:.2g}, expected at most {OP_ERROR:g}", f"the backend's op {op} is wrong")
    error = _large_activations(exact)
    check.tables["worst relative error by op"].append(["dense_mlp, experts at large activations", error])
    if error > OP_ERROR:
        check.fail(f"experts at large activations: relative error {error:.2g}", f"{ENGINE_CAUSE}: {CLAMP_CAUSE}")
    check.numbers = {"ops": len(worst), "row blocks": f"multiples of {_quantum()}"}
    return check


def _large_activations(exact: TorchBackend) -> float:
    """Worst error of the MLPs on inputs that take gates far beyond 7, where a clamp would show."""
    generator = torch.Generator().manual_seed(3)
    step, worst = exact.plan_of_rows(), 0.0
    for i, layer in enumerate(exact.weights.layers):
        y = 64 * torch.randn(8, exact.config.hidden_size, generator=generator)
        if isinstance(layer.mlp, Dense):
            task, inputs = Task("dense_mlp", i, ("y",), ("partial",)), {"y": y}
        else:
            index, weight = exact.ops["route"](step, i, y)
            inputs = {"y": y, "index": index, "weight": weight}
            task = Task("experts", i, tuple(inputs), ("partial",))
        wanted = naive.expected(exact, task, inputs, Span({}, 0, []), 8)
        got = exact.ops[task.op](step, i, *inputs.values()).double().sum(0)
        worst = max(worst, difference(got.float(), wanted.float()))
    return worst


def _quantum() -> int:
    from runtime_ref.model import rules

    return rules.quantum
