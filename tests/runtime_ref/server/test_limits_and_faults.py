"""What must not happen: a slot lost to a client that left, a mistake that becomes a 500, an engine that dies in silence."""

import asyncio
import contextlib
import json
import os
import socket
import threading

import httpx
import pytest
from live_server import Hurry, wait_until
from pace import paced, seconds
from random_clients import crowd

from runtime_ref.server.access import AccessRules

LENGTH, WAIT = paced(240, 20), seconds(30)
LONG = {"prompt": [5, 6, 7], "max_tokens": LENGTH, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def unhurried(monkeypatch):
    """Makes an engine's answers take half a minute, so that something can happen meanwhile, until what is returned is set."""
    return lambda engine: Hurry(engine, monkeypatch)


def no_pages(held):
    return set(held.values()) == {0}


@contextlib.contextmanager
def asking(url, body, missing=0):
    """A connection on which /v1/completions is asked, and that is closed in the end. `missing`: bytes that never come."""
    data, (host, port) = json.dumps(body).encode(), url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=WAIT) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                    b"Content-Length: %d\r\n\r\n%b" % (len(data), data[:len(data) - missing]))
        yield raw


def post(url, body, path="/v1/completions", **more):
    return httpx.post(f"{url}{path}", json=body, timeout=WAIT, **more)


BROKEN = [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"prompt": "x", "temperature": NaN}', b"[" * 100_000,
          b'{"prompt": "x", "max_tokens": 1e999}', b'{"prompt": "x", "max_tokens": -Infinity}',
          b'{"prompt": "x", "seed": ' + b"9" * 6000 + b"}", b'{"prompt": "x", "seed": ' + b"9" * 30 + b"}",
          b'{"prompt": "\\ud800"}', b'{"prompt": ["a", [1]]}', b'{"prompt": [1, "a"]}', b'{"prompt": ""}', b'{"prompt": []}',
          b'{"prompt": [[]]}', b'{"prompt": [1, -1]}', b'{"prompt": [99999]}', b'{"prompt": [4294967296]}', b'{"prompt": 5}',
          b'{"prompt": null}', b"{}", b'{"prompt": [true]}', b'{"prompt": [1.0]}', b'{"prompt": "x", "max_tokens": "5"}',
          b'{"prompt": "x", "max_tokens": true}', b'{"prompt": "x", "max_tokens": 1.5}', b'{"prompt": "x", "n": 129}',
          b'{"prompt": "x", "n": 100}', b'{"prompt": "x", "stop": ["", "a"]}', b'{"prompt": "x", "stop": 5}',
          b'{"prompt": "x", "top_p": 0}', b'{"prompt": "x", "temperature": "warm"}', b'{"prompt": "x", "logprobs": 21}',
          b'{"prompt": "x", "repetition_penalty": 1e-300}', b'{"prompt": "x", "stream": "yes"}',
          b'{"prompt": "x", "stream_options": 7}', b'{"prompt": "x", "stream_options": {}}',
          b'{"prompt": "x", "logit_bias": {"99999": 1}}', b'{"prompt": "x", "logit_bias": {"5": 101}}',
          b'{"prompt": "x", "logit_bias": {"-1": 1}}', b'{"prompt": "x", "logit_bias": [5]}',
          b'{"prompt": "x", "min_tokens": 17}', b'{"prompt": "x", "temprature": 0}', b'{"prompt": "x", "best_of": 2}',
          b'{"prompt": "x", "max_tokens": 5, "max_completion_tokens": 6}',
          b'{"prompt": "x", "suffix": "y"}',
          b'{"prompt": "x", "echo": 1}', b'{"prompt": "x", "max_tokens": 0}', b'{"prompt": "x", "stop_token_ids": [-1]}',
          b'{"prompt": "x", "acceptance_rule": "always"}',
          b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
          b'{"messages": "hi"}', b'{"messages": [{"content": "x"}]}', b'{"messages": [{"role": "\\ud800", "content": "x"}]}']


