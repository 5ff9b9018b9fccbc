"""What each layout stores for a tensor: the same MXFP4 codes under the names and in the containers that a client reads.

    native               experts.E.X_proj.weight U8 + .weight_scale U8; the rest as in the base (SGLang, vLLM, runtime_ref,
                         and stock transformers through the shipped code). MiMo-V2 only
    hf-fp8               the same bytes as I8 + .weight_scale_inv U8; split q/k/v (stock transformers, mimo_v2_flash class)
    compressed-tensors   .weight_packed U8 + .weight_scale U8 (transformers, vLLM); Qwen3-MoE and what mimo_v2_flash holds
    gpt-oss              fused experts.X_proj_blocks U8 [E, out, in/32, 16] + _scales U8 [E, out, in/32]; gpt-oss only

Codes are made once, by `codes_of`; a layout only relabels them, so no weight is ever rounded twice. A layout whose client
cannot hold the geometry refuses with the reason.

A `Unit` is what is read and written together (one matrix with its scales). Its names, shapes and dtypes are known before
any weight is read; `make` reads and returns the tensors.

A bf16 base with a fused qkv is written with split projections in the native layout too: vLLM takes a fused qkv that is not
FP8 for [all queries | all keys | all values] and would load its chunks into the wrong rows without a word.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from checkpoint.fp8 import grid_shape, quantize_fp8
from checkpoint.sources import DTYPES, Source
from checkpoint.trained import Weights, codes_of, computed, encode, multiplied_out, plain
from modeling.names import PublishedTensor, fused_name, plain_dtype, published_tensors, qkv_rows, qkv_scale_rows, split_qkv
from mxfp4 import BLOCK_SIZE

SPLIT = ("q", "k", "v")


@dataclass(frozen=True)
class Unit:
    """Tensors that are produced together: (name, shape, dtype) each, and a function that makes them in that order."""

    tensors: tuple[PublishedTensor, ...]
    make: Callable[[], list[torch.Tensor]]


def kept(weights: Weights, name: str) -> torch.Tensor:
    """The base checkpoint's own bytes, after checking that training left the tensor as it was."""
    own = weights.base.read(name)
    if weights.trained is weights.base or name not in weights.trained.infos:
        return own
    trained = weights.trained.read(name)
    seen = own
    if own.dtype == torch.float8_e4m3fn:
        seen = multiplied_out(weights, name, own, weights.base)
    if not torch.equal(seen.to(trained.dtype), trained):
        raise ValueError(f"{name}: differs from {weights.base.folder}, although only experts were trained; is model.path the "
                         "checkpoint that training started from?")
    return own


