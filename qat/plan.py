"""`--plan`: what a recipe would do, without weights or an accelerator.

Builds the model on the meta device (no memory), finds the expert tensors with the function that training uses, and adds
up memory per rank, bytes on disk and communication for the cluster that the recipe names. The arithmetic is a model:
activations are an estimate (stated below), everything else is exact for the layout described in `qat.attach`.

Memory of one rank, in bytes, for P_e expert weights and P_o other weights, R ranks, shards of S ranks (S = R when
sharded, 1 under plain data parallelism):

    compute weights     (P_e + P_o) x 2 / S        bf16; experts on the MXFP4 grid
    teacher's experts   P_e x 2 / S                frozen tensors are shared with the student
    masters             P_e x 4 / S                float32 (host memory if offloaded)
    optimizer           P_e x 8 / S  (muon: x 4)   float32 moments (host memory if offloaded)
    gradients           P_e x 4 / S                float32
    gathered layers     largest layer x 2 x 2      sharded: one layer's weights, the next prefetched; with expert
                                                   parallelism only the rank's share of the experts
    activations         see `_activation_bytes`
    logits              chunk_tokens x vocabulary x 4 x 4    student and teacher, forward and backward
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field

from qat.attach import find_expert_tensors
from recipes.schema import Recipe

GIB = 2**30
SHARD_BYTES = 5 * 10**9
# What the allocator, NCCL and fragmentation take of an accelerator before the first tensor.
RESERVED_SHARE = 0.08


@dataclass
class Plan:
    """Everything `--plan` prints; counts in elements, memory in bytes."""

    model: str
    quantized: list[tuple[str, str, int, int]]
    matrices: int
    groups: dict[str, int]
    memory: dict[str, int]
    host_memory: dict[str, int]
    disk: dict[str, int]
    export: dict[str, int]
    communication: dict[str, int]
    tokens_per_step: int
    ranks: int
    available: int | None = None
    host_available: int | None = None
    notes: list[str] = field(default_factory=list)


def run(recipe: Recipe) -> int:
    """Prints the plan; returns the exit code.

    Raises:
        ValueError: the run cannot fit the cluster it names: resource, need, have, remedy.
    """
    plan = make_plan(recipe)
    render(plan)
    refuse_if_too_large(plan, recipe)
    return 0


def make_plan(recipe: Recipe) -> Plan:
    """Adds everything up.

    Raises:
        ValueError: no geometry to plan with; nothing to quantize.
    """
    model, name, release = _meta_model(recipe)
    tensors = find_expert_tensors(model)
    experts = sum(t.parameter.numel() for t in tensors)
    groups = _groups(model, {t.name for t in tensors})
    total = sum(groups.values())
    cluster, qat = recipe.cluster, recipe.qat
    ranks = cluster.nodes * cluster.accelerators_per_node if cluster else 1
    shards = ranks if cluster and cluster.sharding != "ddp" else 1
    expert_parallel = cluster.expert_parallel if cluster else 1
    trained = total if qat.train == "all" else experts
    moments = 4 if qat.optimizer.name == "muon" else 8
    tokens = qat.batch_size * recipe.data.sequence_length
    states = {"masters (float32)": trained * 4 // shards, f"optimizer ({qat.optimizer.name})": trained * moments // shards}
    memory = {
        "compute weights (bf16)": total * 2 // shards,
        "teacher's trained weights (bf16)": trained * 2 // shards,
        "gradients (float32)": trained * 4 // shards,
        "gathered layers (two)": 2 * 2 * _largest_layer(model, expert_parallel) if shards > 1 else 0,
        f"activations ({tokens:,} tokens{', recomputed' if qat.gradient_checkpointing else ''})":
            _activation_bytes(model.config, tokens, qat.gradient_checkpointing),
        "logits (one chunk)": qat.loss.chunk_tokens * model.config.vocab_size * 4 * 4,
    }
    offload = bool(cluster and cluster.offload_optimizer)
    rows = _pattern_rows(tensors, total - experts)
    per_step = qat.gradient_accumulation
    return Plan(
        model=name, quantized=rows, matrices=_matrices(tensors), groups=groups,
        memory=memory | ({} if offload else states), host_memory=states if offload else {},
        disk={"training checkpoint (weights, masters, optimizer)": total * 2 + trained * (4 + moments),
              "checkpoints kept": (total * 2 + trained * (4 + moments)) * qat.keep_last},
        export=_export_bytes(model.config, release, experts, total),
        communication=_communication(shards, ranks, total - experts + experts // expert_parallel, trained, per_step),
        tokens_per_step=tokens * per_step * ranks, ranks=ranks,
        available=int(cluster.memory_gib * GIB * (1 - RESERVED_SHARE)) if cluster else None,
        host_available=int(cluster.host_memory_gib * GIB / cluster.accelerators_per_node) if offload else None,
        notes=_notes(recipe))


def _meta_model(recipe: Recipe):
    """The model on the meta device, its name, and whether it is a published MiMo-V2 release."""
    import torch

    from modeling.configuration_mimo_v2 import MiMoV2Config
    from modeling.modeling_mimo_v2 import MiMoV2ForCausalLM
    from modeling.released import released_config

    if recipe.model.released is not None:
        config = MiMoV2Config(**released_config(recipe.model.released))
        with torch.device("meta"):
            return MiMoV2ForCausalLM(config), recipe.model.released, True
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoConfig.register("mimo_v2", MiMoV2Config, exist_ok=True)
    AutoModelForCausalLM.register(MiMoV2Config, MiMoV2ForCausalLM, exist_ok=True)
    try:
        config = AutoConfig.from_pretrained(recipe.model.path, trust_remote_code=recipe.model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.path: {recipe.model.path}: no config.json to plan with: "
                         f"{str(error).splitlines()[0]}") from None
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config), recipe.model.path, False


def _groups(model, experts: set[str]) -> dict[str, int]:
    """Parameters by group, in the order of first appearance."""
    kinds = (("experts (MXFP4)", None), ("embedding", r"embed"), ("output head", r"lm_head"), ("attention", r"attn"),
             ("router", r"\.(gate|router)\."), ("norms", r"norm"), ("dense MLP", r"mlp"))
    groups: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        kind = "experts (MXFP4)" if name in experts else next(
            (k for k, pattern in kinds[1:] if re.search(pattern, name)), "other")
        groups[kind] = groups.get(kind, 0) + parameter.numel()
    return groups


def _pattern_rows(tensors, others: int) -> list[tuple[str, str, int, int]]:
    rows: dict[tuple[str, str], list[int]] = {}
    for t in tensors:
        rows.setdefault((re.sub(r"\.\d+\.", ".*.", t.name), str(list(t.parameter.shape))), []).append(t.parameter.numel())
    return [*((p, s, len(n), sum(n)) for (p, s), n in rows.items()), ("everything else (kept)", "", 0, others)]


def _matrices(tensors) -> int:
    """Matrices in the sense of a published checkpoint: gate, up and down of every expert."""
    return sum(t.num_experts * (2 if "gate_up" in t.name else 1) for t in tensors)


def _largest_layer(model, expert_parallel: int) -> int:
    """Weights of the largest layer that one rank must hold to compute it: all but the experts, and its share of those."""
    def share(parameter) -> int:
        return parameter.numel() // (expert_parallel if parameter.ndim == 3 else 1)

    return max(sum(share(p) for p in layer.parameters()) for layer in model.base_model.layers)


def _activation_bytes(config, tokens: int, recomputed: bool) -> int:
    """Estimate. With recomputation: each layer's input (bf16) plus one layer in full. Without: every layer in full.

    A layer in full holds about 34 hidden-sized bf16 values per token outside the experts (Korthikanti et al.,
    arXiv 2205.05198, without stored attention scores), and 4 intermediate-sized ones for each of the token's experts.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    one = tokens * (34 * hidden + 2 * 4 * inner * config.num_experts_per_tok)
    return layers * tokens * hidden * 2 + one if recomputed else layers * one


