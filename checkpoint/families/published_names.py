"""Under which names and in which shapes a model is published, and where each tensor comes from in training.

Training has fused experts [experts, ., .]. On disk most families have one matrix per expert, some the fused tensor under the
same or another name. Which it is, is asked of transformers itself: its own conversion is run backwards over a model without
weights in which only the rows of expert tensors are numbered, and the numbers say which expert and which rows became which
matrix. So there is no second table of names to keep. MiMo-V2's own class has its table in `modeling.names`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from checkpoint.sources import Source
from modeling.fused_experts import fused_experts
from modeling.names import expert_parts, published_tensors

Shape = tuple[int, ...]
_LAYER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Place:
    """Where a published expert matrix is in training: `fused[expert, rows]`."""

    fused: str
    expert: int
    rows: slice


@dataclass(frozen=True)
class Fused:
    """An expert tensor [experts, ., .] that is published as it is trained; blocks of 32 run along `axis` (1 or -1)."""

    training: str
    axis: int


@dataclass
class Published:
    """A model's tensors as published in plain numbers (a tied head left out).

    Attributes:
        shapes: of every tensor, by published name. experts: of the names that are one expert's matrix [out, in], where it is in
            training. fused: of the names that are fused expert tensors.
        origin: of every other name, the tensor of training that it is made of.
        revert: training name, values -> {published name: values}.
    """

    shapes: dict[str, Shape]
    experts: dict[str, Place] = field(default_factory=dict)
    fused: dict[str, Fused] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    revert: Callable[[str, torch.Tensor], dict[str, torch.Tensor]] = lambda name, tensor: {name: tensor}

    def name_in(self, source: Source, name: str) -> str | None:
        """What a source calls a tensor that is no expert: by its published name, or by that of training; None: neither."""
        return name if name in source.infos else self.origin[name] if self.origin.get(name) in source.infos else None


def of_mimo(config) -> Published:
    """MiMo-V2, by this project's own table."""
    shapes = {t.name: t.shape for t in published_tensors(config, experts="bf16", dense="bf16")}
    experts: dict[str, Place] = {}
    H, inner = config.hidden_size, config.moe_intermediate_size
    for layer, moe in enumerate(config.moe_layer_freq):
        for leaf, shape in (("gate_up_proj", (2 * inner, H)), ("down_proj", (H, inner))) if moe else ():
            fused = f"model.layers.{layer}.mlp.experts.{leaf}"
            experts |= {part.name: Place(fused, part.expert, part.rows)
                        for part in expert_parts(fused, (config.n_routed_experts, *shape))}
    return Published(shapes, experts, origin={n: n for n in shapes if n not in experts})


def of_transformers(config) -> Published:
    """Any other family, by transformers' own conversion.

    Raises:
        ValueError: no causal language model of this type, or experts that are published in a way that is not known here.
    """
    model = meta_model(config)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    held = {n: t for n, t in model.state_dict().items() if n not in tied}
    axes = {name: axis for name, _, axis in fused_experts(model)}
    published = Published({}, revert=lambda name, tensor: _reverted(model, {name: tensor}))
    for name, tensor in _reverted(model, {n: t for n, t in held.items() if n not in axes}).items():
        published.shapes[name] = tuple(tensor.shape)
    for name in held.keys() - axes.keys():
        published.origin |= dict.fromkeys([name] if name in published.shapes else _reverted(model, {name: held[name]}), name)
    alike: dict[tuple, list[str]] = {}
    for fused, axis in axes.items():
        alike.setdefault((_LAYER.sub(".*.", fused, count=1), held[fused].shape, axis), []).append(fused)
    for (_, (experts, rows, columns), axis), members in alike.items():
        for fused, found in _places(model, members, (experts, rows)):
            for name, part in found.items():
                if part is None:
                    published.fused[name], published.shapes[name] = Fused(fused, axis), (experts, rows, columns)
                elif part.expert < 0 or axis != -1:
                    raise ValueError(f"model_type {config.model_type}: {name} is made of {fused} in a way that is not known "
                                     "here")
                else:
                    published.experts[name] = part
                    published.shapes[name] = part.rows.stop - part.rows.start, columns
    published.shapes = dict(sorted(published.shapes.items(), key=lambda item: _in_order(item[0])))
    return published


def _in_order(name: str) -> list:
    """Layers and experts by their numbers."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in name.split(".")]


def _places(model, members: list[str], shape: tuple[int, int]) -> Iterator[tuple[str, dict[str, Place | None]]]:
    """(fused name, where each of its published matrices is) of expert tensors that differ in nothing but their layer.

    transformers' conversion is a matter of a second for each, so it is run for the first and the last layer alone; if they
    agree but for their number, so do those between.
    """
    ends = {fused: _places_of(model, fused, shape) for fused in dict.fromkeys((members[0], members[-1]))}
    first = ends[members[0]]
    if _in_layer(first, members[0], members[-1]) != ends[members[-1]]:
        ends |= {fused: _places_of(model, fused, shape) for fused in members[1:-1]}
    for fused in members:
        yield fused, ends[fused] if fused in ends else _in_layer(first, members[0], fused)


def _in_layer(found: dict[str, Place | None], fused: str, other: str) -> dict[str, Place | None]:
    """What was found of `fused`, for the tensor `other` of another layer."""
    was, now = (match[0] if (match := _LAYER.search(name)) else "" for name in (fused, other))
    return {name.replace(was, now, 1): part and Place(other, part.expert, part.rows) for name, part in found.items()}


def _places_of(model, fused: str, shape: tuple[int, int]) -> dict[str, Place | None]:
    """Published name -> its place; None: the fused tensor itself; expert -1: made of it in another way."""
    experts, rows = shape
    numbered = torch.arange(experts * rows).view(experts, rows, 1)
    return {name: None if places.shape == numbered.shape and torch.equal(places, numbered) else _part(fused, places, rows)
            for name, places in _reverted(model, {fused: numbered}).items()}


def _part(fused: str, places: torch.Tensor, rows: int) -> Place:
    """Where the rows of a published matrix, which hold their own numbers, come from; expert -1: not a run of one expert's."""
    expert, row = divmod(int(places.flatten()[0]), rows)
    count = places.shape[0]
    one = places.ndim == 2 and places.shape[1] == 1 and row + count <= rows
    if not one or not torch.equal(places.flatten(), torch.arange(count) + expert * rows + row):
        expert = -1
    return Place(fused, expert, slice(row, row + count))


def meta_model(config):
    """transformers' model of a configuration, without weights.

    Raises:
        ValueError: it has no causal language model of this type.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):  # what is packed on disk is decoded before it is trained
        del config.quantization_config
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except ValueError as error:
        raise ValueError(f"model_type {config.model_type}: {str(error).splitlines()[0]}") from None


def _reverted(model, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, tensors)
