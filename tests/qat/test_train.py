"""The job as a user runs it: `python qat/train.py recipe …` in processes that are killed, stopped, starved and misled."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from jobs import ENVIRONMENT, ROOT, Job, run_alone, run_job
from safetensors.torch import load_file

from mxfp4 import fake_quantize
from storage.digests import file_digests
from training.checkpoint import complete_checkpoints, seal
from training.report import CLOCK_KEYS, read_metrics
from training.state_files import load_state, save_state

SCRIPT = "qat/train.py"


def folder(recipe: Path) -> Path:
    return recipe.parent / "runs" / "t" / "qat"


def computed(recipe: Path) -> list[dict]:
    """metrics.jsonl without the clock."""
    return [{k: v for k, v in r.items() if k not in CLOCK_KEYS} for r in read_metrics(folder(recipe) / "metrics.jsonl")]


def assert_same_result(a: Path, b: Path) -> None:
    left, right = (load_file(folder(p) / "model" / "model.safetensors") for p in (a, b))
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
    assert computed(a) == computed(b)
    first, second = (json.loads((folder(p) / "summary.json").read_text()) for p in (a, b))
    assert first["qat"] == second["qat"]


@pytest.fixture(scope="module")
def uninterrupted(tiny_checkpoint, text_files, tmp_path_factory):
    """The reference run of the tiny recipe, made once."""
    import yaml

    path = tmp_path_factory.mktemp("uninterrupted") / "recipe.yaml"
    recipe = {
        "name": "t", "seed": 3, "output": str(path.parent / "runs"), "model": {"path": str(tiny_checkpoint)},
        "data": {"train": [str(text_files["train"])], "sequence_length": 64, "eval_sequences": 4,
                 "heldout": [str(text_files["alpha.heldout"]), str(text_files["beta.heldout"])]},
        "qat": {"steps": 12, "batch_size": 2, "checkpoint_every": 4, "log_every": 1, "health_every": 3,
                "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2}},
    }
    path.write_text(yaml.safe_dump(recipe))
    return path, run_alone(SCRIPT, path)


def test_a_run_leaves_model_summary_metrics_curves_and_provenance(uninterrupted, tiny_checkpoint):
    path, output = uninterrupted
    run = folder(path)
    assert "gate_up_proj" in output and "KL gap closed" in output
    summary = json.loads((run / "summary.json").read_text())
    for variant in ("bf16", "ptq", "qat"):
        assert {"loss", "kl", "top1_agreement", "domains"} <= summary[variant].keys()
        assert set(summary[variant]["domains"]) == {"alpha", "beta"}
    assert summary["bf16"]["kl"] == 0 < summary["ptq"]["kl"]
    assert summary["kl_gap_closed"] == 1 - summary["qat"]["kl"] / summary["ptq"]["kl"] > 0
    assert summary["tokens"] == 12 * 2 * 64 and summary["seconds"] > 0
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    environment = json.loads((run / "environment.json").read_text())
    assert {"date", "command", "git_revision", "torch", "cpu"} <= environment.keys()
    assert [r["step"] for r in computed(path) if r["kind"] == "train"] == list(range(1, 13))
    health = [r for r in computed(path) if r["kind"] == "health"]
    assert len(health) == 4 * 4 and all(len(r[k]) == 4 for r in health for k in ("sqnr_db", "flipped", "tokens"))
    per_report = 3 * 2 * 64 * 2  # steps x rows x tokens x top-2
    assert all(sum(r["tokens"]) == per_report for r in health)


def test_only_experts_changed_and_they_lie_on_the_grid(uninterrupted, tiny_checkpoint):
    path, _ = uninterrupted
    before, after = load_file(tiny_checkpoint / "model.safetensors"), load_file(folder(path) / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in after.items():
        if ".experts." in name:
            assert torch.equal(weight, fake_quantize(weight)) and not torch.equal(weight, before[name]), name
        else:
            assert torch.equal(weight, before[name]), name


def test_the_result_folder_reloads_exactly(uninterrupted):
    from checkpoint.load import load_model

    path, _ = uninterrupted
    model = load_model(folder(path) / "model", dtype=torch.bfloat16)
    assert any("experts" in n for n, _ in model.named_parameters())
    saved = load_file(folder(path) / "model" / "model.safetensors")
    expected = torch.stack([saved[f"model.layers.1.mlp.experts.{e}.down_proj.weight"] for e in range(4)])
    assert torch.equal(model.get_parameter("model.layers.1.mlp.experts.down_proj"), expected)


def test_killed_at_random_moments_and_resumed_equals_uninterrupted(uninterrupted, tiny_recipe):
    rng = random.Random()
    for _ in range(2):
        process = Job(SCRIPT, tiny_recipe, "--resume")
        delay = rng.random() * 0.3
        for line in process.stdout:
            if line.startswith("step "):  # the first step of this launch
                time.sleep(delay)
                process.send_signal(signal.SIGKILL)
                break
        process.communicate()
        print(f"killed {delay:.3f} s after the first step")
    run_job(SCRIPT, tiny_recipe, "--resume")
    assert_same_result(uninterrupted[0], tiny_recipe)


def test_max_steps_stops_with_a_checkpoint_and_resume_finishes_the_same_run(uninterrupted, tiny_recipe):
    output = run_job(SCRIPT, tiny_recipe, "--max-steps", 5)
    assert "stopped at --max-steps 5" in output
    assert [p.name for p in complete_checkpoints(folder(tiny_recipe) / "checkpoints")] == ["step-00000004", "step-00000005"]
    assert not (folder(tiny_recipe) / "summary.json").exists()
    assert "at step 5 already, nothing was trained" in run_job(SCRIPT, tiny_recipe, "--resume", "--max-steps", 3)
    assert "at step 5 of 12" in run_job(SCRIPT, tiny_recipe, "--resume")
    assert_same_result(uninterrupted[0], tiny_recipe)


METHODS = {"scales": ["qat.scales.method=learned", "qat.warm_start.method=gptq", "qat.warm_start.sequences=8",
                      "qat.oscillation.method=reset", "qat.oscillation.reset_every=3", "qat.oscillation.start=0.1",
                      "qat.grid_pull.strength=20.0", "qat.loss.gradient=immediate", "qat.loss.hidden_kl=0.5"],
           "soft": ["qat.soft_rounding.method=annealed", "qat.soft_rounding.until=0.8", "qat.heldout_every=5",
                    "qat.heldout_sequences=2"]}


@pytest.mark.parametrize("chosen", METHODS)
def test_a_resumed_run_with_methods_equals_an_uninterrupted_one_and_ends_on_the_grid(tiny_recipe, tmp_path, chosen):
    other = tmp_path / "other" / "recipe.yaml"
    other.parent.mkdir()
    other.write_text(tiny_recipe.read_text())
    whole = [*METHODS[chosen], f"output={other.parent / 'runs'}"]
    run_job(SCRIPT, other, *whole)
    run_job(SCRIPT, tiny_recipe, *METHODS[chosen], "--max-steps", 7)
    run_job(SCRIPT, tiny_recipe, *METHODS[chosen], "--resume")
    assert_same_result(other, tiny_recipe)
    for name, weight in load_file(folder(tiny_recipe) / "model" / "model.safetensors").items():
        assert ".experts." not in name or torch.equal(weight, fake_quantize(weight)), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_saves_a_checkpoint_first(tiny_recipe, number):
    process = Job(SCRIPT, tiny_recipe, "qat.steps=1000", "qat.checkpoint_every=1000")
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(number)
            break
    output, _ = process.communicate()
    assert process.returncode == 128 + number
    assert f"stopped by signal {int(number)}" in output
    assert len(complete_checkpoints(folder(tiny_recipe) / "checkpoints")) == 1


def test_an_earlier_run_is_set_aside_not_overwritten(tiny_recipe):
    run_job(SCRIPT, tiny_recipe, "--max-steps", 1)
    output = run_job(SCRIPT, tiny_recipe, "--max-steps", 1)
    assert "an earlier run was set aside as" in output
    assert (folder(tiny_recipe).with_name("qat.1") / "checkpoints" / "step-00000001").is_dir()
    said = run_job(SCRIPT, tiny_recipe, "--max-steps", 1, "keep_earlier=1")
    assert "removed by keep_earlier: 1: " in said
    assert sorted(p.name for p in folder(tiny_recipe).parent.glob("qat*")) == ["qat", "qat.2"]


def test_two_processes_train_together(tiny_recipe):
    run_alone("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT, tiny_recipe, "qat.steps=4",
              "qat.gradient_accumulation=2")
    summary = json.loads((folder(tiny_recipe) / "summary.json").read_text())
    assert summary["tokens"] == 4 * 2 * 2 * 2 * 64  # steps x accumulation x processes x rows x tokens
    assert summary["kl_gap_closed"] > 0
    health = [r for r in computed(tiny_recipe) if r["kind"] == "health"]
    routed = {step: 2 * 2 * 2 * 64 * 2 * since for step, since in ((3, 3), (4, 1))}  # processes x ... x top-2 x steps
    assert {r["step"] for r in health} == routed.keys() and all(sum(r["tokens"]) == routed[r["step"]] for r in health)


@pytest.mark.slow
def test_processes_that_chose_other_first_codes_begin_with_those_of_the_first(tiny_recipe, tmp_path):
    script = tmp_path / "first_codes.py"
    script.write_text(f"""
