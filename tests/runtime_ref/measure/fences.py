"""Prints what a signal to eight ranks compiles to for sm_90a, as JSON: fences of the whole system, exchanges, all instructions.

A process of its own, because the tests' process has chosen the interpreter."""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

import triton
import triton.language as tl

from runtime_ref.kernels.sync import signal_ranks
from runtime_ref.measure.static.gates import compile_kernel
from runtime_ref.measure.static.sass import read_binary


@triton.jit
def signal_kernel(signals, flag, rank, epoch, RANKS: tl.constexpr):
    signal_ranks(signals, flag, rank, epoch, RANKS)


if __name__ == "__main__":
    from triton.backends.compiler import GPUTarget

    compiled = compile_kernel(signal_kernel, {"RANKS": 8}, GPUTarget("cuda", 90, 32), num_warps=8)
    listing = read_binary(compiled.asm["cubin"]).instructions
    barriers = [i for i, text in enumerate(listing) if "BAR.SYNC" in text]
    fences = [i for i, text in enumerate(listing) if "MEMBAR" in text and "SYS" in text]
    exchanges = [i for i, text in enumerate(listing) if "ATOM" in text and "EXCH" in text]
    print(json.dumps({"barriers": barriers, "fences": fences, "exchanges": exchanges, "instructions": len(listing)}))
