"""An export that goes wrong: a full disk, a writer whose starter was killed, a name that is taken; what its card claims."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from jobs import Job, run_job
from safetensors.torch import load_file, save_file
from toy_export import export, make_run, qwen3_run

from checkpoint.verify import verify
from export.drafter_files import MASK, REFERENCE
from export.job import Export, Request, trained_weights
from recipes.load import load_recipe
from storage.digests import combined, file_digests, model_digests, with_sum
from training.checkpoint import seal

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "export" / "to_hf.py")]


def test_an_export_without_room_on_the_disk_is_refused_before_it_begins(toy_run, tmp_path, monkeypatch):
    from types import SimpleNamespace

    from export import shards

    need = Export(load_recipe(toy_run), Request(out=tmp_path / "out")).bytes
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda place: SimpleNamespace(free=need - 1))
    with pytest.raises(ValueError, match=r"--out [^\n]* free there, but the export takes [^\n]*B more$"):
        export(toy_run, out=tmp_path / "new" / "out")
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("*.partial"))
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda place: SimpleNamespace(free=need))
    assert export(toy_run, out=tmp_path / "out").is_dir()


def test_a_full_disk_is_one_line_with_the_file_and_the_same_command_continues(toy_run, exported, tmp_path):
    """A limit on the size of files stands for the full disk."""
    said = run_job("export/to_hf.py", toy_run, "export.shard_bytes=100000", "--out", tmp_path / "out", expect=1,
               before="import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (90000, 90000))")
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in said
    assert ".safetensors: could not be written: File too large; complete files stay" in errors[0]
    partial = tmp_path / "out.partial"
    assert partial.is_dir() and not (tmp_path / "out").exists() and not list(partial.glob("*.partial"))
    out = export(toy_run, "export.shard_bytes=100000", out=tmp_path / "out")
    for file in exported.glob("*.safetensors"):
        assert file.read_bytes() == (out / file.name).read_bytes()


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 128 + signal.SIGINT)])
def test_an_export_stopped_while_it_verifies_goes_on_without_writing_a_file_again(number, code, toy_run, exported, tmp_path):
    out = tmp_path / "out"
    arguments = toy_run, "export.shard_bytes=100000", "--out", out
    job = Job("export/to_hf.py", *arguments, before="import time; from checkpoint import verify; "
              "verify._Verifier._check_tensors = lambda self: (print('verifying', flush=True), time.sleep(100))")
    assert any(line == "verifying\n" for line in job.stdout)
    job.send_signal(number)
    said, _ = job.communicate()
    assert job.returncode == code and "Traceback" not in said
    if number == signal.SIGINT:
        assert said == "interrupted; files that are written stay, the same command goes on from there\n"
    partial = tmp_path / "out.partial"
    written = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in partial.glob("*.safetensors")}
    assert len(written) > 3
    assert f"continuing {partial}: {len(written)} of {len(written)} files are there" in run_job("export/to_hf.py", *arguments)
    assert {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in out.glob("*.safetensors")} == written
    names = sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(exported) for p in exported.rglob("*") if p.is_file())
    assert (out / "checksums.sha256").read_bytes() == (exported / "checksums.sha256").read_bytes()


def test_files_that_did_not_verify_are_written_anew(toy_run, exported, tmp_path):
    """Else the export would go on forever with a file that the disk has damaged."""
    arguments = toy_run, "export.shard_bytes=100000", "--out", tmp_path / "out"
    said = run_job("export/to_hf.py", *arguments, expect=1, before="""
from export import job
def finish(self, finish=job.Export.finish):
    finish(self)
    with (self.partial / self.shards[1].name).open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"xyz")
