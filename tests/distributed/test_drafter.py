"""The drafter on a target that no rank holds whole: data, features, training, measuring and results are a whole target's."""

import pytest
import torch
import yaml
from ranks import on_ranks
from tiny_models import draft_recipe_text
from toy_families import write_base

CLUSTER = ("cluster.memory_gib=1.0", "cluster.sharding=fsdp2", "cluster.accelerators_per_node=2")
EXACT = ("dflash.steps=4", "dflash.optimizer.max_grad_norm=1e9", "dflash.features=online", "dflash.checkpoint_every=2")


def drafters(rank: int, recipe, cases: dict) -> dict:
    """Trains every case {run's name: overrides}; "stop=N" trains N steps, "--resume" goes on, "finish" measures and writes."""
    import gc
    import json
    import os

    from dflash_train import trainer as module
    from recipes.load import load_recipe

    results = {}
    for name, overrides in cases.items():
        words = {o for o in overrides if "=" not in o or o.startswith("stop=")}
        stop = next((int(o.removeprefix("stop=")) for o in words if o.startswith("stop=")), None)
        loaded = load_recipe(recipe, [f"name={name.partition('/')[0]}", *(o for o in overrides if o not in words)])
        kind = module.Trainer
        if loaded.dflash.shard_drafter and int(os.environ["WORLD_SIZE"]) > 1:
            from dflash_train.sharded import ShardedDraftTrainer as kind
        job = kind(loaded, resume="--resume" in words)
        losses, record = [], job.record
        job.record = lambda values, *rest, losses=losses, record=record: (losses.append(values["loss"]), record(values, *rest))
        job.train(stop)
        whole = job.whole_drafter()
        results[name] = {"losses": losses, "weights": {n: p.detach().clone() for n, p in whole.named_parameters()},
                         "target": type(job.target).__name__}
        if "finish" in words:
            job.finish()
            if job.main:
                summary = json.loads((job.folder / "summary.json").read_text())
                results[name]["acceptance"] = summary["acceptance"]
        if job.main:
            job.held.__exit__(None, None, None)
        del job, whole
        gc.collect()
    return results


def as_two_ranks(rank: int, recipe, overrides: tuple, steps: int) -> dict:
    """One process that draws the rows and anchors of two ranks, in turn, and adds up their losses."""
    from dflash_train import trainer as module
    from recipes.load import load_recipe

    class Two(module.Trainer):
        def update(self, batches):
            parts = []
            for index in (0, 1):
                self.accelerator = Seen(self.real, index)
                parts.append(self._loss(next(self.batches())))
            self.accelerator = self.real
            anchors = sum(sums["anchors"] for _, sums in parts)
            sum(loss * (sums["anchors"] / anchors) for loss, sums in parts).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            self.state.step += 1
            return float(sum(sums["loss"] for _, sums in parts) / anchors)

    class Seen:
        def __init__(self, real, index):
            self.device, self.process_index, self.num_processes = real.device, index, 2

    job = Two(load_recipe(recipe, list(overrides)), resume=False)
    job.real = job.accelerator
    losses = [job.update(None) for _ in range(steps)]
    return {"losses": losses, "weights": {n: p.detach().clone() for n, p in job.drafter.named_parameters()}}


