"""Connections that say nothing, too many of them, and clients that do not read: none of them holds anything for long."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from live_server import wait_until
from pace import seconds

from runtime_ref.server.connections import limited, possible_connections
from tests.runtime_ref.server.test_process import ENVIRONMENT, SCRIPT, start

UNASKED = 12  # seconds; without limits of their own the server waits for a head for 15
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


def connect(url, **options):
    host, port = url.removeprefix("http://").split(":")
    found = socket.socket()
    if "buffer" in options:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, options["buffer"])
    found.connect((host, int(port)))
    found.settimeout(seconds(10))
    return found


def closes(raw):
    """Whether the server closes while we wait."""
    with contextlib.suppress(ConnectionResetError):
        while raw.recv(65536):
            pass
    return True


def test_a_connection_that_never_asks_is_closed(serving):
    server = serving(connections=limited(64, head_seconds=0.3))
    began = time.monotonic()
    with connect(server.url) as silent, connect(server.url) as half:
        half.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
        assert closes(silent) and closes(half)
    assert time.monotonic() - began < UNASKED


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"], ids=["at once", "after one"])
def test_a_head_that_drips_in_is_not_waited_for_for_ever(serving, before):
    server = serving(connections=limited(64, head_seconds=0.5))
    with connect(server.url) as slow:
        slow.sendall(before)
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - began < UNASKED:
                slow.sendall(b"G" if not before else b"x")
                time.sleep(0.05)
        assert time.monotonic() - began < UNASKED


def test_a_long_answer_is_no_silence(serving, monkeypatch):
    server = serving(connections=limited(64, head_seconds=1.5))  # the client may be slow to say its head
    right = server.worker.engine.step
    monkeypatch.setattr(server.worker.engine, "step", lambda: time.sleep(0.25) or right())
    answer = httpx.post(f"{server.url}/v1/completions", timeout=seconds(30), json={
        "prompt": [5], "max_tokens": 8, "ignore_eos": True, "speculate": False})
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 8


def test_more_connections_than_allowed_are_told_so_and_the_others_stay(serving):
    server = serving(connections=limited(4))
    with contextlib.ExitStack() as stack:
        kept = [stack.enter_context(connect(server.url)) for _ in range(4)]
        wait_until(lambda: len(server.server.server_state.connections) == 4)
        for _ in range(40):
            with connect(server.url) as more:
                assert b" 503 " in more.recv(200)
        kept[0].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b" 200 " in kept[0].recv(200)
    wait_until(lambda: not server.server.server_state.connections)
    assert httpx.get(f"{server.url}/health", timeout=seconds(30)).status_code == 200


def test_a_client_that_does_not_read_is_cut_off(serving):
    server = serving(connections=limited(64, write_seconds=0.5))
    body = json.dumps({"prompt": "ab " * 400_000, "return_token_strs": True}).encode()  # an answer beyond the kernel's buffers
    with connect(server.url, buffer=4096) as deaf:
        deaf.sendall(HEAD.replace(b"/v1/completions", b"/tokenize") % len(body) + body)
        wait_until(lambda: server.server.server_state.connections)
        wait_until(lambda: not server.server.server_state.connections, seconds(30))
        wait_until(lambda: not server.server.server_state.tasks, seconds(30))


def test_bodies_that_never_end_share_one_limit_of_memory(serving):
    server = serving(bodies_bytes=310_000, body_seconds=seconds(20))
    ask = {"prompt": "x", "max_tokens": 1}
    with contextlib.ExitStack() as stack:
        begun = [stack.enter_context(connect(server.url)) for _ in range(8)]
        for raw in begun:
            with contextlib.suppress(ConnectionError):
                raw.sendall(HEAD % 200_000 + b" " * 60_000)
        wait_until(lambda: server.api._arriving > 200_000)
        time.sleep(0.3)  # for more to arrive than may
        assert server.api._arriving <= 310_000
        full = httpx.post(f"{server.url}/v1/completions", timeout=seconds(30), headers={"Content-Type": "application/json"},
                          content=b" " * 120_000 + json.dumps(ask).encode())
        assert full.status_code == 503 and full.json()["error"]["code"] == "bodies_too_large"
        assert httpx.post(f"{server.url}/v1/completions", json=ask, timeout=seconds(30)).status_code == 200
    wait_until(lambda: server.api._arriving == 0)
    assert httpx.post(f"{server.url}/v1/completions", json=ask, timeout=seconds(30)).status_code == 200


def test_the_number_of_connections_fits_the_descriptors(chat_folder):
    assert possible_connections(8) == 8
    done = subprocess.run(["bash", "-c", f"ulimit -n 200; exec {sys.executable} {SCRIPT} {chat_folder} --port 0"],
                          capture_output=True, text=True, env=ENVIRONMENT, timeout=seconds(120))
    assert done.returncode == 2 and "--max-connections 512" in done.stderr.splitlines()[-1], done.stderr
    assert "at most 136" in done.stderr and "Traceback" not in done.stderr


def test_sigterm_ends_within_the_drain_time_whatever_clients_do(chat_folder):
    """Streams that nobody reads, half a body, and connections that say nothing."""
    process, url = start(chat_folder, "--drain-seconds", "1")
    body = json.dumps({"prompt": [5], "max_tokens": 250, "ignore_eos": True, "stream": True, "logprobs": 20,
                       "return_token_ids": True, "n": 8}).encode()
    try:
        with contextlib.ExitStack() as stack:
            for i in range(12):
                raw = stack.enter_context(connect(url, buffer=4096))
                raw.sendall(HEAD % len(body) + body[:[len(body), 9, 0][i % 3]] if i % 3 < 2 else b"")
            time.sleep(0.5)  # for the streams to begin; whatever is not there yet is one case more
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert process.wait(seconds(30)) == 0
            assert time.monotonic() - began < 25  # 30 s unless --drain-seconds says otherwise
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


def test_a_step_that_hangs_does_not_hold_up_the_end(serving, monkeypatch):
    server = serving(drain_seconds=0.5)
    release = threading.Event()
    monkeypatch.setattr(server.worker.engine, "step", lambda: release.wait(seconds(60)) and [])
    said = {}
    asking = threading.Thread(target=lambda: said.update(found=httpx.post(
        f"{server.url}/v1/completions", json={"prompt": "x"}, timeout=seconds(60))))
    asking.start()
    wait_until(lambda: server.worker._step_began is not None)
    server.server.should_exit = True
    server.thread.join(seconds(30))
    try:
        assert not server.thread.is_alive()
        assert not server.worker.stopped
        asking.join(seconds(10))
        assert said["found"].status_code == 503 and "shutting down" in said["found"].text
    finally:
        release.set()


def test_an_event_loop_that_answers_nobody_is_found_from_outside(serving, monkeypatch, capfd):
    from runtime_ref.server import engine_thread

    where, found = engine_thread._where, threading.Event()
    monkeypatch.setattr(engine_thread, "LOOP_SECONDS", 0.3)
    monkeypatch.setattr(engine_thread, "WATCH_SECONDS", 0.05)
    monkeypatch.setattr(engine_thread, "_where", lambda thread: (where(thread), found.set())[0])
    server = serving()
    monkeypatch.setattr(server.worker, "check", lambda: found.clear() or found.wait(seconds(20)))
    assert httpx.get(f"{server.url}/health", timeout=seconds(30)).status_code == 200
    said = []

    def told():
        said.append(capfd.readouterr().err)
        return "found.wait(" in "".join(said)

    wait_until(told)
    assert "the event loop has answered nobody for" in "".join(said)
