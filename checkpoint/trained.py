"""What was trained: the weights that a checkpoint must hold, as the forward pass computed with them.

An exporter writes them, a verifier compares with them; both take codes and plain tensors from here. A source may hold tensors
under their published names or under those of training, in any container (`checkpoint.containers`). Codes that are stored in
MXFP4 are taken as they are: nothing is rounded twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from checkpoint.containers import container, read_plain, stored_codes
from checkpoint.families.published_names import Published
from checkpoint.sources import Source
from modeling.names import fused_name
from mxfp4 import dequantize, fake_quantize, fake_quantize_, quantize
from mxfp4.exact_pack import pack_on_grid


@dataclass
class Weights:
    """Where weights are taken from, and how experts become codes.

    Attributes:
        trained: the weights to export; base: the checkpoint they were trained from (the same, for export without training).
        config: MiMoV2Config, or another family's configuration. names: how the model is published.
        on_grid: experts must lie on the MXFP4 grid (they were trained there): anything else is an error.
        scale_rule: how experts that are not trained are rounded.
        changed: other weights than experts may differ from the base (`qat.train: all`).
        decoded: experts stay the numbers that they are (a packed base made readable, not quantized).
    """

    trained: Source
    base: Source
    config: object
    names: Published
    on_grid: bool
    scale_rule: str
    changed: bool = False
    decoded: bool = False


def expert_values(weights: Weights, name: str) -> torch.Tensor:
    """One expert's matrix [out, in] by its published name, in plain numbers, whether it is stored alone or within a fused
    tensor; "<fused>[e]" names one of a tensor that is published fused (its blocks along the last dimension)."""
    source = weights.trained
    if name.endswith("]"):
        fused, expert = _split_index(name)
        there = weights.names.fused[fused]
        location = fused if container(source, fused) else there.training
        if container(source, location) == "plain":
            w = source.read_rows(location, expert, slice(None))
        else:
            w = read_plain(source, location, torch.bfloat16, weights.config)[expert]
        return w.mT.contiguous() if there.axis == 1 else w
    if container(source, name):
        if container(source, name) == "plain":
            return source.read(name)
        return read_plain(source, name, torch.bfloat16, weights.config)
    place = weights.names.experts.get(name)
    if place is None or place.fused not in source.infos:
        raise ValueError(f"{source.folder}: tensor {name} is missing")
    return source.read_rows(place.fused, place.expert, place.rows)


def _split_index(name: str) -> tuple[str, int]:
    fused, _, rest = name.partition("[")
    return fused, int(rest[:-1])


def packed_codes(weights: Weights, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The codes and scales of an expert that is stored in MXFP4; None if it is stored otherwise."""
    return stored_codes(weights.trained, *_split_index(name)) if name.endswith("]") else stored_codes(weights.trained, name)


def packed_codes_stored(weights: Weights) -> bool:
    """Whether the source holds its experts in MXFP4 already."""
    names = [*list(weights.names.experts)[:1], *list(weights.names.fused)[:1]]
    return any(container(weights.trained, name) not in (None, "plain", "fp8") for name in names)


def codes_of(weights: Weights, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [out, in / 2] and scales uint8 [out, in / 32] of one expert matrix by its published name.

    Raises:
        ValueError: weights that should lie on the grid and do not, or are not finite: tensor and index are named.
    """
    packed = packed_codes(weights, name)
    if packed is not None:
        return packed
    return encode(name, computed(weights, expert_values(weights, name)), on_grid=weights.on_grid,
                  scale_rule=weights.scale_rule, names=weights.names)


def decoded_expert(weights: Weights, name: str) -> torch.Tensor:
    """What an exported matrix must decode to, bf16 [out, in]: the trained weight, or the base's rounded by the rule."""
    if (weights.on_grid or weights.decoded) and packed_codes(weights, name) is None:
        return computed(weights, expert_values(weights, name)).to(torch.bfloat16)
    return dequantize(*codes_of(weights, name), dtype=torch.bfloat16)


def computed(weights: Weights, w: torch.Tensor) -> torch.Tensor:
    """What the forward pass computed with: a float32 master rounded as training rounds it, anything else as it is.

    A trainer that keeps masters (DeepSpeed) casts them to the module's dtype and fake-quantizes those on every step.
    """
    if weights.trained.masters is None or not weights.on_grid or w.dtype != torch.float32:
        return w
    seen = w.to(weights.trained.masters)
    return fake_quantize_(torch.empty(seen.shape, dtype=torch.bfloat16), seen, scale_rule=weights.scale_rule)


def encode(name: str, w: torch.Tensor, *, on_grid: bool, scale_rule: str,
           names: Published | None = None) -> tuple[torch.Tensor, torch.Tensor]:
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
        place = names.experts.get(name) if names is not None else None
        expert = (place.fused, place.expert) if place else fused_name(name)
        where = f"expert {expert[1]} of {expert[0]}" if expert else name
        raise ValueError(f"{name}: {off.shape[0]} of {w.numel()} weights are not on the MXFP4 grid, the first at "
                         f"{off[0].tolist()} ({float(w[tuple(off[0])]):.6g}), {where}: these are not quantization-aware "
                         "trained experts (an untrained checkpoint is exported with --from)")
    return codes, scales


def plain(weights: Weights, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A tensor other than an expert as training sees it, by its published name: FP8 is multiplied out."""
    source = weights.trained
    if container(source, name):
        return read_plain(source, name, dtype, weights.config)
    own = weights.names.name_in(source, name)
    if own is None:
        raise ValueError(f"{source.folder}: tensor {name} is missing")
    made = weights.names.revert(own, source.read(own))
    if name not in made:
        raise ValueError(f"{source.folder}: {name} cannot be made of {own} alone; export the run's model/, not a "
                         "checkpoint")
    return made[name].to(dtype) if made[name].is_floating_point() else made[name]
