"""Intervals of figures that are ratios of sums over texts: acceptance lengths, shares of a KL that is gone."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

DRAWS = 1000


def ratio_interval(groups: Iterable[Sequence[tuple[float, float]]], seed: int = 0) -> list[float]:
    """95 % bootstrap interval of sum(a) / sum(b) over the pairs (a, b) of all groups; each group's are drawn from itself.

    Draws whose b come to nothing are left out. At least one pair has to have a b above 0.
    """
    rng, groups, found = random.Random(seed), [list(group) for group in groups], []
    for _ in range(DRAWS):
        drawn = [pair for group in groups for pair in rng.choices(group, k=len(group))]
        if bottom := sum(b for _, b in drawn):
            found.append(sum(a for a, _ in drawn) / bottom)
    found.sort()
    return [found[int(0.025 * len(found))], found[int(0.975 * len(found)) - 1]]
