"""`--plan` of the drafter's job: tensors, memory per rank, disk and signals per step, without weights or accelerator.

Exact from shapes: parameters, weights, masters' gradients and moments, features on disk. Estimated (and said so):
activations, as the hidden states, head inputs and MLP inner states that autograd keeps for every block position and
context position of a rank's rows. The target is counted in `model.dtype`, as the job loads it, also where its experts lie on
the MXFP4 grid: whole on every rank, or divided with `cluster.sharding`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from checkpoint.drafter_folder import grouping_note
from dflash_train.preflight import foresee, matrix_parameters, meta_drafter, moment_bytes, writes
from dflash_train.target import choose_target_layers
from dflash_train.trainer import require_sections
from modeling.drafter import config_json
from modeling.fused_experts import fused_experts
from qat.expert_quantizer import find_expert_tensors
from qat.meta_model import meta_model
from recipes.schema import Recipe
from training.preflight import NOT_READY, print_readiness
from training.sharding.layout import layout_of, require_divisible

GIB = 2**30
RESERVED_SHARE = 0.08  # what the allocator and communication buffers take of an accelerator


@dataclass
class Plan:
    """What is printed; bytes unless named otherwise."""

    target: str
    target_layers: list[int]
    ranks: int
    tensors: int
    parameters: int
    muon_parameters: int
    drafter_bytes: int
    signals_per_step: int
    tokens_per_step: int
    memory: dict[str, int]
    disk: dict[str, int]
    feature_bytes_per_token: int
    available: int | None = None
    notes: list[str] = field(default_factory=list)


def run(recipe: Recipe) -> int:
    """Prints the plan; returns the exit code: 0, or that of a run that would be refused.

    Raises:
        ValueError: a recipe without a drafter, or one that cannot fit the cluster it names.
    """
    require_sections(recipe)
    plan = make_plan(recipe)
    render(plan, recipe)
    ready = print_readiness(recipe, "dflash", foresee(recipe, planned=True))
    total = sum(plan.memory.values())
    if plan.available is not None and total > plan.available:
        largest = max(plan.memory, key=plan.memory.get)
        advice = ("more ranks do not divide it" if largest.startswith("target, whole") else
                  "use more ranks" if largest.startswith("target") else
                  "use smaller dflash.batch_size, dflash.anchors or dflash.loss.chunk_anchors")
        raise ValueError(f"cluster.memory_gib: a rank needs {total / GIB:.1f} GiB and has {plan.available / GIB:.1f} usable; "
                         f"the largest part is {largest} ({plan.memory[largest] / GIB:.1f} GiB): {advice}")
    return 0 if ready else NOT_READY


def make_plan(recipe: Recipe) -> Plan:
    """Adds everything up, on the meta device."""
    model, name = meta_model(recipe)
    config = model.config.get_text_config()
    target_layers = choose_target_layers(recipe.drafter.target_layer_ids, config.num_hidden_layers)
    mask_id = recipe.drafter.mask_token if isinstance(recipe.drafter.mask_token, int) else 0
    drafter = meta_drafter(recipe, config, target_layers, mask_id)
    sizes = {n: p.numel() for n, p in drafter.named_parameters()}
    muon = matrix_parameters(drafter)
    cluster, job = recipe.cluster, recipe.dflash
    ranks = cluster.nodes * cluster.accelerators_per_node if cluster else 1
    parameters = sum(sizes.values())
    if job.target == "ptq":
        find_expert_tensors(model)  # refuses a target without any, as the job does
    return Plan(
        target=name, target_layers=target_layers, ranks=ranks, tensors=len(sizes) - 1, parameters=parameters,
        muon_parameters=muon,
        drafter_bytes=2 * (parameters - sizes["mask_embedding"]), memory=_memory(recipe, model, drafter, ranks),
        disk=writes(recipe, drafter),
        signals_per_step=job.batch_size * job.anchors * (recipe.drafter.block_size - 1) * ranks,
        tokens_per_step=job.batch_size * job.sequence_length * ranks,
        feature_bytes_per_token=2 * config.hidden_size * (len(target_layers) + 1),
        available=int(cluster.memory_gib * GIB * (1 - RESERVED_SHARE)) if cluster else None,
        notes=_notes(recipe, grouping_note(config_json(drafter.config), config)))


def _memory(recipe: Recipe, model, drafter, ranks: int) -> dict[str, int]:
    """Bytes of one rank."""
    cluster, job, config = recipe.cluster, recipe.dflash, model.config.get_text_config()
    parameters = sum(p.numel() for p in drafter.parameters())
    moments = moment_bytes(recipe, drafter)
    divided = cluster is not None and cluster.sharding != "ddp" and ranks > 1
    memory = _target_memory(recipe, model, ranks if divided else 1)
    share = ranks if divided and job.shard_drafter else 1
    memory |= {"drafter's weights (float32)": 4 * parameters // share, "gradients (float32)": 4 * parameters // share,
               f"moments ({job.optimizer.name})": moments // share}
    if share > 1:
        layers, layer = drafter.config.num_hidden_layers, sum(p.numel() for p in drafter.layers[0].parameters())
        gathered = parameters - max(0, layers - 2) * layer
        memory["drafter's gathered layers (two) and the rest, with gradients"] = 8 * gathered
    return memory | {
        "activations (estimate)": _activation_bytes(recipe, config, len(drafter.target_layer_ids)),
        "logits of a chunk": job.loss.chunk_anchors * (recipe.drafter.block_size - 1) * config.vocab_size * 4 * 5}


def _target_memory(recipe: Recipe, model, ranks: int) -> dict[str, int]:
    """The frozen target; of a divided one also embedding and head, whole on every rank, and what a layer's pass gathers."""
    import torch

    width, dtype = getattr(torch, recipe.model.dtype).itemsize, recipe.model.dtype
    total = sum(p.numel() for p in model.parameters())
    if ranks == 1:
        return {f"target, whole ({dtype})": total * width}
    layout = layout_of(recipe.cluster, ranks)
    require_divisible(layout, {name: weight.shape[0] for name, weight, _ in fused_experts(model)})
    head = model.get_output_embeddings().weight.numel()
    layers = [(sum(p.numel() for p in layer.parameters() if p.ndim == 3), sum(p.numel() for p in layer.parameters()))
              for layer in model.base_model.layers]
    inside, layer = max(layers)
    return {f"target, divided ({dtype})": -(-total // ranks) * width, "target's embedding and head, whole": 2 * head * width,
            "target's gathered layers (two), norm and head": width * (
                2 * (layer - inside) + inside // layout.expert_parallel + head)}


def _activation_bytes(recipe: Recipe, config, features: int) -> int:
    """bf16: per layer and block position input, normed input twice, queries, values out, three MLP inner states; per context
    position the features, the fused state and each layer's keys and values."""
    drafter, job, H = recipe.drafter, recipe.dflash, config.hidden_size
    heads = drafter.num_attention_heads * (drafter.head_dim + (drafter.v_head_dim or drafter.head_dim))
    pairs = drafter.num_key_value_heads * (drafter.head_dim + (drafter.v_head_dim or drafter.head_dim))
    blocks = job.batch_size * job.anchors * drafter.block_size
    context = job.batch_size * job.sequence_length
    per_block = drafter.num_hidden_layers * (4 * H + heads + pairs + 3 * drafter.intermediate_size)
    keys = min(drafter.window or job.sequence_length, job.sequence_length) + drafter.block_size
    scores = drafter.num_attention_heads * keys * drafter.num_hidden_layers  # flex_attention keeps none of them
    on_cpu = recipe.cluster is None
    return 2 * (blocks * (per_block + scores * on_cpu) + context * ((features + 3) * H + drafter.num_hidden_layers * pairs))


def _notes(recipe: Recipe, ungrouped: str | None) -> list[str]:
    """ungrouped: why vLLM would not start with the drafter, if it would not."""
    notes = [f"drafter.num_hidden_layers: {ungrouped}"] if ungrouped else []
    if isinstance(recipe.drafter.mask_token, str) or recipe.drafter.mask_token is None:
        notes.append("drafter.mask_token is looked up in the tokenizer when the job starts")
    if recipe.dflash.features == "disk":
        notes.append(f"features on disk: at most {recipe.dflash.features_gib} GiB (dflash.features_gib)")
    if not recipe.dflash.data and not recipe.dflash.regenerate.prompts:
        notes.append("neither dflash.data nor dflash.regenerate.prompts is set: required to train")
    return notes


def render(plan: Plan, recipe: Recipe) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    drafter, job = recipe.drafter, recipe.dflash
    console.print(f"[bold]{recipe.name}[/]: drafter for {plan.target}, features of layers {plan.target_layers}, block "
                  f"{drafter.block_size}, window {drafter.window}, {'causal' if drafter.causal else 'not causal'} in the block")
    table = Table(title="drafter")
    table.add_column("what")
    table.add_column("value", justify="right")
    for what, value in (
        ("published tensors", f"{plan.tensors}"), ("parameters", f"{plan.parameters:,}"),
        (f"of them updated by {job.optimizer.name} as matrices", f"{plan.muon_parameters:,}"),
        ("bytes on disk (bf16)", f"{plan.drafter_bytes:,}"), ("ranks", f"{plan.ranks}"),
        ("first weights", job.start_from or "fresh"), ("steps", f"{job.steps:,}"),
        ("tokens per step", f"{plan.tokens_per_step:,}"),
        ("predictions per step (anchors x masked positions)", f"{plan.signals_per_step:,}"),
        ("features per token (target layers and last state)", f"{plan.feature_bytes_per_token:,} bytes"),
    ):
        table.add_row(what, value)
    console.print(table)
    memory = Table(title="memory of one rank")
    memory.add_column("what")
    memory.add_column("GiB", justify="right")
    for what, value in plan.memory.items():
        memory.add_row(what, f"{value / GIB:.3f}")
    memory.add_row("total", f"{sum(plan.memory.values()) / GIB:.3f}", style="bold")
    if plan.available is not None:
        memory.add_row("usable", f"{plan.available / GIB:.1f}")
    console.print(memory)
    console.print("disk, at most: " + ", ".join(f"{what} {size / 1e9:.2g} GB" for what, size in plan.disk.items()))
    for note in plan.notes:
        console.print(f"note: {note}")
