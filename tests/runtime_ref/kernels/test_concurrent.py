"""Programs and ranks that really wait for each other: no deadlock, the same bits, and a missing wait is found."""

import time

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")

import triton
import triton.language as tl

from runtime_ref.kernels.experimental.megakernel import BARRIER
from runtime_ref.kernels.experts import experts_kernel, kernel_arguments, run_experts
from runtime_ref.kernels.sync import all_reduce_rows, grid_barrier, signal_ranks, sum_ranks, wait_ranks
from tests.runtime_ref.kernels import expert_cases as cases
from tests.runtime_ref.kernels.at_once import at_once, fixed_program, programs_at_once, shared

MANY = 1 << 30  # polls: the harness's time limit, not the kernel's, ends a deadlock
PROGRAMS = 3


@triton.jit
def ring_sums(values, sums, counter, failed, EPOCHS: tl.constexpr, LATE: tl.constexpr, WAIT: tl.constexpr,
              POLLS: tl.constexpr, FLAG: tl.constexpr):
    """Each epoch: program p writes p + epoch, waits for all, sums what all wrote. A late program 0 tempts the others."""
    p = tl.program_id(0)
    count = tl.num_programs(0)
    for epoch in range(1, EPOCHS + 1):
        if p == 0:
            for _ in range(0, LATE):
                tl.load(values)
        tl.store(values + (epoch % 2) * count + p, p + epoch)
        if WAIT:
            grid_barrier(counter, epoch, failed, POLLS, FLAG)
        total = 0
        for other in range(0, count):
            total += tl.load(values + (epoch % 2) * count + other)
        tl.store(sums + p * EPOCHS + epoch - 1, total)


def run_ring(wait, late=0, missing=False, flag=False):
    epochs = 4
    values = shared(torch.full((2 * PROGRAMS,), -100, dtype=torch.int32))
    sums, counter, failed = (shared(torch.zeros(shape, dtype=torch.int32)) for shape in ((PROGRAMS, epochs), BARRIER, 1))

    def launch():
        ring_sums[(1,)](values, sums, counter, failed, EPOCHS=epochs, LATE=late, WAIT=wait, POLLS=MANY, FLAG=flag)

    if missing:
        def job(program):
            fixed_program(program, PROGRAMS)
            if program:
                launch()

        return at_once(PROGRAMS, job, 4)
    assert programs_at_once(PROGRAMS, launch) == [0] * PROGRAMS
    expected = torch.tensor([sum(p + epoch for p in range(PROGRAMS)) for epoch in range(1, epochs + 1)], dtype=torch.int32)
    return bool((sums == expected).all())


@pytest.mark.parametrize("flag", [False, True])
def test_grid_barrier_joins_every_epoch(flag):
    assert run_ring(wait=True, late=300, flag=flag)


def test_a_missing_barrier_is_found():
    assert not run_ring(wait=False, late=300)


@pytest.mark.parametrize("flag", [False, True])
def test_a_program_that_never_arrives_is_a_found_deadlock(flag):
    codes = run_ring(wait=True, missing=True, flag=flag)
    assert codes[0] == 0 and codes[1:] == [None] * (PROGRAMS - 1)


@triton.jit
def draw_tickets(owner, counter, tickets, started, failed, N: tl.constexpr, POLLS: tl.constexpr):
    """Nobody draws a second ticket before everybody has drawn a first."""
    p = tl.program_id(0)
    position = tl.atomic_add(tickets, 1, sem="relaxed")
    grid_barrier(started, 1, failed, POLLS)
    while position < N:
        tl.store(owner + position, p)
        tl.atomic_add(counter + position, 1)
        position = tl.atomic_add(tickets, 1, sem="relaxed")


