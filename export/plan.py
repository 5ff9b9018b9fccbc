"""`--plan`: what an export would write, from names and shapes alone; no weights are read.

The plan is made by the exporter's own rules: a source that knows shapes and has no values takes the place of the checkpoint,
and the units made of it are those that would be written, in every layout, refusals included. The shapes come from

    the headers of a checkpoint folder (--weights, --from, else model.path), if it has weights
    the client's model class on the meta device, for a folder with nothing but config.json, and for a published geometry
    the published inventory for MiMo-V2 releases (FP8 matrices, float32 router, MTP layers copied through)

Rejected: a second description of each layout for planning (it would drift from what is written).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint.detect_format import local_folder, open_source
from checkpoint.families.registry import family_of, refuse_layout, resolve_layout
from checkpoint.inventory import configuration
from checkpoint.sources import Source
from checkpoint.trained import Weights
from export.config_files import REMOTE_CODE
from export.layouts import Unit, units_of
from export.shards import Shard, plan_shards, tensor_bytes
from modeling.names import published_tensors
from recipes.schema import Recipe
from storage.reading import read_json

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "*.distcp", "*/*.distcp", "*_optim_states.pt", "*/*_optim_states.pt")


@dataclass
class Plan:
    """What would be written: tensors and bytes by dtype, files, and memory of one writer."""

    name: str
    layout: str
    tensors: int
    expert_matrices: int
    elements: dict[str, int]
    bytes: dict[str, int]
    shards: list[Shard]
    largest_unit: Unit
    peak_bytes: int


class ShapeSource(Source):
    """Shapes of a checkpoint that has no values here."""

    def __init__(self, name: str, infos: dict[str, tuple[tuple[int, ...], str]]):
        super().__init__(Path(name), infos)

    def read(self, name: str) -> torch.Tensor:
        raise AssertionError(f"a plan has no weights to read: {name}")


def make_plan(recipe: Recipe, folder: Path | None = None) -> Plan:
    """Adds everything up.

    Args:
        folder: the checkpoint to export, if it is another than model.path.

    Raises:
        ValueError: no geometry, or a layout that cannot hold it, with the reason.
    """
    config, name, source = _geometry(recipe, folder)
    layout = resolve_layout(recipe.export.layout, config)
    weights = Weights(source, source, config, family_of(config).published(config), on_grid=True,
                      scale_rule=recipe.quantization.scale_rule, changed=recipe.qat.train == "all")
    units = units_of(layout, weights, recipe.export.dense)
    elements: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for t in (t for unit in units for t in unit.tensors):
        elements[t.dtype] = elements.get(t.dtype, 0) + t.elements
        sizes[t.dtype] = sizes.get(t.dtype, 0) + tensor_bytes(t)
    largest = max(units, key=working_bytes)
    return Plan(name=name, layout=layout, tensors=sum(len(unit.tensors) for unit in units), elements=elements, bytes=sizes,
                expert_matrices=sum(_matrices(unit) for unit in units), shards=plan_shards(units, recipe.export.shard_bytes),
                largest_unit=largest, peak_bytes=working_bytes(largest) + max(map(_written, units)))


def _written(unit: Unit) -> int:
    return sum(tensor_bytes(t) for t in unit.tensors)


def _matrices(unit: Unit) -> int:
    """Expert matrices in a unit: one, or those of all experts of a layer in the gpt-oss layout."""
    first = unit.tensors[0]
    if first.dtype not in ("U8", "I8"):
        return 0
    return first.shape[0] if first.name.endswith("_blocks") else 1


def working_bytes(unit: Unit) -> int:
    """Memory that a unit takes while it is made; the one that is being written meanwhile comes on top.

    An expert matrix is there in bf16 (four bytes for each byte of codes) as read and as rounded, beside its codes; in the
    gpt-oss layout one matrix at a time, transposed, beside the codes of all experts twice: one by one, and stacked. Other
    tensors are there as read and as written.
    """
    first, experts = unit.tensors[0], _matrices(unit)
    if not experts:
        return 2 * _written(unit)
    matrices = 8 * tensor_bytes(first) // experts
    return matrices + (_written(unit) if not first.name.endswith("_blocks") else 2 * _written(unit))


def _geometry(recipe: Recipe, folder: Path | None) -> tuple[object, str, Source]:
    """(configuration, where it comes from, the shapes)."""
    from modeling.configuration_mimo_v2 import MiMoV2Config
    from modeling.published_geometries import MTP_LAYERS, OTHER_RELEASES, released_config

    own = recipe.model.path
    # With another folder, or a published geometry to fall back on, the base need not be here.
    base = Path(own) if own and (folder or recipe.model.released) else local_folder(own) if own else None
    path = folder or base
    if folder is not None and not folder.is_dir():
        raise ValueError(f"{folder}: no such checkpoint folder")
    location = next((p for p in (path, base) if p and (p / "config.json").is_file()), None)
    if path is not None and location is not None:
        config = configuration(read_json(location / "config.json"))
        refuse_layout(resolve_layout(recipe.export.layout, config), config, recipe.export.dense)
        if any(next(path.glob(pattern), None) for pattern in WEIGHT_FILES):
            return config, str(path), open_source(path)
        return config, str(path), _shapes(str(path), config)
    released = recipe.model.released
    if released is None or folder is not None:
        raise ValueError(f"model.path: {path}: no config.json to plan with, and model.released names no published geometry")
    if released in OTHER_RELEASES:
        from transformers import CONFIG_MAPPING

        kind, difference = OTHER_RELEASES[released]
        config = CONFIG_MAPPING[kind](**difference)
        refuse_layout(resolve_layout(recipe.export.layout, config), config, recipe.export.dense)
        return config, released, _shapes(released, config)
    config = MiMoV2Config(**released_config(released))
    inventory = published_tensors(config, experts="bf16", dense="fp8", router="F32", mtp_layers=MTP_LAYERS)
    return config, released, ShapeSource(released, {t.name: (t.shape, t.dtype) for t in inventory})


def _shapes(name: str, config) -> Source:
    """Shapes of a bf16 model that exists only as a configuration."""
    if config.model_type == "mimo_v2":
        inventory = published_tensors(config, experts="bf16", dense="bf16", router="BF16")
        return ShapeSource(name, {t.name: (t.shape, t.dtype) for t in inventory})
    return ShapeSource(name, {n: (shape, "BF16") for n, shape in family_of(config).published(config).shapes.items()})


def run(recipe: Recipe, folder: Path | None = None) -> int:
    """Prints the plan."""
    from rich.console import Console
    from rich.table import Table

    plan = make_plan(recipe, folder)
    table = Table(title=f"{plan.name}, layout {plan.layout}: {plan.tensors:,} tensors, {plan.expert_matrices:,} expert "
                  "matrices in MXFP4")
    for column in ("dtype", "elements", "bytes", "GB"):
        table.add_column(column, justify="left" if column == "dtype" else "right")
    for dtype in sorted(plan.bytes):
        size = plan.bytes[dtype]
        table.add_row(dtype, f"{plan.elements[dtype]:,}", f"{size:,}", f"{size / 1e9:.3f}")
    total = sum(plan.bytes.values())
    table.add_row("all", f"{sum(plan.elements.values()):,}", f"{total:,}", f"{total / 1e9:.3f}")
    Console(width=120).print(table)
    limit, first = recipe.export.shard_bytes, plan.largest_unit.tensors[0]
    code = ", ".join(REMOTE_CODE) + ", " if plan.layout == "native" else ""
    print(f"files: {len(plan.shards)} of at most {limit / 1e9:g} GB of tensors (largest {max(s.bytes for s in plan.shards):,} "
          f"bytes), index, {code}tokenizer")
    print(f"peak memory of one writer: {plan.peak_bytes / 1e9:.3f} GB above the interpreter's, for {first.name} "
          f"{list(first.shape)}; writers: {recipe.export.processes}")
    return 0
