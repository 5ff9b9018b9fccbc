"""Training on two gloo ranks against one process: the same masters, codes and files.

One process with twice the gradient accumulation sees the batches that two ranks see in one update; halving and doubling are
exact, so what FSDP2 does differently is nothing, bit for bit, as long as gradients are not clipped (the norm's sum has another
order). Under expert parallelism the experts multiply other groups of rows: float32 results agree within tests/tolerance.py.

Most methods are left to `make test-distributed` (FP4_TEST_SHARDING=all).
"""

import json
import os

import pytest
import torch
from ranks import on_ranks
from sharded_cases import SHARDED, train
from tolerance import EXPERT_PARALLEL_MASTERS

from checkpoint.detect_format import open_source
from training.report import read_metrics

COMMON = ("qat.steps=4", "qat.optimizer.max_grad_norm=1e9", "qat.checkpoint_every=2", "qat.health_every=2")
TWO = (*COMMON, *SHARDED, "cluster.accelerators_per_node=2")
EXACT = {
    "plain": (), "clip": ("quantization.ste=clip", "qat.average_last=0.5"),
    "gptq": ("qat.warm_start.method=gptq", "qat.warm_start.sequences=8"),
    "all": ("qat.train=all", "model.dtype=float32", "qat.freeze_router=false", "qat.heldout_every=1"),
}
METHODS = {
    "checkpointing": ("qat.gradient_checkpointing=true",), "muon": ("qat.optimizer.name=muon",),
    "ema": ("qat.oscillation.method=ema", "qat.oscillation.start=0.0"),
    "freeze": ("qat.oscillation.method=freeze", "qat.oscillation.start=0.0", "qat.oscillation.freeze_flips=1"),
    "learned": ("qat.scales.method=learned", "qat.warm_start.method=gptq", "qat.warm_start.sequences=8"),
    "soft": ("qat.soft_rounding.method=annealed", "qat.soft_rounding.until=0.5"),
}
RESUMED = [("two-plain", "stopped")]
FINISHED = ["plain"]  # evaluated and written as well
LATE_SOFT = (*TWO, *METHODS["soft"], "qat.soft_rounding.until=0.9")
METHOD_CASES = {"learned": (*TWO, *METHODS["learned"], "stop=2"), "learned/resumed": (*TWO, *METHODS["learned"], "--resume"),
                "soft": (*LATE_SOFT, "stop=2"), "soft/resumed": (*LATE_SOFT, "--resume"), "soft-whole": LATE_SOFT}
if WITH_METHODS := os.environ.get("FP4_TEST_SHARDING") == "all":
    EXACT |= METHODS
    RESUMED += [("two-learned", "learned"), ("soft-whole", "soft")]
    FINISHED.append("learned")


