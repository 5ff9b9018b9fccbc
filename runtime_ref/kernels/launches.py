"""The launches of `dense.py` and `routing.py`: tensors in, tensors out, one launch each.

Sizes of tiles change speed, never meaning; `Tiling` holds them. In Triton's interpreter `Tiling(float_dot=True)` is needed: it
multiplies bf16 matrices wrongly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from runtime_ref.kernels.counters import arrivals
from runtime_ref.kernels.dense import (
    FP8_BLOCK,
    GROUP,
    add_kernel,
    gather_kernel,
    norm_kernel,
    product_kernel,
    project_kernel,
    round_kernel,
    swiglu_kernel,
    write_kernel,
)
from runtime_ref.kernels.routing import route_kernel


@dataclass(frozen=True)
class Tiling:
    """columns, depth: output columns and values of K of a tile (depth at most 128: a block of FP8 weights has one scale).
    experts, router_depth: the same of router scores, whose float32 operands take registers. block: elements of a program that
    adds or copies."""

    columns: int = 32
    depth: int = 128
    experts: int = 16
    router_depth: int = 32
    block: int = 1024
    warps: int = 4
    float_dot: bool = False

    def __post_init__(self):
        sizes = self.columns, self.depth, self.experts, self.router_depth, self.block
        if self.depth > FP8_BLOCK or any(n < 16 or n & (n - 1) for n in sizes):
            raise ValueError(f"{self}: expected powers of two of at least 16, depth at most {FP8_BLOCK}")

    @property
    def options(self) -> dict:
        return {} if self.float_dot else {"num_warps": self.warps}


@dataclass(frozen=True)
class Matrix:
    """w bfloat16 [N, K], or uint8 (FP8 E4M3) with scales float32 [N, ceil(K / 128)]."""

    w: torch.Tensor
    scales: torch.Tensor | None = None

    def __post_init__(self):
        N, K = self.w.shape
        fine = self.w.dtype is torch.bfloat16 and self.scales is None or (
            self.w.dtype is torch.uint8 and self.scales is not None and self.scales.shape == (N, -(-K // FP8_BLOCK)))
        if not fine:
            found = None if self.scales is None else list(self.scales.shape)
            raise ValueError(f"matrix {self.w.dtype} {[N, K]} with scales {found}; "
                             f"expected bfloat16 without, or uint8 with {[N, -(-K // FP8_BLOCK)]}")

    def decoded(self) -> torch.Tensor:
        """float32 [N, K]: the values that a product means."""
        if self.scales is None:
            return self.w.float()
        return self.w.view(torch.float8_e4m3fn).float() * self.scales.repeat_interleave(FP8_BLOCK, 1)[:, :self.w.shape[1]]


@dataclass(frozen=True)
class Heads:
    """Geometry of a projection to heads: own query and key heads, widths, rotated values of a head (even, as the widths)."""

    queries: int
    keys: int
    d: int
    v: int
    rotated: int

    def __post_init__(self):
        if self.d % 2 or self.v % 2 or self.rotated % 2 or self.rotated > self.d:
            raise ValueError(f"{self}: expected even widths and at most {self.d} rotated values")

    @property
    def rows(self) -> int:
        return (self.queries + self.keys) * self.d + self.keys * self.v


def paired_rows(width: int, rotated: int) -> torch.Tensor:
    """Order of a head's rows in which i and i + rotated / 2, which a rotation mixes, are neighbours: int64 [width]."""
    half = rotated // 2
    pairs = torch.stack((torch.arange(half), half + torch.arange(half)), 1).flatten()
    return torch.cat((pairs, torch.arange(rotated, width)))


def paired(w: torch.Tensor, heads: Heads) -> torch.Tensor:
    """Rows [heads.rows, ...] in the order q, k, v, rearranged for `project` (values stay as they are)."""
    order = paired_rows(heads.d, heads.rotated)
    split = (heads.queries + heads.keys) * heads.d
    return torch.cat((w[:split].unflatten(0, (-1, heads.d))[:, order].flatten(0, 1), w[split:]))


