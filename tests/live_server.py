"""A server in a thread of this process, and what can be seen of it from outside and inside."""

import contextlib
import socket
import threading
import time
from dataclasses import dataclass

import httpx
import uvicorn
from pace import seconds as limit

from runtime_ref.engine.engine import Engine
from runtime_ref.server.app import application
from runtime_ref.server.connections import Server, limited
from runtime_ref.server.engine_thread import EngineWorker
from runtime_ref.server.handlers import Api, Settings
from runtime_ref.server.request_workers import RequestWorkers

MODEL = "small"
CONNECTIONS = limited(512)


def wait_until(condition, seconds: float = limit(45.0)) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so after {seconds} s"
        time.sleep(0.01)


class Hurry(threading.Event):
    """Until it is set, each step of an engine takes `seconds` more: time for something to happen during an answer."""

    def __init__(self, engine: Engine, monkeypatch, seconds: float = 0.1):
        super().__init__()
        right = engine.step
        monkeypatch.setattr(engine, "step", lambda: (self.wait(seconds), right())[1])


@dataclass
class Live:
    """A running server; `worker` is its engine's, for looking at what no client can see."""

    url: str
    worker: EngineWorker
    api: Api
    server: uvicorn.Server
    thread: threading.Thread

    def until_empty(self, seconds: float = limit(45.0)) -> dict[str, int]:
        """Waits until no request is in the engine; returns the pages that sequences still hold."""
        return self.until(lambda: not self.worker.in_flight and not self.worker.engine.busy, seconds)

    def until(self, condition, seconds: float = limit(45.0)) -> dict[str, int]:
        """Waits; returns the pages that sequences hold then."""
        wait_until(condition, seconds)
        text = httpx.get(f"{self.url}/metrics", timeout=limit(45)).text
        lines = [line for line in text.splitlines() if line.startswith("fp4_dflash:pages_held")]
        assert lines
        return {line.split('kind="')[1].split('"')[0]: int(line.rsplit(" ", 1)[1]) for line in lines}

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=limit(45)).text
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name + "{"))


@contextlib.contextmanager
def live_server(engine: Engine, tokenizer, preparing: RequestWorkers, *, max_requests: int = 64,
                stall_seconds: float = limit(180.0), drain_seconds: float = 1.0, connections: type = CONNECTIONS, **settings):
    """A running server; `preparing` are its request workers, which servers of a test session may share."""
    worker = EngineWorker(engine, max_requests=max_requests, stall_seconds=stall_seconds)
    api = Api(worker, tokenizer, Settings(**{"names": (MODEL,), **settings}), preparing)
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(application(api), http=connections, log_level="warning", lifespan="on")
    server = Server(config, drain_seconds=drain_seconds, cut=lambda: worker.cut("the server is shutting down"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield Live(f"http://127.0.0.1:{listening.getsockname()[1]}", worker, api, server, thread)
    server.should_exit = True
    thread.join(limit(20))
    assert not thread.is_alive()