@pytest.fixture(scope="module")
def recipe(tiny_checkpoint, prompt_files, text_files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafters")
    text = draft_recipe_text(tiny_checkpoint, prompt_files, text_files, folder / "runs")
    text["dflash"] |= {"steps": 4, "anchors": 12}
    text["dflash"]["regenerate"] |= {"max_new_tokens": 16}
    text["dflash"]["acceptance"] |= {"max_new_tokens": 12, "timed_prompts": 1, "prompts_per_group": 2}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(text))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def runs(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    ep = (*CLUSTER, "cluster.expert_parallel=2")
    return on_ranks(2, out, drafters, recipe, {
        "whole": EXACT, "divided": (*EXACT, *CLUSTER, "finish"), "ep": (*EXACT, *ep),
        "own": (*EXACT, *CLUSTER, "dflash.shard_drafter=true", "finish"),
        "own-adamw": (*EXACT, *CLUSTER, "dflash.shard_drafter=true", "dflash.optimizer.name=adamw"),
        "whole-adamw": (*EXACT, "dflash.optimizer.name=adamw"),
        "stopped": (*EXACT, *CLUSTER, "dflash.shard_drafter=true", "stop=2"),
        "stopped/resumed": (*EXACT, *CLUSTER, "dflash.shard_drafter=true", "--resume"),
        "disk": (*EXACT, *CLUSTER, "dflash.features=disk"), "markov": (*EXACT, *CLUSTER, "drafter.markov_rank=8",
                                                                      "dflash.shard_drafter=true"),
        "whole-markov": (*EXACT, "drafter.markov_rank=8"),
    }, timeout=900)


def assert_equal(a: dict, b: dict) -> None:
    assert a["losses"] == b["losses"]
    for name, weight in a["weights"].items():
        assert torch.equal(weight, b["weights"][name]), name


def assert_close(a: dict, b: dict) -> None:
    assert a["losses"] == pytest.approx(b["losses"], rel=1e-4)
    for name, weight in a["weights"].items():
        assert (weight - b["weights"][name]).norm() <= 2e-3 * weight.norm() + 1e-6, name


def test_a_divided_target_teaches_what_a_whole_one_does_bit_for_bit(runs):
    assert [r["divided"]["target"] for r in runs] == ["ShardedTarget"] * 2 and runs[0]["whole"]["target"] == "Target"
    assert_equal(runs[0]["whole"], runs[0]["divided"])


@pytest.mark.parametrize("optimizer", ["", "-adamw", "-markov"])
def test_a_divided_drafter_is_trained_as_a_whole_one_bit_for_bit(runs, optimizer):
    """Muon sees whole matrices, whichever rank has their rows."""
    own = {"": "own", "-adamw": "own-adamw", "-markov": "markov"}[optimizer]
    assert_equal(runs[0][f"whole{optimizer}"], runs[0][own])


def test_all_ranks_hold_the_same_drafter(runs):
    for case in runs[0]:
        assert_equal(runs[0][case], runs[1][case])


def test_expert_parallelism_and_cached_features_agree_within_rounding(runs):
    assert_close(runs[0]["divided"], runs[0]["ep"])
    assert runs[0]["disk"]["losses"] == pytest.approx(runs[0]["divided"]["losses"], rel=0.02)  # features in bf16


def test_a_resumed_divided_drafter_is_the_uninterrupted_one(runs):
    assert runs[0]["stopped/resumed"]["losses"] == runs[0]["own"]["losses"][2:]
    for name, weight in runs[0]["own"]["weights"].items():
        assert torch.equal(weight, runs[0]["stopped/resumed"]["weights"][name]), name


def test_what_is_written_and_measured_is_the_same(runs, recipe):
    from modeling.drafter import load_drafter

    a, b = (load_drafter(recipe.parent / f"runs/{name}/dflash/model") for name in ("divided", "own"))
    assert all(torch.equal(p, dict(b.named_parameters())[n]) for n, p in a.named_parameters())
    assert runs[0]["divided"]["acceptance"] == runs[0]["own"]["acceptance"]


def test_two_ranks_train_what_one_process_does_with_their_anchors(runs, recipe, tmp_path):
    one = on_ranks(1, tmp_path / "one", as_two_ranks, recipe, ("name=one", *EXACT), 4)[0]
    assert_close(one, runs[0]["divided"])


@pytest.mark.parametrize("family", ["qwen3", "gpt_oss"])
def test_other_families_targets_are_divided_too(family, recipe, tmp_path):
    base = write_base(tmp_path / "base", family, 4)
    more = (f"model.path={base}", "dflash.steps=2")
    found = on_ranks(2, tmp_path / "2", drafters, recipe, {
        f"{family}-whole": (*EXACT, *more), f"{family}-ep": (*EXACT, *more, *CLUSTER, "cluster.expert_parallel=2"),
        f"{family}-divided": (*EXACT, *more, *CLUSTER)}, timeout=600)[0]
    assert_equal(found[f"{family}-whole"], found[f"{family}-divided"])
    assert_close(found[f"{family}-whole"], found[f"{family}-ep"])
