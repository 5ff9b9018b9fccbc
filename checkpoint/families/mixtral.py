"""Mixtral: Llama's attention, experts called w1, w3, w2 within block_sparse_moe, a softmax router."""

from __future__ import annotations

from dataclasses import dataclass

from checkpoint.families.base import Family


@dataclass(frozen=True)
class Mixtral(Family):
    model_type: str = "mixtral"
    architecture: str | None = "MixtralForCausalLM"
    runtime_layout: str | None = "compressed-tensors"
    moe: str = "block_sparse_moe"
    parts: tuple[str, str, str] = ("w1", "w3", "w2")
