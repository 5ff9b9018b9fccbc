"""Mixtral in compressed-tensors form: Llama's attention, a softmax router, experts called w1 (gate), w3 (up) and w2 (down)."""

from __future__ import annotations

from pathlib import Path

from runtime_ref.checkpoints.families.base import Geometry, _known_config, _refuse, _rotary, _section, _shared, _SplitAttention
from runtime_ref.checkpoints.host_weights import DecodedCache, Moe

_PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def mixtral_geometry(file: Path, raw: dict) -> Geometry:
    _section(file, raw, "format", "mxfp4-pack-quantized", "compressed-tensors")
    _refuse(file, [("hidden_act", raw.get("hidden_act", "silu"), "silu")])
    config = _known_config(file)
    layers, windowed = config.num_hidden_layers, config.sliding_window is not None
    return Geometry(**_shared(config), hybrid_layer_pattern=[int(windowed)] * layers, moe_layer_freq=[1] * layers,
                    intermediate_size=config.intermediate_size, moe_intermediate_size=config.intermediate_size,
                    n_routed_experts=config.num_local_experts, norm_topk_prob=True, rotary=_rotary(file, config))


class MixtralReader(_SplitAttention):
    """Mixtral in the compressed-tensors layout."""

    def _moe(self, prefix: str, index: int, cache: DecodedCache) -> Moe:
        found = super()._moe(prefix.removesuffix("mlp") + "block_sparse_moe", index, cache)
        found.scores = "softmax"
        return found

    def _correction(self, prefix: str) -> None:
        return None

    def _packed(self, name: str, own: slice, *, down: bool):
        H, inner = self.config.hidden_size, self.config.moe_intermediate_size
        prefix, part, leaf = name.rsplit(".", 2)
        name = f"{prefix}.{_PARTS[part]}.{leaf}"
        names = name + "_packed", name + "_scale"
        return self.cut_packed(names, *(self.files.read(n) for n in names), (H, inner) if down else (inner, H), own, down=down)
