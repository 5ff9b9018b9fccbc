"""MiMo-V2 (V2.5, V2.5-Pro, and V2-Flash as released): this project's own classes and table of names."""

from __future__ import annotations

from dataclasses import dataclass

from checkpoint.families import published_names
from checkpoint.families.base import Family
from checkpoint.families.published_names import Published
from mxfp4.format import BLOCK_SIZE


@dataclass(frozen=True)
class MiMoV2(Family):
    model_type: str = "mimo_v2"
    architecture: str | None = "MiMoV2ForCausalLM"
    layouts: tuple[str, ...] = ("native", "hf-fp8", "compressed-tensors", "bf16")
    runtime_layout: str | None = "native"
    kernels: bool = True
    router: str = "sigmoid"
    sinks: str | None = "attention_sink_bias"

    def published(self, config) -> Published:
        return published_names.of_mimo(config)

    def refuse(self, layout: str, config) -> None:
        for key in ("hidden_size", "moe_intermediate_size"):
            if getattr(config, key) % BLOCK_SIZE:
                raise ValueError(f"{key}={getattr(config, key)}: expected a multiple of the MXFP4 block size {BLOCK_SIZE}")
        if layout in ("hf-fp8", "compressed-tensors"):
            _refuse_flash(layout, config)


def _refuse_flash(layout: str, config) -> None:
    """What transformers' own mimo_v2_flash class cannot express."""
    checks = (
        (config.swa_num_key_value_heads == 2 * config.num_key_value_heads or not any(config.hybrid_layer_pattern),
         f"window layers must have twice the key heads of full layers, and have {config.swa_num_key_value_heads} beside "
         f"{config.num_key_value_heads}"),
        (config.swa_num_attention_heads == config.num_attention_heads, "one number of query heads in all layers"),
        ((config.swa_head_dim, config.swa_v_head_dim) == (config.head_dim, config.v_head_dim), "one head width in all layers"),
        (not config.add_full_attention_sink_bias, "no sinks in full layers"),
        (config.add_swa_attention_sink_bias or not any(config.hybrid_layer_pattern), "sinks in every window layer"),
        (not config.attention_bias, "no attention bias"),
    )
    for holds, reason in checks:
        if not holds:
            raise ValueError(f"export.layout={layout}: its client is transformers' mimo_v2_flash class, which needs: {reason}")