import sys
import torch
sys.path[0] = {str(ROOT)!r}
from qat import trainer
from recipes.load import load_recipe

kept = []

def differently(teacher, quantizer, *_, **__):
    kept[:] = [value.data.clone() for value in (*quantizer.masters, *quantizer.shifts)]
    for master in quantizer.masters:
        master.data.mul_(1 + 0.1 * torch.distributed.get_rank())
    for shift in quantizer.shifts:
        shift.data.add_(0.6 * torch.distributed.get_rank())
    quantizer.requantize()

trainer.choose_first_codes = differently
recipe = load_recipe(sys.argv[1], ["qat.warm_start.method=gptq", "qat.scales.method=searched"])
job = trainer.Trainer(recipe, resume=False)
for ours, first in zip((*job.quantizer.masters, *job.quantizer.shifts), kept, strict=True):
    assert torch.equal(ours, first) and first.any()
for tensor, _ in job.quantizer:
    ours = tensor.parameter.detach().float()
    assert torch.equal(2 * ours, job.accelerator.reduce(ours, reduction="sum")), tensor.name
job.close()
""")
    run_alone("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, tiny_recipe)


def test_a_launch_that_accelerate_does_not_see_is_refused(tiny_recipe):
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "ACCELERATE_USE_CPU"} | {
        "WORLD_SIZE": "2", "RANK": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "qat/train.py", str(tiny_recipe)], cwd=ROOT, env=environment, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 2
    assert "WORLD_SIZE=2, but Accelerate sees one process" in done.stderr and "torchrun" in done.stderr


def test_a_non_finite_gradient_stops_with_step_tensor_expert_and_keeps_the_checkpoint(tiny_recipe):
    poison = (
        "from qat import expert_quantizer\n"
        "original = expert_quantizer.ExpertQuantizer.pull_gradients\n"
        "def poisoned(self, count=[0]):\n"
        "    original(self); count[0] += 1\n"
        "    if count[0] == 6: self.masters[1].grad[2, 3, 4] = float('nan')\n"
        "expert_quantizer.ExpertQuantizer.pull_gradients = poisoned\n")
    error = run_job(SCRIPT, tiny_recipe, expect=1, before=poison).strip().splitlines()[-1]
    assert "step 6" in error and "down_proj" in error and "expert 2, index [3, 4]" in error and "step-00000004" in error
    assert [p.name for p in complete_checkpoints(folder(tiny_recipe) / "checkpoints")] == ["step-00000004"]


def test_a_non_finite_gradient_of_another_tensor_is_named_too(tiny_recipe):
    poison = (
        "import torch\n"
        "from qat.trainer import Trainer\n"
        "original = Trainer._losses\n"
        "def poisoned(self, *rows):\n"
        "    if self.state.step == 2:\n"
        "        self.model.get_parameter('model.norm.weight').register_hook(\n"
        "            lambda g: g.index_fill(0, torch.tensor([5]), float('nan')))\n"
        "    return original(self, *rows)\n"
        "Trainer._losses = poisoned\n")
    error = run_job(SCRIPT, tiny_recipe, "qat.train=all", "model.dtype=float32", expect=1, before=poison)
    assert "step 3: " in error and "gradient of model.norm.weight: 1 non-finite values, the first at index [5]" in error


MISTAKES = {
    "qat.stepz=3": "unknown key qat.stepz, did you mean qat.steps",
    "qat.optimizer.lr=1e-4": "did you mean qat.optimizer.learning_rate",
    "quantization.scale_rule=evn": "did you mean even",
    "qat.batch_size=0": "greater than 0",
    "data.train=[nowhere.jsonl]": "data.train: 'nowhere.jsonl' matches no file",
    "model.path=nowhere": "nowhere",
    "quantization.expected_tensors=138": "138",
    "data.text_field=body": "no 'body' (data.text_field) and no dialogue; it has ['text']",
    "data.train=[]": "data.train: []: expected at least 1 entry",
    "data.heldout=[]": "data.heldout: []: expected at least 1 entry",
    "data.train=[{path: a.jsonl, hub: no/such}]": "a source has either path or hub",
    "data.train=['hub:no/such']": "data.train: hub dataset 'no/such' cannot be read",
    "tracking.wandb=offline": "tracking.wandb: the wandb package is not installed",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_one_helpful_line_and_exit_code_2(tiny_recipe, override):
    text = run_job(SCRIPT, tiny_recipe, override, expect=2)
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and MISTAKES[override] in errors[0]


def reseal(path, **changes):
    """Makes a checkpoint's sums fit what is there."""
    facts = json.loads((path / "complete.json").read_text())
    for key in ("sum", "sha256"):
        del facts[key]
    names = [p.name for p in path.iterdir() if p.name != "complete.json"]
    seal(path, facts | changes, file_digests(path, names))


