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

from checkpoint.sources import DTYPES, Source, read_expert
from modeling.load import FP8_BLOCK, dequantize_fp8
from modeling.names import PublishedTensor, fused_name, plain_dtype, published_tensors, qkv_rows, qkv_scale_rows, split_qkv
from mxfp4 import BLOCK_SIZE, dequantize, fake_quantize, fake_quantize_, quantize
from mxfp4.exact_pack import pack_on_grid

FP8_MAX = 448.0
SPLIT = ("q", "k", "v")


@dataclass(frozen=True)
class Unit:
    """Tensors that are produced together: (name, shape, dtype) each, and a function that makes them in that order."""

    tensors: tuple[PublishedTensor, ...]
    make: Callable[[], list[torch.Tensor]]


@dataclass
class Weights:
    """Where weights are taken from, and how experts become codes.

    Attributes:
        trained: the weights to export; base: the checkpoint they were trained from (the same, for export without training).
        config: MiMoV2Config, or another family's configuration.
        on_grid: experts must lie on the MXFP4 grid (they were trained there): anything else is an error.
        scale_rule: how experts that are not trained are rounded.
        changed: other weights than experts may differ from the base (`qat.train: all`).
    """

    trained: Source
    base: Source
    config: object
    on_grid: bool
    scale_rule: str
    changed: bool = False


def codes_of(weights: Weights, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [out, in / 2] and scales uint8 [out, in / 32] of one expert matrix by its published name.

    Raises:
        ValueError: weights that should lie on the grid and do not, or are not finite: tensor and index are named.
    """
    w = computed(weights, read_expert(weights.trained, name))
    if w.dtype == torch.uint8:  # already packed
        return w, weights.trained.read(name + "_scale")
    if w.dtype == torch.float8_e4m3fn:
        w = multiplied_out(weights, name, w, weights.trained).to(torch.bfloat16)
    return encode(name, w, on_grid=weights.on_grid, scale_rule=weights.scale_rule)


def computed(weights: Weights, w: torch.Tensor) -> torch.Tensor:
    """What the forward pass computed with: a float32 master rounded as training rounds it, anything else as it is.

    A trainer that keeps masters (DeepSpeed) casts them to the module's dtype and fake-quantizes those on every step.
    """
    if weights.trained.masters is None or not weights.on_grid or w.dtype != torch.float32:
        return w
    seen = w.to(weights.trained.masters)
    return fake_quantize_(torch.empty(seen.shape, dtype=torch.bfloat16), seen, scale_rule=weights.scale_rule)


def encode(name: str, w: torch.Tensor, *, on_grid: bool, scale_rule: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize(w)`, and where the weights are known to lie on the grid, the proof that nothing was rounded."""
    try:
        if not on_grid:
            # These two rules keep a block's exponent when its maximum is rounded, so codes can be read off the fast path.
            rounded = fake_quantize(w, scale_rule=scale_rule) if scale_rule in ("floor", "even") else None
            packed = pack_on_grid(rounded) if rounded is not None else None
            return packed or quantize(w, scale_rule=scale_rule)
        packed = pack_on_grid(w)
        if packed is not None:
            return packed
        codes, scales = quantize(w, scale_rule=scale_rule)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    off = (dequantize(codes, scales, dtype=w.dtype) != w).nonzero()
    if off.numel():
        expert = fused_name(name)
        where = f"expert {expert[1]} of {expert[0]}" if expert else name
        raise ValueError(f"{name}: {off.shape[0]} of {w.numel()} weights are not on the MXFP4 grid, the first at "
                         f"{off[0].tolist()} ({float(w[tuple(off[0])]):.6g}), {where}: these are not quantization-aware "
                         "trained experts (an untrained checkpoint is exported with --from)")
    return codes, scales


def quantize_fp8(name: str, weight: torch.Tensor, config) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds a matrix to FP8 E4M3 in 128 x 128 blocks, each with the scale that takes its maximum to 448.

    The grid of scales starts anew where the published format has it so (`modeling.names.qkv_scale_rows`).

    Returns:
        float8_e4m3fn [rows, columns], float32 [scale rows, ceil(columns / 128)].
    """
    codes, scales, start = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), [], 0
    columns = weight.shape[1]
    for rows in qkv_scale_rows(name, weight.shape[0], config):
        for top in range(start, start + rows, FP8_BLOCK):
            band = weight[top:min(top + FP8_BLOCK, start + rows)].float()
            padded = torch.nn.functional.pad(band, (0, -columns % FP8_BLOCK)).unflatten(1, (-1, FP8_BLOCK))
            scale = (padded.abs().amax((0, 2)) / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
            codes[top:top + band.shape[0]] = (padded / scale[None, :, None]).flatten(1)[:, :columns].to(torch.float8_e4m3fn)
            scales.append(scale)
        start += rows
    return codes, torch.stack(scales)


def plain(weights: Weights, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A tensor other than an expert as training sees it: FP8 is multiplied out."""
    tensor = weights.trained.read(name)
    if tensor.dtype == torch.float8_e4m3fn:
        tensor = multiplied_out(weights, name, tensor, weights.trained)
    return tensor.to(dtype)


def multiplied_out(weights: Weights, name: str, codes: torch.Tensor, source: Source) -> torch.Tensor:
    """An FP8 matrix in float32.

    Only MiMo-V2 has scale grids that restart within a matrix; `dequantize_fp8` knows those matrices by name.
    """
    grid = name if hasattr(weights.config, "hybrid_layer_pattern") else name.removesuffix(".weight")
    return dequantize_fp8(grid, codes, source.read(name + "_scale_inv"), weights.config)


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
    grid = sum(-(-n // FP8_BLOCK) for n in qkv_scale_rows(name, rows, weights.config)), -(-columns // FP8_BLOCK)
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
