"""The commands of docs/checkpoint.md's ten situations, typed as they stand there, on toys of the checkpoints that they name.

`make test-families` runs them. A launcher of one process adds nothing but variables, so `accelerate launch` is left out here;
the server is stopped when it answers; the command of vLLM is what tests/export/test_vllm_client.py runs.
"""

import os
import re
import shlex
import shutil
import signal
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from jobs import Job
from released_folders import write_release
from safetensors.torch import load_file
from tiny_models import write_tokenizer
from toy_export import published_drafter
from toy_layouts import exported, glm4, gpt_oss, qwen3

from tests.checkpoint.test_bases import to_fp8

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(os.environ.get("FP4_TEST_FAMILIES") != "1", reason="minutes: make test-families")
ROOMS = ("qat", "dflash_train", "export", "runtime_ref")
RECIPE = {
    "name": "mine", "output": "runs", "model": {"dtype": "float32"},
    "qat": {"steps": 2, "batch_size": 2, "checkpoint_every": 1, "log_every": 1},
    "drafter": {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
                "intermediate_size": 128, "target_layer_ids": [0, 3], "window": 24, "mask_token": 263,
                "attention_sink_bias": False, "partial_rotary_factor": 1.0},
    "dflash": {"steps": 4, "batch_size": 2, "sequence_length": 96, "anchors": 16,
               "regenerate": {"max_new_tokens": 24, "batch_size": 16},
               "acceptance": {"max_new_tokens": 16, "prompts_per_group": 2, "timed_prompts": 1}}}


def situations() -> dict[int, list[str]]:
    """Number -> commands."""
    text = (ROOT / "docs/checkpoint.md").read_text(encoding="utf-8").partition("## Ten situations")[2]
    parts = re.split(r"^\*\*(\d+)\. ", text, flags=re.M)[1:]
    return {int(number): re.findall(r"^    (\S.*)$", body, re.M) for number, body in zip(parts[::2], parts[1::2], strict=True)}


SITUATIONS = situations()


def plain_model(here: Path, config, layout: str) -> Path:
    """A base in bf16 with a tokenizer; a packed export lies beside it."""
    config.eos_token_id = 0  # the tokenizer's
    exported(here / "making", config, layout)
    write_tokenizer(here / "making/base")
    return here / "making/base"


def fp8(here: Path) -> None:
    base = plain_model(here, qwen3(vocab_size=264), "compressed-tensors")
    folder = shutil.copytree(base, here / "Qwen3-30B-A3B-FP8")
    to_fp8(folder, load_file(folder / "model.safetensors"))


def packed(here: Path, config, layout: str, name: str) -> None:
    """A packed release by somebody else: nothing that only this project's exports have."""
    plain_model(here, config, layout)
    folder = shutil.copytree(here / "making/out", here / name)
    write_tokenizer(folder)
    for own in ("export.json", "checksums.sha256", "checksums.json", "resolved.yaml", "README.md"):
        (folder / own).unlink()


def trained(here: Path, recipe: dict) -> None:
    """The run `mine` of a Qwen3-MoE, as qat/train.py leaves it, and a checkpoint of Accelerate."""
    recipe["model"]["path"] = str(plain_model(here, qwen3(vocab_size=264), "compressed-tensors"))
    (here / "R").write_text(yaml.safe_dump(recipe))
    finish(typed(here, "python qat/train.py R"))
    shutil.copytree(next((here / "runs/mine/qat/checkpoints").glob("step-*")), here / "checkpoints/step-1000")


def base_in_recipe(here: Path, recipe: dict) -> None:
    recipe["model"]["path"] = str(plain_model(here, qwen3(vocab_size=264), "compressed-tensors"))
    shutil.copytree(here / "making/base", here / "BASE")


# What each situation begins with.
TOYS = {
    1: lambda here, recipe: write_release(here / "MiMo-V2.5-Pro", "V2.5-Pro"),
    2: lambda here, recipe: write_release(here / "MiMo-V2.5-Pro-FP4-DFlash", "V2.5-Pro-FP4-DFlash"),
    3: lambda here, recipe: fp8(here),
    4: lambda here, recipe: packed(here, gpt_oss(vocab_size=264), "gpt-oss", "gpt-oss-20b"),
    5: lambda here, recipe: plain_model(here, glm4(vocab_size=264), "compressed-tensors").rename(here / "GLM-4.5-Air"),
    6: lambda here, recipe: (recipe["model"].update(path="PACKED"), packed(here, qwen3(vocab_size=264), "compressed-tensors",
                                                                           "PACKED")),
    7: base_in_recipe, 8: trained, 9: lambda here, recipe: (trained(here, recipe), published_drafter(
        here / "Qwen3-30B-A3B-DFlash", vocabulary=264)), 10: trained}


def typed(here: Path, command: str) -> Job:
    words = shlex.split(command.replace("accelerate launch", "python"))
    assert words[0] == "python", command
    if words[1].endswith("serve.py"):
        words += ["--port", "0"]  # the usual one may be somebody's
    return Job(words[1], *words[2:], before=f"import os; os.chdir({str(here)!r})")


def finish(job: Job) -> None:
    said, _ = job.communicate()
    assert job.returncode == 0, said[-3000:]


def answers_and_stops(job: Job) -> None:
    url = next(re.search(r" on (http://\S+)", line)[1] for line in job.stdout if line.startswith("serving "))
    end = time.monotonic() + 300
    while True:
        assert job.returncode is None and time.monotonic() < end, "the server does not answer"
        try:
            urllib.request.urlopen(f"{url}/v1/models", timeout=60).close()
            break
        except OSError:
            time.sleep(0.2)
    job.send_signal(signal.SIGINT)
    job.wait()


def test_there_are_ten_situations_of_three_commands():
    assert list(SITUATIONS) == list(range(1, 11)) and {len(c) for c in SITUATIONS.values()} == {3}


@pytest.mark.parametrize("number", SITUATIONS)
def test_the_commands_of_a_situation_do_what_they_say(number, tmp_path, text_files, prompt_files):
    for room in ROOMS:
        (tmp_path / room).symlink_to(ROOT / room)
    recipe = yaml.safe_load(yaml.safe_dump(RECIPE)) | {"data": {
        "train": [str(text_files["train"])], "heldout": [str(text_files["alpha.heldout"])], "sequence_length": 64,
        "eval_sequences": 2}}
    recipe["dflash"]["regenerate"]["prompts"] = [str(prompt_files["train"])]
    recipe["dflash"]["acceptance"]["prompts"] = [str(prompt_files["heldout"])]
    TOYS[number](tmp_path, recipe)
    if number == 9:  # its geometry goes into the recipe's drafter section
        recipe["drafter"] |= {"window": None, "rotary_base": 1e5}
    (tmp_path / "R").write_text(yaml.safe_dump(recipe))
    for command in SITUATIONS[number]:
        if command.startswith("vllm "):
            assert (tmp_path / shlex.split(command)[2] / "dflash/config.json").is_file()
        elif "serve.py" in command:
            answers_and_stops(typed(tmp_path, command))
        else:
            finish(typed(tmp_path, command))