def _export_bytes(config, release: bool, experts: int, total: int) -> dict[str, int]:
    """Bytes of the exported FP4 checkpoint by dtype; for releases from the published inventory, with their MTP layers."""
    if not release:
        return {"U8 (codes and scales)": experts * 17 // 32, "BF16 (everything else)": (total - experts) * 2}
    from modeling.names import published_tensors
    from modeling.released import MTP_LAYERS

    sizes: dict[str, int] = {}
    for tensor in published_tensors(config, mtp_layers=MTP_LAYERS):
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.bytes
    return sizes


def _communication(shards: int, ranks: int, gathered: int, trained: int, accumulation: int) -> dict[str, int]:
    """Bytes that one rank receives per step; `gathered` weights pass through each rank in one sweep over the layers."""
    if ranks == 1:
        return {}
    if shards == 1:
        return {"all-reduce of gradients (float32)": 2 * trained * 4 * (ranks - 1) // ranks}
    gathers = 3 * accumulation  # forward, backward, and the teacher's forward
    return {"all-gather of weights (bf16)": gathers * gathered * 2 * (shards - 1) // shards,
            "reduce-scatter of gradients (float32)": accumulation * trained * 4 * (shards - 1) // shards}


def _notes(recipe: Recipe) -> list[str]:
    notes = []
    if recipe.cluster is None:
        notes.append("the recipe names no cluster: figures are for one process and are not checked against memory")
    elif recipe.cluster.sharding != "ddp":
        notes.append(f"sharding {recipe.cluster.sharding} is planned here; qat/train.py itself runs data parallelism so far")
    if recipe.cluster and recipe.cluster.expert_parallel > 1:
        notes.append("expert parallelism moves tokens instead of expert weights: its all-to-all is not counted")
    return notes


def refuse_if_too_large(plan: Plan, recipe: Recipe) -> None:
    """Raises ValueError naming resource, need, have and remedy if the plan does not fit the recipe's cluster."""
    need, have = sum(plan.memory.values()), plan.available
    if have is not None and need > have:
        remedy = "more nodes, cluster.sharding: fsdp2" if recipe.cluster.sharding == "ddp" else "more nodes"
        if not recipe.qat.gradient_checkpointing:
            remedy += ", qat.gradient_checkpointing: true"
        if not recipe.cluster.offload_optimizer:
            remedy += ", cluster.offload_optimizer: true"
        raise ValueError(f"does not fit: accelerator memory per rank {need / GIB:,.1f} GiB needed, {have / GIB:,.1f} GiB "
                         f"available of {recipe.cluster.memory_gib:g} (the rest is kept for the runtime); try {remedy}")
    need, have = sum(plan.host_memory.values()), plan.host_available
    if have is not None and need > have:
        raise ValueError(f"does not fit: host memory per rank {need / GIB:,.1f} GiB needed, {have / GIB:,.1f} GiB available; "
                         "try more nodes")


def render(plan: Plan) -> None:
    """Prints the plan as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110)
    total = sum(plan.groups.values())
    experts = plan.groups["experts (MXFP4)"]
    console.print(f"[bold]{plan.model}[/]: {total / 1e9:,.2f} B parameters, {experts / 1e9:,.2f} B of them in "
                  f"{plan.matrices:,} expert matrices quantized to MXFP4; {plan.ranks} ranks, "
                  f"{plan.tokens_per_step:,} tokens per step")
    table = Table(title="what is quantized")
    for column in ("tensors", "shape", "count", "parameters"):
        table.add_column(column, no_wrap=column == "tensors", overflow="fold")
    for pattern, shape, count, parameters in plan.quantized:
        table.add_row(pattern, shape, str(count or ""), f"{parameters:,}")
    console.print(table)
    table = Table("group", "parameters", "precision in training", title="what stays")
    for group, parameters in plan.groups.items():
        table.add_row(group, f"{parameters:,}", "MXFP4 values in bf16" if "MXFP4" in group else "bf16, as loaded")
    console.print(table)
    _bytes_table(console, "memory per rank", plan.memory, plan.available)
    if plan.host_memory:
        _bytes_table(console, "host memory per rank", plan.host_memory, plan.host_available)
    _bytes_table(console, "disk", plan.disk, None, total=False)
    _bytes_table(console, "exported FP4 checkpoint", plan.export, None)
    console.print(f"shards of 5 GB: {-(-sum(plan.export.values()) // SHARD_BYTES)}")
    if plan.communication:
        _bytes_table(console, "communication of one rank per step", plan.communication, None)
    for note in plan.notes:
        console.print(f"note: {note}")


def _bytes_table(console, title: str, rows: dict[str, int], available: int | None, *, total: bool = True) -> None:
    from rich.table import Table

    table = Table("", "GiB", "GB", title=title)
    for name, size in rows.items():
        table.add_row(name, f"{size / GIB:,.2f}", f"{size / 1e9:,.2f}")
    if total:
        table.add_row("[bold]total[/]", f"{sum(rows.values()) / GIB:,.2f}", f"{sum(rows.values()) / 1e9:,.2f}")
    if available is not None:
        table.add_row("available", f"{available / GIB:,.2f}", f"{available / 1e9:,.2f}")
    console.print(table)


def as_json(plan: Plan) -> dict:
    """The plan as plain data."""
    return asdict(plan)
