"""The engine in a thread of its own, beside the event loop that talks to clients.

The engine computes step after step and never waits for a client; the event loop never computes. Commands (add, abort, stop)
go one way, and are applied between two steps; outputs go the other way.

Outputs stay pending until the engine has computed for a while, longer the more requests are open: an event for each token of
a small model costs the event loop (and through the interpreter's lock the engine) more than a tenth of the token, and nobody
reads faster. The CPU time of the engine's thread is counted, not wall time: on a busy machine a step takes long without
computing more. No output is pending for longer than a quarter of a second. First tokens and ends are flushed at once, and so is
everything when the engine has nothing to do or a step computes for longer.

With several ranks, rank 0's commands are broadcast before each step, so that all ranks make the same calls in the same order
(`follower_loop` is the loop of the others). While there is nothing to do, an empty broadcast every few seconds finds dead
ranks.

If the thread ends for any reason but `stop`, or a step takes longer than `stall_seconds`, the worker is down: all open
requests fail at once, and so does every later one. It is not restarted: what made it fail is not known to be gone.

Whatever is work on a client's bytes (JSON, validation, templates, tokens) is done in processes of its own (`request_workers`);
what is left beside the engine are small events, which fit into the time that its operations leave the interpreter free.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from runtime_ref.core.sampling_params import SamplingParams
from runtime_ref.core.tensor_parallel import SINGLE_RANK, RankLost, Ranks
from runtime_ref.engine.engine import Engine
from runtime_ref.engine.sequence import Output
from storage.terminal import counted

HEARTBEAT_SECONDS = 5.0
# A step of a large model on a CPU takes seconds; nothing sound takes minutes.
STALL_SECONDS = 180.0
# How often the watch looks, and after how long it speaks of an event loop that does not answer.
WATCH_SECONDS, LOOP_SECONDS = 0.5, 5.0
STOP_SECONDS = 5.0  # for the step that the engine is in when the server ends
# CPU time of the engine between two flushes, at least, and for each open request: an event costs 0.1 to 0.4 ms of it.
FLUSH_SECONDS, FLUSH_SECONDS_PER_REQUEST = 0.02, 0.0025
# However little it computes, on a machine that is busy with something else: a reader still sees four updates a second.
LONGEST_PENDING_SECONDS = 0.25


def due(waited: float, computed: float, requests: int) -> bool:
    """Whether pending outputs are flushed: seconds since they last were, the engine's CPU seconds since, open requests."""
    return waited >= LONGEST_PENDING_SECONDS or computed >= max(FLUSH_SECONDS, FLUSH_SECONDS_PER_REQUEST * requests)


class Refused(ValueError):
    """The engine does not take the request (too long for the cache, ...)."""


class Busy(RuntimeError):
    """As many requests as may wait are waiting."""


class EngineDown(RuntimeError):
    """The engine has ended; the message says why."""


@dataclass(frozen=True)
class Command:
    """What all ranks do between two steps: `add` a request's sequences, `abort` a request, or `stop`."""

    name: str
    handle: int = -1
    prompts: tuple[tuple[int, ...], ...] = ()
    params: tuple[SamplingParams, ...] = ()


@dataclass(slots=True)
class StepOutput:
    """One step's output for one choice of a request; `at` is time.monotonic() at the end of the step."""

    choice: int
    output: Output
    at: float


