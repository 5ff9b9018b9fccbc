"""Mixtral: Llama's attention, experts called w1, w3, w2 within block_sparse_moe, a softmax router."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from checkpoint.families.base import Family
from checkpoint.families.geometry import Geometry, known_config, refuse_options, require_packed, rotary_of, shared_keys


@dataclass(frozen=True)
class Mixtral(Family):
    model_type: str = "mixtral"
    architecture: str | None = "MixtralForCausalLM"
    runtime_layout: str | None = "compressed-tensors"
    kernels: bool = True
    moe: str = "block_sparse_moe"
    parts: tuple[str, str, str] = ("w1", "w3", "w2")

    def geometry(self, file: Path, raw: dict) -> Geometry:
        require_packed(file, raw, "format", "mxfp4-pack-quantized", self.runtime_layout)
        refuse_options(file, [("hidden_act", raw.get("hidden_act", "silu"), "silu")])
        config = known_config(file)
        layers, windowed = config.num_hidden_layers, config.sliding_window is not None
        return Geometry(**shared_keys(config), hybrid_layer_pattern=[int(windowed)] * layers, moe_layer_freq=[1] * layers,
                        intermediate_size=config.intermediate_size, moe_intermediate_size=config.intermediate_size,
                        n_routed_experts=config.num_local_experts, norm_topk_prob=True, rotary=rotary_of(file, config))
