"""Check 1: is the folder what the format says? Names, shapes, dtypes, scale bytes, sidecar, dialects of the drafter.

What is certainly wrong fails here, with the port bug that it looks like. What is merely odd (sinks that are all zero, a
vocabulary row that is not the mask embedding) is a suspicion: it is wrong if outputs disagree with a reference, and a note
otherwise. What only this project's exporter promises is demanded of its folders alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from checkpoint.families.geometry import Geometry, NotHeld
from checkpoint.tensor_files import TensorFiles
from modeling.names import fused_name, published_tensors
from mxfp4.format import BLOCK_SIZE
from runtime_ref.checkpoints.folder import drafter_folder, read_geometry
from runtime_ref.validation.checks.drafter import REFERENCE, check_drafter
from runtime_ref.validation.checks.layouts import check_layout
from runtime_ref.validation.checks.tensors import SCALE_CAUSE, Matrix, look_at_blocks, look_at_numbers
from runtime_ref.validation.context import (
    DTYPE_CAUSE,
    INCOMPLETE_CAUSE,
    ValidationContext,
    Wrong,
    condensed,
    first_line,
    own_object,
    read_object,
)
from runtime_ref.validation.quantities import Number
from runtime_ref.validation.result import Check

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
BLOCK_CAUSE = "scales are of blocks of another size: MXFP4 has one scale byte for 32 values (NVFP4 has one for 16)"
TIED_CAUSE = "tie_word_embeddings is true although the head is a matrix of its own: engines would use the embedding for it"
BIAS_CAUSE = "the routers' correction bias was rounded: it decides which experts run and is published in float32"
INDEX_CAUSE = "index and shards do not fit each other: one of them is of another export"
TRUNCATED_CAUSE = "a weight file is damaged or truncated: the download or the copy broke off"


def check_folder(check: Check, context: ValidationContext) -> None:
    """Adds what is wrong with the folder to `check`, and what later checks need to `context`.

    Raises:
        NotHeld: a folder of a model or layout that the engine does not run.
    """
    folder = context.folder
    context.loadable = False
    try:
        context.raw = read_object(folder / "config.json")
        infos = _infos(folder)
        _refuse_oversize(context.raw, infos)
        context.config = _geometry(folder, context.raw)
        context.family = context.raw["model_type"]
        context.ours = any((folder / name).is_file() for name in ("export.json", f"dflash/{REFERENCE}"))
        if not isinstance(context.config, Geometry):
            _config(check, context)
        files = TensorFiles(folder)
    except Wrong as error:
        check.fail(str(error), error.cause)
        return
    except NotHeld:
        raise
    except (ValueError, OSError, SafetensorError) as error:
        check.fail(first_line(error, folder), INCOMPLETE_CAUSE)
        return
    context.loadable = True
    if isinstance(context.config, Geometry):
        check_layout(check, context, files, infos)
    else:
        _native(check, context, files, infos)
    dflash = drafter_folder(folder)
    if dflash is not None:
        context.drafter_loadable = check_drafter(check, context, files, dflash)
    elif (folder / "dflash").is_dir():
        check.fail("dflash/config.json is missing", "the drafter's folder is incomplete")
    elif own_object(folder / "export.json").get("drafter") is True:
        check.fail("dflash/ is missing, export.json says that there is a drafter", "the drafter's folder is incomplete")
    else:
        check.notes.append("no drafter (dflash/): decoding is plain")
    check.findings = condensed(check.findings)
    check.measure(Number.TENSORS, len(infos))
    check.measure(Number.DRAFTER, dflash is not None)
    check.measure(Number.STORED_REFERENCE, context.reference is not None)


def _refuse_oversize(raw: dict, infos: dict) -> None:
    """Refuses sizes beyond what the files hold, before anything of that size is made.

    Raises:
        Wrong.
    """
    experts = () if raw.get("model_type") == "gpt_oss" else ("n_routed_experts", "num_experts")
    for key in ("num_hidden_layers", *experts):
        value = raw.get(key)
        if isinstance(value, int) and value > len(infos):
            raise Wrong(f"config.json: {key}: {value}, but the files hold {len(infos)} tensors",
                        "config.json describes a model that cannot be")


def _native(check: Check, context: ValidationContext, files: TensorFiles, infos: dict) -> None:
    _inventory(check, context, infos)
    if context.loadable:
        plain = [n for n in files if not n.startswith("model.mtp.") and fused_name(n) is None]
        look_at_numbers(check, context, files, infos, plain)
        look_at_blocks(check, context, _matrices(files))
        _sinks(context, files, infos)


def _geometry(folder: Path, raw: dict):
    """The configuration of a folder that the engine runs.

    Raises:
        Wrong: a geometry that cannot be. NotHeld.
    """
    stored = raw.get("quantization_config")
    if stored is not None and not isinstance(stored, dict):
        raise Wrong(f"config.json: quantization_config: {type(stored).__name__}, expected an object",
                    INCOMPLETE_CAUSE)
    try:
        return read_geometry(folder)[0]
    except NotHeld:
        raise
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise Wrong(first_line(error, folder), "config.json describes a model that cannot be") from None


def _config(check: Check, context: ValidationContext) -> None:
    stored = context.raw.get("quantization_config") or {}
    if stored.get("mxfp4_block_size", BLOCK_SIZE) != BLOCK_SIZE:
        check.fail(f"config.json: quantization_config.mxfp4_block_size: {stored['mxfp4_block_size']}, expected {BLOCK_SIZE}",
                   BLOCK_CAUSE)
    for key, expected in (("quant_method", "fp8"), ("store_dtype", "mxfp4")):
        if stored.get(key) != expected:
            check.fail(f"config.json: quantization_config.{key}: {stored.get(key)!r}, expected {expected!r}",
                       "engines take the experts for another format: quant_method fp8 with store_dtype mxfp4 marks them")
    for key, cause in FOREIGN_KEYS.items():
        if context.raw.get(key) not in (None, 0, 0.0):
            check.fail(f"config.json: {key}: {context.raw[key]}, expected no such key", cause)


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
            raise Wrong(f"{index.name}: {astray[0][0]} is not in {listed[astray[0][0]]}",
                        f"{INDEX_CAUSE}, or a tensor was dropped")
        if astray[1]:
            raise Wrong(f"{index.name} does not list {astray[1][0]}, a shard holds it", INDEX_CAUSE)
    return found


def _inventory(check: Check, context: ValidationContext, infos: dict) -> None:
    expected = {t.name: t for t in published_tensors(context.config, experts="mxfp4", dense="bf16")}
    if not any("qkv_proj" in n for n in infos):
        expected = _split(expected, context.config)
    if context.config.tie_word_embeddings:
        if "lm_head.weight" in infos:
            context.loadable = False
            check.fail("config.json: tie_word_embeddings: true, but lm_head.weight is there", TIED_CAUSE)
        expected.pop("lm_head.weight", None)
    for name, tensor in expected.items():
        if name not in infos:
            context.loadable = False
            check.fail(f"{name} is missing", _missing_cause(name, infos, expected))
        else:
            _dtype_and_shape(check, context, tensor, infos)
    extra = [n for n in infos if n not in expected and not n.startswith("model.mtp.") and n != "lm_head.weight"
             and not (n.endswith("_scale_inv") and infos.get(n.removesuffix("_scale_inv"), (0, ""))[1] == "F8_E4M3")]
    for name in sorted(extra)[:5]:
        context.loadable = False
        check.fail(f"{name}: unknown tensor", SCALE_CAUSE if name.endswith("weight_scale_inv") else
                   SINK_LAYER_CAUSE if name.endswith("attention_sink_bias") else
                   "the folder holds tensors that this model does not have")
    check.findings = condensed(check.findings)


def _dtype_and_shape(check: Check, context: ValidationContext, tensor, infos: dict) -> None:
    name, (shape, dtype) = tensor.name, infos[tensor.name]
    if shape != tensor.shape:
        context.loadable = False
        finer = name.endswith("_scale") and shape[:1] == tensor.shape[:1] and shape[1:] != tensor.shape[1:]
        check.fail(f"{name}: shape {list(shape)}, expected {list(tensor.shape)}",
                   BLOCK_CAUSE if finer else "the geometry of config.json is not that of the weights")
    if tensor.dtype == "U8" and dtype != "U8":
        context.loadable = False
        check.fail(f"{name}: dtype {dtype}, expected U8", SCALE_CAUSE if name.endswith("_scale") else
                   "expert codes must be uint8 (two E2M1 codes a byte)")
    elif dtype == "F8_E4M3" and tensor.dtype == "BF16" and len(shape) == 2:
        if name + "_scale_inv" not in infos:
            context.loadable = False
            check.fail(f"{name}_scale_inv is missing, {name} is F8_E4M3",
                       "FP8 weights without their scales: weight_scale_inv, one F32 for 128 x 128, must be there")
    elif name.endswith("e_score_correction_bias") and dtype != "F32":
        context.explained = BIAS_CAUSE
        check.fail(f"{name}: dtype {dtype}, expected F32", BIAS_CAUSE)
    elif tensor.dtype in ("BF16", "F32") and dtype not in ("BF16", "F32"):
        context.loadable &= dtype == "F16"
        context.explained = DTYPE_CAUSE
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


def _matrices(files: TensorFiles) -> Iterator[Matrix]:
    """The packed experts of a native folder."""
    for name in files:
        fused = None if name.startswith("model.mtp.") else fused_name(name)
        if fused is not None:
            yield Matrix(name, name + "_scale", (fused[0], fused[2]), files.read(name), files.read(name + "_scale"))


def _sinks(context: ValidationContext, files: TensorFiles, infos: dict) -> None:
    sinks = [n for n in infos if n.endswith("attention_sink_bias") and not n.startswith("model.mtp.")]
    if sinks and not any(bool(files.read(n).any()) for n in sinks):
        context.suspicions.append(("all attention sinks of the target are zero", SINK_CAUSE))
