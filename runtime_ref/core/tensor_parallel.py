"""Ranks of one engine: which shares of the model a rank holds, and the only three collectives there are.

Tensor parallelism over heads and over rows of every expert, never expert parallelism: at eight tokens a step some rank
would own 1.5 times its share of the experts that are touched.

The number of shares is fixed by the model, not by the number of ranks: every matrix is cut into `shares(n)` equal parts (8
where 8 divides it), a rank holds a run of consecutive parts, and partial sums of all parts are added in the order of the
parts. So 1, 2, 4 and 8 ranks add the same numbers in the same order. An all-reduce of the backend was rejected: its order
is not ours.

Every rank runs the same engine on the same requests; only rank 0 talks to the outside.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout  # there is no public way to change it later

from storage.reading import first_line

SHARES = 8
# Ranks load at their own pace, and some work is rank 0's alone; but a step takes milliseconds: a peer that is silent for so
# long while requests are served is gone. (One that ends is noticed at once.)
LOADING_SECONDS, PEER_TIMEOUT_SECONDS = 6 * 3600, 60


class RankLost(RuntimeError):
    """A peer ended or hangs; the message says so in one line."""


def shares(size: int) -> int:
    """Parts into which a dimension is cut: the largest of 8, 4, 2, 1 that divides it."""
    return math.gcd(SHARES, size)


@dataclass(frozen=True)
class Ranks:
    """This process among `count`; (0, 1) needs no process group."""

    rank: int = 0
    count: int = 1

    def part(self, size: int) -> slice:
        """This rank's parts of a dimension of `size` entries, as a slice over its `shares(size)` parts.

        Raises:
            ValueError: more ranks than parts.
        """
        parts = shares(size)
        if parts % self.count:
            raise ValueError(f"{self.count} ranks: a dimension of {size} entries is cut into {parts} parts, "
                             f"expected a number of ranks that divides {parts}")
        own = parts // self.count
        return slice(self.rank * own, (self.rank + 1) * own)

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """All parts [n, ...] in order, from each rank's contiguous run of them [n / ranks, ...]."""
        if self.count == 1:
            return own
        pieces = [torch.empty_like(own) for _ in range(self.count)]
        self._guarded(dist.all_gather, pieces, own.contiguous())
        return torch.cat(pieces)

    def broadcast(self, value):
        """Rank 0's picklable value, on every rank."""
        if self.count == 1:
            return value
        box = [value]
        self._guarded(dist.broadcast_object_list, box, src=0)
        return box[0]

    def barrier(self) -> None:
        """On the host, whatever else the ranks talk over."""
        if self.count > 1:
            self._guarded(dist.all_reduce, torch.zeros(1))

    def shorten_timeout(self, timeout_seconds: float = PEER_TIMEOUT_SECONDS) -> None:
        """Waits until all ranks have come here; from now on a peer may be silent for so long, and no longer."""
        self.barrier()
        if self.count > 1:
            _set_pg_timeout(timedelta(seconds=timeout_seconds))

    def abandon(self) -> None:
        """Closes the connections to the other ranks, so that those who wait for this one end at once, not after a timeout.

        For a rank whose engine has failed while its process lives on.
        """
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def _guarded(self, collective, *args, **kwargs):
        if not dist.is_initialized():
            raise RankLost(f"rank {self.rank}: has left the {self.count} ranks after an error of its own")
        try:
            return collective(*args, **kwargs)
        except (RuntimeError, dist.DistBackendError) as error:
            reason = first_line(error)[:160]
            raise RankLost(f"rank {self.rank}: another of the {self.count} ranks ended or does not answer ({reason})") from None


SINGLE_RANK = Ranks()


def ranks_from_environment() -> Ranks:
    """The ranks that torchrun started, or a single one when it did not. They talk over gloo; what lies on GPUs goes over NCCL
    if there is one for each rank.

    Raises:
        ValueError: a number of ranks that is not 1, 2, 4 or 8.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Ranks()
    if SHARES % count:
        raise ValueError(f"{count} ranks, expected 1, 2, 4 or 8")
    if not dist.is_initialized():
        own = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", count))
        dist.init_process_group("cpu:gloo,cuda:nccl" if own else "gloo", timeout=timedelta(seconds=LOADING_SECONDS))
    return Ranks(dist.get_rank(), dist.get_world_size())


def leave(ranks: Ranks) -> None:
    """Ends the process group that `ranks_from_environment` began."""
    if ranks.count > 1 and dist.is_initialized():
        dist.destroy_process_group()