@pytest.mark.parametrize("body", BROKEN, ids=lambda b: b[:40].decode("latin-1"))
def test_a_broken_body_is_a_400_with_openais_error_object(live, body):
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        answer = httpx.post(f"{live.url}{path}", content=body, headers={"Content-Type": "application/json"}, timeout=WAIT)
        if path == "/tokenize" and b'"prompt": "' in body and b"ud800" not in body and answer.status_code == 200:
            continue  # a tokenizer has no use for the field that is wrong
        assert answer.status_code == 400, (path, answer.text)
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error" and error["message"] and "\n" not in error["message"]


def test_extreme_but_legal_sampling_values_are_answered(live):
    for change in ({"temperature": 5e-324}, {"temperature": 1e-4}, {"temperature": 100}, {"top_p": 5e-324}, {"min_p": 1},
                   {"top_k": -1}, {"top_k": 2**31}, {"repetition_penalty": 0.01}, {"repetition_penalty": 100},
                   {"presence_penalty": -2, "frequency_penalty": 2}, {"logprobs": 20}, {"logprobs": 0}, {"seed": -(2**63)},
                   {"seed": 2**63 - 1}, {"drafts": 0}, {"acceptance_rule": "rejection"}, {"stop": []}, {"n": None}):
        answer = post(live.url, {"prompt": "x", "max_tokens": 6, "temperature": 0.9, **change})
        assert answer.status_code == 200, (change, answer.text)


def test_unknown_paths_methods_and_media_types_are_error_objects(live):
    found = [httpx.get(f"{live.url}/v2", timeout=WAIT), httpx.get(f"{live.url}/v1/completions", timeout=WAIT),
             httpx.delete(f"{live.url}/health", timeout=WAIT),
             httpx.post(f"{live.url}/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"}, timeout=WAIT)]
    assert [f.status_code for f in found] == [404, 405, 405, 415]
    assert all(f.json()["error"]["message"] for f in found)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_beyond_the_limit_is_refused_before_it_is_complete(live, chunked):
    piece = b" " * 50_000
    sent = []

    def endless():
        for _ in range(1000):
            sent.append(1)
            yield piece

    body = endless() if chunked else piece * 5
    try:
        answer = httpx.post(f"{live.url}/v1/completions", content=body, headers={"Content-Type": "application/json"},
                            timeout=WAIT)
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
    except (httpx.WriteError, httpx.RemoteProtocolError):
        assert chunked  # told and closed while the client was still writing
    assert len(sent) < 1000


def test_text_and_tokens_go_both_ways(live, tokenizer):
    text = "naïve 🙂 三\x00\n"
    body = post(live.url, {"prompt": text, "return_token_strs": True}, "/tokenize").json()
    assert body["tokens"] == tokenizer.encode(text) and body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert body["max_model_len"] == 256
    assert post(live.url, {"tokens": body["tokens"]}, "/detokenize").json() == {"prompt": text}
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert post(live.url, {"messages": messages}, "/tokenize").json()["tokens"] == tokenizer.encode("<|user|>a\nb<|assistant|>")


def test_a_key_is_asked_for_where_answers_are_given(serving):
    server = serving(access=AccessRules(api_key="sesame ü"))
    for path, method in (("/v1/models", "GET"), ("/v1/completions", "POST"), ("/tokenize", "POST"), ("/v1/models/x", "GET"),
                         ("/metrics", "GET"), ("/openapi.json", "GET"), ("/version", "GET"), ("/none", "GET")):
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sesame"}):
            answer = httpx.request(method, server.url + path, headers=header, json={} if method == "POST" else None,
                                   timeout=WAIT)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    right = {"Authorization": "Bearer sesame ü".encode()}
    assert httpx.get(f"{server.url}/v1/models", headers=right, timeout=WAIT).status_code == 200
    for path in ("/metrics", "/openapi.json", "/version"):
        assert httpx.get(server.url + path, headers=right, timeout=WAIT).status_code == 200
    for path in ("/health", "/ping", "/"):
        assert {httpx.request(method, server.url + path, timeout=WAIT).status_code for method in ("GET", "HEAD")} == {200}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot_at_once(live, stream, unhurried):
    unhurried(live.worker.engine)
    counts = live.worker.engine._counts
    spoken, aborted = counts["tokens"], counts["aborted"]
    with asking(live.url, {**LONG, "stream": stream, "speculate": False}):
        wait_until(lambda: counts["tokens"] > spoken)
    assert no_pages(live.until_empty())
    assert counts["aborted"] == aborted + 1
    assert counts["tokens"] - spoken < LENGTH


