"""Servers in this process on the small exported folder, and what their answers must be."""

import contextlib
import shutil
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn

from modeling.load import load_tokenizer
from runtime_ref.api import Api, Settings
from runtime_ref.engine import Engine, EngineOptions
from runtime_ref.routes import application
from runtime_ref.worker import EngineWorker

ROOT = Path(__file__).resolve().parents[3]
MODEL = "small"


@dataclass
class Live:
    """A running server; `worker` is its engine's, for looking at what no client can see."""

    url: str
    worker: EngineWorker
    api: Api
    server: uvicorn.Server
    thread: threading.Thread

    def until_empty(self, seconds: float = 5.0) -> dict[str, int]:
        """Waits until no request is in the engine; returns the pages that sequences still hold."""
        return self.until(lambda: not self.worker.in_flight and not self.worker.engine.busy, seconds)

    def until(self, condition, seconds: float = 5.0) -> dict[str, int]:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not so after {seconds} s"
            time.sleep(0.01)
        text = httpx.get(f"{self.url}/metrics").text
        lines = [line for line in text.splitlines() if line.startswith("fp4_dflash:pages_held")]
        assert lines
        return {line.split('kind="')[1].split('"')[0]: int(line.rsplit(" ", 1)[1]) for line in lines}

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name + "{"))


@contextlib.contextmanager
def live_server(engine: Engine, tokenizer, *, max_requests: int = 64, stall_seconds: float = 180.0, **settings):
    worker = EngineWorker(engine, max_requests=max_requests, stall_seconds=stall_seconds)
    api = Api(worker, tokenizer, Settings(MODEL, **settings))
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(application(api), log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield Live(f"http://127.0.0.1:{listening.getsockname()[1]}", worker, api, server, thread)
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def chat_folder(folder, tmp_path_factory) -> Path:
    """The small folder with the chat template of the embedded model."""
    out = tmp_path_factory.mktemp("chat") / MODEL
    shutil.copytree(folder, out)
    shutil.copy(ROOT / "recipes" / "seed" / "model" / "chat_template.jinja", out)
    return out


@pytest.fixture(scope="session")
def tokenizer(chat_folder):
    return load_tokenizer(chat_folder)


@pytest.fixture(scope="session")
def new_engine(chat_folder, tokenizer):
    def make(*, drafter: bool = True, **options):
        return Engine.from_folder(chat_folder, drafter=drafter, tokenizer=tokenizer,
                                  options=EngineOptions(**{"max_context": 256, **options}))

    return make


@pytest.fixture(scope="session")
def alone(new_engine):
    """Generates one answer at a time, without drafts: what every other way of asking has to equal."""
    engine = new_engine(drafter=False)

    def generate(prompt, params):
        return engine.generate([prompt], params)[0]

    return generate


@pytest.fixture(scope="session")
def live(new_engine, tokenizer):
    with live_server(new_engine(), tokenizer, body_bytes=200_000) as server:
        yield server


@pytest.fixture
def serving(new_engine, tokenizer):
    """Starts a server of its own for a test that breaks it."""
    with contextlib.ExitStack() as stack:
        def start(engine=None, **settings):
            options = {k: settings.pop(k) for k in list(settings) if k in EngineOptions.__dataclass_fields__}
            return stack.enter_context(live_server(engine or new_engine(**options), tokenizer, **settings))

        yield start


@pytest.fixture(scope="session")
def client(live):
    import openai

    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=60)
