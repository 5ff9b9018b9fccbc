"""The drafters' table: columns, and differences that are paired text by text."""

import importlib.util
import json
import subprocess
import sys

import pytest
from jobs import ENVIRONMENT, ROOT

SPEC = importlib.util.spec_from_file_location("drafter_variants", ROOT / "benchmarks/drafter_variants.py")
variants = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(variants)


def record(rounds: list[float]) -> dict:
    length = 100 * len(rounds) / sum(rounds)
    acceptance = {"math": {"task_t0": length, "open_t1": 1.0, "lookup_task_t0": 1.0}, "context 512": {"task_t0": length}}
    return {"acceptance": acceptance,
            "detail": {d: {"task_t0": {"drafter": {"of_texts": [[100, r] for r in rounds]}},
                           "open_t1": {"drafter": {"of_texts": [[100, 50.0]] * len(rounds)}}} for d in ("math", "context 512")}}


def test_columns_are_those_that_were_measured_tasks_first():
    assert variants.kinds_of([record([50.0])]) == [("math", "task_t0"), ("context 512", "task_t0"), ("math", "open_t1")]


def test_a_difference_that_every_text_shares_is_certain_however_much_texts_differ():
    found = variants.paired(record([10.0, 20.0, 40.0, 80.0]), record([8.0, 16.0, 32.0, 64.0]))["math task_t0"]
    assert [round(x, 6) for x in found] == [1.25, 1.25, 1.25]
    ratio, low, high = variants.paired(record([10.0, 20.0, 40.0, 80.0]), record([20.0, 10.0, 40.0, 80.0]))["math task_t0"]
    assert ratio == 1.0 and low < 0.95 and high > 1.05


def test_a_mistake_is_one_line_before_anything_is_trained(tmp_path):
    command = [sys.executable, "benchmarks/drafter_variants.py", "--recipe", "recipes/smol.yaml", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True)
    assert done.returncode == 2
    assert done.stderr == "error: recipes/smol.yaml: no such recipe file, did you mean recipes/smollm2.yaml?\n"


@pytest.mark.slow
def test_variants_share_the_served_targets_text_and_are_read_the_second_time(draft_recipe, tmp_path):
    def call():
        command = [sys.executable, "benchmarks/drafter_variants.py", "--recipe", draft_recipe, "--variants",
                   "demo,bf16-target,mxfp4", "--seeds", "0", "--same-text", "--out", tmp_path / "out",
                   "--json", tmp_path / "t.json", "dflash.steps=2"]
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = call()
    answers = [file.read_bytes() for file in (tmp_path / "out/shared/data").glob("answers-*.jsonl")]
    assert len(answers) == 2 and answers[0] == answers[1]  # one by the name of each target
    assert len(list((tmp_path / "out/shared/features").iterdir())) == 2
    assert (tmp_path / "out/bf16-target-0/model.safetensors").is_file()
    columns = json.loads((tmp_path / "t.json").read_text())["against_the_first"]["bf16-target"]
    assert columns and all(low <= ratio <= high for ratio, low, high in columns.values())
    assert "answers" in first and "answers" not in call()
    # The first variant's drafter, rounded: judged, and not trained or written anew.
    assert "matrices rounded: " in first and not (tmp_path / "out/mxfp4-0").exists()
    assert json.loads((tmp_path / "out/mxfp4-0.json").read_text())["seconds"] is None
