"""gpt-oss: experts published fused and packed; biases everywhere, sinks on every layer, a clamped SwiGLU with alpha."""

from __future__ import annotations

from dataclasses import dataclass

from checkpoint.families.base import Family


@dataclass(frozen=True)
class GptOss(Family):
    model_type: str = "gpt_oss"
    architecture: str | None = "GptOssForCausalLM"
    layouts: tuple[str, ...] = ("gpt-oss", "bf16")
    runtime_layout: str | None = "gpt-oss"
    router: str = "softmax of the chosen"
    biases: bool = True
    sinks: str | None = "sinks"
    gate: str = "router"
