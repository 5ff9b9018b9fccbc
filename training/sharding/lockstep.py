"""Passes through a sharded model that differ in number from rank to rank: answers of other lengths, batches of other sizes.

Every pass gathers weights from all ranks, so all ranks make it or none gets through. A rank says before each pass that it has
one to make (a sum over one number); a rank that has none left rests: it makes a pass over nothing for as long as another one
works. All ranks rest before they do anything else together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist


class Lockstep:
    """One per sharded model and rank.

    Args:
        idle: a pass whose result nobody wants, as small as can be.
        device: of the number that ranks add up.
    """

    def __init__(self, idle: Callable[[], object], device: torch.device):
        self._idle, self._device = idle, device

    def begin(self) -> None:
        """To be called before every pass."""
        self._working(1)

    def rest(self) -> None:
        """Returns when all ranks rest."""
        while self._working(0):
            self._idle()

    def _working(self, mine: int) -> int:
        ranks = torch.tensor([mine], device=self._device)
        dist.all_reduce(ranks)
        return int(ranks)
