"""Training checkpoints: written aside and renamed, with the sums of their files; the last K kept, the newest whole one found.

    <run>/checkpoints/step-00000100/
        model.safetensors                     weights under the model's own parameter names; experts lie on the MXFP4 grid
        training_state.safetensors            optimizer's moments, schedule, and the job's state: masters, position in the data
        random_states_<rank>.safetensors      Python, NumPy and torch generators of every process
        resolved.yaml                         the recipe that wrote it
        complete.json                         step, world size, git revision, what was trained on, SHA-256 of every other file

A folder under its final name was finished: the rename is the last act, after all of it is on the disk. A killed job leaves
the old checkpoints and at most one `*.partial` folder, which the next run removes. What happens to a file later (a disk, a
copy that broke off, an editor) is found by its sum before anything is read from it. Nothing in these files can run:
`training.state_files`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from storage import files
from storage.digests import file_digests, json_digest, with_sum
from storage.files import MARK, begin_folder, finish_folder, next_free, write_json, write_text
from storage.reading import first_line, read_json
from storage.terminal import counted

_NAME = re.compile(r"step-(\d+)$")
COMPLETE, RECIPE = "complete.json", "resolved.yaml"
MODEL, STATE = "model.safetensors", "training_state.safetensors"
SHARDS = "shards"  # a folder that `training.sharding.checkpoint` writes instead of them


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first. (Whether one is still whole: `damage`.)"""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name) and (p / COMPLETE).is_file()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


def require_newest_result(folder: Path) -> None:
    """Raises ValueError if <folder>/model is the result of fewer steps than the folder's newest checkpoint has.

    Args:
        folder: <output>/<name>/<job>.
    """
    found, summary = complete_checkpoints(folder / "checkpoints"), folder / "summary.json"
    if not found or not summary.is_file() or not (folder / "model").is_dir():
        return
    steps = read_json(summary).get("steps")
    if isinstance(steps, int) and step_of(found[-1]) > steps:
        raise ValueError(f"{folder}: model/ is the result of step {steps}, and {found[-1].name} is newer: finish that run with "
                         "--resume, or name the weights that are meant (export/to_hf.py --weights DIR)")


def require_summary(folder: Path, remedy: str) -> None:
    """Raises ValueError for a job's folder that has a result, but not what was measured and of which weights."""
    if (folder / RECIPE).is_file() and not (folder / "summary.json").is_file():
        raise ValueError(f"{folder / 'summary.json'}: missing, though model/ is there: the run was stopped before it was "
                         f"written, or it was deleted; {remedy}")


def save_checkpoint(ranks, folder: Path, step: int, *, recipe_yaml: str, facts: dict, keep_last: int,
                    write: Callable[[Path], None], keep: int | None = None) -> Path:
    """Saves what `write` writes into a folder as the checkpoint of `step`; all processes call it.

    The last `keep_last` stay, and that of step `keep`.

    Args:
        ranks: the Accelerator, or what stands for it in a thread (`training.background.Ranks`).

    Raises:
        OSError: the disk is full or not writable; earlier checkpoints are untouched and the partial one is removed.
    """
    final = checkpoint_path(folder, step)
    partial = final.with_name(final.name + ".partial")
    if ranks.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("step-*.partial"):
            if _NAME.fullmatch(stale.name.removesuffix(".partial")):
                shutil.rmtree(stale)
        begin_folder(partial)
    ranks.wait_for_everyone()
    try:
        with disk_errors():
            write(partial)
        ranks.wait_for_everyone()
        sums = _shared_out(ranks, _files(partial), lambda names: file_digests(partial, names))
        if ranks.is_main_process:
            write_text(partial / RECIPE, recipe_yaml)
            sums |= file_digests(partial, [RECIPE])
            seal(partial, {"step": step, "processes": ranks.num_processes} | facts, sums)
            finish_folder(partial, final)
            for old in complete_checkpoints(folder)[:-keep_last]:
                if step_of(old) != keep:
                    shutil.rmtree(old)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = complete_checkpoints(folder)
        last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no earlier checkpoint"
        raise OSError(f"checkpoint of step {step} could not be written to {folder}: {error}; {last}") from error
    ranks.wait_for_everyone()
    return final


def seal(folder: Path, facts: dict, sums: dict[str, str]) -> None:
    """Writes complete.json: facts, the sums of all other files, and its own."""
    write_json(folder / COMPLETE, with_sum(facts | {"sha256": sums}))


def _files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != MARK)


def _shared_out(ranks, names: list[str], work: Callable[[list[str]], dict]) -> dict:
    """What `work` returns for all names; each process does its share."""
    from accelerate.utils import gather_object

    if ranks is None:
        return work(names)
    found = work(names[ranks.process_index::ranks.num_processes])
    gathered = ranks.gather_objects(found) if hasattr(ranks, "gather_objects") else gather_object([found])
    return {name: value for part in gathered for name, value in part.items()}


