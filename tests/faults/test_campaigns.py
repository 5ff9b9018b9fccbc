"""Campaigns of damage: each of many random ones ends in the right result or in one clear line, never in another result with
code 0, never in a traceback, never in a wait. `make test-slow` runs a few of each; FP4_TEST_DAMAGES, FP4_TEST_KILLS,
FP4_TEST_DISKS say how many, FP4_TEST_SEED which, and `pytest -s` shows the counts."""

import contextlib
import functools
import json
import math
import os
import random
import resource
import shutil
import subprocess
import time

import pytest

from tests.faults.attempts import RIGHT, SILENT, TOLD, TRACEBACK, Tally, attempt, content, put_back
from tests.faults.conftest import DAMAGES, DISKS, KILLS, SEED
from tests.faults.random_damage import damage, files_below
from training.report import CLOCK_KEYS, read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]
JOBS = {"qat": ("stopped", "drafted"), "dflash": ("half_drafted", "drafted")}


def result(run, job, metrics=True) -> dict:
    """What a job was for, without clocks."""
    home = run / job
    summary = json.loads((home / "summary.json").read_text())
    kept = {"qat": ("qat", "ptq", "bf16", "steps", "weights"), "dflash": ("acceptance", "steps", "weights", "target")}[job]
    found = {"summary": {k: summary.get(k) for k in kept},
             "model": {n: b for n, b in content(home / "model").items() if n != ".unfinished"}}
    if metrics:
        found["metrics"] = [{k: v for k, v in r.items() if k not in CLOCK_KEYS} for r in read_metrics(home / "metrics.jsonl")]
    return found


def is_right(run, job, expected, metrics) -> bool:
    return result(run, job, metrics) == expected


def verdict(found, right) -> str:
    """Of an attempt, and of a function that says whether its result is the right one."""
    fault = found.fault()
    if fault or found.code:
        return fault or TOLD
    return RIGHT if right() else SILENT


@pytest.mark.parametrize("job", JOBS)
def test_a_damaged_run_resumes_to_the_same_result_or_refuses(job, trained):
    """One file of the run's folder, of the base or of the texts."""
    rng, tally = random.Random(f"{job} {SEED}"), Tally()
    pristine, finished = (getattr(trained, name) for name in JOBS[job])
    expected = {told: result(trained.at(finished), job, told) for told in (True, False)}
    for _ in range(DAMAGES):
        put_back(pristine, trained.work)
        mine = files_below(trained.run / job, *([trained.run / "data"] if (trained.run / "data").is_dir() else []))
        files = mine if rng.random() < 0.8 else files_below(trained.work / "base", trained.work / "text")
        what, path = damage(rng, trained.work, files)
        found = attempt(job, trained.recipe, "--resume")
        told = path.name != "metrics.jsonl"  # of a damaged record nothing is promised but that it harms nothing else
        tally.add(verdict(found, functools.partial(is_right, trained.run, job, expected[told], told)), what, found.said)
    tally.close(f"damages of a stopped {job} run, then --resume")


def test_a_damaged_source_is_exported_to_the_same_bytes_or_refused(trained):
    rng, tally, out = random.Random(f"export {SEED}"), Tally(), trained.run / "export" / "model"
    for _ in range(DAMAGES):
        put_back(trained.drafted, trained.work)
        files = [f for f in files_below(trained.run) if "checkpoints" not in f.parts and f.suffix != ".png"]
        what, _ = damage(rng, trained.work, files if rng.random() < 0.7 else files_below(trained.work / "base"))
        found = attempt("export", trained.recipe)
        if found.code == 1 and "FOUND" in found.said and not out.exists():
            tally.add(TOLD, what)
        elif found.code == 0 and content(out) != trained.export and "warning:" in found.said:
            tally.add(TOLD, what)
        else:
            tally.add(verdict(found, lambda: content(out) == trained.export), what, found.said)
    tally.close("damages of what is exported, then export")


