"""Anchors are fresh, sorted, allowed and local; labels stop at the dialogue's end; packing loses and mixes nothing."""

import json

import pytest
import torch

from dflash_train.anchors import block_labels, sample_anchors, teacher_index
from dflash_train.dialogues import Dialogue, own_dialogues, pack, read_jsonl, row_prompt


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_anchors_are_sorted_distinct_and_allowed():
    allowed = torch.rand(5, 63, generator=generator()) < 0.4
    anchors = sample_anchors(allowed, 12, generator())
    assert anchors.shape == (5, 12)
    for row, places in zip(allowed, anchors, strict=True):
        assert places.tolist() == sorted(set(places.tolist())) and row[places].all()


def test_rows_with_too_few_places_begin_with_no_anchor():
    allowed = torch.zeros(2, 20, dtype=torch.bool)
    allowed[0, [3, 7]] = True
    assert sample_anchors(allowed, 4, generator()).tolist() == [[-1, -1, 3, 7], [-1] * 4]
    assert sample_anchors(allowed, 50, generator()).shape == (2, 20)


def test_anchors_differ_from_step_to_step_and_repeat_with_the_seed():
    allowed = torch.ones(2, 63, dtype=torch.bool)
    first, second, again = (sample_anchors(allowed, 9, generator(s)) for s in (1, 2, 1))
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_every_allowed_place_is_drawn_equally_often():
    allowed = torch.zeros(1, 40, dtype=torch.bool)
    allowed[0, 10:30] = True
    counts = torch.zeros(40)
    for seed in range(2000):
        counts[sample_anchors(allowed, 5, generator(seed))[0]] += 1
    assert not counts[:10].any() and not counts[30:].any()
    assert (counts[10:30] - 500).abs().max() < 5 * 500**0.5  # five standard deviations


def test_a_shard_draws_only_from_itself():
    anchors = sample_anchors(torch.ones(3, 64, dtype=torch.bool), 10, generator(), shard=slice(16, 32))
    assert ((anchors >= 16) & (anchors < 32)).all()


def test_labels_are_the_next_tokens_and_stop_at_the_dialogues_end():
    tokens = torch.arange(100, 112)[None]
    ends = torch.tensor([[7] * 7 + [12] * 5])
    labels = block_labels(tokens, ends, torch.tensor([[-1, 2, 5, 6, 9]]), block=4)
    assert labels[0].tolist() == [[-100] * 3, [103, 104, 105], [106, -100, -100], [-100] * 3, [110, 111, -100]]
    assert teacher_index(torch.tensor([[2, 10]]), 4, 12)[0].tolist() == [[2, 3, 4], [10, 11, 11]]


def dialogues(seed=0, count=37):
    rng = generator(seed)
    sizes = torch.randint(1, 40, (count, 2), generator=rng).tolist()
    return [Dialogue([i] * p, [1000 + i] * r) for i, (p, r) in enumerate(sizes)]


def test_packing_keeps_every_token_once_and_mixes_no_dialogues():
    made = dialogues()
    rows = pack(made, 80)
    seen = []
    for r, members in enumerate(rows.members):
        used = torch.zeros(80, dtype=torch.bool)
        for i, begin, size in members:
            place = slice(begin, begin + size)
            assert not used[place].any()
            used[place] = True
            assert rows.tokens[r, place].tolist() == made[i].tokens
            assert (rows.starts[r, place] == begin).all() and (rows.ends[r, place] == begin + size).all()
            assert rows.response[r, place].tolist() == [False] * len(made[i].prompt) + [True] * len(made[i].response)
            seen.append(i)
        assert not rows.response[r][~used].any() and not rows.may_anchor()[r][~used].any()
    assert sorted(seen) == list(range(len(made)))
    assert len(rows) < 1.25 * sum(len(d.tokens) for d in made) / 80 + 1


def test_anchors_stand_on_response_tokens_that_have_a_successor():
    rows = pack([Dialogue([1, 2], [3, 4, 5]), Dialogue([6], [7])], 16)
    places = rows.may_anchor().nonzero()[:, 1].tolist()
    assert [rows.tokens[0, p].item() for p in places] == [3, 4]


def test_long_dialogues_are_cut_at_the_row_and_that_is_said():
    said = []
    rows = pack([Dialogue([1] * 5, [2] * 100)], 20, say=said.append)
    assert rows.tokens.shape == (1, 20) and rows.may_anchor().sum() == 14
    assert said == ["1 of 1 dialogues are longer than dflash.sequence_length=20 and were cut there"]


def test_data_without_responses_is_refused():
    with pytest.raises(ValueError, match="nothing to draft"):
        pack([Dialogue([1, 2, 3], [4])], 16)


def test_own_data_takes_dialogues_and_plain_text_and_names_bad_rows(tmp_path, loaded):
    tokenizer = loaded[1].tokenizer
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"prompt": "a", "response": "bc"}) + "\n" + json.dumps({"text": "xyz"}) + "\n")
    first, second = own_dialogues([str(file)], "prompt", tokenizer, loaded[1].end_ids)
    assert len(first.prompt) == 1 and len(first.response) == 3 and first.response[-1] == tokenizer.eos_token_id
    assert second.prompt == [] and len(second.response) == 4
    file.write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match=r"own.jsonl:1: neither 'response' nor 'text'; it has \['prompt'\]"):
        own_dialogues([str(file)], "prompt", tokenizer, loaded[1].end_ids)
    file.write_text('{"prompt"\n')
    with pytest.raises(ValueError, match="own.jsonl:1: not valid JSON"):
        own_dialogues([str(file)], "prompt", tokenizer, loaded[1].end_ids)
    with pytest.raises(ValueError, match="empty prompt"):
        row_prompt({"_where": "x:1", "prompt": ""}, "prompt", tokenizer, "k")


def test_jsonl_lines_end_at_newlines_alone_and_empty_ones_are_passed_over(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n' + '{"text": "b\u2028c\u0085d"}'.encode())
    rows = read_jsonl([str(file)], "dflash.data")
    assert [r["text"] for r in rows] == ["a", "b\u2028c\u0085d"]
    assert [r["_where"] for r in rows] == [f"{file}:1", f"{file}:4"]


def test_jsonl_in_another_encoding_is_refused_by_file_and_line(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_bytes(b'{"text": "a"}\n' + '{"text": "\u00e9"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"^dflash.data: .*own.jsonl:2: not UTF-8: byte 0xe9 at column 11$"):
        read_jsonl([str(file)], "dflash.data")
    file.write_text("[1]\n")
    with pytest.raises(ValueError, match="own.jsonl:1: expected an object, found list"):
        read_jsonl([str(file)], "dflash.data")
