"""What can be known before a weight is read or a line is tokenized: every job looks at it first, and `--plan` prints it.

Reads names, sizes and config.json only. A mistake that would show itself after an hour of loading, or after days of
training, is one line here, with its remedy.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from recipes.schema import Recipe, Source
from storage.files import tree_bytes
from storage.terminal import readable_size
from training import report
from training.data_files import expand, looked_from

JOBS = ("qat", "dflash")
NOT_READY = 3  # exit code of a plan that was printed, of a run that would be refused


Foreseen = tuple[list[str], dict[str, int]]  # what else would stop the job, and the bytes that it writes, by what they are


def problems(recipe: Recipe, job: str, foreseen: Foreseen = ([], {}), resumed: Path | None = None) -> list[str]:
    """What keeps `job` ("qat" or "dflash") from running to its end, one line each; empty if nothing is known to.

    Args:
        foreseen: what the job itself knows of its model. resumed: the folder of the run that goes on: bytes there are not new.
    """
    found = missing_sections(recipe) if job == "dflash" else []
    if found:
        return found
    if recipe.model.path is None:
        found = ["model.path: required to train (model.released serves --plan only)"]
    for check in (_tracking, _base, _files, _positions, _drafter_target):
        try:
            found += check(recipe, job)
        except ValueError as error:
            found.append(str(error))
    found += [*foreseen[0], *_space(recipe, left_to_write(foreseen[1], resumed), job)]
    return list(dict.fromkeys(found))


def missing_sections(recipe: Recipe) -> list[str]:
    """Those of drafter training that a recipe does not have, one line each."""
    return [f"{name}: the recipe has no such section, which drafter training needs (see recipes/tiny.yaml)"
            for name in ("drafter", "dflash") if getattr(recipe, name) is None]


def require_ready(recipe: Recipe, job: str, foreseen: Foreseen = ([], {}), resumed: Path | None = None) -> int:
    """Bytes that the job will write. Raises ValueError naming every problem, a line each."""
    found = problems(recipe, job, foreseen, resumed)
    if found:
        raise ValueError("\n".join([found[0], *(f"error: {text}" for text in found[1:])]))
    return left_to_write(foreseen[1], resumed)


def print_readiness(recipe: Recipe, job: str, foreseen: Foreseen = ([], {})) -> bool:
    """For --plan: says what would stop the run, or that nothing is known to; whether that is so."""
    found = problems(recipe, job, foreseen)
    for text in found:
        print(f"not ready: {text}")
    if not found:
        print("ready to run: files, positions, model, disk and packages were looked at")
    return not found


def _tracking(recipe: Recipe, job: str) -> list[str]:
    report.require_wandb(recipe.tracking.wandb)
    return []


def _base(recipe: Recipe, job: str) -> list[str]:
    """A base that is neither a folder nor, by its form, a name on the hub (organisation/model)."""
    path = recipe.model.path
    if path is None or Path(path).exists() or (len(Path(path).parts) <= 2 and not path.startswith((".", "/", "~"))):
        return []
    return [f"model.path: {path}: no such checkpoint folder{looked_from(path)}"]


def _named(recipe: Recipe, job: str) -> dict[str, list[str]]:
    """Patterns of files by recipe key, of what the job reads."""
    if job == "qat":
        sources = [s.path if isinstance(s, Source) else s for s in recipe.data.train]
        return {"data.train": [s for s in sources if s is not None and not s.startswith("hub:")],
                "data.heldout": recipe.data.heldout}
    dflash = recipe.dflash
    training = {"dflash.data": dflash.data} if dflash.data else {"dflash.regenerate.prompts": dflash.regenerate.prompts}
    return training | {"dflash.acceptance.prompts": dflash.acceptance.prompts}


def _files(recipe: Recipe, job: str) -> list[str]:
    """Files that are not there, and files that are both learned from and measured on, by the drafter's job too."""
    found, seen = [], {}
    needed = _named(recipe, job)
    judged = {"dflash.acceptance.prompts": recipe.dflash.acceptance.prompts} if recipe.dflash else {}
    for key, patterns in (needed | judged).items():
        try:
            for file in expand(patterns, key) if patterns else []:
                seen.setdefault(Path(file).resolve(), []).append((key, file))
        except ValueError as error:
            if key in needed:
                found.append(str(error))
    for uses in seen.values():
        keys = list(dict.fromkeys(key for key, _ in uses))
        if len(keys) > 1:
            found.append(f"{keys[1]}: {uses[0][1]} is in {keys[0]} too; what is measured on it would be what was learned")
    return found


def config_of(recipe: Recipe) -> dict | None:
    """config.json of the base, its text part; None for a base that is no folder."""
    folder = Path(recipe.model.path) if recipe.model.path else None
    if folder is None or not (folder / "config.json").is_file():
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # said by the reader, with line and column
    if not isinstance(config, dict):
        return None
    text = config.get("text_config")
    return config | text if isinstance(text, dict) else config


def _positions(recipe: Recipe, job: str) -> list[str]:
    config = config_of(recipe) or {}
    limit = config.get("max_position_embeddings")
    key, length = (("data.sequence_length", recipe.data.sequence_length) if job == "qat" else
                   ("dflash.sequence_length", recipe.dflash.sequence_length))
    if isinstance(limit, int) and length > limit:
        return [f"{key}: {length} tokens, but {recipe.model.path} has {limit} positions (max_position_embeddings)"]
    return []


def _drafter_target(recipe: Recipe, job: str) -> list[str]:
    """Targets that decode with other state than keys and values."""
    config = config_of(recipe)
    if job != "dflash" or config is None:
        return []
    kinds = config.get("layer_types") or config.get("layers_block_type") or []
    other = sorted({str(kind) for kind in kinds} - {"full_attention", "sliding_attention", "chunked_attention", "attention"})
    return [f"model.path: {recipe.model.path}: layers of {', '.join(other)} keep other state than keys and values, from which "
            "rejected drafts cannot be taken back; no drafter can be trained for it here"] if other else []


def checkpoints_at_once(steps: int, every: int, keep_last: int) -> int:
    """How many checkpoints lie on the disk at once: the oldest goes when the newest is whole."""
    return min(-(-steps // every), keep_last + 1)


def left_to_write(writes: dict[str, int], resumed: Path | None) -> int:
    """Bytes that come to those which a resumed run's folder holds already."""
    there = sum(tree_bytes(resumed / name) for name in ("checkpoints", "model")) if resumed else 0
    return max(0, sum(writes.values()) - there)


def _space(recipe: Recipe, need: int, job: str) -> list[str]:
    """Room for what the job writes: a run that has less dies at one of its checkpoints."""
    place = Path(recipe.output).resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    return [] if free >= need else [f"output: {recipe.output}: {readable_size(free)} free, but checkpoints and result take "
                                    f"{readable_size(need)}; another disk, or fewer checkpoints at once ({job}.keep_last, "
                                    f"{job}.checkpoint_every)"]