def test_every_damage_of_an_exported_folder_is_found(trained):
    rng, tally = random.Random(f"verify {SEED}"), Tally()
    for _ in range(8 * DAMAGES):
        put_back(trained.exported, trained.work)
        out = trained.run / "export" / "model"
        what, path = damage(rng, out, files_below(out))
        found = attempt("verify", out, seconds=120)
        fault = found.fault(())
        named = path.name in found.said or path.name.startswith("checksums")
        tally.add(fault or (TOLD if found.code == 1 and "FOUND" in found.said and named else SILENT), what, found.said)
    tally.close("damages of an exported folder, then verify")


def test_every_damage_of_an_exported_folder_ends_validation_in_a_verdict(trained):
    rng, tally = random.Random(f"validate {SEED}"), Tally()
    for _ in range(DAMAGES):
        put_back(trained.exported, trained.work)
        out = trained.run / "export" / "model"
        what, _ = damage(rng, out, files_below(out))
        found = attempt("validate", out, "--tokens", 4, "--prompts-per-domain", 1, "--backend", "torch")
        tally.add(found.fault(()) or (TOLD if found.code else SILENT), what, found.said)
    tally.close("damages of an exported folder, then validate")


def test_damaged_caches_change_nothing(trained):
    rng, tally = random.Random(f"cache {SEED}"), Tally()
    put_back(trained.exported, trained.work)
    time.sleep(1.1)  # sums of files that were just written are not kept
    cache = files_below_cache()
    attempt("export", trained.recipe)
    for _ in range(DAMAGES):
        files = cache()
        assert files
        shutil.rmtree(trained.run / "export")
        what, _ = damage(rng, files[0].parent, files, [*files, *files_below(trained.run / "qat")])
        found = attempt("export", trained.recipe)
        tally.add(verdict(found, lambda: content(trained.run / "export" / "model") == trained.export), what, found.said)
        shutil.rmtree(files[0].parent)
        attempt("export", trained.recipe)
    tally.close("damages of the user's cache, then export")


def files_below_cache():
    from storage.cache import user_cache

    return lambda: files_below(user_cache())


def took(command, *arguments) -> float:
    began = time.monotonic()
    attempt(command, *arguments)
    return time.monotonic() - began


@pytest.mark.parametrize("job", JOBS)
def test_a_job_killed_at_any_moment_resumes_to_the_same_result(job, trained):
    rng, tally = random.Random(f"kill {job} {SEED}"), Tally()
    before, finished = ("base_only", "drafted") if job == "qat" else ("drafted", "drafted")
    expected = result(trained.at(finished), job)
    killed = 0
    while killed < KILLS:
        put_back(trained.drafted, trained.work)
        shutil.rmtree(trained.run / job)
        if before == "base_only":
            shutil.rmtree(trained.run)
        length = took_once(job, trained)
        moments = []
        while killed < KILLS and len(moments) < 4:
            moments.append(rng.random() * length)
            killed += attempt(job, trained.recipe, "--resume", killed_after=moments[-1]).code is None
        found = attempt(job, trained.recipe, "--resume")
        tally.add(verdict(found, lambda: result(trained.run, job) == expected), f"killed after {moments}", found.said)
        left = [p.name for p in trained.run.rglob("*.partial")]
        if left:
            tally.add(SILENT, f"killed after {moments}: {left} left behind")
    print(f"\n{killed} kills")
    tally.close(f"rounds of kills of {job}")


TOOK: dict[str, float] = {}


def took_once(job, trained) -> float:
    """Seconds of a whole run, measured once."""
    if job not in TOOK:
        TOOK[job] = took(job, trained.recipe)
        shutil.rmtree(trained.run / job)
    return TOOK[job]


