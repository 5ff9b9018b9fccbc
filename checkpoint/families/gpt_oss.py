"""gpt-oss: experts published fused and packed, gate and up rows alternating; biases everywhere, sinks on every layer, a clamped
SwiGLU with alpha, softmax of the chosen experts, rotary extension (yarn)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from checkpoint.families.base import Family
from checkpoint.families.geometry import (
    CLAMP_ALPHA,
    Geometry,
    known_config,
    refuse_options,
    require_packed,
    rotary_of,
    shared_keys,
)


@dataclass(frozen=True)
class GptOss(Family):
    model_type: str = "gpt_oss"
    architecture: str | None = "GptOssForCausalLM"
    layouts: tuple[str, ...] = ("gpt-oss", "bf16")
    runtime_layout: str | None = "gpt-oss"
    router: str = "softmax of the chosen"
    sinks: str | None = "sinks"
    gate: str = "router"

    def geometry(self, file: Path, raw: dict) -> Geometry:
        require_packed(file, raw, "quant_method", "mxfp4", self.runtime_layout)
        refuse_options(file, [("hidden_act", raw.get("hidden_act", "silu"), "silu")])
        config = known_config(file)
        return Geometry(**shared_keys(config), hybrid_layer_pattern=[int(t == "sliding_attention") for t in config.layer_types],
                        moe_layer_freq=[1] * config.num_hidden_layers, intermediate_size=config.intermediate_size,
                        moe_intermediate_size=config.intermediate_size, n_routed_experts=config.num_local_experts,
                        norm_topk_prob=True, rotary=rotary_of(file, config), attention_biases="qkvo",
                        clamp=(float(config.swiglu_limit), float(getattr(config, "swiglu_alpha", CLAMP_ALPHA))))
