"""What a recipe's model says of itself without weights (`qat.meta_model`): what would stop a run late, and the bytes that the
run writes. The job looks before it loads anything, and `--plan` prints it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from modeling.output_head import require_decoder
from qat import sharded_plan
from qat.expert_quantizer import find_expert_tensors, require_number
from qat.meta_model import meta_model
from qat.sharded_plan import CODE_BYTES, Placement
from qat.warm_start import require_known_gates
from recipes.schema import Recipe
from training.preflight import checkpoints_at_once


@dataclass(frozen=True)
class Sizes:
    """Weights by what happens to them, in elements, `width` bytes each in the model; ranks of the recipe's cluster."""

    experts: int
    others: int
    trained: int
    width: int
    ranks: int

    @property
    def total(self) -> int:
        return self.experts + self.others


def sizes_of(recipe: Recipe, experts: int, total: int) -> Sizes:
    cluster = recipe.cluster
    ranks = cluster.nodes * cluster.accelerators_per_node if cluster else 1
    return Sizes(experts=experts, others=total - experts, trained=total if recipe.qat.train == "all" else experts,
                 width=4 if recipe.model.dtype == "float32" else 2, ranks=ranks)


def checkpoint_bytes(recipe: Recipe, model, sizes: Sizes) -> int:
    """One training checkpoint: of a sharded run without the frozen weights."""
    if recipe.cluster is not None and recipe.cluster.sharding != "ddp" and sizes.ranks > 1:
        return sharded_plan.checkpoint_bytes(recipe, sharded_plan.shape_of(model))
    state = sharded_plan.state_bytes(recipe, Placement(sizes.experts, sizes.others, 0, 0, True))
    return sizes.total * sizes.width + int(sizes.experts * CODE_BYTES) + sum(state.values())


def writes(recipe: Recipe, checkpoint: int, sizes: Sizes) -> dict[str, int]:
    """Bytes on the disk at once, at most, of a run's checkpoints and result. `checkpoint`: of one."""
    qat = recipe.qat
    count = checkpoints_at_once(qat.steps, qat.checkpoint_every, qat.keep_last) + (qat.result == "best")
    return {f"checkpoints ({count} at once)": checkpoint * count, f"model/ ({recipe.model.dtype})": sizes.total * sizes.width}


def teacher_states(recipe: Recipe, model, sizes: Sizes) -> dict[str, int]:
    """Last hidden states of all rows that the run trains on, at most; texts that are trained on again need no more."""
    qat = recipe.qat
    if qat.teacher != "disk":
        return {}
    tokens = qat.steps * qat.gradient_accumulation * qat.batch_size * recipe.data.sequence_length * sizes.ranks
    return {"the teacher's last states, at most": tokens * model.config.get_text_config().hidden_size * sizes.width}


def foresee(recipe: Recipe) -> tuple[list[str], dict[str, int]]:
    """What would stop a QAT run after its model was loaded, and the bytes that it writes into its folder.

    A base that is no folder here, or that only its own code can build, is judged when it is loaded.
    """
    path = recipe.model.path
    if path is None or not Path(path).is_dir() or recipe.model.trust_remote_code:
        return [], {}
    try:
        model, _ = meta_model(recipe)
        tensors = find_expert_tensors(model)
    except ValueError as error:
        return [str(error)], {}
    found = _refusals([lambda: require_decoder(model),
                       lambda: require_number(model, tensors, recipe.quantization.expected_tensors),
                       lambda: require_known_gates(model, tensors, recipe.qat.warm_start), lambda: require_trainable(recipe)])
    sizes = sizes_of(recipe, sum(t.parameter.numel() for t in tensors), sum(p.numel() for p in model.parameters()))
    return found, writes(recipe, checkpoint_bytes(recipe, model, sizes), sizes)


def require_trainable(recipe: Recipe) -> None:
    """Raises ValueError for `qat.train: all` in a dtype that small updates do not reach."""
    if recipe.qat.train == "all" and recipe.model.dtype != "float32":
        raise ValueError("qat.train: all needs model.dtype: float32 (only experts have float32 masters; small updates of "
                         "other bf16 weights would be rounded away)")


def _refusals(checks: list[Callable[[], None]]) -> list[str]:
    found = []
    for check in checks:
        try:
            check()
        except ValueError as error:
            found.append(str(error))
    return found
