"""What would stop a run later is said before anything is loaded."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import toy_families

from dflash_train import preflight as draft_preflight
from modeling.output_head import require_plain_head
from qat import preflight as qat_preflight
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


@pytest.mark.parametrize(("make", "words"), [
    (lambda path: path.symlink_to("nowhere"), "no such file"), (lambda path: path.symlink_to(path.name), "symbolic links"),
    (os.mkfifo, "not an ordinary file"), (Path.mkdir, "unknown file type")])
@pytest.mark.parametrize("key", ["data.train", "data.heldout", "dflash.regenerate.prompts", "dflash.acceptance.prompts"])
def test_what_is_no_ordinary_file_is_one_line(key, make, words, tiny_recipe, draft_recipe, tmp_path):
    make(tmp_path / "x.jsonl")
    job = key.split(".")[0].replace("data", "qat")
    found = problems(load_recipe({"qat": tiny_recipe, "dflash": draft_recipe}[job], [f"{key}=[{tmp_path}/x.js*]"]), job)
    assert len(found) == 1 and found[0].startswith(f"{key}: {tmp_path}/x.jsonl: ") and words in found[0]


def test_several_problems_are_all_said(tiny_recipe):
    recipe = load_recipe(tiny_recipe, ["data.train=[a.jsonl]", "data.heldout=[b.jsonl]", "data.sequence_length=300"])
    with pytest.raises(ValueError) as caught:
        require_ready(recipe, "qat")
    assert len(str(caught.value).splitlines()) == 3


def test_learning_from_what_is_measured_is_refused(tiny_recipe, draft_recipe, text_files):
    found = changed(tiny_recipe, f"data.train=[{text_files['alpha.heldout'].parent}/./alpha.heldout.jsonl]")
    assert len(found) == 1 and "is in data.train too" in found[0]
    prompts = text_files["alpha.heldout"].parent / "prompts.jsonl"
    prompts.write_text('{"prompt": "what a drafter is judged by"}\n')
    found = changed(draft_recipe, f"data.train=[{prompts}]", f"dflash.acceptance.prompts=[{prompts}]")
    assert len(found) == 1 and found[0].startswith(f"dflash.acceptance.prompts: {prompts} is in data.train too; ")


def test_a_hub_dataset_is_not_looked_for_on_the_disk(tiny_recipe):
    assert changed(tiny_recipe, "data.train=['hub:some/data', {hub: other/data, split: train_sft}]") == []


def test_a_hybrid_target_is_told_by_its_configuration(draft_recipe, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"layer_types": ["full_attention", "linear_attention"]}))
    found = changed(draft_recipe, f"model.path={tmp_path}", job="dflash")
    assert len(found) == 1 and "layers of linear_attention" in found[0]


@pytest.mark.parametrize(("job", "foresee"), [("qat", qat_preflight.foresee), ("dflash", draft_preflight.foresee)])
def test_a_disk_without_room_for_what_the_job_writes_is_said(job, foresee, tiny_recipe, draft_recipe, monkeypatch, tmp_path):
    recipe = load_recipe({"qat": tiny_recipe, "dflash": draft_recipe}[job], [f"{job}.keep_last=1"])
    problem, writes = foresee(recipe)
    assert problem == [] and list(writes)[0] == "checkpoints (2 at once)" and list(writes)[1].startswith("model/")
    need = sum(writes.values())
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place: SimpleNamespace(free=need - 1))
    found, = problems(recipe, job, (problem, writes))
    assert found.startswith("output: ") and f"{job}.keep_last" in found
    there = tmp_path / "run"
    (there / "checkpoints" / "step-4").mkdir(parents=True)
    (there / "checkpoints" / "step-4" / "model.safetensors").write_bytes(b"x")
    assert problems(recipe, job, (problem, writes), there) == []  # that byte is written already


def test_checkpoints_at_once_are_those_kept_and_the_one_on_its_way():
    assert [preflight.checkpoints_at_once(12, 4, keep) for keep in (1, 2, 3, 9)] == [2, 3, 3, 3]
    assert preflight.checkpoints_at_once(5, 1000, 2) == 1


def with_config(folder, base, **changes):
    """A base's folder without its weights: nothing here may look for them."""
    folder.mkdir()
    for file in base.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("family", "changes", "words"), [
    ("qwen3", {"hidden_act": "swish_glu"}, "hidden_act 'swish_glu': no activation that transformers knows, did you mean sw"),
    ("mixtral", {"hidden_act": "7"}, "hidden_act '7': no activation that transformers knows, expected one such as silu"),
    ("mimo", {"hidden_act": "swoosh"}, "hidden_act='swoosh': expected an activation that transformers knows"),
    ("qwen3", {"hidden_size": "many"}, ""), ("qwen3", {"num_attention_heads": 0}, ""),
    ("mixtral", {"intermediate_size": -4}, ""),
    ("qwen3", {"moe_intermediate_size": 40}, "is not a multiple of the MXFP4 block size 32"),
])
def test_a_configuration_that_cannot_be_is_told_without_weights(family, changes, words, tiny_recipe, tmp_path):
    base = with_config(tmp_path / "base", toy_families.write_base(tmp_path / "whole", family, 4), **changes)
    found, writes = qat_preflight.foresee(load_recipe(tiny_recipe, [f"model.path={base}"]))
    assert writes == {} and len(found) == 1 and words in found[0] and "\n" not in found[0]


def test_gates_numbers_and_dtypes_that_do_not_fit_are_told_without_weights(tiny_recipe, tmp_path, monkeypatch):
    base = with_config(tmp_path / "base", toy_families.write_base(tmp_path / "whole", "qwen3", 4))
    asked = [f"model.path={base}", "quantization.expected_tensors=5", "qat.train=all", "qat.warm_start.method=gptq"]
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    monkeypatch.delattr(modeling_qwen3_moe.Qwen3MoeExperts, "_apply_gate")
    found, _ = qat_preflight.foresee(load_recipe(tiny_recipe, asked))
    assert [text.split(":")[0] for text in found] == ["quantization.expected_tensors", "qat.warm_start.method", "qat.train"]


def test_a_class_without_a_decoder_of_its_own_is_told_without_weights(tiny_recipe, tmp_path):
    from transformers import AutoModelForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(vocab_size=264, hidden_size=64, intermediate_size=64, intermediate_size_mlp=64, head_dim=16,
                              num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
                              max_position_embeddings=256)
    config.save_pretrained(tmp_path / "base")
    found, _ = qat_preflight.foresee(load_recipe(tiny_recipe, [f"model.path={tmp_path}/base"]))
    assert len(found) == 1 and "gives no decoder without its head" in found[0]
    with torch.device("meta"), pytest.raises(ValueError, match="gives no decoder without its head"):
        require_plain_head(AutoModelForCausalLM.from_config(config))


def test_the_drafters_job_tells_an_unknown_activation_and_a_geometry_that_cannot_be(draft_recipe, tmp_path):
    base = with_config(tmp_path / "base", toy_families.write_base(tmp_path / "whole", "qwen3", 4), hidden_act="swoosh")
    found, _ = draft_preflight.foresee(load_recipe(draft_recipe, [f"model.path={base}"]))
    assert len(found) == 1 and "hidden_act 'swoosh'" in found[0]
    found, _ = draft_preflight.foresee(load_recipe(draft_recipe, ["drafter.head_dim=15"]))
    assert len(found) == 1 and found[0].startswith("drafter: ")
