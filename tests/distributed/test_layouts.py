"""Every layout and family on gloo ranks against one process, and runs that are killed at any moment.

What `tests/training/sharding` shows in seconds for one family and two ranks, here for Qwen3-MoE, Mixtral, gpt-oss and MiMo-V2,
and for four ranks: experts divided by expert-parallel groups and by FSDP at once, replicas, ranks without experts.
"""

import os
import random
import time
from pathlib import Path

import pytest
import torch
from ranks import begin, on_ranks
from sharded_cases import SHARDED, recipe_beside, train
from tolerance import EXPERT_PARALLEL_MASTERS
from toy_families import FAMILIES, write_base

from checkpoint.detect_format import open_source
from checkpoint.load import load_model
from mxfp4 import fake_quantize

COMMON = ("qat.steps=3", "qat.optimizer.max_grad_norm=1e9", "qat.checkpoint_every=1000")


@pytest.fixture(scope="module")
def recipe_of(text_files, tmp_path_factory):
    """(family, experts) -> recipe of a base of random weights, whose first experts no token is sent to by four rows."""
    def make(family: str, experts: int = 4) -> Path:
        folder = tmp_path_factory.mktemp(f"{family}-{experts}")
        write_base(folder / "base", family, experts)
        return recipe_beside(folder / "base", text_files)
    return make


def assert_equal(a: dict, b: dict) -> None:
    assert a["losses"] == b["losses"]
    for kind in ("masters", "rounded"):
        for name in a[kind]:
            assert torch.equal(a[kind][name], b[kind][name]), (kind, name)


