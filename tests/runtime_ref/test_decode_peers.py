"""The decode benchmark beside other engines: how prompts become batches, and that those are answered as their prompts are."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch
from jobs import ROOT
from transformers import LlamaConfig, LlamaForCausalLM

SPEC = importlib.util.spec_from_file_location("decode_peers", ROOT / "benchmarks/decode_peers.py")
peers = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(peers)


def test_batches_are_consecutive_prompts_from_the_beginning_again_after_the_last():
    assert peers.batched({"a": [[1], [2], [3]]}, [1, 2], 2) == {"a": [[[1]], [[2]]], "a x2": [[[1], [2]], [[3], [1]]]}


@pytest.mark.parametrize("text", ["0", "1,", "8,-1", "x"])
def test_a_batch_that_is_no_number_is_told_in_one_line(text, capsys):
    with pytest.raises(SystemExit, match="2"):
        peers.main(["--prompts", "p.jsonl", "--batch", text, "--", "a=runtime:none"])
    assert f"argument --batch: {text!r}: expected positive numbers, as in 1,8" in capsys.readouterr().err


def test_figures_are_over_the_batch_and_an_engine_that_has_none_says_so(capsys):
    def way(name, kind, seconds, second):
        answers = {1: [7] * 4, 2: [second] * 4}
        return SimpleNamespace(name=name, kind=kind, decode=lambda rows, n: ([answers[row[0]] for row in rows], seconds, 1.0))

    ways = [way("ours", "runtime", 0.5, 7), way("theirs", "vllm", 1.0, 8), way("ggml", "llama.cpp", 1.0, 7)]
    table = peers.measure(ways, peers.batched({"a": [[1], [2]]}, [1, 2], 1), 4, 2)
    assert list(table["a"]) == ["ours", "theirs", "ggml"] and list(table["a x2"]) == ["ours", "theirs"]
    assert table["a x2"]["ours"] == {"tokens_per_second": 16.0, "cpu_ms_per_token": 125.0, "equal": 2, "of": 2}
    assert table["a x2"]["theirs"]["tokens_per_second"] == 8.0 and table["a x2"]["theirs"]["equal"] == 1
    assert "ggml           not run: llama.cpp decodes one sequence at a time" in capsys.readouterr().out


def assert_batches_change_nothing(decode):
    rows = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [11]]
    assert decode(rows, 6) == [decode([row], 6)[0] for row in rows]


def test_the_runtime_answers_a_batch_as_its_prompts(folder):
    assert_batches_change_nothing(peers.runtime(str(folder), 3))


def test_transformers_answers_a_batch_as_its_prompts(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=90, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, initializer_range=0.3)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert_batches_change_nothing(peers.transformers(str(tmp_path), 3))


@pytest.mark.slow
def test_engines_in_processes_of_their_own_get_batches(folder, prompt_files, tmp_path, capsys):
    ways = f"one=runtime:{folder}", f"two=runtime-torch:{folder}"
    options = "--count 1 --batch 1,3 --tokens 4 --repeats 1".split()
    assert peers.main([*ways, "--prompts", str(prompt_files["heldout"]), *options, "--json", str(tmp_path / "t.json")]) == 0
    assert "heldout x3" in capsys.readouterr().out
    table = json.loads((tmp_path / "t.json").read_text())["table"]
    assert list(table) == ["heldout", "heldout x3"] and table["heldout x3"]["one"]["of"] == 3
