"""The one reader of safetensors: a single file, or shards with an index.

    model.safetensors.index.json    decides, where it is there: a tensor is read from the file that it names, whatever else the
                                    shards hold; a tensor that it does not list is not part of the checkpoint
    model.safetensors               else this file
    another *.safetensors           else the only one there is (a drafter's file has a name of its own)

Files may be symbolic links, as in a hub's snapshot. Tensors are read into memory of their own, not mapped: pages of a mapped
file count as this process's memory for as long as the file is open, and a source of a terabyte would fill the machine. Only
runs of columns are mapped, for the moment that copying them takes. Several threads may read from one object.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
from safetensors import SafetensorError, safe_open

from checkpoint.sources import DTYPES, LastFile, Source
from storage.reading import inner_name, refuse_pointer

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
REFERENCE = "dflash_reference.safetensors"  # beside a drafter's weights, and none of them


class TensorFiles(Source):
    """The tensors of a folder's safetensors files, by name.

    Attributes:
        where: the file of each tensor. bytes_read: of the tensors and runs handed out so far.
    """

    bytes_read = 0

    def __init__(self, folder: str | Path, files: list[str] | None = None):
        """Reads the headers.

        Args:
            files: these files and no index (the first that holds a tensor counts); None: as the module's text says.

        Raises:
            ValueError: no weights; a missing or damaged file; an index that names what is not there.
        """
        folder = Path(folder)
        listed = None
        if files is None:
            files, listed = weight_files(folder)
        headers = {file: read_header(folder / file) for file in files}
        self.where: dict[str, str] = dict(listed or {})
        for file, header in headers.items():
            for name in header if listed is None else ():
                self.where.setdefault(name, file)
        for name, file in self.where.items():
            if name not in headers[file]:
                raise ValueError(f"{folder}: the index says that tensor {name} is in {file}, and it is not")
        found = {name: headers[file][name] for name, file in self.where.items()}
        self._starts = {name: start for name, (_, _, start) in found.items()}
        self._last = LastFile()
        super().__init__(folder, {name: (shape, dtype) for name, (shape, dtype, _) in found.items()})

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def in_order(self) -> list[str]:
        """All names as they stand on disk, file by file."""
        return sorted(self.where, key=lambda name: (self.where[name], self._starts[name]))

    def read(self, name: str) -> torch.Tensor:
        """The tensor.

        Raises:
            ValueError: it is not in the checkpoint, or its file is damaged.
        """
        return self._read(name, self.shape(name), 0)

    def read_rows(self, name: str, expert: int, rows: slice) -> torch.Tensor:
        _, height, *rest = self.shape(name)
        first, last, _ = rows.indices(height)
        return self._read(name, (last - first, *rest), (expert * height + first) * torch.Size(rest).numel())

    def run(self, name: str, dim: int, start: int, length: int) -> torch.Tensor:
        """Entries start .. start + length - 1 of rows (dim 0, of any tensor) or columns (dim 1) of a matrix; nothing else is
        copied.

        Raises:
            ValueError: as `read`.
        """
        rows, *rest = self.shape(name)
        if dim == 0:
            return self._read(name, (length, *rest), start * torch.Size(rest).numel())
        mapped = numpy.memmap(self.folder / self.where[name], numpy.uint8, "c", self._starts[name], self.bytes_of(name))
        whole = torch.from_numpy(mapped).view(DTYPES[self.infos[name][1]]).view(rows, *rest)
        found = whole[:, start:start + length].clone()
        self.bytes_read += found.nbytes
        return found

    def _read(self, name: str, shape: tuple[int, ...], skipped: int) -> torch.Tensor:
        """`shape` elements of a tensor, from its element number `skipped` on."""
        file, dtype = self.where[name], DTYPES[self.infos[name][1]]
        out = torch.empty(shape, dtype=dtype)
        view = memoryview(out.view(-1).view(torch.uint8).numpy()) if out.numel() else memoryview(b"")
        self._last.fill(self.folder / file, self._starts[name] + skipped * dtype.itemsize, view, name)
        self.bytes_read += view.nbytes
        return out


def weight_files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """(The files that hold a folder's weights, tensor name -> file if an index says so).

    Raises:
        ValueError: no weights, or an index that is none.
    """
    indexes = [folder / INDEX] if (folder / INDEX).is_file() else []
    if not indexes and (folder / SINGLE).is_file():
        return [SINGLE], None
    indexes = indexes or sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) == 1:
        listed = weight_map(indexes[0])
        return sorted(set(listed.values())), listed
    files = sorted(p.name for p in folder.glob("*.safetensors") if p.name != REFERENCE)
    if len(files) != 1 or indexes:
        raise ValueError(f"{folder}: neither {SINGLE} nor {INDEX}")
    return files, None


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, of a safetensors index.

    Raises:
        ValueError: not JSON, or not an index.
    """
    refuse_pointer(index)
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:  # also bytes that are not UTF-8
        raise ValueError(f"{index}: not valid JSON: {error}") from None
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise ValueError(f'{index}: not a safetensors index: expected {{"weight_map": {{tensor name: file name}}}}')
    outside = next((file for file in found.values() if not inner_name(file)), None)
    if outside is not None:
        raise ValueError(f"{index}: names {outside!r}, expected files of its own folder")
    return found


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str, int]]:
    """name -> (shape, dtype, first byte in the file) of a whole safetensors file.

    Raises:
        ValueError: no such file, not a whole one, or one with numbers of a kind that is not read here.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent}: shard {path.name} is missing")
    refuse_pointer(path)
    try:
        with safe_open(str(path), framework="pt") as file:  # checks that header and length agree
            names = set(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    unknown = sorted({entry["dtype"] for name, entry in header.items() if name in names} - DTYPES.keys())
    if unknown:
        raise ValueError(f"{path}: tensors of dtype {unknown[0]}, expected one of {', '.join(DTYPES)}")
    return {n: (tuple(e["shape"]), e["dtype"], 8 + length + e["data_offsets"][0]) for n, e in header.items() if n in names}
