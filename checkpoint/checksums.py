"""Checksums of an exported folder: SHA-256 of every file (checksums.sha256), CRC-32 of every tensor (checksums.json)."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from storage.digests import combined
from storage.files import write_bytes, write_json
from storage.reading import read_json, sha256

CHECKSUMS = "checksums.sha256"
TENSOR_SUMS = "checksums.json"


def checkpoint_files(folder: Path) -> list[Path]:
    """All files of a checkpoint but the checksums, as relative paths, sorted.

    Hidden ones are not part of it: hubs and their clients add .gitattributes and .cache/.
    """
    paths = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)
    return [p for p in paths if not any(part.startswith(".") or part == "__pycache__" for part in p.parts)]


def internal(path: Path) -> bool:
    """Files of a running export that are not part of the checkpoint."""
    return path.name == "plan.json" or path.suffix == ".sums"


def write_checksums(folder: Path, sums: dict[str, str], *, skip: Callable[[Path], bool] = lambda path: False) -> None:
    """checksums.json (CRC-32 of every tensor) and checksums.sha256 (every file; `sha256sum -c` reads it)."""
    write_json(folder / TENSOR_SUMS, {"tensors_crc32": sums}, sort_keys=True)
    paths = [path for path in checkpoint_files(folder) if not skip(path)]
    with ThreadPoolExecutor() as threads:
        digests = threads.map(sha256, (folder / path for path in paths))
        text = "".join(f"{digest}  {path.as_posix()}\n" for digest, path in zip(digests, paths, strict=True))
    write_bytes(folder / CHECKSUMS, text.encode())


def declared_digest(folder: Path) -> str | None:
    """Digest (16 hex digits) of the sums that a checkpoint declares of its files (no weight is read); None: it has no sums."""
    files, _ = read_checksums(folder)
    return combined(files) if files else None


def read_checksums(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(SHA-256 by file, CRC-32 by tensor) that a checkpoint declares; empty where it has none."""
    files: dict[str, str] = {}
    if (folder / CHECKSUMS).is_file():
        for line in (folder / CHECKSUMS).read_text(encoding="utf-8", errors="replace").splitlines():
            digest, _, name = line.partition("  ")
            files[name] = digest
    sums = read_json(folder / TENSOR_SUMS).get("tensors_crc32", {}) if (folder / TENSOR_SUMS).is_file() else {}
    return files, sums
