"""An exported folder -> one rank's weights, in the form that the ops of `backends/torch/ops.py` take.

Here: the native layout of MiMo-V2. What other models' folders look like is in `readers.py`.

Experts stay packed: their codes and scales are the source of truth and are never encoded again. What the torch backend
multiplies is decoded from them, expert by expert, and kept in a bounded cache (decoding at every step costs more than the
product itself on a CPU; a limit of 0 bytes decodes every time and gives the same bits).

Everything else is held in float32, decoded once: BF16 exactly, FP8 by its 128 x 128 blocks, whose grid restarts with each
chunk of a fused qkv. In float32 because CPUs multiply it as fast as bf16 at eight rows, without rounding in between.

Files are memory-mapped and each rank copies only its own rows. Forms (parts: `core/tensor_parallel.py`; own: this rank's):

    queries and keys  [own query heads + own key heads, H, D]     values  [own key heads, H, V]
    column-parallel   [own parts, K, N / parts]                   (gate and up columns of a part side by side)
    row-parallel      [own parts, K / parts, N]

always with the reduction dimension first, the layout in which a CPU's batched products run fastest at eight rows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from checkpoint.fp8 import dequantize_fp8
from checkpoint.tensor_files import TensorFiles
from modeling.configuration_mimo_v2 import MiMoV2Config
from modeling.names import qkv_rows
from mxfp4 import BLOCK_SIZE, dequantize
from runtime_ref.core.tensor_parallel import Ranks, shares

DECODED_BYTES = 4 << 30


@dataclass
class Attention:
    """Weights and geometry of one layer's attention on this rank."""

    window: int | None
    qk: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor
    sink: torch.Tensor | None  # [own query heads]
    query_heads: int
    key_heads: int
    qk_dim: int
    v_dim: int
    value_scale: float | None
    q_norm: torch.Tensor | None = None  # [D], of each query head (Qwen3)
    k_norm: torch.Tensor | None = None
    qk_bias: torch.Tensor | None = None  # [own query heads + own key heads, 1, D] (gpt-oss)
    v_bias: torch.Tensor | None = None  # [own key heads, 1, V]
    o_bias: torch.Tensor | None = None  # [H], on the rank that has the first part


@dataclass
class Dense:
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass
class Packed:
    """Codes and scales of one expert matrix on this rank; `cut` is what remains to be cut off after decoding."""

    codes: torch.Tensor
    scales: torch.Tensor
    cut: slice | None = None

    def decode(self) -> torch.Tensor:
        w = dequantize(self.codes, self.scales, dtype=torch.float32)
        return w if self.cut is None else w[:, self.cut]

    @property
    def bytes(self) -> int:
        return self.codes.numel() + self.scales.numel()


@dataclass
class ExpertBiases:
    """Of all experts of a layer (gpt-oss): gate_up [E, parts, 1, 2 I / parts]; down [E, H] on the rank with the first part."""

    gate_up: torch.Tensor
    down: torch.Tensor | None


