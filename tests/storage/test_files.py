"""Files and folders are the old or the new, whatever happens; what somebody else made is never cleared away."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from storage import files
from storage.digests import combined, differences, file_digests, model_digests
from storage.files import bound_earlier, folder_aside, next_free, write_bytes, write_json, write_text
from storage.locks import Lock, Locked
from storage.reading import first_line, inner_name, json_lines, read_json
from storage.terminal import printable, printable_line

ROOT = Path(__file__).resolve().parents[2]


def test_a_file_is_replaced_whole_and_keeps_its_rights(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_text(path, "old")
    path.chmod(0o640)
    write_json(path, {"b": "ü", "a": 1})
    assert json.loads(path.read_text()) == {"b": "ü", "a": 1} and path.stat().st_mode & 0o777 == 0o640
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_a_link_stays_and_a_pipe_is_written_to(tmp_path):
    (tmp_path / "real").write_text("x")
    (tmp_path / "link").symlink_to("real")
    write_text(tmp_path / "link", "y")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "y"
    done = subprocess.run([sys.executable, "-c", "from pathlib import Path; from storage.files import write_text; "
                           "write_text(Path('/dev/stdout'), 'said')"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "said"


def test_a_pipe_that_nobody_reads_is_an_error_and_no_wait(tmp_path):
    os.mkfifo(tmp_path / "environment.json")
    with pytest.raises(OSError, match="a pipe that nobody reads"):
        write_text(tmp_path / "environment.json", "x")


def test_a_pipe_takes_more_than_it_holds_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "read").open("wb") as out:
        reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=out)
    for _ in range(500):  # until it has opened its end
        try:
            write_text(tmp_path / "pipe", "x" * 300_000)
            break
        except OSError:
            time.sleep(0.01)
    assert reader.wait(60) == 0 and (tmp_path / "read").read_text() == "x" * 300_000


def test_a_failed_write_names_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    write_text(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError) as error:
        write_bytes(tmp_path / "a", b"new")
    assert error.value.filename == str(tmp_path / "a")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def fill(folder: Path, text: str) -> None:
    for i in range(20):
        (folder / f"{i}").write_text(text)


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_takes_anothers_place_whole(exchange, tmp_path, monkeypatch):
    if not exchange:
        monkeypatch.setattr(files.ctypes, "CDLL", lambda *a, **k: object())
    final = tmp_path / "model"
    for text in ("one", "two"):
        with folder_aside(final) as partial:
            assert not any(p.name != files.MARK for p in partial.iterdir())
            fill(partial, text)
        assert {p.read_text() for p in final.iterdir()} == {text}
        assert [p.name for p in tmp_path.iterdir()] == ["model"] and len(list(final.iterdir())) == 20
    with pytest.raises(RuntimeError), folder_aside(final) as partial:
        fill(partial, "three")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["model"] and (final / "0").read_text() == "two"


def test_killed_while_folders_are_replaced_each_is_whole_and_the_next_one_goes_on(tmp_path):
    script = """
import sys
from pathlib import Path
from storage.files import folder_aside
print("go", flush=True)
n = 0
while True:
    n += 1
    with folder_aside(Path(sys.argv[1])) as partial:
        for i in range(30):
            (partial / str(i)).write_text(sys.argv[2] + str(n))
