"""Packing loses nothing but the tail; the order depends on seed and epoch alone; a position can be rejoined."""

import gzip
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qat.data import (
    Packer,
    endless_batches,
    heldout_domains,
    learned_tokens,
    make_loader,
    packed_dataset,
    rows_digest,
    split_rows,
)
from recipes.schema import Data, Source
from training.data_files import expand
from training.epoch_order import EpochOrder


class CharTokenizer:
    eos_token_id = 0

    def __call__(self, texts, add_special_tokens, verbose=True):
        return {"input_ids": [[ord(c) % 200 + 1 for c in t] for t in texts]}


@pytest.mark.parametrize("length", [8, 63, 100])
def test_packed_rows_are_the_joined_documents_cut_at_length(length):
    texts = ["ab" * 50, "", "xyz" * 33]
    packer = Packer(CharTokenizer(), length)
    rows = [row for batch in (texts[:1], [], texts[1:]) for row in packer({"text": batch})["input_ids"]]
    joined = [i for ids in CharTokenizer()(texts, False)["input_ids"] for i in (*ids, 0)]
    assert [i for row in rows for i in row] == joined[:len(joined) // length * length]


def data(tmp_path, documents=30, **options) -> tuple[Data, str]:
    file = tmp_path / "alpha.train.jsonl"
    file.write_text("".join(json.dumps({"text": f"document {i} " * 9}) + "\n" for i in range(documents)))
    return Data(train=[str(file)], heldout=[str(file)], sequence_length=16, **options), str(file)


def test_more_documents_than_a_batch_are_packed_without_a_gap(tmp_path):
    settings, file = data(tmp_path, documents=2500)
    rows = packed_dataset([file], CharTokenizer(), settings)
    texts = [json.loads(line)["text"] for line in open(file)]
    joined = [i for ids in CharTokenizer()(texts, False)["input_ids"] for i in (*ids, 0)]
    assert torch.stack(list(rows["input_ids"])).flatten().tolist() == joined[:len(joined) // 16 * 16]
    again = packed_dataset([file], CharTokenizer(), settings)
    assert again.cache_files == rows.cache_files and again[-1]["input_ids"].equal(rows[-1]["input_ids"])


def test_many_short_documents_fill_a_long_row(tmp_path):
    file = tmp_path / "short.jsonl"
    file.write_text('{"text": "ab"}\n' * 2500)
    settings = Data(train=[str(file)], heldout=[str(file)], sequence_length=5000)
    assert len(packed_dataset([str(file)], CharTokenizer(), settings)) == 1


def test_a_text_file_is_one_document_with_its_line_breaks(tmp_path):
    settings, _ = data(tmp_path)
    for name, text in (("a", "one\ntwo\n\nthree\n"), ("b", "four\nfive, six, seven")):
        (tmp_path / f"{name}.txt").write_text(text)
    rows = packed_dataset([str(tmp_path / "*.txt")], CharTokenizer(), settings)
    ids, = CharTokenizer()(["one\ntwo\n\nthree\n\0four\nfive, six, seven"], False)["input_ids"]
    assert torch.stack(list(rows["input_ids"])).flatten().tolist() == [0 if i == 1 else i for i in ids][:32]


@pytest.mark.parametrize("pattern", ["a[1].jsonl", "*.jsonl", "a[[]1].jsonl"])
def test_a_name_that_looks_like_a_pattern_is_a_name(tmp_path, pattern):
    settings, file = data(tmp_path)
    wanted = tmp_path / "b" / "a[1].jsonl"
    wanted.parent.mkdir()
    wanted.write_bytes(open(file, "rb").read())
    found = packed_dataset([str(wanted.parent / pattern)], CharTokenizer(), settings)
    assert torch.equal(found[:]["input_ids"], packed_dataset([file], CharTokenizer(), settings)[:]["input_ids"])


def test_order_is_a_permutation_set_by_seed_and_epoch():
    order = EpochOrder(100, seed=1, shuffle=True)
    first = list(order)
    assert sorted(first) == list(range(100)) and list(order) == first
    order.set_epoch(1)
    assert list(order) != first and sorted(order) == list(range(100))
    assert list(EpochOrder(100, seed=2, shuffle=True)) != first
    assert list(EpochOrder(5, seed=2, shuffle=False)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("consumed", [0, 1, 7, 40, 77])
def test_a_loader_started_at_a_position_gives_what_an_uninterrupted_one_gives(tmp_path, consumed):
    from accelerate import Accelerator

    settings, file = data(tmp_path)
    rows = packed_dataset([file], CharTokenizer(), settings)
    accelerator = Accelerator(cpu=True)

    def batches(start):
        loader = accelerator.prepare(make_loader(rows, batch_size=3, seed=5, shuffle=True, processes=1))
        return endless_batches(accelerator, loader, consumed=start)

    whole, resumed = batches(0), batches(consumed)
    for _ in range(consumed):
        next(whole)
    for _ in range(40):
        assert torch.equal(next(whole)["input_ids"], next(resumed)["input_ids"])


def test_heldout_domains_are_named_by_file_and_limited(tmp_path):
    settings, file = data(tmp_path, eval_sequences=4)
    domains = heldout_domains([file], CharTokenizer(), settings)
    assert list(domains) == ["alpha"] and domains["alpha"].shape == (4, 16)


def test_a_missing_file_names_key_and_pattern():
    with pytest.raises(ValueError, match=r"data\.train: 'nowhere/\*\.jsonl' matches no file"):
        expand(["nowhere/*.jsonl"], "data.train")


def test_a_wrong_column_names_what_there_is(tmp_path):
    settings, file = data(tmp_path, text_field="body")
    with pytest.raises(ValueError, match=r"data\.train: .*:1: no 'body' \(data\.text_field\) .* it has \['text'\]"):
        packed_dataset([file], CharTokenizer(), settings)


def test_too_little_text_is_refused(tmp_path):
    settings, file = data(tmp_path, documents=1)
    settings = settings.model_copy(update={"sequence_length": 1000})
    with pytest.raises(ValueError, match="fewer than sequence_length=1000 tokens"):
        packed_dataset([file], CharTokenizer(), settings)
    with pytest.raises(ValueError, match="fewer than one batch of qat.batch_size=8 on each of 2 processes"):
        make_loader([0] * 15, batch_size=8, seed=0, shuffle=True, processes=2)


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path):
    settings, file = data(tmp_path)
    with pytest.raises(ValueError, match="no end-of-text token"):
        packed_dataset([file], SimpleNamespace(eos_token_id=None), settings)


UNREADABLE = {
    "cut off": ("x.jsonl", b'{"text": "a"}\n{"text": \n', "data.train: .*x.jsonl:2: not valid JSON"),
    "latin-1": ("x.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "data.train: .*x.jsonl:2: not UTF-8: byte 0xe9"),
    "latin-1 text": ("x.txt", b"caf\xe9", "data.train: .*x.txt: not UTF-8: byte 0xe9 at 3"),
    "array cut off": ("x.json", b'[{"text": "a"},\n', "data.train: .*x.json:2: not valid JSON"),
    "no objects": ("x.json", b'["a"]', "data.train: .*x.json: entry 1: expected an object, found str"),
    "gzip that is none": ("x.jsonl.gz", b"not zipped\n", "data.train: .*x.jsonl.gz: cannot be read"),
    "empty": ("x.jsonl", b"", "data.train: .*x.jsonl: is empty"),
    "blank": ("x.jsonl", b" \n\n", "data.train: .*x.jsonl: is empty"),
    "numbers": ("x.jsonl", b'{"text": 3}\n', "data.train: .*x.jsonl:1: 'text' is int, expected text"),
    "lists": ("x.jsonl", b'{"text": ["a"]}\n', "data.train: .*x.jsonl:1: 'text' is list, expected text"),
    "no parquet": ("x.parquet", b"PAR1 but not really", "data.train: .*x.parquet: cannot be read"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_file_that_cannot_be_read_is_one_line_with_its_name(kind, tmp_path):
    name, content, message = UNREADABLE[kind]
    settings, _ = data(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        packed_dataset([str(tmp_path / name)], CharTokenizer(), settings)
    assert len(str(caught.value).splitlines()) == 1


def test_rows_without_text_are_left_out(tmp_path):
    settings, _ = data(tmp_path)
    both, whole = tmp_path / "both.jsonl", tmp_path / "whole.jsonl"
    rows = [json.dumps({"text": "abcdefgh" * 4}), json.dumps({"text": None}), json.dumps({"text": "12345678" * 4})]
    both.write_text("\n".join(rows))
    whole.write_text("\n".join(rows[::2]))
    read = [torch.stack(list(packed_dataset([str(f)], CharTokenizer(), settings)["input_ids"])) for f in (both, whole)]
    assert torch.equal(*read)


def test_long_documents_and_rows_without_text_are_counted(tmp_path):
    rows = [{"text": "x" * n} for n in (3, 9, 10, 50, 400)] + [{"text": None}] * 2  # and an end token each
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows * 300))  # more than a batch
    settings = Data(train=[str(tmp_path / "a.jsonl")], heldout=["x"], sequence_length=10)
    for _ in range(2):  # the second time from the cache
        said = []
        packed = packed_dataset(settings.train, CharTokenizer(), settings, say=said.append)
        assert said == [
            "data.train: 900 of 1,500 documents longer than data.sequence_length=10 tokens: they go on in the next rows, which "
            "do not see how they begin", "data.train: 600 rows left out, without text or dialogue (null)"]
        assert packed.column_names == ["input_ids"]


def test_where_nothing_is_long_or_empty_nothing_is_said(tmp_path):
    settings, path = data(tmp_path)
    said = []
    packed_dataset([path], CharTokenizer(), settings.model_copy(update={"sequence_length": 1000}), say=said.append)
    assert said == []


def test_two_heldout_files_of_one_domain_are_refused(tmp_path):
    settings, file = data(tmp_path)
    (tmp_path / "alpha.more.jsonl").write_text('{"text": "abc"}\n')
    with pytest.raises(ValueError, match="data.heldout: .* and .* are both domain 'alpha'"):
        heldout_domains([file, str(tmp_path / "alpha.more.jsonl")], CharTokenizer(), settings)


def ids_of(patterns, settings, **options) -> list[int]:
    return torch.stack(list(packed_dataset(patterns, CharTokenizer(), settings, **options)["input_ids"])).flatten().tolist()


SPELLINGS = ("a.jsonl", "a.JSONL", "a.ndjson", "a.jsonl.gz", "a.json", "a.csv", "a.parquet", "folder")


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_same_documents_in_every_spelling_are_the_same_rows(name, tmp_path):
    from datasets import Dataset

    texts = [f"document {i}, of nine words and a comma " for i in range(30)]
    rows = [{"text": text, "number": i} for i, text in enumerate(texts)]
    file, table = tmp_path / name, Dataset.from_list(rows)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if name == "folder":
        table.save_to_disk(file)
    elif name.endswith((".csv", ".parquet")):
        getattr(table, f"to_{name[2:]}")(file)
    else:
        lines = json.dumps(rows).encode() if name == "a.json" else lines
        file.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    settings = Data(train=[str(file)], heldout=[str(file)], sequence_length=16)
    joined = [i for ids in CharTokenizer()(texts, False)["input_ids"] for i in (*ids, 0)]
    assert ids_of([str(file)], settings) == joined[:len(joined) // 16 * 16]


def test_other_columns_may_differ_between_and_within_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "abcdefgh", "id": 1}\n{"text": "ijklmnop", "id": "x", "more": [1]}\n')
    (tmp_path / "b.jsonl").write_text('{"source": {"a": 1}, "text": "qrstuvwxyz012345"}\n')
    settings = Data(train=["x"], heldout=["x"], sequence_length=8)
    assert len(ids_of([str(tmp_path / "*.jsonl")], settings)) == 32


def test_an_edited_file_is_read_anew(tmp_path):
    settings, file = data(tmp_path)
    before = ids_of([file], settings)
    Path(file).write_text('{"text": "something else, long enough for a row"}\n')
    assert ids_of([file], settings) != before


def test_weighted_sources_are_mixed_by_their_weights(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name * 7}"}}\n' * 400)
    sources = [Source(path=str(tmp_path / "a.jsonl"), weight=3.0), Source(path=str(tmp_path / "b.jsonl"), weight=1.0)]
    settings = Data(train=sources, heldout=["x"], sequence_length=8)
    counts = Counter(ids_of(sources, settings, seed=1))
    a, b = (counts[CharTokenizer()([name], False)["input_ids"][0][0]] for name in "ab")
    assert 2.5 < a / b < 3.5 and ids_of(sources, settings, seed=1) != ids_of(sources, settings, seed=2)


def test_at_most_as_many_documents_as_asked_for_are_read(tmp_path):
    settings, file = data(tmp_path)
    assert ids_of([Source(path=file, documents=5)], settings) == ids_of([file], settings)[:len(ids_of([Source(
        path=file, documents=5)], settings))]


@pytest.mark.parametrize("given", [{}, {"path": "a", "hub": "b"}])
def test_a_source_is_in_one_place(given):
    with pytest.raises(ValueError, match="either path or hub"):
        Source(**given)


def test_texts_begin_as_the_tokenizer_begins_texts():
    class Begins(CharTokenizer):
        bos_token_id = 250

        def __call__(self, texts, add_special_tokens, verbose=True):
            return {"input_ids": [[250] * add_special_tokens + ids for ids in super().__call__(texts, False)["input_ids"]]}

    assert Packer(Begins(), 3)({"text": ["a", "b"]})["input_ids"] == [[250, 98, 0], [250, 99, 0]]


def dialogues(tmp_path, documents=40):
    """Dialogues of one turn, with texts between them, and a tokenizer with a template."""
    from tiny_models import write_tokenizer
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = ("{% for m in messages %}{{ ('Q' if m.role == 'user' else 'A') + m.content }}"
                               "{% if m.role != 'user' %}{{ eos_token }}{% endif %}{% endfor %}"
                               "{% if add_generation_prompt %}{{ 'A' }}{% endif %}")
    file = tmp_path / "chat.jsonl"
    rows = [{"messages": [{"role": "user", "content": "?" * (7 + i % 5)}, {"role": "assistant", "content": "!" * (1 + i % 9)}]}
            if i % 3 else {"text": "+" * (i % 7)} for i in range(documents)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tokenizer, file, rows


def test_with_losses_on_answers_the_same_tokens_are_packed_and_what_nobody_says_is_marked(tmp_path):
    tokenizer, file, _ = dialogues(tmp_path)
    settings = dict(train=[str(file)], heldout=[str(file)], sequence_length=16)
    packed = [packed_dataset([str(file)], tokenizer, Data(**settings, loss_on=what)) for what in ("all", "answers")]
    every, answers = (torch.stack(list(rows["input_ids"])) for rows in packed)
    ids, counted = split_rows(answers)
    kept = [row for row in every if any(tokenizer.decode([t]) not in "?QA" for t in row[1:].tolist())]
    assert torch.equal(ids, torch.stack(kept))
    for row, mask in zip(ids.tolist(), counted.tolist(), strict=True):
        said = [tokenizer.decode([t]) not in "?QA" for t in row]
        assert mask == [*said[1:], False]
    assert split_rows(every)[1] is None and torch.equal(split_rows(every)[0], every)


def test_rows_without_an_answer_are_left_out_and_none_at_all_is_one_line(tmp_path):
    tokenizer, file, _ = dialogues(tmp_path)
    rows = [{"messages": [{"role": "user", "content": "?" * 200}, {"role": "assistant", "content": "!"}]}]
    settings = dict(train=[str(file)], heldout=[str(file)], sequence_length=16)
    file.write_text(json.dumps(rows[0]) + "\n")
    assert len(packed_dataset([str(file)], tokenizer, Data(**settings))) == 12
    with pytest.raises(ValueError, match=r"or no answer in them \(data.loss_on: answers\)"):
        packed_dataset([str(file)], tokenizer, Data(**settings, loss_on="answers"))


def test_the_digest_knows_what_is_learned(tmp_path):
    tokenizer, file, _ = dialogues(tmp_path)
    settings = dict(train=[str(file)], heldout=[str(file)], sequence_length=16)
    found = [packed_dataset([str(file)], tokenizer, Data(**settings, loss_on=what)) for what in ("all", "answers")]
    assert rows_digest(found[0]) != rows_digest(found[1])
    assert learned_tokens(found[0]) == 16 * len(found[0]) and 0 < learned_tokens(found[1]) < 16 * len(found[1])


def test_a_dialogue_that_cannot_be_rendered_is_named_by_file_and_line(tmp_path):
    tokenizer, file, rows = dialogues(tmp_path)
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    file.write_text('{"text": "fine"}\n' + json.dumps(rows[1]) + "\n")
    with pytest.raises(ValueError) as caught:
        packed_dataset([str(file)], tokenizer, Data(train=[str(file)], heldout=[str(file)], sequence_length=16))
    assert str(caught.value) == f"data.train: {file}:2: no such role"
