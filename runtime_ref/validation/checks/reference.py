"""Check 2a: the stored reference of the folder against the folder's own model, run by modeling/ in float32.

`dflash_reference.safetensors` was made from the weights that were trained: features of the target, its logits, hidden states
and logits of one drafted block. A difference means that the folder is wrong, and the faults of `diagnosis/` are tried on it:
first in all layers, then in the layers between the last right and the first wrong feature alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint.drafter_folder import draft_round
from checkpoint.load import load_model
from modeling.drafter import DFlashDraftModel, load_drafter
from runtime_ref.validation.checks import folder_causes as causes
from runtime_ref.validation.context import ValidationContext, own_object, quiet
from runtime_ref.validation.diagnosis.fault_table import drafter_faults, exchanged_expert_faults, target_faults
from runtime_ref.validation.diagnosis.faults import SAME, Fault, difference, first_matching_fault, matching_faults, only_in
from runtime_ref.validation.guard import UserMistake
from runtime_ref.validation.quantities import Number, Table
from runtime_ref.validation.result import Check
from storage.terminal import counted

WEIGHTS_CAUSE = "the weights are not those that were trained"
FINAL_NORM_CAUSE = "the final norm of the target is wrong (model.norm): features end before it, so drafts do not show it"
OTHER_DRAFTER_CAUSE = ("the drafter's weights are not those that the reference was made with: another drafter's, or damaged, "
                       "or in a form that is not known here")
ENGINE_CAUSE = "the runtime computes it otherwise"
PROBE_LIMIT = 400


@dataclass
class Probe:
    """Text and references that the checks share; the models exist on rank 0 only."""

    ids: list[int]
    target: torch.nn.Module | None = None
    drafter: DFlashDraftModel | None = None
    absent: str = "the model in float32 does not fit (--reference-gib)"


def probe_for(context: ValidationContext, *, rank: int, limit_gib: float) -> Probe:
    """Text long enough to leave the windows, and float32 references if they fit into `limit_gib`.

    Raises:
        ValueError: weights that cannot be decoded.
    """
    config = context.config
    window = config.sliding_window if any(config.hybrid_layer_pattern) else 0
    if context.drafter_loadable:
        window = max(window, context.drafter_config["dflash_config"].get("swa_window_size") or 0)
    length = min(config.max_position_embeddings, max(48, window + 24), PROBE_LIMIT)
    generator = torch.Generator().manual_seed(11)
    probe = Probe(torch.randint(0, config.vocab_size, (max(length, 12),), generator=generator).tolist())
    if rank == 0 and decoded_gib(context.folder) <= limit_gib:
        if context.family == "mimo_v2":
            probe.target = load_model(context.folder, dtype=torch.float32)
        elif (missing := missing_client(context)) is None:
            probe.target = load_hf(context.folder)
        else:
            probe.absent = missing
            return probe
        if context.drafter_loadable:
            probe.drafter = load_drafter(context.folder / "dflash", torch.float32)
    return probe


def missing_client(context: ValidationContext) -> str | None:
    """Why transformers cannot load a folder of this layout here, or None."""
    if context.family not in ("mimo_v2", "gpt_oss") and importlib.util.find_spec("compressed_tensors") is None:
        return "transformers loads this layout with compressed-tensors, which is not installed: pip install compressed-tensors"
    return None


def load_hf(folder: Path) -> torch.nn.Module:
    """The folder as transformers' own class loads it, in float32.

    Raises:
        ValueError: it does not.
    """
    with quiet(), torch.no_grad():
        model = load_model(folder, dtype=torch.float32)
        # Experts that were packed come in bf16, which holds every MXFP4 value; transformers' own method refuses to cast.
        torch.nn.Module.float(model).eval()
        model(input_ids=torch.zeros(1, 1, dtype=torch.long))  # compressed-tensors decodes at the first call
    return model


def decoded_gib(folder: Path) -> float:
    """Size of a folder's weights in float32, at most (packed codes hold two values in a byte)."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) * 8 / 2**30


