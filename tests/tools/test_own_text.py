"""Text of a model's own: rows of equal length in both kinds, and an interrupted file that goes on as if it never was."""

import json
import shutil

import pytest

from checkpoint.load import load_tokenizer
from tests.runtime_ref.conftest import seed_folder
from tools.own_text import chat_prefix, main

LENGTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = seed_folder(tmp_path_factory.mktemp("own") / "rounded")
    shutil.copy("recipes/seed/model/chat_template.jinja", made)
    return made


@pytest.fixture
def openings(tmp_path):
    files = []
    for name, text in {"a": "some words of a document that is long enough for this", "b": "0123456789" * 8}.items():
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text(json.dumps({"text": text}) + "\n")
    return ["--openings", *map(str, files), "--opening-tokens", "5"]


def test_kinds_and_files_take_turns_and_an_interrupted_file_goes_on(folder, openings, tmp_path):
    def write(name, rows, at_once):
        assert main([str(folder), "--out", str(tmp_path / name), "--length", str(LENGTH), "--tokens", str(rows * LENGTH),
                     "--at-once", str(at_once), *openings]) == 0
        return (tmp_path / name).read_text()

    whole = write("deep/whole.jsonl", 8, 3)
    half = write("part.jsonl", 4, 2)
    (tmp_path / "part.jsonl").write_text(half + '{"text": "cut o')
    assert write("part.jsonl", 8, 128) == whole
    rows = [json.loads(row) for row in whole.splitlines()]
    assert [r["source"] for r in rows] == ["chat", "opening"] * 4
    prefix = chat_prefix(load_tokenizer(folder))
    assert prefix and all(r["text"].startswith(prefix) for r in rows[::2]) and rows[3]["text"][:5].isdigit()
    assert len({r["text"] for r in rows}) == 8


@pytest.mark.parametrize("more, words", [
    (["--length", "5"], "--length 5"), (["--tokens", "0"], "--tokens 0"),
    (["--opening-tokens", "60"], "no text of more than 60"), (["--openings", "none.jsonl"], "none.jsonl"),
    (["--openings", "bad.jsonl"], 'bad.jsonl:1: expected a JSON object with "text"')])
def test_mistakes_are_one_line_and_write_nothing(more, words, folder, openings, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"words": 1}\n')
    assert main([str(folder), "--out", "x.jsonl", *openings, *more]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not (tmp_path / "x.jsonl").exists()


def test_a_folder_that_is_not_there_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "none"), "--out", str(tmp_path / "x.jsonl")]) == 2
    assert "none" in capsys.readouterr().err
