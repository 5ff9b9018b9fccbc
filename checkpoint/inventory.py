"""What an exported checkpoint must hold, computed from its config.json alone, and what no tensor of it may hold.

Names, shapes and dtypes for each layout; invariants of blocks under a scale rule; values that no norm, scale or float may have.
Nothing here opens a file but through the source it is given.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from checkpoint.families.registry import family_of, refuse_layout, resolve_layout
from checkpoint.fp8 import grid_shape
from modeling.names import fused_name, published_tensors
from mxfp4.format import BLOCK_SIZE, E8M0_BIAS, E8M0_NAN, MAX_SCALE_EXPONENT
from storage.reading import read_json
from storage.terminal import counted

MAX_SCALE = E8M0_BIAS + MAX_SCALE_EXPONENT  # the largest scale byte under which six units are finite in bf16
FLOATS_AT_ONCE = 1 << 20

Expected = dict[str, tuple[tuple[int, ...], set[str]]]


def layout_of(config: dict) -> str:
    """The layout that a config.json declares: native, fp8 (a release before its experts became MXFP4, or any other model in
    FP8 blocks), hf-fp8, compressed-tensors, gpt-oss, or bf16 (no quantization).

    Raises:
        ValueError: a quantization_config that is none of them.
    """
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise ValueError(f"config.json: quantization_config: {type(quantization).__name__}, expected an object")
    method = quantization.get("quant_method")
    if method == "fp8":
        if is_mimo(config) and str(quantization.get("store_dtype")).lower() == "mxfp4":
            return "native"
        return "hf-fp8" if quantization.get("expert_dtype") == "fp4" else "fp8"
    if method == "compressed-tensors" and quantization.get("format") == "mxfp4-pack-quantized":
        return "compressed-tensors"
    if method == "mxfp4":
        return "gpt-oss"
    if not quantization:
        return "bf16"
    raise ValueError(f"config.json: model_type {config.get('model_type')!r} with quantization_config.quant_method "
                     f"{method!r} is none of the layouts native, fp8, hf-fp8, compressed-tensors, gpt-oss, bf16")


def is_mimo(config: dict) -> bool:
    """Released configurations of MiMo-V2, V2-Flash included.

    transformers has a class for V2-Flash, but takes the block height of an FP8 matrix to be rows / scale rows, which is
    wrong, silently, for the per-head grids of its key projections. Folders that this class saved have no
    `hybrid_layer_pattern` and stay with it.
    """
    kind = config.get("model_type")
    return kind == "mimo_v2" or kind == "mimo_v2_flash" and "hybrid_layer_pattern" in config


MOST_LAYERS = 10_000


def configuration(config: dict):
    """The configuration object of a config.json.

    MiMoV2Config for model_type mimo_v2 and for a released V2-Flash; folders that transformers' own class for V2-Flash reads
    have no `hybrid_layer_pattern` and stay with it.

    Raises:
        ValueError: a model type that transformers does not know, or a geometry that cannot be.
    """
    from transformers import CONFIG_MAPPING

    from modeling.configuration_mimo_v2 import MiMoV2Config

    kind = config.get("model_type")
    text = config.get("text_config")
    for layers in (part.get("num_hidden_layers", 1) for part in (config, text) if isinstance(part, dict)):
        if type(layers) is not int or not 0 < layers <= MOST_LAYERS:  # configurations make lists of that length
            raise ValueError(f"config.json: num_hidden_layers={str(layers)[:40]}: expected 1 to {MOST_LAYERS}")
    drop = ("quantization_config", "model_type", "dtype", "torch_dtype", "auto_map", "transformers_version")
    keys = {k: _numbers(v) for k, v in config.items() if k not in drop}
    if is_mimo(config):
        return MiMoV2Config.from_dict(keys)
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"model_type {kind!r}: transformers does not know it, expected mimo_v2, qwen3_moe or gpt_oss")
    return CONFIG_MAPPING[kind].from_dict(keys)


def require_exportable(path: str | Path, layout: str, dense: str) -> None:
    """Refuses, before anything is trained, a base whose result no export could hold.

    Args:
        path: `model.path`; a hub name that is not a folder here is not looked at. layout, dense: of the recipe's export.

    Raises:
        ValueError: the reason, and the layout that would do.
    """
    file = Path(path) / "config.json"
    if file.is_file():
        config = configuration(read_json(file))
        refuse_layout(resolve_layout(layout, config), config, dense)


def _numbers(value):
    """transformers writes infinities, which JSON lacks, as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        return float(value["__float__"]) if value.keys() == {"__float__"} else {k: _numbers(v) for k, v in value.items()}
    return [_numbers(v) for v in value] if isinstance(value, list) else value


