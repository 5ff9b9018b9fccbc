"""A tiny MiMo-V2 checkpoint with tokenizer, text and recipe, made once: what the QAT tests train for a few steps."""

import json
import random
from pathlib import Path

import pytest
import torch
import yaml


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0} | {symbol: i + 1 for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)


def tiny_config():
    from modeling.configuration_mimo_v2 import MiMoV2Config

    return MiMoV2Config(
        vocab_size=264, hidden_size=64, num_hidden_layers=3, hybrid_layer_pattern=[0, 1, 0], moe_layer_freq=[0, 1, 1],
        num_attention_heads=4, num_key_value_heads=1, swa_num_attention_heads=4, swa_num_key_value_heads=2,
        head_dim=16, v_head_dim=16, swa_head_dim=16, swa_v_head_dim=16, sliding_window=16, intermediate_size=96,
        moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, partial_rotary_factor=0.5,
        add_swa_attention_sink_bias=True, attention_value_scale=0.7, max_position_embeddings=256)


@pytest.fixture
def model():
    """The tiny model with random float32 weights."""
    from modeling.modeling_mimo_v2 import MiMoV2ForCausalLM

    torch.manual_seed(1)
    return MiMoV2ForCausalLM(tiny_config())


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    from modeling.modeling_mimo_v2 import MiMoV2ForCausalLM

    folder = tmp_path_factory.mktemp("tiny_checkpoint")
    torch.manual_seed(0)
    model = MiMoV2ForCausalLM(tiny_config()).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:  # wide enough that rounding the experts is felt in the logits
                parameter.normal_(0, 0.15 if "experts" in name else 0.08)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def text_files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    words = "expert router block scale code token window sink anchor draft".split()
    files = {}
    for name, documents in (("train", 120), ("alpha.heldout", 12), ("beta.heldout", 12)):
        files[name] = folder / f"{name}.jsonl"
        rows = [{"text": " ".join(rng.choices(words, k=40))} for _ in range(documents)]
        files[name].write_text("".join(json.dumps(r) + "\n" for r in rows))
    return files


@pytest.fixture
def tiny_recipe(tiny_checkpoint, text_files, tmp_path) -> Path:
    """Path of a recipe for 12 steps of 2 x 64 tokens, output under this test's folder."""
    recipe = {
        "name": "t", "seed": 3, "output": str(tmp_path / "runs"),
        "model": {"path": str(tiny_checkpoint), "dtype": "bfloat16"},
        "data": {"train": [str(text_files["train"])], "sequence_length": 64, "eval_sequences": 4,
                 "heldout": [str(text_files["alpha.heldout"]), str(text_files["beta.heldout"])]},
        "qat": {"steps": 12, "batch_size": 2, "checkpoint_every": 4, "log_every": 1, "health_every": 3,
                "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path
