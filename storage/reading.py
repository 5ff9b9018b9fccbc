"""Reading files that others wrote: every way in which one is not what it should be is one ValueError with its name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import stat
from collections.abc import Iterator
from pathlib import Path

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
JSON_BYTES = 256 << 20  # the index of a model of a million tensors has 100 MB


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind if it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def require_file(path: Path) -> int:
    """Size of an ordinary file.

    Raises:
        ValueError: it is missing, or a folder, pipe or device, which could be waited on for ever.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path}: not an ordinary file")
    return found.st_size


def strange_files(folder: Path) -> list[Path]:
    """What lies below `folder` and is neither an ordinary file nor a folder (nor a link to one): pipes, devices, sockets."""
    return sorted(p for p in folder.rglob("*") if not p.is_file() and not p.is_dir())


def refuse_pointer(path: Path) -> None:
    """ValueError if the file is what git leaves of a large file that was not fetched: three lines that name it."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ValueError(f"{path}: a Git LFS pointer, expected the file itself (git lfs pull fetches it)")


def read_text(path: Path, limit: int = JSON_BYTES) -> str:
    """A UTF-8 text file of at most `limit` bytes. Raises ValueError."""
    size = require_file(path)
    if size > limit:
        raise ValueError(f"{path}: {size:,} bytes, expected at most {limit:,}")
    refuse_pointer(path)
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError with file and line if it is missing or no JSON object."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of more digits than Python converts
        raise ValueError(f"{path}: not valid JSON: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def json_lines(path: Path) -> Iterator[tuple[int, dict | None]]:
    """(line number, object, or None where the line is not one) of a JSON Lines file."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            value = None
            with contextlib.suppress(ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
                value = json.loads(line.decode("utf-8"))
            yield number, value if isinstance(value, dict) else None


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal: 1 to 2 GB/s on a core with SHA instructions; other threads go on meanwhile."""
    require_file(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inner_name(name: object) -> bool:
    """Whether `name`, as it is written, is that of a file in a folder or below it: nothing absolute, nothing that leads out.

    Links are not followed: what a hub's client downloads consists of links to another folder.
    """
    return (isinstance(name, str) and name not in ("", ".") and not name.startswith("/") and "\\" not in name
            and "\0" not in name and ".." not in name.split("/"))
