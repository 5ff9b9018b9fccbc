"""Hangs: a job of several ranks that stops making progress ends in minutes, and says which rank is at what.

The first step may take long (a rank tokenizes a corpus, kernels are compiled), so the process group starts with hours of
patience (`training.accelerator`). After it every rank tells the launcher's store what it is at, whenever that changes; a
thread looks at the clock. Ranks wait for each other in collectives, so all of them stop when one does: the one to look at is
the one that is furthest behind, and it prints where it stands.

Rejected: the process group's own timeout alone (it names a collective, on the ranks that wait; on GPUs it ends the process from
another thread). It is set too, a minute later, for ranks whose thread cannot run.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from training.background import GROUP

STAGES = ("data", "update", "report", "checkpoint")
BACKSTOP = timedelta(minutes=1)


class Watch:
    """Watches one rank's progress; on a single process it does nothing.

    Args:
        minutes: without progress, after which the job ends with code 1.
    """

    def __init__(self, minutes: float, *, rank: int, ranks: int):
        self.limit, self.rank, self.ranks = minutes * 60, rank, ranks
        self._position, self._since = (0, 0), time.monotonic()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Called after the first step."""
        if self.ranks == 1 or self._thread is not None:
            return
        set_timeouts(timedelta(seconds=self.limit) + BACKSTOP)
        self._store = dist.distributed_c10d._get_default_store()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    def end(self, patience: timedelta) -> None:
        """Called when steps are over: evaluation and writing may take long."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            set_timeouts(patience)

    def at(self, step: int, stage: str) -> None:
        """This rank begins `stage` of `step`."""
        self._position, self._since = (step, STAGES.index(stage)), time.monotonic()
        if self._thread is not None:
            self._store.set(f"watch/{self.rank}", f"{step} {STAGES.index(stage)}")

    def batches(self, batches: Iterator, step) -> Iterator:
        """The same batches; waiting for one is a stage of its own. step: gives the present step."""
        while True:
            self.at(step(), "data")
            batch = next(batches)
            self.at(step(), "update")
            yield batch

    def _look(self) -> None:
        while not self._stop.wait(min(1.0, self.limit / 10)):
            if time.monotonic() - self._since > self.limit:
                print(self._report(), file=sys.stderr, flush=True)
                if self._position == min(self._positions().values()):
                    faulthandler.dump_traceback()
                os._exit(1)

    def _positions(self) -> dict[int, tuple[int, int]]:
        found = {self.rank: self._position}
        for rank in range(self.ranks):
            if rank != self.rank and self._store.check([f"watch/{rank}"]):
                step, stage = self._store.get(f"watch/{rank}").decode().split()
                found[rank] = int(step), int(stage)
        return found

    def _report(self) -> str:
        positions = self._positions()
        behind = min(positions.values())
        late = [rank for rank, position in sorted(positions.items()) if position == behind]
        names = ("every rank" if len(late) == len(positions) else
                 f"rank{'s' if len(late) > 1 else ''} {', '.join(map(str, late[:8]))}{' …' if len(late) > 8 else ''}")
        return (f"rank {self.rank}: error: no progress for {self.limit / 60:g} minutes at step {self._position[0] + 1} "
                f"({STAGES[self._position[1]]}); furthest behind: {names}, at step {behind[0] + 1} ({STAGES[behind[1]]}); "
                "stopped (cluster.hang_minutes)")


def set_timeouts(timeout: timedelta) -> None:
    """Sets the timeout of every process group of this process but that of checkpoints written aside."""
    for group in dist.distributed_c10d._world.pg_map:
        if group.group_desc == GROUP:
            continue
        dist.distributed_c10d._set_pg_timeout(timeout, group)
