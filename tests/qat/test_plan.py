"""--plan: published counts for the released geometries, figures that add up, and a refusal that names need and have."""

import subprocess
import sys
from pathlib import Path

import pytest
from jobs import run_job

from qat.plan import GIB, make_plan, refuse_if_too_large
from recipes.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]


def plan(recipe: str, *overrides: str):
    return make_plan(load_recipe(ROOT / "recipes" / recipe, overrides))


@pytest.fixture(scope="module")
def pro():
    return plan("mimo.yaml")


def test_the_pro_plan_quantizes_the_published_matrices(pro):
    assert pro.matrices == 69 * 384 * 3 == 79_488
    assert pro.groups["experts"] == 69 * 384 * 3 * 2048 * 6144
    assert sum(pro.groups.values()) == pytest.approx(1.02e12, rel=0.005)


def test_the_pro_plan_exports_the_published_bytes(pro):
    assert pro.export["U8"] == 531_351_207_936
    assert pro.export["F8_E4M3"] == 13_378_781_184
    # The router is F32 here (69 x 384 x 6144), as in the base; the other F32 elements are the published 857,088.
    assert pro.export["F32"] == 4 * (857_088 + 69 * 384 * 6144)
    assert sum(pro.export.values()) == pytest.approx(570e9, rel=0.02)  # the release, which also holds the drafter


def test_rows_and_groups_account_for_every_parameter(pro):
    assert sum(row[3] for row in pro.quantized) == sum(pro.groups.values())


@pytest.mark.parametrize("recipe", ["mimo.yaml", "mimo-flash.yaml"])
def test_the_shipped_recipes_fit_the_cluster_they_name_but_not_half_of_it(recipe):
    loaded = load_recipe(ROOT / "recipes" / recipe)
    refuse_if_too_large(make_plan(loaded), loaded)
    half = load_recipe(ROOT / "recipes" / recipe, [f"cluster.nodes={loaded.cluster.nodes // 2}"])
    with pytest.raises(ValueError, match=r"per rank [\d.]+ GiB needed, 129\.7 GiB available of 141.*try more"):
        refuse_if_too_large(make_plan(half), half)


def test_offloading_moves_masters_and_moments_to_host_memory(pro):
    moved = plan("mimo.yaml", "cluster.offload_optimizer=true", "cluster.host_memory_gib=2000")
    assert sum(pro.memory.values()) == sum(moved.memory.values()) + sum(moved.host_memory.values())
    assert set(moved.host_memory) == {"masters (float32)", "optimizer (adamw)"}


def test_muon_needs_one_moment_less(pro):
    muon = plan("mimo.yaml", "qat.optimizer.name=muon")
    assert 2 * muon.memory["optimizer (muon)"] == pro.memory["optimizer (adamw)"]


@pytest.mark.parametrize("index, message", [('{"weight_map": {"a": ', "not valid JSON"), ("{}", "not a safetensors index")])
def test_a_broken_index_is_one_line(tiny_checkpoint, tmp_path, index, message):
    (tmp_path / "config.json").write_text((tiny_checkpoint / "config.json").read_text())
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=f"model.safetensors.index.json: {message}") as error:
        plan("tiny.yaml", f"model.path={tmp_path}")
    assert "\n" not in str(error.value)


def test_the_command_prints_the_plan_and_writes_nothing(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "qat/train.py", ROOT / "recipes/mimo.yaml", "--plan"], cwd=tmp_path,
                          text=True, capture_output=True, timeout=600)
    assert done.returncode == 3, done.stderr  # no base is named, and its texts are not here
    assert "not ready: model.path: required to train" in done.stdout
    assert "79,488" in done.stdout and "memory per rank" in done.stdout and "531.35" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_too_small_is_exit_code_2_with_one_line():
    said = run_job("qat/train.py", "recipes/qwen3-moe.yaml", "--plan", "cluster.memory_gib=20", expect=2)
    assert [line for line in said.splitlines() if line.startswith("error: does not fit")]


def test_memory_of_one_process_is_the_documented_sum():
    small = plan("tiny.yaml", "model.path=null", "model.released=MiMo-V2-Flash")
    experts, total = small.groups["experts"], sum(small.groups.values())
    assert small.memory["compute weights (bfloat16)"] == 2 * total
    assert small.memory["masters (float32)"] == small.memory["gradients (float32)"] == 4 * experts
    assert small.memory["optimizer (adamw)"] == 8 * experts
    assert small.available is None and small.communication == {} and GIB == 2**30


