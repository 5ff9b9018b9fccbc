"""JSON that fits its schema, forced calls, and log-probabilities of prompts: over HTTP, with the clients that ask for them."""

import json
import shutil

import httpx
import pytest
from live_server import live_server
from pace import paced, seconds

from runtime_ref.engine.engine import Engine, EngineOptions
from runtime_ref.server.request_workers import RequestWorkers
from tests.runtime_ref.conftest import BACKEND
from tests.runtime_ref.server.test_chat_template import FUNCTION, TOOLS

WAIT, FEW = seconds(60), paced(12, 6)
SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Köln", "Ulm"]},
                                           "n": {"type": "integer", "minimum": 0, "maximum": 99}},
          "required": ["city", "n"], "additionalProperties": False}
LOOK = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def server(chat_folder, tokenizer, tmp_path_factory):
    """On the small folder, with a template that shows tools."""
    import contextlib

    folder = shutil.copytree(chat_folder, tmp_path_factory.mktemp("tools") / "small")
    (folder / "chat_template.jinja").write_text(TOOLS)
    engine = Engine.from_folder(folder, tokenizer=tokenizer, options=EngineOptions(max_context=2048), **BACKEND)
    with contextlib.closing(RequestWorkers(folder)) as workers, live_server(engine, tokenizer, workers) as found:
        yield found


@pytest.fixture(scope="module")
def openai_client(server):
    import openai

    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=WAIT)


def chat(client, **more):
    return client.chat.completions.create(**{"model": "small", "messages": [{"role": "user", "content": "x"}], "seed": 3,
                                             "temperature": 1.0, "max_tokens": 400, **more})


needs_grammars = pytest.mark.usefixtures("grammars")


@pytest.fixture(scope="module")
def grammars():
    pytest.importorskip("llguidance", reason="llguidance is not installed: pip install -e '.[structured]'")


@needs_grammars
@pytest.mark.parametrize("drafts", [{"speculate": False}, {"adaptive_drafts": False},
                                    {"adaptive_drafts": False, "acceptance_rule": "rejection"}], ids=str)
def test_answers_fit_the_schema_whatever_is_drafted(openai_client, drafts):
    form = {"type": "json_schema", "json_schema": {"name": "look", "schema": SCHEMA, "strict": True}}
    answer = chat(openai_client, response_format=form, n=4, extra_body=drafts)
    for choice in answer.choices:
        value = json.loads(choice.message.content)
        assert value["city"] in ("Köln", "Ulm") and 0 <= value["n"] <= 99 and set(value) == {"city", "n"}
        assert choice.finish_reason == "stop"


@needs_grammars
def test_a_stream_and_a_plain_completion_fit_too(openai_client):
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"const": ["a", {"b": None}]}}}
    chunks = list(chat(openai_client, response_format=form, stream=True))
    assert json.loads("".join(c.choices[0].delta.content or "" for c in chunks)) == ["a", {"b": None}]
    plain = openai_client.completions.create(model="small", prompt="x", max_tokens=300, seed=3,
                                             extra_body={"response_format": form})
    assert json.loads(plain.choices[0].text) == ["a", {"b": None}]


@needs_grammars
def test_a_json_object_is_an_object_as_far_as_it_came(openai_client):
    answer = chat(openai_client, response_format={"type": "json_object"}, max_tokens=40)
    assert answer.choices[0].message.content.lstrip().startswith("{")


@needs_grammars
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}], ids=["required", "named"])
def test_forced_calls_are_calls_with_right_arguments(openai_client, choice, stream):
    answer = chat(openai_client, tools=[LOOK, FUNCTION | {"function": {"name": "other"}}], tool_choice=choice, stream=stream,
                  parallel_tool_calls=False, max_tokens=600)
    if stream:
        chunks = list(answer)
        calls = [call for c in chunks for call in c.choices[0].delta.tool_calls or []]
        assert [call.index for call in calls] == [0] and not "".join(c.choices[0].delta.content or "" for c in chunks)
        finish = chunks[-1].choices[0].finish_reason
    else:
        calls, finish = answer.choices[0].message.tool_calls, answer.choices[0].finish_reason
        assert answer.choices[0].message.content is None
    assert len(calls) == 1 and finish == "tool_calls" and calls[0].id.startswith("call_") and calls[0].type == "function"
    arguments = json.loads(calls[0].function.arguments)
    if calls[0].function.name == "look":
        assert arguments["city"] in ("Köln", "Ulm") and 0 <= arguments["n"] <= 99
    else:
        assert choice == "required"