"""
    final = tmp_path / "model"
    for attempt in range(12):
        process = subprocess.Popen([sys.executable, "-c", script, final, f"{attempt}-"], cwd=ROOT, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.02 + 0.013 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if final.exists():
            held = [p.read_text() for p in final.iterdir() if p.name != files.MARK]
            assert len(held) == 30 and len(set(held)) == 1
    with folder_aside(final) as partial:
        fill(partial, "last")
    assert [p.name for p in tmp_path.iterdir()] == ["model"] and {p.read_text() for p in final.iterdir()} == {"last"}


def test_a_folder_that_is_half_cleared_is_still_ours(tmp_path, monkeypatch):
    partial = tmp_path / "model.partial"
    files.begin_folder(partial)
    fill(partial, "one")
    (partial / "deeper").mkdir()
    real, calls = Path.unlink, []

    def killed(self, *arguments, **options):
        calls.append(self)
        if len(calls) in (1, 8, 20):
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "unlink", killed)
    for _ in range(4):
        with contextlib.suppress(KeyboardInterrupt):
            files.discard_folder(partial)
        assert not partial.exists() or files.is_unfinished(partial)
    assert not partial.exists()


def test_what_somebody_else_made_is_refused_and_stays(tmp_path):
    mine = tmp_path / "model.partial"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    with pytest.raises(FileExistsError, match="model.partial: exists and is not the unfinished result"):
        with folder_aside(tmp_path / "model"):
            pass
    assert (mine / "thesis.txt").read_text() == "years"
    assert next_free(tmp_path / "model").name == "model.1"


HOLD = """
import sys, time
from pathlib import Path
from storage.locks import Lock
with Lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def holder(target: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, target], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_names_its_holder_and_ends_with_it_however_it_ends(tmp_path):
    target = tmp_path / "qat"
    process = holder(target)
    with pytest.raises(Locked, match=f"qat: process {process.pid} on .*since .*is writing it; stop it first"):
        Lock(target).__enter__()
    process.kill()
    process.wait()
    with Lock(target) as lock, Lock(target):  # the file that the killed one left is taken; one's own lock can be taken again
        assert json.loads(lock.path.read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_the_lock_of_another_machine_is_believed_while_it_gives_signs_of_life(tmp_path):
    target = tmp_path / "qat"
    path = tmp_path / ".qat.lock"
    path.write_text(json.dumps({"host": "far", "boot": "another", "pid": 7, "since": "today", "command": "train"}))
    with pytest.raises(Locked, match="process 7 on far .*its last sign of life is \\d+ s old; if it is gone, try again in"):
        Lock(target).__enter__()
    os.utime(path, (time.time() - 1000,) * 2)
    with Lock(target):
        pass
    path.write_bytes(b"\xff not JSON")  # a file that says nothing belongs to nobody
    with Lock(target):
        pass


def test_many_processes_at_once_one_at_a_time(tmp_path):
    script = """
import sys, time
from pathlib import Path
from storage.locks import Lock, Locked
folder = Path(sys.argv[1])
for _ in range(40):
    try:
        with Lock(folder / "x"):
            (folder / "inside").mkdir()  # fails if another one is there
            (folder / "inside").rmdir()
            print("in")
    except Locked:
        time.sleep(0.001)
"""
    many = [subprocess.Popen([sys.executable, "-c", script, tmp_path], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT) for _ in range(4)]
    said = [process.communicate()[0] for process in many]
    assert all(process.returncode == 0 for process in many), said
    assert "".join(said).count("in") >= 4


def test_digests_are_kept_until_somebody_writes(tmp_path, monkeypatch):
    from storage import digests

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"x" * 100)
    (folder / "notes.txt").write_text("no part of the model")
    first = model_digests(folder)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="read again"):
        patch.setattr(digests, "SETTLED_SECONDS", 1000.0)  # the next change could have the time of the last one
        model_digests(folder)
        patch.setattr(digests, "sha256", lambda path: (_ for _ in ()).throw(RuntimeError("read again")))
        model_digests(folder)
    time.sleep(0.1)
    monkeypatch.setattr(digests, "SETTLED_SECONDS", 0.1)
    model_digests(folder)
    assert first.keys() == {"a.safetensors"} and (tmp_path / "cache/fp4-dflash").stat().st_mode & 0o777 == 0o700
    with monkeypatch.context() as patch:
        patch.setattr(digests, "sha256", lambda path: pytest.fail("read again"))
        assert model_digests(folder) == first
    date = (folder / "a.safetensors").stat()
    (folder / "a.safetensors").write_bytes(b"x" * 99 + b"y")  # same size, and the date set back
    os.utime(folder / "a.safetensors", ns=(date.st_atime_ns, date.st_mtime_ns))
    (folder / "config.json").write_text("{}")
    now = model_digests(folder)
    assert differences(first, now) == ["a.safetensors changed", "config.json is new"] and combined(now) != combined(first)
    (tmp_path / "cache/fp4-dflash/digests.json").write_text('{"x": 1, "y": [1, 2')
    assert model_digests(folder) == now == file_digests(folder, sorted(now))


@pytest.mark.parametrize("content, words", [
    (b"{", ":1: not valid JSON"), (b"\xff{}", "not UTF-8"), (b"[]", "expected a JSON object, found list"),
    (b"[" * 100_000, "not valid JSON"), (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON"), (b"", ":1: not valid JSON")])
def test_a_bad_json_file_is_one_line_with_its_name(content, words, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_json(tmp_path / "a.json")
    assert words in str(error.value) and "a.json" in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for name, words in (("pipe.json", "not an ordinary file"), (".", "not an ordinary file"), ("none", "no such file")):
        with pytest.raises(ValueError, match=words):
            read_json(tmp_path / name)


def test_lines_that_are_no_objects_are_none(tmp_path):
    (tmp_path / "a").write_bytes(b'{"a": 1}\n[]\n\xff\n{"b"\n{"c": 2}')
    assert list(json_lines(tmp_path / "a")) == [(1, {"a": 1}), (2, None), (3, None), (4, None), (5, {"c": 2})]


def test_names_that_lead_out_of_a_folder_are_none_of_its_own():
    assert all(map(inner_name, ("a", "a/b", "...", ".a", "a..b")))
    assert not any(map(inner_name, ("", ".", "..", "../a", "a/../b", "/a", "a\\b", "a\0", 3, None)))


def test_control_characters_are_shown_not_obeyed():
    assert printable("a\x1b[2J\x07\x9b\u202e\u2028\ud800\tb\nü") == "a\\x1b[2J\\x07\\x9b\\u202e\\u2028\\ud800\tb\nü"
    assert printable_line("a\nb\tc") == "a\\nb\\tc"
    assert first_line(ValueError("\n  x \ny")) == "x" and first_line(KeyError()) == "KeyError"


def test_only_results_that_were_set_aside_are_removed_and_the_newest_stay(tmp_path, capsys):
    run = tmp_path / "qat"
    for name in ("qat", "qat.2", "qat.9", "qat.10", "qat.11.old", "qat.12", "qat.best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "resolved.yaml").touch()
    (tmp_path / "qat.12" / "resolved.yaml").unlink()  # somebody else's
    assert next_free(run).name == "qat.13"
    bound_earlier(run, "resolved.yaml", None)
    assert "3, 0 bytes in all" in capsys.readouterr().out and len(list(tmp_path.iterdir())) == 7
    bound_earlier(run, "resolved.yaml", 1)
    assert {p.name for p in tmp_path.iterdir()} == {"qat", "qat.10", "qat.11.old", "qat.12", "qat.best"}
    bound_earlier(run, "resolved.yaml", 0)
    assert {p.name for p in tmp_path.iterdir()} == {"qat", "qat.11.old", "qat.12", "qat.best"}
