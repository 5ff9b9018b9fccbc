"""An exported folder -> one rank's weights as the kernels read them: bf16 and FP8 as stored, experts in pages.

Nothing is decoded and nothing is encoded: FP8 matrices keep their bytes, with one row of scales per row of the matrix (the grid
of 128 x 128 blocks restarts inside a fused qkv, so a rank's share has no grid of its own); expert codes and scales are only
moved into pages (`kernels/repack.py`). `host_weights.py` holds the same tensors for the torch backend, decoded to float32.

All tensors of a rank lie in one `Arena`, a single allocation, because the megakernel finds them by 32-bit offsets: its
program is a table of int32. Sizes are known from the configuration (`device_shapes.py`) before anything is read, so loading
never holds more than a layer twice, and a geometry can be filled with random bytes instead (`random_weights`) to be timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint.families.geometry import NotHeld
from checkpoint.families.registry import FAMILIES
from checkpoint.fp8 import require_grid, spread_rows
from checkpoint.tensor_files import TensorFiles
from modeling.configuration_mimo_v2 import MiMoV2Config
from modeling.names import qkv_rows, qkv_scale_rows
from mxfp4.format import BLOCK_SIZE
from runtime_ref.checkpoints.device_shapes import expert_tiles, has_head_norms, layer_heads, layer_shapes, outer_shapes
from runtime_ref.checkpoints.folder import read_geometry
from runtime_ref.core.tensor_parallel import SHARES, SINGLE_RANK, Ranks
from runtime_ref.kernels.launches import Heads, Matrix, Router, paired
from runtime_ref.kernels.repack import MAX_SCALE_BYTE, SCALE_OFFSET, ExpertPages, Tile, repack_experts
from runtime_ref.kernels.tp_reduction import (
    FP8_BLOCK,
    LEAST_DEPTH,
    ExpertShare,
    Parts,
    expert_share,
    layer_parts,
    own_keys,
    own_run,
    own_share,
    parts_of,
)

ALIGN = 128
GROUP_BYTES = 1 << 25  # of the experts whose codes are moved into pages at once, which takes some thirty times that
# What the releases store in FP8 (see `layer_shapes`).
RELEASED_FP8 = frozenset({"qkv", "gate_up", "down"})


class Arena:
    """One allocation, handed out in pieces that begin at multiples of ALIGN bytes."""

    def __init__(self, size: int, device: str):
        self.data = torch.empty(size, dtype=torch.uint8, device=device)
        self.used = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A new piece, as a tensor."""
        size = _bytes(shape, dtype)
        assert self.used + size <= self.data.numel(), "the arena was made too small"
        piece = self.data[self.used:self.used + size].view(dtype).view(shape)
        self.used += _rounded(size)
        return piece

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.take(tuple(tensor.shape), tensor.dtype).copy_(tensor)

    def offset(self, tensor: torch.Tensor) -> int:
        """Where a piece begins, in units of ALIGN bytes."""
        distance = tensor.data_ptr() - self.data.data_ptr()
        assert 0 <= distance < self.data.numel() and distance % ALIGN == 0
        return distance // ALIGN


@dataclass
class KernelLayer:
    """One layer on this rank. mlp holds "gate_up" and "down" (dense), or "router" and "pages"."""

    kind: str  # "full" or "window"
    heads: Heads
    parts: Parts
    qkv: Matrix
    o: Matrix
    sink: torch.Tensor | None
    input_norm: torch.Tensor
    post_norm: torch.Tensor
    head_norm: torch.Tensor | None = None  # of each query and key head, in the order of `launches.project` (Qwen3)
    gate_up: Matrix | None = None
    down: Matrix | None = None
    router: Router | None = None
    pages: ExpertPages | None = None


@dataclass
class KernelWeights:
    config: MiMoV2Config
    ranks: Ranks
    arena: Arena
    embed: torch.Tensor  # bfloat16 [vocabulary, H]
    layers: list[KernelLayer]
    norm: torch.Tensor  # float32 [H]
    head: Matrix  # this rank's share of the vocabulary


