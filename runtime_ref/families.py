"""Folders of other models than MiMo-V2: what their geometry and tensors are, in the words of `weights.py`.

    model_type   layout               what differs from MiMo-V2
    qwen3_moe    compressed-tensors   experts as weight_packed / weight_scale; norms of query and key heads; softmax router
    gpt_oss      gpt-oss              experts as fused blocks / scales, gate and up rows alternating; biases everywhere; SwiGLU
                                      clamped, with alpha; softmax of the chosen; sinks on every layer; rotary extension (yarn)

Each is a geometry (the keys of MiMo-V2's configuration that the engine reads) and a reader of the folder's tensors. Codes and
scales go from the file to the packed experts as they are, whatever their container is called. What a folder may contain and
this runtime does not run is refused by name. Rejected: converting such folders to the native layout first (a second
checkpoint on disk, and one more place where bytes could change).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from modeling.load import TensorFiles
from runtime_ref.weights import (
    Attention,
    DecodedCache,
    ExpertBiases,
    Experts,
    Moe,
    Reader,
    read_config,
    span_of,
)

CLAMP_ALPHA = 1.702  # of gpt-oss's SwiGLU where the configuration does not say
# Rotary extensions whose frequencies do not depend on the length of the text.
FIXED_ROTARY = ("linear", "yarn", "llama3")


class NotHeld(ValueError):
    """A folder that this runtime does not run: why, and the nearest thing that it does."""


@dataclass
class Geometry:
    """The configuration of a model without a MiMo-V2 configuration; names and meanings are those of `MiMoV2Config`.

    `rotary` is (inverse frequencies or None for powers of rope_theta, factor of cosines and sines).
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
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float | None = None
    partial_rotary_factor: float = 1.0
    attention_value_scale: float | None = None
    add_full_attention_sink_bias: bool = False

    @property
    def v_head_dim(self) -> int:
        return self.head_dim


def read_geometry(folder: str | Path) -> tuple[object, dict]:
    """(configuration or geometry, the raw config.json) of an exported folder of any held model.

    Raises:
        ValueError: no folder or config.json. NotHeld: a model or an option that this runtime does not run.
    """
    file = Path(folder) / "config.json"
    if file.is_file():
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            return read_config(folder)
        if not isinstance(raw, dict):
            raise ValueError(f"{file}: {type(raw).__name__}, expected an object")
        kind = raw.get("model_type")
        if kind in _FAMILIES:
            return _FAMILIES[kind][0](file, raw), raw
        if kind != "mimo_v2":
            held = ["mimo_v2 (native layout)", *(f"{kind} ({layout} layout)" for kind, (_, _, layout) in _FAMILIES.items())]
            raise NotHeld(f"{file}: model_type: {kind!r}, expected one of {', '.join(held)}{_nearest(raw)}")
        if raw.get("quantization_config") is None and _unpacked(Path(folder)):
            raise NotHeld(f"{file}: no quantization_config, and the experts are not packed as MXFP4: a trained checkpoint; "
                          "export/to_hf.py RECIPE writes a folder that this runtime runs")
    return read_config(folder)


def _unpacked(folder: Path) -> bool:
    """Whether a folder has experts and no scales of them."""
    try:
        names = [str(name) for name in TensorFiles(folder)]
    except (ValueError, OSError, KeyError, TypeError, SafetensorError):
        return False  # what is wrong with the files is for their reader to say
    return any(".mlp.experts." in n for n in names) and not any(n.endswith("weight_scale") for n in names)


def _nearest(raw: dict) -> str:
    """What to do with a folder of a known model in a layout that is not held."""
    if raw.get("model_type") != "mimo_v2_flash":
        return ""
    section = raw.get("quantization_config")
    method = section.get("quant_method") if isinstance(section, dict) else None
    layout = {"compressed-tensors": "the compressed-tensors", "fp8": "the hf-fp8"}.get(method, "an unpacked")
    return (f"; this is MiMo-V2 in {layout} layout, which transformers runs: export it with --layout native, which holds "
            "the same expert bytes")


