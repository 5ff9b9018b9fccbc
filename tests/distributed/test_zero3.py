"""DeepSpeed's ZeRO-3 on gloo ranks against one process and FSDP2. Needs the package deepspeed (the extra [deepspeed])."""

import importlib.util
import json

import pytest
import torch
from ranks import on_ranks
from sharded_cases import SHARDED, recipe_beside, train
from tolerance import EXPERT_PARALLEL_MASTERS
from toy_families import write_base

from checkpoint.detect_format import open_source
from training.report import read_metrics

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
COMMON = ("qat.steps=4", "qat.checkpoint_every=2", "qat.health_every=2", "qat.optimizer.max_grad_norm=1e9")
TWO = (*COMMON, "cluster.memory_gib=1.0", "cluster.accelerators_per_node=2")
ZERO = (*TWO, "cluster.sharding=zero3")
CASES = {"plain": (), "f32": ("model.dtype=float32",), "checkpointing": ("qat.gradient_checkpointing=true",),
         "ema": ("qat.oscillation.method=ema", "qat.oscillation.start=0.0", "qat.average_last=0.5"),
         "clipped": ("qat.optimizer.max_grad_norm=0.05", "model.dtype=float32")}


def assert_close(a: dict, b: dict) -> None:
    for name in a["masters"]:
        assert (a["masters"][name] - b["masters"][name]).abs().max() <= EXPERT_PARALLEL_MASTERS * a["masters"][name].abs().max()
        assert torch.equal(a["rounded"][name], b["rounded"][name]), name


@pytest.fixture(scope="module")
def recipe(text_files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero3")
    write_base(folder / "base", "qwen3", 4)
    return recipe_beside(folder / "base", text_files)


@pytest.fixture(scope="module")
def one(recipe, tmp_path_factory):
    cases = {f"one-{name}": (*COMMON, "qat.gradient_accumulation=2", *extra, "finish") for name, extra in CASES.items()}
    cases["one-four"] = (*COMMON, "qat.gradient_accumulation=8", "model.dtype=float32")
    return on_ranks(1, tmp_path_factory.mktemp("one"), train, recipe, cases, timeout=1800)[0]


@pytest.fixture(scope="module")
def zero(recipe, one, tmp_path_factory):
    cases = {f"zero-{name}": (*ZERO, *extra, "finish") for name, extra in CASES.items()}
    cases |= {"zero-four": (*ZERO, "qat.gradient_accumulation=4", "model.dtype=float32"),
              "offload": (*ZERO, "cluster.offload_optimizer=true", "cluster.offload_weights=true",
                          "cluster.host_memory_gib=4.0"),
              "stopped": (*ZERO, *CASES["ema"], "stop=2"), "stopped/resumed": (*ZERO, *CASES["ema"], "--resume"),
              "fsdp": (*TWO, *SHARDED)}
    return on_ranks(2, tmp_path_factory.mktemp("two"), train, recipe, cases, timeout=1800)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_what_one_process_does(one, zero, case):
    assert zero[0][f"zero-{case}"]["losses"] == pytest.approx(one[f"one-{case}"]["losses"], rel=1e-5)
    assert zero[0][f"zero-{case}"]["norms"] == pytest.approx(one[f"one-{case}"]["norms"], rel=1e-5)
    assert_close(one[f"one-{case}"], zero[0][f"zero-{case}"])


def test_four_micro_steps_train_what_eight_of_one_process_do(one, zero):
    assert_close(one["one-four"], zero[0]["zero-four"])


def test_fsdp2_and_both_ranks_agree(zero):
    assert_close(zero[0]["fsdp"], zero[0]["zero-plain"])
    for case in zero[0]:
        for name, master in zero[0][case]["masters"].items():
            assert torch.equal(master, zero[1][case]["masters"][name])


def test_what_lies_in_host_memory_is_trained_to_the_same_bits(zero):
    for name, master in zero[0]["zero-plain"]["masters"].items():
        assert torch.equal(master, zero[0]["offload"]["masters"][name])


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(zero):
    for kind in ("masters", "rounded"):
        for name, values in zero[0]["zero-ema"][kind].items():
            assert torch.equal(values, zero[0]["stopped/resumed"][kind][name])


def test_the_model_folder_and_the_reports_are_those_of_one_process(recipe, one, zero):
    runs = recipe.parent / "runs"
    a, b = (open_source(runs / f"{n}-f32/qat/model") for n in ("one", "zero"))
    assert a.infos == b.infos and all(torch.equal(a.read(name), b.read(name)) for name in a.infos)
    first, second = (json.loads((runs / f"{n}-f32/qat/summary.json").read_text()) for n in ("one", "zero"))
    for variant in ("bf16", "ptq", "qat"):
        assert first[variant]["kl"] == pytest.approx(second[variant]["kl"], rel=1e-5, abs=1e-9)
    tokens = [[r["tokens"] for r in read_metrics(runs / f"{n}-f32/qat/metrics.jsonl") if r["kind"] == "health"]
              for n in ("one", "zero")]
    assert tokens[0] == tokens[1]
