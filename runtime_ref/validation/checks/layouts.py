"""Check 1 for folders of other models: Qwen3-MoE in the compressed-tensors layout, gpt-oss in its own.

What must be there is the layout's inventory (`checkpoint.inventory`). Dense tensors are published in BF16; F32 holds the same
values, F16 does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from checkpoint.inventory import configuration, expected_inventory, layout_of
from checkpoint.tensor_files import TensorFiles
from mxfp4.format import BLOCK_SIZE
from runtime_ref.validation.checks.tensors import Matrix, look_at_blocks, look_at_numbers
from runtime_ref.validation.context import DTYPE_CAUSE, ValidationContext, condensed
from runtime_ref.validation.result import Check

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


def scale_cause(family: str) -> str:
    name = "_scales" if family == "gpt_oss" else "weight_scale"
    return f"scale bytes are read as numbers: scales must be uint8 (E8M0), called {name}; a byte b means 2^(b - 127)"


def check_layout(check: Check, context: ValidationContext, files: TensorFiles, infos: dict) -> None:
    """Adds what is wrong with a folder of another layout to the check of the folder."""
    _section(check, context)
    settings = configuration(context.raw)
    inventory = expected_inventory(layout_of(context.raw), context.raw, settings, {n: d for n, (_, d) in infos.items()})
    expected = {n: (tuple(shape), "U8" if dtypes == {"U8"} else "BF16") for n, (shape, dtypes) in inventory.items()
                if n != "lm_head.weight" or not context.config.tie_word_embeddings}
    _inventory(check, context, infos, expected)
    if context.loadable:
        look_at_numbers(check, context, files, infos, [n for n, (_, dtype) in expected.items() if dtype != "U8"])
        look_at_blocks(check, context, _matrices(files, infos), scale_cause(context.family))
        sinks = [n for n in infos if n.endswith("self_attn.sinks")]
        if sinks and not any(bool(files.read(n).any()) for n in sinks):
            context.suspicions.append(("all attention sinks are zero", MISSING["sinks"]))


def _section(check: Check, context: ValidationContext) -> None:
    """The quantization section, as far as it says what the bytes mean (format and method were looked at before)."""
    section = context.raw["quantization_config"]
    if context.family == "gpt_oss":
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
        check.fail(f"{name}: unknown tensor", scale_cause(context.family) if "_scale" in name else
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
        check.fail(f"{name}: dtype {own_dtype}, expected U8", scale_cause(context.family) if scale else
                   "expert codes must be uint8 (two E2M1 codes a byte)")
    elif dtype == "BF16" and own_dtype not in ("BF16", "F32"):
        context.loadable &= own_dtype == "F16"
        context.explained = DTYPE_CAUSE
        check.fail(f"{name}: dtype {own_dtype}, expected BF16", DTYPE_CAUSE)


def _missing_cause(family: str, name: str) -> str:
    if name.endswith(("_scale", "_scales")):
        return scale_cause(family)
    return next((cause for end, cause in MISSING.items() if name.endswith(end)), MISSING_CAUSE)


def _matrices(files: TensorFiles, infos: dict) -> Iterator[Matrix]:
    """The packed experts; of gpt-oss one expert of a fused tensor at a time."""
    for name in infos:
        if name.endswith(".weight_packed"):
            scale, layer = name.removesuffix("_packed") + "_scale", re.sub(r"\.experts\.\d+\.", ".experts.", name)
            yield Matrix(name, scale, (layer,), files.read(name), files.read(scale))
        elif name.endswith("_proj_blocks"):
            scale = name.removesuffix("_blocks") + "_scales"
            blocks, scales = files.read(name), files.read(scale)
            for e in range(blocks.shape[0]):
                yield Matrix(f"{name}[{e}]", f"{scale}[{e}]", (name,), blocks[e].flatten(1), scales[e])