def test_a_checkpoint_of_another_shape_is_one_line(tiny_recipe, tiny_checkpoint, tmp_path):
    run_job(SCRIPT, tiny_recipe, "--max-steps", 1)
    path = complete_checkpoints(folder(tiny_recipe) / "checkpoints")[0]
    content = load_state(path / "training_state.safetensors")
    content["job"]["masters"][0] = content["job"]["masters"][0][:, :-1]
    save_state(path / "training_state.safetensors", content)
    reseal(path)
    done = run_job(SCRIPT, tiny_recipe, "--resume", expect=2)
    assert "does not fit this recipe's model" in done and "gate_up_proj" in done


def test_another_number_of_processes_is_refused_on_resume(tiny_recipe):
    run_job(SCRIPT, tiny_recipe, "--max-steps", 1)
    reseal(complete_checkpoints(folder(tiny_recipe) / "checkpoints")[0], processes=8)
    assert "written by 8 processes, now running 1" in run_job(SCRIPT, tiny_recipe, "--resume", expect=2)
    said = run_job(SCRIPT, tiny_recipe, "--resume", "--other-processes", "--max-steps", 2)
    assert "written by 8 processes, now 1: goes on from the same weights and moments, not bit for bit" in said
    newest = complete_checkpoints(folder(tiny_recipe) / "checkpoints")[-1]
    assert load_state(newest / "training_state.safetensors")["job"]["batches"] == 8 + 1  # as many rows as eight processes took


