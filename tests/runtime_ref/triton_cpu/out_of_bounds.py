"""Started by test_host.py with FP4_KERNEL_BOUNDS=1: kernels that read behind, before and not at all outside their tensors."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
import triton
import triton.language as tl

from runtime_ref.triton_cpu.backend import use_host


@triton.jit
def shifted(x, out, by, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + i, tl.load(x + i + by))


@triton.jit
def counted(counter, at):
    tl.atomic_add(counter + at, 1)


def said(launch) -> str:
    try:
        launch()
    except IndexError as error:
        return str(error)
    return "nothing"


if __name__ == "__main__":
    use_host()
    memory = torch.arange(64.0)
    x, out, counter = memory[16:48], torch.zeros(32), torch.zeros(4, dtype=torch.int32)
    for by in (0, 3, -2):
        print(said(lambda by=by: shifted[(2,)](x, out, by, N=16)))
    print(said(lambda: shifted[(3,)](memory, out, 0, N=16)))
    print(said(lambda: counted[(1,)](counter, 4)))
    print(said(lambda: shifted[(2,)](x, out, 0, N=16)), torch.equal(out, x))