@contextmanager
def disk_errors() -> Iterator[None]:
    """Writers of tensors report a full disk in three ways; here it is always an OSError."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise OSError(first_line(error)) from error


@contextmanager
def folder_aside(final: Path) -> Iterator[Path]:
    """A folder to be filled, which takes the place of `final` at the end (`storage.files.folder_aside`).

    Raises:
        OSError: the disk is full or not writable; `final` is as it was.
    """
    try:
        with files.folder_aside(final) as partial, disk_errors():
            yield partial
            for tensors in partial.glob("*.safetensors"):  # safetensors makes files that nobody else may read
                shutil.copymode(partial / "config.json", tensors)
    except OSError as error:
        raise OSError(f"{final} could not be written: {error}; the last checkpoint is kept, --resume tries again") from error


def damage(accelerator, path: Path) -> str | None:
    """Why a finished checkpoint is no longer what was written, in one line, or None; all processes call it.

    Every file is read once. Versions that wrote no sums wrote pickled states, which are refused where they are read.

    Args:
        accelerator: whose processes share the reading; None: this process alone.
    """
    try:
        facts = read_json(path / COMPLETE)
        sums = facts.get("sha256", {})
        written_with_sums = sums != {} or (path / STATE).is_file() or (path / SHARDS).is_dir()
        if written_with_sums and (not isinstance(sums, dict) or facts.pop("sum", None) != json_digest(facts)):
            return f"{path / COMPLETE}: not what was written (its own sum differs)"
    except ValueError as error:
        return str(error)
    missing = next((name for name in sums if not (path / name).is_file()), None)
    if missing is not None:
        return f"{path / missing} is missing"
    found = _shared_out(accelerator, sorted(sums), lambda names: file_digests(path, names))
    changed = next((name for name in sorted(sums) if found[name] != sums[name]), None)
    return None if changed is None else f"{path / changed}: not the bytes that were written (SHA-256 differs)"


def require_whole(folder: Path) -> None:
    """Raises ValueError for a checkpoint's folder whose files are not what was written; other folders are not looked at."""
    if (folder / COMPLETE).is_file() and (fault := damage(None, folder)):
        raise ValueError(f"{fault}; expected a whole checkpoint")


def newest_whole(accelerator, folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are what was written, or None if there never was one; all processes call it.

    A damaged one is said and set aside as `<name>.damaged`, so that it neither counts nor is written over.

    Raises:
        ValueError: all are damaged.
    """
    found = complete_checkpoints(folder)
    for position, path in reversed(list(enumerate(found))):
        fault = damage(accelerator, path)
        if fault is None:
            return path
        if not position:
            raise ValueError(f"{fault}; there is no earlier whole checkpoint: start a new run without --resume")
        say(f"--resume: {fault}; trying {found[position - 1].name} instead")
        if accelerator.is_main_process:
            aside = path.with_name(path.name + ".damaged")
            path.rename(next_free(aside) if aside.exists() else aside)
        accelerator.wait_for_everyone()
    return None


def state_writer(accelerator, *, model, states: dict, copied: bool) -> Callable[..., None]:
    """What writes a data-parallel job's part of a checkpoint into a folder: the first process the model and `states` (objects
    with `state_dict`), every process its generators. All processes make one.

    Args:
        copied: of copies in host memory, so that training may go on meanwhile.
    """
    from training.state_files import host_copy, random_state, save_state, write_tensors

    saved = {name: state.state_dict() for name, state in states.items()}  # all processes: some of it is summed over them
    generators = random_state() | {"micro_step": accelerator.step}
    main, name_of_generators = accelerator.is_main_process, f"random_states_{accelerator.process_index}.safetensors"
    tensors: dict = {}
    for name, tensor in accelerator.unwrap_model(model, keep_torch_compile=False).state_dict().items() if main else ():
        if all(tensor is not kept and not _same(tensor, kept) for kept in tensors.values()):  # a tied head is its embedding
            tensors[name] = tensor
    if copied:
        generators, tensors, saved = host_copy(generators), host_copy(tensors), host_copy(saved) if main else None

    def write(folder: Path, group=None) -> None:
        if main:
            write_tensors(folder / MODEL, tensors, {"format": "pt"})
            save_state(folder / STATE, saved)
        save_state(folder / name_of_generators, generators)

    return write


def _same(a, b) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.numel() > 0


def read_states(accelerator, path: Path, *, model, states: dict, other_processes: bool = False) -> int:
    """Restores what `state_writer` wrote; returns the number of processes that wrote it.

    other_processes: it may be another number than now; generators are then left as they are.

    Raises:
        ValueError: written by another number of processes, unless that is allowed; by a version with pickled states; of another
            shape.
    """
    from safetensors.torch import load_file

    from training.state_files import load_state, set_random_state

    processes = read_json(path / COMPLETE).get("processes")
    if (path / SHARDS).is_dir():
        raise ValueError(f"{path}: written by a run that divides what it trains; resume it as it was trained "
                         "(cluster.sharding=fsdp2, or dflash.shard_drafter=true), or start a new run without --resume")
    if processes != accelerator.num_processes and not other_processes:
        raise ValueError(f"{path}: written by {counted(processes, 'process', 'processes')}, now running "
                         f"{accelerator.num_processes}; a run resumes "
                         "exactly only with the same number (--other-processes goes on from its weights all the same)")
    if not (path / STATE).is_file():
        raise ValueError(f"{path}: no {STATE}: a checkpoint of an earlier version, whose pickled states are not read, because "
                         "they could run code; start a new run without --resume")
    try:
        plain = accelerator.unwrap_model(model, keep_torch_compile=False)
        missing, extra = plain.load_state_dict(load_file(path / MODEL), strict=False)
        tied = {name for name in missing if any(_same(plain.get_parameter(name), p) for n, p in plain.named_parameters()
                                                if n not in missing)} if missing else set()
        if extra or set(missing) - tied:
            raise KeyError(f"tensors {', '.join(sorted({*missing, *extra} - tied)[:3])}")
        saved = load_state(path / STATE)
        for name, state in states.items():
            state.load_state_dict(saved[name])
        if processes == accelerator.num_processes:
            generators = load_state(path / f"random_states_{accelerator.process_index}.safetensors")
            set_random_state(generators)
            accelerator.step = generators["micro_step"]
    except (RuntimeError, KeyError, ValueError, TypeError, OSError) as error:
        text = str(error).strip().splitlines()
        raise ValueError(f"{path}: does not fit this recipe's model: {text[-1].strip() if text else error!r}") from None
    return processes
