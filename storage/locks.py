"""One writer at a time: a lock file that says who holds it.

    <folder>/.<name>.lock    {"host", "boot", "pid", "command", "since"}, held by the kernel's `flock`, touched every 20 seconds

On one machine the kernel knows whether the holder lives: its lock ends with it, however it dies, and the next one simply takes
the file. A holder on another machine (a shared file system may not carry `flock` across) is believed while the file's time
moves on; once it has stood still for `STALE_SECONDS`, the holder is gone. The file is removed when the lock is given back.

Rejected: process numbers alone (they are used again; a container's are all small), a lock without the holder's name (nobody
would know what to stop).
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import platform
import sys
import tempfile
import threading
from datetime import UTC, datetime
from pathlib import Path

BEAT_SECONDS, STALE_SECONDS = 20, 120
_held: dict[Path, Lock] = {}  # of this process


class Locked(ValueError):
    """Another process writes there; the text says which."""


class Lock:
    """A context manager around everything that writes a result.

    Args:
        target: what is written, for example <run>/qat; the lock lies beside it, so that the folder itself may be renamed.

    Raises:
        Locked: another process holds it. (A process may take its own lock again: the last one to leave gives it back.)
    """

    def __init__(self, target: Path):
        self.target = Path(os.path.abspath(target))
        self.path = self.target.with_name(f".{self.target.name}.lock")
        self._depth = 0

    def __enter__(self) -> Lock:
        owner = _held.setdefault(self.path, self)
        if not owner._depth:
            try:
                owner._take()
            except BaseException:
                _held.pop(self.path, None)
                raise
        owner._depth += 1
        return self

    def __exit__(self, *exc) -> None:
        owner = _held.get(self.path)
        if owner is None:
            return
        owner._depth -= 1
        if not owner._depth:
            _held.pop(self.path)
            owner._give_back()

    def _take(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                self._require_free()
                fresh = os.stat(self.path).st_ino == os.fstat(self._descriptor).st_ino
            except FileNotFoundError:  # its last holder removed it between these lines
                fresh = False
            except BaseException:
                os.close(self._descriptor)
                raise
            if fresh:
                break
            os.close(self._descriptor)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(_identity()).encode(), 0)
        os.fsync(self._descriptor)
        atexit.register(self._give_back)  # a mistake found later leaves no file behind
        self._stop = threading.Event()
        threading.Thread(target=self._beat, daemon=True, name=f"lock {self.path.name}").start()

    def _require_free(self) -> None:
        """Raises Locked, unless this process now has the kernel's lock and no other machine holds the file."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Locked(self._text(_holder(self._descriptor), "stop it first, or give this run another name")) from None
        except OSError:  # a file system without locks: only the holder's sign of life tells
            pass
        holder = _holder(self._descriptor)
        if not holder or holder.get("boot") == _boot():
            return
        silent = self._now() - os.fstat(self._descriptor).st_mtime
        if silent < STALE_SECONDS:
            raise Locked(self._text(holder, f"its last sign of life is {max(0, silent):.0f} s old; if it is gone, try again in "
                                            f"{STALE_SECONDS} s or remove {self.path}"))

    def _now(self) -> float:
        """The file system's time, which may be another machine's."""
        with tempfile.TemporaryFile(dir=self.path.parent) as probe:
            return os.fstat(probe.fileno()).st_mtime

    def _text(self, holder: dict, advice: str) -> str:
        who = (f"process {holder.get('pid', '?')} on {holder.get('host', '?')} ({holder.get('command', '?')}, since "
               f"{holder.get('since', '?')})" if holder else "another process")
        return f"{self.target}: {who} is writing it; {advice}"

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                os.utime(self._descriptor)
            except OSError:  # given back meanwhile, or a disk that is gone: the writer itself will say so
                return

    def _give_back(self) -> None:
        if self._stop.is_set():
            return
        self._stop.set()
        try:
            os.unlink(self.path)
        except OSError:
            os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)


def _identity() -> dict:
    return {"host": platform.node(), "boot": _boot(), "pid": os.getpid(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join([Path(sys.executable).name, *sys.argv])[:300]}


def _boot() -> str:
    """What tells one running kernel from all others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def _holder(descriptor: int) -> dict:
    """What a lock file says, {} if nothing that can be read."""
    try:
        found = json.loads(os.pread(descriptor, 1 << 16, 0))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
