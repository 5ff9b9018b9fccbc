"""Readers of other models' folders than MiMo-V2's: the tensors of one rank, in the words of `host_weights.py`.

Codes and scales go from the file to the packed experts as they are, whatever their container is called. A family whose experts
are published one by one needs no reader of its own: `checkpoint/families` says how its tensors are called and what it has.
"""

from __future__ import annotations

from pathlib import Path

import torch

from checkpoint.families.geometry import Geometry
from checkpoint.families.registry import FAMILIES
from checkpoint.tensor_files import TensorFiles
from runtime_ref.checkpoints.folder import read_geometry
from runtime_ref.checkpoints.host_weights import (
    Attention,
    DecodedCache,
    ExpertBiases,
    Experts,
    Moe,
    Reader,
    span_of,
)
from runtime_ref.core.tensor_parallel import Ranks


def open_folder(folder: str | Path) -> tuple[object, type[Reader]]:
    """Configuration and reader of an exported folder."""
    config, raw = read_geometry(folder)
    return config, {"native": Reader, "gpt-oss": GptOssReader}.get(FAMILIES[raw["model_type"]].runtime_layout, FamilyReader)


class FamilyReader(Reader):
    """A family of one attention geometry on all layers, in compressed-tensors form: separate q, k, v projections, experts one
    by one. What else it has, its `Family` says."""

    def __init__(self, files: TensorFiles, config: Geometry, ranks: Ranks):
        super().__init__(files, config, ranks)
        self.family = FAMILIES[config.model_type]

    def _sizes(self) -> tuple[int, int, int, int]:
        config = self.config
        return config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.head_dim

    def _attention(self, prefix: str, index: int) -> Attention:
        heads, keys, D, V = self._sizes()
        qkv = [self.matrix(f"{prefix}.{n}_proj.weight", (size, self.config.hidden_size))
               for n, size in zip("qkv", (heads * D, keys * D, keys * V), strict=True)]
        window = self.config.sliding_window if self.config.hybrid_layer_pattern[index] else None
        sink = self.vector(f"{prefix}.{self.family.sinks}", heads) if self.family.sinks else None
        found = self.cut_attention(prefix, qkv, self._sizes(), sink, window, None)
        if self.config.head_norms:
            found.q_norm, found.k_norm = (self.vector(f"{prefix}.{n}_norm.weight", D) for n in "qk")
        if "q" in self.config.attention_biases:
            own_q, own_k = self.own_heads(heads, keys)
            parts = ("q", heads, D, own_q), ("k", keys, D, own_k), ("v", keys, V, own_k)
            q, k, v = (self.vector(f"{prefix}.{n}_proj.bias", size * width).view(size, 1, width)[own]
                       for n, size, width, own in parts)
            found.qk_bias, found.v_bias = torch.cat((q, k)), v.contiguous()
        if "o" in self.config.attention_biases and self.ranks.rank == 0:
            found.o_bias = self.vector(f"{prefix}.o_proj.bias", self.config.hidden_size)
        return found

    def _moe(self, prefix: str, index: int, cache: DecodedCache) -> Moe:
        prefix = f"{prefix.rpartition('.')[0]}.{self.family.moe}"
        found = super()._moe(prefix, index, cache)
        found.scores = self.family.router
        if self.config.shared_width:
            found.shared = self._dense(f"{prefix}.shared_experts", self.config.shared_width, self.config.moe_intermediate_size)
        return found

    def _correction(self, prefix: str) -> torch.Tensor | None:
        return super()._correction(prefix) if self.family.router == "sigmoid" else None

    def _packed(self, name: str, own: slice, *, down: bool):
        H, inner = self.config.hidden_size, self.config.moe_intermediate_size
        prefix, expert, part = name.removesuffix("_proj.weight").rsplit(".", 2)
        name = self.family.expert_name(prefix.removesuffix(".experts"), int(expert), part)
        names = name + "_packed", name + "_scale"
        return self.cut_packed(names, *(self.files.read(n) for n in names), (H, inner) if down else (inner, H), own, down=down)


class GptOssReader(FamilyReader):
    """gpt-oss: fused blocks and scales, biases of router and experts."""

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
