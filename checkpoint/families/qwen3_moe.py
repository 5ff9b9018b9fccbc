"""Qwen3-MoE: norms of query and key heads, a softmax router, full attention in every layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from checkpoint.families.base import Family
from checkpoint.families.geometry import Geometry, known_config, refuse_options, require_packed, rotary_of, shared_keys


@dataclass(frozen=True)
class Qwen3Moe(Family):
    model_type: str = "qwen3_moe"
    architecture: str | None = "Qwen3MoeForCausalLM"
    runtime_layout: str | None = "compressed-tensors"
    kernels: bool = True

    def geometry(self, file: Path, raw: dict) -> Geometry:
        require_packed(file, raw, "format", "mxfp4-pack-quantized", self.runtime_layout)
        refuse_options(file, [("attention_bias", raw.get("attention_bias", False), False),
                              ("use_sliding_window", raw.get("use_sliding_window", False), False),
                              ("hidden_act", raw.get("hidden_act", "silu"), "silu")])
        config = known_config(file)
        layers, step = config.num_hidden_layers, config.decoder_sparse_step
        sparse = [int(i not in config.mlp_only_layers and config.num_experts > 0 and (i + 1) % step == 0)
                  for i in range(layers)]
        return Geometry(**shared_keys(config) | {"sliding_window": None}, hybrid_layer_pattern=[0] * layers,
                        moe_layer_freq=sparse, intermediate_size=config.intermediate_size,
                        moe_intermediate_size=config.moe_intermediate_size, n_routed_experts=config.num_experts,
                        norm_topk_prob=config.norm_topk_prob, rotary=rotary_of(file, config), head_norms=True)
