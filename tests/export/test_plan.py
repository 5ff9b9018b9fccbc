"""`--plan` says what an export writes, for every layout, from shapes alone, and refuses what an export would refuse."""

import shutil
from pathlib import Path

import pytest
from jobs import run_job
from toy_export import export, gpt_oss_run, make_run, qwen3_run

from checkpoint.detect_format import open_source
from checkpoint.inventory import configuration
from checkpoint.tensor_files import TensorFiles
from export.plan import make_plan
from recipes.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]


def planned(plan) -> dict:
    return {t.name: (tuple(t.shape), t.dtype) for s in plan.shards for t in s.tensors}


def test_the_plan_of_the_release_has_its_published_counts():
    plan = make_plan(load_recipe(ROOT / "recipes/mimo.yaml"))
    assert (plan.tensors, plan.expert_matrices) == (159_581, 79_488)
    assert plan.elements["U8"] == 531_351_207_936 and plan.elements["F8_E4M3"] == 13_378_781_184
    assert all(s.bytes < 5_000_000_000 for s in plan.shards)


@pytest.mark.parametrize("layout, family", [
    ("native", "mimo"), ("hf-fp8", "mimo"), ("compressed-tensors", "mimo"), ("compressed-tensors", "qwen3"),
    ("gpt-oss", "gpt-oss")])
def test_what_is_planned_is_what_is_written(layout, family, tmp_path):
    recipe = {"mimo": lambda: make_run(tmp_path, drafter=False), "qwen3": lambda: qwen3_run(tmp_path)[0],
              "gpt-oss": lambda: gpt_oss_run(tmp_path)[0]}[family]()
    options = (f"export.layout={layout}", "export.shard_bytes=60000")
    out = export(recipe, *options)
    loaded = load_recipe(recipe, options)
    plan, written = make_plan(loaded), open_source(out)
    assert planned(plan) == written.infos and plan.tensors == len(written.infos)
    assert {s.name: s.bytes for s in plan.shards} == {p.name: p.stat().st_size for p in out.glob("*.safetensors")}
    assert sum(plan.bytes.values()) == written.size() and len(plan.shards) > 1
    scales = {n: shape for n, (shape, dtype) in written.infos.items() if "scale" in n and dtype == "U8"}
    assert plan.expert_matrices == (sum(s[0] for s in scales.values()) if layout == "gpt-oss" else len(scales))
    for weights in (tmp_path / "base").glob("*.safetensors*"):  # now the folder is a configuration and nothing else
        weights.unlink()
    assert planned(make_plan(loaded)) == planned(plan)


@pytest.mark.parametrize("dense", ["base", "fp8"])
def test_a_plan_reads_no_weights(dense, tmp_path, monkeypatch):
    recipe = load_recipe(make_run(tmp_path, drafter=False), (f"export.dense={dense}",))
    monkeypatch.setattr(TensorFiles, "_read", lambda self, name, *rest: pytest.fail(f"{name} was read"))
    assert ("F8_E4M3" in make_plan(recipe).bytes) == (dense == "fp8")


@pytest.mark.parametrize("config, kind", [
    ({"model_type": "mimo_v2"}, "mimo_v2"), ({"model_type": "mimo_v2_flash", "hybrid_layer_pattern": [0, 1]}, "mimo_v2"),
    ({"model_type": "mimo_v2_flash"}, "mimo_v2_flash"), ({"model_type": "qwen3_moe"}, "qwen3_moe")])
def test_writers_and_the_verifier_read_a_configuration_as_one_kind(config, kind):
    """A released V2-Flash is this project's class, what transformers saved of it transformers' own."""
    assert configuration({"num_hidden_layers": 2} | config).model_type == kind


def test_a_model_type_that_nobody_knows_is_named():
    with pytest.raises(ValueError, match="model_type 'mamba9': transformers does not know it"):
        configuration({"model_type": "mamba9"})


def test_the_weights_named_on_the_command_line_are_planned(tmp_path):
    recipe = make_run(tmp_path, drafter=False)
    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    said = run_job("export/to_hf.py", recipe, "--plan", "--from", tmp_path / "elsewhere")
    assert "elsewhere,layoutnative" in "".join(said.split())  # wrapped
    with pytest.raises(ValueError, match="no such checkpoint folder"):
        make_plan(load_recipe(recipe), tmp_path / "nowhere")


@pytest.mark.parametrize("name, layout, reason", [
    ("mimo", "hf-fp8", "window layers must have twice the key heads of full layers, and have 8 beside 8"),
    ("mimo", "compressed-tensors", "its client is transformers' mimo_v2_flash class"),
    ("mimo", "gpt-oss", "holds gpt_oss, and this model is mimo_v2; its layout is native"),
    ("qwen3-moe", "native", "holds mimo_v2, and this model is qwen3_moe; its layout is compressed-tensors"),
    ("qwen3-moe", "gpt-oss", "its layout is compressed-tensors"),
    ("gpt-oss", "hf-fp8", "this model is gpt_oss; its layout is gpt-oss"),
    ("gpt-oss", "compressed-tensors", "its layout is gpt-oss"),
])
def test_what_a_client_cannot_hold_is_refused_with_the_reason(name, layout, reason):
    with pytest.raises(ValueError, match=reason):
        make_plan(load_recipe(ROOT / f"recipes/{name}.yaml", (f"export.layout={layout}",)))


@pytest.mark.parametrize("name, layout, matrices", [
    ("mimo-flash", "native", 47 * 256 * 3), ("mimo-flash", "hf-fp8", 47 * 256 * 3),
    ("qwen3-moe", "compressed-tensors", 48 * 128 * 3), ("gpt-oss", "gpt-oss", 24 * 32 * 2)])
def test_published_geometries_of_every_layout_are_planned(name, layout, matrices):
    plan = make_plan(load_recipe(ROOT / f"recipes/{name}.yaml", (f"export.layout={layout}",)))
    codes = plan.elements.get("I8") or plan.elements["U8"] * 16 // 17
    assert plan.expert_matrices == matrices and plan.peak_bytes < 6e9
    assert codes * 17 // 16 == plan.elements["U8"] + plan.elements.get("I8", 0)
