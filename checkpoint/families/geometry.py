"""The geometry of a model that the runtime runs, in the words of MiMo-V2's configuration, and how it is read from config.json.

What a folder may say and the runtime does not run is refused by name (`NotHeld`). Rejected: converting such folders to the
native layout first (a second checkpoint on disk, and one more place where bytes could change).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CLAMP_ALPHA = 1.702  # of gpt-oss's SwiGLU where the configuration does not say
# Rotary extensions whose frequencies do not depend on the length of the text.
FIXED_ROTARY = ("linear", "yarn", "llama3")


class NotHeld(ValueError):
    """A folder that this runtime does not run: why, and the nearest thing that it does."""


@dataclass
class Geometry:
    """The configuration of a model without a MiMo-V2 configuration; names and meanings are those of `MiMoV2Config`.

    Attributes:
        rotary: (inverse frequencies or None for powers of rope_theta, factor of cosines and sines).
        head_norms: norms of each query and key head. attention_biases: which of the projections q, k, v, o have one.
        shared_width: rows of the gate of the shared experts, all of them together; 0: none.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hybrid_layer_pattern: list[int]
    moe_layer_freq: list[int]
    sliding_window: int | None
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    layernorm_epsilon: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope_theta: float
    rotary: tuple[tuple[float, ...] | None, float]
    clamp: tuple[float, float] | None = None
    head_norms: bool = False
    attention_biases: str = ""
    shared_width: int = 0
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float | None = None
    partial_rotary_factor: float = 1.0
    attention_value_scale: float | None = None
    add_full_attention_sink_bias: bool = False
    add_swa_attention_sink_bias: bool = False

    @property
    def v_head_dim(self) -> int:
        return self.head_dim

    def __getattr__(self, name: str):
        """Window layers have the heads and the rotation of full ones: swa_head_dim is head_dim."""
        if not name.startswith("swa_"):
            raise AttributeError(name)
        return getattr(self, name.removeprefix("swa_"))


def known_config(file: Path):
    """The folder's configuration as transformers reads it (defaults filled in), without its quantization section."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(file.parent))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: {str(error).splitlines()[0]}") from None


def rotary_of(file: Path, config) -> tuple[tuple[float, ...] | None, float]:
    """Inverse frequencies and factor; extensions by transformers' own formulas, which the models were trained with."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = config.rope_parameters.get("rope_type", "default")
    if kind == "default":
        return None, 1.0
    if kind not in FIXED_ROTARY:
        raise NotHeld(f"{file}: rope_parameters.rope_type: {kind!r}, expected default, {', '.join(FIXED_ROTARY)}")
    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    return tuple(frequencies.tolist()), float(scaling)


def refuse_options(file: Path, options: list[tuple[str, object, object]]) -> None:
    """NotHeld for the first (name, value, expected) that differs."""
    for name, value, expected in options:
        if value != expected:
            raise NotHeld(f"{file}: {name}: {value!r}, expected {expected!r} (this runtime runs nothing else)")


def require_packed(file: Path, raw: dict, key: str, expected: str, layout: str) -> None:
    """Refuses a folder whose experts are not packed, or otherwise.

    Raises:
        NotHeld.
    """
    section = raw.get("quantization_config")
    if not isinstance(section, dict) or key not in section:
        raise NotHeld(f"{file}: no quantization_config.{key}, expected {expected!r}: the experts are not packed as MXFP4; "
                      f"export/to_hf.py RECIPE --layout {layout} writes a folder that this runtime runs")
    refuse_options(file, [(f"quantization_config.{key}", section[key], expected)])


def shared_keys(config) -> dict:
    return {key: getattr(config, key) for key in (
        "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "num_experts_per_tok", "max_position_embeddings", "tie_word_embeddings")} | {
        "sliding_window": getattr(config, "sliding_window", None),
        "layernorm_epsilon": config.rms_norm_eps, "rope_theta": config.rope_parameters["rope_theta"],
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads}
