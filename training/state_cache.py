"""Hidden states of a frozen model, computed once to disk and read through memory maps: what a drafter reads of its target, and
what quantization-aware training needs of the original model.

    <folder>/000012.last.bf16     a piece: values of some items, one after the other; a file for each kind of state
    <folder>/000012.json          sizes and CRC-32 of the piece's files, written after them
    <folder>/index.json           kinds and widths, lengths of all items, which items make a piece; written when all are there

All ranks write pieces side by side, each under its final name when it is whole, so that a killed run goes on at the first that
is missing, with any number of ranks. Folder and ranks need a file system in common, as checkpoints do. Logits are never stored
(a vocabulary is a hundred times wider than a hidden state): they are recomputed from the last state.
"""

from __future__ import annotations

import errno
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from storage.files import tree_bytes, write_bytes, write_json
from storage.reading import read_json
from storage.terminal import readable_size
from training.report import ProgressBar

PIECE_TOKENS = 16_384
_ENDINGS = {torch.bfloat16: "bf16", torch.float32: "f32"}
_STORED = {"bf16": (np.uint16, torch.bfloat16), "f32": (np.float32, torch.float32)}


class StateCache:
    """The states in a folder that `write_states` has filled.

    Attributes:
        widths: of a token's state, by kind.
    """

    def __init__(self, folder: Path, accelerator=None):
        """Compares every file with its sum; the ranks share the work, and all raise what one finds.

        Raises:
            ValueError: a damaged cache; it says what to remove.
        """
        self.folder = folder
        index = read_json(folder / "index.json")
        self.widths: dict[str, int] = index["widths"]
        self._ending, self._lengths = index["ending"], index["lengths"]
        self._where = {i: (n, start) for n, items in enumerate(index["pieces"])
                       for i, start in zip(items, _starts([self._lengths[i] for i in items]), strict=True)}
        self._maps: dict[tuple[str, int], np.ndarray] = {}
        self._require_whole(len(index["pieces"]), accelerator)

    def _require_whole(self, pieces: int, accelerator) -> None:
        rank, ranks = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
        fault = next(filter(None, (_damage(self.folder, n) for n in range(rank, pieces, ranks))), None)
        if ranks > 1:
            from accelerate.utils import gather_object

            fault = next(filter(None, gather_object([fault])), None)
        if fault:
            raise ValueError(f"{fault}: the cache is damaged; remove {self.folder} to write it anew")

    def __contains__(self, item: int) -> bool:
        return item in self._where

    def read(self, kind: str, item: int) -> torch.Tensor:
        """The states [tokens, width] of an item, in the dtype that they were written in."""
        piece, start = self._where[item]
        stored, dtype = _STORED[self._ending]
        if (kind, piece) not in self._maps:
            file = _file(self.folder, piece, kind, self._ending)
            self._maps[kind, piece] = np.memmap(file, stored, "r").reshape(-1, self.widths[kind])
        return torch.from_numpy(self._maps[kind, piece][start:start + self._lengths[item]].copy()).view(dtype)


def is_written(folder: Path) -> bool:
    return (folder / "index.json").is_file()