def test_a_call_that_the_model_makes_by_itself_is_told_as_one(server, openai_client, tokenizer, monkeypatch):
    """The small model says nothing of the kind, so its steps say it: what follows them is the real server."""
    said = tokenizer.encode('Yes. <tool_call>{"name": "look", "arguments": {"n": 1}}</tool_call>')
    right = server.worker.engine.step

    def step():
        outputs = right()
        for output in outputs:
            n = spoken[0]
            output.tokens, output.pieces, output.logprobs = [said[n]], [tokenizer.decode([said[n]])], []
            output.text, output.drafted, output.accepted = output.pieces[0], 0, 0
            spoken[0] += 1
            if spoken[0] == len(said):
                output.finish = "stop"
        return outputs

    for stream in (False, True):
        spoken = [0]
        monkeypatch.setattr(server.worker.engine, "step", step)
        answer = chat(openai_client, tools=[LOOK], stream=stream, max_tokens=len(said), extra_body={"ignore_eos": True})
        if stream:
            deltas = [c.choices[0] for c in answer]
            assert "".join(d.delta.content or "" for d in deltas) == "Yes. " and deltas[-1].finish_reason == "tool_calls"
            calls = [call for d in deltas for call in d.delta.tool_calls or []]
        else:
            message = answer.choices[0].message
            assert message.content == "Yes. " and answer.choices[0].finish_reason == "tool_calls"
            calls = message.tool_calls
        assert [(c.function.name, c.function.arguments) for c in calls] == [("look", '{"n": 1}')]
        monkeypatch.undo()
        server.until_empty()


BAD_SCHEMAS = [{"type": "nonsense"}, {"$ref": "http://elsewhere/x"}, {"type": "string", "pattern": "("},
               {"$ref": "#/nowhere"}, None]


