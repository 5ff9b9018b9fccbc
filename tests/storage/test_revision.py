"""The revision that results are told with: right, and without a lock in the repository of the person who runs a job."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ASK = "from revision import git_revision; print(git_revision())"


def revision(folder: Path) -> str:
    return subprocess.run([sys.executable, "-c", ASK], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    shutil.copy(ROOT / "storage" / "revision.py", tmp_path)
    for words in (["init", "-q"], ["add", "revision.py"],
                  ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    return tmp_path


def test_a_changed_file_is_dirty_and_an_unknown_one_is_not(repository):
    (repository / "notes.txt").write_text("not part of it")
    first = revision(repository)
    assert len(first) == 12 and int(first, 16)
    (repository / "revision.py").write_text((repository / "revision.py").read_text() + "\n")
    assert revision(repository) == f"{first}-dirty"


def test_the_index_of_the_repository_is_not_written(repository):
    """A job that is killed while git holds the index leaves a lock, and nothing can be committed any more."""
    first, index = revision(repository), repository / ".git" / "index"
    later = time.time() + 100
    os.utime(repository / "revision.py", (later, later))  # git would like to note that it is unchanged
    before = index.stat()
    assert revision(repository) == first
    assert (index.stat().st_ino, index.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    (repository / ".git" / "index.lock").touch()
    assert revision(repository) == first
