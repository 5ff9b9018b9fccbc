"""Tensor names: training (fused experts) <-> Hugging Face (one matrix per expert), and the published inventory.

Everything else has the same name in both. The tables:

    mlp.experts.gate_up_proj [E, 2I, H]   <->   mlp.experts.{e}.gate_proj.weight [I, H] (rows 0..I-1 of expert e)
                                                mlp.experts.{e}.up_proj.weight   [I, H] (rows I..2I-1)
    mlp.experts.down_proj    [E, H, I]    <->   mlp.experts.{e}.down_proj.weight [H, I]

    self_attn.qkv_proj.weight, chunks of      <->   self_attn.{q,k,v}_proj.weight (`split_qkv`): the same rows in
    [queries | keys | values] rows                  another order, for clients that know one layout only

`published_tensors` lists every tensor (name, shape, dtype) of a release of a given geometry and precision, from the
configuration alone: what an exporter must write and a verifier must find.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mxfp4 import BLOCK_SIZE

FP8_BLOCK = 128


@dataclass(frozen=True)
class ExpertPart:
    """One published matrix of a fused tensor: `fused[expert, rows]` is the matrix called `name`."""

    name: str
    expert: int
    rows: slice


def expert_parts(name: str, shape) -> list[ExpertPart] | None:
    """The published matrices of the fused tensor `name`, or None if it is not one (it is published under its own name)."""
    if not re.search(r"\.mlp\.experts\.(gate_up_proj|down_proj)$", name):
        return None
    prefix, _, leaf = name.rpartition(".")
    experts, rows = shape[0], shape[1]
    if leaf == "down_proj":
        return [ExpertPart(f"{prefix}.{e}.down_proj.weight", e, slice(0, rows)) for e in range(experts)]
    half = rows // 2
    return [ExpertPart(f"{prefix}.{e}.{kind}_proj.weight", e, slice(start, start + half))
            for e in range(experts) for kind, start in (("gate", 0), ("up", half))]


def fused_name(name: str) -> tuple[str, int, str] | None:
    """(fused name, expert, "gate" | "up" | "down") of a published expert matrix, or None for any other tensor."""
    match = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
    if match is None:
        return None
    leaf = "down_proj" if match[3] == "down" else "gate_up_proj"
    return f"{match[1]}.{leaf}", int(match[2]), match[3]


def qkv_rows(config, layer: int) -> dict[str, list[slice]]:
    """Rows of the fused qkv matrix of a layer that make up its "q", "k" and "v", in order (whatever layout it is in).

    The matrix is `num_key_value_heads` chunks (also in window layers, which may have more key heads), each
    [queries | keys | values] of an equal share of the layer's heads.
    """
    kind = "swa_" if config.hybrid_layer_pattern[layer] else ""
    chunks = config.num_key_value_heads
    keys = getattr(config, f"{kind}num_key_value_heads") // chunks
    sizes = {"q": getattr(config, f"{kind}num_attention_heads") // chunks * getattr(config, f"{kind}head_dim"),
             "k": keys * getattr(config, f"{kind}head_dim"), "v": keys * getattr(config, f"{kind}v_head_dim")}
    rows: dict[str, list[slice]] = {"q": [], "k": [], "v": []}
    start = 0
    for _ in range(chunks):
        for part, size in sizes.items():
            rows[part].append(slice(start, start + size))
            start += size
    return rows


def split_qkv(fused, config, layer: int):
    """(q, k, v) of a fused qkv weight [rows, H] or bias [rows] of decoder layer `layer`; values are copied."""
    rows = qkv_rows(config, layer)
    last = rows["v"][-1].stop
    if fused.shape[0] != last:
        raise ValueError(f"layer {layer}: fused qkv of {fused.shape[0]} rows, expected {last}")
    return tuple(torch.cat([fused[s] for s in rows[part]]) for part in "qkv")


def qkv_scale_rows(name: str, rows: int, config) -> list[int]:
    """Row segments of an FP8 matrix within which its 128-row scale grid runs; it restarts at each.

    Of MiMo-V2: a fused qkv restarts at each of its `num_key_value_heads` chunks; a split k_proj or v_proj at each head.
    """
    if not hasattr(config, "hybrid_layer_pattern"):  # no other family's grid restarts
        return [rows]
    if name.endswith("self_attn.qkv_proj.weight"):
        return [rows // config.num_key_value_heads] * config.num_key_value_heads
    match = re.search(r"layers\.(\d+)\.self_attn\.([kv])_proj\.weight$", name)
    if match:
        swa = config.hybrid_layer_pattern[int(match[1])]
        heads = config.swa_num_key_value_heads if swa else config.num_key_value_heads
        return [rows // heads] * heads
    return [rows]


@dataclass(frozen=True)
class PublishedTensor:
    """A tensor of a release; `dtype` is safetensors' name (U8, F8_E4M3, BF16, F32)."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * {"U8": 1, "F8_E4M3": 1, "BF16": 2, "F32": 4}[self.dtype]