def expected_inventory(layout: str, config: dict, settings, held: dict[str, str]) -> Expected:
    """Name -> (shape, allowed dtypes) of every tensor, from the configuration (MTP layers left out).

    Args:
        held: dtype of every tensor that is there. A dense matrix may be FP8 or not: it is expected as what it is, with its
            scales if it is FP8. (Whether config.json says so is another question.)
    """
    if not is_mimo(config):
        return _inventory_of_family(layout, settings, held)
    experts = {"native": "mxfp4", "fp8": "fp8"}.get(layout, "bf16")
    expected: Expected = {}
    for dense in ("fp8", "bf16"):
        for tensor in published_tensors(settings, experts=experts, dense=dense):
            module = re.sub(r"(_scale_inv)$", "", tensor.name)
            matrix = re.search(r"(self_attn\.(qkv|[qkv])_proj|layers\.\d+\.mlp\.(gate|up|down)_proj)\.weight$", module)
            if not matrix or (dense == "fp8") == (held.get(module) == "F8_E4M3"):
                router = tensor.name.endswith("mlp.gate.weight")
                expected[tensor.name] = (tensor.shape, {"F32", "BF16"} if router else {tensor.dtype})
    return expected


def _inventory_of_family(layout: str, settings, held: dict[str, str]) -> Expected:
    """By the family's published names."""
    names, expected = family_of(settings).published(settings), {}
    codes, scales, dtype = {"hf-fp8": ("", "_scale_inv", "I8"), "compressed-tensors": ("_packed", "_scale", "U8")}.get(
        layout, ("", "", ""))
    for name, shape in names.shapes.items():
        if name in names.fused and layout == "gpt-oss":
            experts, inner, outer = shape
            grid = (experts, outer, inner // BLOCK_SIZE)
            expected |= {name + "_blocks": ((*grid, BLOCK_SIZE // 2), {"U8"}), name + "_scales": (grid, {"U8"})}
        elif name in names.experts and codes + scales:
            expected |= {name + codes: ((shape[0], shape[1] // 2), {dtype}),
                         name + scales: ((shape[0], shape[1] // BLOCK_SIZE), {"U8"})}
        elif layout == "fp8" and held.get(name) == "F8_E4M3":
            expected |= {name: (shape, {"F8_E4M3"}), name + "_scale_inv": (grid_shape([shape[0]], shape[1]), {"F32", "BF16"})}
        else:
            integers = {held[name]} if held.get(name) in ("I64", "I32", "BOOL") else set()
            plain = {"F32"} if name.endswith("e_score_correction_bias") else {"BF16", "F32"} - (
                {"F32"} if name in names.experts or name in names.fused else set())
            expected[name] = shape, integers or plain
    return expected


def scale_name(layout: str, name: str) -> str | None:
    """The scales' name of a tensor of codes, or None for any other tensor."""
    if layout == "gpt-oss":
        return name.removesuffix("_blocks") + "_scales" if name.endswith("_blocks") else None
    if layout == "compressed-tensors":
        return name.removesuffix("_packed") + "_scale" if name.endswith(".weight_packed") else None
    if fused_name(name) is None:
        return None
    return name + ("_scale" if layout == "native" else "_scale_inv")


def block_faults(codes: torch.Tensor, scales: torch.Tensor, rule: str) -> Iterator[str]:
    """Violations of what every quantizer of this rule leaves in a block.

    The largest magnitude is 4 or 6 units (floor, even; also trained weights, whatever their rule) or at least 3 (rceil, mse);
    a block of zeros has the scale byte 0; blocks at the smallest scale may hold anything.
    """
    words = codes.contiguous().view(-1, BLOCK_SIZE // 2).view(torch.int64)  # a block is two words of sixteen nibbles
    grid = codes.shape[:-1] if codes.ndim == 4 else (*codes.shape[:-1], codes.shape[-1] * 2 // BLOCK_SIZE)
    if grid != scales.shape:
        yield f"{list(grid)} blocks, {list(scales.shape)} scales"
        return
    # Of the magnitudes 0 to 7 those with both higher bits are 4 and 6 units; 5 is 3 units.
    strong = (words << 1).bitwise_and_(words)
    if rule not in ("floor", "even"):
        strong |= (words << 2) & words
    strong = _either(strong.bitwise_and_(0x4444444444444444)).view(scales.shape)
    some = _either(words).bitwise_and_(0x7777777777777777).view(scales.shape)
    low = (strong == 0) & (some != 0) & (scales > 0) & (scales != E8M0_NAN)
    if bool(low.any()):
        index = low.nonzero()[0].tolist()
        yield (f"{counted(int(low.sum()), 'block')} whose largest magnitude is below {4 if rule in ('floor', 'even') else 3} "
               f"units, the first at {index}: not what scale rule {rule} writes")
    idle = (some == 0) & (scales != 0) & (scales != E8M0_NAN)
    if bool(idle.any()):
        yield f"{counted(int(idle.sum()), 'block')} of zeros with a scale, the first at {idle.nonzero()[0].tolist()}"


def _either(words: torch.Tensor) -> torch.Tensor:
    """The bits set in one of the two words of each block."""
    return words[:, 0] | words[:, 1]


def tensor_faults(name: str, tensor: torch.Tensor, *, zero_norms: bool = False) -> Iterator[tuple[str, str]]:
    """(kind, text) of values that no tensor of this kind may have; zero_norms: a norm may be zero."""
    if re.search(r"weight_scale$|_scales$|experts\..*weight_scale_inv$", name) and tensor.dtype == torch.uint8:
        if not tensor.numel() or int(tensor.max()) <= MAX_SCALE:
            return
        bad = (tensor == E8M0_NAN).nonzero()
        if bad.numel():
            yield "scales", f"{bad.shape[0]} scales are 255 (NaN), the first at {bad[0].tolist()}"
        beyond = (tensor > MAX_SCALE) & (tensor != E8M0_NAN)
        if bool(beyond.any()):
            yield "scales", f"scale {int(tensor[beyond][0])} overflows bf16, expected at most {MAX_SCALE}"
        return
    if not tensor.is_floating_point():
        return
    # Piece by piece: the float32 copy of an embedding is what would take the most memory of all.
    pieces = tensor.contiguous().view(-1).split(FLOATS_AT_ONCE)
    if not all(bool(torch.isfinite(piece.float()).all()) for piece in pieces):
        bad = (~torch.isfinite(tensor.float())).nonzero()
        yield "values", f"{bad.shape[0]} values are not finite, the first at {bad[0].tolist()}"
    if name.endswith("weight_scale_inv") and not all(bool((piece.float() > 0).all()) for piece in pieces):
        yield "scales", "a scale that is not positive"
    if not zero_norms and re.search(r"(layernorm|norm)\.weight$", name) and not bool(tensor.float().any()):
        yield "values", "a norm whose weights are all zero"
