"""A folder of this user's alone for what may be made again: compiled code, checksums."""

from __future__ import annotations

import os
import stat
from pathlib import Path

FOREIGN = stat.S_IWGRP | stat.S_IWOTH  # rights by which others could write


def user_cache() -> Path:
    """$XDG_CACHE_HOME/fp4-dflash or ~/.cache/fp4-dflash, made if it is missing, with rights for its owner alone.

    Raises:
        OSError: it cannot be made, or is not this user's: whoever owns it could plant code.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fp4-dflash"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise PermissionError(f"{folder}: belongs to user {found.st_uid}, expected a folder of this user's own")
    if found.st_mode & 0o077:
        folder.chmod(0o700)
    return folder


def is_own_file(path: Path) -> bool:
    """Whether `path` is an ordinary file that this user owns and nobody else may write."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & FOREIGN
