"""Checks end in findings, whatever a folder or a server does to them: one guard around each, bounds on foreign code."""

from __future__ import annotations

import json
import os
import select
import signal
from collections.abc import Callable

from runtime_ref.core.tensor_parallel import RankLost, Ranks
from runtime_ref.validation.result import Check
from storage.reading import first_line

UNREADABLE_CAUSE = "the folder is incomplete or damaged in a way that no check expects"


class UserMistake(ValueError):
    """A wrong argument or file of the user's own, found while a check runs: one line, exit code 2."""


def guarded(check: Check, run: Callable[[Check], object], ranks: Ranks | None = None, refused: tuple = ()) -> object | None:
    """run(check), whose exceptions become findings; what it returns, or None.

    Args:
        ranks: with several of them an exception ends the others too, which would wait for this one.
        refused: exceptions that are passed on, besides mistakes of the user.
    """
    try:
        return run(check)
    except (UserMistake, RankLost, *refused):
        raise
    except Exception as error:  # the one guard around verifier checks: any folder ends in a verdict
        if ranks is not None and ranks.count > 1:
            ranks.abandon()
            raise
        line = first_line(error)[:200]
        check.fail(f"the check broke off: {type(error).__name__}: {line}", UNREADABLE_CAUSE)
        return None


class OutOfBounds(ValueError):
    """Foreign code took more time or memory than it was given."""


def bounded(call: Callable[[], object], *, seconds: float, extra_bytes: int = 1 << 30):
    """What `call` returns (as JSON holds it), computed in a child process that may not run or grow without end.

    For code that comes with a folder, a chat template above all: a loop in it cannot be interrupted by a thread, and a string
    that it doubles takes all memory.

    Raises:
        OutOfBounds: more than `seconds` of processor time (what else the machine does is no fault of the folder's; asleep, six
            times as long), or `extra_bytes` beyond what this process has. ValueError: what the call raised, as "TypeName:
            first line".
    """
    import resource

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            os.close(reading)
            with open("/proc/self/statm", encoding="ascii") as file:
                present = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (present + extra_bytes, present + extra_bytes))
        except OSError:
            pass  # no /proc: time alone is bounded
        try:
            answer = ["value", call()]
        except MemoryError:
            answer = ["memory", ""]
        except BaseException as error:  # of a child that ends here
            answer = ["error", f"{type(error).__name__}: {first_line(error)[:200]}"]
        with open(writing, "w", encoding="utf-8") as pipe:
            pipe.write(json.dumps(answer))
        os._exit(0)
    os.close(writing)
    try:
        answer = _read_all(reading, 6 * seconds)
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if answer is None or ended == -signal.SIGPROF:
        raise OutOfBounds(f"no end after {seconds:g} s")
    kind, value = json.loads(answer) if answer else ("memory", "")
    if kind == "memory":
        raise OutOfBounds(f"more than {extra_bytes >> 20} MiB of memory")
    if kind == "error":
        raise ValueError(value)
    return value


def _read_all(pipe: int, seconds: float) -> bytes | None:
    """Everything until the other end is closed; None if that takes too long."""
    import time

    end, parts = time.monotonic() + seconds, []
    while True:
        ready, _, _ = select.select([pipe], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            return None
        part = os.read(pipe, 1 << 16)
        if not part:
            return b"".join(parts)
        parts.append(part)