job.Export.finish = finish""")
    assert "FOUND" in said and "not renamed" in said
    run_job("export/to_hf.py", *arguments)
    assert (tmp_path / "out/checksums.sha256").read_bytes() == (exported / "checksums.sha256").read_bytes()


def _writers(pid: int) -> list[psutil.Process]:
    """The processes that an export has started to write; git, for one, may be another child of it."""
    found = []
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.Error):
            if "RANK" in child.environ():
                found.append(child)
    return found


def test_writers_end_when_the_process_that_started_them_is_killed(toy_run, tmp_path):
    """Else they would write beside the export that is started to continue this one."""
    first = subprocess.Popen([*COMMAND, str(toy_run), "--out", str(tmp_path / "out"), "--processes", "3"],
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(writers := _writers(first.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert len(writers) == 2
    _, alive = psutil.wait_procs(writers, timeout=300)
    for process in alive:
        process.kill()
    assert not alive and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind, message", [
    ("somebody's files", "exists and is no earlier export"), ("a file", "exists and is no earlier export"),
    ("the trained weights", "holds the weights that are to be exported"), ("the base", "holds the weights"),
])
def test_nothing_but_an_earlier_export_is_moved_out_of_the_way(kind, message, tmp_path):
    recipe = make_run(tmp_path, drafter=False)
    out = {"somebody's files": tmp_path / "mine", "a file": tmp_path / "file", "the base": tmp_path / "base",
           "the trained weights": tmp_path / "runs/toy/qat/model"}[kind]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    before = sorted(p for p in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        export(recipe, out=out)
    assert sorted(p for p in tmp_path.rglob("*")) == before


def front_matter(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---")[1])


def test_the_card_names_a_base_that_a_hub_can_have_and_no_folder_of_this_machine(toy_run, tmp_path):
    assert "base_model" not in front_matter(export(toy_run, out=tmp_path / "a"))
    for file in ("README.md", "resolved.yaml", "export.json", "config.json"):
        assert str(toy_run.parent) not in (tmp_path / "a" / file).read_text()
    assert "Made from `base`" in (tmp_path / "a/README.md").read_text()
    fields = front_matter(export(toy_run, "export.base_model=Some-Org/Some-Model-1.5", out=tmp_path / "b"))
    assert fields["base_model"] == "Some-Org/Some-Model-1.5" and fields["base_model_relation"] == "quantized"


def test_the_card_carries_licence_and_base_on_and_says_how_it_was_trained_and_its_limits(tmp_path):
    recipe = make_run(tmp_path / "models--Some-Org--Some-Model" / "snapshots" / "abc", drafter=False)
    root = recipe.parent
    (root / "base" / "README.md").write_text("---\nlicense: other\nlicense_name: some-licence\ntags: [a]\n---\ntext\n")
    (root / "base" / "LICENSE").write_text("You may.")
    (root / "base" / "NOTICE.txt").write_text("By them.")
    own = ("tokenizer.json", "tokenization_own.py", "own.tiktoken", "additional_chat_templates/tools.jinja")
    for name in own:
        (root / "base" / name).parent.mkdir(exist_ok=True)
        (root / "base" / name).write_text("{}")
    write_summaries(root, jobs=("qat",), qat={
        "tokens": 2048, "steps": 4, "helped": False, "training": {
            "data": ["own/*.jsonl"], "loss_on": "answers", "train": "experts", "sequence_length": 128, "warm_start": "none",
            "optimizer": "adamw", "learning_rate": 1e-4, "loss": {"kl": 1.0}}})
    out = export(recipe)
    fields, card = front_matter(out), (out / "README.md").read_text()
    assert (fields["license"], fields["license_name"], fields["base_model"]) == ("other", "some-licence", "Some-Org/Some-Model")
    assert (out / "LICENSE").read_text() == "You may." and (out / "NOTICE.txt").read_text() == "By them."
    assert all((out / name).read_text() == "{}" for name in own)
    for words in ("`own/*.jsonl`", "2,048 tokens in 4 updates of 512", "answers alone", "## Limits", "Training did not help",
                  "licence (some-licence)"):
        assert words in card, words
    assert verify(out).findings == []


def write_summaries(root: Path, jobs=("qat", "dflash"), qat=None, **target) -> None:
    """As the jobs leave them, of the weights that are there."""
    numbers = {"loss": 1.0, "kl": 0.5, "top1_agreement": 0.75, "eval_tokens": 10}
    digests = {job: combined(model_digests(root / "runs/toy" / job / "model")) for job in jobs}
    summaries = {"qat": {"bf16": numbers, "ptq": numbers, "qat": numbers, "kl_gap_closed": 0.123} | (qat or {}),
                 "dflash": {"acceptance": {"a": {"task_t0": 4.25, "lookup_task_t0": 1.5}},
                            "target": {"kind": "qat", "weights": digests["qat"]} | target}}
    for job in jobs:
        (root / "runs/toy" / job / "summary.json").write_text(json.dumps(summaries[job] | {"weights": digests[job]}))


def test_figures_of_a_run_are_told_of_its_own_result_only(tmp_path):
    recipe = make_run(tmp_path)
    write_summaries(tmp_path)
    own = export(recipe, out=tmp_path / "own")
    assert "0.123" in (own / "README.md").read_text() and "4.25" in (own / "README.md").read_text()
    assert json.loads((own / "export.json").read_text())["acceptance"]["a"]["task_t0"] == 4.25
    (tmp_path / "runs/toy/qat/model").rename(tmp_path / "elsewhere")
    other = export(recipe, out=tmp_path / "other", weights=tmp_path / "elsewhere")
    assert "0.123" not in (other / "README.md").read_text() and "4.25" not in (other / "README.md").read_text()
    assert "acceptance" not in json.loads((other / "export.json").read_text())


def nudge(path: Path) -> None:
    """Another value in one tensor, with the size and the date that the file had."""
    before = path.stat()
    tensors = load_file(path)
    name = next(n for n, t in tensors.items() if t.ndim == 1 and "norm" in n)
    tensors[name][0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("what", ["nothing", "target", "drafter", "kind"])
def test_a_drafters_figures_are_told_with_the_weights_they_were_measured_with_only(what, tmp_path, capsys):
    recipe = make_run(tmp_path)
    write_summaries(tmp_path, **({"kind": "ptq"} if what == "kind" else {}))
    if what in ("target", "drafter"):
        nudge(tmp_path / "runs/toy" / {"target": "qat", "drafter": "dflash"}[what] / "model/model.safetensors")
    if what in ("target", "kind"):  # it is known that the drafter was trained for other weights
        with pytest.raises(ValueError, match=r"dflash/model: trained for other weights \(dflash.target: .* set export.drafter"):
            export(recipe)
        bare = export(recipe, "export.drafter=none", out=tmp_path / "bare")
        assert not (bare / "dflash").exists() and "no drafter" in (bare / "README.md").read_text()
        capsys.readouterr()
    out = export(recipe, "export.drafter=any")
    card, manifest = (out / "README.md").read_text(), json.loads((out / "export.json").read_text())
    assert ("0.123" in card) == (what != "target")
    assert ("4.25" in card) == ("acceptance" in manifest) == (what == "nothing")
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == {"nothing": 0, "target": 2, "drafter": 1, "kind": 1}[what]
    assert all("its numbers are left out" in line and str(tmp_path / "runs/toy/qat/model") in line for line in warnings)


@pytest.mark.parametrize("job", ["qat", "dflash"])
def test_a_result_without_its_summary_is_not_exported_unless_it_is_named(job, tmp_path):
    """Its numbers, and which weights a drafter is for, would be left out without a word."""
    recipe = make_run(tmp_path)
    write_summaries(tmp_path)
    folder = tmp_path / "runs/toy" / job
    (folder / "resolved.yaml").write_text("name: toy\n")
    export(recipe, out=tmp_path / "whole")
    (folder / "summary.json").unlink()
    with pytest.raises(ValueError, match=rf"{job}/summary.json: missing, though model/ is there: .* --resume ends it"):
        export(recipe, out=tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    named = {"weights": tmp_path / "runs/toy/qat/model"} if job == "qat" else {}
    assert export(recipe, *(["export.drafter=none"] if job == "dflash" else []), out=tmp_path / "out", **named).is_dir()


@pytest.mark.parametrize("job", ["qat", "dflash"])
def test_a_changed_number_in_a_summary_is_told_before_anything_is_written(job, tmp_path):
    recipe = make_run(tmp_path)
    write_summaries(tmp_path)
    path = tmp_path / "runs/toy" / job / "summary.json"
    summary = with_sum(json.loads(path.read_text()) | {"by": {1: 0.1, 10: float("1e-9"), 2: (1, None)}})
    path.write_text(json.dumps(summary, indent=1))
    export(recipe, out=tmp_path / "whole")
    without = {k: v for k, v in summary.items() if k != "by"}
    for changed in (summary | {"by": {}}, summary | {"more": 1}, without, summary | {"sum": 1}):
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=rf"{job}/summary.json: not as it was written"):
            export(recipe, out=tmp_path / "out")
        assert not (tmp_path / "out.partial").exists()


def test_a_run_that_has_not_ended_is_said_to_be_exported_from_its_newest_checkpoint(tmp_path, capsys):
    newest = tmp_path / "qat/checkpoints/step-00000008"
    newest.mkdir(parents=True)
    seal(newest, {}, {})
    assert trained_weights(tmp_path / "qat") == newest
    assert capsys.readouterr().err == (f"note: {tmp_path / 'qat'}: the run has not ended, so its newest checkpoint is exported "
                                       "(step-00000008)\n")


@pytest.mark.parametrize("job", ["qat", "dflash"])
def test_a_result_that_is_older_than_a_checkpoint_is_not_exported(job, tmp_path):
    recipe = make_run(tmp_path)
    newest = tmp_path / "runs/toy" / job / "checkpoints/step-00000008"
    newest.mkdir(parents=True)
    (newest / "complete.json").write_text("{}")
    (tmp_path / "runs/toy" / job / "summary.json").write_text('{"steps": 4}')
    with pytest.raises(ValueError, match=f"{job}: model/ is the result of step 4, and step-00000008 is newer"):
        export(recipe)


@pytest.mark.parametrize("named", [False, True])
def test_a_checkpoint_that_was_damaged_is_not_exported(named, tmp_path):
    """Its bits are nobody's weights, and nothing but its sums can tell."""
    recipe = make_run(tmp_path, drafter=False)
    run = tmp_path / "runs/toy/qat"
    step = run / "checkpoints" / "step-00000004"
    step.parent.mkdir()
    (run / "model").rename(step)
    seal(step, {"step": 4, "processes": 1}, file_digests(step, [p.name for p in step.iterdir()]))
    assert export(recipe, out=tmp_path / "whole").is_dir()
    with (step / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    with pytest.raises(ValueError, match="step-00000004/model.safetensors: not the bytes that were written"):
        export(recipe, out=tmp_path / "out", **({"weights": step} if named else {}))
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_written_to_during_the_export_is_found(tmp_path, monkeypatch, capsys):
    from export import job

    recipe = make_run(tmp_path)
    finish = job.Export.finish
    monkeypatch.setattr(job.Export, "finish", lambda self: (finish(self), nudge(
        tmp_path / "runs/toy/dflash/model/model.safetensors")))
    assert job.run(load_recipe(recipe), job.Request(out=tmp_path / "out")) == 1
    assert "was written to during the export" in capsys.readouterr().out and not (tmp_path / "out").exists()


@pytest.mark.parametrize("sums", [b"", b"{", b'{"a": "00000000"}', b"[1]", b"\xf1", b"[" * 100_000, None])
def test_damaged_sums_beside_a_finished_file_let_it_be_written_anew(sums, toy_run, exported, tmp_path):
    parts = Export(load_recipe(toy_run), Request(out=tmp_path / "out"))
    parts.prepare()
    parts.write()
    files = sorted(parts.partial.glob("*.sums"))
    files[0].unlink()
    os.mkfifo(parts.partial / (files[0].name.removesuffix(".sums") + ".partial"))
    if sums is not None:
        files[0].write_bytes(sums)
    out = export(toy_run, out=tmp_path / "out")
    assert (out / "checksums.json").read_bytes() == (exported / "checksums.json").read_bytes()


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_what_is_no_file_in_an_unfinished_export_is_replaced_or_named(kind, toy_run, exported, tmp_path):
    parts = Export(load_recipe(toy_run), Request(out=tmp_path / "out"))
    parts.prepare(), parts.write(), parts.finish()
    kept = (".safetensors", ".sums", "plan.json", ".unfinished")
    (tmp_path / "elsewhere").write_text("not to be written to")
    for path in [p for p in parts.partial.rglob("*") if p.is_file() and not p.name.endswith(kept)]:
        path.unlink()
        {"pipe": os.mkfifo, "folder": os.mkdir, "link": lambda p: os.symlink(tmp_path / "elsewhere", p)}[kind](path)
    try:
        out = export(toy_run, out=tmp_path / "out")
    except OSError as error:
        assert kind == "folder" and str(parts.partial) in str(error)
    else:
        assert kind != "folder" and (out / "checksums.json").read_bytes() == (exported / "checksums.json").read_bytes()
    assert (tmp_path / "elsewhere").read_text() == "not to be written to"


def test_a_partial_folder_of_somebody_else_is_refused(tmp_path):
    recipe = make_run(tmp_path, drafter=False)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="out.partial: exists and is not the unfinished result"):
        export(recipe, out=tmp_path / "out")
    assert (tmp_path / "out.partial/thesis.txt").read_text() == "years of work"


