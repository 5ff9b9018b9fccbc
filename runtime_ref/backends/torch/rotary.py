"""Rotary tables of a model, per kind of attention."""

from __future__ import annotations

import torch


def rotary_tables(config) -> dict[str, Rotary]:
    """Rotary tables by kind of attention."""
    if hasattr(config, "rotary"):
        rotated = int(config.head_dim * config.partial_rotary_factor)
        return dict.fromkeys(("full", "window"), Rotary(config.rope_theta, rotated, config.head_dim, *config.rotary))
    geometry = {"full": (config.rope_theta, config.head_dim), "window": (config.swa_rope_theta, config.swa_head_dim)}
    return {kind: Rotary(base, int(width * config.partial_rotary_factor), width) for kind, (base, width) in geometry.items()}


class Rotary:
    """Tables of one rotary base: rows cos [D] and sin [D] with the sign and the unrotated rest folded in."""

    def __init__(self, base: float, rotated: int, width: int, frequencies: tuple[float, ...] | None = None,
                 scaling: float = 1.0):
        self.base, self.rotated, self.width = base, rotated, width
        self.frequencies, self.scaling = frequencies, scaling  # of extended contexts (yarn); None: powers of the base
        half = rotated // 2
        swap = list(range(width))
        swap[:half], swap[half:rotated] = range(half, rotated), range(half)
        self.swap = torch.tensor(swap)
        self._cos, self._sin = torch.empty(0, width), torch.empty(0, width)

    def rows(self, positions: torch.Tensor, highest: int) -> tuple[torch.Tensor, torch.Tensor]:
        if highest >= self._cos.shape[0]:
            self._grow(max(1024, 2 * highest))
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)

    def _grow(self, size: int) -> None:
        if self.frequencies is None:
            frequencies = self.base ** -(torch.arange(0, self.rotated, 2, dtype=torch.float32) / self.rotated)
        else:
            frequencies = torch.tensor(self.frequencies)
        angles = torch.arange(size, dtype=torch.float32)[:, None] * frequencies
        rest = torch.zeros(size, self.width - self.rotated)
        cos, sin = angles.cos() * self.scaling, angles.sin() * self.scaling
        self._cos = torch.cat((cos, cos, rest + 1), dim=1)
        self._sin = torch.cat((-sin, sin, rest), dim=1)

    def apply(self, x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """x [heads, R, D]."""
        return torch.addcmul(x * table[0], x.index_select(-1, self.swap), table[1])
