"""Qwen3-MoE: norms of query and key heads, a softmax router, full attention in every layer."""

from __future__ import annotations

from dataclasses import dataclass

from checkpoint.families.base import Family


@dataclass(frozen=True)
class Qwen3Moe(Family):
    model_type: str = "qwen3_moe"
    architecture: str | None = "Qwen3MoeForCausalLM"
    runtime_layout: str | None = "compressed-tensors"
    head_norms: bool = True
