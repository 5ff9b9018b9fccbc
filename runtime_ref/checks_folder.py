"""Check 1: is the folder what the format says? Names, shapes, dtypes, scale bytes, sidecar, dialects of the drafter.

What is certainly wrong fails here, with the port bug that it looks like. What is merely odd (sinks that are all zero, a
vocabulary row that is not the mask embedding) is a suspicion: it counts if the stored reference outputs disagree, and a
grave one also if there are none.
"""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from modeling.load import TensorFiles
from modeling.names import fused_name, published_tensors
from mxfp4.format import BLOCK_SIZE, E8M0_NAN
from runtime_ref.verdict import Check
from runtime_ref.weights import drafter_folder, read_config

REFERENCE = "dflash_reference.safetensors"
MASK_FILE = "mask_embedding.pt"
# Keys of other families that change what runs, and what a client that honours them would do wrong.
FOREIGN_KEYS = {
    "swiglu_limit": "SwiGLU is clamped as in gpt-oss: MiMo-V2's experts have no clamp",
    "swiglu_alpha": "SwiGLU of gpt-oss (alpha, clamp): MiMo-V2's experts use plain SiLU",
    "n_shared_experts": "shared experts: MiMo-V2 has none",
    "final_logit_softcapping": "logits are capped: MiMo-V2 has no cap",
}
SINK_CAUSE = "attention sinks are dropped: every window layer has one learned logit per head (attention_sink_bias)"
SCALE_CAUSE = "scale bytes are read as numbers: scales must be uint8 (E8M0), called weight_scale; a byte b means 2^(b - 127)"
MASK_CAUSE = "the mask embedding is missing: mask_embedding.pt must be there, the vocabulary row of the mask token is untrained"
HEAD_CAUSE = "the drafter has a head or embedding of its own: both are the target's, shared"


@dataclass
class Facts:
    """What later checks need of the folder.

    Attributes:
        suspicions: (finding, cause, grave) that count if nothing clears them.
        reference: tensors and facts of the stored worked example, if there is one.
    """

    folder: Path
    config: object = None
    raw: dict = field(default_factory=dict)
    drafter_config: dict = field(default_factory=dict)
    suspicions: list[tuple[str, str, bool]] = field(default_factory=list)
    reference: dict[str, torch.Tensor] | None = None
    reference_facts: dict = field(default_factory=dict)
    loadable: bool = True
    drafter_loadable: bool = False


