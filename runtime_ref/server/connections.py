"""Connections with limits: how many, how long one may say nothing, how long one may refuse to read; and an end within a limit.

uvicorn closes connections that are idle between two requests. What is added here: those that never send a first request, or
send it byte by byte, those that ask and do not read the answer, and a bound on their number that lies well below the limit of
descriptors (beyond that, accepting fails in a loop, with a line in the log for each try). What is on the way when the server
is told to end gets the drain time; then answers end with an error, and whatever still does not read is cut off.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from storage.terminal import counted

HEAD_SECONDS = 15.0  # from the connection's start, or the last answer, until a request's head is complete
WRITE_SECONDS = 60.0  # without a byte being taken
DESCRIPTORS_KEPT = 64  # for files, pipes and the other ranks
LAST_SECONDS = 1.0  # for error events, after the drain time
_FULL = b'{"error":{"message":"too many connections","type":"server_error","param":null,"code":"too_many_connections"}}'
FULL = (b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(_FULL), _FULL))


class Connection(H11Protocol):
    """A connection; the class attributes are its limits."""

    most = 512
    head_seconds, write_seconds = HEAD_SECONDS, WRITE_SECONDS
    refused = 0

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._writing: asyncio.TimerHandle | None = None
        self._head: asyncio.TimerHandle | None = None
        if len(self.connections) > self.most:
            type(self).refused += 1
            transport.write(FULL)
            transport.close()
            return
        self._expect_head()

    def connection_lost(self, error: Exception | None) -> None:
        self._done(self._head)
        self._done(self._writing)
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():  # what was refused may still be sending
            super().data_received(data)

    def on_response_complete(self) -> None:
        self._expect_head()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self.loop.call_later(self.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._done(self._writing)

    def _expect_head(self) -> None:
        self._done(self._head)
        self._head = self.loop.call_later(self.head_seconds, self._no_head)

    def _no_head(self) -> None:
        if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
            self.transport.close()

    def _done(self, timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()


def limited(most: int, *, head_seconds: float = HEAD_SECONDS, write_seconds: float = WRITE_SECONDS) -> type[Connection]:
    """A protocol class with limits of its own."""
    return type("Connection", (Connection,), {"most": most, "head_seconds": head_seconds, "write_seconds": write_seconds,
                                              "refused": 0})


def possible_connections(requested: int) -> int:
    """So many as the limit of descriptors allows, which is raised as far as it may be.

    Raises:
        ValueError: fewer than requested.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = requested + DESCRIPTORS_KEPT
    if soft != resource.RLIM_INFINITY and soft < needed:
        able = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (able, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if soft < needed:
            raise ValueError(f"--max-connections {requested}: this process may open {soft} files, expected at least {needed} "
                             f"(ulimit -n), or at most {max(0, soft - DESCRIPTORS_KEPT)} connections")
    return requested


class Server(uvicorn.Server):
    """uvicorn's server, with an end that takes no longer than it may.

    Args:
        drain_seconds: for answers that are under way when the end is asked for.
        cut: called when they are over: ends all open answers with an error.
    """

    def __init__(self, config: uvicorn.Config, *, drain_seconds: float, cut: Callable[[], None]):
        super().__init__(config)
        self.drain_seconds, self.cut = drain_seconds, cut

    async def shutdown(self, sockets=None) -> None:
        end = time.monotonic() + self.drain_seconds
        for server in self.servers:
            server.close()
        for listening in sockets or []:
            listening.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        if not await self._empty(end):
            count = len(self.server_state.tasks)
            print(f"{counted(count, 'answer')} not finished after {self.drain_seconds:g} s", file=sys.stderr, flush=True)
            self.cut()
            await self._empty(time.monotonic() + LAST_SECONDS)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        if not await self._empty(time.monotonic() + LAST_SECONDS):
            for task in self.server_state.tasks:
                task.cancel()
        await self.lifespan.shutdown()

    async def _empty(self, until: float) -> bool:
        """Waits for connections and requests to end; whether they did."""
        while self.server_state.connections or self.server_state.tasks:
            if time.monotonic() >= until or self.force_exit:
                return False
            await asyncio.sleep(0.05)
        return True
