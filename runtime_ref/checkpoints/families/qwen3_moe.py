"""Qwen3-MoE in compressed-tensors form."""

from __future__ import annotations

from pathlib import Path

from runtime_ref.checkpoints.families.base import Geometry, _known_config, _refuse, _rotary, _section, _shared, _SplitAttention
from runtime_ref.checkpoints.host_weights import Attention, DecodedCache, Moe


def qwen3_geometry(file: Path, raw: dict) -> Geometry:
    _section(file, raw, "format", "mxfp4-pack-quantized", "compressed-tensors")
    _refuse(file, [("attention_bias", raw.get("attention_bias", False), False),
                   ("use_sliding_window", raw.get("use_sliding_window", False), False),
                   ("hidden_act", raw.get("hidden_act", "silu"), "silu")])
    config = _known_config(file)
    layers, step = config.num_hidden_layers, config.decoder_sparse_step
    return Geometry(**_shared(config) | {"sliding_window": None}, hybrid_layer_pattern=[0] * layers,
                    moe_layer_freq=[int(i not in config.mlp_only_layers and config.num_experts > 0 and (i + 1) % step == 0)
                                    for i in range(layers)],
                    intermediate_size=config.intermediate_size, moe_intermediate_size=config.moe_intermediate_size,
                    n_routed_experts=config.num_experts, norm_topk_prob=config.norm_topk_prob, rotary=_rotary(file, config))


class Qwen3Reader(_SplitAttention):
    """Qwen3-MoE in the compressed-tensors layout."""

    def _attention(self, prefix: str, index: int) -> Attention:
        found, D = super()._attention(prefix, index), self.config.head_dim
        found.q_norm, found.k_norm = (self.vector(f"{prefix}.{n}_norm.weight", D) for n in "qk")
        return found

    def _moe(self, prefix: str, index: int, cache: DecodedCache) -> Moe:
        found = super()._moe(prefix, index, cache)
        found.scores = "softmax"
        return found

    def _correction(self, prefix: str) -> None:
        return None

    def _packed(self, name: str, own: slice, *, down: bool):
        H, inner = self.config.hidden_size, self.config.moe_intermediate_size
        names = name + "_packed", name + "_scale"
        return self.cut_packed(names, *(self.files.read(n) for n in names), (H, inner) if down else (inner, H), own, down=down)