@pytest.fixture(scope="module")
def recipe(tiny_checkpoint, text_files, tmp_path_factory):
    import yaml

    path = tmp_path_factory.mktemp("sharded") / "recipe.yaml"
    path.write_text(yaml.safe_dump({
        "name": "t", "seed": 3, "output": str(path.parent / "runs"), "model": {"path": str(tiny_checkpoint)},
        "data": {"train": [str(text_files["train"])], "sequence_length": 64, "eval_sequences": 5,
                 "heldout": [str(text_files["alpha.heldout"]), str(text_files["beta.heldout"])]},
        "qat": {"steps": 4, "batch_size": 2, "log_every": 1, "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2}}}))
    return path


@pytest.fixture(scope="module")
def one(recipe, tmp_path_factory):
    cases = {f"one-{name}": (*COMMON, "qat.gradient_accumulation=2", *extra) for name, extra in EXACT.items()}
    for case in FINISHED:
        cases[f"one-{case}"] += ("finish",)
    cases["one-f32"] = (*COMMON, "qat.gradient_accumulation=2", "model.dtype=float32")
    return on_ranks(1, tmp_path_factory.mktemp("one"), train, recipe, cases, timeout=1800)[0]


@pytest.fixture(scope="module")
def two(recipe, one, tmp_path_factory):
    """On both ranks. The names end with what comes after `two-`."""
    cases = {f"two-{name}": (*TWO, *extra) for name, extra in EXACT.items()}
    for case in FINISHED:
        cases[f"two-{case}"] += ("finish",)
    cases |= {"stopped": (*TWO, "stop=2"), "stopped/resumed": (*TWO, "--resume"),
              "ep-f32": (*TWO, "cluster.expert_parallel=2", "model.dtype=float32", "stop=2"),
              "ep-f32/resumed": (*TWO, "cluster.expert_parallel=2", "model.dtype=float32", "--resume", "finish"),
              "ep-f32/shards": (*TWO, "model.dtype=float32", "--resume", "load"),
              "copies": (*TWO, "cluster.replicas=2")}
    if WITH_METHODS:
        cases |= METHOD_CASES
    return on_ranks(2, tmp_path_factory.mktemp("two"), train, recipe, cases, timeout=1800)


def assert_equal(a: dict, b: dict) -> None:
    for kind in ("masters", "rounded"):
        for name in a[kind]:
            assert torch.equal(a[kind][name], b[kind][name]), (kind, name)


@pytest.mark.parametrize("case", EXACT)
def test_two_ranks_train_what_one_process_does_bit_for_bit(one, two, case):
    assert two[0][f"two-{case}"]["losses"] == one[f"one-{case}"]["losses"]
    assert_equal(one[f"one-{case}"], two[0][f"two-{case}"])
    assert two[0][f"two-{case}"]["norms"] == pytest.approx(one[f"one-{case}"]["norms"], rel=1e-6)


def test_all_ranks_hold_the_same_state(two):
    for case in two[0]:
        assert_equal(two[0][case], two[1][case])


def test_replicas_train_what_one_process_does(one, two):
    assert_equal(one["one-plain"], two[0]["copies"])


def test_expert_parallelism_agrees_within_rounding_and_in_every_code(one, two):
    a, b = one["one-f32"], two[0]["ep-f32/resumed"]
    for name in a["masters"]:
        assert (a["masters"][name] - b["masters"][name]).abs().max() <= EXPERT_PARALLEL_MASTERS * a["masters"][name].abs().max()
        assert torch.equal(a["rounded"][name], b["rounded"][name])


@pytest.mark.parametrize("whole, stopped", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(two, whole, stopped):
    assert two[0][f"{stopped}/resumed"]["step"] == 4
    assert_equal(two[0][whole], two[0][f"{stopped}/resumed"])


def test_another_split_of_the_ranks_reads_the_same_masters(two):
    assert_equal(two[0]["ep-f32/resumed"], two[0]["ep-f32/shards"])


def test_one_process_reads_what_two_ranks_wrote(recipe, two, tmp_path):
    loaded = on_ranks(1, tmp_path, train, recipe, {
        f"two-{case}/alone": (*COMMON, *SHARDED, *EXACT[case], "--resume", "load") for case in FINISHED})[0]
    for case in FINISHED:
        assert_equal(two[0][f"two-{case}"], loaded[f"two-{case}/alone"])


@pytest.mark.parametrize("case", FINISHED)
def test_a_gather_carries_codes(two, case):
    """4.25 bits a weight; teacher's gathers are not counted. One gather in the forward and one in the backward pass."""
    for (sent, gathers), master in zip(two[0][f"two-{case}"]["sent"], two[0][f"two-{case}"]["masters"].values(), strict=True):
        assert gathers >= 2 * 4 and sent == gathers * master.numel() // 2 * 17 // 32


def test_the_model_folder_holds_the_tensors_of_one_process(recipe, two):
    runs = recipe.parent / "runs"
    a, b = (open_source(runs / f"{n}-plain" / "qat" / "model") for n in ("one", "two"))
    assert a.infos == b.infos
    for name in a.infos:
        assert torch.equal(a.read(name), b.read(name)), name
    for file in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (runs / f"one-plain/qat/model/{file}").read_text() == (runs / f"two-plain/qat/model/{file}").read_text()
    assert len(list((runs / "two-plain/qat/model").glob("*.safetensors"))) == 2


@pytest.mark.parametrize("case", FINISHED)
def test_evaluation_and_reports_are_those_of_one_process(recipe, two, case):
    first, second = (json.loads((recipe.parent / "runs" / f"{n}-{case}/qat/summary.json").read_text()) for n in ("one", "two"))
    for variant in ("bf16", "ptq", "qat"):
        for key in ("loss", "kl", "top1_agreement"):
            assert first[variant][key] == pytest.approx(second[variant][key], rel=1e-9)
    a, b = (read_metrics(recipe.parent / "runs" / f"{n}-{case}/qat/metrics.jsonl") for n in ("one", "two"))
    assert [r for r in a if r["kind"] == "health"] == [r for r in b if r["kind"] == "health"]
