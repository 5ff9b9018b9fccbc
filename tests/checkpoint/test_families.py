"""Every model type with fused experts that the installed transformers has: trained a step, exported, loaded by stock clients.

`types()` lists them; those in REFUSED cannot be trained or exported, and are told so before training. A dozen that differ in
what they publish run with the other tests, all of them with `make test-families`.
"""

import os

import pytest
import torch
from family_models import equal_weights, random_model, stock, train_a_step, write_recipe
from transformers import AutoModelForCausalLM

from checkpoint.families.registry import family_of, refuse_layout, resolve_layout
from checkpoint.load import load_model
from checkpoint.verify import verify
from export.job import Request, run
from modeling.fused_experts import fused_experts
from mxfp4 import fake_quantize
from qat.expert_quantizer import ExpertQuantizer
from recipes.load import load_recipe
from tools.family_configs import tiny, types

SOME = ["afmoe", "aria_text", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "glm4_moe", "gpt_oss", "granitemoe", "mixtral",
        "qwen2_moe", "qwen3_moe", "qwen3_next"]
REFUSED = {"inkling2_text": "made of .* in a way that is not known here",
           "inkling2_loop_text": "made of .* in a way that is not known here"}


def chosen() -> list:
    every = os.environ.get("FP4_TEST_FAMILIES") == "1"
    return [t for t in types() if t not in REFUSED and (every or t in SOME)]


@pytest.mark.parametrize("model_type", chosen())
def test_a_family_is_trained_exported_and_loaded_by_stock_transformers_bit_for_bit(model_type, tmp_path):
    model = random_model(model_type)
    model.save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base", dtype=torch.bfloat16)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    quantizer = train_a_step(model)
    experts = {t.name for t in quantizer.tensors}
    for name, p in model.named_parameters():
        assert name in experts or torch.equal(p, before[name]), f"{name} is no routed expert and changed"
    model.save_pretrained(tmp_path / "runs/toy/qat/model")
    recipe = load_recipe(write_recipe(tmp_path))
    layout = resolve_layout("auto", model.config)
    for name in dict.fromkeys((layout, "bf16")):
        out = tmp_path / name
        section = recipe.export.model_copy(update={"layout": name})
        assert run(recipe.model_copy(update={"export": section}), Request(out=out)) == 0
        found = verify(out, tmp_path / "runs/toy/qat/model")
        assert found.findings == [] and not found.unchecked
        equal_weights(stock(out), model)
    equal_weights(load_model(tmp_path / layout, dtype=torch.bfloat16), model)  # what we read of it ourselves


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_exported_is_refused_with_the_reason(model_type):
    with pytest.raises(ValueError, match=REFUSED[model_type]):
        config = tiny(model_type)
        refuse_layout(resolve_layout("auto", config), config)
        ExpertQuantizer(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("model_type", types(causal=False))
def test_a_type_without_a_causal_language_model_is_refused_in_one_line(model_type):
    from transformers import CONFIG_MAPPING

    with pytest.raises(ValueError, match=f"model_type {model_type}: .*AutoModelForCausalLM") as error:
        family_of(CONFIG_MAPPING[model_type]()).published(CONFIG_MAPPING[model_type]())
    assert "\n" not in str(error.value)


def test_every_type_of_transformers_is_either_tried_or_refused():
    assert set(SOME) <= set(types()) and not set(SOME) & set(REFUSED) and set(REFUSED) <= set(types())
    assert len(types()) >= 50


def test_the_table_of_families_is_what_the_code_says():
    import transformers

    from tools.family_table import PAGE, page

    if f"transformers {transformers.__version__}." not in PAGE.read_text(encoding="utf-8"):
        pytest.skip(f"docs/families.md is of another version than transformers {transformers.__version__}")
    assert PAGE.read_text(encoding="utf-8") == page(), "python tools/family_table.py writes it anew"


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_a_tied_head_is_left_out_and_tied_again(model_type, tmp_path):
    model = random_model(model_type, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    recipe = load_recipe(write_recipe(tmp_path))
    assert run(recipe, Request(out=tmp_path / "out", base=tmp_path / "base")) == 0
    loaded = stock(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    axes = {n: a for n, _, a in fused_experts(model)}
    for name, p in loaded.named_parameters():
        expected = model.get_parameter(name)
        assert torch.equal(p, fake_quantize(expected, axis=axes[name]) if name in axes else expected), name


def test_names_of_a_family_say_where_each_expert_is_in_training():
    names = family_of(tiny("mixtral")).published(tiny("mixtral"))
    place = names.experts["model.layers.1.block_sparse_moe.experts.3.w3.weight"]
    assert (place.fused, place.expert, place.rows) == ("model.layers.1.mlp.experts.gate_up_proj", 3, slice(96, 192))
    assert names.origin["model.layers.0.block_sparse_moe.gate.weight"] == "model.layers.0.mlp.gate.weight"