def groups(rows: int) -> int:
    return -(-rows // GROUP)


def project(x: torch.Tensor, matrix: Matrix, heads: Heads, table: tuple[torch.Tensor, torch.Tensor], positions: torch.Tensor,
            slots: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiling: Tiling, *,
            norm: tuple[torch.Tensor, float] | None = None, head_norm: tuple[torch.Tensor, float] | None = None,
            value_scale: float | None = None) -> None:
    """Queries to q, keys and values to their slots.

    Args:
        x: bfloat16 or float32 [R, H]. matrix: rows as `paired` returns them. norm, head_norm: weight float32 ([H]; [(queries +
            keys) * d] in paired order) and epsilon of the norm before the product and of that of each query and key.
        table: cos and sin float32 [positions, rotated / 2]; positions: int32 [R].
        slots: int32 [R], where keys and values of a row go in k and v; negative: nowhere.
        q: bfloat16 [queries, R, d], scaled by d**-0.5. k, v: bfloat16 [keys, S, d] and [keys, S, v].
    """
    (R, H), wide = x.shape, max(heads.d, heads.v)
    columns = max(16, triton.next_power_of_2(heads.d)) if head_norm else min(tiling.columns, triton.next_power_of_2(wide))
    gamma, epsilon = norm or (x, 0.0)
    head_gamma, head_epsilon = head_norm or (x, 0.0)
    tiles = (heads.queries + 2 * heads.keys) * triton.cdiv(wide, columns)
    project_kernel[(tiles, groups(R))](
        x, matrix.w, x if matrix.scales is None else matrix.scales, gamma, head_gamma, *table, positions, slots, q, k, v, R, H,
        float(epsilon), heads.d**-0.5, 1.0 if value_scale is None else float(value_scale), k.shape[1], float(head_epsilon),
        QUERIES=heads.queries, KEYS=heads.keys, D=heads.d, V=heads.v, HALF=heads.rotated // 2, BN=columns, BK=tiling.depth,
        NORM=norm is not None, HEAD_NORM=head_norm is not None, FLOAT_DOT=tiling.float_dot, **tiling.options)


def product(x: torch.Tensor, matrix: Matrix, out: torch.Tensor, tiling: Tiling, *,
            norm: tuple[torch.Tensor, float] | None = None, rows: torch.Tensor | None = None,
            residual: torch.Tensor | None = None, parts: int = 1) -> torch.Tensor:
    """out [R, N] float32 or bfloat16 = x w^T, see `dense.product_tile`; returns it. An out of [parts, R, N] keeps parts apart.

    Args:
        x: [., K] or heads [Q, R, V] with Q V = K. rows: int32 [R], which rows of x (default: the first R).
        residual: bfloat16 [R, N] to add to; may be `out`.
    """
    N, K = matrix.w.shape
    R, keep = out.shape[-2], out.ndim == 3
    assert not keep or out.shape[0] == parts and out.dtype is torch.float32, "parts kept apart are float32 [parts, R, N]"
    gamma, epsilon = norm or (x, 0.0)
    per_head = x.shape[2] if x.ndim == 3 else 0
    product_kernel[(triton.cdiv(N, tiling.columns), groups(R))](
        x, matrix.w, x if matrix.scales is None else matrix.scales, gamma, out if rows is None else rows,
        out if residual is None else residual, out, R, N, K, float(epsilon), x.shape[1] * per_head, BN=tiling.columns,
        BK=tiling.depth, V=per_head, NORM=norm is not None, PICK=rows is not None, RESIDUAL=residual is not None, PARTS=parts,
        KEEP=keep, FLOAT_DOT=tiling.float_dot, **tiling.options)
    return out


def swiglu(x: torch.Tensor, matrix: Matrix, tiling: Tiling, *, norm: tuple[torch.Tensor, float] | None = None) -> torch.Tensor:
    """bfloat16 [R, I] of x [R, H] and a matrix of I gate rows and I up rows."""
    (R, H), I = x.shape, matrix.w.shape[0] // 2
    gamma, epsilon = norm or (x, 0.0)
    out = torch.empty((R, I), dtype=torch.bfloat16, device=x.device)
    swiglu_kernel[(triton.cdiv(I, tiling.columns), groups(R))](
        x, matrix.w, x if matrix.scales is None else matrix.scales, gamma, out, R, I, H, float(epsilon), BN=tiling.columns,
        BK=tiling.depth, NORM=norm is not None, FLOAT_DOT=tiling.float_dot, **tiling.options)
    return out


def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, tiling: Tiling) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 and bfloat16 [R, H] of x [R, H]."""
    R, H = x.shape
    out, narrow = (torch.empty((R, H), dtype=dtype, device=x.device) for dtype in (torch.float32, torch.bfloat16))
    norm_kernel[(groups(R),)](x, weight, out, narrow, R, H, float(epsilon), BK=tiling.depth, FLOAT_DOT=tiling.float_dot,
                              **tiling.options)
    return out, narrow


def gather(table: torch.Tensor, ids: torch.Tensor, tiling: Tiling, spare: torch.Tensor | None = None) -> torch.Tensor:
    """Rows `ids` (int32 [R]) of table [., H]; for negative ids, the row `spare` [H]."""
    out = torch.empty((ids.shape[0], table.shape[1]), dtype=table.dtype, device=table.device)
    gather_kernel[(ids.shape[0],)](table, ids, table if spare is None else spare, out, table.shape[1], BK=tiling.block,
                                   **tiling.options)
    return out


def rounded(x: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    """bfloat16 of float32 x."""
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    round_kernel[(triton.cdiv(x.numel(), tiling.block),)](x, out, x.numel(), BLOCK=tiling.block, FLOAT_DOT=tiling.float_dot,
                                                          **tiling.options)
    return out


def write(source: torch.Tensor, store: torch.Tensor, slots: torch.Tensor, tiling: Tiling) -> None:
    """Rows of source [heads, R, width] to slots (int32 [R]) of store [heads, S, width]."""
    heads, R, width = source.shape
    write_kernel[(R, heads)](source, store, slots, R, store.shape[1], WIDTH=width, WIDE=triton.next_power_of_2(width),
                             **tiling.options)


def add(x: torch.Tensor, partial: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    """bfloat16 x + (0 + partial[0] + partial[1] + ...), of x [R, H] and float32 partial [parts, R, H]."""
    out = torch.empty_like(x)
    add_kernel[(triton.cdiv(x.numel(), tiling.block),)](x, partial, out, x.numel(), PARTS=partial.shape[0], BLOCK=tiling.block,
                                                        FLOAT_DOT=tiling.float_dot, **tiling.options)
    return out


@dataclass(frozen=True)
class Router:
    """w float32 [E, H], correction float32 [E] (zeros with softmax) and the rules of `model.route`."""

    w: torch.Tensor
    correction: torch.Tensor
    choices: int
    groups: int = 1
    top_groups: int = 1
    normed: bool = True
    factor: float = 1.0
    softmax: bool = False

    def constants(self) -> dict:
        return {"A": self.choices, "WIDE": triton.next_power_of_2(self.w.shape[0]), "GROUPS": self.groups,
                "TOP_GROUPS": self.top_groups, "NORMED": self.normed}


def route(x: torch.Tensor, router: Router, tiling: Tiling, *, norm: tuple[torch.Tensor, float] | None = None,
          ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Experts int32 [R, A], weights float32 [R, A], and with `norm` the normed rows in bfloat16 [R, H] (else empty)."""
    (R, H), E, like = x.shape, router.w.shape[0], {"device": x.device}
    scores = torch.empty((R, E), dtype=torch.float32, **like)
    narrow = torch.empty((R if norm else 0, H), dtype=torch.bfloat16, **like)
    index = torch.empty((R, router.choices), dtype=torch.int32, **like)
    weight = torch.empty((R, router.choices), dtype=torch.float32, **like)
    gamma, epsilon = norm or (x, 0.0)
    with arrivals(groups(R), x.device) as arrived:
        route_kernel[(triton.cdiv(E, tiling.experts), groups(R))](
            x, router.w, gamma, router.correction, scores, narrow, arrived, index, weight, R, E, H, float(epsilon),
            float(router.factor), **router.constants(), BN=tiling.experts, BK=tiling.router_depth, NORM=norm is not None,
            FLOAT_DOT=tiling.float_dot, SOFTMAX=router.softmax, **tiling.options)
    return index, weight, narrow
