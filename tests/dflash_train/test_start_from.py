"""Training a drafter on from an earlier one."""

from pathlib import Path

import pytest
import torch

from dflash_train import acceptance
from dflash_train.target import load_target, new_drafter
from modeling.drafter import save_drafter
from recipes.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def earlier(loaded, tmp_path):
    _, _, drafter = loaded
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.normal_(0, 0.1)
    save_drafter(drafter, tmp_path / "earlier")
    return drafter, tmp_path / "earlier"


def started(recipe, target, folder, **geometry):
    dflash = recipe.dflash.model_copy(update={"start_from": str(folder)})
    return new_drafter(recipe.model_copy(update={
        "dflash": dflash, "drafter": recipe.drafter.model_copy(update=geometry)}), target)


def test_weights_and_mask_embedding_are_the_earlier_ones_in_float32(loaded, earlier):
    recipe, target, _ = loaded
    drafter, folder = earlier
    found = dict(started(recipe, target, folder).named_parameters())
    for name, parameter in drafter.named_parameters():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], parameter.bfloat16().float()), name


@pytest.mark.parametrize("geometry, words", [
    ({"window": 9}, "sliding_window is .*, the recipe's drafter has 9"),
    ({"num_hidden_layers": 5}, "num_hidden_layers is"),
    ({"attention_value_scale": 0.25}, "attention_value_scale is"),
])
def test_another_geometry_is_refused_by_the_key_that_differs(loaded, earlier, geometry, words):
    recipe, target, _ = loaded
    with pytest.raises(ValueError, match=f"dflash.start_from: .*{words}"):
        started(recipe, target, earlier[1], **geometry)


def test_a_folder_without_a_drafter_is_refused(loaded, tmp_path):
    recipe, target, _ = loaded
    with pytest.raises(ValueError, match="dflash.start_from: .* no config.json"):
        started(recipe, target, tmp_path / "nowhere")


def test_the_seeds_own_drafter_fits_the_tiny_recipe_and_drafts_what_the_seed_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = load_recipe("recipes/tiny.yaml", ["dflash.target=base", "dflash.start_from=recipes/seed-drafter",
                                               "dflash.acceptance.prompts_per_group=4", "dflash.acceptance.max_new_tokens=64",
                                               "dflash.acceptance.timed_prompts=0"])
    target = load_target(recipe)
    drafter = new_drafter(recipe, target).eval().to(target.head.weight.dtype)
    found = acceptance.measure(recipe, target, drafter, say=lambda text: None)["acceptance"]
    assert found["prose"]["task_t0"] > 5 and found["math"]["task_t0"] > 5  # untrained 1, at best 8; with 48 prompts 6.7 and 7.1
    assert found["math"]["open_t1"] > 4 and found["code"]["task_t0"] > 3


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "mask_embedding.pt"])
@pytest.mark.parametrize(("content", "words"), [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a pointer of Git LFS"), (b"\x00\x01", ""),
    (b"", "")], ids=["pointer", "damaged", "empty"])
def test_files_that_cannot_be_read_are_named_in_one_line(loaded, earlier, file, content, words):
    recipe, target, _ = loaded
    (earlier[1] / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^dflash.start_from: [^\n]*{file}: cannot be read: {words}[^\n]*$"):
        started(recipe, target, earlier[1])
