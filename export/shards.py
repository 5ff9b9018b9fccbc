"""Streaming writer: a plan of files from names and shapes, then each file filled tensor by tensor, by any number of processes.

Every byte's place is known before the first weight is read: units are dealt to files in order, a file is closed before it
would exceed the limit, and a file's header follows from its units. So processes write different files side by side without
talking, the bytes do not depend on how many they are, and a killed export is continued: a file under its final name is
whole (it is written aside, flushed and renamed).

Memory: two units (a matrix of one expert each; one fused tensor each for gpt-oss), the one being written and the next, which
another thread reads and encodes meanwhile, and what the operating system buffers.

Within a file, tensors stand by falling width of their elements (readers map them, and a 4-byte value must be aligned), and
in published order among equals: down, down scale, gate, gate scale, up, up scale. CRC-32 sums of all tensors are kept beside
each file; `checksums.json` is made of them.

Rejected: safetensors' own writer (holds all tensors of a file in memory at once), one writer process fed by readers (a
second copy of every byte), dividing files among processes by size (bytes would depend on their number).
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint.sources import DTYPE_NAMES, DTYPES
from export.layouts import Unit
from modeling.names import PublishedTensor
from storage.files import tree_bytes, write_bytes
from storage.reading import read_json
from storage.terminal import readable_size

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Shard:
    """One file: its units, its header and the place of each tensor (offset from the start of the file)."""

    name: str
    units: tuple[Unit, ...]
    header: bytes
    offsets: dict[str, int]
    bytes: int

    @property
    def tensors(self) -> list[PublishedTensor]:
        return [t for unit in self.units for t in unit.tensors]


def tensor_bytes(tensor: PublishedTensor) -> int:
    """Bytes of a tensor of any dtype that safetensors can hold."""
    return tensor.elements * DTYPES[tensor.dtype].itemsize


def plan_shards(units: list[Unit], limit: int, stem: str = "model") -> list[Shard]:
    """Deals units to files of at most `limit` bytes of tensors (a larger unit has a file of its own).

    Raises:
        ValueError: two tensors of one name.
    """
    names = [t.name for unit in units for t in unit.tensors]
    if len(set(names)) != len(names):
        raise ValueError(f"tensor {next(n for n in names if names.count(n) > 1)} would be written twice")
    groups: list[list[Unit]] = []
    room = 0
    for unit in units:
        size = sum(tensor_bytes(t) for t in unit.tensors)
        if size > room or not groups:
            groups.append([])
            room = limit
        groups[-1].append(unit)
        room -= size
    return [_shard(f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups)]


def _shard(name: str, units: list[Unit]) -> Shard:
    tensors = sorted((t for unit in units for t in unit.tensors), key=lambda t: -DTYPES[t.dtype].itemsize)
    entries, offsets, end = {"__metadata__": {"format": "pt"}}, {}, 0
    for t in tensors:
        offsets[t.name] = end
        end += tensor_bytes(t)
        entries[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [offsets[t.name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return Shard(name, tuple(units), header, {n: o + len(header) for n, o in offsets.items()}, len(header) + end)


def index_json(shards: list[Shard]) -> str:
    """model.safetensors.index.json."""
    tensors = {t.name: shard.name for shard in shards for t in shard.tensors}
    size = sum(tensor_bytes(t) for shard in shards for t in shard.tensors)
    return json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(tensors.items()))}, indent=1) + "\n"


def require_room(out: Path, need: int, kept: Path | None) -> None:
    """Raises ValueError if `need` bytes of weights do not fit beside `out`. kept: the unfinished export that is continued."""
    place = out.parent
    while not place.exists():
        place = place.parent
    need -= tree_bytes(kept) if kept else 0
    free = shutil.disk_usage(place).free
    if free < need:
        raise ValueError(f"--out {out}: {readable_size(free)} free there, but the export takes {readable_size(need)} more")


def write_shard(shard: Shard, folder: Path, progress: Callable[[int], None] = lambda done: None) -> dict[str, str]:
    """Writes one file, unless it is there; returns the CRC-32 (hex) of each tensor.

    Raises:
        ValueError: a source tensor that is missing, damaged, off the grid or of an unexpected shape.
        OSError: the disk is full or not writable; what was there stays.
    """
    final, sums_path = folder / shard.name, folder / f"{shard.name}.sums"
    if final.is_file() and final.stat().st_size == shard.bytes and (kept := _kept_sums(sums_path, shard)):
        progress(shard.bytes)
        return kept
    partial = final.with_name(final.name + ".partial")
    try:
        partial.unlink(missing_ok=True)  # a pipe of that name would be waited on
        sums = _fill(shard, partial, progress)
        write_bytes(sums_path, json.dumps(sums).encode())
        os.replace(partial, final)
    except OSError as error:
        partial.unlink(missing_ok=True)  # half a file is of no use, and its bytes may be what the disk lacks
        raise OSError(f"{final}: could not be written: {error.strerror or error}; complete files stay, the same command "
                      "continues") from error
    return sums


def _kept_sums(path: Path, shard: Shard) -> dict[str, str] | None:
    """The sums beside a file that is there already; None where they are missing or damaged: then it is written anew."""
    try:
        found = read_json(path)
    except ValueError:
        return None
    return found if found.keys() == shard.offsets.keys() and all(isinstance(s, str) for s in found.values()) else None


def _fill(shard: Shard, path: Path, progress: Callable[[int], None]) -> dict[str, str]:
    """Header and tensors into `path`, down to the disk; CRC-32 by tensor."""
    sums: dict[str, str] = {}
    with path.open("wb") as file:
        file.write(shard.header)
        for unit, tensors in _made_ahead(shard.units):
            written = 0
            for spec, tensor in zip(unit.tensors, tensors, strict=True):
                data = _raw(spec, tensor)
                file.seek(shard.offsets[spec.name])
                file.write(data)
                sums[spec.name] = f"{zlib.crc32(data):08x}"
                written += len(data)
            progress(written)
        file.flush()
        os.fsync(file.fileno())
    return sums


def _made_ahead(units: tuple[Unit, ...]) -> Iterator[tuple[Unit, list[torch.Tensor]]]:
    """Units with their tensors; while one is written, the next is read and encoded by another thread."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(units[0].make)
        for unit, following in zip(units, (*units[1:], None), strict=True):
            tensors = coming.result()
            if following is not None:
                coming = thread.submit(following.make)
            yield unit, tensors


