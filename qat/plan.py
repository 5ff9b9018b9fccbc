"""`--plan`: what a recipe would do, without weights or an accelerator.

Builds the model on the meta device (no memory), finds the expert tensors with the function that training uses, and adds
up memory per rank, bytes on disk and communication for the cluster that the recipe names. The arithmetic is a model:
activations and communication are estimates (stated where they are computed), everything else is exact for the layout
described in `qat.expert_quantizer`. Rejected: measuring a small model and extrapolating (hides what grows with what).

Memory of one rank under plain data parallelism, in bytes, for P_e expert weights and P_o other weights of w bytes each
(`model.dtype`), T trained weights (P_e, or all); a sharded run's is in `qat.sharded_plan`:

    compute weights     (P_e + P_o) x w            experts on the MXFP4 grid
    teacher's weights   T x w                      frozen tensors are shared with the student
    masters             P_e x 4                    float32
    optimizer           T x 8  (muon: x 4)         float32 moments
    control             P_e x 4                    float32 running means of the masters, for each that the recipe asks for
    gradients           T x 4                      float32
    last codes          P_e x 17/32                what health reports compare with
    activations         `activation_bytes`
    logits              chunk_tokens x vocabulary x 4 x 4    student and teacher, forward and backward
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field

from checkpoint.families.registry import refuse_layout, resolve_layout
from qat import sharded_plan
from qat.expert_quantizer import describe, find_expert_tensors
from qat.meta_model import meta_model, model_and_release
from qat.preflight import Sizes, checkpoint_bytes, foresee, sizes_of, teacher_states, writes
from qat.sharded_plan import CODE_BYTES, GIB, Placement
from recipes.schema import Recipe
from storage.terminal import counted
from training.preflight import NOT_READY, print_readiness
from training.schedule import peak
from training.sharding.layout import layout_of, require_divisible
from training.sharding.preview import place

SHARD_BYTES = 5 * 10**9
# What the allocator, NCCL and fragmentation take of an accelerator before the first tensor.
RESERVED_SHARE = 0.08
EXPERTS, MTP = "experts", "MTP layers (copied, not in the decoder)"


@dataclass
class Plan:
    """Everything `--plan` prints; parameters in elements, memory, disk and communication in bytes."""

    model: str
    ranks: int
    tokens_per_step: int
    steps: int
    quantized: list[tuple[str, str, int, int]]
    matrices: int
    groups: dict[str, int]
    precision: dict[str, tuple[str, str]]
    memory: dict[str, int]
    host_memory: dict[str, int]
    disk: dict[str, int]
    checkpoint: int
    export: dict[str, int]
    communication: dict[str, int]
    mtp_parameters: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    available: int | None = None
    host_available: int | None = None
    notes: list[str] = field(default_factory=list)


def run(recipe: Recipe) -> int:
    """Prints the plan; returns the exit code: 0, or that of a run that would be refused.

    Raises:
        ValueError: the run cannot fit the cluster it names: resource, need, have, remedy.
    """
    plan = make_plan(recipe)
    render(plan)
    ready = print_readiness(recipe, "qat", foresee(recipe))
    refuse_if_too_large(plan, recipe)
    return 0 if ready else NOT_READY


def make_plan(recipe: Recipe) -> Plan:
    """Adds everything up.

    Raises:
        ValueError: no geometry to plan with; nothing to quantize; experts that the ranks cannot divide.
    """
    model, name, inventory = model_and_release(recipe)
    refuse_layout(resolve_layout(recipe.export.layout, model.config), model.config, recipe.export.dense)
    tensors = find_expert_tensors(model)
    groups = _groups(model, {t.name for t in tensors})
    sizes = sizes_of(recipe, groups[EXPERTS], sum(groups.values()))
    cluster, qat = recipe.cluster, recipe.qat
    offload = bool(cluster and cluster.offload_optimizer)
    notes = _notes(recipe)
    if cluster is not None and cluster.sharding != "ddp" and sizes.ranks > 1:
        layout, shape = layout_of(cluster, sizes.ranks), sharded_plan.shape_of(model)
        if cluster.sharding == "zero3":
            held, about = sharded_plan.under_zero3(recipe, tensors, shape, layout)
        else:
            require_divisible(layout, {t.name: t.num_experts for t in tensors})
            held = place(lambda: meta_model(recipe)[0], {t.name for t in tensors}, layout)
            about = sharded_plan.notes(held, layout, shape)
        state = sharded_plan.state_bytes(recipe, held)
        working = sharded_plan.working_bytes(recipe, held, layout, shape) | _passing_bytes(recipe, model, sizes.width)
        shards = layout.ranks // layout.replicas
        communication, over_link = sharded_plan.communication(recipe, held, layout, shape)
        notes = about + notes
    else:
        state = _state_bytes(recipe, sizes)
        working = _working_bytes(recipe, sizes) | _passing_bytes(recipe, model, sizes.width)
        shards = 1
        communication, over_link = _communication(recipe, sizes), set()
    checkpoint = checkpoint_bytes(recipe, model, sizes)
    working |= _evaluation_bytes(recipe, model, sizes, shards)
    return Plan(
        model=name, ranks=sizes.ranks, steps=qat.steps,
        tokens_per_step=qat.batch_size * recipe.data.sequence_length * qat.gradient_accumulation * sizes.ranks,
        quantized=describe(tensors, model), matrices=_matrices(tensors), groups=groups,
        precision=_precision(groups, inventory, recipe.model.dtype),
        mtp_parameters=sum(t.elements for t in inventory or () if _kind(t.name) == MTP and "scale" not in t.name),
        memory=working | ({} if offload else state), host_memory=state if offload else {},
        disk=writes(recipe, checkpoint, sizes) | teacher_states(recipe, model, sizes), checkpoint=checkpoint,
        export=_export_bytes(inventory, sizes),
        communication=communication, seconds=_seconds(recipe, communication, over_link),
        available=int(cluster.memory_gib * GIB * (1 - RESERVED_SHARE)) if cluster else None,
        host_available=int(cluster.host_memory_gib * GIB / cluster.accelerators_per_node) if offload else None,
        notes=notes)


def propose(recipe: Recipe, *, gpus: int, gpu_memory: float, price: float, mfu: float, peak_tflops: float) -> int:
    """Prints the layouts of at most `gpus` accelerators of `gpu_memory` GiB that fit, with hours and price; exit code.

    Raises:
        ValueError: none fits: what the largest of them would need.
    """
    from rich.console import Console
    from rich.table import Table

    model, name = meta_model(recipe)
    width = 4 if recipe.model.dtype == "float32" else 2
    passing = sum(_passing_bytes(recipe, model, width).values())
    available = int(gpu_memory * GIB * (1 - RESERVED_SHARE))
    found = sharded_plan.proposals(recipe, model, gpus=gpus, available=available, activations=passing)
    if not found:
        any_size = sharded_plan.proposals(recipe, model, gpus=gpus, available=2**62, activations=passing)
        least = min(any_size, key=lambda p: p.memory)
        raise ValueError(f"--gpus {gpus} --gpu-memory {gpu_memory:g}: no layout fits: {least.layout} needs "
                         f"{least.memory / GIB:,.1f} GiB of {available / GIB:,.1f} usable; try more GPUs, "
                         "qat.optimizer.name=muon or qat.gradient_checkpointing=true")
    shape = sharded_plan.shape_of(model)
    rate = sharded_plan.tokens_per_second(recipe, shape, mfu=mfu, peak_tflops=peak_tflops)
    per_rank = recipe.qat.steps * recipe.qat.batch_size * recipe.data.sequence_length * recipe.qat.gradient_accumulation
    ranks_of_recipe = recipe.cluster.nodes * recipe.cluster.accelerators_per_node if recipe.cluster else 1
    tokens = per_rank * ranks_of_recipe
    hours = tokens / rate / 3600
    console = Console(width=110)
    table = Table("ranks", "cluster.expert_parallel", "memory per rank (GiB)", "received per step (GB)", "hours",
                  title=f"{name}: layouts that fit {gpu_memory:g} GiB, the cheapest first")
    for proposal in found[:6]:
        table.add_row(str(proposal.layout.ranks), str(proposal.layout.expert_parallel), f"{proposal.memory / GIB:,.1f}",
                      f"{proposal.received / 1e9:,.1f}", f"{hours / proposal.layout.ranks:,.1f}")
    console.print(table)
    best = found[0].layout
    console.print(f"proposed: torchrun over {best.ranks} GPUs, cluster.sharding=fsdp2 "
                  f"cluster.expert_parallel={best.expert_parallel}", highlight=False)
    console.print(f"{tokens / 1e9:,.2f} B tokens (those of the recipe on its own cluster): {hours:,.0f} GPU-hours, "
                  f"{hours * price:,.0f} at {price:g} per GPU-hour", highlight=False)
    console.print(f"assumed, not measured: {mfu:.0%} of {peak_tflops:g} TFLOP/s, so {rate:,.0f} tokens/s per GPU",
                  highlight=False)
    return 0


def _kind(name: str) -> str:
    """The group that a tensor is counted in, by its (training or published) name."""
    return _kind_of_words(".".join(word for word in name.split(".") if not word.isdigit()))


@functools.cache
def _kind_of_words(name: str) -> str:
    kinds = ((MTP, r"\.mtp\."), ("expert biases", r"experts\..*bias"), (EXPERTS, r"\.experts\."), ("embedding", r"embed"),
             ("output head", r"lm_head"), ("router", r"\.(gate|router)\."), ("norms", r"norm"), ("attention", r"attn"),
             ("dense MLP", r"mlp"))
    return next((kind for kind, pattern in kinds if re.search(pattern, name)), "other")


def _groups(model, experts: set[str]) -> dict[str, int]:
    """Parameters by group, in the order of first appearance."""
    groups: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        kind = EXPERTS if name in experts else _kind(name)
        groups[kind] = groups.get(kind, 0) + parameter.numel()
    return groups


def _precision(groups: dict[str, int], inventory, dtype: str) -> dict[str, tuple[str, str]]:
    """(in training, in the exported files) of each group."""
    exported: dict[str, list[str]] = {}
    for tensor in inventory or ():
        kinds = exported.setdefault(_kind(tensor.name), [])
        if tensor.dtype not in kinds:
            kinds.append(tensor.dtype)
    rows = {kind: (dtype, "BF16") for kind in groups}
    rows[EXPERTS] = (f"{dtype}, on the MXFP4 grid", "U8")
    for kind, dtypes in exported.items():
        rows[kind] = (rows[kind][0] if kind in rows else "not loaded", ", ".join(dtypes))
    return rows


def _matrices(tensors) -> int:
    """Matrices in the sense of a published checkpoint: gate, up and down of every expert."""
    return sum(t.num_experts * (2 if "gate_up" in t.name else 1) for t in tensors)


def _state_bytes(recipe: Recipe, sizes: Sizes) -> dict[str, int]:
    """What the optimizer's side of one process holds."""
    return sharded_plan.state_bytes(recipe, Placement(sizes.experts, sizes.others, 0, 0, True))


