"""The command itself: its exit codes, its end on SIGTERM, and several ranks."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from pace import paced, seconds

from runtime_ref.core.sampling_params import SamplingParams
from tests.runtime_ref.conftest import BACKEND

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = str(ROOT / "runtime_ref" / "serve.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
ON_BACKEND = [word for name, value in BACKEND.items() for word in (f"--{name}", value)]
UNHURRIED = paced([], ["--fixed-drafts", "--drain-seconds", "3600"])  # a step of the plain interpreter takes five seconds
LENGTH = paced(200, 12)
LONG = {"prompt": [5, 6, 7], "max_tokens": LENGTH, "ignore_eos": True, "temperature": 0, "return_token_ids": True}


def start(folder, *more, launcher=()):
    """A serving process and its address."""
    command = [sys.executable, *launcher, SCRIPT, str(folder), "--port", "0", "--max-context", "256", "--quiet", *ON_BACKEND,
               *UNHURRIED, *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    for line in process.stdout:
        if line.startswith("serving "):
            url = line.split(" on ")[1].split()[0]
            while True:
                try:
                    httpx.get(f"{url}/health", timeout=seconds(30))
                    return process, url
                except httpx.TransportError:
                    assert process.poll() is None
                    time.sleep(0.05)
    raise AssertionError(process.communicate()[1][-2000:])


def tokens_of(lines):
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert all("error" not in event for event in events), events[-1]
    return [t for event in events for t in event["choices"][0]["token_ids"]]


def test_sigterm_finishes_the_answers_under_way_and_then_exits_with_0(chat_folder, alone):
    process, url = start(chat_folder)
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "stream": True}, timeout=seconds(60)) as answer:
            lines = answer.iter_lines()
            seen = [next(lines)]
            process.send_signal(signal.SIGTERM)
            seen += list(lines)
        assert seen[-2] == "data: [DONE]" or seen[-1] == "data: [DONE]"
        assert tokens_of(seen) == alone(LONG["prompt"], SamplingParams(max_tokens=LENGTH, ignore_eos=True))
        assert process.wait(seconds(30)) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health", timeout=seconds(30))
    finally:
        process.kill()
        process.communicate()


def test_mistakes_exit_with_2_and_one_line(tmp_path, chat_folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        wrong = [([str(tmp_path / "none")], "no such folder"), ([str(chat_folder), "--port", port], port),
                 ([str(chat_folder), "--port", "70000"], "--port: 70000"),
                 ([str(chat_folder), "--max-context", "0"], "--max-context"),
                 ([str(chat_folder), "--api-key", ""], "--api-key: empty"),
                 ([str(chat_folder), "--allow-origin", "ui.example"], "expected scheme://name")]
        for arguments, said in wrong:
            done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=ENVIRONMENT)
            assert done.returncode == 2, done.stderr
            assert said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_help_needs_neither_torch_nor_a_web_framework():
    code = ("import runpy, sys; sys.argv = [sys.argv[1], '--help']\n"
            "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "finally: print(sorted({'torch', 'transformers', 'fastapi', 'uvicorn'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code, SCRIPT], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0 and "CHECKPOINT_DIR" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def outcome(client, url):
    """Status of a long request."""
    return client.post(f"{url}/v1/completions", json=LONG).status_code


def torchrun(count):
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count))


@pytest.mark.load
@pytest.mark.skipif(os.environ.get("FP4_LOAD") != "1", reason="minutes of load: make test-load")
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_answer_as_one_and_a_killed_one_fails_all_requests_within_seconds(chat_folder, alone, ranks):
    import psutil

    process, url = start(chat_folder, launcher=torchrun(ranks))
    try:
        whole = httpx.post(f"{url}/v1/completions", json=LONG, timeout=120).json()["choices"][0]["token_ids"]
        assert whole == alone(LONG["prompt"], SamplingParams(max_tokens=LENGTH, ignore_eos=True))
        workers = [c for c in psutil.Process(process.pid).children(recursive=True) if SCRIPT in " ".join(c.cmdline())]
        victim = next(w for w in workers if w.environ()["RANK"] == str(ranks - 1))
        killed, said, others, client = None, [], [], httpx.Client(timeout=60)  # made once: that takes longer than a request
        threads = [threading.Thread(target=lambda: others.append(outcome(client, url))) for _ in range(6)]
        with httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "stream": True}, timeout=seconds(60)) as answer:
            for line in answer.iter_lines():
                if killed is None:
                    for thread in threads:
                        thread.start()
                    time.sleep(0.2)
                    victim.kill()
                    killed = time.monotonic()
                said.append(line)
        for thread in threads:
            thread.join(60)
        assert time.monotonic() - killed < 30
        assert others == [503] * 6
        assert any('"code":"engine_down"' in line and "ended or does not answer" in line for line in said)
        assert process.wait(60) != 0
        assert "another of the" in process.stderr.read()
    finally:
        process.kill()
        process.communicate()
