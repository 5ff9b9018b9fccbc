"""The target's features of packed rows: computed in the loop, or once to disk.

The target always sees each dialogue alone, padded on the right, where a causal model cannot see it: its features are
those of serving, not of whatever stands next to it in a packed row.

Disk cache: two memory-mapped files of bf16 values, target layers and last hidden state, dialogues one after the other,
and an index with a CRC-32 of each file, written last. Logits are never stored (a vocabulary is a hundred times wider
than a hidden state): they are recomputed from the last hidden state.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dflash_train.dialogues import Dialogue, PackedRows
from dflash_train.reference_decoding import by_length, in_token_batches
from dflash_train.target import Target
from storage.files import tree_bytes, write_text
from training.report import ProgressBar

FILES = ("taps", "last")
FORWARD_TOKENS = 8_192  # of one forward pass: larger ones need more memory and, on a CPU, up to 1.7 times the time


def run_dialogues(target: Target, token_lists: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [B, T, n * H] and last hidden states [B, T, H] of dialogues, padded on the right to the longest."""
    longest, pad = max(map(len, token_lists)), target.end_ids[0]
    ids = torch.tensor([tokens + [pad] * (longest - len(tokens)) for tokens in token_lists], device=target.device)
    return target.run(ids)


class OnlineFeatures:
    """Runs the target for every batch of rows."""

    def __init__(self, target: Target, dialogues: list[Dialogue], rows: PackedRows):
        self.target, self.dialogues, self.rows = target, dialogues, rows

    def of_rows(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [B, S, n * H] and last hidden states [B, S, H] of the packed rows `indices`; zeros where nothing is."""
        placed = [(b, *member) for b, r in enumerate(indices) for member in self.rows.members[r]]
        lengths, shape = [size for *_, size in placed], (len(indices), self.rows.tokens.shape[1])
        out: tuple[torch.Tensor, ...] = ()
        for batch in in_token_batches(by_length(lengths, int), lengths, len(lengths), FORWARD_TOKENS):
            chosen = [placed[i] for i in sorted(batch)]
            both = run_dialogues(self.target, [self.dialogues[i].tokens[:size] for _, i, _, size in chosen])
            out = out or tuple(t.new_zeros(*shape, t.shape[-1]) for t in both)
            for whole, part in zip(out, both, strict=True):
                for source, (b, _, begin, size) in enumerate(chosen):
                    whole[b, begin:begin + size] = part[source, :size]
        return out


class DiskFeatures:
    """Features written once, then read through a memory map."""

    def __init__(self, target: Target, dialogues: list[Dialogue], rows: PackedRows, folder: Path):
        self.rows, self.folder = rows, folder
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        self.offsets = np.concatenate(([0], np.cumsum(sizes(dialogues, rows))))
        self.widths = index["widths"]
        for name in FILES:
            found = checksum(folder / f"{name}.bf16")
            if found != index["crc32"][name]:
                raise ValueError(f"{folder / name}.bf16: CRC-32 {found}, the index says {index['crc32'][name]}: the cache is "
                                 f"damaged; remove {folder} to write it anew")
        self.maps = {n: np.memmap(folder / f"{n}.bf16", np.uint16, "r", shape=(int(self.offsets[-1]), self.widths[n]))
                     for n in FILES}
        self.device = target.device

    def of_rows(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """As `OnlineFeatures.of_rows`, in bf16."""
        length, out = self.rows.tokens.shape[1], []
        for name in FILES:
            values = np.zeros((len(indices), length, self.widths[name]), np.uint16)
            for b, r in enumerate(indices):
                for i, begin, size in self.rows.members[r]:
                    values[b, begin:begin + size] = self.maps[name][self.offsets[i]:self.offsets[i] + size]
            out.append(torch.from_numpy(values).view(torch.bfloat16).to(self.device))
        return tuple(out)


def sizes(dialogues: list[Dialogue], rows: PackedRows) -> list[int]:
    """Tokens of each dialogue as packed."""
    return [min(len(d.tokens), rows.tokens.shape[1]) for d in dialogues]


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def take_space(file: Path, size: int) -> None:
    """An empty file of `size` bytes that the disk has room for: a map of one with holes ends the process (SIGBUS) when the disk
    is full. Where the system or the disk cannot promise room, the file has holes.

    Raises:
        OSError: no room; it names the file.
    """
    with file.open("wb") as stream:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise OSError(error.errno, error.strerror, str(file)) from None


def cached_features(target: Target, dialogues: list[Dialogue], rows: PackedRows, folder: Path, *, limit_gib: float,
                    batch_size: int, say: Callable[[str], None] = print) -> DiskFeatures:
    """The cache in `folder`, written first if it is not there.

    Raises:
        ValueError: it would be larger than `limit_gib` GiB (before anything is written); a damaged cache.
        OSError: the disk is full (before the target runs, where the system can tell).
    """
    if not (folder / "index.json").is_file():
        write_features(target, dialogues, rows, folder, limit_gib=limit_gib, batch_size=batch_size, say=say)
    return DiskFeatures(target, dialogues, rows, folder)


def _make_room(folder: Path, room: int, say: Callable[[str], None]) -> None:
    """Removes the run's oldest other caches until they take at most `room` bytes: they can be computed again."""
    others = sorted((p for p in folder.parent.glob("*") if p.is_dir() and p != folder), key=lambda p: p.stat().st_mtime)
    sizes_of = {other: tree_bytes(other) for other in others}
    for other in others:
        if sum(sizes_of.values()) <= room:
            return
        say(f"features of other answers or another target removed: {other} ({sizes_of.pop(other) / 2**30:.2f} GiB)")
        shutil.rmtree(other)


def write_features(target: Target, dialogues: list[Dialogue], rows: PackedRows, folder: Path, *, limit_gib: float,
                   batch_size: int, say: Callable[[str], None]) -> None:
    lengths = sizes(dialogues, rows)
    widths = {"taps": len(target.target_layers) * target.hidden_size, "last": target.hidden_size}
    need = sum(lengths) * sum(widths.values()) * 2
    if need > limit_gib * 2**30:
        raise ValueError(f"dflash.features: disk: {need / 2**30:.1f} GiB for {sum(lengths):,} tokens, more than "
                         f"dflash.features_gib={limit_gib}; raise it, use fewer answers, or dflash.features: online")
    _make_room(folder, int(limit_gib * 2**30) - need, say)
    folder.mkdir(parents=True, exist_ok=True)
    say(f"the target's features of {sum(lengths):,} tokens: {need / 2**30:.2f} GiB in {folder}")
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    try:
        for name, width in widths.items():
            take_space(folder / f"{name}.bf16", sum(lengths) * width * 2)
    except OSError:
        shutil.rmtree(folder)  # what was taken so far is given back
        raise
    maps = {n: np.memmap(folder / f"{n}.bf16", np.uint16, "r+", shape=(int(offsets[-1]), w)) for n, w in widths.items()}
    order = by_length(dialogues, lambda d: len(d.tokens))
    batches = list(in_token_batches(order, lengths, batch_size, FORWARD_TOKENS))
    bar = ProgressBar(len(batches), 0, enabled=True, every=max(1, len(batches) // 5), label="features", unit="features: batch")
    for number, batch in enumerate(batches, 1):
        both = run_dialogues(target, [dialogues[i].tokens[:lengths[i]] for i in batch])
        for name, tensor in zip(FILES, both, strict=True):
            values = tensor.to("cpu", torch.bfloat16).view(torch.uint16).numpy()
            for row, i in enumerate(batch):
                maps[name][offsets[i]:offsets[i] + lengths[i]] = values[row, :lengths[i]]
        bar.update(number, "")
    bar.close()
    for array in maps.values():
        array.flush()
    write_text(folder / "index.json", json.dumps(
        {"widths": widths, "tokens": sum(lengths), "crc32": {n: checksum(folder / f"{n}.bf16") for n in FILES}}))
