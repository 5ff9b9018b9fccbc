"""Compiled code is loaded only if this user compiled it and it is whole."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from storage import compiled as implementation


@pytest.fixture
def cache(tmp_path, monkeypatch):
    (tmp_path / "three.h").write_text("enum { THREE = 3 };\n")
    (tmp_path / "three.c").write_text('#include "three.h"\nint three(void) { return THREE; }\n')
    if implementation.shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("no C compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    temporary = tmp_path / "temporary"
    monkeypatch.setattr(implementation.tempfile, "mkdtemp", lambda **options: os.mkdir(temporary) or temporary)
    return tmp_path / "fp4-dflash"


def compiled(cache, monkeypatch) -> int:
    """How often the compiler ran until the code was there."""
    runs, compile_ = [], implementation._compile
    with monkeypatch.context() as patch:
        patch.setattr(implementation, "_compile", lambda *args: runs.append(1) or compile_(*args))
        found, reason = implementation.load_compiled([cache.parent / "three.c", cache.parent / "three.h"])
    assert found is not None and found.three() == 3, reason
    return len(runs)


def test_a_broken_or_foreign_library_is_compiled_anew_and_never_loaded(cache, monkeypatch):
    os.umask(old := os.umask(0))
    try:
        os.umask(0)
        assert compiled(cache, monkeypatch) == 1
    finally:
        os.umask(old)
    (library,) = cache.glob("*.so")
    assert cache.stat().st_mode & 0o777 == 0o700 and library.stat().st_mode & 0o077 == 0
    assert compiled(cache, monkeypatch) == 0
    for damage in (lambda: library.write_bytes(library.read_bytes()[:4096]), lambda: library.write_bytes(b""),
                   lambda: library.chmod(0o777), lambda: library.with_suffix(".sha256").unlink()):
        content = library.read_bytes()
        library.unlink()  # what is loaded must not change under the process
        library.write_bytes(content)
        library.chmod(0o700)
        damage()
        assert compiled(cache, monkeypatch) == 1
        assert compiled(cache, monkeypatch) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
def test_a_folder_of_another_user_is_not_used_and_nothing_stays_behind(cache, monkeypatch):
    cache.mkdir()
    os.chown(cache, 65534, 65534)
    assert compiled(cache, monkeypatch) == 1
    assert not list(cache.iterdir()) and not (cache.parent / "temporary").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
def test_a_library_of_another_user_is_compiled_anew(cache, monkeypatch):
    assert compiled(cache, monkeypatch) == 1
    (library,) = cache.glob("*.so")
    os.chown(library, 65534, 65534)
    assert compiled(cache, monkeypatch) == 1
    assert library.stat().st_uid == os.geteuid()


def test_a_change_of_any_source_is_compiled_and_a_mistake_in_it_is_one_line(cache, monkeypatch):
    assert compiled(cache, monkeypatch) == 1
    source = cache.parent / "three.c"
    (cache.parent / "three.h").write_text("enum { THREE = 3 }; /* again */\n")
    assert compiled(cache, monkeypatch) == 1
    source.write_text("int three(void) { return nothing; }\n")
    found, reason = implementation.load_compiled([source])
    assert found is None and "cannot compile three.c: " in reason and "nothing" in reason and "\n" not in reason
    monkeypatch.setenv("CC", "no-such-compiler")
    assert implementation.load_compiled([source]) == (None, "no C compiler (no-such-compiler) on this machine")


def test_threads_that_ask_at_once_all_get_the_code(cache):
    sources = [cache.parent / "three.c", cache.parent / "three.h"]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: implementation.load_compiled(sources), range(8)))
    assert all(code is not None and code.three() == 3 for code, _ in found), found


@pytest.mark.parametrize("script", ["exit 3", "exit 0", "echo '\xff'; echo '\xff' >&2; exit 1", None])
def test_a_compiler_that_is_none_is_a_reason_and_no_error(cache, monkeypatch, script):
    compiler = cache.parent / "cc"
    compiler.write_bytes(b"\x7fELF nothing" if script is None else f"#!/bin/sh\n{script}\n".encode("latin-1"))
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    found, reason = implementation.load_compiled([cache.parent / "three.c"])
    assert found is None and "three.c: " in reason and "\n" not in reason and not reason.endswith(": ")


def test_no_home_and_no_temporary_folder_is_a_reason_and_no_error(cache, monkeypatch):
    def nowhere(*args, **options):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(implementation, "user_cache", nowhere)
    assert implementation.load_compiled([cache.parent / "three.c"])[0].three() == 3  # in a temporary folder
    monkeypatch.setattr(implementation.tempfile, "mkdtemp", nowhere)
    found, reason = implementation.load_compiled([cache.parent / "three.c"])
    assert found is None and "Could not determine home directory" in reason
