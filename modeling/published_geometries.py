"""Published geometries, by name: what `--plan` builds on the meta device when there are no weights.

Sources: the config.json files of XiaomiMiMo/MiMo-V2.5-Pro, MiMo-V2.5 (text part) and, for V2-Flash, its model card and
transformers' `mimo_v2_flash` defaults; of other families those of Qwen/Qwen3-30B-A3B, openai/gpt-oss-20b and
openai/gpt-oss-120b (whose geometry is transformers' default one). V2-Flash is published as model_type `mimo_v2_flash` with
split projections; its geometry is a special case of MiMoV2Config.
"""

from __future__ import annotations

import copy
import difflib


def _pattern(layers: int, full: list[int]) -> list[int]:
    return [0 if i in full else 1 for i in range(layers)]


_COMMON = {
    "head_dim": 192, "swa_head_dim": 192, "v_head_dim": 128, "swa_v_head_dim": 128, "sliding_window": 128,
    "add_full_attention_sink_bias": False, "add_swa_attention_sink_bias": True, "partial_rotary_factor": 0.334,
    "swa_rope_theta": 10_000, "intermediate_size": 16384, "moe_intermediate_size": 2048, "num_experts_per_tok": 8,
    "n_shared_experts": None, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 1, "topk_group": 1,
    "norm_topk_prob": True, "routed_scaling_factor": None, "layernorm_epsilon": 1e-5, "vocab_size": 152576,
    "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False,
}
_FLASH = _COMMON | {
    "hidden_size": 4096, "num_hidden_layers": 48, "hybrid_layer_pattern": _pattern(48, [0, *range(5, 48, 6)]),
    "moe_layer_freq": [0] + [1] * 47, "num_attention_heads": 64, "swa_num_attention_heads": 64,
    "num_key_value_heads": 4, "swa_num_key_value_heads": 8, "n_routed_experts": 256, "attention_value_scale": 0.707,
}
_RELEASED = {
    "MiMo-V2-Flash": _FLASH | {"attention_projection_layout": "split", "rope_theta": 5_000_000,
                               "max_position_embeddings": 262144},
    "MiMo-V2.5": _FLASH | {"attention_projection_layout": "fused_qkv", "rope_theta": 10_000_000,
                           "max_position_embeddings": 1048576},
    "MiMo-V2.5-Pro": _COMMON | {
        "hidden_size": 6144, "num_hidden_layers": 70,
        "hybrid_layer_pattern": _pattern(70, [0, 7, 15, 23, 31, 39, 47, 55, 62, 69]),
        "moe_layer_freq": [0] + [1] * 69, "num_attention_heads": 128, "swa_num_attention_heads": 128,
        "num_key_value_heads": 8, "swa_num_key_value_heads": 8, "n_routed_experts": 384, "attention_value_scale": 0.612,
        "attention_projection_layout": "fused_qkv", "rope_theta": 10_000_000, "max_position_embeddings": 1048576,
    },
}
# Other families: model_type, and differences from transformers' defaults.
OTHER_RELEASES = {
    "Qwen3-30B-A3B": ("qwen3_moe", {"num_hidden_layers": 48, "head_dim": 128, "norm_topk_prob": True,
                                    "max_position_embeddings": 40960}),
    "Qwen3-235B-A22B": ("qwen3_moe", {"num_hidden_layers": 94, "hidden_size": 4096, "intermediate_size": 12288,
                                      "moe_intermediate_size": 1536, "num_attention_heads": 64, "num_key_value_heads": 4,
                                      "head_dim": 128, "norm_topk_prob": True, "max_position_embeddings": 40960}),
    "GLM-4.5-Air": ("glm4_moe", {}),
    "DeepSeek-V3": ("deepseek_v3", {}),
    "gpt-oss-20b": ("gpt_oss", {"num_hidden_layers": 24, "num_local_experts": 32}),
    "gpt-oss-120b": ("gpt_oss", {}),
}
# Multi-token-prediction layers in each release (not part of the decoder).
MTP_LAYERS = 3


def released_config(name: str) -> dict:
    """Keyword arguments of MiMoV2Config for a published model.

    Raises:
        ValueError: unknown name; the nearest known one is given.
    """
    if name not in _RELEASED:
        near = difflib.get_close_matches(name, _RELEASED, n=1, cutoff=0.3)
        raise ValueError(f"model.released: {name!r} is not a known release ({', '.join(_RELEASED)})"
                         f"{f', did you mean {near[0]}?' if near else ''}")
    return copy.deepcopy(_RELEASED[name])