def test_the_best_measured_step_is_the_result_and_a_run_that_only_gets_worse_ends_early(tiny_recipe):
    measured = (
        "from qat import evaluate\n"
        "original = evaluate.HeldOut.measure\n"
        "def measured(self, model, kl=iter([0.9, 0.5, 0.4, 0.45, 0.4, 0.6])):\n"  # before any step, after the first, ...
        "    return original(self, model) | {'kl': next(kl)}\n"
        "evaluate.HeldOut.measure = measured\n")
    options = ("qat.heldout_every=1", "qat.heldout_sequences=1", "qat.result=best", "qat.patience=3",
               "qat.checkpoint_every=100", "qat.keep_last=1")
    said = run_job(SCRIPT, tiny_recipe, *options, before=measured)
    summary = json.loads((folder(tiny_recipe) / "summary.json").read_text())
    assert "ended at step 5 of 12: no lower KL" in said and "least KL on held-out text at step 2: its weights are" in said
    assert (summary["steps"], summary["result_of_step"]) == (5, 2)
    assert summary["best_heldout"] == {"step": 2, "kl": pytest.approx(0.4)} and summary["tokens"] == 5 * 2 * 64
    kept = complete_checkpoints(folder(tiny_recipe) / "checkpoints")
    assert [p.name for p in kept] == ["step-00000002", "step-00000005"]
    result = load_file(folder(tiny_recipe) / "model" / "model.safetensors")
    stored, last = (load_file(p / "model.safetensors")["model.layers.1.mlp.experts.down_proj"] for p in kept)
    ours = torch.stack([result[f"model.layers.1.mlp.experts.{e}.down_proj.weight"] for e in range(4)])
    assert torch.equal(ours, stored) and not torch.equal(ours, last)
    run_job(SCRIPT, tiny_recipe, *options, "--resume")  # nothing is left to train: the same result once more
    again = load_file(folder(tiny_recipe) / "model" / "model.safetensors")
    assert all(torch.equal(weight, result[name]) for name, weight in again.items())


