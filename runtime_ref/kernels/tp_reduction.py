"""Which share of a matrix a rank holds, and into how many parts a sum over ranks is cut: contract C5 for the kernels.

o_proj and both down projections multiply what a rank has with its share of K, so their results are summed over ranks. Float
sums depend on their order, and the number of ranks must not show in the tokens. So the *model* cuts K into parts (8, or what
its sizes allow); a rank holds a run of them and sums each alone, from zero; and the parts of all ranks are added to zero in
order. One rank of one adds its own eight in a register; one of eight has a single part to hand on. Experts so small that they
have fewer parts than there are ranks are held by several ranks (`expert_share`).

The rule of `core.tensor_parallel.shares` (torch backend), but in units that the kernels can cut: whole heads, whole FP8
blocks, whole pages of expert weights.

Rejected: one part per rank (bits change with the number of ranks), a tree of pairs (a rank could add its parts before it
hands them on, which at eight ranks, where it counts, saves nothing).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from modeling.configuration_mimo_v2 import MiMoV2Config
from runtime_ref.core.tensor_parallel import SHARES, Ranks

FP8_BLOCK = 128
LEAST_DEPTH = 64  # of an expert page


@dataclass(frozen=True)
class Parts:
    """Parts of this rank: of o_proj, of a dense layer's down product, of the experts' inner dimension."""

    o: int
    down: int
    experts: int


def own_run(size: int, ranks: Ranks) -> tuple[int, int]:
    """First entry and length of a rank's equal share of a dimension.

    Raises:
        ValueError: it cannot be shared evenly.
    """
    own, rest = divmod(size, ranks.count)
    if rest:
        raise ValueError(f"{ranks.count} ranks: a dimension of {size} entries cannot be shared evenly")
    return ranks.rank * own, own


def own_share(t: torch.Tensor, dim: int, ranks: Ranks) -> torch.Tensor:
    """A rank's equal share of a dimension."""
    return t.narrow(dim, *own_run(t.shape[dim], ranks))


def own_keys(rows: torch.Tensor, keys: int, ranks: Ranks) -> torch.Tensor:
    """The rows [keys * width, ...] of a rank's key heads, or of the one that it shares with its neighbours."""
    if keys % ranks.count == 0:
        return own_share(rows, 0, ranks)
    width = rows.shape[0] // keys
    return rows.narrow(0, ranks.rank * keys // ranks.count * width, width)


def parts_of(size: int, unit: int, shares: int = SHARES) -> int:
    """Parts of a sum over `size` entries: the largest of 8, 4, 2, 1 (at most `shares`) that makes whole units."""
    return next(n for n in (8, 4, 2, 1) if n <= shares and size % (n * unit) == 0 or n == 1)


def own_parts(what: str, size: int, unit: int, ranks: Ranks, shares: int) -> int:
    """Parts of one rank.

    Raises:
        ValueError: more ranks than parts.
    """
    parts = parts_of(size, unit, shares)
    if parts % ranks.count:
        raise ValueError(f"{ranks.count} ranks: a sum over {size} entries of {what} is cut into {parts} parts of whole "
                         f"{unit}s, expected a number of ranks that divides {parts}")
    return parts // ranks.count


@dataclass(frozen=True)
class ExpertShare:
    """Which of `of` equal shares of the experts' inner dimension a rank holds, and whether it is the one that adds it."""

    index: int
    of: int
    adds: bool


def expert_share(inner: int, ranks: Ranks, shares: int = SHARES) -> ExpertShare:
    """A rank's share of the experts. With more ranks than parts neighbours hold the same one, and only the first of them adds
    it: the down weights of the others are zeros. Adding zeros changes no bit, so sums need no other rule.

    Rejected: smaller parts than a page has room for, which would change the bits of small models on fewer ranks.
    """
    of = min(ranks.count, parts_of(inner, LEAST_DEPTH, shares))
    holders = ranks.count // of
    return ExpertShare(ranks.rank // holders, of, ranks.rank % holders == 0)


def layer_parts(config: MiMoV2Config, index: int, ranks: Ranks, fp8: frozenset[str], shares: int = SHARES) -> Parts:
    """How the sums of a layer over all ranks are cut.

    Args:
        fp8: matrices stored in FP8, whose parts are whole blocks of 128.
        shares: the most parts; 1 for a model that stands for one rank of a larger one.
    """
    swa = "swa_" if config.hybrid_layer_pattern[index] else ""
    heads, v = getattr(config, f"{swa}num_attention_heads"), getattr(config, f"{swa}v_head_dim")
    unit = math.lcm(v, FP8_BLOCK) if "o" in fp8 else v
    o = own_parts("o_proj", heads * v, unit, ranks, shares)
    if config.moe_layer_freq[index]:
        inner = config.moe_intermediate_size
        return Parts(o, 1, parts_of(inner, LEAST_DEPTH, shares) // expert_share(inner, ranks, shares).of)
    return Parts(o, own_parts("down_proj", config.intermediate_size, FP8_BLOCK if "down" in fp8 else 16, ranks, shares), 1)