def expert_unit(weights: Weights, name: str, shape, labels: tuple[str, str], dtype: str = "U8") -> Unit:
    """Codes and scales of one expert matrix [out, in] under two names."""
    rows, columns = shape

    def make() -> list[torch.Tensor]:
        codes, scales = codes_of(weights, name)
        return [codes.view(DTYPES[dtype]), scales]

    return Unit((PublishedTensor(labels[0], (rows, columns // 2), dtype),
                 PublishedTensor(labels[1], (rows, columns // BLOCK_SIZE), "U8")), make)


def copy_unit(weights: Weights, name: str, source: Source) -> Unit:
    """A tensor as it is stored, FP8 with its scales."""
    names = [n for n in (name, name + "_scale_inv") if n in source.infos]
    read = functools.partial(kept, weights) if source is weights.base else source.read
    return Unit(tuple(PublishedTensor(n, *source.infos[n]) for n in names),
                lambda: [read(names[0]), *(source.read(n) for n in names[1:])])


def native_units(weights: Weights, dense: str) -> Iterator[Unit]:
    """Units of the native layout, in published order; then what the base holds besides the decoder (MTP), copied.

    Args:
        dense: "base" (precision of the base) or "fp8".
    """
    config, trained, base = weights.config, weights.trained.infos, weights.base.infos
    done = set()
    for tensor in published_tensors(config, experts="bf16", dense="bf16"):
        name = tensor.name
        done |= {name, name + "_scale_inv", name + "_scale"}
        if fused_name(name):
            done.add(fused_name(name)[0])
            yield expert_unit(weights, name, tensor.shape, (name, name + "_scale"))
            continue
        if name not in trained:
            raise ValueError(f"{weights.trained.folder}: tensor {name} is missing")
        held, matrix = base.get(name, trained[name])[1], _dense_matrix(name)
        if held == "F32" and not name.endswith("mlp.gate.weight"):  # a router may be float32, the rest is so by chance
            held = plain_dtype(name)
        if held == trained[name][1] and not (matrix and (dense == "fp8" or "qkv_proj" in name) and held != "F8_E4M3"):
            yield copy_unit(weights, name, weights.trained)  # one precision: nothing to choose
        elif not weights.changed and held in ("F8_E4M3", "F32"):
            yield copy_unit(weights, name, weights.base)
        elif matrix and (dense == "fp8" or held == "F8_E4M3"):
            yield _fp8_unit(weights, name)
        elif "qkv_proj" in name:
            yield _split_unit(weights, name)
        else:
            yield _cast_unit(weights, name, held)
    for name in sorted(base.keys() - done):
        if not name.startswith("model.mtp."):
            raise ValueError(f"{weights.base.folder}: tensor {name} is not part of this model, expected only model.mtp.* "
                             "beside the decoder")
        yield Unit((PublishedTensor(name, *base[name]),), lambda name=name: [weights.base.read(name)])


def _dense_matrix(name: str) -> bool:
    """Matrices that releases store in FP8: q, k, v (fused or not) and the dense MLP."""
    return bool(re.search(r"(self_attn\.(qkv|[qkv])_proj|mlp\.(gate|up|down)_proj)\.weight$", name))


def _cast_unit(weights: Weights, name: str, dtype: str) -> Unit:
    return Unit((PublishedTensor(name, weights.trained.infos[name][0], dtype),),
                lambda: [plain(weights, name, DTYPES[dtype]).contiguous()])


def _fp8_unit(weights: Weights, name: str) -> Unit:
    rows, columns = weights.trained.infos[name][0]
    grid = grid_shape(qkv_scale_rows(name, rows, weights.config), columns)
    return Unit((PublishedTensor(name, (rows, columns), "F8_E4M3"), PublishedTensor(name + "_scale_inv", grid, "F32")),
                lambda: list(quantize_fp8(name, plain(weights, name, torch.float32), weights.config)))


def _split_unit(weights: Weights, name: str, dtype: str = "BF16") -> Unit:
    """q, k and v of a fused qkv: the same rows in another order."""
    layer = int(re.search(r"layers\.(\d+)\.", name)[1])
    columns = weights.trained.infos[name][0][1:]
    sizes = {part: sum(s.stop - s.start for s in rows) for part, rows in qkv_rows(weights.config, layer).items()}
    return Unit(tuple(PublishedTensor(name.replace("qkv_proj", f"{part}_proj"), (sizes[part], *columns), dtype)
                      for part in SPLIT),
                lambda: list(split_qkv(plain(weights, name, DTYPES[dtype]), weights.config, layer)))


def relabelled_units(weights: Weights, layout: str) -> Iterator[Unit]:
    """Units of hf-fp8 or compressed-tensors: experts relabelled, everything else as training sees it, in bf16."""
    suffixes = {"hf-fp8": ("", "_scale_inv"), "compressed-tensors": ("_packed", "_scale")}[layout]
    for name, shape in _published_shapes(weights):
        if fused_name(name):
            labels = (name + suffixes[0], name + suffixes[1])
            yield expert_unit(weights, name, shape, labels, "I8" if layout == "hf-fp8" else "U8")
        elif "qkv_proj" in name:
            yield _split_unit(weights, name)
        else:
            yield _cast_unit(weights, name, plain_dtype(name))


def _published_shapes(weights: Weights) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(published name, unpacked shape) of every tensor of the model, experts one by one."""
    if getattr(weights.config, "model_type", None) == "mimo_v2":
        for tensor in published_tensors(weights.config, experts="bf16", dense="bf16"):
            yield tensor.name, tensor.shape
        return
    for name, (shape, dtype) in weights.trained.infos.items():
        match = re.fullmatch(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)", name)
        if match and len(shape) == 3:
            for expert in range(shape[0]):
                for part in ("down",) if match[2] == "down_proj" else ("gate", "up"):
                    yield f"{match[1]}.{expert}.{part}_proj.weight", (shape[1] // (1 if part == "down" else 2), shape[2])
        elif fused_name(name) or not name.endswith(("_scale_inv", "_scale")):
            yield name, (shape[0], shape[1] * 2) if dtype == "U8" else shape


def gpt_oss_units(weights: Weights) -> Iterator[Unit]:
    """Units of the gpt-oss layout: fused experts [E, in, out] become blocks along `in`; biases and the rest are copied."""
    for name, (shape, dtype) in weights.trained.infos.items():
        if not re.search(r"\.mlp\.experts\.(gate_up_proj|down_proj)$", name):
            yield _cast_unit(weights, name, "BF16") if dtype == "F32" else copy_unit(weights, name, weights.trained)
            continue
        experts, inner, outer = shape
        if inner % BLOCK_SIZE:
            raise ValueError(f"{name}: {inner} inputs, expected a multiple of {BLOCK_SIZE}")

        def make(name=name, experts=experts) -> list[torch.Tensor]:
            packed = []
            for e in range(experts):
                w = computed(weights, weights.trained.read_rows(name, e, slice(None)).mT.contiguous())
                packed.append(encode(f"{name}[{e}]", w, on_grid=weights.on_grid, scale_rule=weights.scale_rule))
            blocks = torch.stack([c.unflatten(-1, (-1, BLOCK_SIZE // 2)) for c, _ in packed])
            return [blocks, torch.stack([s for _, s in packed])]

        grid = (experts, outer, inner // BLOCK_SIZE)
        yield Unit((PublishedTensor(name + "_blocks", (*grid, BLOCK_SIZE // 2), "U8"),
                    PublishedTensor(name + "_scales", grid, "U8")), make)


def units_of(layout: str, weights: Weights, dense: str = "base") -> list[Unit]:
    """Every unit of a checkpoint in a layout.

    Raises:
        ValueError: the client of this layout cannot hold the model; the reason is given.
    """
    refuse_geometry(layout, weights.config, dense)
    if layout == "native":
        return list(native_units(weights, dense))
    return list(gpt_oss_units(weights) if layout == "gpt-oss" else relabelled_units(weights, layout))


def refuse_geometry(layout: str, config, dense: str = "base") -> None:
    """ValueError with the reason if the client of `layout` cannot hold a model of this configuration."""
    family = config.model_type
    wanted = {"native": ("mimo_v2",), "hf-fp8": ("mimo_v2",), "compressed-tensors": ("mimo_v2", "qwen3_moe"),
              "gpt-oss": ("gpt_oss",)}[layout]
    if family not in wanted:
        fits = [name for name, families in (("native", ("mimo_v2",)), ("compressed-tensors", ("qwen3_moe",)),
                                            ("gpt-oss", ("gpt_oss",))) if family in families]
        raise ValueError(f"export.layout={layout}: holds {' or '.join(wanted)}, and this model is {family}"
                         f"{f'; its layout is {fits[0]}' if fits else ''}")
    if dense == "fp8" and layout != "native":
        raise ValueError(f"export.dense=fp8: layout {layout} stores everything but experts in bf16, expected base")
    if family == "mimo_v2":
        _refuse_mimo_block(config)
        if layout != "native":
            _refuse_flash(layout, config)


def _refuse_mimo_block(config) -> None:
    for key in ("hidden_size", "moe_intermediate_size"):
        if getattr(config, key) % BLOCK_SIZE:
            raise ValueError(f"{key}={getattr(config, key)}: expected a multiple of the MXFP4 block size {BLOCK_SIZE}")


def _refuse_flash(layout: str, config) -> None:
    """What transformers' own mimo_v2_flash class cannot express."""
    checks = (
        (config.swa_num_key_value_heads == 2 * config.num_key_value_heads or not any(config.hybrid_layer_pattern),
         f"window layers must have twice the key heads of full layers, and have {config.swa_num_key_value_heads} beside "
         f"{config.num_key_value_heads}"),
        (config.swa_num_attention_heads == config.num_attention_heads, "one number of query heads in all layers"),
        ((config.swa_head_dim, config.swa_v_head_dim) == (config.head_dim, config.v_head_dim), "one head width in all layers"),
        (not config.add_full_attention_sink_bias, "no sinks in full layers"),
        (config.add_swa_attention_sink_bias or not any(config.hybrid_layer_pattern), "sinks in every window layer"),
        (not config.attention_bias, "no attention bias"),
    )
    for holds, reason in checks:
        if not holds:
            raise ValueError(f"export.layout={layout}: its client is transformers' mimo_v2_flash class, which needs: {reason}")
