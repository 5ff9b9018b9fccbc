"""Prompts and texts from files of JSON lines, which training, acceptance and validation read alike."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path


def read_rows(file: str | Path, key: str) -> Iterator[tuple[str, dict]]:
    """("file:line", object) of each line of a JSONL file.

    Lines end at "\\n" alone (JSON text may hold U+2028 and others at which str.splitlines cuts); empty ones and a byte order
    mark are passed over.

    Args:
        key: the recipe's key or the option that named the file, for errors.

    Raises:
        ValueError: a line that is not a JSON object in UTF-8.
    """
    with open(file, "rb") as stream:
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


def prompt_ids(row: dict, tokenizer, where: str, field: str = "prompt") -> list[int]:
    """Tokens of a row's prompt: `messages` through the chat template, or the text of `field`.

    Args:
        where: what errors begin with.

    Raises:
        ValueError: neither is there, the template refuses the messages, no text, or the prompt is empty.
    """
    from jinja2 import TemplateError

    if "messages" in row:
        try:
            ids = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, return_dict=True)["input_ids"]
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{where}: messages: {(str(error).splitlines() or [type(error).__name__])[0][:160]}") from None
    elif isinstance(row.get(field), str):
        try:
            ids = tokenizer(row[field].encode("utf-8").decode("utf-8"), add_special_tokens=False)["input_ids"]
        except UnicodeEncodeError:
            raise ValueError(f"{where}: {field}: half of a surrogate pair, which is no text") from None
    else:
        raise ValueError(f"{where}: neither {field!r} (text) nor 'messages'; it has {sorted(row)}")
    if not ids:
        raise ValueError(f"{where}: empty prompt")
    return list(ids)