class RequestTable:
    """Requests and the engine's ids of their sequences: the part of the bookkeeping that all ranks share."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.ids: dict[int, list[int]] = {}
        self.owner: dict[int, tuple[int, int]] = {}

    def apply(self, command: Command) -> str | None:
        """Returns why the command was refused, or None."""
        if command.name == "abort":
            for i in self.ids.pop(command.handle, []):
                self.owner.pop(i, None)
                self.engine.abort(i)
            return None
        ids = self.ids[command.handle] = []
        try:
            for choice, (prompt, params) in enumerate(zip(command.prompts, command.params, strict=True)):
                ids.append(self.engine.add(list(prompt), params))
                self.owner[ids[-1]] = (command.handle, choice)
        except ValueError as error:
            self.apply(Command("abort", command.handle))
            return str(error)
        return None

    def resolve(self, output: Output) -> tuple[int, int]:
        """(request, choice) of an output; forgets the sequence if it has ended."""
        handle, choice = self.owner[output.id]
        if output.finish is not None:
            del self.owner[output.id]
            self.ids[handle].remove(output.id)
            if not self.ids[handle]:
                del self.ids[handle]
        return handle, choice


class RequestHandle:
    """One request's sequences, as the event loop sees them."""

    def __init__(self, worker: EngineWorker, number: int, count: int, born: float):
        self.worker, self.number, self.born = worker, number, born
        self.count, self.open = count, set(range(count))
        self._events: asyncio.Queue = asyncio.Queue()

    async def accepted(self) -> None:
        """Waits until the engine has taken the request.

        Raises:
            Refused, EngineDown.
        """
        event = await self._events.get()
        if isinstance(event, BaseException):
            self.close()
            raise event

    async def outputs(self) -> AsyncIterator[list[StepOutput]]:
        """What the steps give, as much of it as is there, until all choices have ended.

        Raises:
            EngineDown.
        """
        remaining = set(range(self.count))
        while remaining:
            event = await self._events.get()
            if isinstance(event, BaseException):
                raise event
            remaining.difference_update(step.choice for step in event if step.output.finish is not None)
            yield event

    def deliver(self, event: list[StepOutput] | BaseException | None) -> None:
        """Called in the event loop."""
        self._events.put_nowait(event)
        if isinstance(event, BaseException):
            self._leave(set(self.open))
        elif event is not None:
            ended = {step.choice for step in event if step.output.finish is not None}
            if ended:
                self._leave(ended)

    def close(self) -> None:
        """Ends what has not ended; frees its slots between this step and the next. May be called more than once."""
        if self.open:
            self._leave(set(self.open))
            self.worker.forget(self)

    def _leave(self, choices: set[int]) -> None:
        self.worker.in_flight -= len(choices & self.open)
        self.open -= choices


@dataclass
class Statistics:
    """A consistent look at the engine between two steps."""

    counts: dict
    held_pages: dict[str, int]  # by sequences, without what only the prefix cache keeps
    all_pages: dict[str, int]
    at: float = field(default_factory=time.monotonic)


def statistics(engine: Engine) -> Statistics:
    pools = engine.cache.pools
    kept = dict.fromkeys(pools, 0)
    for entry in engine.cache.entries():
        for kind, page in entry.pages.items():
            kept[kind] += pools[kind].references[page] == 1
    counts = engine.stats()
    held = {kind: counts["pages"][kind] - kept[kind] for kind in pools}
    return Statistics(counts, held, {kind: pool.pages for kind, pool in pools.items()})