def _working_bytes(recipe: Recipe, sizes: Sizes) -> dict[str, int]:
    """What lies on the accelerator of one process beside the optimizer's side and what passes through."""
    return {
        f"compute weights ({recipe.model.dtype})": sizes.total * sizes.width,
        "teacher's own weights": 0 if recipe.qat.teacher == "disk" else sizes.trained * sizes.width,
        "gradients (float32)": sizes.trained * 4,
        "last codes (health)": int(sizes.experts * CODE_BYTES),
    }


def _passing_bytes(recipe: Recipe, model, width: int) -> dict[str, int]:
    """Activations and logits of one micro-step."""
    qat, config = recipe.qat, model.config.get_text_config()
    tokens = qat.batch_size * recipe.data.sequence_length
    return {
        f"activations ({tokens:,} tokens{', recomputed' if qat.gradient_checkpointing else ''})": activation_bytes(
            config, tokens, width, recomputed=qat.gradient_checkpointing, hidden_loss=qat.loss.hidden > 0),
        "logits (one chunk)": min(qat.loss.chunk_tokens, tokens) * config.vocab_size * 4 * 4,
    }


def _evaluation_bytes(recipe: Recipe, model, sizes: Sizes, shards: int) -> dict[str, int]:
    """What held-out text takes beyond training: states of the teacher; float32 copies at the end, when gradients are gone."""
    qat, found = recipe.qat, {}
    if qat.heldout_every:
        tokens = qat.heldout_sequences * len(recipe.data.heldout) * recipe.data.sequence_length
        found["held-out states (heldout_every)"] = tokens * model.config.get_text_config().hidden_size * sizes.width
    if qat.evaluation_dtype == "float32":
        found["float32 copies at the end, beyond gradients"] = max(0, 8 * sizes.total - 4 * sizes.trained) // shards
    return found


