"""Contract C5 for the kernels: any number of ranks makes the bits of one, op by op (sums gathered outside) and as a megakernel
(sums over ranks inside the kernel, in memory that all ranks map); a sum that does not wait for its peers is found."""

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")

import triton
import triton.language as tl

from runtime_ref.backends.triton import megakernel as persistent
from runtime_ref.backends.triton.backend import TritonBackend
from runtime_ref.backends.triton.megakernel import Megakernel
from runtime_ref.checkpoints.device_weights import load_kernel_weights
from runtime_ref.core.batch import SequenceChunk
from runtime_ref.core.kv_cache import KvCache
from runtime_ref.core.program import target_program
from runtime_ref.core.tensor_parallel import SINGLE_RANK, Ranks
from runtime_ref.kernels.experimental import megakernel as kernel
from runtime_ref.kernels.experimental.symmetric_memory import Symmetric
from runtime_ref.kernels.repack import unpack_pages
from runtime_ref.kernels.tp_reduction import ExpertShare, Parts, expert_share, layer_parts, parts_of
from tests.runtime_ref.backends.triton.conftest import small_config
from tests.runtime_ref.conftest import random_drafter, random_target, write_native
from tests.runtime_ref.kernels.at_once import SECONDS, at_once, fixed_program, shared

WORKER = Path(__file__).with_name("kernel_rank_worker.py")
MANY = 1 << 30  # polls: the harness's time limit, not the kernel's, ends a deadlock
RANKS, PROGRAMS = 2, 2
SHARED = {"num_attention_heads": 4, "num_key_value_heads": 2, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
          "moe_intermediate_size": 128}


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory):
    """A model that two ranks can share: o_proj in 4 parts, the dense layer in 4, the experts in 2."""
    config = small_config(**SHARED)
    drafter = random_drafter(config, target_layer_ids=[0, 2], num_hidden_layers=1, intermediate_size=64, mask_token_id=129,
                             num_attention_heads=2, num_key_value_heads=1)
    return write_native(tmp_path_factory.mktemp("shared"), random_target(config), drafter.to(torch.bfloat16).float())


class InOneProcess(Symmetric):
    """The memory of all ranks, made before the processes are forked."""

    def __init__(self, ranks, half, places, device):
        if not hasattr(InOneProcess, "pieces"):
            InOneProcess.pieces = [(shared(torch.full((2 * half,), float("nan"))),
                                    shared(torch.zeros(places * ranks.count, dtype=torch.int32))) for _ in range(ranks.count)]
        self.ranks, self.half = ranks, half
        self.launches = shared(torch.zeros(1, dtype=torch.int32))
        self.buffers, self.signals = (torch.tensor([piece[i].data_ptr() for piece in self.pieces]) for i in range(2))


def a_step(backend):
    """A step of 9 rows of two sequences: 60 and 20 tokens lie in the cache."""
    ids = torch.randint(1, 128, (9,), generator=torch.Generator().manual_seed(5)).tolist()
    cache = KvCache(backend.pools, prefix=False)
    tables = [cache.tables() for _ in range(2)]
    for own in tables:
        cache.extend(own, list(own), 80)
    return backend.plan([SequenceChunk(tables[0], 60, ids[:7]), SequenceChunk(tables[1], 20, ids[7:], "last")])


@pytest.fixture(scope="module")
def alone_and_shared(shared_folder):
    """(what one rank makes op by op, tasks, (backend, step) of each of RANKS ranks): the caches of the ranks are its heads."""
    def made(ranks):
        weights = load_kernel_weights(shared_folder, ranks)
        return TritonBackend(weights, pages={"full": 6, "window": 6}, positions=128)

    alone, backends = made(SINGLE_RANK), [made(Ranks(rank, RANKS)) for rank in range(RANKS)]
    program = target_program(alone.config, [0, 2])
    for kind, pool in alone.pools.items():
        for name in ("all_keys", "all_values"):
            whole = getattr(pool, name).normal_()
            for backend, own in zip(backends, whole.chunk(RANKS, 1), strict=True):
                getattr(backend.pools[kind], name).copy_(own)
    expected = alone.run(program, a_step(alone))
    return expected, program, [(backend, a_step(backend)) for backend in backends]