def test_tickets_are_drawn_once_each_and_by_every_program():
    owner, counter, tickets, started, failed = (shared(torch.zeros(n, dtype=torch.int32)) for n in (200, 200, 1, 1, 1))
    codes = programs_at_once(PROGRAMS, lambda: draw_tickets[(1,)](owner, counter, tickets, started, failed, N=200, POLLS=MANY))
    assert codes == [0] * PROGRAMS
    assert (counter == 1).all() and int(tickets) == 200 + PROGRAMS
    assert set(owner.tolist()) == set(range(PROGRAMS))


def experts_at_once(**options):
    """(exit codes, output, output of one program, scratch) of the expert kernel as several programs."""
    pages = cases.make_pages(cases.make_weights())
    x, index, weight = cases.make_tokens(5)
    alone = run_experts(x, index, weight, pages, cases.poisoned(pages, 5), torch.empty(x.shape))
    space = cases.poisoned(pages, 5, polls=MANY, **options)
    for name in ("plan", "inner", "partial", "ready", "arrived", "control"):
        shared(getattr(space, name))
    out = shared(torch.full(x.shape, float("nan")))
    positional, constants = kernel_arguments(x, index, weight, pages, space, out)
    codes = programs_at_once(PROGRAMS, lambda: experts_kernel[(1,)](*positional, **constants))
    return codes, out, alone, space


@pytest.mark.parametrize("options", [{"tickets": True}, {"tickets": False}, {"tickets": False, "packed": False},
                                     {"packed": False, "ahead": 256}], ids=str)
def test_several_programs_make_the_bits_of_one(options):
    codes, out, alone, space = experts_at_once(**options)
    assert codes == [0] * PROGRAMS
    assert torch.equal(out.view(torch.int32), alone.view(torch.int32))
    assert not space.ready.any() and not space.arrived.any() and not space.control.any()


def test_experts_without_waiting_are_found():
    """Down projections that do not wait for their gate-up read the NaN that scratch is filled with."""
    pages = cases.make_pages(cases.make_weights())
    x, index, weight = cases.make_tokens(5)
    space = cases.poisoned(pages, 5, tickets=False)
    for name in ("plan", "inner", "partial", "ready", "arrived", "control"):
        shared(getattr(space, name))
    out = shared(torch.zeros(x.shape))
    positional, constants = kernel_arguments(x, index, weight, pages, space, out)

    def job(program):
        # Program 0 has only gate-up to do, and comes late: exactly the case in which waiting matters.
        fixed_program(program, 2)
        if program == 1:
            experts_kernel[(1,)](*positional, **(constants | {"WAIT": False}))

    assert at_once(2, job) == [0, 0]
    assert out.isnan().any() or space.partial.isnan().any()


RANKS, N, BLOCK, CALLS = 8, 96, 64, 3


