"""What each layout stores for a tensor: the same MXFP4 codes under the names and in the containers that a client reads.

    native               experts.E.X_proj.weight U8 + .weight_scale U8; the rest as in the base (SGLang, vLLM, runtime_ref,
                         and stock transformers through the shipped code). MiMo-V2 only
    hf-fp8               the same bytes as I8 + .weight_scale_inv U8; split q/k/v (stock transformers, mimo_v2_flash class)
    compressed-tensors   .weight_packed U8 + .weight_scale U8 (transformers, vLLM); every family whose experts are published
                         one by one, and of MiMo-V2 what mimo_v2_flash holds
    gpt-oss              fused experts.X_proj_blocks U8 [E, out, in/32, 16] + _scales U8 [E, out, in/32]; gpt-oss only
    bf16                 experts decoded exactly, no quantization section: any family, any engine, twice FP8's size

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

from checkpoint.containers import read_plain
from checkpoint.families.registry import refuse_layout
from checkpoint.fp8 import grid_shape, quantize_fp8
from checkpoint.sources import DTYPES, Source
from checkpoint.trained import Weights, codes_of, decoded_expert, plain
from modeling.names import PublishedTensor, fused_name, plain_dtype, published_tensors, qkv_rows, qkv_scale_rows, split_qkv
from mxfp4 import BLOCK_SIZE, dequantize

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
        seen = read_plain(weights.base, name, torch.float32, weights.config)
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
    done = {"lm_head.weight"} if config.tie_word_embeddings else set()
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
        # A router may be float32, the rest is so by chance; half precision of another kind is published as bfloat16.
        if held in ("F16", "F64") or held == "F32" and not name.endswith("mlp.gate.weight"):
            held = plain_dtype(name)
        if held == trained[name][1] and not (matrix and (dense == "fp8" or "qkv_proj" in name) and held != "F8_E4M3"):
            yield copy_unit(weights, name, weights.trained)  # one precision: nothing to choose
        elif not weights.changed and held in ("F8_E4M3", "F32") and held == base.get(name, (0, None))[1]:
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


def published_units(weights: Weights, layout: str) -> Iterator[Unit]:
    """Units of every layout but native: experts in the layout's containers (bf16: decoded), the rest as training sees it."""
    for name, shape in weights.names.shapes.items():
        if name in weights.names.fused:
            yield _fused_unit(weights, name, shape, layout)
        elif name in weights.names.experts:
            yield _matrix_unit(weights, name, shape, layout)
        elif "qkv_proj" in name and hasattr(weights.config, "hybrid_layer_pattern"):
            yield _split_unit(weights, name)
        else:
            yield Unit((PublishedTensor(name, shape, dtype := kept_dtype(weights, name)),),
                       lambda name=name, dtype=dtype: [plain(weights, name, DTYPES[dtype]).contiguous()])


def _matrix_unit(weights: Weights, name: str, shape, layout: str) -> Unit:
    if layout == "bf16":
        return Unit((PublishedTensor(name, shape, "BF16"),), lambda: [_decoded(weights, name)])
    codes, scales = {"hf-fp8": ("", "_scale_inv"), "compressed-tensors": ("_packed", "_scale")}[layout]
    return expert_unit(weights, name, shape, (name + codes, name + scales), "I8" if layout == "hf-fp8" else "U8")


def _decoded(weights: Weights, name: str) -> torch.Tensor:
    """One expert's matrix in bf16: what its codes mean, or, of a base that is only to be read, its own numbers."""
    if weights.decoded:
        return decoded_expert(weights, name)
    return dequantize(*codes_of(weights, name), dtype=torch.bfloat16)


def _fused_unit(weights: Weights, name: str, shape, layout: str) -> Unit:
    """Fused experts: in gpt-oss's blocks along the input dimension, or decoded."""
    experts, axis = shape[0], weights.names.fused[name].axis
    outer, inner = shape[1:] if axis == -1 else shape[:0:-1]
    if inner % BLOCK_SIZE:
        raise ValueError(f"{name}: {inner} inputs, expected a multiple of {BLOCK_SIZE}")

    def blocks() -> list[torch.Tensor]:
        made = [codes_of(weights, f"{name}[{e}]") for e in range(experts)]
        return [torch.stack([c.unflatten(-1, (-1, BLOCK_SIZE // 2)) for c, _ in made]), torch.stack([s for _, s in made])]

    def values() -> list[torch.Tensor]:
        decoded = torch.stack([_decoded(weights, f"{name}[{e}]") for e in range(experts)])
        return [decoded if axis == -1 else decoded.mT.contiguous()]

    if layout == "bf16":
        return Unit((PublishedTensor(name, shape, "BF16"),), values)
    grid = (experts, outer, inner // BLOCK_SIZE)
    return Unit((PublishedTensor(name + "_blocks", (*grid, BLOCK_SIZE // 2), "U8"),
                 PublishedTensor(name + "_scales", grid, "U8")), blocks)


def kept_dtype(weights: Weights, name: str) -> str:
    """Of a tensor that is no expert: float32 where the base has it so by choice (beside others in fewer bits), or bfloat16."""
    own = weights.names.name_in(weights.trained, name)
    held = weights.trained.infos[own][1] if own else "BF16"
    if held not in ("F32", "F16", "BF16", "F64", "F8_E4M3", "U8", "I8"):
        return held  # integers, truth values
    base = weights.base.infos
    chosen = base.get(name, (0, None))[1] == "F32" and any(dtype in ("BF16", "F16", "F8_E4M3") for _, dtype in base.values())
    return "F32" if chosen else plain_dtype(name)


def units_of(layout: str, weights: Weights, dense: str = "base") -> list[Unit]:
    """Every unit of a checkpoint in a layout.

    Raises:
        ValueError: the client of this layout cannot hold the model; the reason is given.
    """
    refuse_layout(layout, weights.config, dense)
    return list(native_units(weights, dense) if layout == "native" else published_units(weights, layout))