def test_two_exports_into_one_folder_are_refused(tmp_path):
    recipe = make_run(tmp_path, drafter=False)
    holder = subprocess.Popen([sys.executable, "-c", "import sys, time; from pathlib import Path; "
                               "from storage.locks import Lock\n"
                               "with Lock(Path(sys.argv[1])): print(1, flush=True); time.sleep(100)", tmp_path / "out"],
                              stdout=subprocess.PIPE, cwd=ROOT)
    holder.stdout.readline()
    try:
        with pytest.raises(ValueError, match=f"out: process {holder.pid} on .* is writing it"):
            export(recipe, out=tmp_path / "out")
    finally:
        holder.kill()
        holder.wait()
    export(recipe, out=tmp_path / "out")  # a killed holder holds nothing
    assert not list(tmp_path.glob(".*.lock"))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 1234567890\n"
DRAFTER, BASE_INDEX = "runs/toy/dflash/model", "base/model.safetensors.index.json"


@pytest.mark.parametrize("file, content, message", [
    (BASE_INDEX, b'{"metadata": {}}', "not a safetensors index: expected"),
    (BASE_INDEX, b'{"weight_map": ["a"]}', "not a safetensors index: expected"),
    (BASE_INDEX, b'{"weight_map": {"lm_head.weight": "mod', "not valid JSON"),
    (BASE_INDEX, POINTER, "a Git LFS pointer, expected the file itself"),
    ("base/model.safetensors", POINTER, "a Git LFS pointer, expected the file itself"),
    (f"{DRAFTER}/model.safetensors", POINTER, "a Git LFS pointer, expected the file itself"),
    (f"{DRAFTER}/model.safetensors", b"\0" * 100, "not a whole safetensors file"),
    (f"{DRAFTER}/{MASK}", POINTER, "a Git LFS pointer, expected the file itself"),
    (f"{DRAFTER}/{MASK}", b"junk", "expected a torch file of mask_token_id and embedding"),
])
def test_an_input_file_that_is_not_what_its_name_says_is_one_line_before_anything_is_written(file, content, message, tmp_path):
    recipe = make_run(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        export(recipe)
    assert str(tmp_path / file) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out.partial").exists()


def test_a_base_by_its_hub_name_is_found_in_the_local_cache(tmp_path, monkeypatch):
    """As training found it; no one is asked."""
    recipe, cache = make_run(tmp_path, drafter=False), tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    with pytest.raises(ValueError, match=r"model\.path: some-org/some-moe: no such .*, then model\.path=DIR\)$"):
        export(recipe, "model.path=some-org/some-moe", out=tmp_path / "none")
    by_folder = export(recipe, out=tmp_path / "by_folder")
    repository = cache / "models--some-org--some-moe"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0123456789" * 4)
    (repository / "snapshots").mkdir()
    (tmp_path / "base").rename(repository / "snapshots" / ("0123456789" * 4))
    out = export(recipe, "model.path=some-org/some-moe", out=tmp_path / "by_name")
    for file in by_folder.glob("*.safetensors"):
        assert file.read_bytes() == (out / file.name).read_bytes()
    assert front_matter(out)["base_model"] == "some-org/some-moe"


def test_an_fp8_base_of_another_family_is_rounded(tmp_path):
    """Scales of its k and v projections run through all heads."""
    recipe, _ = qwen3_run(tmp_path)
    file = tmp_path / "base/model.safetensors"
    released, decoded = {}, {}
    for name, w in load_file(file).items():
        released[name] = decoded[name] = w
        if "_proj.weight" in name and w.shape[0] > 1:
            released[name] = w.to(torch.float8_e4m3fn)
            released[name + "_scale_inv"] = torch.full((-(-w.shape[0] // 128), -(-w.shape[1] // 128)), 0.5)
            decoded[name] = (released[name].float() * 0.5).bfloat16()
    assert any(".k_proj.weight_scale_inv" in name for name in released)
    save_file(released, file, metadata={"format": "pt"})
    written = load_file(export(recipe, "export.layout=compressed-tensors", base=tmp_path / "base") /
                        "model-00001-of-00001.safetensors")
    plain = [name for name in decoded if ".experts." not in name]
    assert all(torch.equal(written[name], decoded[name]) for name in plain)
    assert not any(name.endswith("_scale_inv") for name in written)


def test_every_file_may_be_read_by_whom_the_umask_allows(exported):
    modes = {p.name: p.stat().st_mode & 0o777 for p in exported.rglob("*") if p.is_file()}
    assert REFERENCE in modes and set(modes.values()) == {0o666 & ~_umask()}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
