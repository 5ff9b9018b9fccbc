"""Memory of each rank that every rank can address: what the megakernel sums over ranks in (`megakernel.py`).

Each rank has a buffer of two halves of float32 and flags, int32 [places, ranks]; a kernel gets the addresses of everybody's as
a table of int64. On GPUs they are torch's symmetric memory (one NVLink domain). In Triton's interpreter they are a file in
memory that each process maps: addresses differ between processes, the memory does not, and atomics work across them. One rank
needs none of it: the kernel compiled for one rank never reads the tables.

Rejected: NVSHMEM (another dependency, for one node), sums in the switch (`multimem.ld_reduce`: its order is not ours).
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import torch

from runtime_ref.core.tensor_parallel import Ranks
from storage.reading import first_line

_SHARED = Path("/dev/shm")
_LINE = 128  # bytes that one piece of memory keeps to itself


class Symmetric:
    """Two halves of `half` float32, `more` of them, and `places` flags per rank, on every rank. Collective: all ranks make it
    together.

    Raises:
        ValueError: GPUs that cannot address each other's memory.
    """

    def __init__(self, ranks: Ranks, half: int, places: int, device: str, more: int = 0):
        self.ranks, self.half = ranks, half
        self.launches = torch.zeros(1, dtype=torch.int32, device=device)  # launches so far, counted by the kernel
        if ranks.count == 1:
            nothing = torch.zeros(1, dtype=torch.int64, device=device)
            self.buffers, self.signals, self._held = nothing, nothing, None
            return
        floats, flags = -(-(8 * half + 4 * more) // _LINE) * _LINE, -(-4 * places * ranks.count // _LINE) * _LINE
        make = _mapped if device == "cpu" else _symmetric
        addresses, self._held = make(ranks, floats + flags, device)
        self.buffers = torch.tensor(addresses, dtype=torch.int64, device=device)
        self.signals = self.buffers + floats
        ranks.barrier()

    def arguments(self) -> dict:
        """Of `step_kernel`."""
        return {"buffers": self.buffers, "signals": self.signals, "launches": self.launches, "rank": self.ranks.rank,
                "half": self.half}


def _mapped(ranks: Ranks, size: int, device: str) -> tuple[list[int], object]:
    """Addresses, in this process, of zeroed memory of each rank, and what keeps it mapped."""
    name = None
    if ranks.rank == 0:
        handle, name = tempfile.mkstemp(prefix="megakernel-", dir=_SHARED if _SHARED.is_dir() else None)
        os.ftruncate(handle, size * ranks.count)
        os.close(handle)
    name = ranks.broadcast(name)
    with open(name, "r+b") as file:
        memory = mmap.mmap(file.fileno(), size * ranks.count)
    ranks.barrier()  # all have opened it: the name is needed no more
    if ranks.rank == 0:
        os.unlink(name)
    held = torch.frombuffer(memory, dtype=torch.uint8)
    return [held.data_ptr() + size * rank for rank in range(ranks.count)], held


def _symmetric(ranks: Ranks, size: int, device: str) -> tuple[list[int], object]:
    import torch.distributed as dist
    from torch.distributed import _symmetric_memory

    own = _symmetric_memory.empty(size, dtype=torch.uint8, device=torch.device(device, torch.cuda.current_device()))
    own.zero_()
    torch.cuda.synchronize()
    try:
        handle = _symmetric_memory.rendezvous(own, dist.group.WORLD)
    except RuntimeError as error:
        raise ValueError(f"rank {ranks.rank}: no memory that {ranks.count} GPUs share ({first_line(error)[:160]}); "
                         "expected GPUs of one NVLink domain, or steps op by op") from None
    return list(handle.buffer_ptrs), (own, handle)
