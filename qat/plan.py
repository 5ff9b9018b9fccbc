"""`--plan`: what a recipe would do, without weights or an accelerator.

Builds the model on the meta device (no memory), finds the expert tensors with the function that training uses, and adds
up memory per rank, bytes on disk and communication for the cluster that the recipe names. The arithmetic is a model:
activations and communication are estimates (stated where they are computed), everything else is exact for the layout
described in `qat.attach`. Rejected: measuring a small model and extrapolating (hides what grows with what).

Memory of one rank, in bytes, for P_e expert weights and P_o other weights of w bytes each (`model.dtype`), R ranks, shards
of S ranks (S = R when sharded, 1 under plain data parallelism), T trained weights (P_e, or all):

    compute weights     (P_e + P_o) x w / S        experts on the MXFP4 grid
    teacher's weights   T x w / S                  frozen tensors are shared with the student
    masters             P_e x 4 / S                float32 (host memory if offloaded)
    optimizer           T x 8 / S  (muon: x 4)     float32 moments (host memory if offloaded)
    control             P_e x 4 / S                float32 running means of the masters, for each that the recipe asks for
    gradients           T x 4 / S                  float32
    last codes          P_e x 17/32 / S            what health reports compare with
    gathered layers     largest layer x 2 x w      sharded: one layer's weights, the next prefetched; with expert
    one layer's grads   its trained weights x 4    parallelism only the rank's share of the experts
    activations         `activation_bytes`
    logits              chunk_tokens x vocabulary x 4 x 4    student and teacher, forward and backward
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from checkpoint.families.registry import refuse_layout, resolve_layout
from mxfp4.format import BLOCK_SIZE
from qat.attach import describe, find_expert_tensors
from qat.geometry import meta_model
from recipes.schema import Recipe
from training.preflight import print_readiness

GIB = 2**30
SHARD_BYTES = 5 * 10**9
# What the allocator, NCCL and fragmentation take of an accelerator before the first tensor.
RESERVED_SHARE = 0.08
EXPERTS, MTP = "experts", "MTP layers (copied, not in the decoder)"
CODE_BYTES = 17 / 32  # half a byte a code, one scale byte per 32


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
    export: dict[str, int]
    communication: dict[str, int]
    mtp_parameters: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    available: int | None = None
    host_available: int | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Sizes:
    """Weights by what happens to them, and how they are divided; see the module's text for the letters."""

    experts: int
    others: int
    trained: int
    width: int
    ranks: int
    shards: int
    expert_parallel: int

    @property
    def total(self) -> int:
        return self.experts + self.others


def run(recipe: Recipe) -> int:
    """Prints the plan; returns the exit code.

    Raises:
        ValueError: the run cannot fit the cluster it names: resource, need, have, remedy.
    """
    plan = make_plan(recipe)
    render(plan)
    print_readiness(recipe, "qat")
    refuse_if_too_large(plan, recipe)
    return 0


def make_plan(recipe: Recipe) -> Plan:
    """Adds everything up.

    Raises:
        ValueError: no geometry to plan with; nothing to quantize; experts that the ranks cannot divide.
    """
    model, name, inventory = meta_model(recipe)
    refuse_layout(resolve_layout(recipe.export.layout, model.config), model.config, recipe.export.dense)
    tensors = find_expert_tensors(model)
    groups = _groups(model, {t.name for t in tensors})
    sizes = _sizes(recipe, groups)
    uneven = [t for t in tensors if t.num_experts % sizes.expert_parallel]
    if uneven:
        raise ValueError(f"cluster.expert_parallel: {sizes.expert_parallel} does not divide the {uneven[0].num_experts} "
                         f"experts of {uneven[0].name}")
    cluster, qat = recipe.cluster, recipe.qat
    offload = bool(cluster and cluster.offload_optimizer)
    state = _state_bytes(recipe, sizes)
    working = _working_bytes(recipe, sizes, model)
    communication, over_link = _communication(recipe, sizes, model.config, len({t.module for t in tensors}))
    whole = sum(_state_bytes(recipe, sizes, shards=1).values())
    checkpoint = sizes.total * sizes.width + int(sizes.experts * CODE_BYTES) + whole
    return Plan(
        model=name, ranks=sizes.ranks, steps=qat.steps,
        tokens_per_step=qat.batch_size * recipe.data.sequence_length * qat.gradient_accumulation * sizes.ranks,
        quantized=describe(tensors, model), matrices=_matrices(tensors), groups=groups,
        precision=_precision(groups, inventory, recipe.model.dtype),
        mtp_parameters=sum(t.elements for t in inventory or () if _kind(t.name) == MTP and "scale" not in t.name),
        memory=working | ({} if offload else state), host_memory=state if offload else {},
        disk={"training checkpoint": checkpoint, f"checkpoints kept ({qat.keep_last})": checkpoint * qat.keep_last},
        export=_export_bytes(inventory, sizes),
        communication=communication, seconds=_seconds(recipe, communication, over_link),
        available=int(cluster.memory_gib * GIB * (1 - RESERVED_SHARE)) if cluster else None,
        host_available=int(cluster.host_memory_gib * GIB / cluster.accelerators_per_node) if offload else None,
        notes=_notes(recipe))


