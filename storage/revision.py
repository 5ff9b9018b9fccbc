"""The revision of this code."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path


@functools.cache
def git_revision() -> str:
    """Revision of the working tree that this file is in, "-dirty" if changed, or "unknown" (an installed copy, no git)."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        # Without the variable, git locks the index to refresh it: in the way of a commit, and left behind if it is killed.
        return subprocess.run(["git", *arguments], cwd=here.parent, text=True, capture_output=True, check=True, timeout=10,
                              env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"}).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an installed copy may lie inside a repository that is not its own
        changed = git("status", "--porcelain", "--untracked-files=no")  # `describe --dirty` locks it all the same (git 2.39)
        return git("describe", "--always", "--abbrev=12") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
