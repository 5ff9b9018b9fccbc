"""What a client or a template does to the processes that prepare requests, it does not do to the server."""

import contextlib
import json
import shutil
import threading
import time

import httpx
import psutil
import pytest
from pace import seconds

from runtime_ref.server.openai_requests import BadRequest
from runtime_ref.server.request_workers import Limits, RequestWorkers

LIMITS = Limits(context=256, vocabulary=264, max_requests=8)
CHAT = b'{"messages":[{"role":"user","content":"x"}]}'
MIB = 1 << 20


def processes(workers):
    nursery = psutil.Process(workers._nursery[0].pid)
    return [nursery, *nursery.children(recursive=True)]


def test_a_worker_says_what_the_tokenizer_says(preparing, tokenizer):
    found = preparing.prepare("chat", CHAT, LIMITS)
    assert found["prompts"] == [tokenizer.encode("<|user|>x<|assistant|>")]
    with pytest.raises(BadRequest, match="temprature: unknown field, did you mean temperature") as caught:
        preparing.prepare("completions", b'{"prompt":"x","temprature":1}', LIMITS)
    assert caught.value.param == "temprature" and caught.value.status == 400


HOSTILE = {
    "a loop that never ends": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a sum inside C": "{% for a in range(99999) %}{{ range(99999)|sum }}{% endfor %}",
    "a power that no signal ends": "{{ 9 ** (9 ** 9) }}",
    "text without end": "{% for a in range(9999) %}{{ 'a' * 1000000 }}{% endfor %}",
    "two gigabytes": "{{ 'a' * (2000000000 * messages|length) }}",  # a constant would be made while the template is compiled
    "doubling": "{% set t = namespace(x='ab') %}{% for i in range(60) %}{% set t.x = t.x + t.x %}{% endfor %}{{ t.x }}",
    "recursion": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "a wrong sum": "{{ 1 + 'a' }}",
    "no such key": "{{ messages[7].content }}",
    "a division": "{{ 1 // 0 }}",
    "not a template": "{% for",
    "an unknown filter": "{{ messages|nothing }}",
    "its own word": "{{ raise_exception('no') }}",
    "a way out": "{{ ''.__class__.__mro__[1].__subclasses__() }}"}


# Those that fail, or run away, while the template is compiled.
ALONE = ("not a template", "an unknown filter", "a power that no signal ends")


@pytest.fixture(scope="module")
def hostile(chat_folder, tmp_path_factory):
    """Makes workers for a template; half a second for each request."""
    made = []

    def make(template):
        folder = shutil.copytree(chat_folder, tmp_path_factory.mktemp("hostile") / "model")
        (folder / "chat_template.jinja").write_text(template)
        made.append(RequestWorkers(folder, 1, seconds=0.5, memory=256 * MIB))
        return made[-1]

    yield make
    for workers in made:
        workers.close()


@pytest.fixture(scope="module")
def one_template_for_all(hostile):
    """Workers whose template is the one that the system message names."""
    cases = "".join(f"{{% elif messages[0].content == {name!r} %}}{text}" for name, text in HOSTILE.items()
                    if name not in ALONE)
    return hostile(f"{{% if false %}}{cases}{{% else %}}fine{{% endif %}}")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_a_refusal_within_seconds_and_the_next_request_is_served(name, hostile, one_template_for_all):
    alone = name in ALONE
    workers = hostile(HOSTILE[name]) if alone else one_template_for_all
    body = json.dumps({"messages": [{"role": "user", "content": name}]}).encode()
    workers.prepare("completions", b'{"prompt":"x"}', LIMITS)  # it is there
    began = time.monotonic()
    with pytest.raises(BadRequest) as caught:
        workers.prepare("chat", body, LIMITS)
    assert time.monotonic() - began < seconds(40)
    assert caught.value.status == 400 and "\n" not in str(caught.value)
    assert workers.prepare("completions", b'{"prompt":"x"}', LIMITS)["prompts"]
    if not alone:
        assert workers.prepare("chat", CHAT, LIMITS)["prompts"]
    assert sum(p.memory_info().rss for p in processes(workers)) < 2048 * MIB


def test_killed_processes_cost_the_request_that_they_had_and_no_other(preparing):
    preparing.prepare("chat", CHAT, LIMITS)
    for victims in (processes(preparing)[1:], processes(preparing)):
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        psutil.wait_procs(victims, seconds(10))
        for _ in range(3):
            with contextlib.suppress(BadRequest):
                preparing.prepare("chat", CHAT, LIMITS)
        assert preparing.prepare("chat", CHAT, LIMITS)["prompts"]


def test_closing_leaves_no_process_and_fails_what_is_on_the_way(hostile):
    workers = hostile(HOSTILE["a loop that never ends"])
    workers.seconds = 0.2
    workers.prepare("completions", b'{"prompt":"x"}', LIMITS)
    found = processes(workers)
    future = workers.submit("chat", CHAT, LIMITS)
    workers.close()
    with pytest.raises(BadRequest):
        future.result(seconds(20))
    _, alive = psutil.wait_procs(found, seconds(20))
    assert not alive


def listed(item, count):
    return b'{"prompt":[' + b",".join([item] * count) + b"]}"


