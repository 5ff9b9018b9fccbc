"""What was trained: the weights that a checkpoint must hold, as the forward pass computed with them.

An exporter writes them, a verifier compares with them; both take codes and plain tensors from here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from checkpoint.fp8 import dequantize_fp8
from checkpoint.sources import Source, read_expert
from modeling.names import fused_name
from mxfp4 import dequantize, fake_quantize, fake_quantize_, quantize
from mxfp4.exact_pack import pack_on_grid


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


def plain(weights: Weights, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A tensor other than an expert as training sees it: FP8 is multiplied out."""
    tensor = weights.trained.read(name)
    if tensor.dtype == torch.float8_e4m3fn:
        tensor = multiplied_out(weights, name, tensor, weights.trained)
    return tensor.to(dtype)


def multiplied_out(weights: Weights, name: str, codes: torch.Tensor, source: Source) -> torch.Tensor:
    """An FP8 matrix in float32."""
    return dequantize_fp8(name, codes, source.read(name + "_scale_inv"), weights.config)
