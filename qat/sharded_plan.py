"""`--plan` of a sharded run, and the cheapest layout that fits.

Where weights lie comes from the code that shards them (`training.sharding.preview`); bytes follow from it. On one rank, for
e expert weights and o other weights of w bytes each that it holds:

    masters             e x 4                       the experts' only resident copy beside codes
    optimizer           (e, or all) x 8 (muon: 4)
    gradients           (e, or all) x 4             reduced in every micro-step, float32
    other weights       o x w                       student
    teacher             (e + o) x w                 a second tree (qat.teacher: disk: none after the start;
                                                    packed: e x 1.03 + o x w)
    codes               e x 17/32 x 2               sent in gathers; of the last report
    gathered experts    one layer's, of the rank's expert-parallel group: codes and decoded weights
    gathered layer      everything else of two layers, and norm and head of both models
    layer's gradients   of the gathered experts, in w bytes and float32
    activations, logits as for one process (`qat.plan`)

Throughput is a model: FLOPs of a token are 2 per active weight for each pass of the teacher (1), the student (1 forward, 2
backward, 1 more recomputed); an assumed share of the peak (`--mfu`) turns them into seconds. Nothing here was measured on GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

from modeling.names import FP8_BLOCK
from mxfp4 import BLOCK_SIZE
from qat.expert_quantizer import find_expert_tensors
from recipes.schema import Recipe
from storage.terminal import counted
from training.sharding.layout import Layout
from training.sharding.preview import Placement

CODE_BYTES = 17 / 32
FP8_BYTES = 1 + 4 / FP8_BLOCK  # of a weight: its code, and its row's share of a scale
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """What the arithmetic needs of a model, in weights: totals, and of its largest layer."""

    experts: int
    others: int
    experts_per_layer: int
    moe_layers: int
    layer_experts: int
    layer_others: int
    head: int
    hidden: int
    top_k: int

    @property
    def active(self) -> int:
        """Weights that a token passes through."""
        return self.others + self.experts * self.top_k // self.experts_per_layer


def shape_of(model) -> Shape:
    config = model.config.get_text_config()
    tensors = find_expert_tensors(model)
    layers = []
    for layer in model.base_model.layers:
        inside = sum(p.numel() for p in layer.parameters() if p.ndim == 3)
        layers.append((inside, sum(p.numel() for p in layer.parameters()) - inside))
    largest = max(layers)
    experts = sum(t.parameter.numel() for t in tensors)
    return Shape(experts=experts, others=sum(p.numel() for p in model.parameters()) - experts,
                 experts_per_layer=tensors[0].num_experts, moe_layers=len({t.module for t in tensors}),
                 layer_experts=largest[0], layer_others=largest[1], head=config.vocab_size * config.hidden_size,
                 hidden=config.hidden_size,
                 top_k=config.num_experts_per_tok)


def state_bytes(recipe: Recipe, held: Placement) -> dict[str, int]:
    """The optimizer's side of one rank."""
    qat = recipe.qat
    trained, moments = held.experts + (held.others if qat.train == "all" else 0), 4 if qat.optimizer.name == "muon" else 8
    state = {"masters (float32)": held.experts * 4, f"optimizer ({qat.optimizer.name})": trained * moments}
    if qat.oscillation.method != "none":
        state[f"oscillation control ({qat.oscillation.method})"] = held.experts * {"ema": 4, "freeze": 2}.get(
            qat.oscillation.method, 12)  # a mean; a flip counter and a mark; three floats
    if qat.scales.method != "rule":
        state["shifts of block scales"] = held.experts // BLOCK_SIZE * (4 + (moments if qat.scales.method == "learned" else 0))
    if qat.average_last:
        state["average of the masters"] = held.experts * 4
    return state


def working_bytes(recipe: Recipe, held: Placement, layout: Layout, shape: Shape) -> dict[str, int]:
    """What always lies on the accelerator of one rank; activations and logits are the caller's."""
    w = 4 if recipe.model.dtype == "float32" else 2
    trained = held.experts + (held.others if recipe.qat.train == "all" else 0)
    group = shape.layer_experts // layout.expert_parallel
    sent, packed = CODE_BYTES if held.even else w, recipe.qat.teacher == "packed" and held.even
    tokens = recipe.qat.batch_size * recipe.data.sequence_length
    memory = {
        f"other weights ({recipe.model.dtype})": held.others * w,
        f"teacher ({'experts FP8' if packed else recipe.model.dtype})": 0 if recipe.qat.teacher == "disk" else int(
            held.experts * (FP8_BYTES if packed else w) + held.others * w),
        "gradients (float32)": trained * 4,
        "codes (sent, and of the last report)": int(held.experts * (sent + CODE_BYTES)),
        "one layer's gathered experts": int(group * (w + sent)),
        "gathered layers (two), norm and head": (2 * shape.layer_others + 2 * shape.head) * w,
        "one layer's expert gradients": group * (w + 4),
    }
    if layout.expert_parallel > 1:
        memory["rows of other ranks (all-to-all)"] = 2 * tokens * shape.top_k * shape.hidden * w
    return memory


def checkpoint_bytes(recipe: Recipe, shape: Shape) -> int:
    """All ranks' files: masters, moments, control and codes; frozen weights are not saved."""
    whole = Placement(shape.experts, shape.others, shape.experts_per_layer, 0, True)
    return sum(state_bytes(recipe, whole).values()) + int(shape.experts * CODE_BYTES)


