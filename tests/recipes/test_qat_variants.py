"""The ablation command: what it reads of runs, its intervals, and that a second call repeats nothing."""

import importlib.util
import json
import math
import subprocess
import sys

import pytest
import yaml
from jobs import ENVIRONMENT, ROOT

SPEC = importlib.util.spec_from_file_location("qat_variants", ROOT / "benchmarks/qat_variants.py")
variants = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(variants)


def test_intervals_are_students():
    middle, half = variants.interval([1.0, 2.0, 3.0])
    assert middle == 2.0 and half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert variants.interval([5.0]) == (5.0, None)
    assert variants.show([0.5, 0.6, 0.7], 1, 100) == "60.0 ± 24.8"


def test_flips_add_up_over_reports_and_the_dead_zone_is_the_last_one():
    records = [{"kind": "health", "step": s, "tensor": "a", "flipped": [0.1, 0.2], "zeroed": [0.3, z]}
               for s, z in ((5, 0.9), (10, 0.4))]
    found = variants.health([*records, {"kind": "train", "step": 10, "tokens": 80}])
    assert found == pytest.approx({"flipped_mean": 0.3, "flipped_max": 0.4, "dead_zone_mean": 0.35, "dead_zone_max": 0.4})


def test_a_variant_is_compared_with_the_first_row_by_row():
    rows = [0.1, 0.4, 0.2, 0.3, 0.9, 0.5]
    first = [{"row_kl": {"a": rows[:3], "b": rows[3:]}}] * 2
    other = [{"row_kl": {"a": [0.9 * kl for kl in rows[:3]], "b": [0.5 * kl for kl in rows[3:]]}},
             {"row_kl": {"a": [0.7 * kl for kl in rows[:3]], "b": [1.1 * kl for kl in rows[3:]]}}]
    assert variants.beside(other, first) == "0.800 (0.800 to 0.800)"
    assert variants.beside(first, first) == "" and variants.beside([{"row_kl": None}], first) == ""


@pytest.mark.slow
def test_a_table_is_made_once_and_read_afterwards(tiny_recipe, tmp_path):
    settings = yaml.safe_load(tiny_recipe.read_text())
    settings["qat"] |= {"steps": 3, "heldout_every": 3}
    tiny_recipe.write_text(yaml.safe_dump(settings))

    def call(*arguments):
        command = [sys.executable, "benchmarks/qat_variants.py", "--recipe", tiny_recipe, "--out", tmp_path / "out",
                   "--json", tmp_path / "t.json", *arguments]
        return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True)

    arguments = ("--variants", "demo", "--seeds", "4,5", "--page", tmp_path / "t.md", "--chart", tmp_path / "t.png")
    first = call(*arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("$ qat/train.py") == 2 and "$" not in call(*arguments).stdout
    page = (tmp_path / "t.md").read_text().splitlines()
    assert len(page) == 5 and page[2].startswith("| original (bf16) | 1 |") and page[4].startswith("| demo | ")
    record = json.loads((tmp_path / "t.json").read_text())
    runs = record["variants"]["demo"]["runs"]
    assert [r["seed"] for r in runs] == [4, 5] and [t for t, _ in runs[0]["curve"]] == [0, 3 * 2 * 64]
    assert (tmp_path / "t.png").read_bytes()[:4] == b"\x89PNG"
    refused = call("--variants", "demo", "--seeds", "4", "qat.stepz=3")
    assert refused.returncode == 2 and "stepz" in refused.stderr and "Traceback" not in refused.stderr
    broken = call("--variants", "muon", "--seeds", "4", f"model.path={tmp_path / 'none'}")
    assert broken.returncode == 1 and "muon, seed 4" in broken.stderr and "Traceback" not in broken.stderr
