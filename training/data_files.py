"""Data files: which there are, and their documents, read one field at a time with file and line in every error.

Table files (.jsonl, .ndjson, .json, .parquet, .csv, .arrow), whole texts (.txt), any of them compressed with gzip (.gz), and
folders written by `datasets.save_to_disk`. Endings may be in capitals. Only the fields that are needed are looked at, so
files whose other columns differ can stand side by side.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from pathlib import Path

from modeling.prompt_files import open_data, read_rows
from storage.reading import require_file

FORMATS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".csv": "csv",
           ".arrow": "arrow"}


def format_of(file: str) -> str | None:
    """Format by the ending, "folder" for a `save_to_disk` folder, None if unknown."""
    path = Path(file)
    if path.is_dir():
        return "folder" if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file() else None
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes = suffixes[:-1]
    return FORMATS.get(suffixes[-1]) if suffixes else None


def looked_from(name: str) -> str:
    """Where a relative name was looked for, as part of a message."""
    return "" if Path(name).is_absolute() else f", neither from {Path.cwd()} nor from the recipe's folder"


def expand(patterns: list[str], key: str) -> list[str]:
    """Files that the patterns name, sorted.

    Raises:
        ValueError: a pattern that matches no file, what is neither a file nor a folder, a file type that cannot be read; names
            the recipe key.
    """
    files: list[str] = []
    for pattern in patterns:
        # A name may look like a pattern: "a[1].jsonl".
        matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise ValueError(f"{key}: {pattern!r} matches no file{looked_from(pattern)}")
        files += matches
    for file in files:
        if not Path(file).is_dir():
            try:
                require_file(Path(file))  # a link to nothing, a pipe that would be waited on
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
        if format_of(file) is None:
            raise ValueError(f"{key}: {file}: unknown file type, expected one of {', '.join(FORMATS)}, the same with .gz, or a "
                             "folder of datasets.save_to_disk")
    return files


def json_rows(file: str, key: str) -> Iterator[tuple[str, dict]]:
    """("file:line", object) of each line of a JSON lines file, or of each entry of a JSON array.

    Raises:
        ValueError: a line that is not a JSON object in UTF-8; names key, file and line.
    """
    if ".json" not in [suffix.lower() for suffix in Path(file).suffixes] or not _begins_an_array(file):
        yield from read_rows(file, key)
        return
    with open_data(file) as stream:
        try:
            rows = json.loads(stream.read().decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{key}: {file}: not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{key}: {file}:{error.lineno}: not valid JSON: {error.msg}") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{key}: {file}: entry {number}: expected an object, found {type(row).__name__}")
        yield f"{file}: entry {number}", row


def _begins_an_array(file: str) -> bool:
    with open_data(file) as stream:
        return stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
