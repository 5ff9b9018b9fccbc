"""Recipes: every mistake is located and explained; what is right reads back exactly."""

import subprocess
import sys
from pathlib import Path

import pytest

from recipes.load import RecipeError, dump_recipe, load_recipe, valid_keys

ROOT = Path(__file__).resolve().parents[2]
GOOD = """\
name: t
model:
  path: somewhere
data:
  train: [a.jsonl]
  heldout: [b.jsonl]
qat:
  steps: 10
  optimizer:
    learning_rate: 1e-4
"""


def write(tmp_path, text: str) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


def error(tmp_path, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text), overrides)
    return str(caught.value)


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_recipe_loads_and_survives_a_round_trip(recipe, tmp_path):
    loaded = load_recipe(recipe)
    assert load_recipe(write(tmp_path, dump_recipe(loaded))) == loaded
    assert loaded.name == recipe.stem


@pytest.mark.parametrize(("text", "number"), [("1e-4", 1e-4), ("3E5", 3e5), (".5", 0.5), ("1.", 1.0),
                                              ("2", 2.0), ("1.5e-3", 1.5e-3)])
def test_numbers_are_read_as_people_write_them(tmp_path, text, number):
    path = write(tmp_path, GOOD.replace("1e-4", text))
    assert load_recipe(path).qat.optimizer.learning_rate == number
    assert load_recipe(path, [f"qat.optimizer.learning_rate={text}"]).qat.optimizer.learning_rate == number


@pytest.mark.parametrize("word", ["on", "no", "yes"])
def test_only_true_and_false_are_booleans(tmp_path, word):
    assert f"r.yaml:8: qat.freeze_router: '{word}': expected a valid boolean" in error(
        tmp_path, GOOD.replace("  steps: 10\n", f"  freeze_router: {word}\n  steps: 10\n"))


