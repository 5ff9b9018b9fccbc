"""gpt-oss in its published MXFP4 form."""

from __future__ import annotations

from pathlib import Path

import torch

from runtime_ref.checkpoints.families.base import (
    CLAMP_ALPHA,
    Geometry,
    _known_config,
    _refuse,
    _rotary,
    _section,
    _shared,
    _SplitAttention,
)
from runtime_ref.checkpoints.host_weights import Attention, DecodedCache, ExpertBiases, Experts, Moe, span_of


def gpt_oss_geometry(file: Path, raw: dict) -> Geometry:
    _section(file, raw, "quant_method", "mxfp4", "gpt-oss")
    _refuse(file, [("hidden_act", raw.get("hidden_act", "silu"), "silu")])
    config = _known_config(file)
    return Geometry(**_shared(config), hybrid_layer_pattern=[int(t == "sliding_attention") for t in config.layer_types],
                    moe_layer_freq=[1] * config.num_hidden_layers, intermediate_size=config.intermediate_size,
                    moe_intermediate_size=config.intermediate_size, n_routed_experts=config.num_local_experts,
                    norm_topk_prob=True, rotary=_rotary(file, config),
                    clamp=(float(config.swiglu_limit), float(getattr(config, "swiglu_alpha", CLAMP_ALPHA))))


class GptOssReader(_SplitAttention):
    """gpt-oss: fused blocks and scales, biases."""

    def _attention(self, prefix: str, index: int) -> Attention:
        found = super()._attention(prefix, index)
        heads, keys, D, V = self._sizes()
        own_q, own_k = self.own_heads(heads, keys)
        q, k, v = (self.vector(f"{prefix}.{n}_proj.bias", size * width).view(size, 1, width)[own] for n, size, width, own in (
            ("q", heads, D, own_q), ("k", keys, D, own_k), ("v", keys, V, own_k)))
        found.qk_bias, found.v_bias = torch.cat((q, k)), v.contiguous()
        if self.ranks.rank == 0:
            found.o_bias = self.vector(f"{prefix}.o_proj.bias", self.config.hidden_size)
        return found

    def _sink(self, prefix: str, heads: int) -> torch.Tensor:
        return self.vector(f"{prefix}.sinks", heads)

    def _moe(self, prefix: str, index: int, cache: DecodedCache) -> Moe:
        config, prefix_of = self.config, f"{prefix}.experts."
        H, inner, E = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
        parts = self.ranks.part(inner)
        own = span_of(parts, inner)
        both, down = self._blocks(prefix_of + "gate_up_proj", E), self._blocks(prefix_of + "down_proj", E)
        experts = []
        kinds = {"gate": ("gate_up", both, slice(0, None, 2)), "up": ("gate_up", both, slice(1, None, 2)),
                 "down": ("down", down, slice(None))}
        for e in range(E):
            experts.append({})
            for kind, (fused, held, rows) in kinds.items():
                names = tuple(f"{prefix_of}{fused}_proj_{n}[{e}]" for n in ("blocks", "scales"))
                shape = (H, inner) if kind == "down" else (inner, H)
                experts[e][kind] = self.cut_packed(names, *(t[e, rows] for t in held), shape, own, down=kind == "down")
        count = parts.stop - parts.start
        bias = self.matrix(prefix_of + "gate_up_proj_bias", (E, 2 * inner)).view(E, inner, 2)[:, own]
        gate_up = bias.unflatten(1, (count, -1)).transpose(2, 3).flatten(2)[:, :, None].contiguous()
        down_bias = self.matrix(prefix_of + "down_proj_bias", (E, H)) if self.ranks.rank == 0 else None
        return Moe(self.matrix(f"{prefix}.router.weight", (E, H)).T[None].contiguous(), None,
                   Experts(experts, count, cache, index, ExpertBiases(gate_up, down_bias), config.clamp),
                   "softmax of the chosen", self.vector(f"{prefix}.router.bias", E))

    def _blocks(self, name: str, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [E, out, in / 2] and scales [E, out, in / 32] of a fused tensor."""
        blocks, scales = self.files.read(name + "_blocks"), self.files.read(name + "_scales")
        if blocks.ndim != 4 or scales.ndim != 3 or blocks.shape[0] != experts or scales.shape[0] != experts:
            raise ValueError(f"{self.files.folder}: {name}_blocks {list(blocks.shape)} and _scales {list(scales.shape)}, "
                             f"expected [{experts}, out, in / 32, 16] and [{experts}, out, in / 32]")
        return blocks.flatten(2), scales
