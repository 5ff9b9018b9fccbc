"""The drafter's round as one launch: pending features, keys and values of the context, the block, its logits.

The megakernel again, with the drafter's ops (`fuse_hidden`, `context`) before those of a plain decoder with norms of heads and
dense layers. Features of more than 64 positions (prompts) enter the cache by `TritonDrafter.extend_tables` first.

Reference: `TritonDrafter.logits`, whose bits it makes. Ranks that share the drafter sum inside the launch, in memory of the
drafter's own, as in `megakernel.Megakernel`.
"""

from __future__ import annotations

import torch
import triton

from runtime_ref.backends.base import Drafter
from runtime_ref.backends.triton.drafter import CONTEXT_ROWS, TritonDrafter
from runtime_ref.backends.triton.megakernel import kind_constants, with_next
from runtime_ref.backends.triton.megakernel_globals import NO_EXPERTS, ExpertGlobals, Globals, KindGlobals, value_scale
from runtime_ref.backends.triton.steps import BLOCK, StepRunner
from runtime_ref.core.batch import KIND, DraftRequest
from runtime_ref.core.kv_cache import PAGE
from runtime_ref.kernels.attention import CHUNK_PAGES
from runtime_ref.kernels.experimental.megakernel import BARRIER, Instruction, Tuning, launch_options, step_kernel
from runtime_ref.kernels.experimental.symmetric_memory import Symmetric
from runtime_ref.kernels.experts import MAX_TOKENS, POLLS
from runtime_ref.kernels.launches import Matrix


def encode_drafter(drafter: TritonDrafter) -> torch.Tensor:
    """int32 [1 + layers + 2 + 5 layers, FIELDS]; the first 1 + layers rows are for pending features only."""
    layers = len(drafter.layers)

    matrices = []

    def row(op: str, w: Matrix | None = None, gamma=None, extra=None, **more: int) -> Instruction:
        matrices.append(w and w.w)
        weight, gamma, extra = (0 if t is None else drafter.arena.offset(t) for t in (w and w.w, gamma, extra))
        return Instruction(op, weight=weight, gamma=gamma, extra=extra, **more)

    rows = [row("fuse_hidden", drafter.fc, count=1, ordinal=1)]
    rows += [row("context", layer["context"], drafter.hidden_norm, layer["context_norm"], place=i)
             for i, layer in enumerate(drafter.layers)]
    rows.append(row("embed"))
    for i, layer in enumerate(drafter.layers):
        rows += [row("enter_full", layer["qkv"], layer["input_norm"], layer["head_norm"], place=i),
                 row("attend_full", extra=layer["sink"], place=i),
                 row("merge_add", layer["o"], count=layers, ordinal=i + 1),
                 row("norm_gate_up", layer["gate_up"], layer["post_norm"]),
                 row("down_add", layer["down"], count=layers, ordinal=i + 1)]
    rows.append(row("pick_norm_head"))
    return torch.tensor(with_next(rows, matrices), dtype=torch.int32)