def communication(recipe: Recipe, held: Placement, layout: Layout, shape: Shape) -> tuple[dict[str, int], set[str]]:
    """Bytes that one rank receives per step, and which rows stay within a node when expert parallelism does."""
    qat, w = recipe.qat, 4 if recipe.model.dtype == "float32" else 2
    micro, holders, shards, ep = qat.gradient_accumulation, layout.expert_shards, layout.fsdp, layout.expert_parallel
    group, far, taught = shape.experts // ep, (holders - 1) / holders, int(qat.teacher != "disk")
    packed = qat.teacher == "packed" and held.even
    rows = {
        f"all-gather of expert {'codes (4.25 bits)' if held.even else f'weights ({recipe.model.dtype})'}": int(
            2 * micro * group * (CODE_BYTES if held.even else w) * far),
        f"all-gather of the teacher's experts ({'FP8' if packed else recipe.model.dtype})": int(
            taught * micro * group * (FP8_BYTES if packed else w) * far),
        f"all-gather of everything else ({recipe.model.dtype})": int(
            (2 + taught) * micro * shape.others * w * (shards - 1) / shards),
        "reduce-scatter of gradients (float32)": int(micro * 4 * (group * far + (
            shape.others * (shards - 1) / shards if qat.train == "all" else 0))),
    }
    if layout.replicas > 1:
        rows["all-reduce over replicas (float32)"] = int(2 * micro * 4 * held.experts * (layout.replicas - 1) / layout.replicas)
    if ep == 1:
        return rows, set()
    name = "all-to-all of tokens (experts)"
    sent = qat.batch_size * recipe.data.sequence_length * shape.top_k * shape.hidden * w
    rows[name] = 2 * (2 + taught + qat.gradient_checkpointing) * micro * shape.moe_layers * sent * (ep - 1) // ep
    return rows, {name} if ep <= recipe.cluster.accelerators_per_node else set()


def notes(held: Placement, layout: Layout, shape: Shape) -> list[str]:
    E, group = shape.experts_per_layer, shape.layer_experts // layout.expert_parallel
    lines = [f"{layout}; {held.local_experts} of {E} experts of a layer on each rank"
             + (f", none on {counted(held.idle_ranks, 'rank')}" if held.idle_ranks else "")]
    if held.even:
        lines.append(f"one layer's experts in one gather: {group * CODE_BYTES / 1e9:.3g} GB of codes instead of "
                     f"{group * 2 / 1e9:.3g} GB in bfloat16")
    else:
        fitting = [n for n in range(1, 2 * E + 1) if E % n == 0]
        near = sorted(fitting, key=lambda n: abs(n - layout.fsdp))[:2]
        lines.append(f"{E} experts are not divided evenly by {layout.fsdp} ranks: not codes but rounded weights are gathered; "
                     f"{' or '.join(str(n * layout.replicas) for n in sorted(near))} ranks divide them")
    return lines


def under_zero3(recipe: Recipe, tensors: list, shape: Shape, layout: Layout) -> tuple[Placement, list[str]]:
    """(what a rank holds of flat runs, lines about it). Raises ValueError: see `qat.zero3`."""
    from qat.zero3 import require_supported, require_whole_blocks

    require_supported(recipe, layout.ranks)
    require_whole_blocks(tensors, layout.ranks)
    held = Placement(-(-shape.experts // layout.ranks), -(-shape.others // layout.ranks), shape.experts_per_layer, 0, False)
    gigabytes = (shape.experts + shape.others) * (4 if recipe.model.dtype == "float32" else 2) / 1e9
    return held, [f"ZeRO-3 over {layout.ranks} ranks: expert values travel in {recipe.model.dtype}, not codes",
                  f"while loading every rank has the whole model in host memory, {gigabytes:,.0f} GB, student and teacher in "
                  "turn"]


@dataclass(frozen=True)
class Proposal:
    """A layout that fits: memory of one rank in bytes, communication per step in bytes."""

    layout: Layout
    memory: int
    received: int


def proposals(recipe: Recipe, model, *, gpus: int, available: int, activations: int) -> list[Proposal]:
    """Layouts of at most `gpus` ranks that fit `available` bytes and divide the experts evenly, the cheapest first.

    Cheapest: fewest ranks, then least communication. Expert-parallel groups stay within a node.
    """
    shape = shape_of(model)
    found = []
    for ranks in (n for n in range(1, gpus + 1) if shape.experts_per_layer % n == 0 and (n <= 8 or n % 8 == 0)):
        held = Placement(-(-shape.experts // ranks), -(-shape.others // ranks), shape.experts_per_layer // ranks, 0, True)
        for ep in (1, 2, 4, 8):
            if ranks % ep:
                continue
            layout = Layout(ranks, ep)
            parts = state_bytes(recipe, held) | working_bytes(recipe, held, layout, shape)
            memory = sum(parts.values()) + activations
            if memory <= available:
                found.append(Proposal(layout, memory, sum(communication(recipe, held, layout, shape)[0].values())))
    return sorted(found, key=lambda p: (p.layout.ranks, p.received))


def tokens_per_second(recipe: Recipe, shape: Shape, *, mfu: float, peak_tflops: float) -> float:
    """Of one accelerator, under the assumption of the module's text."""
    passes = (recipe.qat.teacher != "disk") + 3 + recipe.qat.gradient_checkpointing
    return mfu * peak_tflops * 1e12 / (2 * passes * shape.active)
