"""MXFP4 experts in one launch: router result -> gate and up -> SwiGLU -> down -> weighted sum.

Reference: `modeling.modeling_mimo_v2.Experts` with the weights `mxfp4.dequantize` returns. The kernel rounds less (once,
to bf16, between SwiGLU and down; the reference rounds after every operation), so they agree within a tolerance, not in bits.

*Slots.* A slot is an expert together with up to eight of its tokens; an expert with nine tokens has two slots. Slots are the
unit of work because tokens lie on the narrow side (8 columns) of a tensor-core instruction whose wide side are 16 rows of
weights. Every program derives the same slots from the router result and writes the same bytes into `plan`. (Not packed: a slot
for every choice of a token. For few tokens, whose experts are nearly all different, that saves the comparisons.)

*Work list.* First the gate-up tiles of all slots, then their down chunks, in an order that is data (`order`): a program takes
every P-th entry, or draws a ticket for the next one. A down chunk waits until its own slot's gate-up tiles are counted in
`ready`; no grid barrier. Whoever delivers the last slot of a chunk of output columns forms the weighted sum of that chunk, in
the order of the router's choices, whoever that is: bits do not depend on timing. With tickets, a waiting program only
ever waits for entries that others already run, so it cannot deadlock even if programs are not all resident.

*Parts* (C5). K of the down product is cut into parts whose number the model fixes, not the ranks. Each part of an
assignment is a product of its own, each part of a token a weighted sum of its own, and parts are added to zero in order.

*Row invariance* (C4): a row meets the same instructions in the same order whether its slot holds one token or eight.

Scratch is reused between launches; the last program to leave puts all counters back to zero.

Shapes: N tokens, A choices, H hidden, I inner of this rank; S slots (at most N A); see `repack` for pages.

Rejected: one thread block per (token, expert) (reads an expert's weights once per token); a grid barrier between phases (1 to
2 us each, and the slowest program sets the pace); atomically adding into the output (order of sums not fixed).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from mxfp4.format import BLOCK_SIZE
from runtime_ref.kernels.experimental.blackwell_mxfp4 import native_down_chunk, native_gate_up_tile, round_rows_kernel
from runtime_ref.kernels.expert_tiles import TOKENS_PER_SLOT, down_chunk, gate_up_tile, prefetch_lines
from runtime_ref.kernels.mxfp4_decode import narrow
from runtime_ref.kernels.repack import ExpertPages
from runtime_ref.kernels.sync import signal_ranks

MAX_TOKENS = 64
_WIDE = tl.constexpr(TOKENS_PER_SLOT)

# Polls before a wait counts as failed: seconds on a GPU.
POLLS = 1 << 22


@triton.jit
def _plan_slots(index, plan, assignments, E, M: tl.constexpr):
    """Slots of a router result; returns their number. M >= assignments is the stride of `plan`'s five parts:

    rank of each assignment among its expert's, its slot; per slot the expert and the number of rows; M x 8 assignments.
    """
    CHUNK: tl.constexpr = 8
    i = tl.arange(0, M)
    mine = tl.load(index + i, mask=i < assignments, other=-1)
    valid = (mine >= 0) & (mine < E)
    rank = tl.zeros((M,), tl.int32)
    total = tl.zeros((M,), tl.int32)
    for start in range(0, assignments, CHUNK):
        j = start + tl.arange(0, CHUNK)
        same = mine[:, None] == tl.load(index + j, mask=j < assignments, other=-1)[None, :]
        rank += tl.sum((same & (j[None, :] < i[:, None])).to(tl.int32), 1)
        total += tl.sum(same.to(tl.int32), 1)
    opens = (valid & (rank % _WIDE == 0)).to(tl.int32)
    slot = tl.cumsum(opens, 0) - opens
    tl.store(plan + i, tl.where(valid, rank, -1))
    tl.store(plan + M + i, slot)
    tl.store(plan + 2 * M + slot, mine, mask=opens > 0)
    tl.store(plan + 3 * M + slot, tl.minimum(total - rank, _WIDE), mask=opens > 0)
    tl.debug_barrier()
    own = tl.zeros((M,), tl.int32)
    for start in range(0, assignments, CHUNK):
        j = start + tl.arange(0, CHUNK)
        there = tl.load(index + j, mask=j < assignments, other=-1)
        opener = tl.load(plan + j, mask=j < assignments, other=-1)
        match = (mine[:, None] == there[None, :]) & (opener[None, :] == (rank - rank % _WIDE)[:, None])
        own += tl.sum(tl.where(match, tl.load(plan + M + j, mask=j < assignments, other=0)[None, :], 0), 1)
    tl.store(plan + 4 * M + own * _WIDE + rank % _WIDE, i, mask=valid)
    tl.debug_barrier()
    return tl.sum(opens, 0)


@triton.jit
def _list_slots(index, plan, assignments, E, M: tl.constexpr):
    """The same for one assignment a slot: nothing is compared, and an expert with several tokens is read once for each. An
    assignment that means no expert has a slot without rows. Returns the number of assignments."""
    i = tl.arange(0, M)
    mine = tl.load(index + i, mask=i < assignments, other=-1)
    valid = (mine >= 0) & (mine < E)
    tl.store(plan + 2 * M + i, tl.where(valid, mine, 0), mask=i < assignments)
    tl.store(plan + 3 * M + i, valid.to(tl.int32), mask=i < assignments)
    tl.store(plan + 4 * M + i * _WIDE, i, mask=i < assignments)
    tl.debug_barrier()
    return assignments


@triton.jit
def _ask_ahead(position, order, plan, up, down, slots, up_entries, down_entries, K_UP, M: tl.constexpr, UP: tl.constexpr,
               DOWN: tl.constexpr, UP_PAGE: tl.constexpr, DOWN_CHUNK: tl.constexpr, AHEAD: tl.constexpr, PTX: tl.constexpr):
    """Asks for the first bytes of the weights of an entry that is still to come."""
    if position < up_entries + down_entries:
        entry = tl.load(order + position)
        slot = entry // (UP if position < up_entries else DOWN)
        if slot < slots:
            expert = tl.load(plan + 2 * M + slot).to(tl.int64)
            if position < up_entries:
                prefetch_lines(up + (expert * UP + entry % UP) * K_UP * UP_PAGE, AHEAD, UP_PAGE, PTX)
            else:
                prefetch_lines(down + (expert * DOWN + entry % DOWN) * DOWN_CHUNK, AHEAD, DOWN_CHUNK, PTX)


@triton.jit
def _weighted_part(partial, index, weight, token, column, N, E, H, A: tl.constexpr, BLOCK: tl.constexpr):
    """float32 [8, BLOCK]: sum over a token's choices of weight * partial, in the router's order."""
    total = tl.zeros((_WIDE, BLOCK), tl.float32)
    for a in tl.static_range(A):
        expert = tl.load(index + token * A + a, mask=token < N, other=-1)
        valid = (expert >= 0) & (expert < E)
        w = tl.load(weight + token * A + a, mask=valid, other=0.0)
        part = tl.load(partial + (token * A + a)[:, None] * H + column[None, :], mask=valid[:, None] & (column < H)[None, :],
                       other=0.0)
        total += w[:, None] * part
    return total


@triton.jit
def _weighted_sum(partial, index, weight, residual, out, chunk, N, E, H, part_stride, A: tl.constexpr, COLUMNS: tl.constexpr,
                  PARTS: tl.constexpr, KEEP: tl.constexpr, RESIDUAL: tl.constexpr, FLOAT_DOT: tl.constexpr):
    """Chunk of COLUMNS columns of out: every part's weighted sum (KEEP), or zero + part 0 + part 1 + ..., plus the residual."""
    BLOCK: tl.constexpr = COLUMNS if COLUMNS < 128 else 128  # A loads of each thread's share are in flight: registers
    BLOCKS: tl.constexpr = COLUMNS // BLOCK
    for block in range(0, tl.cdiv(N, _WIDE) * BLOCKS):
        token = block // BLOCKS * _WIDE + tl.arange(0, _WIDE)
        column = chunk * COLUMNS + block % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        at = token[:, None] * H + column[None, :]
        inside = (token < N)[:, None] & (column < H)[None, :]
        total = tl.zeros((_WIDE, BLOCK), tl.float32)
        for part in range(0, PARTS):
            own = _weighted_part(partial + part * (N * A) * H, index, weight, token, column, N, E, H, A, BLOCK)
            if KEEP:
                tl.store(out + part * part_stride + at, own, mask=inside)
            else:
                total += own
        if not KEEP:
            if RESIDUAL:
                total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(out + at, narrow(total, out.dtype.element_ty, FLOAT_DOT), mask=inside)


