"""Finds out which format a checkpoint folder has."""

from __future__ import annotations

import re
from pathlib import Path

from checkpoint.sources import SafetensorsSource, Source, TorchSource
from modeling.load import weight_map
from storage.reading import refuse_pointer


def open_source(folder: str | Path) -> Source:
    """The weights in a folder.

    Raises:
        ValueError: no folder, no weights in it, weights of a kind that cannot be read tensor by tensor, or a missing or
            damaged file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such checkpoint folder")
    if (found := _indexed(folder, "model", "safetensors", SafetensorsSource)
            or _indexed(folder, "pytorch_model", "bin", TorchSource)) is not None:
        return found
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


def open_safetensors(folder: Path) -> SafetensorsSource:
    """As `open_source`, of safetensors and nothing else: what is published, and may come from anybody."""
    found = _indexed(folder, "model", "safetensors", SafetensorsSource)
    if found is None:
        raise ValueError(f"{folder}: no model.safetensors and no model.safetensors.index.json")
    return found


def _indexed(folder: Path, stem: str, suffix: str, kind):
    """The weights in <stem>.<suffix>, or in shards that an index names; None if there are neither."""
    index, single = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
    if index.exists():
        refuse_pointer(index)
        return kind(folder, sorted(set(weight_map(index).values())))
    return kind(folder, [single.name]) if single.exists() else None


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