def check_folder(folder: Path) -> tuple[Check, Facts]:
    """The check and what it learned; never raises for a bad folder."""
    check, facts = Check("folder", "schema, inventory, dtypes, scale range, sidecar, sinks, taps"), Facts(folder)
    try:
        facts.config, facts.raw = read_config(folder)
        _config(check, facts)
        files = TensorFiles(folder)
        infos = _infos(folder, files)
    except (ValueError, OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        facts.loadable = False
        check.fail(str(error).splitlines()[0], "the folder is incomplete or damaged")
        return check, facts
    _inventory(check, facts, infos)
    if facts.loadable:
        _scales(check, facts, files)
        _sinks(facts, files, infos)
    dflash = drafter_folder(folder)
    if dflash is not None:
        facts.drafter_loadable = _drafter(check, facts, files, dflash)
    elif (folder / "dflash").is_dir():
        check.fail("dflash/config.json is missing", "the drafter's folder is incomplete")
    check.numbers = {"tensors": len(infos), "drafter": dflash is not None, "stored reference": facts.reference is not None}
    return check, facts


def _config(check: Check, facts: Facts) -> None:
    stored = facts.raw.get("quantization_config") or {}
    for key, expected in (("quant_method", "fp8"), ("store_dtype", "mxfp4")):
        if stored.get(key) != expected:
            check.fail(f"config.json: quantization_config.{key}: {stored.get(key)!r}, expected {expected!r}",
                       "engines take the experts for another format: quant_method fp8 with store_dtype mxfp4 marks them")
    for key, cause in FOREIGN_KEYS.items():
        if facts.raw.get(key) not in (None, 0, 0.0):
            check.fail(f"config.json: {key}: {facts.raw[key]}, expected no such key", cause)


def _infos(folder: Path, files: TensorFiles) -> dict[str, tuple[tuple[int, ...], str]]:
    """name -> (shape, dtype) of every tensor, from the files' headers."""
    index = folder / "model.safetensors.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    found = {}
    for name in names:
        with safe_open(str(folder / name), framework="pt") as file:
            for key in file.keys():
                part = file.get_slice(key)
                found[key] = tuple(part.get_shape()), part.get_dtype()
    return found


def _inventory(check: Check, facts: Facts, infos: dict) -> None:
    expected = {t.name: t for t in published_tensors(facts.config, experts="mxfp4", dense="bf16")}
    if not any("qkv_proj" in n for n in infos):
        expected = _split(expected, facts.config)
    for name, tensor in expected.items():
        if name not in infos:
            facts.loadable = False
            check.fail(f"{name} is missing", _missing_cause(name, infos))
            continue
        shape, dtype = infos[name]
        if shape != tensor.shape:
            facts.loadable = False
            check.fail(f"{name}: shape {list(shape)}, expected {list(tensor.shape)}",
                       "the geometry of config.json is not that of the weights")
        if tensor.dtype == "U8" and dtype != "U8":
            facts.loadable = False
            check.fail(f"{name}: dtype {dtype}, expected U8", SCALE_CAUSE if name.endswith("_scale") else
                       "expert codes must be uint8 (two E2M1 codes a byte)")
    extra = [n for n in infos if n not in expected and not n.startswith("model.mtp.")
             and not (n.endswith("_scale_inv") and infos.get(n.removesuffix("_scale_inv"), (0, ""))[1] == "F8_E4M3")]
    for name in sorted(extra)[:5]:
        check.fail(f"{name}: unknown tensor", SCALE_CAUSE if name.endswith("weight_scale_inv") else
                   "the folder holds tensors that this model does not have")
    check.findings = _condensed(check.findings)


def _condensed(findings: list[str]) -> list[str]:
    """The first finding of each kind: layers and experts are one kind."""
    seen: dict[str, list[str]] = {}
    for finding in findings:
        seen.setdefault(re.sub(r"\d+", "N", finding), []).append(finding)
    return [group[0] + (f" (and {len(group) - 1} more like it)" if len(group) > 1 else "") for group in seen.values()]


def _missing_cause(name: str, infos: dict) -> str:
    if name.endswith("attention_sink_bias"):
        return SINK_CAUSE
    if name.endswith("_scale"):
        return SCALE_CAUSE
    return "the folder is incomplete: a tensor is missing"


def _split(expected: dict, config) -> dict:
    """The inventory with separate q, k and v."""
    import copy

    split = copy.copy(config)
    split.attention_projection_layout = "split"
    return {t.name: t for t in published_tensors(split, experts="mxfp4", dense="bf16")}


def _scales(check: Check, facts: Facts, files: TensorFiles) -> None:
    """Scale bytes and the block invariant: the largest code of a block means 4 or 6."""
    low, high, blocks, odd = 255, 0, 0, 0
    for name in files:
        if fused_name(name) is None:
            continue
        codes, scales = files.read(name), files.read(name + "_scale")
        low, high = min(low, int(scales.min())), max(high, int(scales.max()))
        magnitudes = torch.maximum(codes & 7, (codes >> 4) & 7).view(-1, BLOCK_SIZE // 2).amax(1)
        used = magnitudes > 0
        blocks += int(used.sum())
        odd += int((used & (magnitudes < 6)).sum())
    check.numbers |= {"lowest scale byte": low, "highest scale byte": high}
    if high == E8M0_NAN:
        check.fail("a scale byte is 255 (NaN)", "a block of an expert was not finite when it was exported")
    elif high > 136 or high < 60:
        check.fail(f"scale bytes reach {high} (2^{high - 127}), expected weights of ordinary size", SCALE_CAUSE)
    if blocks and odd / blocks > 0.2:
        facts.suspicions.append((f"{odd} of {blocks} blocks have a largest value below 4 units",
                                 "scales and codes do not belong together, or the scale rule is not floor or even", False))


def _sinks(facts: Facts, files: TensorFiles, infos: dict) -> None:
    sinks = [n for n in infos if n.endswith("attention_sink_bias") and not n.startswith("model.mtp.")]
    if sinks and not any(bool(files.read(n).any()) for n in sinks):
        facts.suspicions.append(("all attention sinks of the target are zero", SINK_CAUSE, True))


def _drafter(check: Check, facts: Facts, files: TensorFiles, folder: Path) -> bool:
    """Checks `dflash/`; whether the drafter can be loaded."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    special = raw.get("dflash_config") or {}
    facts.drafter_config = raw
    fine = _drafter_tensors(check, folder, raw)
    fine &= _dialects(check, facts, raw, special)
    if not (folder / MASK_FILE).is_file():
        check.fail("dflash/mask_embedding.pt is missing", MASK_CAUSE)
        fine = False
    else:
        fine &= _mask(check, facts, files, folder, special)
    if (folder / REFERENCE).is_file():
        _read_reference(check, facts, folder / REFERENCE, special)
    return fine


def _drafter_tensors(check: Check, folder: Path, raw: dict) -> bool:
    from transformers import Qwen3Config

    from modeling.drafter import DFlashDraftModel

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name == REFERENCE:
            continue
        try:
            with safe_open(str(file), framework="pt") as opened:
                found |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}
        except (SafetensorError, OSError) as error:
            check.fail(f"dflash/{file.name}: {str(error).splitlines()[0]}", "the drafter's folder is damaged")
            return False
    try:
        with torch.device("meta"):
            model = DFlashDraftModel(Qwen3Config.from_dict(dict(raw)))
    except (ValueError, KeyError, TypeError) as error:
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
    check.findings = _condensed(check.findings)
    return len(check.findings) == before


def _dialects(check: Check, facts: Facts, raw: dict, special: dict) -> bool:
    """Keys that engines read differently must all be there and agree; whether the tapped layers exist."""
    window = special.get("swa_window_size") if special.get("use_swa") else None
    causal, layers = bool(special.get("causal", raw.get("is_causal", False))), raw.get("num_hidden_layers") or 0
    window_cause = "wrong window of the drafter for some engines: they read different keys, which must agree"
    causal_cause = "wrong causality of the drafter for some engines: sliding layers count as causal unless is_causal is false"
    kind = "full_attention" if window is None else "sliding_attention"
    for key, expected, cause in (("sliding_window", window, window_cause), ("layer_types", [kind] * layers, window_cause),
                                 ("is_causal", causal, causal_cause), ("block_size", special.get("block_size"),
                                                                       "block size: one key says another than the other")):
        if raw.get(key) != expected:
            check.fail(f"dflash/config.json: {key}: {raw.get(key)!r}, dflash_config says {expected!r}", cause)
    base = special.get("backbone_rotary_base")
    theta = raw.get("rope_theta", (raw.get("rope_parameters") or {}).get("rope_theta"))
    if base is not None and theta != base:
        facts.suspicions.append((f"dflash/config.json: rope_theta {theta}, dflash_config.backbone_rotary_base {base}",
                                 "wrong rotary base of the drafter: it is the backbone's", True))
    last = facts.config.num_hidden_layers - 1
    wrong = [i for i in special.get("target_layer_ids", []) if not 0 <= i <= last]
    if wrong:
        check.fail(f"dflash_config.target_layer_ids: layer {wrong[0]}, expected 0 to {last}",
                   "taps are off by one: an id i means the output of decoder layer i, counted from 0")
    return not wrong


def _mask(check: Check, facts: Facts, files: TensorFiles, folder: Path, special: dict) -> bool:
    try:
        sidecar = torch.load(folder / MASK_FILE, weights_only=True)
        token, vector = int(sidecar["mask_token_id"]), sidecar["embedding"].float()
    except (OSError, RuntimeError, KeyError, TypeError, AttributeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        check.fail(f"dflash/{MASK_FILE}: {(str(error).splitlines() or ['unreadable'])[0]}", MASK_CAUSE)
        return False
    if token != special.get("mask_token_id"):
        check.fail(f"dflash/{MASK_FILE}: mask_token_id {token}, dflash_config has {special.get('mask_token_id')}", MASK_CAUSE)
        return False
    if tuple(vector.shape) != (facts.config.hidden_size,) or not bool(torch.isfinite(vector).all()):
        check.fail(f"dflash/{MASK_FILE}: {list(vector.shape)}, expected {facts.config.hidden_size} finite numbers", MASK_CAUSE)
        return False
    row = files.read("model.embed_tokens.weight")[token].float() if facts.loadable else vector
    if not bool(vector.any()):
        facts.suspicions.append((f"dflash/{MASK_FILE}: the embedding is all zero", MASK_CAUSE, True))
    elif not torch.equal(row, vector):
        facts.suspicions.append((f"vocabulary row {token} is not the embedding of {MASK_FILE}", MASK_CAUSE, False))
    return True


def _read_reference(check: Check, facts: Facts, path: Path, special: dict) -> None:
    try:
        with safe_open(str(path), framework="pt") as file:
            facts.reference = {key: file.get_tensor(key) for key in file.keys()}
            facts.reference_facts = json.loads((file.metadata() or {}).get("reference", "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        check.fail(f"dflash/{path.name}: {str(error).splitlines()[0]}", "the stored reference is damaged")
        facts.reference = None
        return
    stored = facts.reference_facts.get("target_layer_ids")
    if stored is not None and stored != special.get("target_layer_ids"):
        check.fail(f"dflash_config.target_layer_ids {special.get('target_layer_ids')}, the stored reference has {stored}",
                   "taps are off by one or of other layers: an id i means the output of decoder layer i, counted from 0")
