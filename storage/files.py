"""Files and folders that appear whole or not at all, and are still there after a power cut.

Everything is written aside, flushed to the disk (`fsync`: file, then folder), and only then renamed. A killed process leaves
the old or the new, never half of one. A folder takes the place of another in one step (`renameat2` exchanges the two names);
where the system has no such call there are two renames, and the old folder waits beside the new one meanwhile.

What is written aside carries a mark, so that only what these functions made is ever cleared away: a folder that somebody else
called `<name>.partial` is refused, not deleted.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from storage.terminal import readable_size

MARK = ".unfinished"  # a file within a folder that is being written
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces the file `path`; its folder is made if it is missing.

    A symbolic link stays one: what it names is replaced. A pipe or device (`/dev/stdout`) is written to as it is.

    Raises:
        OSError: it cannot be written, or is a pipe that nobody reads; what was there stays.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if not stat.S_ISREG(kind := path.stat().st_mode) and not stat.S_ISDIR(kind):
            _write_through(path, data)
            return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = path.stat().st_mode & 0o777 if path.exists() else None
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if mode is not None:
                os.fchmod(file.fileno(), mode)
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        error.filename = str(path)  # the name that the caller knows
        raise
    sync_folder(path.parent)


def _write_through(path: Path, data: bytes) -> None:
    """Into a pipe or device. A pipe that nobody reads refuses to be opened like this; else it would be waited on for ever."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "a pipe that nobody reads", str(path)) from None
        raise
    os.set_blocking(descriptor, True)
    with open(descriptor, "wb") as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: object, *, sort_keys: bool = False) -> None:
    """JSON of two spaces' indent and a line end."""
    write_text(path, json.dumps(value, indent=2, sort_keys=sort_keys, ensure_ascii=False) + "\n")


def sync_file(path: Path) -> None:
    """Waits until the file's bytes are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Waits until the folder's entries are on the disk, where the file system can say so."""
    try:
        sync_file(folder)
    except OSError as error:
        if error.errno not in _UNSUPPORTED | {errno.EBADF, errno.EISDIR, errno.EACCES}:
            raise


def sync_tree(folder: Path) -> None:
    """`sync_file` of every file below `folder`, and of the folders."""
    for location, _, files in os.walk(folder):
        for name in files:
            if (path := Path(location, name)).is_file():
                sync_file(path)
        sync_folder(Path(location))


def begin_folder(partial: Path) -> None:
    """Makes `partial` an empty, marked folder.

    Raises:
        OSError: it exists and was not made here.
    """
    discard_folder(partial)
    partial.mkdir(parents=True)
    (partial / MARK).touch()


def discard_folder(partial: Path) -> None:
    """Removes an unfinished folder, if there is one.

    Raises:
        FileExistsError: it is somebody else's: not marked, and not empty.
    """
    if not partial.is_symlink() and not partial.exists():
        return
    if not is_unfinished(partial):
        raise FileExistsError(f"{partial}: exists and is not the unfinished result of an earlier run; expected that name to "
                              "be free: move or remove it")
    _clear(partial)


def _clear(folder: Path) -> None:
    """Removes a marked folder, its mark last: killed in between, what is left is still marked, or empty."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != MARK:
            entry.unlink()
    (folder / MARK).unlink(missing_ok=True)
    folder.rmdir()


def is_unfinished(folder: Path) -> bool:
    """Whether `folder` was begun here and not finished (or is empty)."""
    return not folder.is_symlink() and folder.is_dir() and ((folder / MARK).is_file() or not any(folder.iterdir()))


def finish_folder(partial: Path, final: Path) -> None:
    """Gives the marked folder `partial` the name `final`, durably; what had the name before is removed afterwards.

    Killed at any moment, `final` is the old folder or the new one, whole (its mark, if one is left, says nothing), and what
    is called `partial` is marked.
    """
    sync_tree(partial)
    if not final.exists():
        os.rename(partial, final)
    else:
        (final / MARK).touch()
        _exchange(partial, final)
        _clear(partial)
    (final / MARK).unlink()
    sync_folder(final)
    sync_folder(final.parent)


def _exchange(one: Path, other: Path) -> None:
    """Swaps two folders' names: in one step where the kernel and the file system can, else by three renames."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        done = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
        if done == 0:
            return
        if (number := ctypes.get_errno()) not in _UNSUPPORTED:
            raise OSError(number, os.strerror(number), str(other))
    aside = other.with_name(f"{other.name}.replaced")
    os.rename(other, aside)
    os.rename(one, other)
    os.rename(aside, one)


@contextlib.contextmanager
def folder_aside(final: Path) -> Iterator[Path]:
    """`<final>.partial`, empty, to be filled: it takes the place of `final` at the end, or is removed if that fails.

    Raises:
        OSError: the disk is full or not writable; `final` is as it was. FileExistsError: see `discard_folder`.
    """
    partial = final.with_name(final.name + ".partial")
    begin_folder(partial)
    try:
        yield partial
        finish_folder(partial, final)
    except BaseException:
        if is_unfinished(partial):
            with contextlib.suppress(OSError):
                _clear(partial)
        raise


def next_free(path: Path) -> Path:
    """`<path>.1`, or the number after the highest that is there: where an earlier result is set aside."""
    return path.with_name(f"{path.name}.{max(_set_aside(path), default=0) + 1}")


def _set_aside(path: Path) -> dict[int, Path]:
    """What has been set aside of `path`, by number."""
    found = path.parent.glob(f"{glob.escape(path.name)}.*")
    return {int(p.name.rpartition(".")[2]): p for p in found if p.name.removeprefix(f"{path.name}.").isdecimal()}


def bound_earlier(path: Path, mark: str, keep: int | None) -> None:
    """Removes all but the newest `keep` results that were set aside of `path`, folders that hold a file `mark`, and says so;
    with None it says what all of them hold."""
    earlier = [folder for _, folder in sorted(_set_aside(path).items()) if (folder / mark).is_file()]
    if keep is None:
        print(f"results set aside of {path}: {len(earlier)}, {readable_size(sum(map(tree_bytes, earlier)))} in all, which "
              "removing them gives back (keep_earlier: N in the recipe keeps the newest N)")
        return
    for folder in earlier[:len(earlier) - keep]:
        print(f"removed by keep_earlier: {keep}: {folder} ({readable_size(tree_bytes(folder))})")
        shutil.rmtree(folder)


def remove_special_files(folder: Path) -> None:
    """Takes away links and pipes below `folder`: they would be written through, or waited on. Other writers may be at work."""
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            mode = path.lstat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                path.unlink()


def tree_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
