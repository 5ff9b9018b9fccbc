"""Names to backends and drafters: the only place that knows them all."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import torch

from modeling.drafter import load_drafter
from runtime_ref.backends.torch.backend import TorchBackend
from runtime_ref.backends.torch.drafter import Drafter
from runtime_ref.checkpoints.folder import verify_checksums
from runtime_ref.checkpoints.host_weights import TargetWeights
from runtime_ref.core.batch import KIND


def load_runtime_drafter(folder: str | Path, backend, pages: int) -> Drafter:
    """The drafter of a `dflash/` folder, on the ops of the target's backend.

    Raises:
        ValueError: missing or unexpected tensors, no mask embedding, a drafter of another target.
    """
    if backend.name == "native":
        from runtime_ref.backends.c.drafter import NativeDrafter

        return NativeDrafter(load_drafter(folder, torch.float32), backend, pages)
    return Drafter(load_drafter(folder, torch.float32), backend, pages)


def backend_class(name: str, weights: TargetWeights) -> type:
    """The class that runs a model's steps."""
    if name == "torch":
        return TorchBackend
    from runtime_ref.backends.c.backend import NativeBackend, refuses

    reason = refuses(weights) if name == "auto" else None
    if reason is None:
        return NativeBackend
    warnings.warn(f"the compiled ops cannot be used ({reason}); decoding runs on torch, several times slower", stacklevel=3)
    return TorchBackend


def load_triton(path, dflash: Path | None, ranks, dtype, pages, context: int, checksum: bool, progress,
            native: bool = False) -> tuple:
    """The Triton backend, and its drafter if there is a `dflash` folder."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError("backend 'triton': triton is not installed; expected `pip install -e '.[gpu]'` (Linux)")
    from runtime_ref.backends.triton.backend import load_triton_backend
    from runtime_ref.backends.triton.drafter import load_triton_drafter

    if checksum:
        verify_checksums(path)
    runner = load_triton_backend(path, ranks, dtype=dtype, pages=pages, positions=context, native=native, progress=progress)
    if dflash is None:
        return runner, None
    return runner, load_triton_drafter(dflash, runner, pages.get(KIND, max(pages.values())), context)