@torch.no_grad()
def check_reference(check: Check, context: ValidationContext, probe: Probe, original: Path | None = None) -> None:
    """Adds what is wrong with the folder's numbers.

    Args:
        original: the trained checkpoint that was exported; its outputs are a reference too, of every layer.

    Raises:
        UserMistake: `original` cannot be loaded.
    """
    if context.reference is None and original is None:
        check.leave_out("the folder has no dflash_reference.safetensors (--original DIR compares with the trained checkpoint "
                        "instead)")
    elif probe.target is None:
        check.leave_out(probe.absent)
    if check.status == "unchecked":
        check.notes += [f"{finding}; nothing here tells whether it is wrong" for finding, _ in context.suspicions]
        return
    if original is not None:
        _compare_original(check, context, probe, original)
    if context.reference is not None and check.status != "failed":
        _compare_stored(check, context, probe)
    if check.findings and not check.causes:
        _count_suspicions(check, context, "and the reference disagrees")


def _compare_original(check: Check, context: ValidationContext, probe: Probe, original: Path) -> None:
    """The trained checkpoint's outputs on the probe's text."""
    if (own_object(context.folder / "export.json") or {}).get("dense") == "fp8":
        check.notes.append("--original was not compared: the export rounded dense matrices to FP8")
        return
    try:
        model = load_model(original, dtype=torch.float32) if context.family == "mimo_v2" else load_hf(original)
    except ValueError as error:
        raise UserMistake(f"--original: {error}") from None
    mask = (context.drafter_config.get("dflash_config") or {}).get("mask_token_id")  # the exporter fills its vocabulary row
    ids = torch.tensor([[token for token in probe.ids if token != mask]])
    layers = list(range(model.config.num_hidden_layers))
    if model.config.vocab_size != context.config.vocab_size:
        check.fail(f"--original has a vocabulary of {model.config.vocab_size}, the folder of {context.config.vocab_size}",
                   "the folder and --original are different models")
        return
    stored, logits = features(model, ids, layers), model(input_ids=ids).logits[0, -8:]
    del model
    check.measure(Number.ORIGINAL_TOKENS, ids.shape[1])
    if _judge_features(check, context, probe, (ids, stored, layers), "the original's"):
        _judge_logits(check, context, probe, ids, logits)


def _compare_stored(check: Check, context: ValidationContext, probe: Probe) -> None:
    ids = context.reference["input_ids"]
    vocabulary = context.config.vocab_size
    if ids.dtype != torch.int64 or not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        check.fail(f"the stored reference holds token {int(ids.max())}, the vocabulary has {vocabulary}",
                   "the stored reference is of another model")
        return
    check.measure(Number.REFERENCE_TOKENS, ids.shape[1])
    right = True
    if context.reference_info.get("features") == "target":
        right = _judge_features(check, context, probe, _stored_features(context), "the stored")
    if right:  # or the drafter is blamed for the target's weights
        if probe.drafter is not None:
            _stored_drafts(check, context, probe)
        if "target_logits" in context.reference and context.reference_info.get("features") == "target":
            _judge_logits(check, context, probe, context.reference["input_ids"][:, :-1], context.reference["target_logits"][0])


def _count_suspicions(check: Check, context: ValidationContext, why: str) -> None:
    for finding, cause in context.suspicions:
        check.fail(f"{finding}; {why}", cause)


def features(model, ids: torch.Tensor, layers: list[int]) -> torch.Tensor:
    """Outputs [S, n, H] of decoder layers."""
    if model.config.model_type == "mimo_v2":
        return torch.stack(model.model(input_ids=ids, aux_layers=layers, use_cache=False).aux_hidden_states, dim=2)[0]
    found: dict[int, torch.Tensor] = {}
    hooks = [model.model.layers[i].register_forward_hook(lambda _, __, out, i=i: found.__setitem__(
        i, out[0] if isinstance(out, tuple) else out)) for i in set(layers)]
    model.model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack([found[i] for i in layers], dim=2)[0]