def _raw(spec: PublishedTensor, tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, after checking that it is what the header promises."""
    if tuple(tensor.shape) != tuple(spec.shape) or DTYPE_NAMES.get(tensor.dtype) != spec.dtype:
        raise ValueError(f"{spec.name}: {DTYPE_NAMES.get(tensor.dtype)} {list(tensor.shape)}, expected "
                         f"{spec.dtype} {list(spec.shape)}")
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


class ByteProgress:
    """Bytes, rate and time left: a rich bar on a terminal, a line every ten percent elsewhere."""

    def __init__(self, total: int, label: str, *, enabled: bool = True):
        import time

        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        self.total, self.done, self.label, self.enabled = total, 0, label, enabled
        self._clock, self._began, self._shown = time.monotonic, time.monotonic(), 0
        self._bar = None
        console = Console()
        if enabled and console.is_terminal:
            self._bar = Progress(TextColumn(f"[bold]{label}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
                                 TimeRemainingColumn(), console=console)
            self._bar.start()
            self._task = self._bar.add_task(label, total=total)

    def __call__(self, written: int) -> None:
        self.done += written
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
        elif self.enabled and self.total and 10 * self.done // self.total > self._shown:
            self._shown = 10 * self.done // self.total
            rate = self.done / max(self._clock() - self._began, 1e-9)
            print(f"{self.label}: {readable_size(self.done)} of {readable_size(self.total)}  {rate / 1e6:,.0f} MB/s  "
                  f"ETA {(self.total - self.done) / rate:.0f} s", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
