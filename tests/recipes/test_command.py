"""A job's mistakes are one line on every process, with the rank of all but the first."""

import errno
import importlib
import sys
from pathlib import Path

import pytest

from recipes.command import job_parser, parse_job, run_command

TINY = str(Path(__file__).resolve().parents[2] / "recipes" / "tiny.yaml")


def full_disk(recipe):
    raise OSError(errno.ENOSPC, "No space left on device", "x.bin")


@pytest.mark.parametrize("rank, prefix", [(None, ""), ("0", ""), ("3", "rank 3: ")])
@pytest.mark.parametrize("override, code, words", [("qat.stepz=3", 2, "unknown key qat.stepz"),
                                                   ("qat.steps=3", 1, "x.bin: cannot be read or written: No space left")])
def test_every_process_says_what_stopped_it(capsys, monkeypatch, rank, prefix, override, code, words):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert run_command(TINY, [override], full_disk) == code
    said = capsys.readouterr().err
    assert said.startswith(f"{prefix}error: ") and words in said and said.count("\n") == 1


def test_ctrl_c_outside_of_a_training_loop_is_one_line(tmp_path, capsys):
    def job(recipe):
        raise KeyboardInterrupt

    assert run_command(TINY, [], job) == 130
    said = capsys.readouterr().err
    assert said.startswith("interrupted; ") and "--resume" in said and said.count("\n") == 1


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")])
def test_no_memory_is_one_line(error, capsys):
    def job(recipe):
        raise error

    assert run_command(TINY, [], job) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: not enough memory: ") and "--plan" in said and said.count("\n") == 1


@pytest.mark.parametrize("script", ["qat.train", "dflash_train.train"])
def test_a_plan_is_printed_once_however_many_processes_there_are(script, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "path", [str(Path(TINY).parents[1]), *sys.path])  # whose first entry entry scripts replace
    assert importlib.import_module(script).main([TINY, "--plan"]) == 0
    said = capsys.readouterr()
    assert said.out == said.err == ""


@pytest.mark.parametrize("option", ["--resum", "--max", "--pl"])
def test_an_option_that_is_cut_short_is_a_mistake_as_a_misspelt_key_is(option, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_job(job_parser("job", "a job", "job"), [TINY, option])
    assert ended.value.code == 2 and option in capsys.readouterr().err
