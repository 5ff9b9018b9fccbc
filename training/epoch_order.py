"""The order of rows over epochs, resumable at any row."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class EpochOrder(Sampler[int]):
    """Row indices of one epoch: the identity, or a permutation that depends on (seed, epoch) alone."""

    def __init__(self, rows: int, *, seed: int, shuffle: bool):
        self.rows, self.seed, self.shuffle, self.epoch = rows, seed, shuffle, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        if not self.shuffle:
            return iter(range(self.rows))
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        return iter(torch.randperm(self.rows, generator=generator).tolist())
