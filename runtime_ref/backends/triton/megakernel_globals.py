"""What the megakernel reads and writes in a launch: one record for the target's steps and the drafter's rounds.

Lower-case arguments of `kernels.experimental.megakernel.step_kernel`, by their names; sizes are numbers of elements unless a
shape is given. R rows (tokens), H hidden size, A experts of a token, n blocks of up to eight rows of one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from runtime_ref.backends.triton.steps import BLOCK, Blocks, KernelPool
from runtime_ref.kernels.attention import most_chunks
from runtime_ref.kernels.experimental.symmetric_memory import Symmetric
from runtime_ref.kernels.experts import Workspace, kernel_arguments
from runtime_ref.kernels.repack import ExpertPages

# Compile-time sizes of the experts, and what stands in their place in a program without them.
NO_EXPERTS = {"M": 16, "UP": 1, "DOWN": 1, "TILES": 1, "K_DOWN": 1, "PARTS": 1, "UP_ROWS": 16, "UP_DEPTH": 64, "DOWN_ROWS": 16,
              "DOWN_DEPTH": 64, "EVEN": True, "STAGES": 1, "PREFETCH": 0, "PACKED": True}


@dataclass
class KindGlobals:
    """One kind of attention: its pages, the step's blocks over them, rotary tables.

    Attributes:
        cos, sin: float32 [positions, rotated / 2]. keys, values: bfloat16 [layers, K, slots, width].
        slots: int32 [R], where the rows' own keys go. tables: int32 [n, width], page ids. first, start, count, row: int32 [n],
            as of `Blocks`. stride: slots of a head. chunks: of pages that a block may see.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor
    tables: torch.Tensor
    first: torch.Tensor
    start: torch.Tensor
    count: torch.Tensor
    row: torch.Tensor
    stride: int
    width: int
    chunks: int

    @classmethod
    def of(cls, pool: KernelPool, blocks: Blocks, rotary: tuple[torch.Tensor, torch.Tensor]) -> KindGlobals:
        return cls(*rotary, pool.all_keys, pool.all_values, blocks.slots, blocks.tables, blocks.first, blocks.start,
                   blocks.count, blocks.row, pool.all_keys.shape[2], blocks.tables.shape[1],
                   most_chunks(blocks.longest, pool.window, BLOCK))


@dataclass
class ExpertGlobals:
    """Scratch of the experts (`kernels.experts.Workspace`) and the entries of their work list."""

    order: torch.Tensor
    plan: torch.Tensor
    expert_inner: torch.Tensor
    expert_partial: torch.Tensor
    ready: torch.Tensor
    arrived: torch.Tensor
    control: torch.Tensor
    up_entries: int = 0
    down_entries: int = 0
    K_UP: int = 0

    @classmethod
    def none(cls, unused: torch.Tensor) -> ExpertGlobals:
        """Of a program without experts; `unused` is never read."""
        return cls(*[unused] * 7)

    @classmethod
    def of(cls, space: Workspace, pages: ExpertPages, rows: int) -> tuple[ExpertGlobals, dict]:
        """For a step of so many rows; and the compile-time sizes."""
        like = torch.empty((rows, pages.hidden), device="meta")
        positional, own = kernel_arguments(like, None, None, pages, space, None)
        return (cls(space.order, space.plan, space.inner, space.partial, space.ready, space.arrived, space.control,
                    *positional[-4:-1]), {name: own[name] for name in NO_EXPERTS})


@dataclass
class Globals:
    """All run-time arguments of a launch.

    Attributes:
        table: int32 [ops, FIELDS], the program. arena: uint8, where its weights lie.
        embed, spare, head: bfloat16 [vocabulary, H], [H] (row of id -1: the mask), [own vocabulary, H].
        final_norm: float32 [H].
        ids, positions: int32 [R]. head_rows: int32 [wanted], whose logits are wanted.
        target_hidden: bfloat16: the target writes [layers, R, H], the drafter reads [context, layers * H].
        context_positions, context_slots: int32 [context], of features that enter the drafter's context; hidden_width: theirs.
        logits: float32 [wanted, own vocabulary].
        v_scale, factor, epsilon: of values, routing weights, norms. I: own inner size of dense layers. E: experts.
        scratch: buffers between ops by name, counters of arrivals, barrier and `failed`.
        partial, stats: float32, of attention over chunks.
        full, window, experts, symmetric: see there.
    """

    table: torch.Tensor
    arena: torch.Tensor
    embed: torch.Tensor
    spare: torch.Tensor
    head: torch.Tensor
    final_norm: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor
    head_rows: torch.Tensor
    target_hidden: torch.Tensor
    context_positions: torch.Tensor
    context_slots: torch.Tensor
    logits: torch.Tensor
    H: int
    I: int
    E: int
    vocabulary: int
    hidden_width: int
    epsilon: float
    factor: float
    v_scale: float
    scratch: dict[str, torch.Tensor]
    partial: torch.Tensor
    stats: torch.Tensor
    full: KindGlobals
    window: KindGlobals
    experts: ExpertGlobals
    symmetric: Symmetric

    def arguments(self) -> dict:
        """By the kernel's names."""
        nested = ("scratch", "full", "window", "experts", "symmetric")
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in nested}
        found |= {"ops": self.table.shape[0], "R": self.ids.shape[0], "wanted": self.head_rows.shape[0],
                  "context": self.context_positions.shape[0] if self.hidden_width else 0, "blocks": self.full.start.shape[0]}
        for kind, own in (("full", self.full), ("window", self.window)):
            found |= {f"{kind}_{name}": value for name, value in vars(own).items()}
        return found | vars(self.experts) | self.scratch | self.symmetric.arguments()


def value_scale(scale: float | None) -> float:
    return 1.0 if scale is None else float(scale)