def test_a_client_that_leaves_the_queue_is_forgotten(serving, unhurried):
    server = serving(max_running=1)
    engine, hurry = server.worker.engine, unhurried(server.worker.engine)
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "stream": True}, timeout=WAIT) as first:
        lines = first.iter_lines()
        next(lines)
        with asking(server.url, LONG):
            wait_until(lambda: engine.scheduler.waiting)
        wait_until(lambda: not engine.scheduler.waiting and server.worker.in_flight == 1)
        hurry.set()
        rest = [line for line in lines if line.startswith("data: ")]
    assert rest[-1] == "data: [DONE]" and engine._counts["aborted"] == 1
    assert no_pages(server.until_empty())


def test_a_full_server_says_when_to_come_back(serving, unhurried):
    server = serving(max_requests=2)
    hurry = unhurried(server.worker.engine)
    assert post(server.url, {**LONG, "n": 3}).status_code == 400
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "stream": True, "n": 2}, timeout=WAIT) as first:
        lines = first.iter_lines()  # held: a client that drops its iterator leaves
        next(lines)
        answer = post(server.url, LONG)
        assert answer.status_code == 429 and int(answer.headers["Retry-After"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert httpx.get(f"{server.url}/health", timeout=WAIT).status_code == 200
    hurry.set()
    server.until_empty()
    assert post(server.url, {**LONG, "max_tokens": 2}).status_code == 200


def test_a_crashed_engine_fails_what_is_open_and_turns_health_red(serving, monkeypatch):
    server = serving()
    engine, steps = server.worker.engine, []
    working, said = engine.step, []

    def step():
        steps.append(1)
        if len(steps) > 5:
            raise IndexError("row 9 of 8")
        return working()

    monkeypatch.setattr(threading, "excepthook", said.append)
    monkeypatch.setattr(engine, "step", step)
    whole = {}
    waiting = threading.Thread(target=lambda: whole.update(answer=post(server.url, LONG)))
    waiting.start()
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "stream": True}, timeout=WAIT) as answer:
        if answer.status_code == 200:
            events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
            assert "IndexError: row 9 of 8" in events[-1]["error"]["message"]
        else:
            assert answer.status_code == 503
    waiting.join(seconds(30))
    assert whole["answer"].status_code == 503 and whole["answer"].json()["error"]["code"] == "engine_down"
    for found in (httpx.get(f"{server.url}/health", timeout=WAIT), post(server.url, LONG)):
        assert found.status_code == 503 and "row 9 of 8" in found.json()["error"]["message"]
    assert server.metric("fp4_dflash:engine_up") == 0
    wait_until(lambda: said)  # by the thread, as its last act
    assert len(said) == 1 and server.worker.in_flight == 0


def test_an_engine_that_hangs_is_found(serving, monkeypatch):
    server = serving(stall_seconds=0.3)
    release = threading.Event()
    monkeypatch.setattr(server.worker.engine, "step", lambda: release.wait(4 * WAIT) and [])
    try:
        answer = post(server.url, LONG)
        assert answer.status_code == 503 and "a step has taken more than 0.3 s" in answer.json()["error"]["message"]
        assert httpx.get(f"{server.url}/health", timeout=WAIT).status_code == 503
    finally:
        release.set()


