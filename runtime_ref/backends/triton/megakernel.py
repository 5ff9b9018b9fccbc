"""A whole step in one launch: the fused program as a table of int32, and the launch that runs it.

`encode_program` makes the table of a program of `core.fusion.fused`: an `Instruction` for each op. `Megakernel.run` fills in
what changes from step to step (`Globals`) and launches; it serves steps of up to 64 rows. Longer steps (prompts) are bound by
arithmetic, not by launches, and stay op by op.

With several ranks every rank launches its own, and the launches sum over ranks among themselves, in memory that all of them can
read (`kernels/experimental/symmetric_memory.py`); only the logits of the ranks' shares of the vocabulary are gathered outside.
Ranks must make the same steps in the same order, as the engine's do.

The launch is cooperative: every Triton program must be resident at once, so the grid is what the GPU holds (`programs`), one in
Triton's interpreter.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import torch
import triton

from runtime_ref.backends.triton.backend import TritonBackend
from runtime_ref.backends.triton.megakernel_globals import NO_EXPERTS, ExpertGlobals, Globals, KindGlobals, value_scale
from runtime_ref.backends.triton.steps import BLOCK, KernelPool, KernelStep, StepRunner
from runtime_ref.checkpoints.device_weights import Arena, KernelLayer
from runtime_ref.core.fusion import fused
from runtime_ref.core.kv_cache import PAGE
from runtime_ref.core.program import Op
from runtime_ref.kernels.attention import CHUNK_PAGES, attention_constants
from runtime_ref.kernels.experimental.megakernel import (
    BARRIER,
    STAGES,
    SUMS,
    Instruction,
    Tuning,
    launch_options,
    step_kernel,
)
from runtime_ref.kernels.experimental.symmetric_memory import Symmetric
from runtime_ref.kernels.experts import MAX_TOKENS, POLLS, Workspace
from runtime_ref.kernels.launches import Heads, Matrix

_KINDS = {"full": "F", "window": "W"}


def encode_program(program: list[Op], layers: list[KernelLayer], arena: Arena, pools: dict[str, KernelPool]) -> torch.Tensor:
    """int32 [ops, FIELDS] of a fused program (see `Instruction`).

    Raises:
        ValueError: an op that the kernel does not know (it is named).
    """
    stored = [op.layer for op in program if op.name == "target_hidden"]
    rows, seen = [], Counter()
    for op in program:
        seen[op.name] += 1
        layer = layers[op.layer] if op.layer >= 0 else None
        instruction = replace(_weights_of(op.name, layer, arena), window=layer is not None and layer.kind == "window")
        if op.name.startswith(("enter", "attend")):
            instruction = replace(instruction, place=pools[layer.kind].place[op.layer])
        elif op.name == "target_hidden":
            instruction = replace(instruction, place=stored.index(op.layer))
        elif op.name in SUMS:
            instruction = replace(instruction, count=sum(other.name == op.name for other in program), ordinal=seen[op.name])
        rows.append(instruction)
    matrices = [_matrix_of(op.name, layers[op.layer]) if op.layer >= 0 else None for op in program]
    return torch.tensor(with_next(rows, matrices), dtype=torch.int32)


def _matrix_of(op: str, layer: KernelLayer) -> torch.Tensor | None:
    """The matrix that an op reads whatever its input is."""
    match op:
        case "enter_full" | "enter_window":
            return layer.qkv.w
        case "merge_add":
            return layer.o.w
        case "norm_gate_up":
            return layer.gate_up.w
        case "down_add":
            return layer.down.w
        case "norm_route":
            return layer.router.w
    return None


def with_next(instructions: list[Instruction], matrices: list[torch.Tensor | None]) -> list[list[int]]:
    """The encoded instructions, each with the matrix that comes next.

    Attention has none of its own, so that of the op behind it comes next; behind the router the experts do, which are not known
    yet.

    Args:
        matrices: of each instruction.
    """
    rows = []
    for i, instruction in enumerate(instructions):
        at = i + 2 if i + 1 < len(instructions) and instructions[i + 1].op.startswith("attend") else i + 1
        w = matrices[at] if at < len(matrices) else None
        if w is not None:
            instruction = replace(instruction, next_weight=instructions[at].weight, next_rows=w.shape[0],
                                  next_width=w.shape[1] * w.element_size())
        rows.append(instruction.encode())
    return rows


def _weights_of(op: str, layer: KernelLayer | None, arena: Arena) -> Instruction:
    """The instruction with where its weights lie."""
    def at(t: torch.Tensor | None) -> int:
        return 0 if t is None else arena.offset(t)

    def matrix(m: Matrix, **more: int) -> Instruction:
        return Instruction(op, weight=at(m.w), scales=at(m.scales), **more)

    match op:
        case "enter_full" | "enter_window":
            return matrix(layer.qkv, gamma=at(layer.input_norm))
        case "attend_full" | "attend_window":
            return Instruction(op, extra=at(layer.sink))
        case "merge_add":
            return matrix(layer.o)
        case "norm_gate_up":
            return matrix(layer.gate_up, gamma=at(layer.post_norm))
        case "down_add":
            return matrix(layer.down)
        case "norm_route":
            return Instruction(op, weight=at(layer.router.w), gamma=at(layer.post_norm), extra=at(layer.router.correction))
        case "experts_add":
            return Instruction(op, weight=at(layer.pages.up), extra=at(layer.pages.down))
    return Instruction(op)


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
        raise ValueError(f"the megakernel wants {what} in all layers or in none")
    return bool(names and names[0])


def the_one(values: list[int], what: str) -> int:
    if len(set(values)) > 1:
        raise ValueError(f"the megakernel wants {what} to be equal in all layers; found {sorted(set(values))}")
    return values[0]


class Megakernel(StepRunner):
    """One program of a backend, encoded, with its scratch.

    Args:
        program: as of `core.program.target_program`, not fused.
        programs: of the grid; all must be resident.

    Raises:
        ValueError: layers of one kind that differ in what is compiled in; ranks without memory that they share.
    """

    def __init__(self, backend: TritonBackend, program: list[Op], programs: int = 1, polls: int = POLLS,
                 tuning: Tuning = Tuning()):  # noqa: B008 (frozen)
        self.backend, self.programs, self.polls, self.tuning = backend, programs, polls, tuning
        self.source, self.program = program, fused(program)
        self.target_layers = [op.layer for op in self.program if op.name == "target_hidden"]
        weights, device = backend.kernel_weights, backend.device
        self.table = encode_program(self.program, weights.layers, weights.arena, backend.pools).to(device)
        self.constants = self._constants()
        self.spaces = {}
        if any(layer.pages is not None for layer in weights.layers):
            pages = next(layer.pages for layer in weights.layers if layer.pages is not None)
            launch = replace(backend.launch, tickets=False, programs=programs, polls=polls, stages=STAGES, packed=tuning.packed)
            self.spaces = {n: Workspace(pages, n, backend.config.num_experts_per_tok, launch) for n in (BLOCK, MAX_TOKENS)}
        self.scratch = self._scratch()
        self.symmetric = self._symmetric()
        self._attention: dict[str, torch.Tensor] = {}

    def _constants(self) -> dict:
        backend, layers, tiling = self.backend, self.backend.kernel_weights.layers, self.backend.tiling
        if backend.capabilities.mxfp8_activations:
            raise ValueError("the megakernel has no experts for FP4 tensor cores (backend 'triton-mxfp8'); they run op by op")
        if any(layer.head_norm is not None or layer.router and layer.router.softmax for layer in layers):
            raise ValueError("the megakernel has neither norms of heads nor a softmax router; this model runs op by op")
        found = {"DRAFT": False, "HEAD_NORM": False, "HAS_TARGET_HIDDEN": bool(self.target_layers), "PAGE_": PAGE,
                 "CHUNK": CHUNK_PAGES, "QKV_FP8": used_once([a.qkv.scales is not None for a in layers], "FP8 qkv"),
                 "O_FP8": used_once([a.o.scales is not None for a in layers], "FP8 o_proj"),
                 "MLP_FP8": used_once([a.gate_up.scales is not None for a in layers if a.gate_up], "FP8 dense layers"),
                 "DENSE": any(a.gate_up for a in layers), "MOE": any(a.router for a in layers), "BN": tiling.columns,
                 "BK": tiling.depth, "ROUTE_BN": tiling.experts, "ROUTE_BK": tiling.router_depth, "COPY": tiling.block,
                 "POLLS": self.polls, "FLOAT_DOT": tiling.float_dot, "PTX": backend.launch.ptx,
                 "AHEAD": self.tuning.ahead, "FLAG": self.tuning.release_flag}
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
        counters = {"route_arrived": R // BLOCK, "barrier": BARRIER, "failed": 1, "attend_arrived": R * most["queries"]}
        return found | {name: torch.zeros(size, dtype=torch.int32, device=device) for name, size in counters.items()}

    def _symmetric(self) -> Symmetric:
        """What ranks add up in: two halves of every part of 64 rows, and flags for the tiles of each kind of sum."""
        layers, H = self.backend.kernel_weights.layers, self.backend.config.hidden_size
        parts = max(max(layer.parts.o, layer.parts.down, layer.parts.experts) for layer in layers)
        places = 2 * (MAX_TOKENS // BLOCK) * triton.cdiv(H, self.backend.tiling.columns)
        places += max((space.chunks for space in self.spaces.values()), default=0)
        return Symmetric(self.backend.ranks, parts * MAX_TOKENS * H, places, self.backend.device)

    def serves(self, program: list[Op], step: KernelStep) -> bool:
        """Whether this is its program, and the step short enough."""
        return program is self.source and step.real <= MAX_TOKENS

    @torch.inference_mode()
    def run(self, step: KernelStep) -> dict[str, torch.Tensor]:
        """Logits and target hidden states of the step, as `TritonBackend.run` returns them."""
        backend, config = self.backend, self.backend.config
        H = config.hidden_size
        logits = torch.empty((step.head_rows.shape[0], backend.kernel_weights.head.w.shape[0]), dtype=torch.float32,
                             device=backend.device)
        target_hidden = torch.empty((max(1, len(self.target_layers)), step.real, H), dtype=torch.bfloat16,
                                    device=backend.device)
        self.launch(step, logits, target_hidden)
        hidden = {f"target_hidden.{layer}": target_hidden[i] for i, layer in enumerate(self.target_layers)}
        return {"logits": backend.whole_vocabulary(logits)} | hidden

    def launch(self, step: KernelStep, logits: torch.Tensor, target_hidden: torch.Tensor) -> None:
        """One launch."""
        arguments, constants = self.arguments(step, logits, target_hidden)
        step_kernel[(self.programs,)](**arguments, **constants, **launch_options(self.constants["FLOAT_DOT"]))

    def arguments(self, step: KernelStep, logits: torch.Tensor, target_hidden: torch.Tensor) -> tuple[dict, dict]:
        """Run-time (`Globals`) and compile-time arguments of `step_kernel`."""
        backend, config, weights = self.backend, self.backend.config, self.backend.kernel_weights
        router = next((layer.router for layer in weights.layers if layer.router), None)
        kinds = {kind: KindGlobals.of(pool, step.blocks[kind], backend.rotary[kind]) for kind, pool in backend.pools.items()}
        full, window = (kinds.get(kind) or next(iter(kinds.values())) for kind in _KINDS)  # a missing one is never read
        experts, sizes = ExpertGlobals.none(self.scratch["barrier"]), NO_EXPERTS
        if self.spaces:
            pages = next(layer.pages for layer in weights.layers if layer.pages is not None)
            experts, sizes = ExpertGlobals.of(self.spaces[next(n for n in (BLOCK, MAX_TOKENS) if n >= step.real)], pages,
                                              step.real)
        scratch = self._attention_scratch(kinds)
        found = Globals(
            table=self.table, arena=weights.arena.data, embed=weights.embed, spare=weights.embed, head=weights.head.w,
            final_norm=weights.norm, ids=step.ids, positions=step.positions, head_rows=step.head_rows,
            target_hidden=target_hidden, context_positions=step.positions, context_slots=step.positions, logits=logits,
            H=config.hidden_size, I=config.intermediate_size // backend.ranks.count, E=config.n_routed_experts,
            vocabulary=weights.head.w.shape[0], hidden_width=0, epsilon=float(backend.epsilon),
            factor=float(router.factor) if router else 1.0, v_scale=value_scale(config.attention_value_scale),
            scratch=self.scratch, partial=scratch["partial"], stats=scratch["stats"], full=full, window=window,
        experts=experts, symmetric=self.symmetric)
        return found.arguments(), sizes | self.constants

    def _attention_scratch(self, kinds: dict[str, KindGlobals]) -> dict[str, torch.Tensor]:
        """Partial results of attention, grown to the largest step seen."""
        most = {"partial": 0, "stats": 0}
        for kind, own in kinds.items():
            prefix = _KINDS[kind]
            heads = self.constants[f"{prefix}_KEYS"] * self.constants[f"{prefix}_SPLIT"]
            tiles = own.start.shape[0] * heads * own.chunks * self.constants[f"{prefix}_M"]
            most = {"partial": max(most["partial"], tiles * self.constants[f"{prefix}_V_WIDE"]),
                    "stats": max(most["stats"], 2 * tiles)}
        for name, size in most.items():
            if name not in self._attention or self._attention[name].numel() < size:
                self._attention[name] = torch.empty(size, dtype=torch.float32, device=self.backend.device)
        return self._attention

    def run_first(self, step: KernelStep, count: int) -> dict[str, torch.Tensor]:
        """What the last of the first `count` ops of the program leaves, after a launch of those alone: by buffer name, in the
        shapes of ops. For finding where a launch differs from ops."""
        backend, op, R, s = self.backend, self.program[count - 1], step.real, self.scratch
        H, config = backend.config.hidden_size, backend.config
        logits = torch.empty((step.head_rows.shape[0], backend.kernel_weights.head.w.shape[0]), dtype=torch.float32,
                             device=backend.device)
        target_hidden = torch.empty((max(1, len(self.target_layers)), R, H), dtype=torch.bfloat16, device=backend.device)
        arguments, constants = self.arguments(step, logits, target_hidden)
        step_kernel[(self.programs,)](**arguments | {"ops": count}, **constants, **launch_options(self.constants["FLOAT_DOT"]))
        if op.name == "pick_norm_head":
            return {"logits": backend.whole_vocabulary(logits)}
        if op.name == "target_hidden":
            return {op.writes[0]: target_hidden[self.target_layers.index(op.layer)]}
        heads, A = backend.kernel_weights.layers[max(op.layer, 0)].heads, config.num_experts_per_tok
        shapes = {"x": (R, H), "y": (R, H), "q": (heads.queries, R, heads.d), "heads": (heads.queries, R, heads.v),
                  "inner": (R, config.intermediate_size // backend.ranks.count), "index": (R, A), "weight": (R, A)}
        return {name: s[name][:math.prod(shapes[name])].view(shapes[name]).clone() for name in op.writes if name in shapes}

    def flags(self) -> list[torch.Tensor]:
        return [self.scratch["failed"], *(space.control[2:] for space in self.spaces.values())]