def test_losses_on_answers_train_and_are_said(tiny_recipe, text_files, tmp_path):
    rows = [{"prompt": "expert router block", "completion": " scale code token"} for _ in range(200)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = run_job(SCRIPT, tiny_recipe, f"data.train=[{tmp_path / 'pairs.jsonl'}]", "data.loss_on=answers", "qat.steps=2",
                   "qat.gradient_accumulation=2")
    learned, whole = re.search(r"losses cover answers: ([\d,]+) of ([\d,]+) tokens", said).groups()
    assert 0 < int(learned.replace(",", "")) < int(whole.replace(",", ""))
    summary = json.loads((folder(tiny_recipe) / "summary.json").read_text())
    assert summary["training"]["loss_on"] == "answers" and summary["steps"] == 2

def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(tiny_recipe):
    full = (
        "import errno\n"
        "from training import checkpoint\n"
        "original = checkpoint.state_writer\n"
        "def full(accelerator, **k):\n"
        "    def write(path, group=None, wrote=original(accelerator, **k)):\n"
        "        wrote(path, group)\n"
        "        if 'step-00000008' in str(path): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "    return write\n"
        "checkpoint.state_writer = full\n")
    said = run_job(SCRIPT, tiny_recipe, expect=1, before=full)
    assert "No space left on device; the last good checkpoint is" in said and "Traceback" not in said
    names = [p.name for p in (folder(tiny_recipe) / "checkpoints").iterdir()]
    assert names == ["step-00000004"]


@pytest.mark.parametrize("finished", [False, True])
def test_a_disk_that_takes_no_more_is_one_line_and_leaves_nothing_half_written(tiny_recipe, finished):
    """A limit on the size of files stands for the full disk: a write fails in the middle, in whatever library it happens."""
    if finished:  # then --resume evaluates and writes the result once more
        run_job(SCRIPT, tiny_recipe)
    kept = {p: p.read_bytes() for p in folder(tiny_recipe).rglob("*.safetensors")}
    said = run_job(SCRIPT, tiny_recipe, "--resume", expect=1,
               before="import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))")
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    words = "model could not be written" if finished else "checkpoint of step 4 could not be written"
    assert len(errors) == 1 and words in errors[0] and "Traceback" not in said
    assert not list(folder(tiny_recipe).rglob("*.partial"))
    assert kept == {p: p.read_bytes() for p in folder(tiny_recipe).rglob("*.safetensors")}


@pytest.mark.parametrize("override, words", {
    "qat.steps=3": "qat.steps: 3, but",
    "qat.optimizer.learning_rate=0.5": "qat.optimizer.learning_rate (was 0.001, now 0.5)",
    "seed=4": "seed (was 3, now 4)",
}.items())
def test_a_run_is_not_continued_by_a_recipe_that_trains_something_else(uninterrupted, override, words):
    done = run_job(SCRIPT, uninterrupted[0], "--resume", override, expect=2)
    assert words in done and done.count("error:") == 1 and "Traceback" not in done


def test_a_resume_without_a_checkpoint_says_so(tiny_recipe):
    assert "no complete checkpoint in" in run_job(SCRIPT, tiny_recipe, "--resume", "--max-steps", 1)


@pytest.mark.parametrize("variable, value, words", [
    ("ACCELERATE_USE_FSDP", "true", "distributed_type FSDP, but models are sharded by the recipe"),
    ("ACCELERATE_USE_DEEPSPEED", "true", "distributed_type DEEPSPEED, but models are sharded by the recipe"),
    ("ACCELERATE_MIXED_PRECISION", "bf16", "mixed_precision bf16, but weights carry their dtype: set model.dtype"),
])
def test_a_launch_that_is_not_this_trainers_is_refused_in_one_line(tiny_recipe, variable, value, words):
    said = run_job(SCRIPT, tiny_recipe, expect=2, before=f"import os; os.environ[{variable!r}] = {value!r}")
    assert words in said and said.count("error:") == 1 and "Traceback" not in said


def test_help_and_recipe_errors_import_no_torch(tiny_recipe):
    code = ("import sys; sys.argv = ['qat/train.py']; sys.path.insert(0, '.')\n"
            "from qat.train import main\n"
            f"code = main([{str(tiny_recipe)!r}, 'qat.stepz=1'])\n"
            "assert code == 2 and 'torch' not in sys.modules and 'transformers' not in sys.modules\n")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, check=True, timeout=300)


