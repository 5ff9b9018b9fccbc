"""Counts are said as one says them: "1 file", never "1 files"."""

import ast
import re
from pathlib import Path

import pytest

from storage.terminal import counted, readable_size

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("checkpoint", "training", "qat", "dflash_train", "export", "runtime_ref/server", "runtime_ref/validation")
# Of what there often is one. "N files, expected at most M" is said of more than M alone, "3 of N files" of a whole.
NOUNS = re.compile(r"^ (files|findings|things|answers|prompts|dialogues|updates|processes|batches|requests)\b"
                   r"(?![\w ]*, expected)")
OF_A_WHOLE = re.compile(r"(\bof (the )?|at most |at least |expected |/)$")


@pytest.mark.parametrize(("count", "said"), [
    (0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (99_949, "99.9 kB"), (99_951, "100 kB"), (999_600, "1.00 MB"),
    (4_980_000, "4.98 MB"),
    (564_300_000_000, "564 GB"), (1_020_000_000_000, "1,020 GB")])
def test_sizes_have_three_digits_and_a_unit(count, said):
    assert readable_size(count) == said


@pytest.mark.parametrize(("count", "words", "said"), [
    (1, ("file",), "1 file"), (0, ("file",), "0 files"), (1200, ("file",), "1,200 files"),
    (1, ("process", "processes"), "1 process"), (2, ("process", "processes"), "2 processes")])
def test_a_count_and_its_noun(count, words, said):
    assert counted(count, *words) == said


def spelled_out(path: Path):
    """Lines with a number before a plural that is written into the text."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        parts = node.values if isinstance(node, ast.JoinedStr) else []
        for before, value, after in zip([None, *parts], parts, parts[1:], strict=False):
            texts = [part.value if isinstance(part, ast.Constant) else "" for part in (before, after)]
            if isinstance(value, ast.FormattedValue) and NOUNS.match(texts[1]) and not OF_A_WHOLE.search(texts[0]):
                yield f"{path.relative_to(ROOT)}:{value.lineno}: {ast.unparse(value)}{texts[1][:20]}"


@pytest.mark.parametrize("room", ROOMS)
def test_messages_leave_the_plural_to_the_count(room):
    assert [found for path in sorted((ROOT / room).rglob("*.py")) for found in spelled_out(path)] == []
