"""Two products for all experts give what transformers' own experts give, forward and backward, where all are chosen."""

import copy

import pytest
import torch
from tolerance import MODEL_FP32
from transformers import MixtralConfig, MixtralForCausalLM

from modeling.all_experts import use_all_experts


def toy(per_token: int = 4) -> MixtralForCausalLM:
    torch.manual_seed(1)
    return MixtralForCausalLM(MixtralConfig(
        vocab_size=97, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=per_token, max_position_embeddings=64))


def test_outputs_and_gradients_equal_those_of_eager_experts():
    plain, ours = toy(), toy()
    plain.set_experts_implementation("eager")
    assert use_all_experts(ours)
    ids = torch.randint(97, (2, 31))
    for model in (plain, ours):
        model(input_ids=ids, labels=ids).loss.backward()
    assert torch.allclose(plain(input_ids=ids).logits, ours(input_ids=ids).logits, **MODEL_FP32)
    for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5, rtol=1e-3), name


def test_routing_weights_reach_the_expert_they_are_for():
    """The router lists experts by weight: an order taken for the experts' own would go unnoticed with equal weights."""
    plain, ours = toy(), None
    with torch.no_grad():
        for layer in plain.model.layers:
            layer.mlp.gate.weight.mul_(40)
    ours = copy.deepcopy(plain)
    plain.set_experts_implementation("eager")
    assert use_all_experts(ours)
    ids = torch.randint(97, (1, 20))
    assert torch.allclose(plain(input_ids=ids).logits, ours(input_ids=ids).logits, **MODEL_FP32)


@pytest.mark.parametrize("per_token", [1, 3])
def test_models_that_choose_a_few_experts_keep_their_own(per_token):
    model = toy(per_token)
    before = model.config._experts_implementation
    assert not use_all_experts(model) and model.config._experts_implementation == before


def test_a_saved_model_says_nothing_of_it(tmp_path):
    model = toy()
    use_all_experts(model)
    model.save_pretrained(tmp_path)
    assert "all_experts" not in (tmp_path / "config.json").read_text()
    assert MixtralForCausalLM.from_pretrained(tmp_path).config._experts_implementation != "all_experts"
