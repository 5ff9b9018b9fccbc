"""What `--resume` continues, and what may have changed since.

A checkpoint holds the schedule's base rates, the moments, the position in the data: with another rate, seed or rule in the
recipe it would go on, with a mixture of both that no recipe describes. So the recipe stored in the checkpoint is compared:

    free        intervals, evaluation, chunking, other jobs' sections: no influence on what is trained
    said        paths (a folder may have moved) and the number of steps (the schedule follows the new one from here on)
    refused     everything else, each key with both values

Rejected: ignoring the new recipe on resume (an override that silently does nothing is worse than a refusal).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml

from recipes.schema import Recipe
from storage.digests import differences
from storage.reading import first_line, read_json, read_text
from training.checkpoint import COMPLETE, RECIPE, newest_whole, step_of

_SAID = {"model.path", "data.train", "qat.steps", "dflash.steps", "dflash.data", "dflash.regenerate.prompts"}
_FREE = {
    "qat": ("name", "output", "data.heldout", "data.eval_sequences", "qat.evaluation_dtype", "qat.loss.chunk_tokens",
            "qat.gradient_checkpointing", "qat.log_every", "qat.heldout_every",
            "qat.heldout_sequences", "qat.result", "qat.patience", "keep_earlier",
            "qat.health_every", "qat.checkpoint_every", "qat.keep_last", "qat.teacher", "qat.teacher_gib", "checkpoint",
            "qat.warm_start", "drafter", "dflash", "export", "cluster", "tracking", "model.released",
            "model.trust_remote_code", "quantization.expected_tensors"),
    "dflash": ("name", "output", "keep_earlier", "data", "qat", "dflash.log_every", "dflash.checkpoint_every",
               "dflash.keep_last", "dflash.acceptance", "dflash.features", "dflash.features_gib", "dflash.loss.chunk_anchors",
               "checkpoint", "dflash.start_from", "dflash.regenerate.endpoint", "dflash.regenerate.endpoint_model",
               "export", "cluster", "tracking", "model.released", "model.trust_remote_code", "quantization.expected_tensors"),
}


def checkpoint_to_resume(folder: Path, recipe: Recipe, job: str, say: Callable[[str], None], accelerator) -> Path | None:
    """The newest whole checkpoint of the run in `folder`, or None (which is said) if there is none; all processes call it.

    Args:
        folder: <output>/<name>/<job>. job: "qat" or "dflash", the recipe's section.
        say: prints a line (on the first process).

    Raises:
        ValueError: the checkpoint lies beyond the recipe's steps, or was made by a recipe that trains something else; every
            checkpoint is damaged.
    """
    newest = newest_whole(accelerator, folder / "checkpoints", say)
    if newest is None:
        say(f"--resume: no complete checkpoint in {folder / 'checkpoints'}, beginning at the first step")
        return None
    step, steps = step_of(newest), getattr(recipe, job).steps
    if step > steps:
        raise ValueError(f"{job}.steps: {steps}, but {newest} is at step {step}; expected at least {step}")
    changes = changed_keys(_saved_recipe(newest / RECIPE), recipe, job)
    refused = [f"{key} (was {was!r}, now {now!r})" for key, was, now in changes if key not in _SAID]
    if refused:
        raise ValueError(f"{newest}: cannot be continued by a recipe that trains something else: {', '.join(refused)}; restore "
                         "it, or start a new run without --resume")
    for key, was, now in changes:
        say(f"--resume: {key} was {was!r} until step {step}, now {now!r}")
    return newest


def require_same_inputs(newest: Path, now: dict) -> None:
    """Raises ValueError if the run of checkpoint `newest` was trained on other inputs: a recipe says where they lie, not what
    they are.

    Args:
        now: by name ("base weights", "training data") a digest, or a dictionary of digests by file.
    """
    was = read_json(newest / COMPLETE).get("inputs", {})  # none in checkpoints of earlier versions
    for name in now.keys() & was.keys():
        if was[name] == now[name]:
            continue
        what = "changed"
        if isinstance(was[name], dict) and isinstance(now[name], dict):
            found = differences(was[name], now[name])
            what = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        raise ValueError(f"{newest}: trained on other {name} than now ({what}); restore what the run began with, or start a "
                         "new one without --resume")


def _saved_recipe(path: Path) -> dict:
    try:
        saved = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {first_line(error)}") from None
    if not isinstance(saved, dict):
        raise ValueError(f"{path}: not a recipe")
    return saved


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
