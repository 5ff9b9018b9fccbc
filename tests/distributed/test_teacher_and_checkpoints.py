"""Training without the original model in memory, checkpoints written meanwhile, and unlucky routings; all on two ranks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from jobs import ENVIRONMENT, ROOT
from ranks import free_port, on_ranks
from sharded_cases import SHARDED, train
from tolerance import EXPERT_PARALLEL_MASTERS
from toy_families import write_base

from checkpoint.detect_format import open_source
from training.checkpoint import complete_checkpoints

COMMON = ("qat.steps=4", "qat.optimizer.max_grad_norm=1e9", "qat.checkpoint_every=2", "model.dtype=float32")
TWO = (*COMMON, *SHARDED, "cluster.accelerators_per_node=2")
EP = (*TWO, "cluster.expert_parallel=2")


def recipe_in(folder: Path, text_files, base: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({
        "name": "t", "seed": 3, "output": str(folder / "runs"), "model": {"path": str(base)},
        "data": {"train": [str(text_files["train"])], "sequence_length": 64, "eval_sequences": 5,
                 "heldout": [str(text_files["alpha.heldout"])]},
        "qat": {"steps": 4, "batch_size": 2, "log_every": 1, "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2}}}))
    return path


def assert_close(a: dict, b: dict) -> None:
    for name in a["masters"]:
        assert (a["masters"][name] - b["masters"][name]).abs().max() <= EXPERT_PARALLEL_MASTERS * a["masters"][name].abs().max()
        assert torch.equal(a["rounded"][name], b["rounded"][name]), name


@pytest.fixture(scope="module")
def recipe(tiny_checkpoint, text_files, tmp_path_factory):
    return recipe_in(tmp_path_factory.mktemp("teacher"), text_files, tiny_checkpoint)


@pytest.fixture(scope="module")
def runs(recipe, tmp_path_factory):
    disk = "qat.teacher=disk"
    one = on_ranks(1, tmp_path_factory.mktemp("1"), train, recipe, {
        "one": (*COMMON, "qat.gradient_accumulation=2", "finish"),
        "one-disk": (*COMMON, "qat.gradient_accumulation=2", "qat.heldout_every=2", disk, "finish"),
        "one-accumulated": (*COMMON, "qat.gradient_accumulation=8")})[0]
    two = on_ranks(2, tmp_path_factory.mktemp("2"), train, recipe, {
        "two": (*TWO, "checkpoint.async=true"), "disk": (*TWO, disk, "finish"), "ep-disk": (*EP, disk),
        "stopped": (*TWO, disk, "checkpoint.async=true", "stop=2"), "stopped/resumed": (*TWO, disk, "--resume"),
        "async": (*TWO, "checkpoint.async=true", "stop=2"), "async/resumed": (*TWO, "--resume"),
        "accumulated": (*TWO, "qat.gradient_accumulation=4"), "ep-accumulated": (*EP, "qat.gradient_accumulation=4")},
        timeout=900)[0]
    return one | two


@pytest.mark.parametrize("case", ["one-disk", "disk", "ep-disk"])
def test_cached_states_teach_what_the_model_does(runs, case):
    assert runs[case]["losses"] == pytest.approx(runs["one"]["losses"], rel=1e-4)
    assert_close(runs["one"], runs[case])


def test_the_evaluation_with_cached_states_is_that_of_the_model(recipe, runs):
    import json

    first, second = (json.loads((recipe.parent / f"runs/{n}/qat/summary.json").read_text()) for n in ("one", "disk"))
    for variant in ("bf16", "ptq", "qat"):
        assert first[variant]["kl"] == pytest.approx(second[variant]["kl"], rel=1e-3, abs=1e-9)


def test_a_resumed_run_takes_the_states_that_are_there_and_ends_the_same(recipe, runs):
    for kind in ("masters", "rounded"):
        for name in runs["disk"][kind]:
            assert torch.equal(runs["disk"][kind][name], runs["stopped/resumed"][kind][name])
    assert len(list((recipe.parent / "runs/stopped/qat/teacher").iterdir())) == 1


def test_a_checkpoint_written_meanwhile_is_the_one_of_its_step(recipe, runs):
    for kind in ("masters", "rounded"):
        for name in runs["two"][kind]:
            assert torch.equal(runs["two"][kind][name], runs["async/resumed"][kind][name])


@pytest.mark.parametrize("case", ["accumulated", "ep-accumulated"])
def test_four_micro_steps_on_two_ranks_are_eight_of_one_process(runs, case):
    assert_close(runs["one-accumulated"], runs[case])


@pytest.mark.parametrize("family", ["gpt_oss", "mimo"])
def test_a_rank_whose_experts_no_token_reaches_trains_what_one_process_does(family, text_files, tmp_path):
    """The router's biases send every token to the first two of four experts, which are the first rank's."""
    from safetensors.torch import load_file, save_file

    base = write_base(tmp_path / "base", family, 4)
    tensors = load_file(base / "model.safetensors")
    biases = [n for n in tensors if n.endswith(("router.bias", "e_score_correction_bias"))]
    assert biases
    for name in biases:
        tensors[name][2:] = -1e3
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    recipe = recipe_in(tmp_path, text_files, base)
    one = on_ranks(1, tmp_path / "1", train, recipe, {"one": (*COMMON, "qat.gradient_accumulation=2")})[0]["one"]
    two = on_ranks(2, tmp_path / "2", train, recipe, {"ep": EP, "fsdp": TWO})[0]
    for case in ("ep", "fsdp"):
        assert_close(one, two[case])
    original = open_source(base)
    assert original.infos


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before_whole(recipe, tmp_path):
    """Both ranks write slowly, and are killed in the middle of the second checkpoint, while training goes on."""
    script = tmp_path / "slow.py"
    script.write_text(f"""
import sys, time
sys.path[0] = {str(ROOT)!r}
from training.sharding import checkpoint
from qat import trainer
from recipes.load import load_recipe
original = checkpoint.state_writer
def slow(*arguments, **options):
    write = original(*arguments, **options)
    def writing(folder, group=None):
        write(folder, group)
        if "step-00000004" in str(folder):
            print("writing", flush=True)
            time.sleep(600)
    return writing
checkpoint.state_writer = slow
sys.exit(trainer.run(load_recipe(sys.argv[1], sys.argv[2:]), resume="--resume" in sys.argv, max_steps=None))
""")
    options = (*TWO, "name=killed", "qat.steps=500", "checkpoint.async=true")
    torchrun = [Path(sys.executable).parent / "torchrun", "--nproc-per-node", "2", "--master-port", str(free_port())]
    process = subprocess.Popen([*torchrun, script, str(recipe), *options], cwd=ROOT, env=ENVIRONMENT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    seen, writing = [], False
    for line in process.stdout:
        seen.append(line)
        writing |= "writing" in line
        if writing and line.startswith("step 5/"):
            break
    assert writing, "".join(seen)
    for child in subprocess.run(["pgrep", "-P", str(process.pid)], text=True, capture_output=True).stdout.split():
        os.kill(int(child), signal.SIGKILL)
    process.communicate(timeout=600)
    time.sleep(0.5)
    folder = recipe.parent / "runs/killed/qat/checkpoints"
    assert [p.name for p in complete_checkpoints(folder)] == ["step-00000002"]
    resumed = on_ranks(2, tmp_path / "2", train, recipe, {"killed/resumed": (*options, "--resume", "load")})[0]
    assert resumed["killed/resumed"]["step"] == 2
