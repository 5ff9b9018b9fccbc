"""Started by test_ranks.py: runs the same requests on 1, 2, 4 and 8 ranks (forked, gloo) and prints what rank 0 saw.

    rank_worker.py FOLDER same 1 2 4 8      one JSON line per number of ranks: tokens, and a hash of the logits
    rank_worker.py FOLDER same-on-torch 1 2 the same, on the torch backend
    rank_worker.py FOLDER persistent 1 2    the same with steps and drafts in one launch each (kernels only)
    rank_worker.py FOLDER die 2             the last rank ends in the middle; what the others say goes to stderr
    rank_worker.py FOLDER fail 4            rank 0's engine raises in the middle, and its process lives on for a while
"""

import contextlib
import hashlib
import json
import os
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch

from runtime_ref.core.batch import SequenceChunk
from runtime_ref.core.sampling_params import SamplingParams
from runtime_ref.core.tensor_parallel import RankLost, leave, ranks_from_environment
from runtime_ref.engine.engine import Engine, EngineOptions
from tests.pace import INTERPRETED, KERNELS
from tests.ports import free_port


def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 260, (n,), generator=generator).tolist() for n in (3, 17, 70)]


# What `test_ranks.py` asks for: the kernels (tests/pace.py) or the default.
BACKEND = "triton" if KERNELS else "auto"


def same(folder, ranks, pipe, backend=BACKEND, launch="ops"):
    options = EngineOptions(max_context=256, max_running=3)
    engine = Engine.from_folder(folder, ranks=ranks, options=options, backend=backend, launch=launch)
    params = [SamplingParams(max_tokens=8, ignore_eos=True), SamplingParams(max_tokens=8, temperature=0.8, seed=1),
              SamplingParams(max_tokens=8, temperature=0.8, seed=2, rule="rejection")]
    tokens = engine.generate(prompts(), params)
    engine.cache.clear_prefixes()
    tables = engine.cache.tables()
    engine.cache.extend(tables, list(tables), 17)
    step = engine.backend.plan([SequenceChunk(tables, 0, prompts()[1])])
    logits = engine.backend.run(engine.program, step)["logits"][:17]
    if ranks.rank == 0:
        found = {"ranks": ranks.count, "tokens": tokens, "logits": hashlib.sha256(logits.numpy().tobytes()).hexdigest(),
                 "experts": engine.backend.weights.packed_bytes, "launch": engine.launch.chosen}
        os.write(pipe, (json.dumps(found) + "\n").encode())


def same_on_torch(folder, ranks, pipe):
    same(folder, ranks, pipe, "torch")


def persistent(folder, ranks, pipe):
    same(folder, ranks, pipe, launch="persistent")


def die(folder, ranks, pipe):
    engine = Engine.from_folder(folder, ranks=ranks, options=EngineOptions(max_context=256), backend=BACKEND,
                                launch="ops")
    for prompt in prompts():
        engine.add(prompt, SamplingParams(max_tokens=100, ignore_eos=True))
    for number in range(100):
        if number == 3 and ranks.rank == ranks.count - 1:
            os._exit(9)
        engine.step()


def fail(folder, ranks, pipe):
    engine = Engine.from_folder(folder, ranks=ranks, options=EngineOptions(max_context=256), backend=BACKEND,
                                launch="ops")
    for prompt in prompts():
        engine.add(prompt, SamplingParams(max_tokens=100, ignore_eos=True))
    for _ in range(3):
        engine.step()
    if ranks.rank == 0:
        engine.scheduler.plan = lambda: 1 / 0
    began = time.monotonic()
    try:
        for _ in range(100):
            engine.step()
    except ZeroDivisionError:
        time.sleep(20)  # as a server does that answers 503
    except RankLost:
        os.write(pipe, (json.dumps({"rank": ranks.rank, "waited": time.monotonic() - began}) + "\n").encode())
        raise


def slow(folder, ranks, pipe):
    """Rank 0 is late before the ranks have settled, which may take as long as it takes, and afterwards, which may not."""
    if ranks.rank == 0:
        time.sleep(3)
    ranks.shorten_timeout(timeout_seconds=1)
    began = time.monotonic()
    if ranks.rank == 0:
        time.sleep(12)
    try:
        ranks.broadcast("late")
    except RankLost:
        if ranks.rank == 1:
            os.write(pipe, (json.dumps({"waited": time.monotonic() - began}) + "\n").encode())
        raise


def quick():
    from tests.runtime_ref.kernels.quick_interpreter import quick_interpreter

    return quick_interpreter()


def child(job, folder, rank, count, port, pipe):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    ranks = ranks_from_environment()
    try:
        with quick() if INTERPRETED else contextlib.nullcontext():
            job(folder, ranks, pipe)
    except RankLost as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
    leave(ranks)
    os._exit(0)


def run(job, folder, count):
    port = free_port()
    began = time.monotonic()
    children = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            child(job, folder, rank, count, port, 1)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    return codes, time.monotonic() - began


if __name__ == "__main__":
    _, folder, name, *counts = sys.argv
    job = {"same": same, "same-on-torch": same_on_torch, "persistent": persistent, "die": die, "fail": fail, "slow": slow}[name]
    for count in map(int, counts):
        codes, seconds = run(job, folder, count)
        print(json.dumps({"codes": codes, "seconds": round(seconds, 1)}), flush=True)
