"""Runs programs (or ranks) at the same time: one process each over shared memory, with a time limit.

Triton's interpreter runs programs one after another, so a program that waits for a later one never ends. Here every
program is a forked process whose interpreter (or launcher, where kernels are compiled for the CPU) is told a fixed program
id. Atomics are the machine's own in both, so counters in shared memory work across processes. A deadlock is a process that
outlives the limit: it is killed and reported. What this can't show: reorderings that x86 does not make, and programs that are
not resident.
"""

import multiprocessing
import os
import time
from collections.abc import Callable

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

SECONDS = 300
# Whether kernels run in the interpreter; else they are compiled for the CPU (tests/conftest.py).
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def shared(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, in memory that forked processes share."""
    return tensor.share_memory_()


def fixed_program(program: int, programs: int) -> None:
    """Makes this process's launches run program `program` of a one-dimensional grid, and nothing else."""
    if not INTERPRETED:
        from runtime_ref.triton_cpu.backend import HostLauncher

        HostLauncher.only = program, programs
        return

    def handle(value):
        return interpreter.TensorHandle(np.array([value], dtype=np.int32), tl.int32)

    interpreter.interpreter_builder.create_get_program_id = lambda axis: handle(program if axis == 0 else 0)
    interpreter.interpreter_builder.create_get_num_programs = lambda axis: handle(programs if axis == 0 else 1)


def at_once(count: int, job: Callable[[int], None], seconds: float = SECONDS) -> list[int | None]:
    """Runs job(0), …, job(count - 1) in forked processes; exit codes, None for one that had to be killed."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_run, args=(job, i), daemon=True) for i in range(count)]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.exitcode is None:
            process.kill()
            process.join()
    return codes


def programs_at_once(programs: int, launch: Callable[[], None], seconds: float = SECONDS) -> list[int | None]:
    """Runs one launch with grid (1,) in `programs` processes, each as its own program of the grid."""
    def job(program: int) -> None:
        fixed_program(program, programs)
        launch()

    return at_once(programs, job, seconds)


def _run(job: Callable[[int], None], i: int) -> None:
    torch.set_num_threads(1)
    job(i)