def test_a_warm_up_as_long_as_the_run_is_said_in_the_plan():
    assert any("10 of 6 steps: the rate ends at 55% of" in note for note in plan("tiny.yaml", "qat.steps=6").notes)
    assert not any("warmup_steps" in note for note in plan("tiny.yaml").notes)


def test_what_methods_keep_is_counted():
    """Per expert weight: three floats where movements are summed; per block of 32, a shift and its two moments."""
    tiny = plan("tiny.yaml", "cluster.memory_gib=1.0", "qat.oscillation.method=reset", "qat.scales.method=learned")
    experts = tiny.groups["experts"]
    assert tiny.memory["oscillation control (reset)"] == 12 * experts
    assert tiny.memory["shifts of block scales"] == 12 * experts // 32


@pytest.mark.parametrize("recipe, ranks, local", [
    ("qwen3-235b.yaml", 64, 2), ("glm-4.5-air.yaml", 32, 4), ("gpt-oss-120b.yaml", 64, 2), ("deepseek-v3.yaml", 128, 2)])
def test_shipped_recipes_divide_their_experts_and_fit(recipe, ranks, local):
    loaded = load_recipe(ROOT / "recipes" / recipe)
    found = make_plan(loaded)
    refuse_if_too_large(found, loaded)
    experts = loaded.quantization.expected_tensors
    assert found.ranks == ranks and sum(row[2] for row in found.quantized[:-1]) == experts
    assert any(f"{local} of " in note and "none on" not in note for note in found.notes)
    assert found.memory["codes (sent, and of the last report)"] * ranks == pytest.approx(2 * found.groups["experts"] * 17 / 32)


def test_ranks_without_experts_are_counted_and_the_nearest_sizes_named():
    found = plan("gpt-oss.yaml", "cluster.nodes=6")
    assert any("1 of 32 experts of a layer on each rank, none on 16 ranks" in note for note in found.notes)
    assert any("32 experts are not divided evenly by 48 ranks" in note and "16 or 32 ranks divide them" in note
               for note in found.notes)
    assert "all-gather of expert weights (bfloat16)" in found.communication


def test_groups_that_do_not_divide_the_experts_are_refused():
    with pytest.raises(ValueError, match="cluster.expert_parallel: 5 does not divide the 128 experts of model.layers.0"):
        plan("qwen3-moe.yaml", "cluster.accelerators_per_node=5", "cluster.expert_parallel=5")


def test_codes_are_gathered_in_17_of_64_bytes():
    found = plan("qwen3-moe.yaml")
    codes, teacher = found.communication["all-gather of expert codes (4.25 bits)"], found.communication[
        "all-gather of the teacher's experts (bfloat16)"]
    assert codes * 64 == pytest.approx(2 * teacher * 17)  # twice: forward and backward pass


def test_the_cheapest_layout_of_so_many_gpus_is_proposed_with_hours_price_and_the_assumption():
    said = run_job("qat/train.py", "recipes/qwen3-235b.yaml", "--plan", "--gpus", 256, "--gpu-memory", 141, "--price", 3)
    assert "proposed: torchrun over 64 GPUs, cluster.sharding=fsdp2 cluster.expert_parallel=8" in said
    assert "GPU-hours" in said and "assumed, not measured: 8% of 989 TFLOP/s" in said
    said = run_job("qat/train.py", "recipes/qwen3-235b.yaml", "--plan", "--gpus", 8, expect=2)
    assert "no layout fits: 8 ranks" in said and "GiB of 73.6 usable" in said


def test_zero3_holds_flat_runs_and_sends_values_and_what_it_cannot_divide_is_refused_with_the_numbers():
    options = ("cluster.sharding=zero3", "qat.warm_start.method=none", "qat.optimizer.name=adamw", "cluster.expert_parallel=1")
    fsdp, zero = plan("qwen3-moe.yaml", "cluster.expert_parallel=1"), plan("qwen3-moe.yaml", *options)
    assert zero.memory["masters (float32)"] == fsdp.memory["masters (float32)"] == 4 * zero.groups["experts"] // zero.ranks
    codes = fsdp.communication["all-gather of expert codes (4.25 bits)"]
    assert zero.communication["all-gather of expert weights (bfloat16)"] == pytest.approx(codes * 64 / 17)
    assert any("61 GB, student and teacher in turn" in line for line in zero.notes)
    with pytest.raises(ValueError, match="on 7 ranks are runs of .* a block of 32 would be cut; expected fsdp2, or 6 ranks"):
        plan("qwen3-moe.yaml", *options, "cluster.accelerators_per_node=7")
    with pytest.raises(ValueError, match="blocks of 32 run along dimension 1"):
        plan("gpt-oss-20b.yaml", *options)