class MegakernelDrafter(StepRunner, Drafter):
    """A drafter whose rounds are one launch each; what the engine asks for, it does like `TritonDrafter`.

    Every rank runs its share of the drafter and of the head, whose logits are gathered afterwards.
    """

    def __init__(self, drafter: TritonDrafter, programs: int = 1, polls: int = POLLS,
                 tuning: Tuning = Tuning()):  # noqa: B008 (frozen)
        backend = drafter.backend
        self.drafter, self.backend, self.programs, self.polls = drafter, backend, programs, polls
        self.block, self.target_layers, self.pool = drafter.block, drafter.target_layers, drafter.pool
        self.extend_tables = drafter.extend_tables
        self.table = encode_drafter(drafter).to(backend.device)
        tiling, heads = backend.tiling, drafter.heads
        columns = max(tiling.columns, 1 << (heads.d - 1).bit_length())  # a norm of a head wants it in one tile
        own = {prefix: kind_constants(prefix, heads, drafter.window, drafter.layers[0]["sink"] is not None, columns,
                                      tiling.float_dot) for prefix in ("F", "W")}
        own["F"]["F_BN"] = max(16, 1 << (heads.d - 1).bit_length())
        self.constants = own["F"] | own["W"] | NO_EXPERTS | {
            "FULL": True, "WINDOW": False, "DENSE": True, "MOE": False, "DRAFT": True, "HEAD_NORM": True, "QKV_FP8": False,
            "O_FP8": False, "MLP_FP8": False, "HAS_TARGET_HIDDEN": False, "PAGE_": PAGE, "CHUNK": CHUNK_PAGES, "A": 1,
            "WIDE": 16,
            "GROUPS": 1, "TOP_GROUPS": 1, "NORMED": False, "BN": tiling.columns, "BK": tiling.depth,
            "ROUTE_BN": tiling.experts, "ROUTE_BK": tiling.router_depth, "COPY": tiling.block, "POLLS": polls,
            "RANKS": drafter.share.ranks.count, "F_PARTS": drafter.share.parts_o, "W_PARTS": 1,
            "D_PARTS": drafter.share.parts_down, "FLOAT_DOT": tiling.float_dot, "PTX": backend.launch.ptx,
            "AHEAD": tuning.ahead, "FLAG": tuning.release_flag}
        if drafter.causal:
            raise ValueError("dflash/config.json: a causal block; the megakernel wants one that is drafted at once")
        self.scratch = self._scratch()
        share, H = drafter.share, backend.config.hidden_size
        columns = H // share.ranks.count  # of the features
        places = (2 * triton.cdiv(H, tiling.columns) + triton.cdiv(columns, tiling.columns)) * (MAX_TOKENS // BLOCK)
        self.symmetric = Symmetric(share.ranks, max(share.parts_o, share.parts_down) * MAX_TOKENS * H, places, backend.device,
                                   more=CONTEXT_ROWS * columns)

    def _scratch(self) -> dict[str, torch.Tensor]:
        heads, R, device = self.drafter.heads, MAX_TOKENS, self.backend.device
        H, I = self.backend.config.hidden_size, self.drafter.layers[0]["down"].w.shape[1]
        sizes = {"x": (R * H, torch.bfloat16), "q": (heads.queries * R * heads.d, torch.bfloat16),
                 "heads": (heads.queries * R * heads.v, torch.bfloat16), "inner": (R * I, torch.bfloat16),
                 "features": (CONTEXT_ROWS * H, torch.float32)}
        found = {name: torch.empty(size, dtype=dtype, device=device) for name, (size, dtype) in sizes.items()}
        counters = {"barrier": BARRIER, "failed": 1, "attend_arrived": R * heads.queries, "route_arrived": 1, "index": 1}
        found |= {name: torch.zeros(size, dtype=torch.int32, device=device) for name, size in counters.items()}
        return found | {"y": found["x"], "weight": found["features"], "scores": found["features"]}

    @torch.inference_mode()
    def logits(self, requests: list[DraftRequest]) -> list[torch.Tensor]:
        """See `TritonDrafter.logits`.

        Raises:
            ValueError: more than 64 rows in all.
        """
        arguments = self.prepare(requests)
        self.launch(arguments)
        return list(self.backend.whole_vocabulary(arguments["logits"]).split([w.count for w in requests]))

    def launch(self, arguments: dict) -> None:
        """One launch, of what `prepare` returned."""
        step_kernel[(self.programs,)](**arguments, **self.constants, **launch_options(self.constants["FLOAT_DOT"]))

    def prepare(self, requests: list[DraftRequest]) -> dict:
        """Run-time arguments of the round; its "logits" are what it fills."""
        late = [w for w in requests if w.target_hidden is not None and w.target_hidden.shape[0]]
        if sum(w.target_hidden.shape[0] for w in late) > CONTEXT_ROWS:
            for w in late:
                self.extend_tables(w.target_hidden, w.position - w.target_hidden.shape[0], w.tables[KIND])
            late = []
        ids, positions, picked, blocks = self.drafter.plan(requests)
        if ids.shape[0] > MAX_TOKENS:
            raise ValueError(f"{ids.shape[0]} rows of drafts, expected at most {MAX_TOKENS}")
        logits = torch.empty((picked.shape[0], self.backend.kernel_weights.head.w.shape[0]), dtype=torch.float32,
                             device=self.backend.device)
        return self._arguments(late, ids, positions, picked, blocks, logits)

    def _arguments(self, late: list[DraftRequest], ids, positions, picked, blocks, logits) -> dict:
        """Run-time arguments of `step_kernel`; `late`: sequences with pending features."""
        drafter, backend, device, constants = self.drafter, self.backend, self.backend.device, self.constants
        places = [(w, p) for w in late for p in range(w.position - w.target_hidden.shape[0], w.position)]
        at = torch.tensor([p for _, p in places], dtype=torch.int32, device=device)
        into = torch.tensor([w.tables[KIND].slot(p) for w, p in places], dtype=torch.int32, device=device)
        kind = KindGlobals.of(drafter.pool, blocks, drafter.rotary)
        tiles = blocks.start.shape[0] * constants["F_KEYS"] * constants["F_SPLIT"] * kind.chunks * constants["F_M"]
        weights = backend.kernel_weights
        return Globals(
            table=self.table if late else self.table[1 + len(drafter.layers):], arena=drafter.arena.data, embed=weights.embed,
            spare=drafter.mask, head=weights.head.w, final_norm=drafter.norm, ids=ids, positions=positions, head_rows=picked,
            target_hidden=torch.cat([w.target_hidden for w in late]).contiguous().to(device) if late else self.scratch["x"],
            context_positions=at, context_slots=into, logits=logits, H=backend.config.hidden_size,
            I=drafter.layers[0]["down"].w.shape[1], E=0, vocabulary=weights.head.w.shape[0], hidden_width=drafter.fc.w.shape[1],
            epsilon=float(drafter.epsilon), factor=1.0, v_scale=value_scale(drafter.value_scale), scratch=self.scratch,
            partial=torch.empty(tiles * constants["F_V_WIDE"], dtype=torch.float32, device=device),
            stats=torch.empty(2 * tiles, dtype=torch.float32, device=device), full=kind, window=kind,
            experts=ExpertGlobals.none(self.scratch["barrier"]), symmetric=self.symmetric).arguments()

    def flags(self) -> list[torch.Tensor]:
        return [self.scratch["failed"]]
