"""Self-written text: rows of equal length in both kinds, and an interrupted file that goes on as if it never was."""

import json

import pytest
import torch
from tiny_models import write_tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from recipes.smollm2.own_text import chat_prefix, main, openings

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=1, max_position_embeddings=64)
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def call(dense, out, tokens, *more):
    return main([str(dense), "--out", str(out), "--tokens", str(tokens), "--batch-size", "3", "--sequence-length", "20",
                 "--opening-tokens", "5", *more])


def test_rows_alternate_between_kinds_and_an_interrupted_file_is_continued(dense, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "some words of a document that is long enough"}) + "\n")
    whole, parts = tmp_path / "a/whole.jsonl", tmp_path / "b/parts.jsonl"
    assert call(dense, whole, 240, "--openings", str(text)) == 0
    assert call(dense, parts, 120, "--openings", str(text)) == 0
    with parts.open("a") as file:
        file.write('{"text": "half a ro')  # killed while writing
    assert call(dense, parts, 240, "--openings", str(text)) == 0
    assert whole.read_text() == parts.read_text()
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [r["source"] for r in rows] == (["chat"] * 3 + ["opening"] * 3) * 2
    assert rows[0]["text"].startswith("<user>") and rows[3]["text"].startswith("some ")
    assert len({r["text"] for r in rows}) > 6


def test_the_chat_prefix_ends_before_the_users_first_word(dense):
    assert chat_prefix(AutoTokenizer.from_pretrained(dense)) == "<user>"


def test_mistakes_are_one_line(dense, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"words": 1}\n')
    assert call(dense, tmp_path / "x", 60, "--openings", str(bad)) == 2
    assert 'expected a JSON object with "text"' in capsys.readouterr().err
    with pytest.raises(ValueError, match="no piece of 50 tokens"):
        bad.write_text('{"text": "short"}\n')
        openings([str(bad)], AutoTokenizer.from_pretrained(dense), 50)
    assert call(tmp_path / "none", tmp_path / "x", 60) == 2
