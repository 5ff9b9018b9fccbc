"""What `--resume` continues, and what may have changed since.

A checkpoint holds the schedule's base rates, the moments, the position in the data: with another rate, seed or rule in the
recipe it would go on, with a mixture of both that no recipe describes. So the recipe stored in the checkpoint is compared:

    free        intervals, evaluation, chunking, other jobs' sections: no influence on what is trained
    said        paths (a folder may have moved) and the number of steps (the schedule follows the new one from here on)
    refused     everything else, each key with both values

Rejected: ignoring the new recipe on resume (an override that silently does nothing is worse than a refusal).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import yaml

from recipes.schema import Recipe
from training.checkpoint import complete_checkpoints

_SAID = {"model.path", "data.train", "qat.steps", "dflash.steps", "dflash.data", "dflash.regenerate.prompts"}
_FREE = {
    "qat": ("name", "output", "data.heldout", "data.eval_sequences", "qat.evaluation_dtype", "qat.loss.chunk_tokens",
            "qat.gradient_checkpointing", "qat.log_every", "qat.health_every", "qat.checkpoint_every", "qat.keep_last",
            "qat.warm_start", "drafter", "dflash", "export", "cluster", "tracking", "model.released",
            "model.trust_remote_code", "quantization.expected_tensors"),
    "dflash": ("name", "output", "data", "qat", "dflash.log_every", "dflash.checkpoint_every", "dflash.keep_last",
               "dflash.acceptance", "dflash.features", "dflash.features_gib", "dflash.loss.chunk_anchors",
               "dflash.start_from", "dflash.regenerate.endpoint", "dflash.regenerate.endpoint_model",
               "export", "cluster", "tracking", "model.released", "model.trust_remote_code", "quantization.expected_tensors"),
}


def checkpoint_to_resume(folder: Path, recipe: Recipe, job: str, say: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint of the run in `folder`, or None (which is said) if there is none.

    Args:
        folder: <output>/<name>/<job>. job: "qat" or "dflash", the recipe's section.
        say: prints a line (on the first process).

    Raises:
        ValueError: the checkpoint lies beyond the recipe's steps, or was made by a recipe that trains something else.
    """
    found = complete_checkpoints(folder / "checkpoints")
    if not found:
        say(f"--resume: no complete checkpoint in {folder / 'checkpoints'}, beginning at the first step")
        return None
    newest = found[-1]
    step, steps = json.loads((newest / "complete.json").read_text(encoding="utf-8"))["step"], getattr(recipe, job).steps
    if step > steps:
        raise ValueError(f"{job}.steps: {steps}, but {newest} is at step {step}; expected at least {step}")
    changes = changed_keys(yaml.safe_load((newest / "resolved.yaml").read_text(encoding="utf-8")), recipe, job)
    refused = [f"{key} (was {was!r}, now {now!r})" for key, was, now in changes if key not in _SAID]
    if refused:
        raise ValueError(f"{newest}: cannot be continued by a recipe that trains something else: {', '.join(refused)}; restore "
                         "it, or start a new run without --resume")
    for key, was, now in changes:
        say(f"--resume: {key} was {was!r} until step {step}, now {now!r}")
    return newest


def changed_keys(saved: dict, recipe: Recipe, job: str) -> list[tuple[str, object, object]]:
    """(dotted key, saved value, present value) of every difference that matters to `job`.

    A key that the saved recipe does not have is a setting that did not exist then, and no difference.
    """
    old, new = dict(_leaves(saved)), dict(_leaves(recipe.model_dump(mode="json")))
    free = _FREE[job]
    return [(key, old[key], value) for key, value in new.items()
            if key in old and old[key] != value and not any(key == f or key.startswith(f + ".") for f in free)]


def _leaves(section: dict, prefix: str = ""):
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