def _kind(name: str) -> str:
    """The group that a tensor is counted in, by its (training or published) name."""
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


def _sizes(recipe: Recipe, groups: dict[str, int]) -> _Sizes:
    cluster, experts, total = recipe.cluster, groups[EXPERTS], sum(groups.values())
    ranks = cluster.nodes * cluster.accelerators_per_node if cluster else 1
    return _Sizes(experts=experts, others=total - experts, trained=total if recipe.qat.train == "all" else experts,
                  width=4 if recipe.model.dtype == "float32" else 2, ranks=ranks,
                  shards=ranks if cluster and cluster.sharding != "ddp" else 1,
                  expert_parallel=cluster.expert_parallel if cluster else 1)


def _matrices(tensors) -> int:
    """Matrices in the sense of a published checkpoint: gate, up and down of every expert."""
    return sum(t.num_experts * (2 if "gate_up" in t.name else 1) for t in tensors)


def _state_bytes(recipe: Recipe, sizes: _Sizes, shards: int | None = None) -> dict[str, int]:
    """What the optimizer's side holds on one of `shards` ranks (default: the plan's)."""
    qat, shards = recipe.qat, shards or sizes.shards
    moments = 4 if qat.optimizer.name == "muon" else 8
    state = {"masters (float32)": sizes.experts * 4, f"optimizer ({qat.optimizer.name})": sizes.trained * moments}
    if qat.oscillation.method != "none":
        state[f"oscillation control ({qat.oscillation.method})"] = sizes.experts * (
            {"ema": 4, "freeze": 2, "reset": 12}[qat.oscillation.method])  # a mean; a flip counter and a mark; three floats
    if qat.scales.method != "rule":
        state["shifts of block scales"] = sizes.experts // BLOCK_SIZE * (4 + (moments if qat.scales.method == "learned" else 0))
    if qat.average_last:
        state["average of the masters"] = sizes.experts * 4
    return {name: size // shards for name, size in state.items()}


def _working_bytes(recipe: Recipe, sizes: _Sizes, model) -> dict[str, int]:
    """What always lies on the accelerator of one rank."""
    qat, S, w = recipe.qat, sizes.shards, sizes.width
    tokens = qat.batch_size * recipe.data.sequence_length
    config = model.config.get_text_config()
    memory = {
        f"compute weights ({recipe.model.dtype})": sizes.total * w // S,
        "teacher's own weights": sizes.trained * w // S,
        "gradients (float32)": sizes.trained * 4 // S,
        "last codes (health)": int(sizes.experts * CODE_BYTES) // S,
    }
    if S > 1:
        layer_experts, layer_others = _largest_layer(model, sizes.expert_parallel)
        memory["gathered layers (two)"] = 2 * w * (layer_experts + layer_others)
        memory["one layer's gradients (float32)"] = 4 * (layer_experts + (layer_others if qat.train == "all" else 0))
    memory[f"activations ({tokens:,} tokens{', recomputed' if qat.gradient_checkpointing else ''})"] = activation_bytes(
        config, tokens, w, recomputed=qat.gradient_checkpointing, hidden_loss=qat.loss.hidden > 0)
    memory["logits (one chunk)"] = min(qat.loss.chunk_tokens, tokens) * config.vocab_size * 4 * 4
    return memory


def _largest_layer(model, expert_parallel: int) -> tuple[int, int]:
    """(expert weights of one rank's share, other weights) of the largest decoder layer."""
    layers = []
    for layer in model.base_model.layers:
        experts = sum(p.numel() for p in layer.parameters() if p.ndim == 3) // expert_parallel
        layers.append((experts, sum(p.numel() for p in layer.parameters() if p.ndim != 3)))
    return max(layers, key=sum)


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


def _export_bytes(inventory, sizes: _Sizes) -> dict[str, int]:
    """Bytes of the exported FP4 checkpoint by dtype: from the published inventory, or everything but experts in BF16."""
    if inventory is None:
        return {"U8": sizes.experts * 17 // 32, "BF16": sizes.others * 2}
    by_dtype: dict[str, int] = {}
    for tensor in inventory:
        by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + tensor.bytes
    return by_dtype


def _communication(recipe: Recipe, sizes: _Sizes, config, moe_layers: int) -> tuple[dict[str, int], set[str]]:
    """Bytes that one rank receives per step, and which rows stay within a node when expert parallelism does.

    Sharded weights pass through every rank three times per micro-step: teacher's forward, student's forward, backward.
    With expert parallelism each rank gathers its share of the experts only, from the ranks that hold the same share, and
    tokens travel instead: out and back in each forward (teacher, student, recomputation) and in the backward pass.
    """
    qat, R, w, E = recipe.qat, sizes.ranks, sizes.width, sizes.expert_parallel
    if R == 1:
        return {}, set()
    twins = R // E  # ranks that hold the same share of the experts
    trained_others = sizes.trained - sizes.experts
    if sizes.shards == 1:
        return {"all-reduce of gradients (float32)": 2 * (sizes.experts // E * 4 * (twins - 1) // twins
                                                          + trained_others * 4 * (R - 1) // R)}, set()
    micro, config = qat.gradient_accumulation, config.get_text_config()
    rows = {
        f"all-gather of experts ({recipe.model.dtype})": 3 * micro * (sizes.experts // E) * w * (twins - 1) // twins,
        f"all-gather of everything else ({recipe.model.dtype})": 3 * micro * sizes.others * w * (R - 1) // R,
        "reduce-scatter of gradients (float32)": micro * 4 * (sizes.experts // E * (twins - 1) // twins
                                                              + trained_others * (R - 1) // R),
    }
    if E == 1:
        return rows, set()
    passes = 3 + qat.gradient_checkpointing
    sent = qat.batch_size * recipe.data.sequence_length * config.num_experts_per_tok * config.hidden_size * w
    rows["all-to-all of tokens (experts)"] = 2 * passes * micro * moe_layers * sent * (E - 1) // E
    return rows, {"all-to-all of tokens (experts)"} if E <= recipe.cluster.accelerators_per_node else set()


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
    elif recipe.cluster.sharding != "ddp":
        notes.append(f"sharding {recipe.cluster.sharding} is planned here; qat/train.py itself runs data parallelism so far")
    if recipe.qat.warm_start.method != "none":
        notes.append("second moments of the first codes (before training; qat.warm_start.moments_gib) are not counted")
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
    total, experts = sum(plan.groups.values()), plan.groups[EXPERTS]
    console.print(f"[bold]{plan.model}[/]: {total / 1e9:,.2f} B parameters, {experts / 1e9:,.2f} B of them in "
                  f"{plan.matrices:,} expert matrices quantized to MXFP4", highlight=False, soft_wrap=True)
    console.print(f"{plan.ranks} ranks, {plan.tokens_per_step:,} tokens per step, "
                  f"{plan.tokens_per_step * plan.steps / 1e9:,.2f} B tokens in {plan.steps:,} steps", highlight=False)
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
    _bytes_table(console, "disk", plan.disk, None, total=False)
    _bytes_table(console, "exported FP4 checkpoint", plan.export, None)
    least = -(-sum(plan.export.values()) // SHARD_BYTES)
    console.print(f"shards of 5 GB: at least {least} (export/to_hf.py --plan deals the tensors to files)")
    if plan.communication:
        _bytes_table(console, "communication: what one rank receives per step", plan.communication, None,
                     seconds=plan.seconds)
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)


def _bytes_table(console, title: str, rows: dict[str, int], available: int | None, *, total: bool = True,
                 seconds: dict[str, float] | None = None) -> None:
    from rich.table import Table

    table = Table("", "GiB", "GB", *(["seconds, not overlapped"] if seconds else []), title=title)
    last = [f"{sum(seconds.values()):.1f}"] if seconds else []
    for name, size in rows.items():
        cells = [f"{seconds[name]:.1f}" if name in seconds else "?"] if seconds else []
        table.add_row(name, f"{size / GIB:,.2f}", f"{size / 1e9:,.2f}", *cells)
    if total:
        size = sum(rows.values())
        table.add_row("[bold]total[/]", f"{size / GIB:,.2f}", f"{size / 1e9:,.2f}", *last)
    if available is not None:
        table.add_row("available", f"{available / GIB:,.2f}", f"{available / 1e9:,.2f}")
    console.print(table)
