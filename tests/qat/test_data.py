"""Packing loses nothing but the tail; the order depends on seed and epoch alone; a position can be rejoined."""

import json
from types import SimpleNamespace

import pytest
import torch

from qat.data import EpochOrder, endless_batches, expand, heldout_domains, make_loader, pack, packed_dataset
from recipes.schema import Data


class CharTokenizer:
    eos_token_id = 0

    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [[ord(c) % 200 + 1 for c in t] for t in texts]}


@pytest.mark.parametrize("length", [8, 63, 100])
def test_packed_rows_are_the_joined_documents_cut_at_length(length):
    texts = ["ab" * 50, "", "xyz" * 33]
    rows = pack({"text": texts}, tokenizer=CharTokenizer(), length=length, field="text")["input_ids"]
    joined = [i for ids in CharTokenizer()(texts, False)["input_ids"] for i in (*ids, 0)]
    assert [i for row in rows for i in row] == joined[:len(joined) // length * length]


def data(tmp_path, documents=30, **options) -> tuple[Data, str]:
    file = tmp_path / "alpha.train.jsonl"
    file.write_text("".join(json.dumps({"text": f"document {i} " * 9}) + "\n" for i in range(documents)))
    return Data(train=[str(file)], heldout=[str(file)], sequence_length=16, **options), str(file)


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
        assert torch.equal(next(whole), next(resumed))


def test_heldout_domains_are_named_by_file_and_limited(tmp_path):
    settings, file = data(tmp_path, eval_sequences=4)
    domains = heldout_domains([file], CharTokenizer(), settings)
    assert list(domains) == ["alpha"] and domains["alpha"].shape == (4, 16)


def test_a_missing_file_names_key_and_pattern():
    with pytest.raises(ValueError, match=r"data\.train: 'nowhere/\*\.jsonl' matches no file"):
        expand(["nowhere/*.jsonl"], "data.train")


def test_a_wrong_column_names_what_there_is(tmp_path):
    settings, file = data(tmp_path, text_field="body")
    with pytest.raises(ValueError, match=r"data\.text_field: 'body' is not a column of data\.train; it has \['text'\]"):
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


def test_a_damaged_file_is_one_line(tmp_path):
    settings, file = data(tmp_path)
    (tmp_path / "alpha.train.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match="cannot be read"):
        packed_dataset([file], CharTokenizer(), settings)
