"""Check 1 for folders of other models: Qwen3-MoE in the compressed-tensors layout, gpt-oss in its own.

What must be there is asked of transformers' class of the model, built without weights: its parameters are the inventory, and
the layout says under which names an expert tensor is stored (codes and scales). Dense tensors are published in BF16; F32 holds
the same values, F16 does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from checkpoint.tensor_files import TensorFiles
from modeling.names import fused_name
from mxfp4.format import BLOCK_SIZE
from runtime_ref.validation.checks.tensors import Matrix, look_at_blocks, look_at_numbers
from runtime_ref.validation.context import DTYPE_CAUSE, ValidationContext, condensed, quiet
from runtime_ref.validation.result import Check

FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
SCALE_CAUSES = {family: f"scale bytes are read as numbers: scales must be uint8 (E8M0), called {name}; a byte b means "
                "2^(b - 127)" for family, name in (("qwen3_moe", "weight_scale"), ("gpt_oss", "_scales"))}
OTHER_LAYOUT_CAUSE = "the tensors are of another layout than config.json says"
BLOCK_CAUSE = "scales are of blocks of another size: MXFP4 has one scale byte for 32 values (NVFP4 has one for 16)"
GEOMETRY_CAUSE = "the geometry of config.json is not that of the weights"
MISSING_CAUSE = "the folder is incomplete: a tensor is missing"
MISSING = {"sinks": "attention sinks are dropped: every layer has one learned logit per head (self_attn.sinks)",
           "q_norm.weight": "the norms of query and key heads are dropped (q_norm, k_norm)",
           "k_norm.weight": "the norms of query and key heads are dropped (q_norm, k_norm)",
           "router.bias": "the routers' bias is dropped (router.bias)",
           "proj_bias": "biases of the experts are dropped (gate_up_proj_bias, down_proj_bias)",
           "proj.bias": "biases of the attention's projections are dropped (attention_bias)"}
# weights section of compressed-tensors that makes four-bit floats with one power of two for 32 of them.
MXFP4_SCHEME = {"num_bits": 4, "type": "float", "group_size": BLOCK_SIZE, "symmetric": True}


def expected_tensors(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """name -> (shape, dtype) of every tensor of a folder, from its config.json."""
    with quiet():
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(str(folder))
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    found = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        match = FUSED.fullmatch(name)
        if match is None:
            found[name] = tuple(tensor.shape), "BF16"
        else:
            found |= _stored(config.model_type, name, match, tuple(tensor.shape))
    return found


def _stored(family: str, name: str, match: re.Match, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], str]]:
    """A fused expert tensor as its layout stores it."""
    if family == "gpt_oss":
        experts, inner, outer = shape
        grid = experts, outer, inner // BLOCK_SIZE
        return {f"{name}_blocks": ((*grid, BLOCK_SIZE // 2), "U8"), f"{name}_scales": (grid, "U8")}
    experts, rows, columns = shape
    kinds = ("down",) if match[2] == "down_proj" else ("gate", "up")
    rows //= len(kinds)
    own = [f"{match[1]}.{e}.{kind}_proj.weight" for e in range(experts) for kind in kinds]
    return {f"{n}_packed": ((rows, columns // 2), "U8") for n in own} | {
        f"{n}_scale": ((rows, columns // BLOCK_SIZE), "U8") for n in own}


def check_layout(check: Check, context: ValidationContext, files: TensorFiles, infos: dict) -> None:
    """Adds what is wrong with a folder of another layout to the check of the folder."""
    _section(check, context)
    expected = expected_tensors(context.folder)
    _inventory(check, context, infos, expected)
    if context.loadable:
        look_at_numbers(check, context, files, infos, [n for n, (_, dtype) in expected.items() if dtype != "U8"])
        look_at_blocks(check, context, _matrices(files, infos), SCALE_CAUSES[context.family])
        sinks = [n for n in infos if n.endswith("self_attn.sinks")]
        if sinks and not any(bool(files.read(n).any()) for n in sinks):
            context.suspicions.append(("all attention sinks are zero", MISSING["sinks"]))


def _section(check: Check, context: ValidationContext) -> None:
    """The quantization section, as far as it says what the bytes mean (format and method were looked at before)."""
    section = context.raw["quantization_config"]
    if context.family != "qwen3_moe":
        return
    groups = section.get("config_groups")
    schemes = [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    if not schemes:
        check.fail("config.json: quantization_config.config_groups: no group, expected one with the experts' scheme",
                   "engines do not know which tensors are packed: quantization_config.config_groups must name the experts")
    for scheme in schemes:
        for key, wanted in MXFP4_SCHEME.items():
            if not isinstance(scheme, dict) or scheme.get(key) != wanted:
                found = scheme.get(key) if isinstance(scheme, dict) else scheme
                check.fail(f"config.json: quantization_config.config_groups: weights.{key}: {found!r}, expected {wanted!r}",
                           BLOCK_CAUSE if key == "group_size" else
                           "engines take the experts for another format: MXFP4 is 4-bit floats in groups of 32")


def _inventory(check: Check, context: ValidationContext, infos: dict, expected: dict) -> None:
    packed = [n for n, (_, dtype) in expected.items() if dtype == "U8"]
    if packed and not any(n in infos for n in packed):
        context.loadable = False
        check.fail(f"none of {len(packed)} packed expert tensors is there, the first {packed[0]}", OTHER_LAYOUT_CAUSE)
        return
    for name, (shape, dtype) in expected.items():
        if name not in infos:
            context.loadable = False
            check.fail(f"{name} is missing", _missing_cause(context.family, name))
        else:
            _shape_and_dtype(check, context, name, (shape, dtype), infos[name])
    for name in sorted(n for n in infos if n not in expected and n != "lm_head.weight")[:5]:
        context.loadable = False
        check.fail(f"{name}: unknown tensor", SCALE_CAUSES[context.family] if "_scale" in name else
                   "the folder holds tensors that this model does not have")
    check.findings = condensed(check.findings)


def _shape_and_dtype(check: Check, context: ValidationContext, name: str, expected: tuple, found: tuple) -> None:
    (shape, dtype), (own_shape, own_dtype) = expected, found
    scale = name.endswith(("_scale", "_scales"))
    if own_shape != shape:
        context.loadable = False
        finer = scale and own_shape[:-1] == shape[:-1]
        check.fail(f"{name}: shape {list(own_shape)}, expected {list(shape)}", BLOCK_CAUSE if finer else GEOMETRY_CAUSE)
    if dtype == "U8" and own_dtype != "U8":
        context.loadable = False
        check.fail(f"{name}: dtype {own_dtype}, expected U8", SCALE_CAUSES[context.family] if scale else
                   "expert codes must be uint8 (two E2M1 codes a byte)")
    elif dtype == "BF16" and own_dtype not in ("BF16", "F32"):
        context.loadable &= own_dtype == "F16"
        context.explained = DTYPE_CAUSE
        check.fail(f"{name}: dtype {own_dtype}, expected BF16", DTYPE_CAUSE)


def _missing_cause(family: str, name: str) -> str:
    if name.endswith(("_scale", "_scales")):
        return SCALE_CAUSES[family]
    return next((cause for end, cause in MISSING.items() if name.endswith(end)), MISSING_CAUSE)


def _matrices(files: TensorFiles, infos: dict) -> Iterator[Matrix]:
    """The packed experts; of gpt-oss one expert of a fused tensor at a time."""
    for name in infos:
        if name.endswith(".weight_packed"):
            fused, scale = fused_name(name.removesuffix("_packed")), name.removesuffix("_packed") + "_scale"
            yield Matrix(name, scale, (fused[0], fused[2]), files.read(name), files.read(scale))
        elif name.endswith("_proj_blocks"):
            scale = name.removesuffix("_blocks") + "_scales"
            blocks, scales = files.read(name), files.read(scale)
            for e in range(blocks.shape[0]):
                yield Matrix(f"{name}[{e}]", f"{scale}[{e}]", (name,), blocks[e].flatten(1), scales[e])