def write_states(folder: Path, *, items: list[int], lengths: list[int], widths: dict[str, int], dtype: torch.dtype,
                 compute: Callable[[list[int]], dict[str, list[torch.Tensor]]], key: str, limit_gib: float,
                 accelerator=None, rest: Callable[[], None] = lambda: None, say: Callable[[str], None] = print,
                 beside: int = 0, label: str = "states") -> None:
    """Fills `folder`; all ranks call it.

    Args:
        items: in the order in which they are computed. lengths: tokens of every item, by its number.
        widths: of a token's state, by kind. dtype: bfloat16 or float32.
        compute: items -> for each kind their states [tokens, width].
        key: recipe key of the limit, for the message. limit_gib: GiB that this cache and the folder's neighbours may take.
        beside: bytes that the job writes to the same disk later.
        rest: called when this rank has no more to compute (`training.sharding.lockstep`).

    Raises:
        ValueError: larger than the limit, before anything is written. OSError: no room for it on the disk.
    """
    rank, ranks = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    ending, tokens = _ENDINGS[dtype], sum(lengths[i] for i in items)
    need = tokens * sum(widths.values()) * dtype.itemsize
    if need > limit_gib * 2**30:
        raise ValueError(f"{key}: {limit_gib:g}, but {label} of {tokens:,} tokens take {need / 2**30:.4g} GiB; raise it, or do "
                         "without the cache")
    if rank == 0:
        _make_room(folder, int(limit_gib * 2**30) - need, say)
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free + tree_bytes(folder)
        if free < need + beside:
            later = f", checkpoints and result {readable_size(beside)}" if beside else ""
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {label} take {readable_size(need)}{later}, "
                          f"{readable_size(free)} are free", str(folder))
        say(f"{label} of {tokens:,} tokens: {need / 2**30:.2f} GiB in {folder}")
    _wait(accelerator)
    pieces = list(_pieces(items, lengths))
    mine = [n for n in range(rank, len(pieces), ranks) if not _file(folder, n).is_file()]
    bar = ProgressBar(len(mine), 0, enabled=rank == 0, every=max(1, len(mine) // 5), label=label,
                      unit=f"{label}: piece")
    for done, number in enumerate(mine, 1):
        _write_piece(folder, number, compute(pieces[number]), ending)
        bar.update(done, "")
    bar.close()
    rest()
    _wait(accelerator)
    if rank == 0:
        write_json(folder / "index.json", {"widths": widths, "ending": ending, "lengths": lengths, "pieces": pieces})
    _wait(accelerator)


def _write_piece(folder: Path, number: int, states: dict[str, list[torch.Tensor]], ending: str) -> None:
    stored, dtype = _STORED[ending]
    files = {}
    for kind, values in states.items():
        flat = torch.cat(values).to("cpu", dtype).contiguous()
        data = flat.view(torch.uint16 if ending == "bf16" else dtype).numpy().astype(stored, copy=False).tobytes()
        write_bytes(_file(folder, number, kind, ending), data)
        files[_file(folder, number, kind, ending).name] = {"bytes": len(data), "crc32": zlib.crc32(data)}
    write_json(_file(folder, number), files)


def _pieces(items: list[int], lengths: list[int]):
    piece, tokens = [], 0
    for item in items:
        if piece and tokens + lengths[item] > PIECE_TOKENS:
            yield piece
            piece, tokens = [], 0
        piece.append(item)
        tokens += lengths[item]
    if piece:
        yield piece


def _starts(lengths: list[int]) -> list[int]:
    return [0, *np.cumsum(lengths)[:-1].tolist()]


def _file(folder: Path, piece: int, kind: str | None = None, ending: str = "") -> Path:
    return folder / (f"{piece:06d}.json" if kind is None else f"{piece:06d}.{kind}.{ending}")


def _damage(folder: Path, piece: int) -> str | None:
    """What is wrong with a piece's files, or None."""
    try:
        files = read_json(_file(folder, piece))
    except ValueError as error:
        return str(error)
    for name, facts in files.items():
        try:
            found = checksum(folder / name)
        except OSError as error:
            return f"{folder / name}: {error.strerror}"
        if found != facts["crc32"]:
            return f"{folder / name}: CRC-32 {found}, written with {facts['crc32']}"
    return None


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def _make_room(folder: Path, room: int, say: Callable[[str], None]) -> None:
    """Removes the folder's oldest neighbours until they take at most `room` bytes: they can be computed again."""
    others = sorted((p for p in folder.parent.glob("*") if p.is_dir() and p != folder), key=lambda p: p.stat().st_mtime)
    sizes = {other: tree_bytes(other) for other in others}
    for other in others:
        if sum(sizes.values()) <= room:
            return
        say(f"states of other data or another model removed: {other} ({sizes.pop(other) / 2**30:.2f} GiB)")
        shutil.rmtree(other)


def _wait(accelerator) -> None:
    if accelerator is not None:
        accelerator.wait_for_everyone()