class Experts:
    """The routed experts of a layer: packed, with decoded copies of those used last.

    `biases` and `clamp` (limit, alpha) are gpt-oss's; see `model.gated`.
    """

    def __init__(self, matrices: list[dict[str, Packed]], parts: int, cache: DecodedCache, layer: int,
                 biases: ExpertBiases | None = None, clamp: tuple[float, float] | None = None):
        self.matrices, self.parts, self.cache, self.layer = matrices, parts, cache, layer
        self.biases, self.clamp = biases, clamp

    def decoded(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 gate-up [parts, H, 2 I / parts] and down [parts, I / parts, H] of this rank."""
        return self.cache.get((self.layer, expert), lambda: self._decode(expert))

    def _decode(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up, down = (self.matrices[expert][kind].decode() for kind in ("gate", "up", "down"))
        gate_up = torch.cat((gate.unflatten(0, (self.parts, -1)), up.unflatten(0, (self.parts, -1))), dim=1)
        return gate_up.transpose(1, 2).contiguous(), down.T.unflatten(0, (self.parts, -1)).contiguous()

    @property
    def count(self) -> int:
        return len(self.matrices)

    @property
    def bytes(self) -> int:
        return sum(p.bytes for matrix in self.matrices for p in matrix.values())


class DecodedCache:
    """Decoded experts of all layers, least recently used first, up to `limit` bytes."""

    def __init__(self, limit: int = DECODED_BYTES):
        self.limit, self.used = limit, 0
        self._held: OrderedDict[tuple[int, int], tuple[torch.Tensor, ...]] = OrderedDict()

    def get(self, key: tuple[int, int], decode: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        found = self._held.get(key)
        if found is not None:
            if self.used * 2 > self.limit:  # order matters only when something may have to go
                self._held.move_to_end(key)
            return found
        found = decode()
        size = sum(t.numel() * t.element_size() for t in found)
        if size <= self.limit:
            while self.used + size > self.limit:
                self.used -= sum(t.numel() * t.element_size() for t in self._held.popitem(last=False)[1])
            self._held[key] = found
            self.used += size
        return found


@dataclass
class Moe:
    router: torch.Tensor  # [1, H, E]
    correction: torch.Tensor | None  # [E], of sigmoid scores
    experts: Experts
    scores: str = "sigmoid"  # or "softmax" over all experts, or "softmax of the chosen"
    bias: torch.Tensor | None = None  # [E], of the router's product
    shared: Dense | None = None  # cut into as many parts as the experts


@dataclass
class Layer:
    attention: Attention
    input_norm: torch.Tensor
    post_norm: torch.Tensor
    mlp: Dense | Moe


@dataclass
class TargetWeights:
    config: MiMoV2Config  # or families.Geometry
    ranks: Ranks
    embed: torch.Tensor  # [vocabulary, H] float32
    layers: list[Layer]
    norm: torch.Tensor
    head: torch.Tensor  # [own parts, H, vocabulary / parts]
    decoded: DecodedCache = field(repr=False, default=None)

    @property
    def packed_bytes(self) -> int:
        return sum(layer.mlp.experts.bytes for layer in self.layers if isinstance(layer.mlp, Moe))


class Reader:
    """Reads, decodes and cuts the tensors of one rank."""


    def __init__(self, files: TensorFiles, config: MiMoV2Config, ranks: Ranks):
        self.files, self.config, self.ranks, self.names = files, config, ranks, set(files)

    def matrix(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        """float32 copy of a BF16, F32 or FP8 matrix."""
        raw = self.files.read(name)
        if tuple(raw.shape) != shape:
            raise ValueError(f"{self.files.folder}: {name}: shape {list(raw.shape)}, expected {list(shape)}")
        if raw.dtype == torch.float8_e4m3fn:
            return dequantize_fp8(name, raw, self.files.read(name + "_scale_inv"), self.config)
        if raw.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"{self.files.folder}: {name}: dtype {raw.dtype}, expected BF16, F32 or FP8 E4M3")
        return raw.to(torch.float32, copy=True)

    def vector(self, name: str, size: int) -> torch.Tensor:
        raw = self.files.read(name)
        if tuple(raw.shape) != (size,):
            raise ValueError(f"{self.files.folder}: {name}: shape {list(raw.shape)}, expected [{size}]")
        return raw.to(torch.float32, copy=True)

    def columns_of(self, w: torch.Tensor, size: int | None = None) -> torch.Tensor:
        """Own parts of the output rows of w [N, K], cut into `shares(size)` (of N): [own, K, N / parts]."""
        size = size or w.shape[0]
        return w.unflatten(0, (shares(size), -1))[self.ranks.part(size)].transpose(1, 2).contiguous()

    def rows_of(self, w: torch.Tensor, size: int) -> torch.Tensor:
        """Own parts of the reduction dimension of w [N, K], cut into `shares(size)`: [own, K / parts, N]."""
        return w.T.unflatten(0, (shares(size), -1))[self.ranks.part(size)].contiguous()

    def layer(self, index: int, cache: DecodedCache) -> Layer:
        config, prefix = self.config, f"model.layers.{index}"
        norms = [self.vector(f"{prefix}.{n}.weight", config.hidden_size)
                 for n in ("input_layernorm", "post_attention_layernorm")]
        mlp = self._moe(f"{prefix}.mlp", index, cache) if config.moe_layer_freq[index] else self._dense(
            f"{prefix}.mlp", config.intermediate_size, config.intermediate_size)
        return Layer(self._attention(f"{prefix}.self_attn", index), *norms, mlp)

    def _attention(self, prefix: str, index: int) -> Attention:
        config = self.config
        kind = "swa_" if config.hybrid_layer_pattern[index] else ""
        heads, keys, qk_dim, v_dim = (getattr(config, kind + k) for k in
                                      ("num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim"))
        q, k, v = self._projections(prefix, index, (heads * qk_dim, keys * qk_dim, keys * v_dim))
        sinks = config.add_swa_attention_sink_bias if kind else config.add_full_attention_sink_bias
        sink = self.vector(f"{prefix}.attention_sink_bias", heads) if sinks else None
        return self.cut_attention(prefix, (q, k, v), (heads, keys, qk_dim, v_dim), sink,
                                  config.sliding_window if kind else None, config.attention_value_scale)

    def own_heads(self, heads: int, keys: int) -> tuple[slice, slice]:
        """This rank's query heads, and the key heads that they need.

        Raises:
            ValueError: they cannot be cut evenly.
        """
        own_q = span_of(self.ranks.part(heads), heads)
        group = heads // keys
        own_k = slice(own_q.start // group, (own_q.stop - 1) // group + 1)
        if own_k.stop - own_k.start > 1 and (own_q.start % group or own_q.stop % group):
            raise ValueError(f"{self.ranks.count} ranks: {heads} query heads over {keys} key heads cannot be cut evenly")
        return own_q, own_k

    def cut_attention(self, prefix: str, qkv, sizes: tuple[int, int, int, int], sink, window, value_scale) -> Attention:
        """One layer's attention of whole projections q, k, v [heads * width, H] (sizes: heads, key heads, D, V)."""
        heads, keys, qk_dim, v_dim = sizes
        own_q, own_k = self.own_heads(heads, keys)
        q, k, v = (t.unflatten(0, (-1, dim))[own]
                   for t, dim, own in zip(qkv, (qk_dim, qk_dim, v_dim), (own_q, own_k, own_k), strict=True))
        o = self.rows_of(self.matrix(f"{prefix}.o_proj.weight", (self.config.hidden_size, heads * v_dim)), heads)
        return Attention(window, torch.cat((q, k)).transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous(), o,
                         None if sink is None else sink[own_q], own_q.stop - own_q.start, own_k.stop - own_k.start, qk_dim,
                         v_dim, value_scale)

    def _projections(self, prefix: str, index: int, sizes: tuple[int, int, int]) -> tuple[torch.Tensor, ...]:
        """q, k, v, whichever of the two forms the folder has (exporters split a fused qkv that is not FP8)."""
        H = self.config.hidden_size
        if f"{prefix}.qkv_proj.weight" not in self.names:
            return tuple(self.matrix(f"{prefix}.{n}_proj.weight", (size, H)) for n, size in zip("qkv", sizes, strict=True))
        fused = self.matrix(f"{prefix}.qkv_proj.weight", (sum(sizes), H))
        rows = qkv_rows(self.config, index)
        return tuple(torch.cat([fused[s] for s in rows[n]]) for n in "qkv")

    def _dense(self, prefix: str, inner: int, cut: int) -> Dense:
        """An MLP of `inner` rows, cut into the parts of a matrix of `cut` rows."""
        H = self.config.hidden_size
        gate, up = (self.columns_of(self.matrix(f"{prefix}.{n}_proj.weight", (inner, H)), cut) for n in ("gate", "up"))
        return Dense(torch.cat((gate, up), dim=2), self.rows_of(self.matrix(f"{prefix}.down_proj.weight", (H, inner)), cut))

    def _moe(self, prefix: str, index: int, cache: DecodedCache) -> Moe:
        config = self.config
        inner, E = config.moe_intermediate_size, config.n_routed_experts
        parts = self.ranks.part(inner)
        own = span_of(parts, inner)
        experts = [{kind: self._packed(f"{prefix}.experts.{e}.{kind}_proj.weight", own, down=kind == "down")
                    for kind in ("gate", "up", "down")} for e in range(E)]
        return Moe(self.matrix(f"{prefix}.gate.weight", (E, config.hidden_size)).T[None].contiguous(),
                   self._correction(prefix),
                   Experts(experts, parts.stop - parts.start, cache, index))

    def _correction(self, prefix: str) -> torch.Tensor | None:
        return self.vector(f"{prefix}.gate.e_score_correction_bias", self.config.n_routed_experts)

    def _packed(self, name: str, own: slice, *, down: bool) -> Packed:
        H, inner = self.config.hidden_size, self.config.moe_intermediate_size
        rows, columns = (H, inner) if down else (inner, H)
        names = name, name + "_scale"
        return self.cut_packed(names, *(self.files.read(n) for n in names), (rows, columns), own, down=down)

    def cut_packed(self, names: tuple[str, str], codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int],
                   own: slice, *, down: bool) -> Packed:
        """This rank's share of an expert matrix: the same bytes, own rows (gate, up) or own columns (down)."""
        rows, columns = shape
        for tensor, width, what in ((codes, columns // 2, names[0]), (scales, columns // BLOCK_SIZE, names[1])):
            if tensor.dtype != torch.uint8 or tuple(tensor.shape) != (rows, width):
                raise ValueError(f"{self.files.folder}: {what}: {tensor.dtype} {list(tensor.shape)}, "
                                 f"expected uint8 {[rows, width]}")
        if not down:
            return Packed(codes[own].clone(), scales[own].clone())
        if own.start % BLOCK_SIZE == 0 and own.stop % BLOCK_SIZE == 0:
            code_cut, scale_cut = (slice(own.start // n, own.stop // n) for n in (2, BLOCK_SIZE))
            return Packed(codes[:, code_cut].clone(), scales[:, scale_cut].clone())
        return Packed(codes.clone(), scales.clone(), own)  # parts narrower than a block


def span_of(parts: slice, size: int) -> slice:
    """The entries of a dimension that a run of parts covers."""
    width = size // shares(size)
    return slice(parts.start * width, parts.stop * width)