def test_an_export_killed_at_any_moment_ends_in_the_same_bytes(trained):
    rng, tally = random.Random(f"kill export {SEED}"), Tally()
    put_back(trained.drafted, trained.work)
    out, killed, length = trained.run / "export" / "model", 0, took("export", trained.recipe)
    while killed < KILLS:
        shutil.rmtree(trained.run / "export", ignore_errors=True)
        moments = []
        while killed < KILLS and len(moments) < 3:
            moments.append(rng.random() * length)
            killed += attempt("export", trained.recipe, killed_after=moments[-1]).code is None
        found = attempt("export", trained.recipe)
        tally.add(verdict(found, lambda: content(out) == trained.export), f"killed after {moments}", found.said)
        left = [p.name for p in (trained.run / "export").iterdir() if p != out and not p.name.endswith(".lock")]
        if left:
            tally.add(SILENT, f"killed after {moments}: {left} left behind")
    print(f"\n{killed} kills")
    tally.close("rounds of kills of an export")


def test_an_unfinished_export_that_was_damaged_is_not_exported(trained):
    rng, tally = random.Random(f"partial {SEED}"), Tally()
    put_back(trained.drafted, trained.work)
    out, length = trained.run / "export" / "model", took("export", trained.recipe)
    for _ in range(DAMAGES):
        shutil.rmtree(trained.run / "export")
        partial, tries = out.with_name("model.partial"), 0
        while not (partial.is_dir() and len(files_below(partial)) > 2):
            attempt("export", trained.recipe, killed_after=length * (0.4 + 0.6 * rng.random()))
            if out.exists():
                shutil.rmtree(out)
            assert (tries := tries + 1) < 50
        what, path = damage(rng, partial, files_below(partial))
        found = attempt("export", trained.recipe)
        again = found.code == 1 and "the same command writes it anew" in found.said
        if again or found.code == 2:
            first = found.fault(()) or (TOLD if again or "error:" in found.said else TRACEBACK)
            tally.add(first, what, found.said)
        else:
            tally.add(verdict(found, lambda: content(out) == trained.export), what, found.said)
        if again:
            found = attempt("export", trained.recipe)
            tally.add(verdict(found, lambda: content(out) == trained.export), f"{what}, second time", found.said)
        if not out.exists():
            (trained.run / "export").mkdir(exist_ok=True)
    tally.close("damages of an unfinished export, then export")


def test_a_verification_that_is_killed_changes_nothing(trained):
    rng = random.Random(f"kill verify {SEED}")
    put_back(trained.exported, trained.work)
    out = trained.run / "export" / "model"
    length, before = took("verify", out), content(trained.run)
    killed = sum(attempt("verify", out, killed_after=rng.random() * length).code is None for _ in range(KILLS))
    assert content(trained.run) == before and attempt("verify", out).code == 0
    print(f"\n{killed} kills of a verification")


@contextlib.contextmanager
def small_disk(folder, size: int):
    """A file system of its own for a folder, of `size` bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True)
    if done.returncode:
        pytest.skip("may not mount a file system")
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=1g", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def files_of_at_most(size: int):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("kind", ["a disk", "a limit on files"])
@pytest.mark.parametrize("job", ["qat", "dflash", "export"])
def test_a_full_disk_is_one_line_and_with_room_the_result_is_the_same(job, kind, trained):
    rng, tally = random.Random(f"full {kind} {job} {SEED}"), Tally()
    resume = () if job == "export" else ("--resume",)

    def right():
        if job == "export":
            return content(trained.run / "export" / "model") == trained.export
        return result(trained.run, job) == result(trained.at(trained.drafted), job)

    for _ in range(DISKS):
        put_back(trained.drafted, trained.work)
        home = trained.run / job
        shutil.rmtree(home, ignore_errors=True)
        size = int(math.exp(rng.uniform(math.log(2_000), math.log(4_000_000))))
        with small_disk(home, size) if kind == "a disk" else contextlib.nullcontext() as room:
            first = attempt(job, trained.recipe, *resume, first=files_of_at_most(1 << 40 if room else size // 10))
            tally.add(first.fault() or (TOLD if first.code else RIGHT if right() else SILENT), f"{size} bytes", first.said)
            if room is not None:
                room()
            found = attempt(job, trained.recipe, *resume)
            tally.add(verdict(found, right), f"{size} bytes, then room", found.said)
    tally.close(f"{job} on {kind} that is full, and with room again")


