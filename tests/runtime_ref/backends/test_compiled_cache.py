"""Compiled ops are loaded only if this user compiled them and they are whole."""

import os

import pytest

from runtime_ref.backends.c import structs

QUICK = ("-O0", "-march=native", "-fno-math-errno", "-std=gnu11", "-shared", "-fPIC")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    if structs.shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("no C compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    temporary = tmp_path / "temporary"
    monkeypatch.setattr(structs.tempfile, "mkdtemp", lambda **options: os.mkdir(temporary) or temporary)
    return tmp_path / "fp4-dflash"


def compiled(monkeypatch) -> int:
    """How often the compiler ran until the ops were there."""
    runs, compile_ = [], structs._compile
    with monkeypatch.context() as patch:
        patch.setattr(structs, "_compile", lambda *args: runs.append(1) or compile_(*args))
        structs.compiled_ops.cache_clear()
        library, reason = structs.compiled_ops(QUICK)
        structs.compiled_ops.cache_clear()
    assert library is not None, reason
    return len(runs)


def test_a_broken_or_foreign_library_is_compiled_anew_and_never_loaded(cache, monkeypatch):
    os.umask(old := os.umask(0))
    try:
        os.umask(0)
        assert compiled(monkeypatch) == 1
    finally:
        os.umask(old)
    (library,) = cache.glob("*.so")
    assert cache.stat().st_mode & 0o777 == 0o700 and library.stat().st_mode & 0o077 == 0
    assert compiled(monkeypatch) == 0
    for damage in (lambda: library.write_bytes(library.read_bytes()[:4096]), lambda: library.write_bytes(b""),
                   lambda: library.chmod(0o777), lambda: library.with_suffix(".sha256").unlink()):
        content = library.read_bytes()
        library.unlink()  # what is loaded must not change under the process
        library.write_bytes(content)
        library.chmod(0o700)
        damage()
        assert compiled(monkeypatch) == 1
        assert compiled(monkeypatch) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
def test_a_folder_of_another_user_is_not_used_and_nothing_stays_behind(cache, monkeypatch):
    cache.mkdir()
    os.chown(cache, 65534, 65534)
    assert compiled(monkeypatch) == 1
    assert not list(cache.iterdir()) and not (cache.parent / "temporary").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
def test_a_library_of_another_user_is_compiled_anew(cache, monkeypatch):
    assert compiled(monkeypatch) == 1
    (library,) = cache.glob("*.so")
    os.chown(library, 65534, 65534)
    assert compiled(monkeypatch) == 1
    assert library.stat().st_uid == os.geteuid()