def assert_close(a: dict, b: dict) -> None:
    for name in a["masters"]:
        assert (a["masters"][name] - b["masters"][name]).abs().max() <= EXPERT_PARALLEL_MASTERS * a["masters"][name].abs().max()
        assert torch.equal(a["rounded"][name], b["rounded"][name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_on_two_ranks_trains_what_one_process_does(recipe_of, family, tmp_path):
    recipe = recipe_of(family)
    two = (*COMMON, *SHARDED, "cluster.accelerators_per_node=2")
    one = on_ranks(1, tmp_path / "1", train, recipe, {
        "one": (*COMMON, "qat.gradient_accumulation=2", "finish"), "one-f32": (*COMMON, "qat.gradient_accumulation=2",
                                                                              "model.dtype=float32")})[0]
    both = on_ranks(2, tmp_path / "2", train, recipe, {
        "two": (*two, "finish"), "ep": (*two, "cluster.expert_parallel=2", "model.dtype=float32", "finish")})[0]
    assert_equal(one["one"], both["two"])
    assert_close(one["one-f32"], both["ep"])
    runs = recipe.parent / "runs"
    a, b = (open_source(runs / f"{name}/qat/model") for name in ("one", "two"))
    assert a.infos == b.infos and all(torch.equal(a.read(name), b.read(name)) for name in a.infos)
    model = load_model(runs / "ep/qat/model", dtype=torch.float32)
    for name, weight in model.named_parameters():
        if name in both["ep"]["rounded"]:
            assert torch.equal(weight.data, both["ep"]["rounded"][name]), name


def test_four_ranks_in_every_layout_train_what_one_process_does(recipe_of, tmp_path):
    """Experts divided by expert parallelism and by FSDP at once; replicas of shards; replicas of expert-parallel groups."""
    recipe = recipe_of("qwen3", 8)
    four = (*COMMON, *SHARDED, "cluster.accelerators_per_node=4")
    f32 = "model.dtype=float32"
    one = on_ranks(1, tmp_path / "1", train, recipe, {"one": (*COMMON, "qat.gradient_accumulation=4"),
                                                      "one-f32": (*COMMON, "qat.gradient_accumulation=4", f32)})[0]
    found = on_ranks(4, tmp_path / "4", train, recipe, {
        "fsdp": four, "replicas": (*four, "cluster.replicas=2"), "ep2": (*four, "cluster.expert_parallel=2", f32),
        "ep4": (*four, "cluster.expert_parallel=4", f32),
        "ep2x2": (*four, "cluster.expert_parallel=2", "cluster.replicas=2", f32),
        "ep2/as-fsdp": (*four, f32, "--resume", "load"),
        "ep2/as-ep4": (*four, "cluster.expert_parallel=4", f32, "--resume", "load"),
    }, timeout=600)[0]
    assert_close(one["one"], found["fsdp"])  # four gradients are summed two by two
    assert_close(one["one"], found["replicas"])
    for case in ("ep2", "ep4", "ep2x2"):
        assert_close(one["one-f32"], found[case])
    for case in ("ep2/as-fsdp", "ep2/as-ep4"):
        for name in found["ep2"]["masters"]:
            assert torch.equal(found["ep2"]["masters"][name], found[case]["masters"][name])


@pytest.mark.parametrize("family, experts, ranks", [("qwen3", 3, 2), ("mimo", 2, 3)])
def test_ranks_with_fewer_experts_or_none_train_what_one_process_does(recipe_of, tmp_path, family, experts, ranks):
    recipe = recipe_of(family, experts)
    f32 = "model.dtype=float32"
    one = on_ranks(1, tmp_path / "1", train, recipe, {"one": (*COMMON, f"qat.gradient_accumulation={ranks}", f32)})[0]
    found = on_ranks(ranks, tmp_path / "n", train, recipe, {
        "n": (*COMMON, *SHARDED, f32, "stop=2"), "n/resumed": (*COMMON, *SHARDED, f32, "--resume", "finish")})[0]
    assert_close(one["one"], found["n/resumed"])
    model = load_model(recipe.parent / "runs/n/qat/model", dtype=torch.float32)
    for name, weight in model.named_parameters():
        if name in one["one"]["rounded"]:
            assert torch.equal(weight.data, fake_quantize(weight.data)), name


KILLS = int(os.environ.get("FP4_TEST_KILLS", "6"))


def run_job(rank: int, recipe: Path, options: list[str]) -> int:
    from qat.trainer import run
    from recipes.load import load_recipe

    return run(load_recipe(recipe, options), resume=True, max_steps=None)


def test_a_run_killed_at_random_moments_ends_as_the_uninterrupted_one(recipe_of, tmp_path):
    """SIGKILL of one rank, the other follows, as launchers do; every launch goes on from the newest whole checkpoint. (What
    torchrun itself does about a killed rank: `test_operations`.)"""
    recipe = recipe_of("mimo")
    options = ["qat.steps=60", "qat.checkpoint_every=1", *SHARDED, "cluster.accelerators_per_node=2"]
    on_ranks(2, tmp_path / "whole", run_job, recipe, ["name=whole", *options])
    rng, steps = random.Random(), recipe.parent / "runs/killed/qat/metrics.jsonl"
    for kill in range(KILLS):
        processes = begin(2, tmp_path / f"{kill}", run_job, recipe, ["name=killed", *options])
        seen, to_see, changed = 0, rng.randint(1, 3), None
        while seen < to_see and all(p.is_alive() for p in processes):  # a resumed run trims its metrics; then a line a step
            now = steps.stat().st_mtime_ns if steps.exists() else None
            seen, changed = seen + (now != changed and changed is not None), now
            time.sleep(0.005)
        time.sleep(rng.random() * 0.3)
        rng.shuffle(processes)
        for process in processes:
            process.kill()
            time.sleep(0.05)
        for process in processes:
            process.join()
        assert not (steps.parent / "summary.json").exists(), "the run ended before it was killed"
    on_ranks(2, tmp_path / "last", run_job, recipe, ["name=killed", *options])
    a, b = (open_source(recipe.parent / f"runs/{name}/qat/model") for name in ("whole", "killed"))
    assert all(torch.equal(a.read(name), b.read(name)) for name in a.infos)