class EngineWorker:
    """See the module's text.

    Args:
        max_requests: sequences that may be in the engine, running or waiting.
        stall_seconds: a step that takes longer means that the engine hangs.
    """

    def __init__(self, engine: Engine, ranks: Ranks = SINGLE_RANK, *, max_requests: int = 64,
                 stall_seconds: float = STALL_SECONDS):
        self.engine, self.ranks = engine, ranks
        self.max_requests, self.stall_seconds = max_requests, stall_seconds
        self.in_flight = 0
        self.down: str | None = None
        self.ended_well = False
        self.last_statistics = statistics(engine)
        self._table = RequestTable(engine)
        self._handles: dict[int, RequestHandle] = {}
        self._numbers = 0
        self._condition = threading.Condition()
        self._commands: list[Command] = []
        self._asked: list[asyncio.Future] = []
        self._pending: list[tuple[int, StepOutput]] = []  # of the engine's thread: with their requests' numbers
        self._flushed = self._computed = 0.0  # when they last were: wall time, and CPU time of the engine's thread
        self._fresh: set[int] = set()  # requests that have got nothing yet
        self._step_began: float | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._loop_thread = 0
        self._watching = threading.Event()  # set: no longer
        self.loop_delay = 0.0  # seconds that the event loop last took to answer the watch

    def start(self) -> None:
        """Begins to compute; called in the event loop that requests will come from."""
        self._loop, self._loop_thread = asyncio.get_running_loop(), threading.get_ident()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def stop(self, patience_seconds: float = STOP_SECONDS) -> None:
        """Ends the thread after the step that it is in, and the other ranks with it; a step that hangs is left behind."""
        self._watching.set()
        self._send(Command("stop"))
        end = time.monotonic() + patience_seconds
        while self._thread is not None and self._thread.is_alive() and time.monotonic() < end:
            await asyncio.sleep(0.01)

    def cut(self, reason: str) -> None:
        """Ends everything that is open, and everything that is still asked for, with an error."""
        for number in self._handles:
            self._send(Command("abort", number))
        self._fail(reason)

    @property
    def stopped(self) -> bool:
        """Whether the thread has ended."""
        return self._thread is None or not self._thread.is_alive()

    def submit(self, prompts: list[list[int]], params: list[SamplingParams], born: float | None = None) -> RequestHandle:
        """Queues the sequences of one request.

        Args:
            born: when it arrived (`time.monotonic`), from which its times are counted; None: now.

        Raises:
            EngineDown, Busy; Refused if it asks for more sequences than ever fit.
        """
        self.check()
        count = len(prompts)
        if count > self.max_requests:
            raise Refused(f"{count} answers in one request, expected at most {self.max_requests} (prompts x n)")
        if self.in_flight + count > self.max_requests:
            raise Busy(f"{counted(self.in_flight, 'request')} running or waiting, expected at most {self.max_requests}")
        handle = self._handles[self._numbers] = RequestHandle(
            self, self._numbers, count, time.monotonic() if born is None else born)
        self._numbers += 1
        self.in_flight += count
        self._send(Command("add", handle.number, tuple(map(tuple, prompts)), tuple(params)))
        return handle

    def forget(self, handle: RequestHandle) -> None:
        """Aborts what is left of a request."""
        if self._handles.pop(handle.number, None) is not None:
            self._send(Command("abort", handle.number))

    def check(self) -> None:
        """Whether requests can be taken.

        Raises:
            EngineDown.
        """
        if self.down is not None:
            raise EngineDown(self.down)

    def _watch(self) -> None:
        """The watch's thread: finds a step that hangs, and an event loop that answers nobody.

        It lives outside the event loop, because what hangs may be the loop itself. The loop is asked for a sign of life every
        second; where it is and that it is late is said once, and how late it was is counted.
        """
        asked = answered = time.monotonic()
        told = False

        def sign() -> None:
            nonlocal answered
            answered = time.monotonic()

        while not self._watching.wait(WATCH_SECONDS):
            now = time.monotonic()
            began = self._step_began
            if self.down is None and began is not None and now - began > self.stall_seconds:
                self._call(self._fail, f"a step has taken more than {self.stall_seconds:g} s")
            if answered >= asked:
                self.loop_delay, told = answered - asked, False
                asked = now
                self._call(sign)
            elif now - asked > LOOP_SECONDS:
                self.loop_delay = now - asked
                if not told:
                    told = True
                    print(f"the event loop has answered nobody for {now - asked:.0f} s:\n{_where(self._loop_thread)}",
                          file=sys.stderr, flush=True)

    async def statistics(self, patience_seconds: float = 2.0) -> Statistics:
        """As of the end of the present step; the last known ones if that does not end soon."""
        if self.down is None:
            future = asyncio.get_running_loop().create_future()
            with self._condition:
                self._asked.append(future)
                self._condition.notify()
            try:
                self.last_statistics = await asyncio.wait_for(future, patience_seconds)
            except TimeoutError:
                pass
        return self.last_statistics

    def _send(self, command: Command) -> None:
        with self._condition:
            self._commands.append(command)
            self._condition.notify()

    def _run(self) -> None:
        stopped = False
        try:
            while not stopped:
                stopped = self._turn()
            self.ended_well = True
        except RankLost as error:
            print(error, file=sys.stderr, flush=True)
            self._call(self._fail, str(error))
        finally:
            error = sys.exc_info()[1]
            self._flush()
            said = "the server is shutting down" if error is None else f"{type(error).__name__}: {error}".splitlines()[0]
            self._call(self._fail, said)

    def _turn(self) -> bool:
        """Commands, if there are any, then one step. Returns whether it was told to stop.

        Keep this short: each step evicts the CPU caches, so every access here is a miss.
        """
        engine = self.engine
        if (self._commands or self._asked or not engine.busy or self.ranks.count > 1) and self._attend():
            return True
        self._step_began = time.monotonic()
        outputs = engine.step()
        now = time.monotonic()
        self._step_began = None
        urgent = not engine.busy
        for output in outputs:
            handle, choice = self._table.resolve(output)
            self._pending.append((handle, StepOutput(choice, output, now)))
            if output.finish is not None or handle in self._fresh:
                urgent = True
                self._fresh.discard(handle)
        waited = now - self._flushed
        if urgent or waited >= FLUSH_SECONDS and due(waited, time.thread_time() - self._computed, len(self._table.ids)):
            self._flush(now)
        return False

    def _attend(self) -> bool:
        """Applies commands, on all ranks; waits for one while there is nothing to do. Returns whether to stop."""
        with self._condition:
            if not (self._commands or self._asked or self.engine.busy):
                self._condition.wait(HEARTBEAT_SECONDS)
            commands, self._commands = self._commands, []
            asked, self._asked = self._asked, []
        self._step_began = time.monotonic()  # other ranks may be waited for
        commands = self.ranks.broadcast(commands)
        replies: list[tuple[int, BaseException | None]] = []
        for command in commands:
            if command.name == "stop":
                self._step_began = None
                return True
            reason = self._table.apply(command)
            if command.name == "add":
                replies.append((command.handle, None if reason is None else Refused(reason)))
                self._fresh.add(command.handle)
            else:
                self._fresh.discard(command.handle)
        if replies:
            self._call(self._reply, replies)
        if asked:
            self._call(self._answer, asked, statistics(self.engine))
        return False

    def _flush(self, now: float = 0.0) -> None:
        """In the engine's thread: what is pending goes to the event loop."""
        if self._pending:
            pending, self._pending, self._flushed, self._computed = self._pending, [], now, time.thread_time()
            self._call(self._deliver, pending)

    def _call(self, function, *arguments) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the event loop has ended, nobody is left to be told
            assert self._loop.is_closed()

    def _reply(self, replies: list[tuple[int, BaseException | None]]) -> None:
        for number, error in replies:
            handle = self._handles.get(number)
            if handle is not None:
                handle.deliver(error)
                if error is not None:
                    self._handles.pop(number, None)

    def _deliver(self, pending: list[tuple[int, StepOutput]]) -> None:
        by_handle: dict[int, list[StepOutput]] = {}
        for number, step in pending:
            by_handle.setdefault(number, []).append(step)
        for number, outputs in by_handle.items():
            handle = self._handles.get(number)
            if handle is None:
                continue
            handle.deliver(outputs)
            if not handle.open:
                self._handles.pop(number, None)

    def _answer(self, asked: list[asyncio.Future], found: Statistics) -> None:
        for future in asked:
            if not future.done():
                future.set_result(found)

    def _fail(self, reason: str) -> None:
        """In the event loop: everything open fails, everything later too."""
        if self.down is None:
            self.down = reason
        handles, self._handles = self._handles, {}
        for handle in handles.values():
            handle.deliver(EngineDown(self.down))


def _where(thread: int) -> str:
    """The end of a thread's stack."""
    frame = sys._current_frames().get(thread)
    return "".join(traceback.format_stack(frame)[-3:]).rstrip() if frame is not None else "(its thread has ended)"


def follower_loop(engine: Engine, ranks: Ranks) -> None:
    """The loop of ranks other than 0: the same commands, the same steps, nobody to tell.

    Raises:
        RankLost: rank 0, or another one, has ended without saying so.
    """
    table = RequestTable(engine)
    while True:
        for command in ranks.broadcast(None):
            if command.name == "stop":
                return
            table.apply(command)
        for output in engine.step():
            table.resolve(output)
