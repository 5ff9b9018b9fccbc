"""A dense Llama cut into experts is the same function; what cannot be cut is refused before anything is written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import write_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from recipes.smollm2.convert import as_mixture, clusters, largest_difference

ROOT = Path(__file__).resolve().parents[2]


def toy(**changes) -> LlamaForCausalLM:
    torch.manual_seed(3)
    settings = dict(vocab_size=131, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=6,
                    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, tie_word_embeddings=True,
                    rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, rms_norm_eps=1e-5, initializer_range=0.3)
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


@pytest.mark.parametrize("experts, deal", [(8, "order"), (8, "cluster"), (4, "order"), (1, "order")])
def test_with_all_experts_chosen_the_mixture_is_the_dense_model(experts, deal):
    dense = toy()
    mixture = as_mixture(dense, experts=experts, per_token=experts, deal=deal)
    assert mixture.config.intermediate_size == 256 // experts
    difference, largest = largest_difference(dense, mixture, torch.randint(131, (3, 63)))
    assert largest > 1 and difference < 1e-5 * largest  # sums of 256 float32 products in another order


def test_down_projections_times_a_power_of_two_keep_every_bit_of_bfloat16():
    dense = toy().to(torch.bfloat16)
    mixture = as_mixture(dense, experts=8, per_token=8)
    down = mixture.model.layers[1].mlp.experts.down_proj
    restored = torch.cat(list(down / 8), dim=1)
    assert torch.equal(restored, dense.model.layers[1].mlp.down_proj.weight)
    assert not mixture.model.layers[1].mlp.gate.weight.any()


def test_tied_embeddings_stay_tied():
    mixture = as_mixture(toy(), experts=8, per_token=8)
    assert mixture.lm_head.weight is mixture.model.embed_tokens.weight
    apart = as_mixture(toy(tie_word_embeddings=False), experts=8, per_token=8)
    assert apart.lm_head.weight is not apart.model.embed_tokens.weight


def test_clusters_are_balanced_complete_and_put_like_units_together():
    torch.manual_seed(0)
    kind = torch.arange(8).repeat(16)[torch.randperm(128)]
    gate = torch.randn(8, 48)[kind] + 0.05 * torch.randn(128, 48)
    groups, centres = clusters(gate, 8)
    assert sorted(torch.cat(groups).tolist()) == list(range(128)) and {len(g) for g in groups} == {16}
    assert centres.shape == (8, 48)
    pure = sum(int(kind[g].bincount().max()) for g in groups)
    assert pure > 100  # units dealt at random: about 40


def test_the_few_experts_of_a_variant_are_the_nearest_clusters():
    dense = toy()
    mixture = as_mixture(dense, experts=8, per_token=4, deal="cluster")
    router = mixture.model.layers[0].mlp.gate
    with torch.no_grad():
        _, weights, chosen = router(torch.randn(50, 96))
    assert chosen.shape == (50, 4) and len(chosen.unique()) == 8
    assert float((weights - 0.25).abs().max()) < 0.05


@pytest.mark.parametrize("changes, experts, per_token, message", [
    ({}, 7, 7, "256 inner units must come to a multiple of 32"), ({}, 16, 16, "possible: 1, 2, 4, 8"),
    ({}, 8, 9, "expected 1 to 8"), ({}, 8, 3, "power of two"), ({"mlp_bias": True}, 8, 8, "no biases"),
    ({"hidden_act": "gelu"}, 8, 8, "expected silu")])
def test_what_cannot_be_cut_is_refused(changes, experts, per_token, message):
    with pytest.raises(ValueError, match=message):
        as_mixture(toy(**changes), experts=experts, per_token=per_token)


@pytest.mark.slow
def test_the_command_writes_a_folder_that_loads_and_refuses_mistakes_in_one_line(tmp_path):
    dense = toy(vocab_size=320)
    dense.save_pretrained(tmp_path / "dense")
    write_tokenizer(tmp_path / "dense")

    def convert(*arguments):
        return subprocess.run([sys.executable, "recipes/smollm2/convert.py", *map(str, arguments)], cwd=ROOT, text=True,
                              capture_output=True)

    done = convert(tmp_path / "dense", tmp_path / "moe", "--dtype", "float32")
    assert done.returncode == 0 and "the same function" in done.stdout, done.stderr
    assert json.loads((tmp_path / "moe/config.json").read_text())["model_type"] == "mixtral"
    from checkpoint.load import load_model

    ids = torch.randint(131, (1, 40))
    loaded = load_model(tmp_path / "moe", dtype=torch.float32)
    assert torch.allclose(loaded(input_ids=ids).logits, dense(input_ids=ids).logits, atol=1e-3)
    for arguments, message in (((tmp_path / "none", tmp_path / "x"), "no such file or folder"),
                               ((tmp_path / "dense", tmp_path / "moe"), "exists already"),
                               ((tmp_path / "dense", tmp_path / "x", "--experts", 7), "must come to a multiple of 32"),
                               ((tmp_path / "moe", tmp_path / "x"), "expected llama")):
        refused = convert(*arguments)
        assert refused.returncode == 2 and message in refused.stderr.splitlines()[-1]
        assert "Traceback" not in refused.stderr and not (tmp_path / "x").exists()
