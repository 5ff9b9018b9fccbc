"""Training checkpoints: written aside and renamed, the last K kept, the newest complete one found again.

    <run>/checkpoints/step-00000100/     written by Accelerate's save_state:
        model.safetensors                weights under the model's own parameter names; experts lie on the MXFP4 grid
        optimizer.bin, scheduler.bin     moments of the float32 masters; learning-rate schedule
        random_states_<rank>.pkl         Python, NumPy and torch generators of every process
        custom_checkpoint_0.pkl          `TrainingState`: masters, step, position in the data, what oscillation control knows
        resolved.yaml                    the recipe that wrote it
        complete.json                    step, world size, git revision; last file written

A folder under its final name is complete: the rename is the last act. A killed job leaves the old checkpoints and at
most one `*.partial` folder, which the next run removes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NAME = re.compile(r"step-(\d+)$")


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if _NAME.search(p.name) and (p / "complete.json").is_file()]
    return sorted(found, key=lambda p: int(_NAME.search(p.name)[1]))


def save_checkpoint(accelerator, folder: Path, step: int, *, recipe_yaml: str, facts: dict, keep_last: int) -> Path:
    """Saves everything registered with `accelerator` as the checkpoint of `step`; all processes call it.

    Raises:
        OSError: the disk is full or not writable; earlier checkpoints are untouched and the partial one is removed.
    """
    final = checkpoint_path(folder, step)
    partial = final.with_name(final.name + ".partial")
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("*.partial"):
            shutil.rmtree(stale)
    accelerator.wait_for_everyone()
    try:
        with disk_errors():
            accelerator.save_state(str(partial), safe_serialization=True)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (partial / "resolved.yaml").write_text(recipe_yaml, encoding="utf-8")
            world = {"step": step, "processes": accelerator.num_processes}
            (partial / "complete.json").write_text(json.dumps(world | facts, indent=1), encoding="utf-8")
            if final.exists():  # the same step again after a resume: same bits
                shutil.rmtree(final)
            os.rename(partial, final)
            for old in complete_checkpoints(folder)[:-keep_last]:
                shutil.rmtree(old)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = complete_checkpoints(folder)
        last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no earlier checkpoint"
        raise OSError(f"checkpoint of step {step} could not be written to {folder}: {error}; {last}") from error
    accelerator.wait_for_everyone()
    return final


@contextmanager
def disk_errors() -> Iterator[None]:
    """Writers of tensors report a full disk in three ways; here it is always an OSError."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise OSError(str(error).strip().splitlines()[0]) from error


@contextmanager
def folder_aside(final: Path) -> Iterator[Path]:
    """`<final>.partial`, empty, to be filled: it takes the place of `final` at the end, or is removed if that fails.

    Raises:
        OSError: the disk is full or not writable; `final` is as it was.
    """
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with disk_errors():
            yield partial
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{final} could not be written: {error}; the last checkpoint is kept, --resume tries again") from error
    for tensors in partial.glob("*.safetensors"):  # safetensors makes files that nobody else may read, whatever the umask
        shutil.copymode(partial / "config.json", tensors)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(partial, final)


def load_checkpoint(accelerator, path: Path) -> None:
    """Restores everything registered with `accelerator` from `path`.

    Raises:
        ValueError: written by another number of processes, or of another shape.
    """
    facts = json.loads((path / "complete.json").read_text(encoding="utf-8"))
    if facts["processes"] != accelerator.num_processes:
        raise ValueError(f"{path}: written by {facts['processes']} processes, now running {accelerator.num_processes}; "
                         "a run resumes exactly only with the same number of processes")
    try:
        accelerator.load_state(str(path))
    except (RuntimeError, KeyError) as error:
        first = str(error).strip().splitlines()
        raise ValueError(f"{path}: does not fit this recipe's model: {first[-1].strip() if first else error}") from None


def write_text(path: Path, text: str) -> None:
    """Writes a small file aside and renames it."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
