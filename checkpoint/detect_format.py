"""Finds out which format a checkpoint folder has."""

from __future__ import annotations

import re
from pathlib import Path

from checkpoint.sources import Source, TorchSource
from checkpoint.tensor_files import INDEX, SINGLE, TensorFiles, weight_map

WRAPPERS = {"a model under torch.compile": "_orig_mod.", "a model under DistributedDataParallel": "module."}


def open_source(folder: str | Path) -> Source:
    """The weights in a folder.

    Raises:
        ValueError: no folder, no weights in it, weights of a kind that cannot be read tensor by tensor, a missing or damaged
            file, or the state of a model that something else was wrapped around.
    """
    source = _opened(Path(folder))
    for wrapper, prefix in WRAPPERS.items():
        if any(name.startswith(prefix) for name in source.infos):
            raise ValueError(f"{folder}: names begin with {prefix}: the state of {wrapper}; save the model inside it "
                             f"(names without {prefix})")
    return source


def _opened(folder: Path) -> Source:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such checkpoint folder")
    if (folder / INDEX).is_file() or (folder / SINGLE).is_file():
        return TensorFiles(folder)
    index, single = folder / "pytorch_model.bin.index.json", folder / "pytorch_model.bin"
    if index.is_file():
        listed = weight_map(index)
        return TorchSource(folder, sorted(set(listed.values())), listed)
    if single.is_file():
        return TorchSource(folder, [single.name])
    for candidate in (folder, *sorted(p for p in folder.iterdir() if p.is_dir())):
        if (candidate / ".metadata").is_file():
            from checkpoint.distributed import DistributedSource  # half a second of imports that other formats do not need

            return DistributedSource(candidate)
    from checkpoint.zero_shards import ZeroSource, zero_folder  # builds on this module

    shards = zero_folder(folder)
    if shards is not None:
        return ZeroSource(shards)
    raise ValueError(f"{folder}: no weights (model.safetensors, model.safetensors.index.json, pytorch_model.bin, a "
                     "torch.distributed.checkpoint or shards of DeepSpeed ZeRO)")


def local_folder(name: str) -> Path:
    """The folder of that name or, of a hub name, the one that the hub's client has in its cache; nobody is asked.

    Raises:
        ValueError: a hub name that is not in the cache, with what to do. (A folder that is missing is said where it is opened.)
    """
    if Path(name).is_dir() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, HFValidationError):
        raise ValueError(f"model.path: {name}: no such checkpoint folder, and no such hub name in the local cache; expected a "
                         f"folder (hf download {name} --local-dir DIR, then model.path=DIR)") from None
