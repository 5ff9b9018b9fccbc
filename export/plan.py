"""`--plan`: what an export would write, from the geometry alone; no weights are read.

The geometry is that of the folder `model.path` if there is one, else the published one that `model.released` names. For a
release the inventory is the published one (FP8 matrices, float32 router, MTP layers copied through).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from export.config_files import REMOTE_CODE
from export.layouts import Unit, refuse_geometry
from export.shards import Shard, plan_shards, tensor_bytes
from export.sources import open_source, read_json
from modeling.names import PublishedTensor, fused_name, published_tensors
from recipes.schema import Recipe


@dataclass
class Plan:
    """What would be written: bytes of tensors by dtype, files, and memory of one writer."""

    name: str
    layout: str
    tensors: int
    expert_matrices: int
    elements: dict[str, int]
    bytes: dict[str, int]
    shards: list[Shard]
    largest_unit: PublishedTensor
    peak_bytes: int


def make_plan(recipe: Recipe) -> Plan:
    """Adds everything up.

    Raises:
        ValueError: no geometry, or a layout that cannot hold it.
    """
    config, name, options = _geometry(recipe)
    refuse_geometry(recipe.export.layout, config, recipe.export.dense)
    if recipe.export.layout != "native":
        raise ValueError(f"--plan: export.layout={recipe.export.layout}: expected native, the layout that a release's "
                         "geometry is published in")
    tensors = list(published_tensors(config, **options))
    units = _units(tensors)
    largest = max(tensors, key=_working_bytes)
    elements: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for t in tensors:
        elements[t.dtype] = elements.get(t.dtype, 0) + t.elements
        sizes[t.dtype] = sizes.get(t.dtype, 0) + tensor_bytes(t)
    return Plan(name=name, layout=recipe.export.layout, tensors=len(tensors), elements=elements, bytes=sizes,
                expert_matrices=sum(fused_name(t.name) is not None for t in tensors),
                shards=plan_shards(units, recipe.export.shard_bytes), largest_unit=largest, peak_bytes=_working_bytes(largest))


def _working_bytes(tensor: PublishedTensor) -> int:
    """Memory that one tensor takes on its way: as read and as written; packed codes also as bf16, read and rounded."""
    return tensor_bytes(tensor) * (2 + 4 * 2 if fused_name(tensor.name) else 2)


def _geometry(recipe: Recipe):
    """(configuration, where it comes from, options of `published_tensors`)."""
    from export.job import source_configuration
    from modeling.configuration_mimo_v2 import MiMoV2Config
    from modeling.released import MTP_LAYERS, released_config

    path = Path(recipe.model.path) if recipe.model.path else None
    if path is not None and (path / "config.json").is_file():
        config = source_configuration(read_json(path / "config.json"))
        if config.model_type != "mimo_v2":
            return config, str(path), {}
        infos = open_source(path).infos
        fp8 = any(dtype == "F8_E4M3" for _, dtype in infos.values())
        router = next((d for n, (_, d) in infos.items() if n.endswith("mlp.gate.weight")), "BF16")
        mtp = len({n.split(".")[3] for n in infos if n.startswith("model.mtp.layers.")})
        dense = "fp8" if fp8 or recipe.export.dense == "fp8" else "bf16"
        if dense == "bf16":
            config.attention_projection_layout = "split"  # see export.layouts
        return config, str(path), {"mtp_layers": mtp, "dense": dense, "router": router}
    if recipe.model.released is None:
        raise ValueError(f"model.path: {path}: no config.json to plan with, and model.released names no published geometry")
    return (MiMoV2Config(**released_config(recipe.model.released)), recipe.model.released,
            {"mtp_layers": MTP_LAYERS, "dense": "fp8", "router": "F32"})


def _units(tensors: list[PublishedTensor]) -> list[Unit]:
    """A matrix and its scales stay together, as the exporter writes them."""
    units: list[list[PublishedTensor]] = []
    for t in tensors:
        if units and t.name.startswith(units[-1][0].name + "_scale"):
            units[-1].append(t)
        else:
            units.append([t])
    return [Unit(tuple(group), _no_weights) for group in units]


def _no_weights():
    raise AssertionError("a plan has no weights to write")


def run(recipe: Recipe) -> int:
    """Prints the plan."""
    from rich.console import Console
    from rich.table import Table

    plan = make_plan(recipe)
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
    limit = recipe.export.shard_bytes
    print(f"files: {len(plan.shards)} of at most {limit / 1e9:g} GB (largest {max(s.bytes for s in plan.shards):,} bytes), "
          f"index, {', '.join(REMOTE_CODE)}, tokenizer")
    print(f"peak memory of one writer: {plan.peak_bytes / 1e9:.3f} GB above the interpreter's, for {plan.largest_unit.name} "
          f"{list(plan.largest_unit.shape)}; writers: {recipe.export.processes}")
    return 0
