"""Tiny configurations of every model type of the installed transformers whose experts are fused tensors.

`types()` asks transformers which there are; `tiny(model_type)` shrinks the default configuration of one: sizes by the names
that configurations share, and for some types what only they have. Blocks of 32 stay whole; other sizes may be odd.
"""

from __future__ import annotations

import pathlib

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 5, "num_local_experts": 5,
    "n_routed_experts": 5, "num_experts_per_tok": 2, "moe_topk": 2, "moe_num_experts": 5, "moe_k": 2, "top_k_experts": 2,
    "max_position_embeddings": 128, "sliding_window": 8, "n_group": 1, "topk_group": 1, "q_lora_rank": 24, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 1, "index_head_dim": 16,
    "index_n_heads": 2, "index_topk": 8, "shared_expert_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
    "num_nextn_predict_layers": 0, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, "dtype": None,
    "moe_layer_start_index": 1, "moe_intermediate_dim": 32, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16,
    "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "mamba_n_groups": 1,
    "moe_num_shared_experts": 1,
    "n_shared_experts": 1, "num_shared_experts": 1, "shared_intermediate_size": 32, "num_dense_layers": 1,
    "num_expert_group": 1,
    "num_limited_groups": 1, "global_head_dim": 16, "num_global_key_value_heads": 2, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 96, "num_kv_shared_layers": 0, "conv_L_cache": 3, "block_dim": 64, "attention_head_dim": 16,
    "use_cache": True, "tie_word_embeddings": False,
}


def types(*, causal: bool = True) -> list[str]:
    """Model types with fused experts that AutoModelForCausalLM builds; causal=False: the others."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    models = pathlib.Path(transformers.__file__).parent / "models"
    fused = {p.parent.name for p in models.glob("*/modeling_*.py") if "@use_experts_implementation" in p.read_text()}
    return sorted(t for t in CONFIG_MAPPING_NAMES if model_type_to_module_name(t).split(".")[-1] in fused
                  and (t in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) == causal)


def tiny(model_type: str, **changes):
    """A configuration of a few thousand weights."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    default = kind()
    text = getattr(default, "text_config", None)
    if text is not None and type(text) is not type(default):
        own = {k: v for k, v in tiny(text.model_type).to_dict().items() if k not in ("dtype", "transformers_version")}
        return kind(text_config=own, **OWN.get(model_type, {}), **changes)
    default.allow_global_per_layer_attribute_access = True
    keys = {k: v for k, v in SIZES.items() if getattr(default, k, None) is not None or k == "pad_token_id"}
    if "kv_lora_rank" in keys:  # latent attention: keys of all heads, and what is rotated is called the heads' width
        keys |= {"num_key_value_heads": 4} | ({"head_dim": SIZES["qk_rope_head_dim"]} if "head_dim" in keys else {})
    if "per_layer_config" in default.to_dict():
        keys["per_layer_config"] = {}
    keys |= OWN.get(model_type, {}) | changes
    layers = keys["num_hidden_layers"] if "num_hidden_layers" in keys else 2
    for key in ("layer_types", "mlp_layer_types"):
        kinds = list(getattr(default, key, None) or ())
        if kinds and key not in keys and key in default.to_dict():
            keys[key] = _spread(kinds, layers)
    return kind(**keys)


def _spread(kinds: list, layers: int) -> list:
    """The first of the default's kinds, then the others as far as there is room."""
    found = list(dict.fromkeys(kinds))
    return [found[i % len(found)] for i in range(layers)] if len(found) <= layers else found[-layers:]


OWN: dict[str, dict] = {
    "deepseek_v2": {"num_experts_per_tok": 2}, "dots3_note_text": {"head_dim": 24},
    "dots3_note": {"vision_config": {"adapter_out_dim": 64}, "audio_config": {"adapter_out_dim": 64}},
    "dots1": {"n_routed_experts": 5, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "flint": {"mlp_only_layers": [0]},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 32,
                    "pad_token_id": 0},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 5, "moe_topk": 2},
    "inkling2_text": {"unpadded_vocab_size": 90}, "inkling2_loop_text": {"unpadded_vocab_size": 90},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8, "use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention"], "num_hidden_layers": 3},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
                       "indexer_compress_ratio": 4, "hc_lowrank": 8},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
