"""How programs of one launch wait for each other: counters that only grow, release when data is ready, acquire before use.

A program that has written data calls `tl.debug_barrier()` (all its threads have stored) and then adds to a counter with
release semantics; a reader polls the counter with acquire semantics, which also drops its multiprocessor's stale cache
lines. Polls are limited: a lost signal becomes a flag that the host reads, not a GPU that hangs.

`wait_for` is per datum. `grid_barrier` joins all programs of a launch, which then must all be resident at once: launch
cooperatively, with no more programs than fit. Its counter is never reset: the caller counts epochs, so there is no race
between leaving one barrier and entering the next. By default all poll the counter on which they arrive; with FLAG the last one
to arrive raises a flag on a line of its own, and polls do not stand in the way of arrivals. `all_reduce_rows` joins ranks
instead of programs, in a launch of its own; `signal_ranks` and `wait_ranks` are its halves for one tile inside a longer kernel,
with work in between.

Rejected: `tl.atomic_poll` (not in triton 3.6), relaxed or volatile polling (not portable), resetting counters in barriers.
"""

import triton
import triton.language as tl

# Behind the counter of a barrier, in int32: the next line of the cache. A barrier's memory is twice that.
RELEASE_FLAG = 32
_RELEASE_FLAG = tl.constexpr(RELEASE_FLAG)


@triton.jit
def wait_for(counter, target, failed, POLLS: tl.constexpr, ACROSS_RANKS: tl.constexpr):
    """Waits until *counter >= target (int32). After POLLS polls it gives up and raises the flag `failed`."""
    SCOPE: tl.constexpr = "sys" if ACROSS_RANKS else "gpu"
    polls = 0
    while (tl.atomic_add(counter, 0, sem="acquire", scope=SCOPE) < target) & (polls < POLLS):
        polls += 1
    if polls == POLLS:
        tl.atomic_xchg(failed, 1, sem="relaxed")


@triton.jit
def grid_barrier(counter, epoch, failed, POLLS: tl.constexpr, FLAG: tl.constexpr = False):
    """Joins all programs. `epoch` is 1 for the first barrier on `counter` since it was zero, then 2, …

    Args:
        counter: int32: arrivals; with FLAG, `RELEASE_FLAG` further on, the epoch that all may leave.
    """
    tl.debug_barrier()
    if FLAG:
        # The last one has acquired what all others released; what it releases then covers theirs too.
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == epoch * tl.num_programs(0) - 1:
            tl.atomic_xchg(counter + _RELEASE_FLAG, epoch, sem="release", scope="gpu")
        else:
            wait_for(counter + _RELEASE_FLAG, epoch, failed, POLLS, False)
    else:
        tl.atomic_add(counter, 1, sem="release", scope="gpu")
        wait_for(counter, epoch * tl.num_programs(0), failed, POLLS, False)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["rank", "epoch"])
def all_reduce_rows(buffers, signals, out, rank, epoch, n, failed, RANKS: tl.constexpr, BLOCK: tl.constexpr,
                    POLLS: tl.constexpr):
    """One-shot sum of float32 partials over ranks, in rank order: the same bits on every rank.

    Program p of every rank reduces block p of BLOCK values. The rank has already written its partial into its own buffer.
    Reference: the sum over ranks in ascending order (`runtime_ref.core.tensor_parallel`).

    Args:
        buffers: int64 [RANKS], addresses of each rank's float32 [2, n]; half epoch % 2 is summed. Two halves, because a rank
            that has passed epoch e + 1 knows that every peer has read epoch e, so no second barrier is needed.
        signals: int64 [RANKS], addresses of each rank's int32 [programs]: how many partials of that block have arrived
            there, RANKS more per epoch.
        out: float32 [n] of this rank.
        epoch: 1, 2, … (int32): one more on every call.
    """
    p = tl.program_id(0)
    tl.debug_barrier()
    there = tl.load(signals + tl.arange(0, RANKS)).to(tl.pointer_type(tl.int32))
    tl.atomic_add(there + p, 1, sem="release", scope="sys")
    here = tl.load(signals + rank).to(tl.pointer_type(tl.int32))
    wait_for(here + p, epoch * RANKS, failed, POLLS, True)
    tl.debug_barrier()
    at = p * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for source in tl.static_range(RANKS):
        partial = tl.load(buffers + source).to(tl.pointer_type(tl.float32)) + (epoch % 2) * n
        total += tl.load(partial + at, mask=at < n, other=0.0)
    tl.store(out + at, total, mask=at < n)


@triton.jit
def signal_ranks(signals, place, rank, epoch, RANKS: tl.constexpr):
    """Tells every rank that this one has stored what flag `place` stands for, in `epoch`. Never waits.

    Flags are one int32 per place and source, written by their source alone: a place that a call does not use falls behind
    without harm, which a counter would not. One exchange on all ranks' flags, because each release is a fence of the whole
    system, which costs as much for one lane as for a warp; the barrier before it lets it cover what every warp has stored.

    Args:
        signals: int64 [RANKS], addresses of each rank's int32 [places, RANKS]; RANKS is a power of two.
    """
    tl.debug_barrier()
    there = tl.load(signals + tl.arange(0, RANKS)).to(tl.pointer_type(tl.int32))
    tl.atomic_xchg(there + place * RANKS + rank, epoch, sem="release", scope="sys")


@triton.jit
def wait_ranks(signals, place, rank, epoch, failed, RANKS: tl.constexpr, POLLS: tl.constexpr):
    """Waits until all ranks have signalled `place` in `epoch`; then what they stored before can be read.

    Compares for equality, so epochs may wrap around: no rank can be further, since it would need this one's next signal.
    """
    flags = tl.load(signals + rank).to(tl.pointer_type(tl.int32)) + place * RANKS + tl.arange(0, RANKS)
    nothing = tl.zeros((RANKS,), tl.int32)
    polls = 0
    while (tl.max((tl.atomic_add(flags, nothing, sem="acquire", scope="sys") != epoch).to(tl.int32), 0) != 0) & (polls < POLLS):
        polls += 1
    if polls == POLLS:
        tl.atomic_xchg(failed, 1, sem="relaxed")
    tl.debug_barrier()


@triton.jit
def sum_ranks(buffers, offset, at, mask, part_stride, PARTS: tl.constexpr, RANKS: tl.constexpr):
    """float32: zero + rank 0's parts in order + rank 1's + ..., each float32 at `offset` + part * part_stride + at.

    Args:
        buffers: int64 [RANKS], addresses of each rank's float32 buffer.
    """
    total = tl.zeros(at.shape, tl.float32)
    for source in tl.static_range(RANKS):
        there = tl.load(buffers + source).to(tl.pointer_type(tl.float32)) + offset
        for part in tl.static_range(PARTS):
            total += tl.load(there + part * part_stride + at, mask=mask, other=0.0)
    return total
