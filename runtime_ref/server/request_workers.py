"""Requests are prepared in processes of their own: JSON, validation, chat template, tokens.

All of that is work on bytes that a client chose, by a template that a checkpoint's author chose. In the server's process it
would hold up every stream of every client, through the event loop or through the interpreter's lock, and nothing can end a
thread that loops. So a few processes do it, each with one request at a time, a limit of processor time and of memory, and are
killed when they exceed it. They hold no weights. What they answer is JSON: nothing of theirs is unpickled.

One process (the nursery) loads the tokenizer and forks the workers, so that a new one is there in milliseconds. It gets one end
of a socket pair for each; the other end is the worker's only tie to the server. Workers that a template runs away with first
get an exception (SIGPROF, after `SECONDS` of processor time); if they are in C code that does not look, the kernel ends them
(SIGVTALRM, after twice as long), and a wall clock ends what sleeps.

Rejected: threads (cannot be ended, share the lock), limits inside the template's sandbox (a filter can loop in C).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path

from runtime_ref.server.openai_requests import BadRequest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 5.0  # processor time of one request
WALL_SECONDS = 60.0  # the same on a machine that is busy with something else
MEMORY = 1 << 30  # bytes beyond what a worker has when it begins
START_SECONDS = 120.0  # the first one waits for the tokenizer
TOO_LONG = "took too long or too much memory to prepare (the chat template, or what it was given)"


@dataclass(frozen=True)
class Limits:
    """What a request is checked against.

    Attributes:
        context: tokens of prompt and answer. vocabulary: tokens of the model. max_requests: answers in one request.
        defaults: sampling defaults of the checkpoint; adaptive: drafts by what was accepted, unless a request says otherwise.
        unknown: fields that nobody knows are tolerated.
    """

    context: int
    vocabulary: int
    max_requests: int
    defaults: dict[str, float] = field(default_factory=dict)
    adaptive: bool = True
    unknown: bool = False


class RequestWorkers:
    """The processes, from the server's side. Any thread may call `prepare`; it blocks, so event loops use `submit`.

    Args:
        folder: of the checkpoint, whose tokenizer they load.
        count: workers, and so requests that are prepared at once.
    """

    def __init__(self, folder: str | Path, count: int = 2, *, seconds: float = SECONDS, memory: int = MEMORY):
        self.folder, self.seconds, self.memory = Path(folder), seconds, memory
        self.restarts = 0  # workers that had to be replaced
        self._threads = concurrent.futures.ThreadPoolExecutor(count, "prepare", initializer=self._begin)
        self._own = threading.local()
        self._lock = threading.Lock()
        self._nursery: tuple[subprocess.Popen, socket.socket] | None = None
        self._open: set[socket.socket] = set()
        self._closed = False

    def submit(self, kind: str, body: bytes, limits: Limits) -> concurrent.futures.Future:
        """`prepare` on one of the threads."""
        return self._threads.submit(self.prepare, kind, body, limits)

    def prepare(self, kind: str, body: bytes, limits: Limits) -> dict:
        """What `Preparation.prepare` answers to a body.

        Raises:
            BadRequest: also when the worker had to be killed.
        """
        worker = self._worker()
        try:
            _send(worker, json.dumps({"kind": kind, **asdict(limits)}).encode(), body)
            reply, _ = _receive(worker)
        except (OSError, EOFError):
            self._forget(worker)
            if self._closed:
                raise BadRequest("the server is shutting down", status=503, code="shutting_down") from None
            self.restarts += 1
            raise BadRequest(f"body: {TOO_LONG}", code="preparation_failed") from None
        found = json.loads(reply)
        if "error" in found:
            raise BadRequest(found["error"], param=found["param"], code=found["code"], status=found["status"])
        return found

    def start(self) -> None:
        """Begins to load the tokenizer now and not with the first request."""
        with self._lock:
            self._alive()

    def wait(self, limits: Limits) -> None:
        """Until a first request would be prepared at once."""
        self.submit("tokenize", b"{}", limits).exception()

    def close(self) -> None:
        """Ends all of it; requests on the way fail."""
        with self._lock:
            self._closed = True
            for worker in self._open:
                with contextlib.suppress(OSError):
                    worker.shutdown(socket.SHUT_RDWR)
            if self._nursery is not None:
                process, control = self._nursery
                control.close()
                process.kill()
                process.wait()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _begin(self) -> None:
        self._own.socket = None

    def _worker(self) -> socket.socket:
        """This thread's worker; a new one if there is none, or if the last one has ended."""
        found = getattr(self._own, "socket", None)
        if found is not None and not _ended(found):
            return found
        if found is not None:
            self._forget(found)
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            if self._closed:
                raise BadRequest("the server is shutting down", status=503, code="shutting_down")
            control = self._alive()
            socket.send_fds(control, [b"+"], [theirs.fileno()])
            self._open.add(ours)
        ours.settimeout(START_SECONDS)
        try:
            _receive(ours)  # it is there
        except (OSError, EOFError):
            self._forget(ours)
            raise BadRequest("the tokenizer's process does not start; the server's log says why", status=503,
                             code="preparation_failed") from None
        ours.settimeout(max(WALL_SECONDS, 4 * self.seconds))
        self._own.socket = ours
        return ours

    def _forget(self, worker: socket.socket) -> None:
        self._own.socket = None
        with self._lock:
            self._open.discard(worker)
        worker.close()  # a worker that still computes is ended by its own timers, and then by the end of its socket

    def _alive(self) -> socket.socket:
        """The nursery's control socket; starts it if need be."""
        if self._nursery is None or self._nursery[0].poll() is not None:
            ours, theirs = socket.socketpair()
            command = [sys.executable, "-c", f"import sys; sys.path[0] = {str(ROOT)!r}\n"
                       "from runtime_ref.server.request_workers import nursery; nursery(*sys.argv[1:])",
                       str(theirs.fileno()), str(self.folder), str(self.seconds), str(self.memory)]
            # What glibc is told to keep at hand (MALLOC_TOP_PAD_) would be memory beyond the workers' limit.
            environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
            with theirs:
                process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                                           stdout=subprocess.DEVNULL, env=environment)
            self._nursery = (process, ours)
        return self._nursery[1]