def require_kernels(folder: str | Path, config) -> None:
    """Refuses a family that the kernels do not run.

    Raises:
        NotHeld: which they are, and what runs this one.
    """
    run = [family.model_type for family in FAMILIES.values() if family.kernels]
    if config.model_type not in run:
        raise NotHeld(f"{Path(folder) / 'config.json'}: model_type: {config.model_type!r}, expected {' or '.join(run)}: "
                      "the kernels have no biases, no clamped SwiGLU and no shared experts; run this checkpoint with "
                      "--backend torch")


def load_kernel_weights(folder: str | Path, ranks: Ranks = SINGLE_RANK, *, device: str = "cpu", hw_fp4: bool = False,
                        progress: Callable[[int, int], None] | None = None) -> KernelWeights:
    """One rank's weights from an exported folder. hw_fp4: experts in hw_fp4 pages (`kernels/experimental/blackwell_mxfp4.py`).

    Raises:
        ValueError: a damaged or incomplete folder, a geometry that the ranks cannot share, a scale byte that pages cannot hold,
            a family that the kernels do not run.
    """
    config, _ = read_geometry(folder)
    require_kernels(folder, config)
    reader = _Reader(TensorFiles(Path(folder)), config, ranks, hw_fp4, device)
    fp8 = [reader.fp8(i) for i in range(config.num_hidden_layers)]

    def layer(index: int) -> dict[str, torch.Tensor]:
        if progress is not None:
            progress(index + 1, config.num_hidden_layers)
        return reader.layer(index)

    return _assembled(config, ranks, device, fp8, reader.outer, layer, hw_fp4=hw_fp4)


def random_weights(config: MiMoV2Config, ranks: Ranks, *, device: str, fp8: frozenset[str] = RELEASED_FP8,
                   seed: int = 0, shares: int = SHARES) -> KernelWeights:
    """Random weights of a geometry, made where they are used: for timing. Numbers stay finite; they mean nothing."""
    generator, tiles = torch.Generator(device).manual_seed(seed), expert_tiles(config, ranks, shares)

    def fill(shapes: dict[str, tuple]) -> dict[str, torch.Tensor]:
        return {name: _random(name, shape, dtype, tiles, device, generator, config) for name, (shape, dtype) in shapes.items()}

    dense = fp8 - {"gate_up", "down"}
    kinds = [dense if moe else fp8 for moe in config.moe_layer_freq]
    return _assembled(config, ranks, device, kinds, lambda: fill(outer_shapes(config, ranks)),
                      lambda i: fill(layer_shapes(config, i, ranks, kinds[i], shares)), shares)


