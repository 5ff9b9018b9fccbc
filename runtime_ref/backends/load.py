"""Names to backends: the only place that knows them all."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from runtime_ref.backends.base import Backend
from runtime_ref.backends.torch.backend import TorchBackend
from runtime_ref.checkpoints.folder import verify_checksums
from runtime_ref.checkpoints.host_weights import DECODED_BYTES
from runtime_ref.checkpoints.load import load_target
from runtime_ref.core.tensor_parallel import SINGLE_RANK, Ranks

BACKENDS = ("auto", "c", "torch", "triton", "triton-mxfp8")
ALIASES = {"native": "c"}


def known_backend(name: str) -> str:
    """One of `BACKENDS`.

    Raises:
        ValueError: none of them.
    """
    name = ALIASES.get(name, name)
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r}: expected {', '.join(BACKENDS)}")
    return name


def load_backend(name: str, folder: str | Path, ranks: Ranks = SINGLE_RANK, *, dtype: torch.dtype = torch.bfloat16,
                 pages: dict[str, int], context: int, decoded_bytes: int = DECODED_BYTES, checksum: bool = False,
                 progress: Callable[[int, int], None] | None = None) -> Backend:
    """A backend on an exported folder.

    Args:
        name: "c" (compiled ops), "torch", or "auto": c where it can run, and where it cannot, torch, with a warning that says
            why. "triton": kernels, on the GPU; without one compiled for the CPU, or interpreted with TRITON_INTERPRET=1.
            "triton-mxfp8": the same, with experts for tensor cores that read FP4 themselves (Blackwell), which want
            activations rounded to MXFP8: other numbers. "native" is an older name of "c".
        pages: of the KV cache by kind ("full", "window"). context: the longest sequence in tokens.
        decoded_bytes: of decoded experts that the torch backend keeps. progress: is told (layers read, of how many).

    Raises:
        ValueError: an unknown name, a folder or dtype that the backend cannot run.
    """
    name = known_backend(name)
    if name.startswith("triton"):
        return _load_triton(folder, ranks, dtype, pages, context, checksum, progress, mxfp8=name == "triton-mxfp8")
    weights = load_target(folder, ranks, decoded_bytes=decoded_bytes, checksum=checksum, progress=progress)
    return _host_backend(name, weights)(weights, dtype=dtype, pages=pages)


def _host_backend(name: str, weights) -> type[Backend]:
    if name == "torch":
        return TorchBackend
    from runtime_ref.backends.c.backend import CBackend, refuses

    reason = refuses(weights) if name == "auto" else None
    if reason is None:
        return CBackend
    warnings.warn(f"the compiled ops cannot be used ({reason}); decoding runs on torch, several times slower", stacklevel=3)
    return TorchBackend


def _load_triton(folder, ranks, dtype, pages, context, checksum, progress, *, mxfp8: bool) -> Backend:
    if importlib.util.find_spec("triton") is None:
        raise ValueError("backend 'triton': triton is not installed; expected `pip install -e '.[gpu]'` (Linux)")
    from runtime_ref.backends.triton.backend import load_triton_backend

    if checksum:
        verify_checksums(folder)
    return load_triton_backend(folder, ranks, dtype=dtype, pages=pages, positions=context, hw_fp4=mxfp8, progress=progress)
