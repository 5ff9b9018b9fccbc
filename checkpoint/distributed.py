"""Folders of torch.distributed.checkpoint (`.metadata` and `*.distcp`): shards of any number of ranks, read piece by piece.

What a rank wrote is a piece of a tensor. For rows of one expert only the pieces are read that hold some of them; the last few
stay in memory, because a layer's experts are read by turns from both of its fused tensors.
"""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta, TensorStorageMetadata

from checkpoint.pickles import load_torch_bytes, read_distributed_metadata
from checkpoint.sources import DTYPE_NAMES, DTYPES, Source
from storage.reading import first_line

KEPT_BYTES = 4 << 30  # of pieces; at least the last two are kept


class DistributedSource(Source):
    """The tensors of a torch.distributed.checkpoint, joined."""

    def __init__(self, folder: Path):
        metadata = read_distributed_metadata(folder / ".metadata")
        tensors = {name: entry for name, entry in metadata.state_dict_metadata.items()
                   if type(entry) is TensorStorageMetadata}
        for name, entry in tensors.items():
            if entry.properties.dtype not in DTYPE_NAMES:
                raise ValueError(f"{folder}: {name}: dtype {entry.properties.dtype}, expected one of {', '.join(DTYPES)}")
        # Accelerate and others nest the model's state under "model".
        nested = all(name.startswith("model.") for name in tensors) and "model.lm_head.weight" in tensors
        self._stored = {name.removeprefix("model.") if nested else name: name for name in tensors}
        self._tensors, self._places = tensors, metadata.storage_data or {}
        super().__init__(folder, {name: (tuple(tensors[stored].size), DTYPE_NAMES[tensors[stored].properties.dtype])
                                  for name, stored in self._stored.items()})
        self._kept: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self._lock = threading.Lock()

    def read(self, name: str) -> torch.Tensor:
        if name not in self._stored:
            raise self._missing(name)
        shape, dtype = self.infos[name]
        out = torch.empty(shape, dtype=DTYPES[dtype])
        filled = 0
        for chunk in self._tensors[self._stored[name]].chunks:
            piece = self._piece(name, chunk)
            out[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))] = piece
            filled += piece.numel()
        self._require_whole(name, filled, out.numel())
        return out

    def read_rows(self, name: str, expert: int, rows: slice) -> torch.Tensor:
        if name not in self._stored:
            raise self._missing(name)
        (_, height, *rest), dtype = self.infos[name]
        first, last, _ = rows.indices(height)
        out = torch.empty((last - first, *rest), dtype=DTYPES[dtype])
        filled = 0
        for chunk in self._tensors[self._stored[name]].chunks:
            at, begin = chunk.offsets[0], chunk.offsets[1]
            low, high = max(first, begin), min(last, begin + chunk.sizes[1])
            if at <= expert < at + chunk.sizes[0] and low < high:
                inner = tuple(slice(o, o + n) for o, n in zip(chunk.offsets[2:], chunk.sizes[2:], strict=True))
                part = self._piece(name, chunk)[expert - at, low - begin:high - begin]
                out[(slice(low - first, high - first), *inner)] = part
                filled += part.numel()
        self._require_whole(name, filled, out.numel())
        return out

    def _require_whole(self, name: str, filled: int, expected: int) -> None:
        if filled != expected:
            raise ValueError(f"{self.folder}: tensor {name}: its pieces hold {filled} of {expected} values")

    def _piece(self, name: str, chunk) -> torch.Tensor:
        """A stored piece: from memory, or from its file."""
        stored = self._stored[name]
        key = stored, tuple(chunk.offsets)
        with self._lock:
            if key not in self._kept:
                piece = self._read_piece(name, stored, chunk)
                while len(self._kept) > 1 and sum(t.nbytes for t in self._kept.values()) + piece.nbytes > KEPT_BYTES:
                    del self._kept[next(iter(self._kept))]
                self._kept[key] = piece
            return self._kept[key]

    def _read_piece(self, name: str, stored: str, chunk) -> torch.Tensor:
        info = self._places.get(MetadataIndex(stored, chunk.offsets))
        if info is None:
            raise ValueError(f"{self.folder}: tensor {name}: a piece is missing")
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"{self.folder}: tensor {name}: stored with {info.transform_descriptors}, expected plain tensors")
        path = self.folder / info.relative_path
        with path.open("rb") as file:
            file.seek(info.offset)
            data = file.read(info.length)
        try:
            piece = load_torch_bytes(data)
        except ValueError as error:
            raise ValueError(f"{path}: tensor {name}: {first_line(error)}") from None
        if not isinstance(piece, torch.Tensor) or tuple(piece.shape) != tuple(chunk.sizes):
            raise ValueError(f"{path}: tensor {name}: holds {getattr(piece, 'shape', type(piece).__name__)}, expected a piece "
                             f"of shape {list(chunk.sizes)}")
        return piece


class SafeReader(checkpoint.FileSystemReader):
    """torch's reader, which unpickles `.metadata` without restriction, with `read_distributed_metadata` instead."""

    def read_metadata(self, *args, **kwargs):
        rank = kwargs.get("rank")
        metadata = read_distributed_metadata(Path(self.path) / (".metadata" if rank is None else f"__{rank}.metadata"))
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafePlanner(DefaultLoadPlanner):
    """torch's planner; what is no tensor is read as plain data (`weights_only`), too."""

    def load_bytes(self, read_item, value) -> None:
        found = load_torch_bytes(value.getvalue())
        if self.flatten_state_dict:
            from torch.distributed.checkpoint._nested_dict import set_element

            set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], found)
        else:
            self.state_dict[read_item.dest_index.fqn] = found


def load_distributed(state: dict, folder: Path, **options) -> None:
    """`torch.distributed.checkpoint.load` into `state`, by which nothing in the folder can run.

    Raises:
        ValueError: damaged, or it holds anything but tensors and plain data.
    """
    checkpoint.load(state, storage_reader=SafeReader(str(folder)), planner=SafePlanner(), **options)