def reduce_ranks(skip_wait=False):
    """Outputs [CALLS, RANKS, N] of repeated all-reduces, one process per rank, and what they should be."""
    blocks = -(-N // BLOCK)
    generator = torch.Generator().manual_seed(0)
    partials = torch.randn(CALLS, RANKS, N, generator=generator)
    data = [shared(torch.full((2, N), float("nan"))) for _ in range(RANKS)]
    signals = [shared(torch.zeros(blocks, dtype=torch.int32)) for _ in range(RANKS)]
    out, failed = shared(torch.full((CALLS, RANKS, N), float("nan"))), shared(torch.zeros(1, dtype=torch.int32))
    tables = [torch.tensor([t.data_ptr() for t in group], dtype=torch.int64) for group in (data, signals)]

    def job(rank):
        if skip_wait and rank == RANKS - 1:
            time.sleep(0.5)  # the peers have read by the time this one writes
        for call in range(CALLS):
            epoch = call + 1
            data[rank][epoch % 2] = partials[call, rank]
            if skip_wait:
                signals[rank] += RANKS * epoch  # as if all peers had signalled already
            for block in range(blocks):
                fixed_program(block, blocks)
                all_reduce_rows[(1,)](*tables, out[call, rank], rank, epoch, N, failed, RANKS=RANKS, BLOCK=BLOCK,
                                      POLLS=MANY)

    codes = at_once(RANKS, job)
    expected = torch.zeros(CALLS, N)
    for rank in range(RANKS):
        expected = expected + partials[:, rank]
    return codes, out, expected[:, None].expand_as(out)


def test_eight_ranks_reduce_to_the_same_bits_in_rank_order():
    codes, out, expected = reduce_ranks()
    assert codes == [0] * RANKS
    assert np.array_equal(out.view(torch.int32).numpy(), expected.contiguous().view(torch.int32).numpy())


def test_an_all_reduce_that_does_not_wait_is_found():
    codes, out, expected = reduce_ranks(skip_wait=True)
    assert codes == [0] * RANKS
    assert not torch.equal(out, expected)


@triton.jit
def alternating_sums(buffers, signals, partials, out, rank, first_epoch, failed, N: tl.constexpr, PARTS: tl.constexpr,
                     EPOCHS: tl.constexpr, LATE: tl.constexpr, WAIT: tl.constexpr, RANKS: tl.constexpr, POLLS: tl.constexpr):
    """Sums over ranks one after another, in alternating halves, nothing in between: the protocol inside a megakernel."""
    at = tl.arange(0, N)
    own = tl.load(buffers + rank).to(tl.pointer_type(tl.float32))
    for i in range(0, EPOCHS):
        if rank == LATE:
            for _ in range(0, 200):
                tl.load(partials)
        half = i % 2 * (PARTS * N)
        for part in range(0, PARTS):
            tl.store(own + half + part * N + at, tl.load(partials + (i * PARTS + part) * N + at))
        signal_ranks(signals, i % 2, rank, first_epoch + i, RANKS)
        if WAIT:
            wait_ranks(signals, i % 2, rank, first_epoch + i, failed, RANKS, POLLS)
        tl.store(out + i * N + at, sum_ranks(buffers, half, at, at < N, N, PARTS, RANKS))


def alternate(wait=True, first_epoch=1, parts=2, epochs=5):
    """Exit codes, outputs [RANKS, epochs, 64], and what they should be: parts added to zero in the order of the ranks."""
    n = 64
    partials = torch.randn(RANKS, epochs, parts, n, generator=torch.Generator().manual_seed(1))
    memory = [shared(torch.full((2 * parts * n,), float("nan"))) for _ in range(RANKS)]
    flags = [shared(torch.zeros(2 * RANKS, dtype=torch.int32)) for _ in range(RANKS)]
    out, failed = shared(torch.full((RANKS, epochs, n), float("nan"))), shared(torch.zeros(1, dtype=torch.int32))
    tables = [torch.tensor([t.data_ptr() for t in group], dtype=torch.int64) for group in (memory, flags)]

    def job(rank):
        fixed_program(0, 1)
        alternating_sums[(1,)](*tables, partials[rank], out[rank], rank, first_epoch, failed, N=n, PARTS=parts, EPOCHS=epochs,
                               LATE=3, WAIT=wait, RANKS=RANKS, POLLS=MANY)

    codes = at_once(RANKS, job)
    expected = torch.zeros(epochs, n)
    for rank in range(RANKS):
        for part in range(parts):
            expected = expected + partials[rank, :, part]
    return codes, out, expected.expand_as(out)


@pytest.mark.parametrize("first_epoch", [1, 2**31 - 3])
def test_alternating_sums_of_eight_ranks_are_everywhere_those_in_order(first_epoch):
    """Also where the number of the sum passes the largest int32 and goes on from the smallest."""
    codes, out, expected = alternate(first_epoch=first_epoch)
    assert codes == [0] * RANKS
    assert torch.equal(out.view(torch.int32), expected.contiguous().view(torch.int32))


def test_alternating_sums_that_do_not_wait_are_found():
    codes, out, expected = alternate(wait=False)
    assert codes == [0] * RANKS and not torch.equal(out, expected)
