"""What disks, copies and editors do to files, at random."""

import os
import random
import re
import shutil
from pathlib import Path


def _bit(rng, path, _):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _bytes(rng, path, _):
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    data[at:at + 16] = rng.randbytes(len(data[at:at + 16]))
    path.write_bytes(data)


def _head(rng, path, _):
    data = bytearray(path.read_bytes())
    data[rng.randrange(min(64, len(data)))] ^= rng.randrange(1, 256)
    path.write_bytes(data)


def _another(rng, path, others):
    shutil.copy(rng.choice(others), path)


def _digit(rng, path, _):
    """A number in a text file becomes another one, or no number."""
    data = path.read_bytes()
    places = list(re.finditer(rb"(?<![\w.])-?\d+(\.\d+)?(e-?\d+)?", data[:200_000]))
    if not places:
        return _bit(rng, path, None)
    place = rng.choice(places)
    new = rng.choice([b"-1", b"0", b"7", b"99999999999", b"1e308", b"null", b'"x"', b"[]", b"{}", b"true", b"2.5"])
    path.write_bytes(data[:place.start()] + new + data[place.end():])


def _instead(make):
    def damage(rng, path, _):
        path.unlink()
        make(path)

    return damage


KINDS = {
    "a bit": _bit, "a bit ": _bit, "sixteen bytes": _bytes, "a byte of the head": _head, "a number": _digit,
    "cut": lambda rng, path, _: os.truncate(path, rng.randrange(path.stat().st_size)),
    "the last byte": lambda rng, path, _: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda rng, path, _: os.truncate(path, 0),
    "missing": lambda rng, path, _: path.unlink(),
    "zeros": lambda rng, path, _: path.write_bytes(bytes(path.stat().st_size)),
    "appended to": lambda rng, path, _: path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 100))),
    "another file's content": _another, "another file's content ": _another,
    "a folder": _instead(Path.mkdir), "a pipe": _instead(os.mkfifo),
    "a link to itself": _instead(lambda path: path.symlink_to(path.name)),
    "a link to nothing": _instead(lambda path: path.symlink_to("nowhere")),
}


def damage(rng: random.Random, folder: Path, files: list[Path], others: list[Path] | None = None) -> tuple[str, Path]:
    """Damages one of `files` (below `folder`); what was done to which.

    Args:
        others: whose content may take its place; by default the other ones of the same ending.
    """
    path = rng.choice([f for f in files if f.stat().st_size])
    alike = [f for f in others or files if f != path and f.suffix == path.suffix and f.read_bytes() != path.read_bytes()]
    kind = rng.choice([k for k in KINDS if alike or "another" not in k])
    KINDS[kind](rng, path, alike)
    return f"{path.relative_to(folder)}: {kind.strip()}", path


def files_below(*folders: Path) -> list[Path]:
    return sorted(p for folder in folders for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
