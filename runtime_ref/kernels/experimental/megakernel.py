"""The megakernel: one cooperative launch runs a whole program.

The program is data: a table of int32 [ops, FIELDS] with an `Instruction` for each op of the fused program (`core.fusion`).
Every Triton program of the grid reads the same instructions in the same order, takes every P-th tile of each, and meets the
others at a grid barrier between two of them.
The tiles are those of `dense`, `routing`, `attention` and `experts`, so the numbers are those of the launches one by one, bit
for bit; `runtime_ref.backends.triton.megakernel` builds the table and runs both.

The same kernel runs the drafter's program (HEAD_NORM, DRAFT): features through `fc`, keys and values of the context, blocks.

Registers: left alone, the compiler computes every op's offsets once, before the loop over instructions, and holds them through
all ops; no thread has room for that. So the loop forbids hoisting (`disable_licm`), the tiles are small enough that each op
needs less than REGISTERS beside what is common to all, and the assembler is told that bound: given none, it aims at two
programs per multiprocessor and spills.

Barriers: the counter only grows within a launch; the last program to leave puts it back to zero, so nothing has to be cleared
between launches. A barrier costs more than a launch's share of a tile; with norms, rotation, cache writes, residuals and the
router's choice fused into their neighbours there are five (attention layer with experts) to six per layer.

Several ranks run the same program at the same time and sum o_proj and down inside it, without leaving the kernel: whoever
finishes a tile stores the rank's parts of it in memory that all ranks can read, and says so to each of them; when a program has
no tile of its own left, it waits for those that it adds up, in order (`tp_reduction.py`). No second barrier: o_proj's sums and
those of the MLP lie in different halves of that memory, and they alternate, so when a rank writes a half again, all have passed
the other one since. Flags hold the number of the sum (`launches` before this one, times the sums of a launch, plus the op's
ordinal among them), kept on the device, so that a captured graph can be replayed.

In Triton's interpreter programs run one after another, so a grid has one program there; several at once are proven by the
tests' harness of one process per program, and ranks by processes that share memory.

Rejected: per-tile flags instead of barriers (each of a layer's products reads all columns of its input, so nearly every tile
waits for every other one anyway); a table with pointers (64 bits, and the compiler cannot know their alignment).
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from runtime_ref.kernels.attention import attend_tile
from runtime_ref.kernels.dense import gather_tile, product_tile, project_tile, swiglu_tile
from runtime_ref.kernels.expert_tiles import prefetch
from runtime_ref.kernels.experts import experts_work
from runtime_ref.kernels.mxfp4_decode import narrow
from runtime_ref.kernels.routing import route_tile
from runtime_ref.kernels.sync import RELEASE_FLAG, grid_barrier, signal_ranks, sum_ranks, wait_ranks

OPS = ("embed", "enter_full", "enter_window", "attend_full", "attend_window", "merge_add", "norm_gate_up", "down_add",
       "norm_route", "experts_add", "target_hidden", "pick_norm_head", "fuse_hidden", "context")
SUMS = frozenset(("merge_add", "down_add", "experts_add", "fuse_hidden"))  # over ranks


@dataclass(frozen=True)
class Instruction:
    """One op of a program, as the kernel reads it. Weights are offsets into the arena, in units of 128 bytes; 0 where an op has
    none.

    Attributes:
        op: of `OPS`. weight, scales: the op's matrix and, of FP8, its scales. gamma: weights of the norm before it.
        extra: attention sinks, weights of the norms of heads, the router's correction, or pages of down.
        place: which layer of a KV pool, or which of the stored hidden states.
        window: whether heads have the geometry of window layers.
        count, ordinal: of an op that sums over ranks, how many of its kind the program has, and which of them this is, from 1
            on: with the number of launches they make the epoch of its flags. (`count` lies where gamma would: such an op has
            no norm before it.)
        next_weight, next_rows, next_width: the matrix that programs read next, where it is known before this op ends: its
            place, rows, and bytes of a row; no rows where it is not.
    """

    op: str
    weight: int = 0
    scales: int = 0
    gamma: int = 0
    extra: int = 0
    place: int = 0
    window: bool = False
    count: int = 0
    ordinal: int = 0
    next_weight: int = 0
    next_rows: int = 0
    next_width: int = 0

    def encode(self) -> list[int]:
        """FIELDS numbers: op, weight, scales, gamma or count, extra, place, geometry, ordinal, three of what is next, a spare.

        Raises:
            ValueError: an op that the kernel does not know, or a norm before a sum.
        """
        if self.op not in OPS:
            raise ValueError(f"the megakernel has no op {self.op!r}, expected one of {', '.join(OPS)}")
        if self.op in SUMS and (self.gamma or not 1 <= self.ordinal <= self.count):
            raise ValueError(f"{self}: an op that sums over ranks has no gamma, and an ordinal of 1 to count")
        return [OPS.index(self.op), self.weight, self.scales, self.count if self.op in SUMS else self.gamma, self.extra,
                self.place, int(self.window), self.ordinal, self.next_weight, self.next_rows, self.next_width, 0]


@dataclass(frozen=True)
class Tuning:
    """What changes the speed of a launch, and never a bit: which is best only a GPU can say (`measure.gpu_suite.steps`).

    Attributes:
        release_flag: programs wait for a barrier at a flag, not at the counter on which they arrive (`sync.grid_barrier`).
        ahead: bytes that a program asks for before it needs them, 0 or a power of two from 128 on: of the experts' next entry
            before it computes this one, and of its first tile of the next matrix before the barrier.
        packed: see `experts.Launch`.
    """

    release_flag: bool = False
    ahead: int = 0
    packed: bool = True


# Where `Instruction.encode` puts things; the last one is spare. Rows of whole 16 bytes: a launch whose table begins further on
# is the same compilation.
FIELDS = 12
_OP, _WEIGHT, _SCALES, _GAMMA, _EXTRA, _PLACE, _GEOMETRY, _ORDINAL, _NEXT, _NEXT_ROWS, _NEXT_WIDTH = (
    tl.constexpr(i) for i in range(FIELDS - 1))
_COUNT = _GAMMA
# int32 of a launch's barrier: arrivals, programs that left, and from `RELEASE_FLAG` on the line of the flag.
BARRIER = 2 * RELEASE_FLAG
_FLAG = tl.constexpr(RELEASE_FLAG)
# Of a launch: warps of a program, registers of a thread. Pages of expert weights in flight: a multiprocessor holds one program
# here, where the expert kernel alone has four with three pages each; memory is as far away.
WARPS = 8
REGISTERS = 160
STAGES = 8
_FIELDS = tl.constexpr(FIELDS)
_UNIT = tl.constexpr(128)
_EMBED = tl.constexpr(OPS.index("embed"))
_ENTER_FULL = tl.constexpr(OPS.index("enter_full"))
_ENTER_WINDOW = tl.constexpr(OPS.index("enter_window"))
_ATTEND_FULL = tl.constexpr(OPS.index("attend_full"))
_ATTEND_WINDOW = tl.constexpr(OPS.index("attend_window"))
_MERGE_ADD = tl.constexpr(OPS.index("merge_add"))
_NORM_GATE_UP = tl.constexpr(OPS.index("norm_gate_up"))
_DOWN_ADD = tl.constexpr(OPS.index("down_add"))
_NORM_ROUTE = tl.constexpr(OPS.index("norm_route"))
_EXPERTS_ADD = tl.constexpr(OPS.index("experts_add"))
_TARGET_HIDDEN = tl.constexpr(OPS.index("target_hidden"))
_HEAD = tl.constexpr(OPS.index("pick_norm_head"))
_FUSE_HIDDEN = tl.constexpr(OPS.index("fuse_hidden"))
_CONTEXT = tl.constexpr(OPS.index("context"))


@triton.jit
def _bytes_at(arena, entry, FIELD: tl.constexpr):
    """Pointer (uint8) to the weights that a field of an instruction names."""
    return arena + tl.load(entry + FIELD).to(tl.int64) * _UNIT


@triton.jit
def _floats_at(arena, entry, FIELD: tl.constexpr):
    return _bytes_at(arena, entry, FIELD).to(tl.pointer_type(tl.float32), bitcast=True)


@triton.jit
def _matrix_at(arena, entry, FIELD: tl.constexpr, FP8: tl.constexpr):
    """Pointer to a matrix: bytes of FP8, or bf16."""
    if FP8:
        return _bytes_at(arena, entry, FIELD)
    else:
        return _bytes_at(arena, entry, FIELD).to(tl.pointer_type(tl.bfloat16), bitcast=True)


@triton.jit
def _enter(entry, arena, x, cos, sin, positions, slots, q, keys, values, R, H, epsilon, v_scale, stride,
           QUERIES: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, V: tl.constexpr, HALF: tl.constexpr, BN: tl.constexpr,
           BK: tl.constexpr, HEAD_NORM: tl.constexpr, FP8: tl.constexpr, FLOAT_DOT: tl.constexpr):
    groups = tl.cdiv(R, 8)
    place = tl.load(entry + _PLACE).to(tl.int64) * KEYS * stride
    CHUNKS: tl.constexpr = ((D if D > V else V) + BN - 1) // BN
    TILES: tl.constexpr = (QUERIES + 2 * KEYS) * CHUNKS
    t = tl.program_id(0)
    while t < TILES * groups:
        project_tile(t // groups, t % groups, x, _matrix_at(arena, entry, _WEIGHT, FP8), _floats_at(arena, entry, _SCALES),
                     _floats_at(arena, entry, _GAMMA), _floats_at(arena, entry, _EXTRA), cos, sin, positions, slots, q,
                     keys + place * D, values + place * V, R, H, epsilon, D**-0.5, v_scale, stride, epsilon, QUERIES, KEYS, D,
                     V, HALF, BN, BK, True, HEAD_NORM, FLOAT_DOT)
        t += tl.num_programs(0)


@triton.jit
def _attend(entry, arena, q, keys, values, tables, first, start, count, row, partial, stats, arrived, out, R, blocks, stride,
            width, chunks, HEADS: tl.constexpr, G: tl.constexpr, SPLIT: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
            D_HEAD: tl.constexpr, D_TAIL: tl.constexpr, V: tl.constexpr, V_WIDE: tl.constexpr, PAGE_: tl.constexpr,
            CHUNK: tl.constexpr,
            WINDOW: tl.constexpr, HAS_SINK: tl.constexpr, DRAFT: tl.constexpr, FLOAT_DOT: tl.constexpr):
    place = tl.load(entry + _PLACE).to(tl.int64) * (HEADS // SPLIT) * stride
    t = tl.program_id(0)
    while t < blocks * HEADS * chunks:
        attend_tile(t // chunks, t % chunks, q, keys + place * D, values + place * V, _floats_at(arena, entry, _EXTRA), tables,
                    first, start, count, row, partial, stats, arrived, out, R, stride, width, chunks, HEADS, G, SPLIT, 8,
                    M, D, D_HEAD, D_TAIL, V, V_WIDE, PAGE_, CHUNK, WINDOW, HAS_SINK, DRAFT, FLOAT_DOT)
        t += tl.num_programs(0)


@triton.jit
def _product(entry, arena, x, gamma, rows, residual, out, R, N, K, epsilon, heads_stride, BN: tl.constexpr, BK: tl.constexpr,
             V: tl.constexpr, NORM: tl.constexpr, PICK: tl.constexpr, RESIDUAL: tl.constexpr, PARTS: tl.constexpr,
             FP8: tl.constexpr, FLOAT_DOT: tl.constexpr):
    groups = tl.cdiv(R, 8)
    t = tl.program_id(0)
    while t < tl.cdiv(N, BN) * groups:
        product_tile(t // groups, t % groups, x, _matrix_at(arena, entry, _WEIGHT, FP8), _floats_at(arena, entry, _SCALES),
                     gamma, rows, residual, out, R, N, K, epsilon, heads_stride, BN, BK, V, NORM, PICK, RESIDUAL, PARTS,
        False, FLOAT_DOT)
        t += tl.num_programs(0)


@triton.jit
def _epoch(entry, launches):
    """Number of an instruction's sum over ranks, counted since the memory of the ranks was made: what its flags become."""
    return tl.load(launches) * tl.load(entry + _COUNT) + tl.load(entry + _ORDINAL)


