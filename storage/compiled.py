"""C sources of this project, compiled on the machine that runs them.

A source is compiled once per machine with the system's C compiler (GCC; `CC` overrides it) and kept in the user's cache folder,
under a name that says which source, compiler, flags and processor made it. Whoever asks has another way where that is not
possible, and is told why it is not. Rejected: a wheel with binaries (the code is for the processor at hand); torch's extension
loader (it takes half a minute to include headers that these sources do not need).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from storage.cache import is_own_file, user_cache
from storage.files import write_text
from storage.reading import first_line, sha256

_lock = threading.Lock()  # threads of one process would write one file
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-std=gnu11", "-shared", "-fPIC")


def load_compiled(sources: Sequence[Path], flags: tuple[str, ...] = FLAGS) -> tuple[ctypes.CDLL | None, str]:
    """(what `sources` compile to, "") or (None, why there is nothing, in one line).

    Args:
        sources: the file that is compiled, and those that it includes.
    """
    with _lock:
        try:
            return _loaded(sources, flags)
        except (OSError, RuntimeError) as error:  # no home at all, a compiler that is none, a folder nothing may be loaded from
            return None, f"{sources[0].name}: cannot be compiled or loaded: {first_line(error)}"


def _loaded(sources: Sequence[Path], flags: tuple[str, ...]) -> tuple[ctypes.CDLL | None, str]:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None, f"no C compiler ({os.environ.get('CC', 'cc')}) on this machine"
    version = _run([compiler, "--version"]).stdout
    made_of = "\n".join((*(file.read_text(encoding="utf-8") for file in sources), " ".join(flags), version, _processor()))
    name = f"{sources[0].stem}-{hashlib.sha256(made_of.encode()).hexdigest()[:20]}.so"
    try:
        home, temporary = user_cache(), False
    except (OSError, RuntimeError):  # nothing can be kept, or what is kept could be another user's
        home, temporary = Path(tempfile.mkdtemp(prefix="fp4-dflash-")), True
    try:
        file = home / name
        reason = None if _is_whole(file) else _compile(compiler, flags, sources[0], file)
        return (ctypes.CDLL(str(file)), "") if reason is None else (None, reason)
    finally:
        if temporary:  # what is loaded stays loaded
            shutil.rmtree(home, ignore_errors=True)


def _run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, errors="replace")


def _sum_file(file: Path) -> Path:
    return file.with_suffix(".sha256")


def _is_whole(file: Path) -> bool:
    """Whether `file` is what was compiled, by this user: to load half of it ends the process (SIGBUS)."""
    known = _sum_file(file)
    return is_own_file(file) and is_own_file(known) and known.read_bytes().decode("ascii", "replace") == sha256(file)


def _processor() -> str:
    """What `-march=native` depends on."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    lines = info.read_text(encoding="utf-8").split("\n\n", 1)[0].splitlines()
    return "\n".join(line for line in lines if line.startswith(("model", "flags", "Features", "CPU ")))


def _compile(compiler: str, flags: tuple[str, ...], source: Path, file: Path) -> str | None:
    """Builds `file`; what went wrong, or None. Several processes may do so at once: each renames its own."""
    aside = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        done = _run([compiler, *flags, "-o", str(aside), str(source), "-lm"])
        if done.returncode or not aside.is_file():
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            return f"{compiler} cannot compile {source.name}: {lines[0].strip() if lines else f'exit code {done.returncode}'}"
        aside.chmod(0o700)
        write_text(_sum_file(file), sha256(aside))
        _sum_file(file).chmod(0o600)
        aside.replace(file)
    except OSError as error:
        return f"{file.parent}: {error.strerror}"
    return None
