"""Pages of the cache take memory when they are written to, not when they are reserved."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runtime_ref.core.kv_cache import PAGE, Pool, untouched_zeros
from runtime_ref.serve import cache_line

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
from pathlib import Path
import torch
from runtime_ref.core.kv_cache import PAGE, Pool

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

before = resident()
pool = Pool({i: (2, 64, 64) for i in range(4)}, 8000, torch.bfloat16, None)
assert pool.cache_bytes == 4 * 2 * 2 * 8001 * PAGE * 64 * 4 > 2 ** 30
assert resident() - before < 2 ** 24, "reserving touched it"
pool.keys[3][:, 100 * PAGE:200 * PAGE] = 1.5
assert 2 * 100 * PAGE * 64 * 4 <= resident() - before < 2 ** 25
assert float(pool.keys[3].sum()) == 1.5 * 2 * 100 * PAGE * 64 and not pool.values[3].any()
"""


def test_reserved_pages_take_no_memory_until_they_are_written():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_they_are_zeros_of_their_own():
    for dtype in (torch.float32, torch.bfloat16):
        one, other = (untouched_zeros(3, 5, 7, dtype=dtype) for _ in range(2))
        assert one.shape == (3, 5, 7) and one.dtype is dtype and not one.any()
        one[1, 2, 3] = 2
        assert float(one.sum()) == 2 and not other.any()
    assert untouched_zeros(2, 0, 7).shape == (2, 0, 7)


def test_the_server_says_what_its_cache_takes_when_full(make_engine, monkeypatch):
    engine = make_engine(backend="c")
    full = sum(t.nbytes for pool in engine.cache.pools.values() for t in (*pool.keys.values(), *pool.values.values()))
    line = cache_line(engine)
    sizes = f"{engine.options.max_running} sequences of {engine.context:,} tokens, {full / 2**30:.1f} GiB"
    assert line == f"cache: {sizes} when all are full"
    monkeypatch.setattr(os, "sysconf", lambda name: 1)
    assert "more than this machine has (0.0 GiB); --max-running or --max-context lower it" in cache_line(engine)


def test_bytes_of_a_pool_without_layers_are_none():
    assert Pool({}, 3, torch.float32, None).cache_bytes == 0 and PAGE == 64


def test_a_cache_that_no_machine_holds_is_told_with_its_size():
    with pytest.raises(MemoryError, match=r"no room for [\d,]+\.\d GiB of keys or values of one layer"):
        Pool({0: (8, 128, 128)}, 10**10, torch.bfloat16, None)
