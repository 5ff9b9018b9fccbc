"""What gives a row (a token) the same bits alone and among others, on this machine: products, sums and paddings of fixed shape.

Used by `ops.py`, whose text says why.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

ROWS = 8
NARROW = 4
COLUMNS = 16
SUMMED, VECTOR = 8, 32
_WIDE_BLOCKS = (2, 3, 8, 16)


@dataclass(frozen=True)
class RowRules:
    """What keeps the bits of eight rows on this machine, for the products of one model (`probe_rows` measures it).

    Each backend has rules of its own, because they depend on the shapes that it runs. The defaults hold everywhere.

    Attributes:
        wide: products of more than eight rows. narrow: products of multiples of four rows. sums: library sums of up to eight
            terms, which then add them in their order.
    """

    wide: bool = False
    narrow: bool = False
    sums: bool = False

    @property
    def quantum(self) -> int:
        return NARROW if self.wide and self.narrow else ROWS


STRICT = RowRules()


def product(x: torch.Tensor, w: torch.Tensor, rules: RowRules = STRICT) -> torch.Tensor:
    """Batched product [b, R, K] x [b, K, N], R a multiple of the quantum (see the module's text).

    A few columns (5 to 11, not 8: a router of a small model) are padded: MKL then has other code by a row's position.
    """
    N = w.shape[2]
    if N < COLUMNS and N % ROWS:
        return product(x, F.pad(w, (0, COLUMNS - N)), rules)[..., :N]
    if rules.wide or x.shape[1] == ROWS:
        return torch.bmm(x, w)
    return torch.cat([torch.bmm(x[:, i:i + ROWS], w) for i in range(0, x.shape[1], ROWS)], dim=1)


def probe_rows(shapes: set[tuple[int, int, int]], seed: int = 0) -> RowRules:
    """Measures whether products of more than eight rows, and of four, give each row the bits of a product of eight, and
    whether library sums keep the order of their terms.

    Args:
        shapes: (batch, K, N) of the products that will run.
    """
    generator = torch.Generator().manual_seed(seed)
    wide_same = narrow_same = True
    for batch, K, N in sorted(shapes):
        N = COLUMNS if N < COLUMNS and N % ROWS else N  # as `product` does
        w = torch.randn(batch, K, N, generator=generator)
        x = torch.randn(batch, ROWS, K, generator=generator)
        alone = torch.bmm(x, w)
        for blocks in _WIDE_BLOCKS:
            wide = torch.randn(batch, blocks * ROWS, K, generator=generator)
            wide[:, -ROWS - 1:-1] = x
            wide_same = wide_same and torch.equal(torch.bmm(wide, w)[:, -ROWS - 1:-1], alone)
        for rows in (NARROW, 3 * NARROW):
            some = torch.randn(batch, rows, K, generator=generator)
            some[:, -NARROW:] = x[:, 1:1 + NARROW]
            narrow_same = narrow_same and torch.equal(torch.bmm(some, w)[:, -NARROW:], alone[:, 1:1 + NARROW])
    sums_same = all(_sums_in_order(N, generator) for N in {N for _, _, N in shapes if N % VECTOR == 0})
    return RowRules(wide_same, narrow_same, sums_same)


def in_order(x: torch.Tensor, dim: int, rules: RowRules = STRICT) -> torch.Tensor:
    """Sum over `dim`, one term after the other."""
    whole = x[(0,) * (dim + 1)].numel() % VECTOR == 0  # libraries add the last, incomplete vector in another order
    return x.sum(dim) if rules.sums and whole and x.shape[dim] <= SUMMED else _one_by_one(x, dim)


def _one_by_one(x: torch.Tensor, dim: int) -> torch.Tensor:
    total = x.select(dim, 0)
    for i in range(1, x.shape[dim]):
        total = total + x.select(dim, i)
    return total


def _sums_in_order(H: int, generator: torch.Generator) -> bool:
    """Whether library sums equal the chain, for parts [P, R, H] and for pages [K, B, n, M, V]."""
    tries = [(torch.randn(n, rows, H, generator=generator), 0) for n in (2, 4, SUMMED) for rows in (NARROW, ROWS, 40, 256)]
    tries += [(torch.randn(2, B, n, M, width, generator=generator), 2)
              for n in (2, 3, 5, SUMMED) for M, width, B in ((16, 64, 1), (8, 24, 3), (32, 1, 1), (32, 1, 9), (4, 8, 7))]
    return all(torch.equal(x.sum(dim), _one_by_one(x, dim)) for x, dim in tries)


def padded(rows: int, rules: RowRules = STRICT) -> int:
    """Rows of a step of so many tokens."""
    return -(-rows // rules.quantum) * rules.quantum


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 with the values of `dtype`."""
    return x if dtype is torch.float32 else x.to(dtype).float()
