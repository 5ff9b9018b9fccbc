"""Thousands of random requests on sockets: no 5xx but the promised ones, no wait, no growth, and the others notice nothing.

`make test-load`; FP4_TEST_REQUESTS (3000) says how many, FP4_TEST_SEED which, `pytest -s` shows the counts.
"""

import json
import os
import random
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.runtime_ref.conftest import seed_folder
from tests.runtime_ref.server.random_requests import Case, case, parts, send
from tests.runtime_ref.server.test_process import start

REQUESTS, SEED = int(os.environ.get("FP4_TEST_REQUESTS", "3000")), int(os.environ.get("FP4_TEST_SEED", "0"))
CLIENTS, PATIENCE = 12, 120.0
PROMISED = {"bodies_too_large", "too_many_connections", "shutting_down", "preparation_failed", "body_timeout"}
STEADY = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 12, "return_token_ids": True}
pytestmark = [pytest.mark.load, pytest.mark.skipif(os.environ.get("FP4_LOAD") != "1", reason="minutes of load: make test-load")]


class Steady(threading.Thread):
    """A well-behaved client, four times a second."""

    def __init__(self, url: str):
        super().__init__(daemon=True)
        self.client, self.url, self.done = httpx.Client(timeout=PATIENCE), url, threading.Event()
        self.expected, self.took, self.wrong = self.ask(), [], []

    def ask(self):
        answer = self.client.post(f"{self.url}/v1/completions", json=STEADY)
        return answer.status_code, answer.status_code == 200 and answer.json()["choices"][0]["token_ids"]

    def run(self):
        while not self.done.wait(0.25):
            began = time.monotonic()
            found = self.ask()
            self.took.append(time.monotonic() - began)
            if found != self.expected and found[0] != 429:
                self.wrong.append(found)


def judge(sent: Case, answer: bytes) -> str:
    """One word for an answer; "WRONG: ..." if it must not be."""
    if not answer:
        return "closed" if sent.json is None else f"WRONG: no answer to {sent.json}"
    if not answer.startswith(b"HTTP/1."):
        return f"WRONG: {answer[:200]!r}"
    status = int(answer.split(b" ", 2)[1])
    if status >= 500 and not any(code.encode() in answer for code in PROMISED) and status != 501:
        return f"WRONG: {status} {answer[-300:]!r} for {sent.json or sent.pieces[0][:300]!r}"
    if b"Traceback" in answer:
        return f"WRONG: a traceback {answer[-300:]!r}"
    if sent.json is not None:
        status, body = parts(answer)
        if status >= 400:
            error = json.loads(body)["error"]
            if not error["message"] or "\n" in error["message"]:
                return f"WRONG: {error}"
    return str(status)


def text_of(path: str, status: int, body: bytes) -> list | None:
    """Texts, ends and tokens of an answer's choices, streamed or not."""
    chat, found = "chat" in path, {}
    if status != 200:
        return None
    events = ([json.loads(line[6:]) for line in body.decode().splitlines() if line.startswith("data: {")]
              if body.startswith(b"data:") else [json.loads(body)])
    for event in events:
        if "error" in event:
            return None
        for choice in event["choices"]:
            said = choice.get("delta") or choice.get("message") or {} if chat else choice
            piece = (said.get("content") if chat else said.get("text")) or ""
            calls = [(c.get("index", i), c["function"].get("arguments", "")) for i,
                c in enumerate(said.get("tool_calls") or [])]
            kept = found.setdefault(choice["index"], ["", {}, None])
            kept[0] += piece
            for index, arguments in calls:
                kept[1][index] = kept[1].get(index, "") + arguments
            kept[2] = choice.get("finish_reason") or kept[2]
    return sorted(found.items())


def test_thousands_of_random_requests_leave_the_server_as_it_was(tmp_path):
    folder = seed_folder(tmp_path / "small")
    template = Path(__file__).resolve().parents[3] / "recipes" / "seed" / "model" / "chat_template.jinja"
    shutil.copy(template, folder)
    process, url = start(folder, "--served-name", "small", "--max-requests", "48")
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stderr), daemon=True)
    reader.start()
    host, port = url.removeprefix("http://").split(":")
    own, counts, wrong = psutil.Process(process.pid), Counter(), []
    steady = Steady(url)
    rng = random.Random(SEED)

    def one(seed: int) -> str:
        sent = case(random.Random(seed))
        try:
            answer = send((host, int(port)), sent, PATIENCE)
        except TimeoutError:
            return f"WRONG: no end after {PATIENCE:g} s: {sent.json or sent.pieces[0][:300]!r}"
        verdict = judge(sent, answer)
        if sent.json is not None and verdict == "200" and random.Random(seed).random() < 0.5:
            path, value = sent.json
            if "seed" in value and value.get("stream") is not None or value.get("temperature") == 0:
                value = value | {"stream": not value.get("stream")}
                value.pop("stream_options", None)
                data = json.dumps(value).encode()
                again = httpx.post(url + path, content=data, headers={"Content-Type": "application/json"}, timeout=PATIENCE)
                first, other = text_of(path, *parts(answer)), text_of(path, again.status_code, again.content)
                if first is not None and other is not None and first != other:
                    return f"WRONG: {first} and, streamed the other way, {other} for {sent.json}"
        return verdict

    try:
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(one, [rng.randrange(2**60) for _ in range(REQUESTS // 10)]))  # what is made once
            time.sleep(2)
            memory, files = own.memory_info().rss, own.num_fds()
            steady.start()
            for verdict in pool.map(one, [rng.randrange(2**60) for _ in range(REQUESTS)]):
                counts[verdict.split(":")[0]] += 1
                if verdict.startswith("WRONG"):
                    wrong.append(verdict)
        steady.done.set()
        steady.join(PATIENCE)
        end = time.monotonic() + 60
        while time.monotonic() < end and (own.num_fds() > files + 2 or _held(url)):
            time.sleep(0.5)
        grown, left = own.memory_info().rss - memory, own.num_fds() - files
        took = sorted(steady.took)
        print(f"\n{REQUESTS} random requests: {dict(counts)}; memory {grown / 2**20:+.0f} MiB, descriptors {left:+d}; a steady "
              f"client: {len(took)} answers, median {took[len(took) // 2]:.2f} s, worst {took[-1]:.2f} s")
        assert not wrong, "\n".join(wrong[:20])
        assert not steady.wrong and took[-1] < 30
        assert grown < 200 * 2**20 and left <= 4 and not _held(url)
        assert httpx.get(f"{url}/health", timeout=PATIENCE).status_code == 200 and steady.ask() == steady.expected
    finally:
        process.terminate()
        process.wait(PATIENCE)
    reader.join(10)
    assert "Traceback" not in "".join(said), "".join(said)[-3000:]


def _held(url: str) -> bool:
    """Whether sequences still hold pages."""
    lines = httpx.get(f"{url}/metrics", timeout=PATIENCE).text.splitlines()
    return any(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("fp4_dflash:pages_held"))