def amplifying(size):
    """Bodies of about `size` bytes whose values take many times as much, and the paths for which they are meant."""
    def message(part):
        return b'{"messages":[' + part + b"]}"

    def field(name, value):
        return b'{"prompt":"x","' + name + b'":' + value + b"}"

    return {
        "objects as prompts": ("/v1/completions", listed(b"{}", size // 3)),
        "lists as prompts": ("/v1/completions", listed(b"[]", size // 3)),
        "texts in lists": ("/v1/completions", listed(b'[""]', size // 5)),
        "empty prompts": ("/v1/completions", listed(b'""', size // 3)),
        "tokens": ("/v1/completions", listed(b"1", size // 2)),
        "tokens, the last one wrong": ("/v1/completions", listed(b"1", size // 2)[:-2] + b",-1]}"),
        "lists in lists": ("/v1/completions", b'{"prompt":' + b"[" * 900 + b"]" * 900 + b"}"),
        "messages": ("/v1/chat/completions", message(b",".join([b"{}"] * (size // 3)))),
        "parts": ("/v1/chat/completions", message(b'{"role":"user","content":[' + b",".join([b"{}"] * (size // 3)) + b"]}")),
        "right parts": ("/v1/chat/completions", message(b'{"role":"user","content":[' + b",".join(
            [b'{"type":"text","text":""}'] * (size // 26)) + b"]}")),
        "tools": ("/v1/chat/completions", b'{"messages":[],"tools":[' + b",".join([b"[]"] * (size // 3)) + b"]}"),
        "stops": ("/v1/completions", field(b"stop", b"[" + b",".join([b'""'] * (size // 3)) + b"]")),
        "biases": ("/v1/completions", field(b"logit_bias", b"{" + b",".join(b'"%d":1' % i for i in range(size // 11)) + b"}")),
        "unknown names": ("/v1/completions", b"{" + b",".join(b'"n%d":1' % i for i in range(size // 12)) + b"}"),
        "a number": ("/v1/completions", field(b"seed", b"9" * size)),
        "floats": ("/v1/completions", field(b"temperature", b"[" + b",".join([b"1e9"] * (size // 4)) + b"]")),
        "a text": ("/v1/completions", b'{"prompt":"' + b"a " * (size // 2) + b'"}'),
        "a template's variables": ("/v1/chat/completions", CHAT[:-1] + b',"chat_template_kwargs":{' + b",".join(
            b'"v%d":{}' % i for i in range(size // 13)) + b"}}"),
        "objects as tokens": ("/detokenize", b'{"tokens":[' + b",".join([b"{}"] * (size // 3)) + b"]}"),
        "tokens to text": ("/detokenize", b'{"tokens":[' + b",".join([b"300"] * (size // 4)) + b"]}")}


@pytest.fixture(scope="module")
def large_bodies(new_engine, tokenizer, preparing):
    from live_server import live_server

    with live_server(new_engine(), tokenizer, preparing) as server:
        yield server


@pytest.mark.parametrize("name", amplifying(64))
def test_a_body_of_the_largest_size_is_refused_while_everybody_else_is_served(name, large_bodies):
    path, body = amplifying(4 * MIB - 200)[name]
    assert len(body) <= 4 * MIB
    server, own, statuses, done = large_bodies, psutil.Process(), set(), threading.Event()
    memory = own.memory_info().rss
    clock = time.pthread_getcpuclockid(server.thread.ident)

    def knock():
        with httpx.Client(timeout=seconds(30)) as client:
            statuses.add(client.get(f"{server.url}/health").status_code)
            while not done.wait(0.1):
                statuses.add(client.get(f"{server.url}/health").status_code)

    knocking = threading.Thread(target=knock)
    knocking.start()
    began = time.clock_gettime(clock)
    try:
        answer = httpx.post(server.url + path, content=body, timeout=seconds(60),
                            headers={"Content-Type": "application/json"})
    finally:
        done.set()
        knocking.join()
    assert answer.status_code == 400 and len(answer.content) < 2000, answer.text[:500]
    assert statuses == {200}
    # Processor time of the event loop's thread, which no busy neighbour adds to. Read in the loop, these bodies took 3 to 80 s.
    assert time.clock_gettime(clock) - began < 2
    assert own.memory_info().rss - memory < 128 * MIB
    assert server.worker.in_flight == 0


def test_times_count_from_a_requests_arrival(serving, preparing, monkeypatch):
    live, right = serving(), preparing.prepare
    monkeypatch.setattr(preparing, "prepare", lambda *given: (time.sleep(0.4), right(*given))[1])
    answer = httpx.post(f"{live.url}/v1/chat/completions", headers={"content-type": "application/json"},
                        content=CHAT[:-1] + b',"max_tokens":2}', timeout=seconds(60)).json()
    assert answer["metrics"]["time_to_first_token_ms"] >= 400


def test_who_waited_for_the_workers_finds_one_with_its_tokenizer(chat_folder):
    with contextlib.closing(RequestWorkers(chat_folder, 1)) as fresh:
        fresh.wait(LIMITS)
        assert len(processes(fresh)) == 2
        assert fresh.prepare("chat", CHAT, LIMITS)["prompts"] and fresh.restarts == 0