@triton.jit
def _add_ranks(buffers, offset, x, first_row, first_column, R, H, WIDTH: tl.constexpr, PARTS: tl.constexpr,
               RANKS: tl.constexpr, FLOAT_DOT: tl.constexpr):
    """x [8 rows, WIDTH columns] += all ranks' parts, added to zero in order first."""
    row = first_row + tl.arange(0, 8)
    column = first_column + tl.arange(0, WIDTH)
    at = row[:, None] * H + column[None, :]
    inside = (row < R)[:, None] & (column < H)[None, :]
    total = sum_ranks(buffers, offset, at, inside, R * H, PARTS, RANKS)
    total += tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + at, narrow(total, x.dtype.element_ty, FLOAT_DOT), mask=inside)


@triton.jit
def _add_product(entry, arena, x, gamma, rows, out, buffers, signals, launches, rank, offset, place, failed, R, H, K, epsilon,
                 heads_stride, BN: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, PARTS: tl.constexpr, FP8: tl.constexpr,
                 RANKS: tl.constexpr, POLLS: tl.constexpr, FLOAT_DOT: tl.constexpr):
    """out [R, H] += a product whose K is shared among the ranks.

    offset, place: where its parts lie in the ranks' buffers, and its first flag.
    """
    if RANKS == 1:
        _product(entry, arena, x, gamma, rows, out, out, R, H, K, epsilon, heads_stride, BN, BK, V, False, False, True, PARTS,
                 FP8, FLOAT_DOT)
    else:
        groups = tl.cdiv(R, 8)
        epoch = _epoch(entry, launches)
        own = tl.load(buffers + rank).to(tl.pointer_type(tl.float32)) + offset
        t = tl.program_id(0)
        while t < tl.cdiv(H, BN) * groups:
            product_tile(t // groups, t % groups, x, _matrix_at(arena, entry, _WEIGHT, FP8), _floats_at(arena, entry,
                         _SCALES), gamma, rows, out, own, R, H, K, epsilon, heads_stride, BN, BK, V, False, False, False,
            PARTS, True, FLOAT_DOT)
            signal_ranks(signals, place + t, rank, epoch, RANKS)
            t += tl.num_programs(0)
        t = tl.program_id(0)
        while t < tl.cdiv(H, BN) * groups:
            wait_ranks(signals, place + t, rank, epoch, failed, RANKS, POLLS)
            _add_ranks(buffers, offset, out, t % groups * 8, t // groups * BN, R, H, BN, PARTS, RANKS, FLOAT_DOT)
            t += tl.num_programs(0)


@triton.jit
def _fuse_hidden(entry, arena, target_hidden, gamma, rows, x, features, buffers, signals, launches, rank, offset, place,
                 failed, R, H, K, BN: tl.constexpr, BK: tl.constexpr, RANKS: tl.constexpr, POLLS: tl.constexpr,
                 FLOAT_DOT: tl.constexpr):
    """features float32 [R, H] of target_hidden [R, K]. Each of several ranks makes an equal share of the columns, and all copy
    them.

    offset, place: where a rank's columns lie in its buffer, and its first flag; in no half of the sums, whose turn is not its.
    """
    if RANKS == 1:
        _product(entry, arena, target_hidden, gamma, rows, x, features, R, H, K, 0.0, 0, BN, BK, 0, False, False, False, 1,
                 False, FLOAT_DOT)
    else:
        groups = tl.cdiv(R, 8)
        share = H // RANKS
        epoch = _epoch(entry, launches)
        own = tl.load(buffers + rank).to(tl.pointer_type(tl.float32)) + offset
        t = tl.program_id(0)
        while t < tl.cdiv(share, BN) * groups:
            product_tile(t // groups, t % groups, target_hidden, _matrix_at(arena, entry, _WEIGHT, False),
                         _floats_at(arena, entry, _SCALES), gamma, rows, own, own, R, share, K, 0.0, 0, BN, BK, 0, False, False,
                         False, 1, False, FLOAT_DOT)
            signal_ranks(signals, place + t, rank, epoch, RANKS)
            t += tl.num_programs(0)
        t = tl.program_id(0)
        while t < tl.cdiv(share, BN) * groups:
            wait_ranks(signals, place + t, rank, epoch, failed, RANKS, POLLS)
            row = t % groups * 8 + tl.arange(0, 8)
            column = t // groups * BN + tl.arange(0, BN)
            inside = (row < R)[:, None] & (column < share)[None, :]
            for source in tl.static_range(RANKS):
                there = tl.load(buffers + source).to(tl.pointer_type(tl.float32)) + offset
                values = tl.load(there + row[:, None] * share + column[None, :], mask=inside)
                tl.store(features + row[:, None] * H + (source * share + column)[None, :], values, mask=inside)
            t += tl.num_programs(0)


@triton.jit
def _ask_for_next(entry, arena, groups, BN: tl.constexpr, AHEAD: tl.constexpr):
    """Asks for AHEAD bytes of this program's first tile of the matrix that comes next: the beginnings of BN rows. While others
    still work on this op, or wait at its barrier, memory is idle otherwise."""
    LINES: tl.constexpr = AHEAD // (128 * BN) if AHEAD > 128 * BN else 1
    rows = tl.load(entry + _NEXT_ROWS)
    first = tl.program_id(0) // groups * BN
    if first < rows:
        width = tl.load(entry + _NEXT_WIDTH)
        i = tl.arange(0, AHEAD // 128)
        row = tl.minimum(first + i // LINES, rows - 1)
        prefetch(_bytes_at(arena, entry, _NEXT) + row.to(tl.int64) * width + tl.minimum(i % LINES * 128, width - 1))


# What changes from step to step, or from rank to rank: a compilation for each of its values or divisors would cost seconds in
# the middle of an answer. What is left are sizes of the model, whose divisors widths of accesses depend on.
@triton.jit(do_not_specialize=["ops", "R", "wanted", "context", "full_width", "window_width", "full_chunks", "window_chunks",
                               "blocks", "up_entries", "down_entries", "K_UP", "rank", "half"])
def step_kernel(
        table, ops, arena, embed, spare, head, final_norm, ids, positions, head_rows, x, q, heads, y, inner, index, weight,
        scores, route_arrived, target_hidden, features, context_positions, context_slots, logits, barrier, failed,
        full_cos, full_sin, full_keys, full_values, full_slots, full_tables, full_first, full_start, full_count, full_row,
        window_cos, window_sin, window_keys, window_values, window_slots, window_tables, window_first, window_start,
        window_count, window_row, partial, stats, attend_arrived, order, plan, expert_inner, expert_partial, ready, arrived,
        control, R, H, I, E, vocabulary, wanted, context, hidden_width, epsilon, factor, v_scale, full_stride, window_stride,
        full_width, window_width, full_chunks, window_chunks, blocks, up_entries, down_entries, K_UP,
        buffers, signals, launches, rank, half,
        FULL: tl.constexpr, WINDOW: tl.constexpr, DENSE: tl.constexpr, MOE: tl.constexpr, DRAFT: tl.constexpr,
        HEAD_NORM: tl.constexpr, QKV_FP8: tl.constexpr, O_FP8: tl.constexpr, MLP_FP8: tl.constexpr,
        HAS_TARGET_HIDDEN: tl.constexpr, F_QUERIES: tl.constexpr, F_KEYS: tl.constexpr, F_SPLIT: tl.constexpr,
        F_M: tl.constexpr, F_D: tl.constexpr, F_D_HEAD: tl.constexpr, F_D_TAIL: tl.constexpr, F_V: tl.constexpr,
        F_V_WIDE: tl.constexpr, F_HALF: tl.constexpr, F_WINDOW: tl.constexpr, F_SINK: tl.constexpr, F_BN: tl.constexpr,
        W_QUERIES: tl.constexpr, W_KEYS: tl.constexpr, W_SPLIT: tl.constexpr, W_M: tl.constexpr, W_D: tl.constexpr,
        W_D_HEAD: tl.constexpr, W_D_TAIL: tl.constexpr, W_V: tl.constexpr, W_V_WIDE: tl.constexpr, W_HALF: tl.constexpr,
        W_WINDOW: tl.constexpr, W_SINK: tl.constexpr, W_BN: tl.constexpr, PAGE_: tl.constexpr, CHUNK: tl.constexpr,
        A: tl.constexpr, WIDE: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, NORMED: tl.constexpr,
        M: tl.constexpr, UP: tl.constexpr, DOWN: tl.constexpr, TILES: tl.constexpr, K_DOWN: tl.constexpr, UP_ROWS: tl.constexpr,
        UP_DEPTH: tl.constexpr, DOWN_ROWS: tl.constexpr, DOWN_DEPTH: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
        PREFETCH: tl.constexpr, PTX: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ROUTE_BN: tl.constexpr,
        ROUTE_BK: tl.constexpr, RANKS: tl.constexpr, F_PARTS: tl.constexpr, W_PARTS: tl.constexpr, D_PARTS: tl.constexpr,
        PARTS: tl.constexpr, COPY: tl.constexpr, POLLS: tl.constexpr, FLOAT_DOT: tl.constexpr, PACKED: tl.constexpr,
        AHEAD: tl.constexpr, FLAG: tl.constexpr):
    """Runs the instructions of `table`. `backends.triton.megakernel.Globals` documents and fills the arguments; lower-case ones
    change from step to step."""
    pid = tl.program_id(0)
    groups = tl.cdiv(R, 8)
    places = tl.cdiv(H, BN) * 8  # flags of a product of up to 64 rows: o_proj's, then those of dense layers, then the experts'
    for i in tl.range(0, ops, disable_licm=True):
        entry = table + i * _FIELDS
        op = tl.load(entry + _OP)
        if op == _EMBED:
            t = pid
            while t < R:
                gather_tile(t, embed, ids, spare, x, H, COPY)
                t += tl.num_programs(0)
        if FULL:
            if op == _ENTER_FULL:
                _enter(entry, arena, x, full_cos, full_sin, positions, full_slots, q, full_keys, full_values, R, H, epsilon,
                       v_scale, full_stride, F_QUERIES, F_KEYS, F_D, F_V, F_HALF, F_BN, BK, HEAD_NORM, QKV_FP8, FLOAT_DOT)
            if op == _ATTEND_FULL:
                _attend(entry, arena, q, full_keys, full_values, full_tables, full_first, full_start, full_count, full_row,
                        partial, stats, attend_arrived, heads, R, blocks, full_stride, full_width, full_chunks,
                        F_KEYS * F_SPLIT, F_QUERIES // (F_KEYS * F_SPLIT), F_SPLIT, F_M, F_D, F_D_HEAD, F_D_TAIL, F_V, F_V_WIDE,
                        PAGE_, CHUNK, F_WINDOW, F_SINK, DRAFT, FLOAT_DOT)
        if WINDOW:
            if op == _ENTER_WINDOW:
                _enter(entry, arena, x, window_cos, window_sin, positions, window_slots, q, window_keys, window_values, R, H,
                       epsilon, v_scale, window_stride, W_QUERIES, W_KEYS, W_D, W_V, W_HALF, W_BN, BK, HEAD_NORM, QKV_FP8,
                       FLOAT_DOT)
            if op == _ATTEND_WINDOW:
                _attend(entry, arena, q, window_keys, window_values, window_tables, window_first, window_start, window_count,
                        window_row, partial, stats, attend_arrived, heads, R, blocks, window_stride, window_width,
                        window_chunks, W_KEYS * W_SPLIT, W_QUERIES // (W_KEYS * W_SPLIT), W_SPLIT, W_M, W_D, W_D_HEAD,
                        W_D_TAIL, W_V, W_V_WIDE, PAGE_, CHUNK, W_WINDOW, W_SINK, False, FLOAT_DOT)
        if op == _MERGE_ADD:
            if FULL:
                if tl.load(entry + _GEOMETRY) == 0:
                    _add_product(entry, arena, heads, final_norm, head_rows, x, buffers, signals, launches, rank, 0, 0,
                                 failed, R, H, F_QUERIES * F_V, epsilon, R * F_V, BN, BK, F_V, F_PARTS, O_FP8, RANKS, POLLS,
            FLOAT_DOT)
            if WINDOW:
                if tl.load(entry + _GEOMETRY) == 1:
                    _add_product(entry, arena, heads, final_norm, head_rows, x, buffers, signals, launches, rank, 0, 0,
                                 failed, R, H, W_QUERIES * W_V, epsilon, R * W_V, BN, BK, W_V, W_PARTS, O_FP8, RANKS, POLLS,
        FLOAT_DOT)
        if DENSE:
            if op == _NORM_GATE_UP:
                t = pid
                while t < tl.cdiv(I, BN) * groups:
                    swiglu_tile(t // groups, t % groups, x, _matrix_at(arena, entry, _WEIGHT, MLP_FP8), _floats_at(arena,
                                entry, _SCALES), _floats_at(arena, entry, _GAMMA), inner, R, I, H, epsilon, BN, BK, True,
                    FLOAT_DOT)
                    t += tl.num_programs(0)
            if op == _DOWN_ADD:
                _add_product(entry, arena, inner, final_norm, head_rows, x, buffers, signals, launches, rank, half, places,
                             failed, R, H, I, epsilon, 0, BN, BK, 0, D_PARTS, MLP_FP8, RANKS, POLLS, FLOAT_DOT)
        if MOE:
            if op == _NORM_ROUTE:
                t = pid
                while t < tl.cdiv(E, ROUTE_BN) * groups:
                    route_tile(t // groups, t % groups, x, _floats_at(arena, entry, _WEIGHT), _floats_at(arena, entry, _GAMMA),
                               _floats_at(arena, entry, _EXTRA), scores, y, route_arrived, index, weight, R, E, H, epsilon,
                               factor, tl.cdiv(E, ROUTE_BN), A, WIDE, GROUPS, TOP_GROUPS, NORMED, ROUTE_BN, ROUTE_BK, True,
                    FLOAT_DOT)
                    t += tl.num_programs(0)
            if op == _EXPERTS_ADD:
                if RANKS == 1:
                    experts_work(y, _bytes_at(arena, entry, _WEIGHT), _bytes_at(arena, entry, _EXTRA), index, weight, order,
                                 plan, expert_inner, expert_partial, x, x, ready, arrived, control, R, H, E, up_entries,
                                 down_entries, K_UP, 0, signals, rank, 0, 0, A, M, UP, DOWN, TILES, K_DOWN, PARTS, False,
                                 UP_ROWS, UP_DEPTH, DOWN_ROWS, DOWN_DEPTH, EVEN, STAGES, PREFETCH, False, True, POLLS, PTX,
                                 FLOAT_DOT, 0, True, 1, False, PACKED, AHEAD)
                else:
                    COLUMNS: tl.constexpr = TILES * DOWN_ROWS
                    BLOCK: tl.constexpr = COLUMNS if COLUMNS < 128 else 128
                    epoch = _epoch(entry, launches)
                    own = tl.load(buffers + rank).to(tl.pointer_type(tl.float32)) + half
                    experts_work(y, _bytes_at(arena, entry, _WEIGHT), _bytes_at(arena, entry, _EXTRA), index, weight, order,
                                 plan, expert_inner, expert_partial, x, own, ready, arrived, control, R, H, E, up_entries,
                                 down_entries, K_UP, R * H, signals, rank, 2 * places, epoch, A, M, UP, DOWN, TILES, K_DOWN,
                                 PARTS, True, UP_ROWS, UP_DEPTH, DOWN_ROWS, DOWN_DEPTH, EVEN, STAGES, PREFETCH, False, True,
                                 POLLS, PTX, FLOAT_DOT, 0, False, RANKS, False, PACKED, AHEAD)
                    # Blocks of 128 columns, so that more programs add up than there are chunks.
                    t = pid
                    while t < tl.cdiv(H, BLOCK) * groups:
                        wait_ranks(signals, 2 * places + t // groups * BLOCK // COLUMNS, rank, epoch, failed, RANKS, POLLS)
                        _add_ranks(buffers, half, x, t % groups * 8, t // groups * BLOCK, R, H, BLOCK, PARTS, RANKS, FLOAT_DOT)
                        t += tl.num_programs(0)
        if HAS_TARGET_HIDDEN:
            if op == _TARGET_HIDDEN:
                target = target_hidden + tl.load(entry + _PLACE).to(tl.int64) * R * H
                t = pid
                while t < tl.cdiv(R * H, COPY):
                    at = t * COPY + tl.arange(0, COPY)
                    tl.store(target + at, tl.load(x + at, mask=at < R * H), mask=at < R * H)
                    t += tl.num_programs(0)
        if DRAFT:
            if op == _FUSE_HIDDEN:
                _fuse_hidden(entry, arena, target_hidden, final_norm, head_rows, x, features, buffers, signals, launches,
                             rank, 2 * half, 2 * places, failed, context, H, hidden_width, BN, BK, RANKS, POLLS, FLOAT_DOT)
            if op == _CONTEXT:
                _enter(entry, arena, features, full_cos, full_sin, context_positions, context_slots, q, full_keys, full_values,
                       context, H, epsilon, v_scale, full_stride, 0, F_KEYS, F_D, F_V, F_HALF, F_BN, BK, HEAD_NORM, QKV_FP8,
                       FLOAT_DOT)
        if op == _HEAD:
            head_groups = tl.cdiv(wanted, 8)
            t = pid
            while t < tl.cdiv(vocabulary, BN) * head_groups:
                product_tile(t // head_groups, t % head_groups, x, head, final_norm, final_norm, head_rows, x, logits, wanted,
                             vocabulary, H, epsilon, 0, BN, BK, 0, True, True, False, 1, False, FLOAT_DOT)
                t += tl.num_programs(0)
        if PTX and AHEAD > 0:
            _ask_for_next(entry, arena, groups, BN, AHEAD)
        grid_barrier(barrier, i + 1, failed, POLLS, FLAG)
    # After the last barrier nobody polls for a higher value: the last one to come here clears everything.
    if tl.atomic_add(barrier + 1, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        tl.store(barrier, 0)
        tl.store(barrier + 1, 0)
        tl.store(barrier + _FLAG, 0)
        tl.store(launches, tl.load(launches) + 1)


def launch_options(interpreted: bool) -> dict:
    """How `step_kernel` is launched, and compiled ahead of time: cooperatively, because its programs wait for each other."""
    return {} if interpreted else {"num_warps": WARPS, "maxnreg": REGISTERS, "launch_cooperative_grid": True}
