"""An export that goes wrong: a full disk, a writer whose starter was killed, a name that is taken; what its card claims."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from jobs import run_job
from toy_export import export, make_run

from export.drafter_files import REFERENCE

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "export" / "to_hf.py")]


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


def test_writers_end_when_the_process_that_started_them_is_killed(toy_run, tmp_path):
    """Else they would write beside the export that is started to continue this one."""
    first = subprocess.Popen([*COMMAND, str(toy_run), "--out", str(tmp_path / "out"), "--processes", "3"],
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(writers := psutil.Process(first.pid).children()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert len(writers) == 2
    _, alive = psutil.wait_procs(writers, timeout=100)
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
    assert str(toy_run.parent / "base") in (tmp_path / "a/README.md").read_text()
    fields = front_matter(export(toy_run, "export.base_model=Some-Org/Some-Model-1.5", out=tmp_path / "b"))
    assert fields["base_model"] == "Some-Org/Some-Model-1.5" and fields["base_model_relation"] == "quantized"


def test_figures_of_a_run_are_told_of_its_own_result_only(tmp_path):
    recipe = make_run(tmp_path)
    numbers = {"loss": 1.0, "kl": 0.5, "top1_agreement": 0.75, "eval_tokens": 10}
    summary = {"bf16": numbers, "ptq": numbers, "qat": numbers, "kl_gap_closed": 0.123}
    (tmp_path / "runs/toy/qat/summary.json").write_text(json.dumps(summary))
    (tmp_path / "runs/toy/dflash/summary.json").write_text(json.dumps({"acceptance": {"a": {"task_t0": 4.25,
                                                                                           "lookup_task_t0": 1.5}}}))
    own = export(recipe, out=tmp_path / "own")
    assert "0.123" in (own / "README.md").read_text() and "4.25" in (own / "README.md").read_text()
    assert json.loads((own / "export.json").read_text())["acceptance"]["a"]["task_t0"] == 4.25
    (tmp_path / "runs/toy/qat/model").rename(tmp_path / "elsewhere")
    other = export(recipe, out=tmp_path / "other", weights=tmp_path / "elsewhere")
    assert "0.123" not in (other / "README.md").read_text() and "4.25" not in (other / "README.md").read_text()
    assert "acceptance" not in json.loads((other / "export.json").read_text())


def test_every_file_may_be_read_by_whom_the_umask_allows(exported):
    modes = {p.name: p.stat().st_mode & 0o777 for p in exported.rglob("*") if p.is_file()}
    assert REFERENCE in modes and set(modes.values()) == {0o666 & ~_umask()}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
