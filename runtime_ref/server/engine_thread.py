"""The engine in a thread of its own, beside the event loop that talks to clients.

The engine computes step after step and never waits for a client; the event loop never computes. Between them go commands
(add, abort, stop), applied between two steps, and outputs. Outputs are held until the engine has computed for a while, longer
the more requests are open: an event for each token of a small model costs the event loop (and through the interpreter's lock
the engine) more than a tenth of the token, and nobody reads faster. What is counted is the CPU time of the engine's thread, for
that is what an event is compared with: on a busy machine a step takes long without computing more. No output waits longer than
a tenth of a second for the next; first tokens and ends are never held back, nor is anything once the engine has nothing to do,
and steps that compute for longer are handed over one by one. With several ranks, rank 0's commands are broadcast before each
step, so that all ranks make the same calls in the same order (`follow` is the loop of the others); while there is nothing to do
an empty broadcast every few seconds keeps the ranks in touch and finds dead ones.

If the thread ends for any reason but `stop`, or a step takes longer than `stall_seconds`, the worker is down: all open
requests fail at once, and so does every later one. It is not restarted: what made it fail is not known to be gone.

A process for the engine was rejected: a step's outputs are small, and the time that torch's operations leave the
interpreter free is enough for the event loop.
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

HEARTBEAT_SECONDS = 5.0
# A step of a large model on a CPU takes seconds; nothing sound takes minutes.
STALL_SECONDS = 180.0
# How often the watch looks, and after how long it speaks of an event loop that does not answer.
WATCH_SECONDS, LOOP_SECONDS = 0.5, 5.0
STOP_SECONDS = 5.0  # for the step that the engine is in when the server ends
# CPU time of the engine between two hand-overs, at least, and for each open request: an event costs 0.1 to 0.4 ms of it.
HAND_OVER_SECONDS, HAND_OVER_SECONDS_PER_REQUEST = 0.02, 0.0025
LONGEST_HOLD_SECONDS = 0.1


def due(waited: float, computed: float, requests: int) -> bool:
    """Whether held outputs are handed over: seconds since they last were, the engine's CPU seconds since, open requests."""
    return waited >= LONGEST_HOLD_SECONDS or computed >= max(HAND_OVER_SECONDS, HAND_OVER_SECONDS_PER_REQUEST * requests)


class Refused(ValueError):
    """The engine does not take the request (too long for the cache, ...)."""


class Busy(RuntimeError):
    """As many requests as may wait are waiting."""


class EngineDown(RuntimeError):
    """The engine has ended; the message says why."""


@dataclass(frozen=True)
class Command:
    """What all ranks do between two steps: `add` sequences of a ticket, `abort` a ticket, or `stop`."""

    name: str
    ticket: int = -1
    prompts: tuple[tuple[int, ...], ...] = ()
    params: tuple[SamplingParams, ...] = ()


@dataclass(slots=True)
class Part:
    """One step's output for one choice of a ticket; `at` is time.monotonic() at the end of the step."""

    choice: int
    output: Output
    at: float


