"""Dialogues (prompt and response, as token ids) and their packing into rows.

A row holds whole dialogues side by side; its tensors say, for each token, where its dialogue begins and whether it is
part of a response. Anchors are drawn from response tokens that have a successor in the same dialogue: what the drafter
meets when it serves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from modeling.dialogue_tokens import AUTO, Rendering, answered_turns
from modeling.prompt_files import prompt_ids
from storage.terminal import counted
from training.data_files import expand, format_of, json_rows


@dataclass(frozen=True)
class Dialogue:
    """Token ids of a prompt (may be empty) and its response."""

    prompt: list[int]
    response: list[int]

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.response


def dialogues_digest(dialogues: list[Dialogue]) -> str:
    """SHA-256 (hex) of all dialogues' token ids, in order."""
    found = hashlib.sha256()
    for one in dialogues:
        found.update(np.asarray([len(one.prompt), len(one.response), *one.tokens], dtype="<i8").tobytes())
    return found.hexdigest()


def read_jsonl(patterns: list[str], key: str) -> list[dict]:
    """Rows of JSONL files; "_where" of each is its file and line.

    Raises:
        ValueError: a pattern without a file, or a line that is not a JSON object in UTF-8; names recipe key, file and line.
    """
    rows = []
    for file in expand(patterns, key):
        if format_of(file) != "json":
            raise ValueError(f"{key}: {file}: expected a file of JSON lines")
        rows += [row | {"_where": where} for where, row in json_rows(file, key)]
    return rows


def row_prompt(row: dict, field: str, tokenizer, key: str, rendering: Rendering = AUTO) -> list[int]:
    """Tokens of the prompt of one of `read_jsonl`'s rows (`modeling.dialogue_tokens.prompt_tokens`)."""
    return prompt_ids({name: value for name, value in row.items() if name != "_where"}, tokenizer, f"{key}: {row['_where']}",
                      field, rendering)


def own_dialogues(patterns: list[str], prompt_field: str, tokenizer, end_ids: list[int],
                  rendering: Rendering = AUTO) -> list[Dialogue]:
    """A user's own data: each assistant turn of each row (`modeling.dialogue_tokens.answered_turns`).

    Raises:
        ValueError: a row without an answer.
    """
    found = []
    for row in read_jsonl(patterns, "dflash.data"):
        where = row.pop("_where")
        try:
            turns = answered_turns(row, tokenizer, end_ids, prompt_field, rendering)
        except ValueError as error:
            raise ValueError(f"dflash.data: {where}: {error}") from None
        found += [Dialogue(prompt, answer) for prompt, answer in turns]
    return found


@dataclass
class PackedRows:
    """R rows of S tokens.

    Attributes:
        tokens: int32 [R, S]; unused places at the end hold 0.
        starts: int32 [R, S], index at which the token's dialogue begins (unused places: their own index).
        ends: int32 [R, S], index after the token's dialogue (unused places: their own index + 1).
        response: bool [R, S].
        members: for each row the (dialogue, first index, tokens) in it.
    """

    tokens: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    response: torch.Tensor
    members: list[list[tuple[int, int, int]]]

    def __len__(self) -> int:
        return len(self.members)

    def may_anchor(self) -> torch.Tensor:
        """Bool [R, S]: response tokens with a successor in their dialogue."""
        return self.response & (torch.arange(self.tokens.shape[1]) + 1 < self.ends)


def pack(dialogues: list[Dialogue], length: int, say: Callable[[str], None] = print) -> PackedRows:
    """Packs dialogues into rows of `length`, longest first, each into the fullest row that has room for it.

    Dialogues longer than a row are cut at its end; those without an answer of two tokens in the row teach nothing and are left
    out. How many is said.

    Raises:
        ValueError: no response token anywhere.
    """
    taught = [i for i, d in enumerate(dialogues) if min(len(d.tokens), length) >= len(d.prompt) + 2]
    if not taught:
        raise ValueError(f"no response of two or more tokens in {counted(len(dialogues), 'dialogue')}: there is nothing to "
                         "draft")
    if len(taught) < len(dialogues):
        say(f"{len(dialogues) - len(taught)} of {len(dialogues)} dialogues left out: their answers are empty, or begin beyond "
            f"dflash.sequence_length={length}")
    order = sorted(taught, key=lambda i: (-len(dialogues[i].tokens), i))
    rows: list[list[tuple[int, int, int]]] = []
    by_room: dict[int, list[int]] = {}
    cut = 0
    for i in order:
        size = min(len(dialogues[i].tokens), length)
        cut += size < len(dialogues[i].tokens)
        room = next((r for r in range(size, length + 1) if by_room.get(r)), None)
        row = by_room[room].pop() if room is not None else len(rows)
        if row == len(rows):
            rows.append([])
            room = length
        rows[row].append((i, length - room, size))
        by_room.setdefault(room - size, []).append(row)
    if cut:
        say(f"{cut} of {len(dialogues)} dialogues are longer than dflash.sequence_length={length} and were cut there")
    tokens, response = torch.zeros(len(rows), length, dtype=torch.int32), torch.zeros(len(rows), length, dtype=torch.bool)
    starts = torch.arange(length, dtype=torch.int32).repeat(len(rows), 1)
    ends = starts + 1
    for r, members in enumerate(rows):
        for i, begin, size in members:
            place = slice(begin, begin + size)
            tokens[r, place] = torch.tensor(dialogues[i].tokens[:size], dtype=torch.int32)
            starts[r, place], ends[r, place] = begin, begin + size
            response[r, begin + min(len(dialogues[i].prompt), size):begin + size] = True
    return PackedRows(tokens, starts, ends, response, rows)
