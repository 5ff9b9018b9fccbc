"""What the GPU suite measures and until when, and how a part that fails ends only itself.

A run has one try and a few minutes: whatever raises in a part becomes a line of the report, and the next part begins. What
this cannot contain is a fault of the device itself, after which every later part fails too, each with its line.
"""

from __future__ import annotations

import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence

from runtime_ref.measure.gpu_suite import peers

SECONDS = 540
# Parts of the suite in their order, and seconds that each needs: an earlier one ends where later ones would not fit any more.
# What is left of SECONDS is for the checks. The engine's seconds are mostly its kernels' compilation.
PARTS = {"experts": 60, "quantize": 5, "training": 45, "steps": 120, "engine": 110, "peers": 80}
# These begin late rather than not at all, and what comes after them has to see what is left.
FIRST = ("experts", "steps")
# What a peer, torch, the engine (not finite: FloatingPointError) or a process of its own may raise.
FAULTS = (*peers.REFUSALS, ArithmeticError, subprocess.SubprocessError)


class Plan:
    """Which parts are requested, and until when each may begin something.

    skipped: what did not fit or lacked something. refused: what failed, with its reason.
    """

    def __init__(self, only: Sequence[str] = ()):
        """only: parts that are requested, by default all.

        Raises:
            ValueError: a part that is not known.
        """
        unknown = [name for name in only if name not in PARTS]
        if unknown:
            raise ValueError(f"--only: {unknown[0]!r}, expected some of {', '.join(PARTS)}")
        self.requested = [name for name in PARTS if not only or name in only]
        self.skipped: list[str] = []
        self.refused: list[str] = []
        self.end = time.monotonic() + SECONDS

    def seconds_left(self, part: str | None = None) -> float:
        """Until what comes after `part`, or after the checks, would not fit any more."""
        at = -1 if part is None else list(PARTS).index(part)
        return self.end - time.monotonic() - sum(PARTS[name] for name in self.requested if list(PARTS).index(name) > at)

    def begins(self, part: str, what: str) -> bool:
        """Whether a part is requested and fits; if it does not fit, `what` was skipped."""
        left = self.end - time.monotonic() if part in FIRST else self.seconds_left(part)
        return part in self.requested and self._fits(left >= PARTS[part], what)

    def spares(self, part: str, what: str) -> bool:
        """Whether there is time for something in a part that it could do without; if not, `what` was skipped."""
        return self._fits(self.seconds_left(part) >= PARTS[part], what)

    def _fits(self, fits: bool, what: str) -> bool:
        if not fits:
            self.skipped.append(f"{what}: no time")
        return fits


def reason(error: BaseException) -> str:
    """One line."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0] if said else 'no reason given'}"


def kept(part: Callable, what: str, into: list[str]):
    """What `part` returns; None if it fails: then `into` holds why, and the standard error where."""
    try:
        return part()
    except FAULTS as error:
        traceback.print_exc(file=sys.stderr)
        into.append(f"{what}: {reason(error)}")
        return None


def checked(name: str, check: Callable[[], dict | list[dict]]) -> list[dict]:
    """The results of a check; one that fails is red."""
    wrong: list[str] = []
    found = kept(check, name, wrong)
    if wrong:
        return [{"name": name, "passed": False, "detail": wrong[0].removeprefix(f"{name}: ")}]
    return found if isinstance(found, list) else [found]