@needs_grammars
@pytest.mark.parametrize("schema", BAD_SCHEMAS, ids=str)
def test_a_schema_that_cannot_be_followed_is_a_400(server, schema):
    answer = httpx.post(f"{server.url}/v1/chat/completions", timeout=WAIT, json={
        "messages": [{"role": "user", "content": "x"}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "response_format", answer.text


@needs_grammars
def test_a_schema_that_is_a_bomb_costs_its_own_request_only(server):
    deep = {"type": "integer"}
    for _ in range(400):
        deep = {"type": "array", "items": deep, "minItems": 1}
    wide = {"anyOf": [{"type": "string", "pattern": f"^(a|b|c|{i}){{1,{500 + i}}}x{i}$"} for i in range(300)]}
    large = {"enum": [f"value number {i} of very many" for i in range(60_000)]}
    for schema in (deep, wide, large, {"type": "array", "items": wide, "minItems": 5000, "maxItems": 100_000}):
        answer = httpx.post(f"{server.url}/v1/completions", timeout=WAIT, json={
            "prompt": "x", "max_tokens": 5, "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}})
        assert answer.status_code in (200, 400) and (schema is not large or answer.status_code == 400), answer.text
        assert httpx.get(f"{server.url}/health", timeout=WAIT).status_code == 200
    assert set(server.until_empty(seconds(20)).values()) == {0}


def test_without_the_package_one_line_says_what_to_install(tokenizer, monkeypatch):
    from runtime_ref.server import preparation
    from runtime_ref.server.openai_requests import BadRequest
    from runtime_ref.server.request_workers import Limits

    monkeypatch.setattr(preparation, "installed", lambda: False)
    body = {"prompt": "x", "response_format": {"type": "json_object"}}
    with pytest.raises(BadRequest, match=r"needs the package llguidance: pip install -e '.\[structured\]'") as caught:
        preparation.Preparation(tokenizer).prepare("completions", json.dumps(body).encode(), Limits(256, 264, 8))
    assert caught.value.code == "structured_output_unavailable"


def score(server, prompt, **more):
    answer = httpx.post(f"{server.url}/v1/completions", timeout=WAIT, json={
        "prompt": prompt, "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234, **more})
    assert answer.status_code == 200, answer.text
    return sorted(answer.json()["choices"], key=lambda c: c["index"])


def test_prompts_are_scored_as_lm_eval_asks_for_it(server, tokenizer):
    """A batch of token prompts, one token more than is wanted, the first without a number; sums agree with what the same tokens
    had as answers."""
    answer = httpx.post(f"{server.url}/v1/completions", timeout=WAIT, json={
        "prompt": [5, 6, 7], "temperature": 1.0, "seed": 2, "max_tokens": FEW, "logprobs": 1, "return_token_ids": True,
        "ignore_eos": True}).json()["choices"][0]
    prompts = [[5, 6, 7, *answer["token_ids"]], [9, 9, 9], [4]]
    choices = score(server, prompts)
    for prompt, choice in zip(prompts, choices, strict=True):
        logprobs = choice["logprobs"]
        assert {len(logprobs[name]) for name in logprobs} == {len(prompt) + 1}
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        rows = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
        for name, value, top in list(rows)[1:]:
            assert top[name] == value <= max(top.values()) <= 0
    assert choices[0]["logprobs"]["token_logprobs"][3:-1] == answer["logprobs"]["token_logprobs"]
    assert choices[0]["logprobs"]["text_offset"][0] == 0
    assert choices[0]["text"].startswith(tokenizer.decode(prompts[0], skip_special_tokens=True))


def test_max_tokens_0_scores_the_prompt_and_says_nothing(server, tokenizer):
    for stream in (False, True):
        answer = httpx.post(f"{server.url}/v1/completions", timeout=WAIT, json={
            "prompt": "ab cd", "max_tokens": 0, "logprobs": 2, "echo": True, "stream": stream})
        if stream:
            events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
            choice = events[0]["choices"][0]
            assert len(events) == 1
        else:
            choice = answer.json()["choices"][0]
            assert answer.json()["usage"]["completion_tokens"] == 0
        assert choice["text"] == "ab cd" and choice["finish_reason"] == "length"
        assert len(choice["logprobs"]["tokens"]) == len(tokenizer.encode("ab cd"))
    assert score(server, "ab cd", max_tokens=0, logprobs=None)[0]["text"] == "ab cd"
    refused = httpx.post(f"{server.url}/v1/completions", timeout=WAIT, json={"prompt": "x", "max_tokens": 0})
    assert refused.status_code == 400 and "echo" in refused.json()["error"]["message"]


def test_tokens_that_hold_part_of_a_character_keep_their_own_keys(server):
    found = score(server, [[200, 201, 202, 203]], logprobs=20)[0]["logprobs"]
    assert all(len(top) >= 20 for top in found["top_logprobs"][1:])
    assert any(name.startswith("bytes:\\x") for name in found["tokens"])


def test_scoring_does_not_use_or_spoil_the_prefix_cache(server):
    prompt = [(i * 37) % 250 + 1 for i in range(paced(300, 70))]
    first = score(server, [prompt])
    assert score(server, [prompt]) [0]["logprobs"] == first[0]["logprobs"]
    plain = httpx.post(f"{server.url}/v1/completions", timeout=WAIT, json={
        "prompt": prompt, "temperature": 0, "max_tokens": 1, "logprobs": 1}).json()["choices"][0]
    assert plain["logprobs"]["token_logprobs"] == first[0]["logprobs"]["token_logprobs"][-1:]


def test_lm_eval_scores_multiple_choice_through_the_server(server, chat_folder, tmp_path):
    """The real client, on a local task, with the checkpoint's own tokenizer."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'lm-eval[api]'")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model = LocalCompletionsAPI(base_url=f"{server.url}/v1/completions", model="small", tokenizer=str(chat_folder),
                                tokenizer_backend="huggingface", max_length=1024, batch_size=4)
    from lm_eval.api.instance import Instance

    asked = [Instance("loglikelihood", {}, (f"{i} + {i} =", f" {2 * i}"), i) for i in range(6)]
    found = model.loglikelihood(asked, disable_tqdm=True)
    assert lm_eval and len(found) == 6 and all(value < 0 and greedy in (True, False) for value, greedy in found)
