"""The drafter's job as a user runs it, in processes that are killed and misled."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from jobs import Job, run_alone, run_job
from safetensors.torch import load_file, save_file
from tiny_models import draft_recipe_text, write_tokenizer

from modeling.drafter import load_drafter
from recipes.load import load_recipe
from training.report import CLOCK_KEYS, read_metrics

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "dflash_train/train.py"


def folder(recipe: Path) -> Path:
    return recipe.parent / "runs" / "t" / "dflash"


def computed(recipe: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in CLOCK_KEYS} for r in read_metrics(folder(recipe) / "metrics.jsonl")]


@pytest.fixture(scope="module")
def uninterrupted(tiny_checkpoint, prompt_files, text_files, tmp_path_factory):
    path = tmp_path_factory.mktemp("uninterrupted") / "draft.yaml"
    path.write_text(yaml.safe_dump(draft_recipe_text(tiny_checkpoint, prompt_files, text_files, path.parent / "runs")))
    return path, run_alone(SCRIPT, path)


def test_a_run_leaves_drafter_summary_metrics_pictures_and_provenance(uninterrupted):
    path, output = uninterrupted
    run = folder(path)
    assert "acceptance length" in output and "features of layers [0, 1, 2]" in output
    summary = json.loads((run / "summary.json").read_text())
    assert summary["acceptance"].keys() == summary["speedup"].keys() == {"alpha", "beta"}
    for row in summary["acceptance"].values():
        assert {"task_t0", "open_t1", "lookup_task_t0", "lookup_open_t1", "distinct_8gram"} <= row.keys()
        assert all(1 <= row[k] <= 8 for k in ("task_t0", "open_t1", "lookup_task_t0", "lookup_open_t1"))
    decoded = summary["detail"]["alpha"]["task_t0"]["decoded"]
    assert decoded["same_text"] == 1.0
    assert summary["target"]["kind"] == "ptq" and summary["steps"] == 12 and summary["seconds"] > 0
    for picture in ("curves.png", "acceptance.png"):
        assert (run / picture).read_bytes()[:4] == b"\x89PNG"
    assert [r["step"] for r in computed(path)] == list(range(1, 13))
    losses = [r["loss"] for r in computed(path)]
    assert sum(losses[-3:]) < sum(losses[:3])
    load_drafter(run / "model")


def test_killed_at_random_moments_and_resumed_equals_uninterrupted(uninterrupted, draft_recipe):
    rng = random.Random()
    for _ in range(2):
        process = Job(SCRIPT, draft_recipe, "--resume")
        delay = rng.random() * 0.5
        for line in process.stdout:
            if line.startswith("step ") and "loss" in line:
                time.sleep(delay)
                process.send_signal(signal.SIGKILL)
                break
        process.communicate()
        print(f"killed {delay:.3f} s after the first step")
    run_job(SCRIPT, draft_recipe, "--resume")
    left, right = (load_file(folder(p) / "model" / "model.safetensors") for p in (uninterrupted[0], draft_recipe))
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
    assert computed(uninterrupted[0]) == computed(draft_recipe)
    a, b = (json.loads((folder(p) / "summary.json").read_text())["acceptance"] for p in (uninterrupted[0], draft_recipe))
    assert a == b


def test_a_second_run_sets_the_first_aside_and_keeps_its_answers(uninterrupted, draft_recipe):
    run_job(SCRIPT, draft_recipe, "--max-steps", 2)
    output = run_job(SCRIPT, draft_recipe, "dflash.acceptance.timed_prompts=0")
    assert "set aside" in output and "the target answers" not in output
    assert (folder(draft_recipe).with_name("dflash.1") / "checkpoints" / "step-00000002").is_dir()


def test_sigterm_saves_and_says_how_to_go_on(draft_recipe):
    process = Job(SCRIPT, draft_recipe, "dflash.steps=5000")
    for line in process.stdout:
        if line.startswith("step ") and "loss" in line:
            process.send_signal(signal.SIGTERM)
            break
    output = process.stdout.read()
    assert process.wait() == 128 + signal.SIGTERM and "--resume continues" in output
    assert list((folder(draft_recipe) / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_two_processes_train_one_drafter(draft_recipe):
    run_alone("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT, draft_recipe,
              "dflash.features=online", "dflash.steps=3", "dflash.batch_size=1", "dflash.acceptance.timed_prompts=0")
    assert len(computed(draft_recipe)) == 3 and (folder(draft_recipe) / "summary.json").exists()


def test_a_qwen3_moe_target_trains_a_drafter_through_the_same_sections(draft_recipe, tmp_path):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=264, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2, eos_token_id=0))
    model.save_pretrained(tmp_path / "qwen")
    write_tokenizer(tmp_path / "qwen")
    output = run_job(SCRIPT, draft_recipe, f"model.path={tmp_path / 'qwen'}", "dflash.steps=3", "dflash.features=online")
    assert "acceptance length" in output
    summary = json.loads((folder(draft_recipe) / "summary.json").read_text())
    assert summary["target"]["model_type"] == "qwen3_moe"
    assert summary["detail"]["alpha"]["task_t0"]["decoded"]["same_text"] == 1.0


MISTAKES = {
    "dflash.loss.decay=3": "did you mean dflash.loss.decay_gamma",
    "drafter.mask_token=999": "drafter.mask_token: 999, expected an id from 0 to 263",
    "dflash.acceptance.max_new_tokens=250": "are more than the target's 256 positions",
    "drafter.num_key_value_heads=3": "drafter: num_attention_heads=4 is not a multiple",
    "drafter.target_layer_ids=[0, 7]": "drafter.target_layer_ids: layer 7, but the target has layers 0 to 2",
    "dflash.target=qat": "run qat/train.py with this recipe first",
    "dflash.regenerate.prompts=[nowhere/*.jsonl]": "dflash.regenerate.prompts: 'nowhere/*.jsonl' matches no file",
    "dflash.batch_size=5000": "fewer than one batch of dflash.batch_size=5000",
    "dflash.acceptance.prompts=[nowhere.jsonl]": "dflash.acceptance.prompts: 'nowhere.jsonl' matches no file",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_mistakes_are_one_line(draft_recipe, override):
    output = run_job(SCRIPT, draft_recipe, override, expect=2)
    assert MISTAKES[override] in output and "Traceback" not in output
    assert "  loss " not in output  # told before training


def test_a_run_that_cannot_start_leaves_the_earlier_one_where_it_is(draft_recipe):
    run_job(SCRIPT, draft_recipe, "--max-steps", 2)
    run_job(SCRIPT, draft_recipe, "dflash.batch_size=5000", expect=2)
    assert "resuming" in run_job(SCRIPT, draft_recipe, "--resume", "--max-steps", 3)
    assert not folder(draft_recipe).with_name("dflash.1").exists()


@pytest.mark.parametrize("key", ["dflash.acceptance.prompts", "dflash.regenerate.prompts"])
def test_files_without_a_prompt_are_refused_by_key(key, draft_recipe, tmp_path, loaded):
    from dflash_train import acceptance, answers

    (tmp_path / "empty.jsonl").write_text("")
    recipe = load_recipe(draft_recipe, [f"{key}=[{tmp_path / 'empty.jsonl'}]"])
    with pytest.raises(ValueError, match=f"{key}: .*empty.jsonl: no prompt there"):
        if "acceptance" in key:
            acceptance.groups(recipe, loaded[1])
        else:
            answers.generate_answers(recipe, loaded[1], tmp_path / "answers.jsonl")


def test_a_recipe_without_a_drafter_says_so(tiny_recipe):
    assert "drafter: the recipe has no such section" in run_job(SCRIPT, tiny_recipe, expect=2)


def test_regenerate_alone_writes_what_training_then_uses(draft_recipe):
    output = run_job("dflash_train/regenerate.py", draft_recipe)
    assert "written:" in output
    assert "the target answers" not in run_job(SCRIPT, draft_recipe, "--max-steps", 1)


def test_non_finite_gradients_stop_before_the_update_and_name_the_tensor(loaded):
    from dflash_train.trainer import Trainer
    from training.run import NonFinite

    trainer = Trainer(loaded[0], resume=False)
    with torch.no_grad():
        trainer.drafter.layers[0].mlp.up_proj.weight[3, 5] = torch.nan
    before = trainer.drafter.fc.weight.detach().clone()
    with pytest.raises(NonFinite, match="step 1: loss nan.*gradient of .*not finite; stopped before the update, no checkpoint"):
        trainer.update(iter([[0, 1]]))
    assert torch.equal(trainer.drafter.fc.weight.detach(), before)
    trainer.close()


def test_a_run_is_not_resumed_on_another_target(draft_recipe, tiny_checkpoint, tmp_path):
    from dflash_train.trainer import Trainer

    shutil.copytree(tiny_checkpoint, tmp_path / "target")
    recipe = load_recipe(draft_recipe, [f"model.path={tmp_path / 'target'}"])

    def train(steps, resume):
        trainer = Trainer(recipe, resume=resume)
        trainer.train(steps)
        trainer.close()

    train(1, False)
    train(2, True)
    weights = tmp_path / "target" / "model.safetensors"
    save_file({n: t + 1 for n, t in load_file(weights).items()}, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"step-00000002: trained on other target than now [^\n]*$"):
        train(3, True)
    train(1, False)


def test_the_plan_of_the_published_drafter_needs_no_weights():
    output = run_job(SCRIPT, ROOT / "recipes/mimo.yaml", "--plan", expect=3)
    for words in ("5,536,632,576", "[0, 15, 31, 47, 69]", "5,505,024", "not causal in the block",
                  "target, divided (bfloat16)"):
        assert words in output.replace("\n", " ").replace("block  8", "block 8"), words


@pytest.mark.parametrize("override, largest", [("dflash.batch_size=64", "activations"),
                                               ("cluster.sharding=ddp", "target, whole (bfloat16)")])
def test_a_plan_that_cannot_fit_says_what_is_too_large(override, largest):
    output = run_job(SCRIPT, ROOT / "recipes/mimo.yaml", "--plan", override, expect=2)
    assert "a rank needs" in output and f"the largest part is {largest}" in output


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_counts_the_target_that_the_job_loads(draft_recipe, loaded, dtype):
    from dflash_train.plan import make_plan

    cluster = "cluster={nodes: 2, accelerators_per_node: 4, memory_gib: 1, sharding: ddp}"
    plan = make_plan(load_recipe(draft_recipe, [f"model.dtype={dtype}", cluster]))
    parameters = sum(p.numel() for p in loaded[1].model.parameters())
    assert plan.memory[f"target, whole ({dtype})"] == parameters * getattr(torch, dtype).itemsize


@pytest.mark.parametrize("layers", [1, 2])
def test_the_plan_tells_of_layers_that_vllm_cannot_group(draft_recipe, layers):
    from dflash_train.plan import make_plan

    notes = make_plan(load_recipe(draft_recipe, [f"drafter.num_hidden_layers={layers}"])).notes
    assert any("vLLM does not start" in note and "at most 1 layers" in note for note in notes) == (layers == 2)


def test_the_plan_takes_a_dense_target_as_training_does(draft_recipe, tmp_path):
    from transformers import Qwen3Config

    from dflash_train.plan import make_plan

    Qwen3Config(vocab_size=264, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, head_dim=16, architectures=["Qwen3ForCausalLM"]).save_pretrained(tmp_path / "dense")
    options = [f"model.path={tmp_path / 'dense'}"]
    assert make_plan(load_recipe(draft_recipe, [*options, "dflash.target=base"])).target_layers == [0, 1, 2]
    with pytest.raises(ValueError, match="expert"):
        make_plan(load_recipe(draft_recipe, [*options, "dflash.target=ptq"]))
