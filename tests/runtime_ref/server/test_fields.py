"""Fields that change an answer change it, for real: names, limits, biases, and where nothing is."""

import time

import httpx
import pytest
from pace import paced, seconds

from runtime_ref.core.sampling_params import SamplingParams
from runtime_ref.serve import default_name

WAIT, FEW = seconds(30), paced(20, 6)


def complete(server, **body):
    return httpx.post(f"{server.url}/v1/completions", timeout=WAIT,
                      json={"prompt": [5, 6, 7], "temperature": 0, "return_token_ids": True, "max_tokens": FEW, **body})


def tokens(server, **body):
    answer = complete(server, **body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"]


@pytest.mark.parametrize("drafts", [{}, {"speculate": False}, {"adaptive_drafts": False, "temperature": 0.8,
                                                                 "acceptance_rule": "rejection"}], ids=str)
def test_a_bias_forbids_and_forces_tokens_with_and_without_drafts(live, drafts):
    plain = tokens(live, ignore_eos=True, **drafts)
    found = tokens(live, ignore_eos=True, logit_bias={str(t): -100 for t in set(plain)}, **drafts)
    assert not set(found) & set(plain)
    assert set(tokens(live, ignore_eos=True, logit_bias={"9": 100}, **drafts)) == {9}


def test_no_end_comes_before_min_tokens(live, alone):
    always = {"logit_bias": {"0": 100}}  # the end token, at once
    assert len(tokens(live, **always)) == 1
    assert len(tokens(live, min_tokens=5, **always)) == 6 and 0 not in tokens(live, min_tokens=5, **always)[:5]
    assert len(tokens(live, min_tokens=5, stop_token_ids=[9], ignore_eos=True, logit_bias={"9": 100})) == 6
    assert "min_tokens" in complete(live, min_tokens=FEW + 1).json()["error"]["message"]
    free = SamplingParams(max_tokens=FEW, ignore_eos=True)
    assert tokens(live, min_tokens=FEW, ignore_eos=True) == alone([5, 6, 7], free)


def test_special_tokens_have_text_if_it_is_asked_for(live):
    ask = {"logit_bias": {"0": 100}, "ignore_eos": True, "max_tokens": 2}
    assert complete(live, **ask).json()["choices"][0]["text"] == ""
    assert complete(live, **ask, skip_special_tokens=False).json()["choices"][0]["text"] == "<|endoftext|>" * 2


def test_a_model_has_several_names_and_answers_to_the_one_that_was_used(serving):
    began = int(time.time())
    server = serving(names=("seed", "gpt-4", "a/b c"))
    cards = httpx.get(f"{server.url}/v1/models", timeout=seconds(30)).json()["data"]
    assert [card["id"] for card in cards] == ["seed", "gpt-4", "a/b c"] and {card["root"] for card in cards} == {"seed"}
    assert all(began <= card["created"] <= time.time() for card in cards)
    assert httpx.get(f"{server.url}/v1/models/a/b%20c", timeout=seconds(30)).json()["id"] == "a/b c"
    assert complete(server, model="gpt-4").json()["model"] == "gpt-4"
    assert complete(server).json()["model"] == "seed"
    wrong = complete(server, model="gpt-5")
    assert wrong.status_code == 404 and "'seed' or 'gpt-4'" in wrong.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/embeddings", "/v1/audio/speech", "/docs", "/v1",
                                  "/v1/chat/completions/"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_path_that_is_not_there_says_what_is(live, path, method):
    answer = httpx.request(method, live.url + path, json={} if method == "POST" else None, timeout=seconds(30))
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["message"].startswith(f"{method} {path}: not offered") and "/v1/chat/completions" in error["message"]


def test_a_method_that_is_not_there_says_which_is(live):
    answer = httpx.put(f"{live.url}/v1/completions", json={}, timeout=seconds(30))
    assert answer.status_code == 405 and "expected POST" in answer.json()["error"]["message"]


def test_the_version_is_told(live):
    assert httpx.get(f"{live.url}/version", timeout=seconds(30)).json()["version"]


def test_a_checkpoint_is_called_by_its_recipe_or_its_folder(tmp_path):
    folder = tmp_path / "tiny" / "export" / "model"
    folder.mkdir(parents=True)
    assert default_name(folder) == "model"
    for text in ("name: [", "- a", "name: 5", "name: ''", "\xff"):
        (folder / "resolved.yaml").write_text(text, encoding="latin-1")
        assert default_name(folder) == "model"
    (folder / "resolved.yaml").write_text("name: mimo-fp4\nseed: 1\n")
    assert default_name(folder) == "mimo-fp4"
    cached = tmp_path / "models--XiaomiMiMo--MiMo-FP4" / "snapshots" / "0123abcd"
    cached.mkdir(parents=True)
    assert default_name(cached) == "XiaomiMiMo/MiMo-FP4"


def test_unknown_fields_are_ignored_where_the_option_says_so(serving):
    server = serving(unknown_fields=True)
    assert complete(server, mirostat=2, my_clients_own=[1]).status_code == 200
    assert complete(server, best_of=2).status_code == 400


def test_every_metric_says_what_it_is_and_reads_as_prometheus_wants_it(live):
    import re

    lines = httpx.get(f"{live.url}/metrics", timeout=seconds(30)).text.splitlines()
    helped, typed = ({line.split()[2] for line in lines if line.startswith(f"# {kind} ")} for kind in ("HELP", "TYPE"))
    assert helped == typed and len(helped) > 20
    sample = re.compile(r'[a-z_0-9:]+\{[a-z_]+="[^"\n]*"(,[a-z_]+="[^"\n]*")*\} [0-9.e+-]+')
    assert [line for line in lines if not line.startswith("# ") and not sample.fullmatch(line)] == []
    names = {re.sub(r"_(bucket|sum|count)$", "", line.partition("{")[0]) for line in lines if not line.startswith("#")}
    assert names <= helped
