"""GLM-4-MoE (GLM-4.5, 4.6, 4.7): biases of q, k and v, norms of heads in some sizes, half of each head rotated, sigmoid routers
with groups and a correction bias, shared experts beside the chosen ones, the first layers dense."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from checkpoint.families.base import Family
from checkpoint.families.geometry import Geometry, known_config, refuse_options, require_packed, rotary_of, shared_keys


@dataclass(frozen=True)
class Glm4Moe(Family):
    model_type: str = "glm4_moe"
    architecture: str | None = "Glm4MoeForCausalLM"
    runtime_layout: str | None = "compressed-tensors"
    router: str = "sigmoid"

    def geometry(self, file: Path, raw: dict) -> Geometry:
        require_packed(file, raw, "format", "mxfp4-pack-quantized", self.runtime_layout)
        refuse_options(file, [("hidden_act", raw.get("hidden_act", "silu"), "silu")])
        config = known_config(file)
        layers = config.num_hidden_layers
        return Geometry(**shared_keys(config), hybrid_layer_pattern=[0] * layers,
                        moe_layer_freq=[int(i >= config.first_k_dense_replace) for i in range(layers)],
                        intermediate_size=config.intermediate_size, moe_intermediate_size=config.moe_intermediate_size,
                        n_routed_experts=config.n_routed_experts, norm_topk_prob=config.norm_topk_prob,
                        rotary=rotary_of(file, config), partial_rotary_factor=config.rope_parameters["partial_rotary_factor"],
                        head_norms=config.use_qk_norm, attention_biases="qkv" if config.attention_bias else "",
                        n_group=config.n_group, topk_group=config.topk_group,
                        routed_scaling_factor=config.routed_scaling_factor,
                        shared_width=config.moe_intermediate_size * (config.n_shared_experts or 0))