@triton.jit
def _next(position, tickets, TICKETS: tl.constexpr):
    if TICKETS:
        return tl.atomic_add(tickets, 1, sem="relaxed")
    else:
        return position + tl.num_programs(0)


@triton.jit
def experts_work(x, up, down, index, weight, order, plan, inner, partial, residual, out, ready, arrived, control,
                 N, H, E, up_entries, down_entries, K_UP, part_stride, signals, rank, place, epoch, A: tl.constexpr,
                 M: tl.constexpr, UP: tl.constexpr, DOWN: tl.constexpr, TILES: tl.constexpr, K_DOWN: tl.constexpr,
                 PARTS: tl.constexpr, KEEP: tl.constexpr, UP_ROWS: tl.constexpr, UP_DEPTH: tl.constexpr,
                 DOWN_ROWS: tl.constexpr, DOWN_DEPTH: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
                 PREFETCH: tl.constexpr, TICKETS: tl.constexpr, WAIT: tl.constexpr, POLL_LIMIT: tl.constexpr, PTX: tl.constexpr,
                 FLOAT_DOT: tl.constexpr, PHASE: tl.constexpr, RESIDUAL: tl.constexpr, RANKS: tl.constexpr,
                 HW_FP4: tl.constexpr, PACKED: tl.constexpr, AHEAD: tl.constexpr):
    """What one program does for one call of the experts; see `experts_kernel`.

    With RANKS > 1, whoever has stored a chunk of `out` tells all ranks so: flag `place` + chunk becomes `epoch`.
    """
    COLUMNS: tl.constexpr = TILES * DOWN_ROWS
    UP_PAGE: tl.constexpr = UP_ROWS * UP_DEPTH // 2 + UP_ROWS * UP_DEPTH // 32
    DOWN_CHUNK: tl.constexpr = TILES * PARTS * K_DOWN * (DOWN_ROWS * DOWN_DEPTH // 2 + DOWN_ROWS * DOWN_DEPTH // 32)
    if PACKED:
        slots = _plan_slots(index, plan, N * A, E, M)
    else:
        slots = _list_slots(index, plan, N * A, E, M)
    position = tl.program_id(0)
    if TICKETS:
        position = tl.atomic_add(control, 1, sem="relaxed")
    if PHASE == 2:
        position += up_entries
    while position < up_entries:
        following = _next(position, control, TICKETS)
        if PTX and AHEAD > 0:
            _ask_ahead(following, order, plan, up, down, slots, up_entries, down_entries, K_UP, M, UP, DOWN, UP_PAGE,
                       DOWN_CHUNK, AHEAD, PTX)
        entry = tl.load(order + position)
        slot = entry // UP
        if slot < slots:
            if HW_FP4:
                native_gate_up_tile(x, up, plan, inner, slot, entry % UP, N, H, K_UP, up_entries // UP, A, M, UP, UP_ROWS,
                                    UP_DEPTH, EVEN, STAGES, FLOAT_DOT)
            else:
                gate_up_tile(x, up, plan, inner, slot, entry % UP, H, K_UP, A, M, UP, UP_ROWS, UP_DEPTH, EVEN, STAGES, PTX,
                             FLOAT_DOT)
            tl.debug_barrier()
            tl.atomic_add(ready + slot, 1, sem="release", scope="gpu")
        position = following
    if PHASE != 1:
        while position < up_entries + down_entries:
            following = _next(position, control, TICKETS)
            if PTX and AHEAD > 0:
                _ask_ahead(following, order, plan, up, down, slots, up_entries, down_entries, K_UP, M, UP, DOWN, UP_PAGE,
                           DOWN_CHUNK, AHEAD, PTX)
            entry = tl.load(order + position)
            slot = entry // DOWN
            chunk = entry % DOWN
            if slot < slots:
                if HW_FP4:
                    native_down_chunk(down, plan, inner, partial, ready, control + 2, slot, chunk, N * A, H, up_entries // UP,
                                      M, UP, UP * UP_ROWS // 2, TILES, DOWN, K_DOWN, PARTS, DOWN_ROWS, DOWN_DEPTH, STAGES,
                                      PREFETCH, WAIT, POLL_LIMIT, PTX, FLOAT_DOT)
                else:
                    down_chunk(down, plan, inner, partial, ready, control + 2, slot, chunk, N * A, H, M, UP, UP * UP_ROWS // 2,
                               TILES, DOWN, K_DOWN, PARTS, DOWN_ROWS, DOWN_DEPTH, STAGES, PREFETCH, WAIT, POLL_LIMIT, PTX,
                               FLOAT_DOT)
                tl.debug_barrier()
                if tl.atomic_add(arrived + chunk, 1, sem="acq_rel", scope="gpu") == slots - 1:
                    tl.debug_barrier()
                    _weighted_sum(partial, index, weight, residual, out, chunk, N, E, H, part_stride, A, COLUMNS, PARTS, KEEP,
                                  RESIDUAL, FLOAT_DOT)
                    if RANKS > 1:
                        signal_ranks(signals, place + chunk, rank, epoch, RANKS)
            position = following
        if slots == 0:
            for chunk in range(tl.program_id(0), DOWN, tl.num_programs(0)):
                _weighted_sum(partial, index, weight, residual, out, chunk, N, E, H, part_stride, A, COLUMNS, PARTS, KEEP,
                              RESIDUAL, FLOAT_DOT)
                if RANKS > 1:
                    signal_ranks(signals, place + chunk, rank, epoch, RANKS)
        tl.debug_barrier()
        if tl.atomic_add(control + 1, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
            i = tl.arange(0, M)
            tl.store(ready + i, tl.zeros((M,), tl.int32))
            for chunk in range(0, DOWN):
                tl.store(arrived + chunk, 0)
            tl.store(control, 0)
            tl.store(control + 1, 0)


@triton.jit(do_not_specialize=["N", "up_entries", "down_entries", "K_UP"])
def experts_kernel(x, up, down, index, weight, order, plan, inner, partial, residual, out, ready, arrived, control,
                   N, H, E, up_entries, down_entries, K_UP, part_stride,
                   A: tl.constexpr, M: tl.constexpr, UP: tl.constexpr, DOWN: tl.constexpr, TILES: tl.constexpr,
                   K_DOWN: tl.constexpr, PARTS: tl.constexpr, KEEP: tl.constexpr, UP_ROWS: tl.constexpr,
                   UP_DEPTH: tl.constexpr, DOWN_ROWS: tl.constexpr,
                   DOWN_DEPTH: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr, PREFETCH: tl.constexpr,
                   TICKETS: tl.constexpr, WAIT: tl.constexpr, POLL_LIMIT: tl.constexpr, PTX: tl.constexpr,
                   FLOAT_DOT: tl.constexpr, PHASE: tl.constexpr = 0, RESIDUAL: tl.constexpr = False,
                   HW_FP4: tl.constexpr = False, PACKED: tl.constexpr = True, AHEAD: tl.constexpr = 0):
    """One call of the experts. `run_experts` documents and fills the arguments.

    control: int32 [3]: tickets drawn, programs that left, failed. PHASE 1 or 2 runs only gate-up or only down (with WAIT
    False), for tests that cannot run programs at once.
    """
    experts_work(x, up, down, index, weight, order, plan, inner, partial, residual, out, ready, arrived, control, N, H, E,
                 up_entries, down_entries, K_UP, part_stride, None, 0, 0, 0, A, M, UP, DOWN, TILES, K_DOWN, PARTS, KEEP,
                 UP_ROWS, UP_DEPTH, DOWN_ROWS, DOWN_DEPTH, EVEN, STAGES, PREFETCH, TICKETS, WAIT, POLL_LIMIT, PTX, FLOAT_DOT,
                 PHASE, RESIDUAL, 1, HW_FP4, PACKED, AHEAD)


@dataclass(frozen=True)
class Launch:
    """How the kernel is launched; changes speed, never bits.

    programs: of the persistent grid, all resident unless `tickets`. chunk_tiles: row tiles of a down chunk (rounded down to
    a divisor of their number). prefetch: bytes of a down chunk asked for before waiting, 0 or a power of two from 128 on.
    ahead: the same, of the entry after the one that is computed. packed: an expert's tokens share its slots; False: a slot for
    every assignment, without a plan, for few tokens. ptx, float_dot: False, True in the interpreter.
    """

    programs: int
    warps: int = 4
    stages: int = 3
    chunk_tiles: int = 4
    prefetch: int = 16384
    ahead: int = 0
    tickets: bool = True
    packed: bool = True
    ptx: bool = True
    float_dot: bool = False
    polls: int = POLLS

    def chunk(self, row_tiles: int) -> int:
        """The largest power of two of tiles, at most `chunk_tiles`, that divides `row_tiles`."""
        found = 1
        while found * 2 <= self.chunk_tiles and row_tiles % (found * 2) == 0:
            found *= 2
        return found


def listed_order(slots: int, up_tiles: int, down_chunks: int) -> torch.Tensor:
    """The plain work list, int32: every slot's gate-up tiles, slot by slot, then every slot's down chunks."""
    return torch.cat((torch.arange(slots * up_tiles), torch.arange(slots * down_chunks))).to(torch.int32)


class Workspace:
    """Scratch of one stream of calls: at most `tokens` tokens with `choices` experts each, for pages like `pages`."""

    def __init__(self, pages: ExpertPages, tokens: int, choices: int, launch: Launch):
        if not 1 <= tokens <= MAX_TOKENS:
            raise ValueError(f"{tokens} tokens in one call of the experts; expected 1 to {MAX_TOKENS}")
        device = pages.up.device
        self.tokens, self.choices, self.launch, self.hw_fp4 = tokens, choices, launch, pages.hw_fp4
        self.stride = triton.next_power_of_2(max(tokens * choices, 16))
        self.slots = tokens * choices
        if launch.packed:
            self.slots = min(self.slots, pages.experts * -(-tokens // TOKENS_PER_SLOT))
        row_tiles = pages.down.shape[1]
        self.chunk_tiles = launch.chunk(row_tiles)
        self.chunks = row_tiles // self.chunk_tiles
        width = pages.up.shape[1] * pages.up_tile.rows // 2
        self.order = listed_order(self.slots, pages.up.shape[1], self.chunks).to(device)
        self.plan = torch.zeros((4 + TOKENS_PER_SLOT) * self.stride, dtype=torch.int32, device=device)
        if self.hw_fp4:  # codes of all rows, then their scales, of what enters and of what lies between the products
            self.rounded = torch.empty(rounded_bytes(tokens * pages.hidden), dtype=torch.uint8, device=device)
            self.inner = torch.empty(rounded_bytes(self.slots * TOKENS_PER_SLOT * width), dtype=torch.uint8, device=device)
        else:
            self.inner = torch.empty((self.slots, TOKENS_PER_SLOT, width), dtype=torch.bfloat16, device=device)
        self.partial = torch.empty((pages.parts, tokens * choices, pages.hidden), dtype=torch.float32, device=device)
        self.ready = torch.zeros(self.stride, dtype=torch.int32, device=device)
        self.arrived = torch.zeros(self.chunks, dtype=torch.int32, device=device)
        self.control = torch.zeros(3, dtype=torch.int32, device=device)

    def failed(self) -> bool:
        """Whether a wait was given up since the scratch was made (its results are then worthless). Synchronizes."""
        return bool(self.control[2])


def kernel_arguments(x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, pages: ExpertPages, space: Workspace,
                     out: torch.Tensor | None, residual: torch.Tensor | None = None) -> tuple[tuple, dict]:
    """Positional and compile-time arguments of `experts_kernel`; x as `round_rows` returns it where pages are hw_fp4."""
    keep = out is not None and out.ndim == 3
    launch, up, down = space.launch, pages.up, pages.down
    entries = space.slots * up.shape[1], space.slots * space.chunks
    positional = (x, up, down, index, weight, space.order, space.plan, space.inner, space.partial,
                  out if residual is None else residual, out, space.ready, space.arrived, space.control, x.shape[0],
                  pages.hidden, pages.experts, *entries, up.shape[2], out.stride(0) if keep else 0)
    return positional, {
        "A": space.choices, "M": space.stride, "UP": up.shape[1], "DOWN": space.chunks, "TILES": space.chunk_tiles,
        "K_DOWN": down.shape[2] // pages.parts, "PARTS": pages.parts, "KEEP": keep,
        "UP_ROWS": pages.up_tile.rows, "UP_DEPTH": pages.up_tile.depth,
        "DOWN_ROWS": pages.down_tile.rows, "DOWN_DEPTH": pages.down_tile.depth,
        "EVEN": pages.hidden % pages.up_tile.depth == 0, "STAGES": launch.stages, "PREFETCH": launch.prefetch,
        "TICKETS": launch.tickets, "WAIT": True, "POLL_LIMIT": launch.polls, "PTX": launch.ptx, "FLOAT_DOT": launch.float_dot,
        "RESIDUAL": residual is not None, "HW_FP4": pages.hw_fp4, "PACKED": launch.packed, "AHEAD": launch.ahead}


def rounded_bytes(values: int) -> int:
    """Of so many values in MXFP8."""
    return values + values // BLOCK_SIZE


def round_rows(x: torch.Tensor, space: Workspace) -> torch.Tensor:
    """x bfloat16 [N, H] as MXFP8 in the scratch, one launch: N H 33 / 32 bytes, codes of all rows, then their scales."""
    (N, H), blocks = x.shape, 32
    out = space.rounded[:rounded_bytes(N * H)]
    options = {} if space.launch.float_dot else {"num_warps": 4}
    round_rows_kernel[(N, triton.cdiv(H // BLOCK_SIZE, blocks))](x, out, N, H, BLOCKS=blocks, **options)
    return out.view(N, -1)


def run_experts(x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, pages: ExpertPages, space: Workspace,
                out: torch.Tensor | None = None, residual: torch.Tensor | None = None) -> torch.Tensor:
    """The experts' weighted sum for a block of tokens: one launch, and one before it that rounds x where pages are hw_fp4.

    Args:
        x: bfloat16 [N, H], contiguous.
        index: int32 [N, A], the chosen experts; a value outside [0, E) means none.
        weight: float32 [N, A].
        pages: this rank's shard, on the device of x.
        space: scratch made for at least N tokens and exactly A choices.
        out: bfloat16 or float32 [N, H] to write into; float32 [parts, N, H], rows contiguous, keeps the parts of K apart that
            are to be added over ranks.
        residual: bfloat16 [N, H] that is added; may be `out`.

    Returns:
        `out`, by default a new bfloat16 tensor: this rank's part of the sum.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
    """
    N, A = index.shape
    if x.dtype is not torch.bfloat16 or x.shape != (N, pages.hidden) or not x.is_contiguous():
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; expected contiguous bfloat16 [{N}, {pages.hidden}]")
    if index.dtype is not torch.int32 or weight.dtype is not torch.float32 or weight.shape != index.shape:
        raise ValueError(f"index is {index.dtype} {list(index.shape)}, weight {weight.dtype} {list(weight.shape)}; expected "
                         f"int32 and float32 of one shape")
    if N > space.tokens or A != space.choices:
        raise ValueError(f"{N} tokens with {A} choices; this scratch holds {space.tokens} tokens with {space.choices}")
    out = torch.empty_like(x) if out is None else out
    x = round_rows(x, space) if space.hw_fp4 else x
    positional, options = kernel_arguments(x, index.contiguous(), weight.contiguous(), pages, space, out, residual)
    if space.launch.float_dot:
        experts_kernel[(space.launch.programs,)](*positional, **options)
    else:
        experts_kernel[(space.launch.programs,)](*positional, **options, num_warps=space.launch.warps,
                                                 launch_cooperative_grid=not space.launch.tickets)
    return out