def _random(name, shape, dtype, tiles, device, generator, config) -> torch.Tensor:
    if dtype is torch.uint8 and not name.endswith("_pages"):  # FP8 of all signs and small exponents, no NaN
        return torch.randint(0, 256, shape, dtype=dtype, device=device, generator=generator) & 0xBF
    if name.endswith("_pages"):
        tile = tiles[name == "down_pages"]
        pages = torch.randint(0, 256, shape, dtype=dtype, device=device, generator=generator)
        tail = pages[..., tile.rows * tile.depth // 2:]
        tail.copy_(torch.randint(SCALE_OFFSET + 117, SCALE_OFFSET + 121, tail.shape, dtype=dtype, device=device,
                                 generator=generator))
        return pages
    if name.endswith("_scales"):
        return torch.full(shape, config.hidden_size**-0.5, dtype=dtype, device=device)
    if name.endswith("norm"):
        return torch.ones(shape, dtype=dtype, device=device)
    return (torch.randn(shape, device=device, generator=generator) * shape[-1]**-0.5).to(dtype)


def _assembled(config, ranks, device, fp8, outer: Callable[[], dict], layer: Callable[[int], dict],
               shares: int = SHARES, hw_fp4: bool = False) -> KernelWeights:
    parts = [layer_parts(config, i, ranks, kinds, shares) for i, kinds in enumerate(fp8)]
    plans = [outer_shapes(config, ranks),
             *(layer_shapes(config, i, ranks, kinds, shares, hw_fp4) for i, kinds in enumerate(fp8))]
    arena = Arena(sum(_rounded(_bytes(*of)) for plan in plans for of in plan.values()), device)

    def placed(plan: dict[str, tuple], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == plan, "tensors are not what was planned"
        return {name: arena.put(tensor) for name, tensor in tensors.items()}

    top = placed(plans[0], outer())
    tiles = expert_tiles(config, ranks, shares, hw_fp4)
    layers = [_layer(config, ranks, i, placed(plan, layer(i)), parts[i], tiles, shares) for i, plan in enumerate(plans[1:])]
    return KernelWeights(config, ranks, arena, top["embed"], layers, top["norm"], Matrix(top["head"]))


def _layer(config, ranks, index: int, t: dict[str, torch.Tensor], parts: Parts, tiles: tuple[Tile, Tile],
           shares: int) -> KernelLayer:
    matrices = {n: Matrix(t[n], t.get(f"{n}_scales")) for n in ("qkv", "o", "gate_up", "down") if n in t}
    router = pages = None
    if "router" in t:
        factor, softmax = config.routed_scaling_factor, FAMILIES[config.model_type].router == "softmax"
        router = Router(t["router"], t["correction"], config.num_experts_per_tok, config.n_group, config.topk_group,
                        config.norm_topk_prob, 1.0 if factor is None else factor, softmax)
        inner = config.moe_intermediate_size
        pages = ExpertPages(t["up_pages"], t["down_pages"], *tiles, config.hidden_size,
                            inner // expert_share(inner, ranks, shares).of, parts.experts)
    return KernelLayer("window" if config.hybrid_layer_pattern[index] else "full", layer_heads(config, index, ranks),
                       parts=parts, sink=t.get("sink"), input_norm=t["input_norm"], post_norm=t["post_norm"],
                       head_norm=t.get("head_norm"), router=router, pages=pages, **matrices)


class _Reader:
    """Reads the tensors of one rank, as `layer_shapes` names them: of the experts, o_proj, dense layers and the head its own
    share only. Pages are made where they are used, which on a GPU takes seconds, on a CPU hours."""

    def __init__(self, files: TensorFiles, config: MiMoV2Config, ranks: Ranks, hw_fp4: bool = False, device: str = "cpu"):
        self.files, self.config, self.ranks, self.names, self.hw_fp4 = files, config, ranks, set(files), hw_fp4
        self.device, self.family = device, FAMILIES[config.model_type]
        self.codes = "_packed" if self.family.runtime_layout == "compressed-tensors" else ""  # what their names end with

    def outer(self) -> dict[str, torch.Tensor]:
        config = self.config
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        return {"embed": self._bf16("model.embed_tokens.weight"), "norm": self._f32("model.norm.weight"),
                "head": self._bf16(head, 0)}

    def fp8(self, index: int) -> frozenset[str]:
        """Which matrices of a layer are stored in FP8."""
        attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
        qkv = f"{attention}.qkv_proj" if f"{attention}.qkv_proj.weight" in self.names else f"{attention}.q_proj"
        found = {"qkv": qkv, "o": f"{attention}.o_proj", "gate_up": f"{mlp}.gate_proj", "down": f"{mlp}.down_proj"}
        return frozenset(n for n, name in found.items() if f"{name}.weight_scale_inv" in self.names)

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        prefix, heads = f"model.layers.{index}", layer_heads(self.config, index, self.ranks)
        out = {"input_norm": self._f32(f"{prefix}.input_layernorm.weight"),
               "post_norm": self._f32(f"{prefix}.post_attention_layernorm.weight")}
        if f"{prefix}.self_attn.attention_sink_bias" in self.names:
            out["sink"] = own_share(self._f32(f"{prefix}.self_attn.attention_sink_bias"), 0, self.ranks)
        rows = self._qkv(f"{prefix}.self_attn", index)
        swa = "swa_" if self.config.hybrid_layer_pattern[index] else ""
        keys = getattr(self.config, f"{swa}num_key_value_heads")
        for name in rows[0]:
            suffix = "" if name == "weight" else "_scales"
            queries, *others = (part[name] for part in rows)
            shared = torch.cat([own_share(queries, 0, self.ranks), *(own_keys(t, keys, self.ranks) for t in others)])
            out[f"qkv{suffix}"] = paired(shared, heads)
        self._put_matrix(out, "o", [f"{prefix}.self_attn.o_proj"], columns=True)
        if has_head_norms(self.config):
            norms = [self._f32(f"{prefix}.self_attn.{n}_norm.weight").repeat(count)
                     for n, count in (("q", heads.queries), ("k", heads.keys))]
            out["head_norm"] = paired(torch.cat(norms), heads)
        if self.config.moe_layer_freq[index]:
            return out | self._moe(f"{prefix}.{self.family.moe}")
        self._put_matrix(out, "gate_up", [f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj"], columns=False)
        self._put_matrix(out, "down", [f"{prefix}.mlp.down_proj"], columns=True)
        return out

    def _put_matrix(self, out: dict, name: str, parts: list[str], *, columns: bool) -> None:
        """This rank's rows or columns of stacked matrices, with the scales of FP8."""
        found = [self._matrix(part, int(columns)) for part in parts]
        for kind in found[0]:
            out[name if kind == "weight" else f"{name}_scales"] = torch.cat([part[kind] for part in found])

    def _matrix(self, name: str, dim: int | None = None) -> dict[str, torch.Tensor]:
        """"weight" bfloat16, or uint8 with "scales": one row of them per row. dim: this rank's rows (0) or columns (1) only."""
        raw = self._own(f"{name}.weight", dim)
        if raw.dtype != torch.float8_e4m3fn:
            return {"weight": self._exact(f"{name}.weight", raw)}
        rows, width = self.files.shape(f"{name}.weight")
        if dim == 1 and self.ranks.count > 1 and raw.shape[1] % FP8_BLOCK:
            raise ValueError(f"{self.files.folder}: {name}: {self.ranks.count} ranks cut its columns inside an FP8 block; "
                             "expected fewer ranks")
        if raw.view(torch.uint8).bitwise_and(127).eq(127).any():
            raise ValueError(f"{self.files.folder}: {name}.weight holds NaN")
        scale = self.files.read(f"{name}.weight_scale_inv").float()
        segments = qkv_scale_rows(f"{name}.weight", rows, self.config)
        require_grid(f"{self.files.folder}: {name}.weight", scale.shape, segments, width)
        scales = spread_rows(scale, segments)
        return {"weight": raw.view(torch.uint8), "scales": scales if dim is None else own_share(scales, dim, self.ranks)}

    def _qkv(self, prefix: str, index: int) -> list[dict[str, torch.Tensor]]:
        """q, k and v, whichever of the two forms the folder has."""
        if f"{prefix}.qkv_proj.weight" not in self.names:
            return [self._matrix(f"{prefix}.{n}_proj") for n in "qkv"]
        fused, rows = self._matrix(f"{prefix}.qkv_proj"), qkv_rows(self.config, index)
        return [{name: torch.cat([t[s] for s in rows[part]]) for name, t in fused.items()} for part in "qkv"]

    def _moe(self, prefix: str) -> dict[str, torch.Tensor]:
        """Router and pages. A few experts at a time: what moving codes about takes is never as large as a layer."""
        E, inner = self.config.n_routed_experts, self.config.moe_intermediate_size
        share = expert_share(inner, self.ranks)
        count = max(1, GROUP_BYTES * share.of * 2 // (3 * inner * self.config.hidden_size))
        whole = []
        for first in range(0, E, count):
            pages = self._pages(prefix, range(first, min(E, first + count)), share)
            whole = whole or [t.new_empty(E, *t.shape[1:]) for t in pages]
            for all_experts, t in zip(whole, pages, strict=True):
                all_experts[first:first + count] = t
        return {"router": self._f32(f"{prefix}.{self.family.gate}.weight"), "correction": self._correction(prefix),
                "up_pages": whole[0], "down_pages": whole[1]}

    def _pages(self, prefix: str, experts: range, share: ExpertShare) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate-up and down pages of some experts, on the device."""
        H, inner = self.config.hidden_size, self.config.moe_intermediate_size

        def stacked(kind: str, suffix: str) -> torch.Tensor:
            width = BLOCK_SIZE if suffix else 2
            shape, dim = ((H, inner // width), 1) if kind == "down" else ((inner, H // width), 0)
            most = MAX_SCALE_BYTE if suffix and not self.hw_fp4 else 255
            end = suffix or self.codes
            return torch.stack([self._codes(self.family.expert_name(prefix, e, kind) + end, shape, dim, share, most)
                                for e in experts]).to(self.device)

        gate_up = [torch.cat((stacked("gate", s), stacked("up", s)), 1) for s in ("", "_scale")]
        down = [stacked("down", s) for s in ("", "_scale")]
        if not share.adds:
            down = [torch.zeros_like(t) for t in down]
        up_tile, down_tile = expert_tiles(self.config, self.ranks, hw_fp4=self.hw_fp4)
        pages = repack_experts(tuple(gate_up), tuple(down), up_tile=up_tile, down_tile=down_tile,
                               parts=parts_of(inner, LEAST_DEPTH) // share.of)
        return pages.up, pages.down

    def _correction(self, prefix: str) -> torch.Tensor:
        if self.family.router != "sigmoid":
            return torch.zeros(self.config.n_routed_experts)
        return self._f32(f"{prefix}.gate.e_score_correction_bias")

    def _codes(self, name: str, shape: tuple[int, int], dim: int, share: ExpertShare, most: int) -> torch.Tensor:
        """This rank's rows (dim 0) or columns of an expert's codes or scales, uint8, none above `most`."""
        there, own = self.files.shape(name), shape[dim] // share.of
        found = self.files.run(name, dim, share.index * own, own) if there == shape else self.files.read(name)
        if found.dtype != torch.uint8 or there != shape:
            raise ValueError(f"{self.files.folder}: {name}: {found.dtype} {list(there)}, expected uint8 {list(shape)}")
        if most < 255 and found.numel() and int(found.max()) > most:
            raise ValueError(f"{self.files.folder}: {name}: scale byte {int(found.max())}: the packed decoding holds scales up "
                             f"to 2 (byte {most}); run this checkpoint with the torch backend")
        return found

    def _own(self, name: str, dim: int | None) -> torch.Tensor:
        """A tensor, or this rank's rows (dim 0) or columns (1) of it."""
        if dim is None:
            return self.files.read(name)
        return self.files.run(name, dim, *own_run(self.files.shape(name)[dim], self.ranks))

    def _bf16(self, name: str, dim: int | None = None) -> torch.Tensor:
        return self._exact(name, self._own(name, dim))

    def _exact(self, name: str, raw: torch.Tensor) -> torch.Tensor:
        exact = raw.to(torch.bfloat16)
        if not torch.equal(exact.to(raw.dtype), raw):
            raise ValueError(f"{self.files.folder}: {name}: {raw.dtype} values that bfloat16 does not hold; run this "
                             "checkpoint with the torch backend")
        return exact

    def _f32(self, name: str) -> torch.Tensor:
        return self.files.read(name).float()


def piece_bytes(tensor: torch.Tensor) -> int:
    """What a tensor takes in an arena."""
    return _rounded(_bytes(tuple(tensor.shape), tensor.dtype))


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _rounded(size: int) -> int:
    return -(-size // ALIGN) * ALIGN