def target_bases(context: ValidationContext) -> list[float]:
    """Rotary bases of the target, which a drafter's may be taken for."""
    return [context.config.rope_theta, getattr(context.config, "swa_rope_theta", context.config.rope_theta)]


def faults_of(context: ValidationContext, bases=()) -> Iterator[Fault]:
    """What usually goes wrong with a model of this family."""
    return target_faults(context.config, [*bases, *target_bases(context)])


def _stored_features(context: ValidationContext) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """(ids [1, S], features [S, n, H], their layers) of the stored reference."""
    layers = context.reference_info.get("target_layer_ids") or context.drafter_config["dflash_config"]["target_layer_ids"]
    return context.reference["input_ids"][:, :-1], context.reference["taps"][0], layers


def _judge_features(check: Check, context: ValidationContext, probe: Probe,
                    reference: tuple[torch.Tensor, torch.Tensor, list[int]], whose: str) -> bool:
    """Whether the target's features are those of a reference (ids, features, layers)."""
    ids, stored, layers = reference
    every = features(probe.target, ids, list(range(context.config.num_hidden_layers)))
    if stored.shape[1] != len(layers) or stored.shape[2] != every.shape[2] or max(layers) >= every.shape[1]:
        check.fail(f"{whose} features are {list(stored.shape)}, expected {len(layers)} layers of {every.shape[2]}",
                   "the reference is of another model")
        return False
    found = every[:, layers]
    errors = [difference(found[:, k], stored[:, k]) for k in range(len(layers))]
    check.tables[Table.FEATURES] = [["layer", "error"], *zip(layers, errors, strict=True)]
    check.measure(Number.FEATURE_ERROR, max(errors), SAME)
    if max(errors) < SAME:
        return True
    first = next(k for k, error in enumerate(errors) if not error < SAME)
    check.fail(f"the target's features differ from {whose} from layer {layers[first]} on "
               f"(relative error {errors[first]:.2g})")
    if not bool(torch.isfinite(every).all()):
        check.fail(f"the outputs of layer {_first_odd(every)} are not finite", causes.FINITE)
        return False
    if context.explained is not None:
        check.fail("not searched for other causes: the check of the folder has one", context.explained)
        return False
    moved = [next((i for i in range(every.shape[1]) if difference(every[:, i], stored[:, k]) < SAME), None)
             for k in range(len(layers))]
    if None not in moved:
        check.fail(f"{whose} features are those of layers {moved}, not {layers}", causes.TARGET_LAYERS)
        return False
    _explain_target(check, context, probe, ids, stored, layers, first)
    return False


def _first_odd(every: torch.Tensor) -> int:
    return next(i for i in range(every.shape[1]) if not bool(torch.isfinite(every[:, i]).all()))


def _explain_target(check: Check, context: ValidationContext, probe: Probe, ids, stored, layers: list[int], first: int) -> None:
    """Tries the faults in all layers, then in those between the last right feature and the first wrong one."""
    bases = [context.drafter_config.get("dflash_config", {}).get("backbone_rotary_base") or 1e4]

    def run(model):
        return features(model, ids, layers)

    found = matching_faults(probe.target, faults_of(context, bases), run, stored)
    before = layers[first - 1] if first else -1
    between = list(range(before + 1, layers[first] + 1))
    if not found:
        single = [[i] for i in between] if 1 < len(between) <= 4 else []
        found = first_matching_fault(probe.target, (s for layers_ in (between, *single) for s in only_in(
            probe.target, layers_, faults_of(context, bases))), run, stored)
    if not found and len(between) == 1 and context.config.moe_layer_freq[between[0]]:
        pairs = exchanged_expert_faults(context.config.n_routed_experts)
        found = first_matching_fault(probe.target, only_in(probe.target, between, pairs), run, stored)
    if not found and context.suspicions:
        _count_suspicions(check, context, "and the stored reference disagrees")
        return
    where = f"layer {between[0]}" if len(between) == 1 else f"layers {between[0]} to {between[-1]}"
    name_causes(check, found, f"{WEIGHTS_CAUSE}: it begins in {where}{' or the embedding' if not first else ''}")