def test_a_mistake_in_the_server_is_a_500_with_an_error_object_and_the_next_request_is_answered(serving, monkeypatch):
    server = serving()

    def broken(*_, **__):
        raise KeyError("inside")

    with monkeypatch.context() as patched:
        patched.setattr(server.api, "answer", broken)
        answer = post(server.url, {"prompt": "x", "max_tokens": 2})
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    assert "inside" not in answer.text
    assert post(server.url, {"prompt": "x", "max_tokens": 2}).status_code == 200
    assert no_pages(server.until_empty())


def test_slow_and_partial_senders_do_not_keep_others_waiting(serving):
    server = serving(body_seconds=0.3)
    with asking(server.url, LONG, missing=9) as slow, asking(server.url, {**LONG, "max_tokens": 2}) as quick:
        assert b" 200 " in quick.recv(100)  # head and body were sent at once, however slow this process is
        assert b" 408 " in slow.recv(100)


def test_clients_that_come_and_go_at_random_leave_nothing_and_the_others_get_their_own_answers(live, alone):
    """The short form of the load test."""
    report = asyncio.run(crowd(live.url, alone, clients=paced(12, 4), seconds=paced(4, 30), seed=1, until=lambda report: (
        report.finished >= paced(12, 4) and report.left >= paced(6, 3))))
    assert no_pages(live.until_empty())
    assert report.wrong == [] and report.unexpected == []
    assert report.finished >= paced(12, 4) and report.left >= paced(6, 3)


@pytest.mark.load
@pytest.mark.skipif(os.environ.get("FP4_LOAD") != "1", reason="minutes of load: make test-load")
def test_64_random_clients_for_a_minute_leave_nothing_and_get_their_own_answers(serving, alone):
    server = serving(max_requests=48)
    report = asyncio.run(crowd(server.url, alone, clients=64, seconds=60, seed=2))
    assert no_pages(server.until_empty())
    assert report.wrong == [] and report.unexpected == []
    assert report.finished >= 200 and report.left >= 100 and report.full > 0
    print(f"finished {report.finished}, left {report.left}, told to come back {report.full}")


def test_steps_faster_than_anyone_reads_share_an_event_and_lose_nothing(serving, alone):
    server = serving()
    with httpx.stream("POST", f"{server.url}/v1/completions", timeout=WAIT, json={
            **LONG, "stream": True, "speculate": False, "return_token_ids": True, "logprobs": 1}) as answer:
        events = [json.loads(line[6:])["choices"][0] for line in answer.iter_lines() if line.startswith("data: {")]
    from runtime_ref.core.sampling_params import SamplingParams

    tokens = [token for event in events for token in event["token_ids"]]
    assert tokens == alone(LONG["prompt"], SamplingParams(max_tokens=LENGTH, ignore_eos=True))
    assert len(events[0]["token_ids"]) == 1  # the first token is not held back
    assert sum(len(event["logprobs"]["tokens"]) for event in events) == LENGTH
    assert events[-1]["finish_reason"] == "length" and [e["finish_reason"] for e in events[:-1]] == [None] * (len(events) - 1)


def test_drafts_are_told_step_by_step_also_when_steps_share_an_event(serving):
    server = serving()
    with httpx.stream("POST", f"{server.url}/v1/completions", timeout=WAIT, json={
            **LONG, "stream": True, "return_drafts": True, "return_token_ids": True}) as answer:
        events = [json.loads(line[6:])["choices"][0] for line in answer.iter_lines() if line.startswith("data: {")]
    assert all(len(e["drafts"]["pieces"]) == len(e["token_ids"]) <= 1 + e["drafts"]["accepted"] for e in events)
    assert sum(len(e["token_ids"]) for e in events) == LENGTH


def test_outputs_wait_until_the_engine_has_computed_enough_to_pay_for_an_event_but_never_long():
    from runtime_ref.server.engine_thread import due

    assert not due(0.24, 0.0199, 1) and due(0.0, 0.02, 1)
    assert not due(0.24, 0.0399, 16) and due(0.0, 0.04, 16)  # sixteen streams share what sixteen events cost
    assert all(due(0.25, 0.0, requests) for requests in (1, 16, 1000))  # a machine that is busy with something else
