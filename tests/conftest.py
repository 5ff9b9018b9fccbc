"""A tiny MiMo-V2 checkpoint with tokenizer, text and recipes, made once: what the training tests train for a few steps."""

import atexit
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from hypothesis import settings
from tiny_models import draft_recipe_text, tiny_config, write_tokenizer

# Kernels are tested in triton's interpreter (or, with FP4_TEST_KERNELS=1, compiled for the CPU), which must be chosen before
# anything (torchao, for one) imports triton.
os.environ["TRITON_INTERPRET"] = "0" if os.environ.get("FP4_TEST_KERNELS") == "1" else "1"
# Remote code is imported from one folder per process, settled before transformers is: two folders in one process hide
# each other's modules, and workers must not share one.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf_modules_")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
# Workers of the suite share the cores: threads of tiny products would only wait for each other.
torch.set_num_threads(1)


# What is drawn is the same in every run: a red suite can be repeated, and a green one stays green.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A test that forgets to seed draws the same numbers whichever tests its process ran before."""
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)


@pytest.fixture
def model():
    """The tiny model with random float32 weights."""
    from modeling.modeling_mimo_v2 import MiMoV2ForCausalLM

    torch.manual_seed(1)
    return MiMoV2ForCausalLM(tiny_config())


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    from modeling.modeling_mimo_v2 import MiMoV2ForCausalLM

    folder = tmp_path_factory.mktemp("tiny_checkpoint")
    torch.manual_seed(0)
    model = MiMoV2ForCausalLM(tiny_config()).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:  # wide enough that rounding the experts is felt in the logits
                parameter.normal_(0, 0.15 if "experts" in name else 0.08)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def text_files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    words = "expert router block scale code token window sink anchor draft".split()
    files = {}
    for name, documents in (("train", 120), ("alpha.heldout", 12), ("beta.heldout", 12)):
        files[name] = folder / f"{name}.jsonl"
        rows = [{"text": " ".join(rng.choices(words, k=40))} for _ in range(documents)]
        files[name].write_text("".join(json.dumps(r) + "\n" for r in rows))
    return files


@pytest.fixture
def tiny_recipe(tiny_checkpoint, text_files, tmp_path) -> Path:
    """Path of a recipe for 12 steps of 2 x 64 tokens, output under this test's folder."""
    recipe = {
        "name": "t", "seed": 3, "output": str(tmp_path / "runs"),
        "model": {"path": str(tiny_checkpoint), "dtype": "bfloat16"},
        "data": {"train": [str(text_files["train"])], "sequence_length": 64, "eval_sequences": 4,
                 "heldout": [str(text_files["alpha.heldout"]), str(text_files["beta.heldout"])]},
        "qat": {"steps": 12, "batch_size": 2, "checkpoint_every": 4, "log_every": 1, "health_every": 3,
                "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="session")
def prompt_files(tmp_path_factory) -> dict[str, Path]:
    """30 training prompts, and held-out ones of two domains and both kinds."""
    folder = tmp_path_factory.mktemp("prompts")
    rng = random.Random(1)
    words = "expert router block scale code token window sink anchor draft".split()
    rows = {"train": [{"id": f"t{i}", "prompt": " ".join(rng.choices(words, k=rng.randint(1, 4)))} for i in range(30)],
            "heldout": [{"id": f"h{i}", "domain": "alpha" if i % 2 else "beta", "kind": "task" if i % 4 < 2 else "open",
                         "prompt": " ".join(rng.choices(words, k=3))} for i in range(12)]}
    files = {name: folder / f"{name}.jsonl" for name in rows}
    for name, path in files.items():
        path.write_text("".join(json.dumps(r) + "\n" for r in rows[name]))
    return files


@pytest.fixture
def draft_recipe(tiny_checkpoint, prompt_files, text_files, tmp_path) -> Path:
    path = tmp_path / "draft.yaml"
    path.write_text(yaml.safe_dump(draft_recipe_text(tiny_checkpoint, prompt_files, text_files, tmp_path / "runs")))
    return path


@pytest.fixture
def loaded(draft_recipe):
    """(recipe, target, fresh drafter) of `draft_recipe`, in this process."""
    from dflash_train.target import load_target, new_drafter
    from recipes.load import load_recipe

    recipe = load_recipe(draft_recipe)
    target = load_target(recipe)
    return recipe, target, new_drafter(recipe, target).eval()