def overwrite(path, content):
    """Other content under the same name, size and date where they can be kept."""
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_other_weights_or_text_under_the_same_path_are_named_and_refused(tiny_recipe, tiny_checkpoint, text_files, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "base")
    shutil.copy(text_files["train"], tmp_path / "mine.jsonl")
    own = f"model.path={tmp_path / 'base'}", f"data.train=[{tmp_path / 'mine.jsonl'}]"
    run_job(SCRIPT, tiny_recipe, *own, "--max-steps", 1)
    lines = (tmp_path / "mine.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "mine.jsonl").write_bytes(b"".join(reversed(lines)))
    said = run_job(SCRIPT, tiny_recipe, *own, "--resume", expect=2)
    assert "trained on other training data than now" in said and said.count("error:") == 1
    (tmp_path / "mine.jsonl").write_bytes(b"".join(lines))
    file = next((tmp_path / "base").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    overwrite(file, content)
    said = run_job(SCRIPT, tiny_recipe, *own, "--resume", expect=2)
    assert f"trained on other base weights than now ({file.name} changed)" in said and said.count("error:") == 1
    content[-1] ^= 1
    overwrite(file, content)
    assert "resuming" in run_job(SCRIPT, tiny_recipe, *own, "--resume", "--max-steps", 2)


def test_a_second_run_of_a_recipe_is_refused_while_the_first_one_trains(tiny_recipe):
    first = Job(SCRIPT, tiny_recipe, "qat.steps=100000")  # as long as the others need
    for line in first.stdout:
        if line.startswith("step 2/"):
            break
    for arguments in ((), ("--resume",)):
        said = run_job(SCRIPT, tiny_recipe, "qat.steps=100000", *arguments, expect=2)
        assert f"process {first.pid} on" in said and "is writing it; stop it first" in said and said.count("error:") == 1
    assert sorted(p.name for p in folder(tiny_recipe).parent.iterdir()) == [".qat.lock", "qat"]
    first.send_signal(signal.SIGKILL)
    first.communicate()
    run_job(SCRIPT, tiny_recipe, "qat.steps=1000", "--max-steps", 1)
    assert not list(folder(tiny_recipe).parent.glob(".*.lock"))
