"""What would stop a run later is said before anything is loaded."""

import json
import re
from types import SimpleNamespace

import pytest

from recipes.load import load_recipe
from training import preflight
from training.preflight import problems, require_ready


def changed(recipe_path, *overrides, job="qat"):
    return problems(load_recipe(recipe_path, list(overrides)), job)


def test_a_recipe_that_runs_has_no_problems(tiny_recipe, draft_recipe):
    assert changed(tiny_recipe) == [] == changed(draft_recipe, job="dflash")


@pytest.mark.parametrize(("override", "words"), [
    ("data.train=[nowhere.jsonl]", "data.train: 'nowhere.jsonl' matches no file"),
    ("data.heldout=[nowhere.jsonl]", "data.heldout: 'nowhere.jsonl' matches no file"),
    ("data.train=[{path: nowhere.parquet, weight: 2.0}]", "data.train: 'nowhere.parquet' matches no file"),
    ("data.sequence_length=257", "data.sequence_length: 257 tokens, but .* has 256 positions"),
])
def test_what_is_wrong_is_one_line_with_its_key(override, words, tiny_recipe):
    found = changed(tiny_recipe, override)
    assert len(found) == 1 and re.search(words, found[0])


def test_several_problems_are_all_said(tiny_recipe):
    recipe = load_recipe(tiny_recipe, ["data.train=[a.jsonl]", "data.heldout=[b.jsonl]", "data.sequence_length=300"])
    with pytest.raises(ValueError) as caught:
        require_ready(recipe, "qat")
    assert len(str(caught.value).splitlines()) == 3


def test_learning_from_what_is_measured_is_refused(tiny_recipe, text_files):
    found = changed(tiny_recipe, f"data.train=[{text_files['alpha.heldout'].parent}/./alpha.heldout.jsonl]")
    assert len(found) == 1 and "is in data.train too" in found[0]


def test_a_hub_dataset_is_not_looked_for_on_the_disk(tiny_recipe):
    assert changed(tiny_recipe, "data.train=['hub:some/data', {hub: other/data, split: train_sft}]") == []


def test_a_hybrid_target_is_told_by_its_configuration(draft_recipe, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"layer_types": ["full_attention", "linear_attention"]}))
    found = changed(draft_recipe, f"model.path={tmp_path}", job="dflash")
    assert len(found) == 1 and "layers of linear_attention" in found[0]


def test_a_disk_without_room_for_the_model_is_said(tiny_recipe, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place: SimpleNamespace(free=10))
    found, = changed(tiny_recipe)
    assert found.startswith("output: ") and "GB free, but the model alone has" in found
