"""The megakernel: one launch of the encoded program makes the bits of the launches one by one, with one program and with
three at the same time; one that does not wait is found."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")

import triton
import triton.language as tl

from runtime_ref.backends.triton.megakernel import Megakernel, encode_program
from runtime_ref.backends.triton.megakernel_drafter import MegakernelDrafter
from runtime_ref.core.batch import DraftRequest, SequenceChunk
from runtime_ref.core.kv_cache import KvCache
from runtime_ref.core.program import Op, target_program
from runtime_ref.core.sampling_params import SamplingParams
from runtime_ref.kernels.experimental import megakernel as kernel
from runtime_ref.measure.gpu_suite.steps import use_megakernel
from tests.runtime_ref.kernels.at_once import SECONDS, programs_at_once, shared

MANY = 1 << 30  # polls: the harness's time limit, not the kernel's, ends a deadlock
PROGRAMS = 3


class Prepared:
    """A backend whose cache holds (random) keys of 60 tokens of one sequence and 20 of another, and a step of both."""

    def __init__(self, backend):
        self.backend, self.program = backend, target_program(backend.config, [0, 2])
        ids = torch.randint(1, 128, (90,), generator=torch.Generator().manual_seed(5)).tolist()
        cache = KvCache(backend.pools, prefix=False)
        self.tables = [cache.tables() for _ in range(2)]
        for tables in self.tables:
            cache.extend(tables, list(tables), 80)
        for pool in backend.pools.values():
            pool.all_keys.normal_()
            pool.all_values.normal_()
        self.step = backend.plan([SequenceChunk(self.tables[0], 60, ids[30:37]),
                                  SequenceChunk(self.tables[1], 20, ids[:2], "last")])
        self.expected = backend.run(self.program, self.step)


@pytest.fixture(scope="module")
def prepared(small_engine):
    return Prepared(small_engine(drafter=False).backend)


def same(found, expected):
    return all(torch.equal(found[name].view(torch.int16), expected[name].view(torch.int16))
               for name in ("logits", "target_hidden.0", "target_hidden.2"))


def poison(megakernel):
    for name, t in megakernel.scratch.items():
        if t.is_floating_point():
            t.fill_(float("nan"))
        elif name == "index":
            t.fill_(1 << 20)
    for space in megakernel.spaces.values():
        space.inner.fill_(float("nan"))
        space.partial.fill_(float("nan"))


TUNED = kernel.Tuning(release_flag=True, ahead=4096, packed=False)


@pytest.mark.parametrize("tuning", [kernel.Tuning(), TUNED], ids=str)
def test_a_megakernel_makes_the_bits_of_the_launches_and_can_be_repeated(prepared, tuning):
    megakernel = Megakernel(prepared.backend, prepared.program, tuning=tuning)
    poison(megakernel)
    for _ in range(2):
        assert same(megakernel.run(prepared.step), prepared.expected)
        assert not megakernel.failed() and not megakernel.scratch["barrier"].any()


@triton.jit
def no_barrier(counter, epoch, failed, POLLS: tl.constexpr, FLAG: tl.constexpr):
    """What a megakernel that forgets to wait would call."""
    tl.debug_barrier()


def launched_at_once(prepared, seconds=SECONDS, tuning=TUNED):
    """Whether PROGRAMS processes, each a program of one launch over shared memory, end and make the expected bits."""
    backend = prepared.backend
    megakernel = Megakernel(backend, prepared.program, programs=PROGRAMS, polls=MANY, tuning=tuning)
    poison(megakernel)
    logits, target_hidden = torch.full(prepared.expected["logits"].shape, float("nan")), torch.zeros(2, 9, 64,
                                                                                                     dtype=torch.bfloat16)
    arguments, constants = megakernel.arguments(prepared.step, logits, target_hidden)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            arguments[name] = shared(value)
    def launch():
        kernel.step_kernel[(1,)](**arguments, **constants)

    codes = programs_at_once(PROGRAMS, launch, seconds)
    found = {"logits": logits, "target_hidden.0": target_hidden[0], "target_hidden.2": target_hidden[1]}
    return codes == [0] * PROGRAMS and same(found, prepared.expected)


@pytest.mark.parametrize("tuning", [kernel.Tuning(), TUNED], ids=str)
def test_three_programs_at_once_make_the_bits_of_one(prepared, tuning):
    assert launched_at_once(prepared, tuning=tuning)


def test_a_megakernel_without_barriers_is_found(prepared, monkeypatch):
    monkeypatch.setattr(kernel, "grid_barrier", no_barrier)
    monkeypatch.setattr(kernel, "step_kernel", triton.jit(kernel.step_kernel.fn))  # what a kernel calls is compiled once
    assert not launched_at_once(prepared, seconds=10)


@pytest.mark.parametrize("tuning", [kernel.Tuning(), TUNED], ids=str)
def test_the_drafters_megakernel_makes_the_bits_of_its_launches(small_engine, tuning):
    """With pending features and without, blocks of two sequences."""
    drafter = small_engine().drafter
    megakernel = MegakernelDrafter(drafter, tuning=tuning)
    target_hidden = torch.randn(40, 128, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    found = []
    for proposer in (drafter, megakernel):
        cache = KvCache({"draft": drafter.pool}, prefix=False)
        tables = [cache.tables() for _ in range(2)]
        for own in tables:
            cache.extend(own, ["draft"], 48)
        drafter.extend_tables(target_hidden[:34], 0, tables[0]["draft"])
        pending = [DraftRequest(tables[0], 5, 37, 7, target_hidden[34:37]), DraftRequest(tables[1], 9, 3, 2,
                                                                                         target_hidden[37:])]
        again = [DraftRequest(tables[1], 9, 3, 4, None)]
        found.append(torch.cat(proposer.logits(pending) + proposer.logits(again)))
        for own in tables:
            cache.release(own)
    assert found[0].shape == (13, 130) and not found[0].isnan().any()
    assert torch.equal(*found) and not megakernel.failed() and not megakernel.scratch["barrier"].any()


def test_an_engine_on_megakernels_gives_the_tokens_of_one_that_launches(small_engine, small_prompts):
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    engine = small_engine(prefix_cache=False)
    expected = engine.generate(small_prompts[:2], params)
    use_megakernel(engine, 1)
    launched = engine.stats()["steps"]
    assert engine.generate(small_prompts[:2], params) == expected
    assert engine.stats()["steps"] == 2 * launched and engine.stats()["rounds"] > 0
    assert not engine.backend.runner.scratch["barrier"].any() and not engine.drafter.failed()


def test_the_table_names_every_weight_in_the_arena(prepared):
    backend = prepared.backend
    megakernel = Megakernel(backend, prepared.program)
    arena, layers = backend.kernel_weights.arena, backend.kernel_weights.layers
    assert megakernel.table.shape == (len(megakernel.program), kernel.FIELDS) and megakernel.table.dtype == torch.int32
    for op, row in zip(megakernel.program, megakernel.table.tolist(), strict=True):
        assert kernel.OPS[row[0]] == op.name
        if op.name == "merge_add":
            w = layers[op.layer].o.w
            piece = arena.data[row[1] * 128:][:w.numel() * 2].view(torch.bfloat16)
            assert torch.equal(piece, w.flatten()) and row[6] == int(layers[op.layer].kind == "window")


def test_the_table_names_the_matrix_that_comes_next_where_it_is_known(prepared):
    megakernel = Megakernel(prepared.backend, prepared.program)
    layers, rows = prepared.backend.kernel_weights.layers, megakernel.table.tolist()
    names = [kernel.OPS[row[0]] for row in rows]
    found = {}
    for i, row in enumerate(rows):
        if row[9]:
            at = i + 1 + names[i + 1].startswith("attend")
            found.setdefault((names[i], names[at]), []).append(row)
            assert row[8] == rows[at][1]
    # The output projection is asked for before and behind attention; nothing behind a router, whose experts are not known.
    assert {pair[1] for pair in found if pair[0].startswith("enter")} == {"merge_add"}
    assert {pair[1] for pair in found if pair[0].startswith("attend")} == {"merge_add"}
    assert {"enter_full", "enter_window"} & {pair[1] for pair in found if pair[0] in ("experts_add", "target_hidden")}
    assert not any(pair[0] == "norm_route" for pair in found)
    o, sizes = layers[0].o.w, {tuple(row[9:11]) for pair, own in found.items() if pair[1] == "merge_add" for row in own}
    assert (o.shape[0], 2 * o.shape[1]) in sizes


def test_the_table_of_an_op_that_is_not_known_is_refused(prepared):
    backend = prepared.backend
    arena, layers = backend.kernel_weights.arena, backend.kernel_weights.layers
    with pytest.raises(ValueError, match="no op 'experts'"):
        encode_program([Op("experts", 1, (), ())], layers, arena, backend.pools)