def open_folder(folder: str | Path) -> tuple[object, type[Reader]]:
    """Configuration and reader of an exported folder."""
    config, raw = read_geometry(folder)
    return config, Reader if raw["model_type"] == "mimo_v2" else _FAMILIES[raw["model_type"]][1]


def _known_config(file: Path):
    """The folder's configuration as transformers reads it (defaults filled in), without its quantization section."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(file.parent))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: {str(error).splitlines()[0]}") from None


def _rotary(file: Path, config) -> tuple[tuple[float, ...] | None, float]:
    """Inverse frequencies and factor; extensions by transformers' own formulas, which the models were trained with."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = config.rope_parameters.get("rope_type", "default")
    if kind == "default":
        return None, 1.0
    if kind not in FIXED_ROTARY:
        raise NotHeld(f"{file}: rope_parameters.rope_type: {kind!r}, expected default, {', '.join(FIXED_ROTARY)}")
    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    return tuple(frequencies.tolist()), float(scaling)


def _refuse(file: Path, options: list[tuple[str, object, object]]) -> None:
    """NotHeld for the first (name, value, expected) that differs."""
    for name, value, expected in options:
        if value != expected:
            raise NotHeld(f"{file}: {name}: {value!r}, expected {expected!r} (this runtime runs nothing else)")


def _section(file: Path, raw: dict, key: str, expected: str, layout: str) -> None:
    """Refuses a folder whose experts are not packed, or otherwise.

    Raises:
        NotHeld.
    """
    section = raw.get("quantization_config")
    if not isinstance(section, dict) or key not in section:
        raise NotHeld(f"{file}: no quantization_config.{key}, expected {expected!r}: the experts are not packed as MXFP4; "
                      f"export/to_hf.py RECIPE --layout {layout} writes a folder that this runtime runs")
    _refuse(file, [(f"quantization_config.{key}", section[key], expected)])


def _shared(config) -> dict:
    return {key: getattr(config, key) for key in (
        "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "num_experts_per_tok", "max_position_embeddings", "tie_word_embeddings", "sliding_window")} | {
        "layernorm_epsilon": config.rms_norm_eps, "rope_theta": config.rope_parameters["rope_theta"],
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads}


def _qwen3_geometry(file: Path, raw: dict) -> Geometry:
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


def _gpt_oss_geometry(file: Path, raw: dict) -> Geometry:
    _section(file, raw, "quant_method", "mxfp4", "gpt-oss")
    _refuse(file, [("hidden_act", raw.get("hidden_act", "silu"), "silu")])
    config = _known_config(file)
    return Geometry(**_shared(config), hybrid_layer_pattern=[int(t == "sliding_attention") for t in config.layer_types],
                    moe_layer_freq=[1] * config.num_hidden_layers, intermediate_size=config.intermediate_size,
                    moe_intermediate_size=config.intermediate_size, n_routed_experts=config.num_local_experts,
                    norm_topk_prob=True, rotary=_rotary(file, config),
                    clamp=(float(config.swiglu_limit), float(getattr(config, "swiglu_alpha", CLAMP_ALPHA))))


class _SplitAttention(Reader):
    """Separate q, k, v projections of one geometry on all layers."""

    def _sizes(self) -> tuple[int, int, int, int]:
        config = self.config
        return config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.head_dim

    def _attention(self, prefix: str, index: int) -> Attention:
        heads, keys, D, V = self._sizes()
        qkv = [self.matrix(f"{prefix}.{n}_proj.weight", (size, self.config.hidden_size))
               for n, size in zip("qkv", (heads * D, keys * D, keys * V), strict=True)]
        window = self.config.sliding_window if self.config.hybrid_layer_pattern[index] else None
        return self.cut_attention(prefix, qkv, self._sizes(), self._sink(prefix, heads), window, None)

    def _sink(self, prefix: str, heads: int) -> torch.Tensor | None:
        return None


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


_FAMILIES = {"qwen3_moe": (_qwen3_geometry, Qwen3Reader, "compressed-tensors"),
             "gpt_oss": (_gpt_oss_geometry, GptOssReader, "gpt-oss")}
