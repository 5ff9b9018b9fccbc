"""Every shipped recipe with a sharded cluster starts as it is, on a toy of its family with as many layers: only model.path is
given. Bases are stored as the releases are. An update is made of the first tokens of each row, for time."""

import json
import random
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from toy_families import pack

from recipes.load import load_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SHARDED = sorted(p.name for p in RECIPES.glob("*.yaml")
                 if (cluster := load_recipe(p).cluster) is not None and cluster.sharding == "fsdp2")
SMALL = {"vocab_size": 264, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2,
         "max_position_embeddings": 8192, "tie_word_embeddings": False, "moe_intermediate_size": 32}


def toy_of(name: str):
    """(configuration, how the release is stored) of a recipe's family; as many MoE layers as the recipe expects."""
    from transformers import DeepseekV3Config, Glm4MoeConfig, GptOssConfig, Qwen3MoeConfig

    from modeling.configuration_mimo_v2 import MiMoV2Config

    moe = load_recipe(RECIPES / name).quantization.expected_tensors // 2
    own = SMALL | {"num_hidden_layers": moe}
    if name.startswith("qwen3"):
        return Qwen3MoeConfig(**own, head_dim=16, intermediate_size=32, num_experts=8), "bf16"
    if name.startswith("gpt-oss"):
        return GptOssConfig(**own, head_dim=16, intermediate_size=32, num_local_experts=8, pad_token_id=0), "mxfp4"
    if name.startswith("glm"):
        own["num_hidden_layers"] += 1
        return Glm4MoeConfig(**own, head_dim=16, intermediate_size=32, n_routed_experts=8, first_k_dense_replace=1, n_group=1,
                             topk_group=1), "bf16"
    if name.startswith("deepseek"):
        own["num_hidden_layers"] += 3
        return DeepseekV3Config(**own, intermediate_size=32, n_routed_experts=8, first_k_dense_replace=3, n_group=1,
                                topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
                                v_head_dim=16), "fp8"
    assert name.startswith("mimo"), f"no toy of {name}'s family here"
    return MiMoV2Config(**own | {"num_hidden_layers": moe + 1}, hybrid_layer_pattern=[0] + [1] * moe,
                        moe_layer_freq=[0] + [1] * moe, swa_num_attention_heads=2, swa_num_key_value_heads=2, head_dim=16,
                        v_head_dim=16, swa_head_dim=16, swa_v_head_dim=16, sliding_window=16, intermediate_size=32,
                        n_routed_experts=8, partial_rotary_factor=0.5, add_swa_attention_sink_bias=True), "bf16"


def write_toy(folder: Path, name: str) -> None:
    from tiny_models import write_tokenizer
    from transformers import AutoModelForCausalLM

    from modeling.modeling_mimo_v2 import MiMoV2ForCausalLM

    config, form = toy_of(name)
    torch.manual_seed(0)
    own = config.model_type == "mimo_v2"
    model = MiMoV2ForCausalLM(config) if own else AutoModelForCausalLM.from_config(config)
    model.bfloat16().save_pretrained(folder, max_shard_size="50GB")
    write_tokenizer(folder)
    if form != "bf16":
        pack(folder, form)


def write_data(folder: Path, recipe) -> None:
    """The files that the recipe names, below `folder`."""
    rng = random.Random(0)
    words = "expert router block scale code token window sink anchor draft".split()
    for patterns, characters in ((recipe.data.train, 90_000), (recipe.data.heldout, 9_000)):
        file = folder / patterns[0].replace("*", "text")
        file.parent.mkdir(parents=True, exist_ok=True)
        text = " ".join(rng.choices(words, k=characters // 6))
        file.write_text("".join(json.dumps({"text": text[i:i + 3000]}) + "\n" for i in range(0, len(text), 3000)))


def start(rank: int, folder: Path, name: str) -> dict:
    import os

    from qat.sharded import ShardedTrainer

    os.chdir(folder)
    os.environ["WANDB_MODE"] = "disabled"
    job = ShardedTrainer(load_recipe(RECIPES / name, [f"model.path={folder / 'base'}"]), resume=False)
    source = job.batches()
    values = job.update({"input_ids": batch["input_ids"][:, :64]} for batch in source)
    return {"loss": values["loss"], "tensors": len(job.quantizer.tensors), "layout": str(job.layout)}


@pytest.mark.parametrize("name", SHARDED)
def test_a_shipped_recipe_starts_sharded_with_nothing_but_another_base(name, tmp_path):
    recipe = load_recipe(RECIPES / name)
    write_toy(tmp_path / "base", name)
    write_data(tmp_path, recipe)
    ranks = max(2, recipe.cluster.expert_parallel)
    found = on_ranks(ranks, tmp_path / "ranks", start, tmp_path, name, timeout=900)
    for one in found:
        assert one["tensors"] == recipe.quantization.expected_tensors and one["loss"] == found[0]["loss"] > 0
        assert one["layout"] == f"{ranks} ranks: fsdp {ranks}, expert parallel {recipe.cluster.expert_parallel}, replicas 1"
