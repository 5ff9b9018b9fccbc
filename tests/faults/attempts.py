"""A command run in a forked process, and what became of it: the verdicts of the campaigns in this folder."""

import contextlib
import importlib
import os
import select
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

# What a damage may end in. The first two are right; the third is the worst.
RIGHT, TOLD, SILENT, TRACEBACK, HANG = ("right result", "one clear line, code 1 or 2", "SILENT: another result, code 0",
                                        "TRACEBACK, or ended by a signal", "HANG")
COMMANDS = {"qat": "qat.train", "dflash": "dflash_train.train", "export": "export.to_hf", "verify": "export.verify",
            "validate": "runtime_ref.validate", "serve": "runtime_ref.serve"}


@dataclass
class Attempt:
    """`code`: None if it had to be killed for the time it took, negative for a signal."""

    code: int | None
    said: str

    def fault(self, errors: tuple[str, ...] = ("error:",)) -> str | None:
        """TRACEBACK or HANG, or SILENT's opposite: None for an end as promised.

        Args:
            errors: how the line begins that says what is wrong, of which a refusal must have exactly one.
        """
        if self.code is None:
            return HANG
        lines = [line for line in self.said.splitlines() if line.startswith(errors)]
        if "Traceback" in self.said or self.code not in (0, 1, 2) or self.code and errors and len(lines) != 1:
            return TRACEBACK
        return None


def attempt(command: str, *arguments, seconds: float = 300, killed_after: float | None = None,
            first: Callable[[], None] = lambda: None) -> Attempt:
    """Runs a command's `main` in a process forked from this one, which has imported what is slow to import.

    Args:
        killed_after: seconds until SIGKILL. first: called in the process, for limits of its own.
    """
    main = importlib.import_module(COMMANDS[command]).main if command in COMMANDS else command
    reading, writing = os.pipe()  # and no file, which a full disk or a limit on files would be a limit on, too
    child = os.fork()
    if child == 0:
        _run(main, [str(a) for a in arguments], writing, first)
    os.close(writing)
    try:
        return _watched(child, reading, seconds if killed_after is None else killed_after)
    finally:
        os.close(reading)


def _run(main, arguments: list[str], output: int, first: Callable[[], None]) -> None:
    """The child's life."""
    code = 1
    try:
        os.setsid()
        for number in (1, 2):
            os.dup2(output, number)
        sys.stdin = open(os.devnull)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(1), "w", buffering=1) for _ in range(2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(ENVIRONMENT)
        os.chdir(ROOT)
        sys.argv = ["command", *arguments]
        first()
        code = main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # as the interpreter would say it
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0)


def _watched(child: int, pipe: int, seconds: float) -> Attempt:
    """Reads what a process says until it ends, or its time is over."""
    end, said, code, status = time.monotonic() + seconds, b"", None, None
    while status is None and time.monotonic() < end:
        if select.select([pipe], [], [], 0.005)[0]:
            said += (part := os.read(pipe, 1 << 16))
            if not part:
                time.sleep(0.001)
        found, status = os.waitpid(child, os.WNOHANG)
        status = status if found else None
    if status is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    else:
        code = os.waitstatus_to_exitcode(status)
    while select.select([pipe], [], [], 0)[0] and (part := os.read(pipe, 1 << 16)):
        said += part
    return Attempt(code, said.decode("utf-8", "replace"))


@dataclass
class Tally:
    """Verdicts of a campaign; `wrong` are those that must not be, with what led to them."""

    counts: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, verdict: str, what: str, said: str = "") -> None:
        self.counts[verdict] += 1
        if verdict not in (RIGHT, TOLD):
            self.wrong.append(f"{verdict}: {what}\n    " + "\n    ".join(said.strip().splitlines()[-6:]))

    def close(self, name: str) -> None:
        """Prints the counts, and fails if there was a wrong one."""
        print(f"\n{name}: {sum(self.counts.values())}; " + "; ".join(f"{v}: {n}" for v, n in sorted(self.counts.items())))
        assert not self.wrong, "\n".join(self.wrong)


def put_back(pristine: Path, work: Path) -> None:
    """Makes `work` a copy of `pristine` again."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(pristine, work, symlinks=True)


def content(folder: Path) -> dict[str, bytes]:
    """Bytes of every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
