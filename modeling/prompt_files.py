"""Prompts and texts from files of JSON lines, which training, acceptance and validation read alike."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from modeling.dialogue_tokens import AUTO, Rendering, prompt_tokens


def open_data(file: str | Path) -> BinaryIO:
    """The bytes of a file, unpacked if it ends in .gz."""
    return gzip.open(file, "rb") if str(file).lower().endswith(".gz") else open(file, "rb")


def read_rows(file: str | Path, key: str) -> Iterator[tuple[str, dict]]:
    """("file:line", object) of each line of a JSONL file.

    Lines end at "\\n" alone (JSON text may hold U+2028 and others at which str.splitlines cuts); empty ones and a byte order
    mark are passed over.

    Args:
        key: the recipe's key or the option that named the file, for errors.

    Raises:
        ValueError: a line that is not a JSON object in UTF-8.
    """
    with open_data(file) as stream:
        for number, line in enumerate(stream, 1):
            where = f"{file}:{number}"
            try:
                text = line.decode("utf-8-sig").strip()
                row = json.loads(text) if text else None
            except UnicodeDecodeError as error:
                raise ValueError(f"{key}: {where}: not UTF-8: byte 0x{line[error.start]:02x} at column "
                                 f"{error.start + 1}") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{key}: {where}: not valid JSON: {error.msg}") from None
            if not text:
                continue
            if not isinstance(row, dict):
                raise ValueError(f"{key}: {where}: expected an object, found {type(row).__name__}")
            yield where, row


def prompt_ids(row: dict, tokenizer, where: str, field: str = "prompt", rendering: Rendering = AUTO) -> list[int]:
    """Tokens of a row's prompt (`modeling.dialogue_tokens.prompt_tokens`).

    Args:
        where: what errors begin with.

    Raises:
        ValueError: neither a prompt nor messages are there, the template refuses the messages, the prompt is empty.
    """
    try:
        return prompt_tokens(row, tokenizer, field, rendering)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
