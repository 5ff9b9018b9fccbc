"""What a step on the kernels is: blocks of rows over the pages of each kind, their pools, and ways to run it in one launch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch

from runtime_ref.core.kv_cache import PAGE, Pool, Table
from runtime_ref.core.program import Op

BLOCK = 8


class KernelPool(Pool):
    """A pool whose pages are bfloat16 and lie on the kernels' device, all layers in one tensor each."""

    def __init__(self, layers: dict[int, tuple[int, int, int]], pages: int, window: int | None, device: str):
        super().__init__({}, pages, torch.bfloat16, window)
        K, D, V = next(iter(layers.values()))
        assert set(layers.values()) == {(K, D, V)}, "layers of one kind have one geometry"
        self.all_keys, self.all_values = (torch.zeros((len(layers), K, (pages + 1) * PAGE, width), dtype=torch.bfloat16,
                                                      device=device) for width in (D, V))
        self.place = {layer: i for i, layer in enumerate(layers)}
        self.keys = {layer: self.all_keys[i] for layer, i in self.place.items()}
        self.values = {layer: self.all_values[i] for layer, i in self.place.items()}


@dataclass
class Blocks:
    """Blocks of up to eight rows of one sequence over one kind of pages; int32.

    tables [B, n], first [B] (logical page of tables[:, 0]), start, count, row [B]; slots [R]; longest: the highest end.
    """

    tables: torch.Tensor
    first: torch.Tensor
    start: torch.Tensor
    count: torch.Tensor
    row: torch.Tensor
    slots: torch.Tensor
    longest: int


@dataclass
class KernelStep:
    """What no layer changes: ids, positions int32 [R]; head_rows int32, the rows whose logits are wanted."""

    ids: torch.Tensor
    positions: torch.Tensor
    head_rows: torch.Tensor
    real: int
    wanted: int
    blocks: dict[str, Blocks] = field(default_factory=dict)


def plan_blocks(pool: Pool, places: list[tuple[Table, int, int, int]], device: str) -> Blocks:
    """Blocks (table, first position, rows, first row) over the pages of one kind, with a slot for every row."""
    first = [pool.first_needed(start) for _, start, _, _ in places]
    held = [table.pages[low - table.first:(start + count - 1) // PAGE + 1 - table.first]
            for (table, start, count, _), low in zip(places, first, strict=True)]
    width = max(map(len, held))
    slots = [table.slot(p) for table, start, count, _ in places for p in range(start, start + count)]
    columns = ([pages + [0] * (width - len(pages)) for pages in held], first, [start for _, start, _, _ in places],
               [count for _, _, count, _ in places], [row for *_, row in places], slots)
    return Blocks(*(torch.tensor(c, dtype=torch.int32, device=device) for c in columns),
                  max(start + count for _, start, count, _ in places))


class RotaryTable:
    """cos and sin float32 [positions, rotated / 2] of one base; `extension` as of `families.Geometry.rotary`."""

    def __init__(self, base: float, rotated: int, positions: int, device: str,
                 extension: tuple[tuple[float, ...] | None, float] = (None, 1.0)):
        given, scaling = extension
        powers = base ** -(torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * (powers if given is None else torch.tensor(given))
        self.table = (angles.cos() * scaling).to(device), (angles.sin() * scaling).to(device)


class StepRunner(ABC):
    """Another way than op by op to compute the steps of one program."""

    def serves(self, program: list[Op], step: KernelStep) -> bool:
        """Whether it computes this step."""
        return False

    def run(self, step: KernelStep) -> dict[str, torch.Tensor]:
        """Logits and target hidden states, as `TritonBackend.run` returns them."""
        raise NotImplementedError

    @abstractmethod
    def flags(self) -> list[torch.Tensor]:
        """int32, not zero where a wait was given up since the scratch was made."""

    def failed(self) -> bool:
        """Whether any is set. Synchronizes."""
        return any(bool(flag.any()) for flag in self.flags())
