"""Check 1, the drafter's folder `dflash/`: tensors, dialects of its configuration, mask embedding, the stored reference.

Engines read different keys for the same thing. This project's exporter writes every alias, so of its folders all are demanded;
a published drafter has some of them, and what each engine makes of those that are absent or disagree is a note.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from checkpoint.drafter_folder import MOST_LAYERS
from checkpoint.tensor_files import TensorFiles
from modeling.drafter import read_mask
from runtime_ref.validation.context import (
    DTYPE_CAUSE,
    FINITE_CAUSE,
    ValidationContext,
    Wrong,
    condensed,
    first_line,
    read_object,
)
from runtime_ref.validation.result import Check

REFERENCE = "dflash_reference.safetensors"
MASK_FILE = "mask_embedding.pt"
MASK_CAUSE = "the mask embedding is missing: mask_embedding.pt must be there, the vocabulary row of the mask token is untrained"
MASK_ID_CAUSE = "the mask token's id is off: the vocabulary holds the mask embedding in another row than mask_token_id"
HEAD_CAUSE = "the drafter has a head or embedding of its own: both are the target's, shared"
TAP_CAUSE = "taps are off by one or of other layers: an id i means the output of decoder layer i, counted from 0"
OTHER_CAUSE = "the drafter was made for another target (num_target_layers, hidden_size)"
WINDOW_CAUSE = "wrong window of the drafter for some engines: they read different keys, which must agree"
CAUSAL_CAUSE = "wrong causality of the drafter for some engines: sliding layers count as causal unless is_causal is false"
LENGTH_CAUSE = ("the drafter is given positions beyond its trained length: engines that pass absolute positions lose most of "
                "its acceptance there")
# What engines make of a key that is absent or contradicts dflash_config.
READ_AS = {
    "sliding_window": "vLLM reads dflash_config.use_swa (window {window}); SGLang reads sliding_window",
    "layer_types": "vLLM reads dflash_config.use_swa (window {window}); SGLang reads layer_types, runs the drafter as full "
                   "attention and needs --speculative-draft-window-size {window}",
    "is_causal": "vLLM reads is_causal, then dflash_config.causal, then layer_types, and so takes the block as not causal "
                 "unless layers slide; SGLang takes sliding layers as causal",
    "block_size": "SGLang reads dflash_config.block_size, others the top level",
}
BLOCK_SIZE_CAUSE = "block size: one key says another than the other, or than the stored reference"


def check_drafter(check: Check, context: ValidationContext, files: TensorFiles, folder: Path) -> bool:
    """Checks `dflash/`; whether the drafter can be loaded."""
    try:
        raw = read_object(folder / "config.json")
        special = _special(raw)
    except Wrong as error:
        check.fail(str(error), error.cause)
        return False
    context.drafter_config = raw
    if not _drafter_tensors(check, folder, raw):
        return False
    fine = _aliases(check, context, raw, special)
    if not (folder / MASK_FILE).is_file():
        check.fail("dflash/mask_embedding.pt is missing", MASK_CAUSE)
        fine = False
    else:
        fine &= _mask(check, context, files, folder, special)
    if (folder / REFERENCE).is_file():
        _read_reference(check, context, folder / REFERENCE, special)
    return fine


def _special(raw: dict) -> dict:
    """dflash_config, with what every engine needs of it.

    Raises:
        Wrong: it is missing, or not of the form that it has.
    """
    special = raw.get("dflash_config")
    cause = "the drafter's configuration is incomplete"
    if not isinstance(special, dict):
        raise Wrong(f"dflash/config.json: dflash_config: {type(special).__name__}, expected an object", cause)
    depth = raw.get("num_hidden_layers")
    if type(depth) is not int or not 0 < depth <= MOST_LAYERS:
        raise Wrong(f"dflash/config.json: num_hidden_layers {str(depth)[:40]}, expected 1 to {MOST_LAYERS}", cause)
    layers = special.get("target_layer_ids")
    if not isinstance(layers, list) or not layers or not all(type(i) is int for i in layers):
        raise Wrong(f"dflash_config.target_layer_ids: {layers!r}, expected layer numbers", cause)
    for key, least in (("mask_token_id", 0), ("block_size", 2)):
        value = special.get(key, raw.get(key))
        if type(value) is not int or value < least:
            raise Wrong(f"dflash_config.{key}: {value!r}, expected an integer of {least} or more", cause)
    return special


def _drafter_tensors(check: Check, folder: Path, raw: dict) -> bool:
    from transformers import Qwen3Config

    from modeling.drafter import DFlashDraftModel

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name == REFERENCE or not file.is_file():
            continue
        try:
            with safe_open(str(file), framework="pt") as opened:
                for key in opened.keys():
                    tensor = opened.get_tensor(key)
                    found[key] = tuple(tensor.shape)
                    if tensor.dtype not in (torch.bfloat16, torch.float32):
                        check.fail(f"dflash: {key}: {tensor.dtype}, expected bfloat16", DTYPE_CAUSE)
                    elif not bool(torch.isfinite(tensor).all()):
                        check.fail(f"dflash: {key}: not finite", FINITE_CAUSE)
        except (SafetensorError, OSError) as error:
            check.fail(f"dflash/{file.name}: {str(error).splitlines()[0]}", "the drafter's folder is damaged")
            return False
    layers = raw.get("num_hidden_layers")
    if isinstance(layers, int) and layers > len(found):
        check.fail(f"dflash/config.json: num_hidden_layers: {layers}, but the files hold {len(found)} tensors",
                   "the drafter's configuration is incomplete")
        return False
    try:
        with torch.device("meta"):
            model = DFlashDraftModel(Qwen3Config.from_dict(dict(raw)))
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        check.fail(f"dflash/config.json: {str(error).splitlines()[0]}", "the drafter's configuration is incomplete")
        return False
    wanted = {n: tuple(p.shape) for n, p in model.named_parameters() if n != "mask_embedding"}
    before = len(check.findings)
    for name in sorted(wanted.keys() - found.keys()):
        check.fail(f"dflash: {name} is missing", "attention sinks of the drafter are dropped" if "sink" in name else
                   "the drafter's tensors are called otherwise (no 'model.' prefix)" if f"model.{name}" in found else
                   "a tensor of the drafter is missing")
    for name in sorted(found.keys() - wanted.keys()):
        cause = (HEAD_CAUSE if re.search(r"lm_head|embed_tokens", name) else
                 "attention sinks of the drafter are dropped (dflash_config.attention_sink_bias is false)"
                 if "sink" in name else "the drafter has tensors that the published form does not know")
        check.fail(f"dflash: {name}: unknown tensor", cause)
    for name in wanted.keys() & found.keys():
        if wanted[name] != found[name]:
            check.fail(f"dflash: {name}: shape {list(found[name])}, expected {list(wanted[name])}",
                       "number of tapped layers or KV layout of the drafter (target_layer_ids, num_key_value_heads, head_dim)")
    check.findings = condensed(check.findings)
    return len(check.findings) == before


def _aliases(check: Check, context: ValidationContext, raw: dict, special: dict) -> bool:
    """Keys that engines read differently; whether the drafter belongs to this target."""
    window = special.get("swa_window_size") if special.get("use_swa") else None
    causal, layers = bool(special.get("causal", raw.get("is_causal", False))), raw.get("num_hidden_layers") or 0
    kind = "full_attention" if window is None else "sliding_attention"
    for key, expected, cause in (("sliding_window", window, WINDOW_CAUSE), ("layer_types", [kind] * layers, WINDOW_CAUSE),
                                 ("is_causal", causal, CAUSAL_CAUSE),
                                 ("block_size", special.get("block_size"), BLOCK_SIZE_CAUSE)):
        if raw.get(key) == expected:
            continue
        if context.ours:
            check.fail(f"dflash/config.json: {key}: {raw.get(key)!r}, dflash_config says {expected!r}", cause)
        elif not (key == "block_size" and key not in special):
            told = f"{raw[key]!r}, dflash_config says {expected!r}" if key in raw else "absent"
            check.notes.append(f"dflash/config.json: {key} {told}: {READ_AS[key].format(window=window)}")
    _rotary_and_positions(check, context, raw, special)
    depth = context.config.num_hidden_layers
    for key, where, own in (("num_target_layers", raw, depth), ("num_target_layers", special, depth),
                            ("hidden_size", raw, context.config.hidden_size)):
        if where.get(key, own) != own:
            check.fail(f"dflash/config.json: {key}: {where[key]}, the target has {own}", OTHER_CAUSE)
    if raw.get("vocab_size", context.config.vocab_size) != context.config.vocab_size:
        check.notes.append(f"dflash/config.json: vocab_size {raw['vocab_size']}, the target has {context.config.vocab_size} "
                           "(harmless: the head is the target's)")
    last = depth - 1
    wrong = [i for i in special.get("target_layer_ids", []) if not 0 <= i <= last]
    if wrong:
        check.fail(f"dflash_config.target_layer_ids: layer {wrong[0]}, expected 0 to {last}",
                   "taps are off by one: an id i means the output of decoder layer i, counted from 0")
    return not wrong and raw.get("hidden_size") == context.config.hidden_size


def _rotary_and_positions(check: Check, context: ValidationContext, raw: dict, special: dict) -> None:
    base = special.get("backbone_rotary_base")
    theta = raw.get("rope_theta", (raw.get("rope_parameters") or {}).get("rope_theta"))
    if base is not None and theta != base:
        said = f"dflash/config.json: rope_theta {theta}, dflash_config.backbone_rotary_base {base}"
        if context.ours:
            context.suspicions.append((said, "wrong rotary base of the drafter: it is the backbone's"))
        else:
            check.notes.append(f"{said}: the drafter rotates with {base:g} (this runtime, ik_llama.cpp and engines patched for "
                               f"this family do); vLLM and SGLang take rope_parameters, made of rope_theta ({theta})")
    trained, reached = raw.get("max_position_embeddings"), context.config.max_position_embeddings
    if isinstance(trained, int) and trained < reached:
        check.notes.append(f"dflash/config.json: max_position_embeddings {trained}, the target has {reached}: {LENGTH_CAUSE}")


def _mask(check: Check, context: ValidationContext, files: TensorFiles, folder: Path, special: dict) -> bool:
    try:
        token, vector = read_mask(folder / MASK_FILE)
    except (OSError, ValueError) as error:
        check.fail(first_line(error, context.folder), MASK_CAUSE)
        return False
    if token != special.get("mask_token_id"):
        check.fail(f"dflash/{MASK_FILE}: mask_token_id {token}, dflash_config has {special.get('mask_token_id')}", MASK_CAUSE)
        return False
    vector = vector.float()
    if tuple(vector.shape) != (context.config.hidden_size,) or not bool(torch.isfinite(vector).all()):
        check.fail(f"dflash/{MASK_FILE}: {list(vector.shape)}, expected {context.config.hidden_size} finite numbers",
                   MASK_CAUSE)
        return False
    if token >= context.config.vocab_size:
        check.fail(f"dflash/{MASK_FILE}: mask_token_id {token}, expected 0 to {context.config.vocab_size - 1}", MASK_CAUSE)
        return False
    table = files.read("model.embed_tokens.weight").float() if context.loadable else vector[None].expand(token + 1, -1)
    row = table[token]
    elsewhere = torch.nonzero((table == vector).all(1)).flatten().tolist() if bool(vector.any()) else []
    if elsewhere and token not in elsewhere:
        check.fail(f"mask_token_id {token}, but vocabulary row {elsewhere[0]} is the embedding of {MASK_FILE}", MASK_ID_CAUSE)
    if not bool(vector.any()):
        context.suspicions.append((f"dflash/{MASK_FILE}: the embedding is all zero", MASK_CAUSE))
    elif not torch.equal(row, vector):
        said = f"vocabulary row {token} is not the embedding of {MASK_FILE}"
        if context.ours:
            context.suspicions.append((said, MASK_CAUSE))
        else:
            check.notes.append(f"{said}: engines must read the file (this runtime, vLLM and SGLang do)")
    return True


def _read_reference(check: Check, context: ValidationContext, path: Path, special: dict) -> None:
    try:
        with safe_open(str(path), framework="pt") as file:
            context.reference = {key: file.get_tensor(key) for key in file.keys()}
            context.reference_info = json.loads((file.metadata() or {}).get("reference", "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        check.fail(f"dflash/{path.name}: {str(error).splitlines()[0]}", "the stored reference is damaged")
        context.reference = None
        return
    wanted = {"input_ids": 2, "taps": 4, "draft_hidden": 3, "draft_logits": 3}
    bad = [n for n, dims in wanted.items() if n not in context.reference or context.reference[n].ndim != dims]
    if bad or not isinstance(context.reference_info, dict):
        check.fail(f"dflash/{path.name}: {bad[0] if bad else 'its metadata'}: missing or of another form",
                   "the stored reference is damaged")
        context.reference, context.reference_info = None, {}
        return
    rows, block = context.reference["draft_hidden"].shape[1], special.get("block_size", rows_of_raw(context))
    if rows != block:
        check.fail(f"dflash_config.block_size {block}, the stored reference drafts {rows} positions", BLOCK_SIZE_CAUSE)
    stored = context.reference_info.get("target_layer_ids")
    if stored is not None and stored != special.get("target_layer_ids"):
        check.fail(f"dflash_config.target_layer_ids {special.get('target_layer_ids')}, the stored reference has {stored}",
                   TAP_CAUSE if sorted(stored) != sorted(special.get("target_layer_ids")) else
                   "tapped layers are in another order (target_layer_ids): the features are concatenated in this order")


def rows_of_raw(context: ValidationContext) -> int:
    """The block size of the top level, where dflash_config has none."""
    return context.drafter_config.get("block_size")
