"""Which bytes a folder holds: SHA-256 of whole files, made once for as long as they stay as they are.

A sum is kept in the user's cache with what the system knows of the file it belongs to: inode, size, times of writing and of
any change. The last one (`ctime`) moves with every write, rename or `touch`, and no program can set it back; so
an edit that keeps the size and the date is seen, and a folder that nobody touched costs a `stat` per file. It moves in steps,
though, of some milliseconds or, on some shared file systems, of a second: the sum of a file that was changed within the last
`SETTLED_SECONDS` is not kept, because the next change could leave the same time.

Cost of making them: every byte is read once, 1 to 2 GB/s for each of up to eight threads, or what the disk gives: a model of
60 GB takes about ten seconds from memory. What is read again right after comes from the page cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from storage.cache import user_cache
from storage.files import write_json
from storage.reading import read_json, sha256

THREADS = 8
MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.distcp", ".metadata",
               "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
               "chat_template*", "vocab.json", "merges.txt", "*.py")
KEPT = 10_000  # sums in the cache; the oldest go
SETTLED_SECONDS = 1.0


def stamp(path: Path) -> list[int]:
    """What the system knows of a file without reading it; equal as long as nobody writes to it."""
    found = path.stat()
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def stamps(folder: Path) -> list:
    """Name and `stamp` of every file below `folder`: equal as long as nobody writes there."""
    return [[p.relative_to(folder).as_posix(), *stamp(p)] for p in sorted(folder.rglob("*")) if p.is_file()]


def file_digests(folder: Path, names: list[str], *, anew: bool = True) -> dict[str, str]:
    """SHA-256 (hex) of the files `names` in `folder`.

    Args:
        anew: read all of them; otherwise sums are taken from the cache where nobody wrote to the file since.

    Raises:
        ValueError: a file is missing or no ordinary one.
    """
    cache = None if anew else _cache()
    known = _known(cache)
    paths = {name: Path(os.path.realpath(folder / name)) for name in names}
    settled = time.time_ns() - int(SETTLED_SECONDS * 1e9)
    stamps = {name: stamp(path) if path.exists() else [] for name, path in paths.items()}
    found = {name: known[str(path)][1] for name, path in paths.items()
             if str(path) in known and known[str(path)][0] == stamps[name]}
    missing = [name for name in names if name not in found]
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        for name, digest in zip(missing, pool.map(lambda name: sha256(paths[name]), missing), strict=True):
            found[name] = digest
    if cache is not None and missing:
        known |= {str(paths[name]): [stamps[name], found[name]] for name in missing if stamps[name][-1] < settled}
        with contextlib.suppress(OSError):  # a cache that cannot be kept is made again
            write_json(cache, dict(list(known.items())[-KEPT:]))
    return {name: found[name] for name in names}


def combined(digests: dict[str, str]) -> str:
    """One digest (16 hex digits) of several files' names and sums."""
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(was: dict[str, str], now: dict[str, str]) -> list[str]:
    """What differs between two folders, one entry a file: "a changed", "b is missing", "c is new"."""
    return [f"{name} {'is missing' if name not in now else 'is new' if name not in was else 'changed'}"
            for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name)]


def model_files(folder: Path) -> list[str]:
    """Names of the files in a model's or drafter's folder that decide what it says: weights, configuration, tokenizer, code."""
    return sorted({f.name for pattern in MODEL_FILES for f in folder.glob(pattern) if f.is_file()})


def model_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each of `model_files`, from the cache where it is known. Raises ValueError: a file cannot be read."""
    return file_digests(folder, model_files(folder), anew=False)


def _cache() -> Path | None:
    try:
        return user_cache() / "digests.json"
    except OSError:
        return None


def _known(cache: Path | None) -> dict[str, list]:
    if cache is None or not cache.is_file():
        return {}
    try:
        found = read_json(cache)
    except ValueError:
        return {}
    return {path: entry for path, entry in found.items()
            if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)}


def json_digest(value: object) -> str:
    """SHA-256 (hex) of a JSON value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def with_sum(content: dict) -> dict:
    """A JSON object with the digest of everything else in it, by which `require_sum` knows that it is as it was written."""
    content = json.loads(json.dumps(content))
    return content | {"sum": json_digest(content)}


def require_sum(content: dict, path: Path) -> dict:
    """What was read of `path`, without its sum. Raises ValueError for another content; one without a sum is an older one."""
    rest = {key: value for key, value in content.items() if key != "sum"}
    if "sum" in content and content["sum"] != json_digest(rest):
        raise ValueError(f"{path}: not as it was written (its sum differs); expected the file of the run")
    return rest
