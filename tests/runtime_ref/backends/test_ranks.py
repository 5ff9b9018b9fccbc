"""Contract C5: any number of ranks gives the tokens and the logits of one; a rank that dies takes the others along."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pace import INTERPRETED, KERNELS, seconds

from runtime_ref.checkpoints.load import load_target
from runtime_ref.core import tensor_parallel as parallel
from runtime_ref.core.tensor_parallel import Ranks, ranks_from_environment, shares

not_the_backends = pytest.mark.skipif(KERNELS, reason="the same for every backend: runs with the default one")
WORKER = Path(__file__).with_name("rank_worker.py")


def run_worker(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run([sys.executable, str(WORKER), *map(str, arguments)], capture_output=True, text=True,
                          timeout=seconds(300), env=environment)


# The kernels cut an expert of the embedded model into four parts of 64: of eight ranks, two hold the same one.
OF_THE_BACKEND = ([] if INTERPRETED else [pytest.param("persistent", [1, 2], marks=pytest.mark.long)] if KERNELS else
                  [("same-on-torch", [1, 4])])


@pytest.mark.parametrize("job, counts", [("same", [1, 2]), pytest.param("same", [1, 4, 8], marks=pytest.mark.long),
                                         *OF_THE_BACKEND])
def test_tokens_and_logits_of_many_ranks_are_those_of_one(folder, job, counts):
    done = run_worker(folder, job, *counts)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    found = [line for line in lines if "tokens" in line]
    assert [line["ranks"] for line in found] == counts, done.stderr[-2000:]
    assert all(code == 0 for line in lines if "codes" in line for code in line["codes"])
    if job == "persistent":
        assert all(line["launch"] == {"target": "persistent", "drafter": "persistent"} for line in found)
    for line in found[1:]:
        assert line["tokens"] == found[0]["tokens"]
        assert line["logits"] == found[0]["logits"]
    assert [found[0]["experts"] / line["experts"] for line in found] == counts


@not_the_backends
def test_a_dead_rank_ends_the_others_within_seconds_with_one_line(folder):
    done = run_worker(folder, "die", 2)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["codes"] == [1, 9]
    said = [line for line in done.stderr.splitlines() if "another of the 2 ranks ended" in line]
    assert len(said) == 1 and "Traceback" not in done.stderr
    assert report["seconds"] < 100  # a rank that is only late is waited for much longer


@not_the_backends
@pytest.mark.slow
def test_ranks_wait_for_a_slow_one_until_all_have_loaded_and_no_longer(folder):
    done = run_worker(folder, "slow", 2)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert 0.5 < lines[0]["waited"] < 10, done.stderr  # seconds; rank 0 is silent for 12
    assert lines[-1]["codes"][1] == 1 and "does not answer" in done.stderr


@not_the_backends
@pytest.mark.slow
def test_an_engine_that_fails_on_rank_0_ends_the_others_although_its_process_lives(folder):
    done = run_worker(folder, "fail", 4)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert sorted(line["rank"] for line in lines if "rank" in line) == [1, 2, 3]
    assert all(line["waited"] < 15 for line in lines if "waited" in line)  # the process itself stays for 20 s
    assert len([line for line in done.stderr.splitlines() if "another of the 4 ranks ended" in line]) == 3


@pytest.mark.parametrize("size, parts", [(8, 8), (64, 8), (12, 4), (6, 2), (33, 1)])
def test_parts_do_not_depend_on_the_number_of_ranks(size, parts):
    assert shares(size) == parts
    for count in (1, 2, 4, 8):
        if parts % count:
            with pytest.raises(ValueError, match=f"{count} ranks.*{parts} parts"):
                Ranks(0, count).part(size)
        else:
            covered = [i for rank in range(count) for i in range(*Ranks(rank, count).part(size).indices(parts))]
            assert covered == list(range(parts))


def test_ranks_together_hold_every_packed_byte_once(folder):
    whole = load_target(folder).packed_bytes
    assert sum(load_target(folder, Ranks(rank, 4)).packed_bytes for rank in range(4)) == whole


@pytest.mark.parametrize("gpus, spoken", [(0, "gloo"), (1, "gloo"), (2, "cpu:gloo,cuda:nccl")])
def test_what_lies_on_gpus_goes_over_nccl_if_each_rank_has_one(monkeypatch, gpus, spoken):
    said = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(parallel.torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(parallel.torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda backend, **options: said.append(backend))
    monkeypatch.setattr(parallel.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(parallel.dist, "get_world_size", lambda: 2)
    assert ranks_from_environment() == Ranks(1, 2) and said == [spoken]
