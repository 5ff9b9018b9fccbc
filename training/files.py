"""Data files by pattern."""

from __future__ import annotations

import glob
from pathlib import Path

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".csv": "csv", ".arrow": "arrow"}


def expand(patterns: list[str], key: str) -> list[str]:
    """Files that the patterns name, sorted.

    Raises:
        ValueError: a pattern that matches no file, or a file type that cannot be read; names the recipe key.
    """
    files: list[str] = []
    for pattern in patterns:
        # A name may look like a pattern: "a[1].jsonl".
        matches = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise ValueError(f"{key}: {pattern!r} matches no file (looked from {Path.cwd()})")
        files += matches
    for file in files:
        if Path(file).suffix not in FORMATS:
            raise ValueError(f"{key}: {file}: unknown file type, expected one of {', '.join(FORMATS)}")
    return files