MISTAKES = {
    "unknown key": (GOOD.replace("steps", "stepz"), "r.yaml:8: qat.stepz: unknown key, did you mean qat.steps?"),
    "initials": (GOOD.replace("learning_rate", "lr"),
                 "r.yaml:10: qat.optimizer.lr: unknown key, did you mean qat.optimizer.learning_rate?"),
    "unknown section": (GOOD + "trackin: 1\n", "r.yaml:11: trackin: unknown key, did you mean tracking?"),
    "missing section": (GOOD.replace("data:\n  train: [a.jsonl]\n  heldout: [b.jsonl]\n", ""), "data: required, but missing"),
    "missing key": (GOOD.replace("  heldout: [b.jsonl]\n", ""), "r.yaml:4: data.heldout: required, but missing"),
    "string for number": (GOOD.replace("steps: 10", "steps: ten"), "r.yaml:8: qat.steps: 'ten': expected a valid integer"),
    "float for integer": (GOOD.replace("steps: 10", "steps: 1.5"), "r.yaml:8: qat.steps: 1.5: expected"),
    "out of range": (GOOD.replace("1e-4", "-1"), "r.yaml:10: qat.optimizer.learning_rate: -1: expected greater than 0"),
    "infinite": (GOOD.replace("1e-4", ".inf"), "qat.optimizer.learning_rate"),
    "choice": (GOOD + "quantization:\n  scale_rule: evne\n",
               "r.yaml:12: quantization.scale_rule: 'evne': expected 'floor', 'rceil', 'even' or 'mse', did you mean even?"),
    "bad list item": (GOOD.replace("[a.jsonl]", "[a.jsonl, 3]"), "r.yaml:5: data.train.1: 3: expected a valid string"),
    "twice": (GOOD + "name: u\n", "r.yaml:11: name: given twice (first at"),
    "yaml": (GOOD + "x: [1,\n", "not valid YAML"),
    "not a mapping": ("- 1\n", "r.yaml:1: a recipe is a mapping of sections, found list"),
    "bad name": (GOOD.replace("name: t", "name: a/b"), "r.yaml:1: name: 'a/b': expected letters, digits"),
    "no files": (GOOD.replace("[b.jsonl]", "[]"), "r.yaml:6: data.heldout: []: expected at least 1 entry, found 0"),
    "section": (GOOD.replace("  train: [a.jsonl]\n  heldout: [b.jsonl]\n", "  7\n"),
                "data: 7: expected a section (keys and values)"),
    "no loss": (GOOD.replace("steps: 10", "steps: 10\n  loss: {kl: 0}"), "nothing would be trained"),
    "no model": (GOOD.replace("  path: somewhere", "  dtype: float32"), "model.path (a checkpoint folder) or model.released"),
    "cluster": (GOOD + "cluster: {memory_gib: 80, expert_parallel: 3}\n", "cluster.expert_parallel=3 does not divide 1 ranks"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_located_and_explained(tmp_path, kind):
    text, expected = MISTAKES[kind]
    assert expected in error(tmp_path, text)


OVERRIDES = {
    "qat.stepz=1": "unknown key qat.stepz, did you mean qat.steps?",
    "qat.steps": "expected section.key=value",
    "qat.steps=[": "the value is not valid YAML",
    "qat.steps=x": "override 'qat.steps=x': qat.steps: 'x': expected a valid integer",
    "name.x=1": "unknown key name.x",
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_wrong_override_says_which_and_why(tmp_path, override):
    assert OVERRIDES[override] in error(tmp_path, GOOD, override)


def test_all_mistakes_are_reported_at_once(tmp_path):
    text = error(tmp_path, GOOD.replace("steps: 10", "steps: ten").replace("1e-4", "-1"))
    assert len(text.splitlines()) == 2


def test_overrides_win_in_order_and_open_absent_sections(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD), ["qat.steps=5", "qat.steps=7", "cluster.memory_gib=80", "qat.loss.kl=0.5"])
    assert (recipe.qat.steps, recipe.cluster.memory_gib, recipe.qat.loss.kl) == (7, 80, 0.5)


def test_a_missing_file_names_its_neighbour(tmp_path):
    write(tmp_path, GOOD)
    with pytest.raises(RecipeError, match=r"no such recipe file, did you mean .*r\.yaml\?"):
        load_recipe(tmp_path / "rr.yaml")


def test_valid_keys_are_dotted_paths_of_the_schema():
    assert {"name", "qat", "qat.optimizer.learning_rate", "cluster.nodes"} <= set(valid_keys())


def test_reading_a_recipe_imports_no_torch_or_transformers():
    code = ("import sys; from recipes.load import load_recipe; load_recipe('recipes/tiny.yaml')\n"
            "heavy = {'torch', 'transformers', 'accelerate', 'datasets', 'matplotlib'} & sys.modules.keys()\n"
            "assert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=600)


def test_files_are_found_beside_the_recipe_and_those_of_the_working_directory_win(tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home, here):
        folder.mkdir()
    (home / "a.jsonl").touch()
    (home / "more-1.parquet").touch()
    (home / "b.jsonl").touch()
    (here / "b.jsonl").touch()
    monkeypatch.chdir(here)
    recipe = load_recipe(write(home, GOOD), ["data.train=[a.jsonl, hub:a.jsonl, {path: 'more-*.parquet'}, nowhere.jsonl]"])
    names = [entry if isinstance(entry, str) else entry.path for entry in recipe.data.train]
    assert names == [f"{home}/a.jsonl", "hub:a.jsonl", f"{home}/more-*.parquet", "nowhere.jsonl"]
    assert recipe.data.heldout == ["b.jsonl"] and recipe.model.path == "somewhere"


def test_a_recipe_built_on_another_finds_the_files_beside_both(tmp_path, monkeypatch):
    below, above = tmp_path / "below", tmp_path / "above"
    for folder in (below, above):
        folder.mkdir()
    (below / "somewhere").mkdir()
    (above / "c.jsonl").touch()
    write(below, GOOD)
    (above / "own.yaml").write_text("base: ../below/r.yaml\ndata: {train: [c.jsonl]}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    recipe = load_recipe(above / "own.yaml", ["data.heldout=[~/d.jsonl]"])
    assert recipe.data.train == [f"{above}/c.jsonl"] and recipe.data.heldout == [f"{tmp_path}/user/d.jsonl"]
    assert Path(recipe.model.path).resolve() == below / "somewhere"


@pytest.mark.parametrize(("override", "words"), [
    ("qat.result=best", "expected qat.heldout_every above 0"), ("qat.patience=2", "expected qat.heldout_every above 0"),
    ("qat={steps: 9, result: best, heldout_every: 3, average_last: 0.5}", "expected qat.average_last: 0"),
    ("qat={steps: 9, oscillation: {method: freeze}, scales: {method: searched}}", "expected qat.scales.method: rule"),
])
def test_options_that_contradict_each_other_are_refused(tmp_path, override, words):
    assert words in error(tmp_path, GOOD, override)
