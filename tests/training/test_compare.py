"""Results of several runs stand side by side, with what differs between their recipes; what forbids a comparison is said."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def write_run(folder: Path, job: str, summary: dict, recipe: dict) -> Path:
    (folder / job).mkdir(parents=True)
    (folder / job / "summary.json").write_text(json.dumps(summary))
    (folder / job / "resolved.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def of_qat(kl: float, **more) -> dict:
    row = {"loss": 2.0 + kl, "kl": kl, "top1_agreement": 0.9, "domains": {"code": {"kl": kl}}}
    return {"qat": row, "ptq": row | {"kl": 0.1}, "kl_gap_closed": 1 - kl / 0.1, "steps": 10, "heldout": "one"} | more


def compare(*arguments, expect: int = 0) -> str:
    done = subprocess.run([sys.executable, "training/compare.py", *map(str, arguments)], cwd=ROOT, text=True,
                          capture_output=True, env={"COLUMNS": "200", "PATH": ""})
    assert done.returncode == expect, done.stderr
    return done.stdout + done.stderr


def test_two_runs_are_compared_in_results_and_recipe(tmp_path):
    for name, kl, rate in (("one", 0.04, 1e-4), ("two", 0.05, 3e-4)):
        recipe = {"name": name, "qat": {"optimizer": {"learning_rate": rate}, "steps": 10}}
        write_run(tmp_path / name, "qat", of_qat(kl), recipe)
    said = compare(tmp_path / "one", tmp_path / "two" / "qat")
    line = next(line for line in said.splitlines() if "KL, trained, code" in line)
    assert "0.04 *" in line and "0.05" in line
    assert any("qat.optimizer.learning_rate" in line and "0.0001" in line and "0.0003" in line for line in said.splitlines())
    assert "qat.steps" not in said and "no comparison" not in said


def test_what_forbids_a_comparison_or_did_not_help_is_said(tmp_path):
    write_run(tmp_path / "one", "qat", of_qat(0.04), {})
    write_run(tmp_path / "two", "qat", of_qat(0.2, heldout="two", helped=False), {})
    said = compare(tmp_path / "one", tmp_path / "two")
    assert "no comparison: these runs are measured on different text" in said and "*" not in said
    assert "run 2: training did not help" in said


def test_drafters_are_compared_by_domain(tmp_path):
    for name, length in (("one", 3.0), ("two", 3.5)):
        write_run(tmp_path / name, "dflash", {"acceptance": {"code": {"task_t0": length}}, "target": {"weights": "w"}}, {})
    assert "3.5 *" in compare(tmp_path / "one", tmp_path / "two" / "dflash" / "summary.json")


@pytest.mark.parametrize(("names", "words"), [
    (["one"], "expected two runs or more"), (["one", "empty"], "no finished run there"), (["one", "other"], "no two of them")])
def test_what_cannot_be_compared_is_one_line(tmp_path, names, words):
    write_run(tmp_path / "one", "qat", of_qat(0.04), {})
    write_run(tmp_path / "other", "dflash", {"acceptance": {}}, {})
    (tmp_path / "empty").mkdir()
    said = compare(*(tmp_path / name for name in names), expect=2)
    assert words in said and said.startswith("error: ") and said.count("\n") == 1
