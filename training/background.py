"""Checkpoints that are written while training goes on (`checkpoint.async`).

The state is copied into host memory; a thread on each rank writes the copy, and the ranks agree on what is whole over a process
group of their own (gloo, whatever training uses: two threads of a process must not mix their collectives). Nothing else
changes: files are written aside, and the rename is the last act, so a job that is killed meanwhile leaves the checkpoint
before. One is on its way at most; the next one, a signal and the end of training wait for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch.distributed as dist

from training.accelerator import PATIENCE

GROUP = "checkpoint"  # its timeout stays: a rank whose disk is slow is no hang


class Ranks:
    """What `training.checkpoint.save_checkpoint` needs of an Accelerator, over a process group of its own."""

    def __init__(self, accelerator):
        self.process_index, self.num_processes = accelerator.process_index, accelerator.num_processes
        self.is_main_process = accelerator.is_main_process
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE, group_desc=GROUP) if self.num_processes > 1 else None

    def wait_for_everyone(self) -> None:
        if self.group is not None:
            dist.barrier(self.group)

    def gather_objects(self, value: object) -> list:
        """Every rank's value, on every rank."""
        parts = [value] * self.num_processes
        if self.group is not None:
            dist.all_gather_object(parts, value, group=self.group)
        return parts


class BackgroundSave:
    """The thread that writes; `used`: whether there will be any (all ranks make the group together)."""

    def __init__(self, accelerator, *, used: bool):
        self._ranks = Ranks(accelerator) if used else None
        self._thread: threading.Thread | None = None
        self._error: OSError | ValueError | RuntimeError | None = None

    def begin(self, work: Callable[[Ranks], None]) -> None:
        """Runs `work` in the thread. The one before must be over (`wait`)."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[Ranks], None]) -> None:
        try:
            work(self._ranks)
        except (OSError, ValueError, RuntimeError) as error:
            self._error = error

    def look(self) -> None:
        """Raises what went wrong, if the thread has failed by now."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written. Raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