def _ended(worker: socket.socket) -> bool:
    """Whether the other end is closed; a worker says nothing unasked."""
    return bool(select.select([worker], [], [], 0)[0])


def _send(to: socket.socket, head: bytes, body: bytes = b"") -> None:
    to.sendall(struct.pack("<II", len(head), len(body)) + head)
    if body:
        to.sendall(body)


def _receive(source: socket.socket) -> tuple[bytes, bytes]:
    """Head and body of one message.

    Raises:
        EOFError: the other end is closed.
    """
    head, body = struct.unpack("<II", _exactly(source, 8))
    return bytes(_exactly(source, head)), bytes(_exactly(source, body))


def _exactly(source: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view, got = memoryview(data), 0
    while got < count:
        n = source.recv_into(view[got:])
        if n == 0:
            raise EOFError
        got += n
    return data


def nursery(control: str, folder: str, seconds: str, memory: str) -> None:
    """The process that forks workers, one for each socket that it is sent, until the server closes its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group: the server says when to end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from checkpoint.load import load_tokenizer
    from runtime_ref.server.preparation import Preparation

    preparation = Preparation(load_tokenizer(folder))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # workers that end need nobody to wait for them
    with socket.socket(fileno=int(control)) as orders:
        while True:
            data, found, _, _ = socket.recv_fds(orders, 1, 1)
            if not data:
                return
            if os.fork() == 0:
                orders.close()
                with socket.socket(fileno=found[0]) as server:
                    work(server, preparation, float(seconds), int(memory))
                os._exit(0)
            os.close(found[0])


class _TookTooLong(BaseException):
    """Raised by the timer in whatever runs; not an Exception, so that no handler on the way swallows it."""


def work(server: socket.socket, preparation, seconds: float, memory: int) -> None:
    """A worker's life: one request after the other, until the server closes its end or a limit ends the process."""
    import resource

    def too_long(*_) -> None:
        raise _TookTooLong

    if sys.platform == "linux":
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + memory, held + memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, too_long)
    signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
    _send(server, b"")
    while True:
        try:
            head, body = _receive(server)
        except (EOFError, OSError):
            return
        try:
            try:
                signal.setitimer(signal.ITIMER_PROF, seconds)
                signal.setitimer(signal.ITIMER_VIRTUAL, 2 * seconds)
                order = json.loads(head)
                kind = order.pop("kind")
                reply = json.dumps(preparation.prepare(kind, body, Limits(**order)))
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        except BadRequest as error:
            reply = json.dumps({"error": str(error), "param": error.param, "code": error.code, "status": error.status})
        except (_TookTooLong, MemoryError):
            return  # whatever was half done goes with the process
        with contextlib.suppress(OSError):
            _send(server, reply.encode())
