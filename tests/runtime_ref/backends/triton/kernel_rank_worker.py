"""Started by test_kernel_ranks.py: the same requests on 1, 2, ... ranks with the interpreted kernels (forked, gloo).

    kernel_rank_worker.py FOLDER 1 2

JSON lines, tokens and hashes of logits (the target's and the drafter's): op by op, and with several ranks as megakernels too.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path[0] = str(Path(__file__).resolve().parents[4])

import torch

from runtime_ref.core.batch import DraftRequest, SequenceChunk
from runtime_ref.core.sampling_params import SamplingParams
from runtime_ref.core.tensor_parallel import leave, ranks_from_environment
from runtime_ref.engine.engine import Engine, EngineOptions
from runtime_ref.measure.gpu_suite.steps import use_megakernel
from tests.ports import free_port
from tests.runtime_ref.kernels.quick_interpreter import quick_interpreter


def answers(folder, ranks, megakernel):
    options = EngineOptions(max_context=128, prefix_pages=2, max_running=2)
    engine = Engine.from_folder(folder, ranks=ranks, options=options, backend="triton")
    if megakernel:
        use_megakernel(engine, 1)
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(1, 128, (n,), generator=generator).tolist() for n in (1, 9)]
    params = [SamplingParams(max_tokens=3, ignore_eos=True),
              SamplingParams(max_tokens=3, temperature=0.8, seed=1, ignore_eos=True)]
    tokens = engine.generate(prompts, params)
    tables = engine.cache.tables()
    engine.cache.extend(tables, list(tables), 9)
    logits = engine.backend.run(engine.program, engine.backend.plan([SequenceChunk(tables, 0, prompts[1][:9])]))["logits"]
    engine.cache.extend(tables, list(tables), 20)
    width = len(engine.drafter.target_layers) * engine.backend.config.hidden_size
    target_hidden = torch.randn(5, width, generator=generator).to(torch.bfloat16)
    drafts = torch.cat([engine.drafter.logits([request])[0]
                        for request in (DraftRequest(tables, 5, 9, 7, target_hidden), DraftRequest(tables, 7, 9, 2, None))])
    share = getattr(engine.drafter, "drafter", engine.drafter).share
    if ranks.rank == 0:
        print(json.dumps({"ranks": ranks.count, "rank": ranks.rank, "megakernel": megakernel, "tokens": tokens,
                          "logits": hashed(logits), "drafts": hashed(drafts), "drafters": share.ranks.count,
                          "parts": [share.parts_o, share.parts_down]}), flush=True)


def hashed(logits):
    assert not logits.isnan().any()
    return hashlib.sha256(logits.numpy().tobytes()).hexdigest()


def child(folder, rank, count, port):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    ranks = ranks_from_environment()
    with quick_interpreter():
        for megakernel in (False, True)[:count]:
            answers(folder, ranks, megakernel)
    leave(ranks)


def run(folder, count):
    port = free_port()
    children = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            child(folder, rank, count, port)
            os._exit(0)
        children.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


if __name__ == "__main__":
    _, folder, *counts = sys.argv
    if any(any(run(folder, int(count))) for count in counts):
        sys.exit(1)