def published_tensors(config, *, experts: str = "mxfp4", dense: str = "fp8", router: str = "F32",
                      mtp_layers: int = 0) -> Iterator[PublishedTensor]:
    """Every tensor of a release.

    Args:
        config: MiMoV2Config.
        experts: "mxfp4" (uint8 codes and scales), "fp8" or "bf16".
        dense: "fp8" (qkv, dense MLP; o_proj is always BF16) or "bf16".
        router: dtype of the router weights, F32 or BF16.
        mtp_layers: multi-token-prediction layers (window attention, dense MLP); the released models have 3.
    """
    H = config.hidden_size
    yield PublishedTensor("model.embed_tokens.weight", (config.vocab_size, H), "BF16")
    if not config.tie_word_embeddings:  # a tied head is the embedding
        yield PublishedTensor("lm_head.weight", (config.vocab_size, H), "BF16")
    yield PublishedTensor("model.norm.weight", (H,), "BF16")
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield PublishedTensor(f"{prefix}.{norm}.weight", (H,), "BF16")
        yield from _attention(config, prefix, bool(config.hybrid_layer_pattern[layer]), dense)
        if not config.moe_layer_freq[layer]:
            yield from _mlp(config, f"{prefix}.mlp", config.intermediate_size, dense)
            continue
        yield PublishedTensor(f"{prefix}.mlp.gate.weight", (config.n_routed_experts, H), router)
        yield PublishedTensor(f"{prefix}.mlp.gate.e_score_correction_bias", (config.n_routed_experts,), "F32")
        for expert in range(config.n_routed_experts):
            yield from _mlp(config, f"{prefix}.mlp.experts.{expert}", config.moe_intermediate_size, experts)
    for layer in range(mtp_layers):
        prefix = f"model.mtp.layers.{layer}"
        for norm in ("enorm", "hnorm", "final_layernorm", "input_layernorm", "pre_mlp_layernorm"):
            yield PublishedTensor(f"{prefix}.{norm}.weight", (H,), "BF16")
        yield PublishedTensor(f"{prefix}.eh_proj.weight", (H, 2 * H), "BF16")
        yield from _attention(config, prefix, True, dense)
        yield from _mlp(config, f"{prefix}.mlp", config.intermediate_size, dense)


def _matrix(name: str, rows: int, columns: int, precision: str, config) -> Iterator[PublishedTensor]:
    if precision == "bf16":
        yield PublishedTensor(name, (rows, columns), "BF16")
    elif precision == "fp8":
        scale_rows = sum(-(-n // FP8_BLOCK) for n in qkv_scale_rows(name, rows, config))
        yield PublishedTensor(name, (rows, columns), "F8_E4M3")
        yield PublishedTensor(name + "_scale_inv", (scale_rows, -(-columns // FP8_BLOCK)), "F32")
    elif precision == "mxfp4":
        yield PublishedTensor(name, (rows, columns // 2), "U8")
        yield PublishedTensor(name + "_scale", (rows, columns // BLOCK_SIZE), "U8")
    else:
        raise ValueError(f"precision {precision!r}: expected bf16, fp8 or mxfp4")


def _mlp(config, prefix: str, inner: int, precision: str) -> Iterator[PublishedTensor]:
    H = config.hidden_size
    yield from _matrix(f"{prefix}.down_proj.weight", H, inner, precision, config)
    yield from _matrix(f"{prefix}.gate_proj.weight", inner, H, precision, config)
    yield from _matrix(f"{prefix}.up_proj.weight", inner, H, precision, config)


def _attention(config, prefix: str, swa: bool, precision: str) -> Iterator[PublishedTensor]:
    kind = "swa_" if swa else ""
    heads, kv = getattr(config, f"{kind}num_attention_heads"), getattr(config, f"{kind}num_key_value_heads")
    qk, v = getattr(config, f"{kind}head_dim"), getattr(config, f"{kind}v_head_dim")
    H, attention = config.hidden_size, f"{prefix}.self_attn"
    if config.attention_projection_layout == "fused_qkv":
        yield from _matrix(f"{attention}.qkv_proj.weight", heads * qk + kv * (qk + v), H, precision, config)
    else:
        for name, rows in (("q", heads * qk), ("k", kv * qk), ("v", kv * v)):
            yield from _matrix(f"{attention}.{name}_proj.weight", rows, H, precision, config)
    yield PublishedTensor(f"{attention}.o_proj.weight", (H, heads * v), "BF16")
    if config.add_swa_attention_sink_bias if swa else config.add_full_attention_sink_bias:
        yield PublishedTensor(f"{attention}.attention_sink_bias", (heads,), "BF16")


def plain_dtype(name: str) -> str:
    """Of everything that is neither packed nor FP8 and has no precision of its own in the base: what config.json says."""
    return "F32" if name.endswith("e_score_correction_bias") else "BF16"
