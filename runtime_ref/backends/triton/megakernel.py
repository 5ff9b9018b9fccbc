"""A whole step in one launch: the fused program as a table of int32, and the launch that walks it.

`table_of` encodes a list of `fusion.fused`: one row per op, [op, w, scales, gamma, extra, place, geometry, 0]; weights as
offsets into the arena, in units of its alignment. What a row means is in `kernels/step.py`. `PersistentStep.run` fills in what
changes from step to step and launches; it serves steps of up to 64 rows. Longer steps (prompts) are bound by arithmetic, not by
launches, and stay op by op.

With several ranks every rank launches its walk, and the walks sum over ranks among themselves, in memory that all of them can
read (`kernels/symmetric.py`); only the logits of the ranks' shares of the vocabulary are gathered outside. Ranks must make the
same steps in the same order, as the engine's do.

The launch is cooperative: every program must be resident at once, so the grid is what the GPU holds (`programs`), one in
Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton

from runtime_ref.backends.triton.backend import BLOCK, Blocks, KernelPool, KernelStep, TritonBackend
from runtime_ref.checkpoints.device_weights import Arena, KernelLayer
from runtime_ref.core.fusion import fused
from runtime_ref.core.kv_cache import PAGE
from runtime_ref.core.program import Op
from runtime_ref.kernels.attention import CHUNK_PAGES, attention_constants, most_chunks
from runtime_ref.kernels.experimental.megakernel import OPS, STAGES, step_kernel, walk_options
from runtime_ref.kernels.experimental.symmetric_memory import Symmetric
from runtime_ref.kernels.experts import MAX_TOKENS, POLLS, Workspace, kernel_arguments
from runtime_ref.kernels.row_launches import Heads, Matrix

_KINDS = {"full": "F", "window": "W"}
SUMS = ("merge_add", "down_add", "experts_add")  # what ranks add up


def table_of(program: list[Op], layers: list[KernelLayer], arena: Arena, pools: dict[str, KernelPool]) -> torch.Tensor:
    """int32 [ops, step.FIELDS] of a fused list.

    an op that sums over ranks has no gamma: field 3 says how many of its op the list holds, field 7 the how manieth it is.

    Raises:
        ValueError: an op that the walk does not know (its op is named).
    """
    taps = [op.layer for op in program if op.name == "tap"]
    rows, seen = [], dict.fromkeys(SUMS, 0)
    for op in program:
        if op.name not in OPS:
            raise ValueError(f"{op}: the persistent step has no op {op.name!r}")
        layer = layers[op.layer] if op.layer >= 0 else None
        row = [OPS.index(op.name), *_pieces(op.name, layer, arena), 0, 0]
        if op.name.startswith(("enter", "attend")):
            row.append(pools[layer.kind].place[op.layer])
        elif op.name == "tap":
            row.append(taps.index(op.layer))
        else:
            row.append(0)
        row = [*row[:5], row[-1], int(layer is not None and layer.kind == "window"), 0]
        if op.name in SUMS:
            seen[op.name] += 1
            row[3], row[7] = sum(other.name == op.name for other in program), seen[op.name]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int32)


def _pieces(op: str, layer: KernelLayer | None, arena: Arena) -> list[int]:
    """Offsets of w, scales, gamma and extra."""
    def offsets(matrix: Matrix | None, gamma=None, extra=None) -> list[int]:
        parts = (None, None) if matrix is None else (matrix.w, matrix.scales)
        return [0 if t is None else arena.offset(t) for t in (*parts, gamma, extra)]

    if op.startswith("enter"):
        return offsets(layer.qkv, layer.input_norm)
    if op.startswith("attend"):
        return offsets(None, None, layer.sink)
    if op == "merge_add":
        return offsets(layer.o)
    if op == "norm_gate_up":
        return offsets(layer.gate_up, layer.post_norm)
    if op == "down_add":
        return offsets(layer.down)
    if op == "norm_route":
        return [arena.offset(layer.router.w), 0, arena.offset(layer.post_norm), arena.offset(layer.router.correction)]
    if op == "experts_add":
        return [arena.offset(layer.pages.up), 0, 0, arena.offset(layer.pages.down)]
    return [0, 0, 0, 0]


def kind_constants(prefix: str, heads: Heads, window: int | None, sink: bool, columns: int, float_dot: bool) -> dict:
    """Compile-time arguments of one geometry of attention."""
    own = attention_constants(heads.keys, heads.queries // heads.keys, BLOCK, heads.d, heads.v, window, sink,
                              float_dot=float_dot)
    found = {name: own[name] for name in ("SPLIT", "M", "D", "D_HEAD", "D_TAIL", "V", "V_WIDE", "WINDOW")}
    found |= {"QUERIES": heads.queries, "KEYS": heads.keys, "HALF": heads.rotated // 2, "SINK": sink,
              "BN": min(columns, triton.next_power_of_2(max(heads.d, heads.v)))}
    return {f"{prefix}_{name}": value for name, value in found.items()}


def used_once(names: list[bool], what: str) -> bool:
    """The one value that all layers agree on."""
    if len(set(names)) > 1:
        raise ValueError(f"the persistent step wants {what} in all layers or in none")
    return bool(names and names[0])


def the_one(values: list[int], what: str) -> int:
    if len(set(values)) > 1:
        raise ValueError(f"the persistent step wants {what} to be equal in all layers; found {sorted(set(values))}")
    return values[0]


class PersistentStep:
    """One program of a backend, encoded, with its scratch.

    Args:
        program: as of `core.program.target_program`, not fused.
        programs: of the grid; all must be resident.

    Raises:
        ValueError: layers of one kind that differ in what the compiled walk fixes; ranks without memory that they share.
    """

    def __init__(self, backend: TritonBackend, program: list[Op], programs: int = 1, polls: int = POLLS):
        self.backend, self.programs, self.polls = backend, programs, polls
        self.listed, self.program = program, fused(program)
        self.taps = [op.layer for op in self.program if op.name == "tap"]
        weights, device = backend.kernel_weights, backend.device
        self.table = table_of(self.program, weights.layers, weights.arena, backend.pools).to(device)
        self.constants = self._constants()
        self.spaces = {}
        if any(layer.pages is not None for layer in weights.layers):
            pages = next(layer.pages for layer in weights.layers if layer.pages is not None)
            launch = replace(backend.launch, tickets=False, programs=programs, polls=polls, stages=STAGES)
            self.spaces = {n: Workspace(pages, n, backend.config.num_experts_per_tok, launch) for n in (BLOCK, MAX_TOKENS)}
        self.scratch = self._scratch()
        self.symmetric = self._symmetric()
        self._attention: dict[str, torch.Tensor] = {}

    def _constants(self) -> dict:
        backend, layers, tiling = self.backend, self.backend.kernel_weights.layers, self.backend.tiling
        if backend.capabilities.mxfp8_activations:
            raise ValueError("the persistent step has no experts in native pages (backend 'triton-mxfp8'); they run op by op")
        if any(layer.head_norm is not None or layer.router and layer.router.softmax for layer in layers):
            raise ValueError("the persistent step has neither norms of heads nor a softmax router; this model runs op by op")
        found = {"DRAFT": False, "HEAD_NORM": False, "HAS_TAPS": bool(self.taps), "PAGE_": PAGE, "CHUNK": CHUNK_PAGES,
                 "QKV_FP8": used_once([a.qkv.scales is not None for a in layers], "FP8 qkv"),
                 "O_FP8": used_once([a.o.scales is not None for a in layers], "FP8 o_proj"),
                 "MLP_FP8": used_once([a.gate_up.scales is not None for a in layers if a.gate_up], "FP8 dense layers"),
                 "DENSE": any(a.gate_up for a in layers), "MOE": any(a.router for a in layers), "BN": tiling.columns,
                 "BK": tiling.depth, "ROUTE_BN": tiling.experts, "ROUTE_BK": tiling.router_depth, "COPY": tiling.block,
                 "POLLS": self.polls, "FLOAT_DOT": tiling.float_dot}
        for kind, prefix in _KINDS.items():
            own = [layer for layer in layers if layer.kind == kind]
            found[kind.upper()] = bool(own)
            shown = own or layers
            window = backend.config.sliding_window if kind == "window" else None
            sink = used_once([layer.sink is not None for layer in own], f"{kind} sinks")
            found |= kind_constants(prefix, shown[0].heads, window, sink, tiling.columns, tiling.float_dot)
            found[f"{prefix}_PARTS"] = the_one([layer.parts.o for layer in own] or [1], f"the parts of {kind} o_proj")
        found |= {"RANKS": backend.ranks.count,
                  "D_PARTS": the_one([a.parts.down for a in layers if a.gate_up] or [1], "the parts of dense layers")}
        router = next((layer.router for layer in layers if layer.router), None)
        return found | (router.constants() if router else {"A": 1, "WIDE": 16, "GROUPS": 1, "TOP_GROUPS": 1, "NORMED": False})

    def _scratch(self) -> dict[str, torch.Tensor]:
        """Buffers for up to MAX_TOKENS rows, by the kernel's names."""
        backend, layers, R = self.backend, self.backend.kernel_weights.layers, MAX_TOKENS
        config, device = backend.config, backend.device
        H, A, E = config.hidden_size, config.num_experts_per_tok, config.n_routed_experts
        most = {name: max(getattr(layer.heads, name) for layer in layers) for name in ("queries", "d", "v")}
        sizes = {"x": (R * H, torch.bfloat16), "y": (R * H, torch.bfloat16),
                 "q": (most["queries"] * R * most["d"], torch.bfloat16),
                 "heads": (most["queries"] * R * most["v"], torch.bfloat16), "features": (1, torch.float32),
                 "inner": (R * config.intermediate_size, torch.bfloat16), "index": (R * A, torch.int32),
                 "weight": (R * A, torch.float32), "scores": (R * E, torch.float32)}
        found = {name: torch.empty(size, dtype=dtype, device=device) for name, (size, dtype) in sizes.items()}
        counters = {"route_arrived": R // BLOCK, "barrier": 2, "failed": 1, "attend_arrived": R * most["queries"]}
        return found | {name: torch.zeros(size, dtype=torch.int32, device=device) for name, size in counters.items()}

    def _symmetric(self) -> Symmetric:
        """What ranks add up in: two halves of every part of 64 rows, and flags for the tiles of each kind of sum."""
        layers, H = self.backend.kernel_weights.layers, self.backend.config.hidden_size
        parts = max(max(layer.parts.o, layer.parts.down, layer.parts.experts) for layer in layers)
        places = 2 * (MAX_TOKENS // BLOCK) * triton.cdiv(H, self.backend.tiling.columns)
        places += max((space.chunks for space in self.spaces.values()), default=0)
        return Symmetric(self.backend.ranks, parts * MAX_TOKENS * H, places, self.backend.device)

    def serves(self, program: list[Op], step: KernelStep) -> bool:
        """Whether the walk is that of this list, and the step short enough for it."""
        return program is self.listed and step.real <= MAX_TOKENS

    @torch.inference_mode()
    def run(self, step: KernelStep) -> dict[str, torch.Tensor]:
        """Logits and taps of the step, as `TritonBackend.run` returns them."""
        backend, config = self.backend, self.backend.config
        H = config.hidden_size
        logits = torch.empty((step.head_rows.shape[0], backend.kernel_weights.head.w.shape[0]), dtype=torch.float32,
                             device=backend.device)
        taps = torch.empty((max(1, len(self.taps)), step.real, H), dtype=torch.bfloat16, device=backend.device)
        self.launch(step, logits, taps)
        return {"logits": backend.whole_vocabulary(logits)} | {f"tap.{layer}": taps[i] for i, layer in enumerate(self.taps)}

    def launch(self, step: KernelStep, logits: torch.Tensor, taps: torch.Tensor) -> None:
        """The walk itself: one launch."""
        arguments, constants = self.arguments(step, logits, taps)
        step_kernel[(self.programs,)](**arguments, **constants, **walk_options(self.constants["FLOAT_DOT"]))

    def arguments(self, step: KernelStep, logits: torch.Tensor, taps: torch.Tensor) -> tuple[dict, dict]:
        """Run-time and compile-time arguments of `step_kernel`."""
        backend, config, s = self.backend, self.backend.config, self.scratch
        weights, R = backend.kernel_weights, step.real
        router = next((layer.router for layer in weights.layers if layer.router), None)
        arguments = {"table": self.table, "tasks": self.table.shape[0], "arena": weights.arena.data, "embed": weights.embed,
                     "spare": weights.embed, "head": weights.head.w, "final_norm": weights.norm, "ids": step.ids,
                     "positions": step.positions, "head_rows": step.head_rows, "taps": taps,
                     "context_positions": step.positions, "context_slots": step.positions, "logits": logits, "R": R,
                     "H": config.hidden_size, "I": config.intermediate_size // backend.ranks.count,
                     "E": config.n_routed_experts, "vocabulary": weights.head.w.shape[0],
                     "wanted": step.head_rows.shape[0], "context": 0, "taps_width": 0, "epsilon": float(backend.epsilon),
                     "factor": float(router.factor) if router else 1.0, "v_scale": value_scale(config.attention_value_scale)}
        arguments |= s | self.symmetric.arguments()
        kinds = {kind: (backend.pools[kind], step.blocks[kind], backend.rotary[kind]) for kind in backend.pools}
        arguments |= kind_arguments(kinds)
        arguments |= self._attention_scratch({kind: (pool, blocks) for kind, (pool, blocks, _) in kinds.items()})
        if not self.spaces:
            return arguments | dict.fromkeys(EXPERT_BUFFERS, s["barrier"]) | dict.fromkeys(EXPERT_NUMBERS, 0), (
                self.constants | NO_EXPERTS)
        space = self.spaces[next(n for n in (BLOCK, MAX_TOKENS) if n >= R)]
        pages = next(layer.pages for layer in weights.layers if layer.pages is not None)
        like = torch.empty((R, config.hidden_size), device="meta")
        positional, own = kernel_arguments(like, None, None, pages, space, None)
        numbers = dict(zip(EXPERT_NUMBERS, positional[-4:-1], strict=True))
        buffers = {"order": space.order, "plan": space.plan, "expert_inner": space.inner, "expert_partial": space.partial,
                   "ready": space.ready, "arrived": space.arrived, "control": space.control}
        return arguments | numbers | buffers, self.constants | {name: own[name] for name in NO_EXPERTS}

    def _attention_scratch(self, kinds: dict[str, tuple[KernelPool, Blocks]]) -> dict:
        """Partial results of attention, grown to the largest step seen, and the chunks of each kind."""
        numbers, most = {}, {"partial": 0, "stats": 0}
        for kind, prefix in _KINDS.items():
            chunks = 1
            if kind in kinds:
                pool, blocks = kinds[kind]
                chunks = most_chunks(blocks.longest, pool.window, BLOCK)
                heads = self.constants[f"{prefix}_KEYS"] * self.constants[f"{prefix}_SPLIT"]
                tiles = blocks.start.shape[0] * heads * chunks * self.constants[f"{prefix}_M"]
                most = {"partial": max(most["partial"], tiles * self.constants[f"{prefix}_V_WIDE"]),
                        "stats": max(most["stats"], 2 * tiles)}
            numbers[f"{kind}_chunks"] = chunks
        for name, size in most.items():
            if name not in self._attention or self._attention[name].numel() < size:
                self._attention[name] = torch.empty(size, dtype=torch.float32, device=self.backend.device)
        return numbers | self._attention | {"blocks": next(iter(kinds.values()))[1].start.shape[0]}

    def failed(self) -> bool:
        """Whether a wait was given up since the scratch was made. Synchronizes."""
        return bool(self.scratch["failed"]) or any(space.failed() for space in self.spaces.values())


# Arguments that only steps with experts need, and what stands in their place without.
EXPERT_BUFFERS = ("order", "plan", "expert_inner", "expert_partial", "ready", "arrived", "control")
EXPERT_NUMBERS = ("up_entries", "down_entries", "K_UP")
NO_EXPERTS = {"M": 16, "UP": 1, "DOWN": 1, "TILES": 1, "K_DOWN": 1, "PARTS": 1, "UP_ROWS": 16, "UP_DEPTH": 64, "DOWN_ROWS": 16,
               "DOWN_DEPTH": 64, "EVEN": True, "STAGES": 1, "PREFETCH": 0, "PTX": False}


def value_scale(scale: float | None) -> float:
    return 1.0 if scale is None else float(scale)


def kind_arguments(kinds: dict[str, tuple]) -> dict:
    """Pools, blocks and rotary tables (pool, blocks, (cos, sin)) of both kinds; a kind that is missing borrows the other's."""
    found = {}
    for kind in _KINDS:
        pool, blocks, (cos, sin) = kinds.get(kind) or next(iter(kinds.values()))
        own = {"cos": cos, "sin": sin, "keys": pool.all_keys, "values": pool.all_values, "slots": blocks.slots,
               "tables": blocks.tables, "first": blocks.first, "start": blocks.start, "count": blocks.count, "row": blocks.row,
               "stride": pool.all_keys.shape[2], "width": blocks.tables.shape[1]}
        found |= {f"{kind}_{name}": value for name, value in own.items()}
    return found
