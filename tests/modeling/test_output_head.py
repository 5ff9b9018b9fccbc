"""A model whose logits are not its head's is refused, by name and cause; ordinary ones pass, and nothing of them is changed."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from modeling.output_head import require_plain_head

SMALL = dict(vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, head_dim=16)
EXPERTS = dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)


def tiny(kind: str, dtype: torch.dtype, **settings):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**SMALL, **EXPERTS, **settings})
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "olmoe", "phimoe"])
def test_families_whose_logits_are_their_heads_pass(kind, dtype):
    require_plain_head(tiny(kind, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_this_projects_model_passes(model, dtype):
    require_plain_head(model.to(dtype).eval())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "settings", "cause"), [
    ("granitemoe", {"logits_scaling": 8.0}, r"logits_scaling=8\.0"),
    ("cohere2_moe", {"logit_scale": 0.25}, r"logit_scale=0\.25"),
    ("gemma2", {"final_logit_softcapping": 30.0}, r"final_logit_softcapping=30\.0"),
])
def test_scaled_and_capped_logits_are_refused_with_the_setting_that_does_it(kind, settings, cause, dtype):
    """An untrained model's logits are far too small to feel a cap of 30: the probe is enlarged."""
    with pytest.raises(ValueError, match=rf"^model type {kind}: its logits are not .* alone \({cause}\); [^\n]*$"):
        require_plain_head(tiny(kind, dtype, **settings))


def test_a_scale_of_one_is_none():
    require_plain_head(tiny("granitemoe", torch.bfloat16, logits_scaling=1.0))


def test_the_probe_leaves_the_model_and_the_random_numbers_as_they_were(model):
    ids, state = torch.arange(20)[None], torch.random.get_rng_state()
    before = model.eval()(input_ids=ids).logits
    require_plain_head(model)
    assert torch.equal(torch.random.get_rng_state(), state) and torch.equal(model(input_ids=ids).logits, before)


def test_a_model_without_finite_weights_is_left_to_the_checks_that_name_the_tensor(model):
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 4] = torch.nan
    require_plain_head(model.eval())
