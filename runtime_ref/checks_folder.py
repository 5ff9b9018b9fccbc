"""Check 1: is the folder what the format says? Names, shapes, dtypes, scale bytes, sidecar, dialects of the drafter.

What is certainly wrong fails here, with the port bug that it looks like. What is merely odd (sinks that are all zero, a
vocabulary row that is not the mask embedding) is a suspicion: it counts if the stored reference outputs disagree, and a
grave one also if there are none.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from modeling.load import TensorFiles
from modeling.names import fused_name, published_tensors
from mxfp4.format import BLOCK_SIZE, E8M0_NAN
from runtime_ref.checks_drafter import check_drafter
from runtime_ref.facts import (
    DTYPE_CAUSE,
    FINITE_CAUSE,
    INCOMPLETE_CAUSE,
    Facts,
    Wrong,
    condensed,
    first_line,
    own_object,
    read_object,
)
from runtime_ref.verdict import Check
from runtime_ref.weights import drafter_folder, read_config

# Keys of other families that change what runs, and what a client that honours them would do wrong.
FOREIGN_KEYS = {
    "swiglu_limit": "SwiGLU is clamped as in gpt-oss: MiMo-V2's experts have no clamp",
    "swiglu_alpha": "SwiGLU of gpt-oss (alpha, clamp): MiMo-V2's experts use plain SiLU",
    "n_shared_experts": "shared experts: MiMo-V2 has none",
    "final_logit_softcapping": "logits are capped: MiMo-V2 has no cap",
}
SINK_CAUSE = "attention sinks are dropped: every window layer has one learned logit per head (attention_sink_bias)"
SINK_LAYER_CAUSE = ("attention sinks are on other layers than the configuration says (hybrid_layer_pattern, "
                    "add_swa_attention_sink_bias, add_full_attention_sink_bias)")
SCALE_CAUSE = "scale bytes are read as numbers: scales must be uint8 (E8M0), called weight_scale; a byte b means 2^(b - 127)"
BLOCK_CAUSE = "scales are of blocks of another size: MXFP4 has one scale byte for 32 values (NVFP4 has one for 16)"
TIED_CAUSE = "tie_word_embeddings is true although the head is a matrix of its own: engines would use the embedding for it"
BIAS_CAUSE = "the routers' correction bias was rounded: it decides which experts run and is published in float32"
COPIES_CAUSE = "experts of a layer are copies of each other: the exporter wrote one expert under several names"
INDEX_CAUSE = "index and shards do not fit each other: one of them is of another export"
TRUNCATED_CAUSE = "a weight file is damaged or truncated: the download or the copy broke off"
LAYOUTS = {"compressed-tensors": "the compressed-tensors layout", "mxfp4": "the gpt-oss layout", "fp8": "the hf-fp8 layout"}


def check_folder(folder: Path) -> tuple[Check, Facts]:
    """The check and what it learned; never raises for a bad folder."""
    check, facts = Check("folder", "schema, inventory, dtypes, scale range, sidecar, sinks, taps"), Facts(folder)
    try:
        facts.raw = read_object(folder / "config.json")
        facts.config = _geometry(folder, facts.raw)
        _config(check, facts)
        infos = _infos(folder)
        files = TensorFiles(folder)
    except Wrong as error:
        facts.loadable = False
        check.fail(str(error), error.cause)
        return check, facts
    except (ValueError, OSError, SafetensorError) as error:
        facts.loadable = False
        check.fail(first_line(error, folder), INCOMPLETE_CAUSE)
        return check, facts
    _inventory(check, facts, infos)
    if facts.loadable:
        _contents(check, facts, files, infos)
        _sinks(facts, files, infos)
    dflash = drafter_folder(folder)
    if dflash is not None:
        facts.drafter_loadable = check_drafter(check, facts, files, dflash)
    elif (folder / "dflash").is_dir():
        check.fail("dflash/config.json is missing", "the drafter's folder is incomplete")
    elif own_object(folder / "export.json").get("drafter") is True:
        check.fail("dflash/ is missing, export.json says that there is a drafter", "the drafter's folder is incomplete")
    else:
        check.notes.append("no drafter (dflash/): decoding is plain")
    check.findings = condensed(check.findings)
    check.numbers |= {"tensors": len(infos), "drafter": dflash is not None, "stored reference": facts.reference is not None}
    return check, facts


def _geometry(folder: Path, raw: dict):
    """The configuration of a native folder.

    Raises:
        Wrong: another layout or family, or a geometry that cannot be.
    """
    stored = raw.get("quantization_config")
    if stored is not None and not isinstance(stored, dict):
        raise Wrong(f"config.json: quantization_config: {type(stored).__name__}, expected an object",
                    INCOMPLETE_CAUSE)
    try:
        return read_config(folder)[0]
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        if raw.get("model_type") == "mimo_v2":
            raise Wrong(first_line(error, folder), "config.json describes a model that cannot be") from None
    method = (stored or {}).get("quant_method")
    raise Wrong(f"config.json: model_type {raw.get('model_type')!r}, quant_method {method!r}: "
                f"{LAYOUTS.get(method, 'no layout that is known here')}; expected 'mimo_v2', the native layout",
                "another layout than the native one: export it with --layout native to validate it")


def _config(check: Check, facts: Facts) -> None:
    stored = facts.raw.get("quantization_config") or {}
    if stored.get("mxfp4_block_size", BLOCK_SIZE) != BLOCK_SIZE:
        check.fail(f"config.json: quantization_config.mxfp4_block_size: {stored['mxfp4_block_size']}, expected {BLOCK_SIZE}",
                   BLOCK_CAUSE)
    for key, expected in (("quant_method", "fp8"), ("store_dtype", "mxfp4")):
        if stored.get(key) != expected:
            check.fail(f"config.json: quantization_config.{key}: {stored.get(key)!r}, expected {expected!r}",
                       "engines take the experts for another format: quant_method fp8 with store_dtype mxfp4 marks them")
    for key, cause in FOREIGN_KEYS.items():
        if facts.raw.get(key) not in (None, 0, 0.0):
            check.fail(f"config.json: {key}: {facts.raw[key]}, expected no such key", cause)


def _infos(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """name -> (shape, dtype) of every tensor, from the files' headers.

    Raises:
        Wrong: an index and shards that do not fit each other.
    """
    index = folder / "model.safetensors.index.json"
    listed = None
    if index.is_file():
        listed = read_object(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(v, str) for v in listed.values()):
            raise Wrong(f"{index.name}: no weight_map (tensor name to file name)", INDEX_CAUSE)
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for name in sorted(set(listed.values())) if listed is not None else ["model.safetensors"]:
        if not (folder / name).is_file():
            raise Wrong(f"shard {name} is missing, {index.name} lists it", "the folder is incomplete: a shard is missing")
        try:
            with safe_open(str(folder / name), framework="pt") as file:
                for key in file.keys():
                    part = file.get_slice(key)
                    if listed is not None and listed.get(key, name) == name or listed is None:
                        found[key] = tuple(part.get_shape()), part.get_dtype()
        except SafetensorError as error:
            raise Wrong(f"{name}: {str(error).splitlines()[0]}", TRUNCATED_CAUSE) from None
    if listed is not None:
        astray = sorted(set(listed) - set(found)), sorted(set(found) - set(listed))
        if astray[0]:
            raise Wrong(f"{index.name}: {astray[0][0]} is not in {listed[astray[0][0]]}", INDEX_CAUSE)
        if astray[1]:
            raise Wrong(f"{index.name} does not list {astray[1][0]}, a shard holds it", INDEX_CAUSE)
    return found


def _inventory(check: Check, facts: Facts, infos: dict) -> None:
    expected = {t.name: t for t in published_tensors(facts.config, experts="mxfp4", dense="bf16")}
    if not any("qkv_proj" in n for n in infos):
        expected = _split(expected, facts.config)
    if facts.config.tie_word_embeddings:
        if "lm_head.weight" in infos:
            facts.loadable = False
            check.fail("config.json: tie_word_embeddings: true, but lm_head.weight is there", TIED_CAUSE)
        expected.pop("lm_head.weight", None)
    for name, tensor in expected.items():
        if name not in infos:
            facts.loadable = False
            check.fail(f"{name} is missing", _missing_cause(name, infos, expected))
        else:
            _dtype_and_shape(check, facts, tensor, infos)
    extra = [n for n in infos if n not in expected and not n.startswith("model.mtp.") and n != "lm_head.weight"
             and not (n.endswith("_scale_inv") and infos.get(n.removesuffix("_scale_inv"), (0, ""))[1] == "F8_E4M3")]
    for name in sorted(extra)[:5]:
        facts.loadable = False
        check.fail(f"{name}: unknown tensor", SCALE_CAUSE if name.endswith("weight_scale_inv") else
                   SINK_LAYER_CAUSE if name.endswith("attention_sink_bias") else
                   "the folder holds tensors that this model does not have")
    check.findings = condensed(check.findings)


def _dtype_and_shape(check: Check, facts: Facts, tensor, infos: dict) -> None:
    name, (shape, dtype) = tensor.name, infos[tensor.name]
    if shape != tensor.shape:
        facts.loadable = False
        finer = name.endswith("_scale") and shape[:1] == tensor.shape[:1] and shape[1:] != tensor.shape[1:]
        check.fail(f"{name}: shape {list(shape)}, expected {list(tensor.shape)}",
                   BLOCK_CAUSE if finer else "the geometry of config.json is not that of the weights")
    if tensor.dtype == "U8" and dtype != "U8":
        facts.loadable = False
        check.fail(f"{name}: dtype {dtype}, expected U8", SCALE_CAUSE if name.endswith("_scale") else
                   "expert codes must be uint8 (two E2M1 codes a byte)")
    elif dtype == "F8_E4M3" and tensor.dtype == "BF16" and len(shape) == 2:
        if name + "_scale_inv" not in infos:
            facts.loadable = False
            check.fail(f"{name}_scale_inv is missing, {name} is F8_E4M3",
                       "FP8 weights without their scales: weight_scale_inv, one F32 for 128 x 128, must be there")
    elif name.endswith("e_score_correction_bias") and dtype != "F32":
        facts.explained = BIAS_CAUSE
        check.fail(f"{name}: dtype {dtype}, expected F32", BIAS_CAUSE)
    elif tensor.dtype in ("BF16", "F32") and dtype not in ("BF16", "F32"):
        facts.loadable &= dtype == "F16"
        facts.explained = DTYPE_CAUSE
        check.fail(f"{name}: dtype {dtype}, expected {tensor.dtype}", DTYPE_CAUSE)


def _missing_cause(name: str, infos: dict, expected: dict) -> str:
    if name.endswith("attention_sink_bias"):
        elsewhere = any(n.endswith("attention_sink_bias") and n not in expected for n in infos)
        return SINK_LAYER_CAUSE if elsewhere else SINK_CAUSE
    if name.endswith("_scale"):
        return SCALE_CAUSE
    return "the folder is incomplete: a tensor is missing"


def _split(expected: dict, config) -> dict:
    """The inventory with separate q, k and v."""
    import copy

    split = copy.copy(config)
    split.attention_projection_layout = "split"
    return {t.name: t for t in published_tensors(split, experts="mxfp4", dense="bf16")}


def _contents(check: Check, facts: Facts, files: TensorFiles, infos: dict) -> None:
    """One pass over all tensors: finite numbers, scale bytes, the block invariant, experts that are copies."""
    low, high, blocks, odd = 255, 0, 0, 0
    seen: dict[tuple, str] = {}
    for name in files:
        if name.startswith("model.mtp."):
            continue
        if fused_name(name) is None:
            if infos[name][1] not in ("U8", "F8_E4M3") and not bool(torch.isfinite(files.read(name)).all()):
                facts.loadable = False  # whatever is computed with it is not finite either
                check.fail(f"{name}: not finite at index {_first_odd(files.read(name))}", FINITE_CAUSE)
            continue
        codes, scales = files.read(name), files.read(name + "_scale")
        low, high = min(low, int(scales.min())), max(high, int(scales.max()))
        if int(scales.max()) == E8M0_NAN:
            check.fail(f"{name}_scale: a scale byte is 255 (NaN)", "a block of an expert was not finite when it was exported")
        elif not 60 <= int(scales.max()) <= 136:
            check.fail(f"{name}_scale: bytes reach {int(scales.max())} (2^{int(scales.max()) - 127}), expected weights of "
                       "ordinary size", SCALE_CAUSE)
        magnitudes = torch.maximum(codes & 7, (codes >> 4) & 7).view(-1, BLOCK_SIZE // 2).amax(1)
        used = magnitudes > 0
        blocks += int(used.sum())
        odd += int((used & (magnitudes < 6)).sum())
        _note_copy(check, facts, seen, name, codes)
    check.numbers |= {"lowest scale byte": low, "highest scale byte": high}
    if blocks and odd / blocks > 0.2:
        facts.suspicions.append((f"{odd} of {blocks} blocks have a largest value below 4 units",
                                 "scales and codes do not belong together, or the scale rule is not floor or even", False))


def _note_copy(check: Check, facts: Facts, seen: dict[tuple, str], name: str, codes: torch.Tensor) -> None:
    """Two experts with the same codes, or one without any: nothing that was trained has that."""
    if not bool(codes.any()):
        check.notes.append(f"{name}: all codes are zero")
        return
    fused = fused_name(name)
    key = fused[0], fused[2], hashlib.blake2b(codes.numpy().tobytes(), digest_size=16).digest()
    if key in seen:
        check.fail(f"{name} has the codes of {seen[key]}", COPIES_CAUSE)
        facts.explained = COPIES_CAUSE
    seen.setdefault(key, name)


def _first_odd(tensor: torch.Tensor) -> list[int]:
    return torch.nonzero(~torch.isfinite(tensor))[0].tolist()


def _sinks(facts: Facts, files: TensorFiles, infos: dict) -> None:
    sinks = [n for n in infos if n.endswith("attention_sink_bias") and not n.startswith("model.mtp.")]
    if sinks and not any(bool(files.read(n).any()) for n in sinks):
        facts.suspicions.append(("all attention sinks of the target are zero", SINK_CAUSE, True))
