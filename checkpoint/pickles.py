"""The only place where anything pickled is read, and why nothing in it can run.

    .metadata of torch.distributed.checkpoint    an unpickler that knows ten classes without behaviour, and no others
    torch.save files (*.bin, *.pt, *.distcp)     torch's `weights_only` unpickler (tensors, numbers, strings, containers)

Pickle is a program; an unpickler runs it. What a checkpoint says may come from anybody, so the programs allowed here can only
build plain data. A second danger is size: an archive's entries may be compressed (a thousandfold), so compressed ones are
refused, and what is built is never larger than the file. A third is where they point: shards name files, which must lie in the
same folder.

Rejected: `pickle.load`, `torch.load(weights_only=False)`, torch's `FileSystemReader` (its `read_metadata` is `pickle.load`, and
its planner loads everything that is no tensor without restriction). `tests/test_loaders.py` keeps the tree free of them.
"""

from __future__ import annotations

import importlib
import io
import pickle
import zipfile
from pathlib import Path

import torch

from storage.reading import first_line, inner_name, refuse_pointer, require_file

METADATA_BYTES = 1 << 30
# What unpickling damaged bytes may raise, and no more.
UNREADABLE = (pickle.UnpicklingError, RuntimeError, ValueError, OSError, EOFError, KeyError, TypeError, IndexError,
              AttributeError, OverflowError, MemoryError, AssertionError, RecursionError)

_METADATA = "torch.distributed.checkpoint.metadata"
_DATACLASSES = ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
                "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")
_ALLOWED = {*((_METADATA, name) for name in _DATACLASSES),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch", "Size"),
            ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"), ("pathlib", "PosixPath"),
            ("pathlib", "PurePosixPath"), ("pathlib._local", "PosixPath"), ("pathlib._local", "PurePosixPath")}


class _Metadata(pickle.Unpickler):
    """Builds the dataclasses that describe a distributed checkpoint, and refuses every other name."""

    def find_class(self, module: str, name: str):
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"holds {module}.{name}, which is no description of tensors; not read, because that "
                                         "could run code")
        return getattr(importlib.import_module(module.replace("._local", "")), name)

    def persistent_load(self, identity):
        raise pickle.UnpicklingError("refers to objects outside the file")


def read_distributed_metadata(path: Path):
    """The `Metadata` of a torch.distributed.checkpoint, checked: names are strings, shapes are shapes, and every piece of a
    tensor lies within a file beside `path`.

    Raises:
        ValueError: not such a file, damaged, or one that holds or names something else.
    """
    if require_file(path) > METADATA_BYTES:
        raise ValueError(f"{path}: larger than {METADATA_BYTES >> 30} GiB: not read")
    try:
        with path.open("rb") as file:
            metadata = _Metadata(file).load()
    except UNREADABLE as error:
        raise ValueError(f"{path}: not the metadata of a torch.distributed.checkpoint: {first_line(error)}") from None
    try:
        fault = next(_metadata_faults(metadata, path.parent), None)
    except UNREADABLE as error:
        fault = first_line(error)
    if fault:
        raise ValueError(f"{path}: not the metadata of a torch.distributed.checkpoint: {fault}")
    return metadata


def _metadata_faults(metadata, folder: Path):
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

    if type(metadata) is not Metadata or not isinstance(metadata.state_dict_metadata, dict):
        yield f"a {type(metadata).__name__}"
        return
    judged: set[int] = set()  # one object may stand under a million names
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(name, str):
            yield f"a tensor named {name!r}"
        if type(entry) is not TensorStorageMetadata or id(entry) in judged:
            continue
        judged.add(id(entry))
        if not _is_shape(entry.size) or not isinstance(entry.properties.dtype, torch.dtype):
            yield f"tensor {name}: shape {entry.size!r}"
        for chunk in entry.chunks:
            if (type(chunk) is not ChunkStorageMetadata or not _is_shape(chunk.sizes) or not _is_shape(chunk.offsets)
                    or not len(chunk.sizes) == len(chunk.offsets) == len(entry.size)
                    or any(o + n > whole for o, n, whole in zip(chunk.offsets, chunk.sizes, entry.size, strict=True))):
                yield f"tensor {name}: a piece outside of it"
    sizes: dict[str, int] = {}
    for index, info in (metadata.storage_data or {}).items():
        if type(index) is not MetadataIndex or type(info) is not _StorageInfo:
            yield f"{index!r} stored as {info!r}"
            return
        if not inner_name(info.relative_path):
            yield f"{index.fqn}: in {info.relative_path!r}, expected a file beside it"
            return
        if info.relative_path not in sizes:
            sizes[info.relative_path] = require_file(folder / info.relative_path)
        if not (type(info.offset) is int and type(info.length) is int and 0 <= info.offset and 0 <= info.length
                and info.offset + info.length <= sizes[info.relative_path]):
            yield f"{index.fqn}: its bytes are not within {info.relative_path}: the file is truncated"


def _is_shape(value) -> bool:
    return isinstance(value, (tuple, list)) and all(type(n) is int and n >= 0 for n in value)


def load_torch_file(path: Path, *, mmap: bool = False):
    """What `torch.save` wrote, on the CPU, if it is data alone (`weights_only`) and not compressed.

    Raises:
        ValueError: no such file, damaged, compressed, of the format before torch 1.6, or one that holds anything but data.
    """
    require_file(path)
    refuse_pointer(path)
    try:
        with path.open("rb") as file:
            require_stored(file)
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except UNREADABLE as error:
        raise ValueError(f"{path}: not a whole torch file: {first_line(error)}") from None


def load_torch_bytes(data: bytes):
    """As `load_torch_file`, of bytes that `torch.save` wrote. Raises ValueError."""
    try:
        require_stored(io.BytesIO(data))
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise ValueError(f"not what torch.save writes: {first_line(error)}") from None


def require_stored(file) -> None:
    """Raises ValueError unless an open file is a zip archive of entries that are not compressed."""
    try:
        entries = zipfile.ZipFile(file).infolist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{error} (torch writes zip archives since 1.6)") from None
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{entry.filename} is compressed, which torch.save never does")
