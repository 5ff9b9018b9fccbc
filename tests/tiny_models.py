"""Tiny models, tokenizers and recipes that tests of several rooms build."""

from pathlib import Path


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


def draft_recipe_text(tiny_checkpoint, prompt_files, text_files, output) -> dict:
    """A recipe whose drafter trains for 12 steps on the tiny target with rounded experts."""
    return {
        "name": "t", "seed": 3, "output": str(output), "model": {"path": str(tiny_checkpoint), "dtype": "float32"},
        "data": {"train": [str(text_files["train"])], "heldout": [str(text_files["alpha.heldout"])], "sequence_length": 64},
        "qat": {"steps": 2, "batch_size": 2},
        "drafter": {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
                    "intermediate_size": 64, "window": 24, "mask_token": 260},
        "dflash": {"steps": 12, "batch_size": 2, "sequence_length": 96, "anchors": 20, "target": "ptq", "features": "disk",
                   "checkpoint_every": 4, "log_every": 1, "optimizer": {"warmup_steps": 2},
                   "loss": {"cross_entropy": 1.0, "kl": 0.5},
                   "regenerate": {"prompts": [str(prompt_files["train"])], "max_new_tokens": 40, "batch_size": 8,
                                  "passes": [{"temperature": 0.0}, {"temperature": 1.0}]},
                   "acceptance": {"prompts": [str(prompt_files["heldout"])], "max_new_tokens": 40, "timed_prompts": 2}}}