def activation_bytes(config, tokens: int, width: int, *, recomputed: bool, hidden_loss: bool = False) -> int:
    """Estimate of what autograd keeps for `tokens` tokens, in bytes, with fused attention (no stored scores).

    A layer keeps, for each token: two norms (input, its float32 copy, output); queries, keys and values before and after
    rotation, attention's output; and for each of the token's experts the gathered input, gate and up, the activated gate,
    their product and the output. With recomputation only each layer's input stays, plus one layer in full. A loss on
    hidden states adds the teacher's layer outputs and the float32 differences.
    """
    hidden, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    keys = getattr(config, "head_dim", None) or hidden // heads
    values = getattr(config, "v_head_dim", None) or keys
    groups = config.num_key_value_heads
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    norms = 2 * hidden * (2 * width + 4)
    attention = (2 * keys * (heads + groups) + values * (heads + groups)) * width
    experts = config.num_experts_per_tok * (2 * hidden + 4 * inner) * width
    one = tokens * (norms + attention + experts)
    captured = layers * tokens * hidden * (width + 4) if hidden_loss else 0
    return captured + (layers * tokens * hidden * width + one if recomputed else layers * one)


def _export_bytes(inventory, sizes: Sizes) -> dict[str, int]:
    """Bytes of the exported FP4 checkpoint by dtype: from the published inventory, or everything but experts in BF16."""
    if inventory is None:
        return {"U8": sizes.experts * 17 // 32, "BF16": sizes.others * 2}
    by_dtype: dict[str, int] = {}
    for tensor in inventory:
        by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + tensor.bytes
    return by_dtype


def _communication(recipe: Recipe, sizes: Sizes) -> dict[str, int]:
    """Bytes that one process receives per step under data parallelism."""
    R = sizes.ranks
    return {} if R == 1 else {"all-reduce of gradients (float32)": 2 * sizes.trained * 4 * (R - 1) // R}


def _seconds(recipe: Recipe, communication: dict[str, int], over_link: set[str]) -> dict[str, float]:
    """Seconds per step at the recipe's bandwidths, nothing overlapped; between nodes as if no byte had a nearer source."""
    cluster = recipe.cluster
    if cluster is None:
        return {}
    speeds = {name: cluster.link_gb_per_s if cluster.nodes == 1 or name in over_link else cluster.network_gb_per_s
              for name in communication}
    return {name: size / (speeds[name] * 1e9) for name, size in communication.items() if speeds[name]}


def _notes(recipe: Recipe) -> list[str]:
    notes = []
    if recipe.cluster is None:
        notes.append("the recipe names no cluster: figures are for one process and are not checked against memory")
    elif recipe.cluster.offload_optimizer and recipe.cluster.sharding != "zero3":
        notes.append("cluster.offload_optimizer is planned here; qat/train.py offloads with cluster.sharding: zero3 alone")
    steps, optimizer = recipe.qat.steps, recipe.qat.optimizer
    if (reached := peak(steps, optimizer)) < 1:
        notes.append(f"qat.optimizer.warmup_steps: {optimizer.warmup_steps} of {steps} steps: the rate ends at {reached:.0%} "
                     "of qat.optimizer.learning_rate")
    if recipe.qat.warm_start.method != "none":
        notes.append("second moments of the initial codes (before training; qat.warm_start.moments_gib) are not counted")
    return notes


def refuse_if_too_large(plan: Plan, recipe: Recipe) -> None:
    """Raises ValueError naming resource, need, have and remedy if the plan does not fit the recipe's cluster."""
    need, have = sum(plan.memory.values()), plan.available
    if have is not None and need > have:
        remedy = "more nodes, cluster.sharding: fsdp2" if recipe.cluster.sharding == "ddp" else "more nodes"
        if not recipe.qat.gradient_checkpointing:
            remedy += ", qat.gradient_checkpointing: true"
        if recipe.cluster.sharding == "zero3" and not recipe.cluster.offload_optimizer:
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
    total, experts = sum(plan.groups.values()), plan.groups[EXPERTS]
    console.print(f"[bold]{plan.model}[/]: {_short(total)} parameters, {_short(experts)} of them in "
                  f"{plan.matrices:,} expert matrices quantized to MXFP4", highlight=False, soft_wrap=True)
    console.print(f"{counted(plan.ranks, 'rank')}, {plan.tokens_per_step:,} tokens per step, "
                  f"{_short(plan.tokens_per_step * plan.steps)} tokens in {counted(plan.steps, 'step')}", highlight=False)
    table = Table("tensors", "shape", "count", "parameters", title="what is quantized")
    for pattern, shape, count, parameters in plan.quantized:
        table.add_row(pattern, shape, str(count), f"{parameters:,}")
    console.print(table)
    table = Table("group", "parameters", "in training", "in the exported files", title="precision")
    for group, (training, exported) in plan.precision.items():
        table.add_row(group, f"{plan.groups.get(group, plan.mtp_parameters):,}", training, exported)
    console.print(table)
    _bytes_table(console, "memory per rank", plan.memory, plan.available)
    if plan.host_memory:
        _bytes_table(console, "host memory per rank", plan.host_memory, plan.host_available)
    console.print(f"one training checkpoint: {_figure(plan.checkpoint / 1e9)} GB", highlight=False)
    _bytes_table(console, "disk: what the run writes below output, at most", plan.disk, None)
    _bytes_table(console, "disk: the exported FP4 checkpoint, beside it", plan.export, None)
    least = -(-sum(plan.export.values()) // SHARD_BYTES)
    console.print(f"shards of 5 GB: at least {least} (export/to_hf.py --plan deals the tensors to files)")
    if plan.communication:
        _bytes_table(console, "communication: what one rank receives per step", plan.communication, None,
                     seconds=plan.seconds)
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)


def _short(count: int) -> str:
    """A count in billions or millions, in full below."""
    return f"{count / 1e9:,.2f} B" if count >= 1e8 else f"{count / 1e6:,.2f} M" if count >= 1e5 else f"{count:,}"


def _figure(value: float) -> str:
    """Two digits after the point, or two that count."""
    return f"{value:,.2f}" if value >= 0.1 or not value else f"{value:.2g}"


def _bytes_table(console, title: str, rows: dict[str, int], available: int | None, *,
                 seconds: dict[str, float] | None = None) -> None:
    from rich.table import Table

    table = Table("", "GiB", "GB", *(["seconds, not overlapped"] if seconds else []), title=title)
    last = [f"{sum(seconds.values()):.1f}"] if seconds else []
    for name, size in rows.items():
        cells = [f"{seconds[name]:.1f}" if name in seconds else "?"] if seconds else []
        table.add_row(name, _figure(size / GIB), _figure(size / 1e9), *cells)
    size = sum(rows.values())
    table.add_row("[bold]total[/]", _figure(size / GIB), _figure(size / 1e9), *last)
    if available is not None:
        table.add_row("available", f"{available / GIB:,.2f}", f"{available / 1e9:,.2f}")
    console.print(table)
