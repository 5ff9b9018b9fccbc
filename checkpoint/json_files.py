"""JSON files of a checkpoint folder, read and written; Git LFS pointers refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def read_json(path: Path) -> dict:
    """ValueError with file and line if it is missing or no JSON object."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    refuse_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def refuse_pointer(path: Path) -> None:
    """ValueError if the file is what git leaves of a large file that was not fetched: three lines that name it."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ValueError(f"{path}: a Git LFS pointer, expected the file itself (git lfs pull fetches it)")


def write_json(path: Path, value: dict) -> None:
    """Sorted, indented, ended by a newline."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a small file under a temporary name and renames it."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_bytes(data)
    os.replace(aside, path)
