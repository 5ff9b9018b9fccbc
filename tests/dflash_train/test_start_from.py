"""Training a drafter on from an earlier one."""

import pytest
import torch

from dflash_train.target import new_drafter
from modeling.drafter import save_drafter


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