def name_causes(check: Check, found: list, otherwise: str, prefix: str = "") -> None:
    """Adds the causes of a difference, or where it begins."""
    for hypothesis in found:
        check.fail(f"explained by: {hypothesis.name}", prefix + hypothesis.cause)
    if not found:
        check.fail("no known bug explains it", prefix + otherwise)


def _stored_drafts(check: Check, context: ValidationContext, probe: Probe) -> None:
    stored, ids = context.reference["draft_hidden"][0], context.reference["input_ids"]
    target_hidden = context.reference["taps"]
    if target_hidden.shape[2] * target_hidden.shape[3] != probe.drafter.fc.in_features:
        check.fail(f"the stored reference has {counted(target_hidden.shape[2], 'target layer')}, the drafter "
                   f"{len(probe.drafter.target_layer_ids)}",
                   "number of target layers (target_layer_ids)")
        return
    if stored.shape[0] != probe.drafter.block_size:
        check.fail(f"the stored reference drafts {counted(stored.shape[0], 'position')}, the drafter "
                   f"{probe.drafter.block_size}",
                   causes.BLOCK_SIZE)
        return
    embed = probe.target.model.embed_tokens

    def run(drafter):
        return draft_round(drafter, target_hidden, ids, embed.weight)[0]

    hidden = run(probe.drafter)
    error = difference(hidden, stored)
    check.measure(Number.DRAFT_HIDDEN_ERROR, error, SAME)
    if not error < SAME:
        check.fail(f"the drafter's hidden states differ from the stored ones (relative error {error:.2g})")
        row = embed.weight[probe.drafter.mask_token_id]
        bases = [*target_bases(context), (context.drafter_config.get("rope_theta") or 1e4)]
        found = matching_faults(probe.drafter, drafter_faults(probe.drafter, row, bases), run, stored)
        if not found and context.suspicions:
            _count_suspicions(check, context, "and the stored reference disagrees")
        else:
            name_causes(check, found, OTHER_DRAFTER_CAUSE)
        return
    logits = probe.target.lm_head(hidden[1:])
    if not difference(logits, context.reference["draft_logits"][0]) < SAME:
        check.fail("draft logits differ from the stored ones although the hidden states agree")
        _explain_head(check, context, probe, hidden[1:], context.reference["draft_logits"][0])


def _explain_head(check: Check, context: ValidationContext, probe: Probe, hidden: torch.Tensor, stored: torch.Tensor) -> None:
    hypotheses = [s for s in faults_of(context) if s.name.startswith(("head", "tied"))]
    name_causes(check, matching_faults(probe.target, hypotheses, lambda m: m.lm_head(hidden), stored),
                f"the head (lm_head) is not the one that was trained, or: {causes.HEAD}")


def _judge_logits(check: Check, context: ValidationContext, probe: Probe, ids: torch.Tensor, stored: torch.Tensor) -> None:
    """The target's own logits, of the last positions: final norm and head."""
    def run(model):
        return model(input_ids=ids, logits_to_keep=stored.shape[0]).logits[0]

    error = difference(run(probe.target), stored)
    check.measure(Number.TARGET_LOGITS_ERROR, error, SAME)
    if error < SAME:
        return
    check.fail(f"the target's logits differ from the reference although its features agree (relative error {error:.2g})")
    if any("head" in c for c in check.causes):
        return
    hypotheses = list(faults_of(context))
    last = [s for s in hypotheses if s.name.startswith(("head", "tied", "norms", "epsilon"))]
    # What changes few rows (a window off by one, in a text not much longer) can be too small to count among all features.
    others = (s for s in hypotheses if s not in last)
    found = matching_faults(probe.target, last, run, stored) or matching_faults(probe.target, others, run, stored)
    name_causes(check, found, FINAL_NORM_CAUSE)
