"""Counters of arrivals for launches whose last program joins what all have delivered: zero between calls, kept per device.

The kernels put their counters back to zero themselves, so a call needs zeros only once; cleared anew, they would be a launch
more for every layer that attends or routes, in a step that is made of launches.

A call takes a buffer out of the store and puts it back behind its launch: calls of two threads never share one, and calls of
one thread, which a device runs in order, share all. (Launches of one process on several streams at once would not be in order.)
Buffers are never freed, since a captured graph may hold their addresses; a call that is captured before any other has made its
buffer gets one inside the graph, with its own clearing, as before. A call that does not come back from its launch leaves the
counters anywhere: its buffer is cleared before the next call gets it.

Rejected: counters in whoever owns the layer (a drafter, a judge and tests call the same functions), counting epochs instead of
going back to zero (the number of chunks differs from call to call).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

LEAST = 64
_kept: defaultdict[tuple[torch.device, int], list[torch.Tensor]] = defaultdict(list)


@contextmanager
def arrivals(count: int, device: torch.device) -> Iterator[torch.Tensor]:
    """int32 [count] of zeros for one launch, which must leave zeros behind."""
    size = max(LEAST, 1 << (count - 1).bit_length())
    kept = _kept[device, size]
    try:
        own = kept.pop()
    except IndexError:
        if captured(device):
            yield zeros(count, device)
            return
        own = zeros(size, device)
    try:
        yield own[:count]
    except BaseException:
        own.zero_()
        raise
    finally:
        kept.append(own)


def captured(device: torch.device) -> bool:
    """Whether launches are being recorded into a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def zeros(size: int, device: torch.device) -> torch.Tensor:
    """A new buffer; no tensor of inference mode, since it outlives the call and is cleared anywhere."""
    with torch.inference_mode(False):
        return torch.zeros(size, dtype=torch.int32, device=device)