def ranks_at_once(alone_and_shared, monkeypatch, launches=2, seconds=SECONDS):
    """Whether RANKS x PROGRAMS processes end, and every rank has the bits of one rank alone after each kernel."""
    expected, program, ranks = alone_and_shared
    monkeypatch.setattr(persistent, "Symmetric", InOneProcess)
    monkeypatch.delattr(InOneProcess, "pieces", raising=False)
    calls, found = [], []
    for backend, step in ranks:
        megakernel = Megakernel(backend, program, programs=PROGRAMS, polls=MANY)
        logits, target_hidden = torch.full((8, 65), float("nan")), torch.full((2, 9, 64), float("nan"), dtype=torch.bfloat16)
        arguments, constants = megakernel.arguments(step, logits, target_hidden)
        for value in arguments.values():
            if isinstance(value, torch.Tensor):
                shared(value)
        calls.append((arguments, constants))
        found.append((logits, target_hidden, megakernel))

    ended = [multiprocessing.get_context("fork").Barrier(PROGRAMS) for _ in range(RANKS)]

    def job(process):
        rank, program = divmod(process, PROGRAMS)
        fixed_program(program, PROGRAMS)
        for _ in range(launches):
            kernel.step_kernel[(1,)](**calls[rank][0], **calls[rank][1])
            ended[rank].wait()  # a launch begins when all programs of the one before have ended

    codes = at_once(RANKS * PROGRAMS, job, seconds)
    monkeypatch.delattr(InOneProcess, "pieces", raising=False)
    same = torch.equal(torch.cat([logits for logits, _, _ in found], 1), expected["logits"])
    for _, target_hidden, megakernel in found:
        same = same and all(torch.equal(own, expected[f"target_hidden.{i}"])
                            for own, i in zip(target_hidden, (0, 2), strict=True))
        same = same and int(megakernel.symmetric.launches) == launches and not megakernel.scratch["failed"].any()
    return codes == [0] * RANKS * PROGRAMS and same


def test_two_ranks_of_two_programs_make_the_bits_of_one_rank_alone(alone_and_shared, monkeypatch):
    assert ranks_at_once(alone_and_shared, monkeypatch)


@triton.jit
def no_wait(signals, place, rank, epoch, failed, RANKS: tl.constexpr, POLLS: tl.constexpr):
    """What a sum that forgets its peers would call."""
    tl.debug_barrier()


def test_a_sum_that_does_not_wait_for_its_peers_is_found(alone_and_shared, monkeypatch):
    monkeypatch.setattr(kernel, "wait_ranks", no_wait)
    monkeypatch.setattr(kernel, "_add_product", triton.jit(kernel._add_product.fn))  # what a kernel calls is compiled once
    monkeypatch.setattr(kernel, "step_kernel", triton.jit(kernel.step_kernel.fn))
    assert not ranks_at_once(alone_and_shared, monkeypatch, launches=1, seconds=60)


@pytest.fixture(scope="module")
def answers(shared_folder):
    """Lines of the worker: an engine of one rank op by op, of two ranks op by op and as megakernels."""
    done = subprocess.run([sys.executable, str(WORKER), str(shared_folder), "1", "2"], capture_output=True, text=True,
                          timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_tokens_and_logits_of_two_ranks_are_those_of_one(answers):
    """The drafter's too, which the ranks share: its products are cut into two parts (o_proj) and four (down)."""
    assert [(line["drafters"], line["parts"]) for line in answers] == [(1, [2, 4]), (2, [1, 2]), (2, [1, 2])]
    assert [(line["ranks"], line["rank"], line["megakernel"]) for line in answers] == [
        (1, 0, False), (2, 0, False), (2, 0, True)]
    for line in answers[1:]:
        assert all(line[name] == answers[0][name] for name in ("tokens", "logits", "drafts"))
    assert all(len(tokens) == 3 for tokens in answers[0]["tokens"])


def test_parts_are_the_models_not_the_ranks():
    assert [parts_of(n, unit) for n, unit in ((2048, 64), (256, 64), (96, 64), (768, 64), (64, 16))] == [8, 4, 1, 4, 4]
    assert parts_of(2048, 64, shares=1) == 1
    config = small_config(**SHARED)
    assert layer_parts(config, 0, SINGLE_RANK, frozenset()) == Parts(4, 4, 1)
    assert layer_parts(config, 1, Ranks(1, 2), frozenset()) == Parts(2, 1, 1)
    with pytest.raises(ValueError, match="8 ranks: .* of down_proj is cut into 4 parts of whole 16s"):
        layer_parts(small_config(**SHARED | {"num_attention_heads": 8}), 0, Ranks(0, 8), frozenset())


def test_ranks_beyond_the_experts_parts_hold_a_neighbours_share_and_add_zeros(tmp_path):
    """Two parts on four ranks."""
    folder = write_native(tmp_path / "quarters", random_target(small_config(**SHARED | {"vocab_size": 132})))
    assert [expert_share(128, Ranks(rank, 4)) for rank in range(4)] == [
        ExpertShare(0, 2, True), ExpertShare(0, 2, False), ExpertShare(1, 2, True), ExpertShare(1, 2, False)]
    assert expert_share(2048, Ranks(3, 4)) == ExpertShare(3, 4, True)
    halves, quarters = ([load_kernel_weights(folder, Ranks(rank, count)).layers[1].pages for rank in range(count)]
                        for count in (2, 4))
    for rank, own in enumerate(quarters):
        assert own.parts == 1 and own.inner == 64
        assert torch.equal(own.up, halves[rank // 2].up)
        codes, scales = unpack_pages(own.down, own.down_tile, 64, 64)
        if rank % 2:
            assert not codes.any() and not scales.any()
        else:
            assert codes.any() and torch.equal(own.down, halves[rank // 2].down)
