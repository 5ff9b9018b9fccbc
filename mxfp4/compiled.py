"""Rounding, packing and decoding of blocks by `blocks.c`, on CPUs where a C compiler is.

Bit for bit what `mxfp4.codec` gives, for numbers of the sizes that trained weights have; other blocks are left to the caller.
One pass over memory: rounding takes a quarter of what a dozen torch operations on chunks take, as does reading codes off
(docs/results/fake-quant.md).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from mxfp4.format import BLOCK_SIZE
from storage.compiled import FLAGS, load_compiled

SOURCE = Path(__file__).with_name("blocks.c")
NAMES = {torch.float32: "float", torch.bfloat16: "bf16"}
BLOCKS_PER_THREAD = 1 << 14  # a second thread starts in about 50 us, as long as 2^17 values take
OTHER_BLOCKS = 1024


@functools.cache
def blocks(flags: tuple[str, ...] = FLAGS) -> ctypes.CDLL | None:
    """The compiled functions, or None where they cannot be compiled."""
    found, _ = load_compiled((SOURCE,), flags)
    if found is not None:
        pointer, count, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        types = {f"round_{source}_{target}": [pointer, pointer, count, ctypes.c_uint32, flag, flag]
                 for source in NAMES.values() for target in NAMES.values()}
        types |= dict.fromkeys(("pack_bf16", "unpack_bf16", "compare_bf16"), [pointer, pointer, pointer, count])
        for name, arguments in types.items():
            function = getattr(found, name)
            function.argtypes, function.restype = arguments, count
    return found


def rounds(source: torch.Tensor, target: torch.Tensor) -> bool:
    """Whether `round_blocks` takes tensors like these."""
    return source.device.type == target.device.type == "cpu" and source.dtype in NAMES and target.dtype in NAMES \
        and blocks() is not None


def round_blocks(w: torch.Tensor, out: torch.Tensor, *, bump: int, finer: bool, saturates: bool,
                 otherwise: Callable[[slice], None]) -> None:
    """Rounds blocks of `w` into `out`, on as many threads as torch has.

    Args:
        w, out: float32 or bfloat16 [n, 32], contiguous; one may be the other.
        bump: `codec.scale_bump` of the rule; finer: whether it chooses between two scales; saturates: whether its scales
            can be too small for a block's maximum.
        otherwise: rounds a piece that begins with a block of numbers that are not for it.
    """
    function = getattr(blocks(), f"round_{NAMES[w.dtype]}_{NAMES[out.dtype]}")
    addresses, sizes = (w.data_ptr(), out.data_ptr()), (BLOCK_SIZE * w.element_size(), BLOCK_SIZE * out.element_size())
    count = w.shape[0]
    each = max(-(-count // torch.get_num_threads()), BLOCKS_PER_THREAD)

    def work(start: int, end: int) -> int:
        """The first block from `start` on that is not for the function, or `end`."""
        source, target = (address + start * size for address, size in zip(addresses, sizes, strict=True))
        return start + function(source, target, end - start, bump, finer, saturates)

    parts = [(start, min(start + each, count)) for start in range(0, count, each)]
    if len(parts) == 1:
        reached = [work(*parts[0])]
    else:
        with ThreadPoolExecutor(len(parts)) as threads:
            reached = list(threads.map(work, *zip(*parts, strict=True)))
    # Here and not in the threads: whether gradients are recorded is a matter of each thread's own.
    for done, (_, end) in zip(reached, parts, strict=True):
        while done < end:
            otherwise(slice(done, min(done + OTHER_BLOCKS, end)))
            done = work(done + OTHER_BLOCKS, end) if done + OTHER_BLOCKS < end else end


def pack_blocks(w: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> bool:
    """Codes uint8 [n, 16] and scales uint8 [n] of bfloat16 [n, 32], all contiguous. False where a value is not on the grid, or
    a block's maximum is below 2^-118 without being zero, or too large for its scale byte."""
    count = _blocks_of(codes, scales, w)
    return blocks().pack_bf16(w.data_ptr(), codes.data_ptr(), scales.data_ptr(), count) == count


def unpack_blocks(codes: torch.Tensor, scales: torch.Tensor, values: torch.Tensor, *, compare: bool = False) -> int:
    """Writes bfloat16 `values` [n, 32] of codes uint8 [n, 16] and scales uint8 [n], or compares with them, all contiguous.

    Returns:
        How many blocks were done, fewer than n where the next one has a scale byte below 2 or above 252, or differs.
    """
    function = blocks().compare_bf16 if compare else blocks().unpack_bf16
    return function(codes.data_ptr(), scales.data_ptr(), values.data_ptr(), _blocks_of(codes, scales, values))


def _blocks_of(codes: torch.Tensor, scales: torch.Tensor, values: torch.Tensor) -> int:
    """n. Raises ValueError for tensors that the functions would read beyond, or that are on another device."""
    count, given = scales.numel(), (codes, scales, values)
    if (codes.numel() * 2, values.numel()) != (count * BLOCK_SIZE,) * 2 or values.dtype is not torch.bfloat16 or any(
            t.device.type != "cpu" or not t.is_contiguous() for t in given) or any(t.element_size() != 1 for t in given[:2]):
        raise ValueError("codes, scales and values do not belong together: " + ", ".join(
            f"{t.dtype} {list(t.shape)} on {t.device}" for t in given))
    return count