class Book:
    """Tickets and the engine's ids of their sequences: the part of the bookkeeping that all ranks share."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.ids: dict[int, list[int]] = {}
        self.owner: dict[int, tuple[int, int]] = {}

    def apply(self, command: Command) -> str | None:
        """Returns why the command was refused, or None."""
        if command.name == "abort":
            for i in self.ids.pop(command.ticket, []):
                self.owner.pop(i, None)
                self.engine.abort(i)
            return None
        ids = self.ids[command.ticket] = []
        try:
            for choice, (prompt, params) in enumerate(zip(command.prompts, command.params, strict=True)):
                ids.append(self.engine.add(list(prompt), params))
                self.owner[ids[-1]] = (command.ticket, choice)
        except ValueError as error:
            self.apply(Command("abort", command.ticket))
            return str(error)
        return None

    def settle(self, output: Output) -> tuple[int, int]:
        """(ticket, choice) of an output; forgets the sequence if it has ended."""
        ticket, choice = self.owner[output.id]
        if output.finish is not None:
            del self.owner[output.id]
            self.ids[ticket].remove(output.id)
            if not self.ids[ticket]:
                del self.ids[ticket]
        return ticket, choice


class Ticket:
    """One request's sequences, as the event loop sees them."""

    def __init__(self, worker: EngineWorker, number: int, count: int):
        self.worker, self.number, self.born = worker, number, time.monotonic()
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

    async def parts(self) -> AsyncIterator[list[Part]]:
        """What the steps give, as much of it as is there, until all choices have ended.

        Raises:
            EngineDown.
        """
        remaining = set(range(self.count))
        while remaining:
            event = await self._events.get()
            if isinstance(event, BaseException):
                raise event
            remaining.difference_update(part.choice for part in event if part.output.finish is not None)
            yield event

    def deliver(self, event: list[Part] | BaseException | None) -> None:
        """Called in the event loop."""
        self._events.put_nowait(event)
        if isinstance(event, BaseException):
            self._leave(set(self.open))
        elif event is not None:
            ended = {part.choice for part in event if part.output.finish is not None}
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
        self._book = Book(engine)
        self._tickets: dict[int, Ticket] = {}
        self._numbers = 0
        self._condition = threading.Condition()
        self._commands: list[Command] = []
        self._asked: list[asyncio.Future] = []
        self._held: list[tuple[int, Part]] = []  # of the engine's thread: outputs to be handed over, with their tickets
        self._handed = self._computed = 0.0  # when they last were: wall time, and CPU time of the engine's thread
        self._fresh: set[int] = set()  # tickets that have got nothing yet
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
        for number in self._tickets:
            self._send(Command("abort", number))
        self._fail(reason)

    @property
    def stopped(self) -> bool:
        """Whether the thread has ended."""
        return self._thread is None or not self._thread.is_alive()

    def submit(self, prompts: list[list[int]], params: list[SamplingParams]) -> Ticket:
        """Queues the sequences of one request.

        Raises:
            EngineDown, Busy; Refused if it asks for more sequences than ever fit.
        """
        self.check()
        count = len(prompts)
        if count > self.max_requests:
            raise Refused(f"{count} answers in one request, expected at most {self.max_requests} (prompts x n)")
        if self.in_flight + count > self.max_requests:
            raise Busy(f"{self.in_flight} requests are running or waiting, expected at most {self.max_requests}")
        ticket = self._tickets[self._numbers] = Ticket(self, self._numbers, count)
        self._numbers += 1
        self.in_flight += count
        self._send(Command("add", ticket.number, tuple(map(tuple, prompts)), tuple(params)))
        return ticket

    def forget(self, ticket: Ticket) -> None:
        """Aborts what is left of a ticket."""
        if self._tickets.pop(ticket.number, None) is not None:
            self._send(Command("abort", ticket.number))

    def check(self) -> None:
        """Finds a stalled engine.

        Raises:
            EngineDown.
        """
        began = self._step_began
        if self.down is None and began is not None and time.monotonic() - began > self.stall_seconds:
            self._fail(f"a step has taken more than {self.stall_seconds:g} s")
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
            self._hand_over()
            said = "the server is shutting down" if error is None else f"{type(error).__name__}: {error}".splitlines()[0]
            self._call(self._fail, said)

    def _turn(self) -> bool:
        """Commands, if there are any, then one step. Returns whether it was told to stop.

        Short on purpose: a step sweeps the processor's caches with weights, and whatever is touched here comes from far away.
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
            ticket, choice = self._book.settle(output)
            self._held.append((ticket, Part(choice, output, now)))
            if output.finish is not None or ticket in self._fresh:
                urgent = True
                self._fresh.discard(ticket)
        waited = now - self._handed
        if urgent or waited >= HAND_OVER_SECONDS and due(waited, time.thread_time() - self._computed, len(self._book.ids)):
            self._hand_over(now)
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
            reason = self._book.apply(command)
            if command.name == "add":
                replies.append((command.ticket, None if reason is None else Refused(reason)))
                self._fresh.add(command.ticket)
            else:
                self._fresh.discard(command.ticket)
        if replies:
            self._call(self._reply, replies)
        if asked:
            self._call(self._answer, asked, statistics(self.engine))
        return False

    def _hand_over(self, now: float = 0.0) -> None:
        """In the engine's thread: what is held goes to the event loop."""
        if self._held:
            held, self._held, self._handed, self._computed = self._held, [], now, time.thread_time()
            self._call(self._deliver, held)

    def _call(self, function, *arguments) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the event loop has ended, nobody is left to be told
            assert self._loop.is_closed()

    def _reply(self, replies: list[tuple[int, BaseException | None]]) -> None:
        for number, error in replies:
            ticket = self._tickets.get(number)
            if ticket is not None:
                ticket.deliver(error)
                if error is not None:
                    self._tickets.pop(number, None)

    def _deliver(self, held: list[tuple[int, Part]]) -> None:
        by_ticket: dict[int, list[Part]] = {}
        for number, part in held:
            by_ticket.setdefault(number, []).append(part)
        for number, parts in by_ticket.items():
            ticket = self._tickets.get(number)
            if ticket is None:
                continue
            ticket.deliver(parts)
            if not ticket.open:
                self._tickets.pop(number, None)

    def _answer(self, asked: list[asyncio.Future], found: Statistics) -> None:
        for future in asked:
            if not future.done():
                future.set_result(found)

    def _fail(self, reason: str) -> None:
        """In the event loop: everything open fails, everything later too."""
        if self.down is None:
            self.down = reason
        tickets, self._tickets = self._tickets, {}
        for ticket in tickets.values():
            ticket.deliver(EngineDown(self.down))


def _where(thread: int) -> str:
    """The end of a thread's stack."""
    frame = sys._current_frames().get(thread)
    return "".join(traceback.format_stack(frame)[-3:]).rstrip() if frame is not None else "(its thread has ended)"


def follow(engine: Engine, ranks: Ranks) -> None:
    """The loop of ranks other than 0: the same commands, the same steps, nobody to tell.

    Raises:
        RankLost: rank 0, or another one, has ended without saying so.
    """
    book = Book(engine)
    while True:
        for command in ranks.broadcast(None):
            if command.name == "stop":
                return
            book.apply(command)
        for output in engine.step():
            book.settle(output)
