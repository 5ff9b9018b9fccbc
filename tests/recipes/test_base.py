"""Recipes that build on others: keys replaced section by section, mistakes named in the file that made them."""

from pathlib import Path

import pytest

from recipes.load import RecipeError, dump_recipe, load_recipe

BASE = """name: base
model: {path: here}
data:
  train: [a.jsonl, b.jsonl]
  heldout: [c.jsonl]
qat:
  steps: 10
  optimizer: {learning_rate: 1e-4, warmup_steps: 3}
cluster: {memory_gib: 80, nodes: 2}
"""


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / "top.yaml"


def test_keys_replace_those_of_the_base_section_by_section(tmp_path):
    top = write(tmp_path, base=BASE, top="base: base.yaml\nname: top\nqat: {optimizer: {learning_rate: 2e-4}}\n"
                                         "data: {train: [d.jsonl]}\ncluster: null\n")
    recipe = load_recipe(top, ["qat.steps=20"])
    assert (recipe.name, recipe.qat.steps, recipe.qat.optimizer.learning_rate, recipe.qat.optimizer.warmup_steps) == (
        "top", 20, 2e-4, 3)
    assert recipe.data.train == ["d.jsonl"] and recipe.data.heldout == ["c.jsonl"] and recipe.cluster is None
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_recipe(recipe))
    assert load_recipe(resolved) == recipe and "base:" not in resolved.read_text()


def test_bases_have_bases(tmp_path):
    top = write(tmp_path, base=BASE, middle="base: base.yaml\nqat: {steps: 11}\n", top="base: middle.yaml\nname: top\n")
    assert load_recipe(top).qat.steps == 11


def test_a_shipped_recipe_is_a_base_by_its_name(tmp_path):
    recipe = load_recipe(write(tmp_path, top="base: mimo.yaml\nname: mine\nqat: {steps: 7}\n"))
    assert (recipe.name, recipe.qat.steps, recipe.model.released) == ("mine", 7, "MiMo-V2.5-Pro")


@pytest.mark.parametrize("files, words", [
    ({"top": "name: top\nbase: bass.yaml\n", "base": BASE},
     "top.yaml:2: base: bass.yaml: no such recipe file, did you mean base.yaml?"),
    ({"top": "base: top.yaml\n"}, r"top.yaml:1: base: top.yaml: recipes that build on each other (top.yaml -> top.yaml)"),
    ({"top": "base: b.yaml\n", "b": "name: b\nbase: top.yaml\n"},
     "b.yaml:2: base: top.yaml: recipes that build on each other (top.yaml -> b.yaml -> top.yaml)"),
    ({"top": "base: [a]\n"}, "top.yaml:1: base: ['a']: expected the file name of another recipe"),
    ({"top": "base: base.yaml\n", "base": BASE.replace("steps: 10", "stepz: 10")}, "base.yaml:7: qat.stepz: unknown key"),
    ({"top": "base: base.yaml\nqat: {steps: x}\n", "base": BASE}, "top.yaml:2: qat.steps: 'x': expected"),
])
def test_a_mistake_is_one_line_that_names_its_own_file(tmp_path, files, words):
    with pytest.raises(RecipeError) as error:
        load_recipe(write(tmp_path, **files))
    assert words in str(error.value) and str(error.value).count("\n") == (1 if "stepz" in str(files) else 0)
