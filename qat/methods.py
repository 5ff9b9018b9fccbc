"""Roundings beyond the plain one: chosen or learned block scales, soft codes, and the pull of masters to the grid.

The plain quantizer (`qat.expert_quantizer`) writes the nearest MXFP4 value of each master under the scale rule's scale. Here:

- scales s + d with d in {-1, 0, 1} per block. `shift` holds a real number per block, rounded to d; where it is learned, its
  gradient is LSQ's (arXiv 1902.08153) for a power of two: with q the rounded value and w the master, straight-through rounding
  gives dq / dd = ln 2 * (q - w), and ln 2 * q where w is saturated. Any such value is written exactly by every scale rule, so
  that files know nothing of it: halving or doubling a scale only renames codes.
- soft codes (DSQ, arXiv 1908.05033; the annealed choice between two neighbours is AdaRound's, arXiv 2004.10568): between the
  neighbours lo < |w| < hi the value lo + (hi - lo) * h(t), with t = (|w| - lo) / (hi - lo) and
  h(t) = 1/2 + tanh(k (t - 1/2)) / (2 tanh(k / 2)), whose derivative takes the place of the straight-through 1. The sharpness k
  grows geometrically until rounding is hard.
- CAGE's correction (arXiv 2510.18784), decoupled from Adam as weight decay is: w -= rate * strength(t) * (w - Q(w)).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from mxfp4.codec import block_scales, scale_values
from mxfp4.fake_quant import round_at_scales
from mxfp4.format import BLOCK_SIZE, E2M1_MAX, E2M1_VALUES
from qat.expert_quantizer import ExpertQuantizer, require_finite
from recipes.schema import QAT, GridPull, SoftRounding

LIMIT = 1.49  # of a shift: one octave up or down, and no further from the thresholds at 1/2 than they are from 0


def needed(settings: QAT) -> bool:
    """Whether the recipe asks for a rounding that only `MethodQuantizer` knows."""
    return settings.scales.method != "rule" or settings.soft_rounding.method != "none"


class MethodQuantizer(ExpertQuantizer):
    """An `ExpertQuantizer` with block shifts, or with soft codes.

    Attributes:
        shifts: float32 parameters [E, ., ./32] (blocks along the tensor's axis), one per tensor; empty without `scales`.
        sharpness: of soft codes now; None: hard.
    """

    def __init__(self, model: nn.Module, *, settings: QAT, **options):
        self.settings = settings
        self.shifts: list[nn.Parameter] = []
        self.sharpness: float | None = None
        super().__init__(model, **options)
        if settings.scales.method != "rule":
            self.shifts = [nn.Parameter(torch.zeros(_block_shape(m, t.axis), device=m.device)) for t, m in self]
            for i, (tensor, master) in enumerate(self):
                w = master.data.transpose(1, 2) if tensor.axis == 1 else master.data
                scales = searched_scales(w, torch.ones(len(w), w.shape[2], device=w.device), self.scale_rule)
                chosen = scales.transpose(1, 2) if tensor.axis == 1 else scales
                self.start_at(i, master.data, round_at_scales(master.data, chosen, axis=tensor.axis), chosen)
        self.set_step(0)
        self.requantize()

    def set_step(self, step: int) -> None:
        """Sharpness of the soft codes that update `step` (0-based) sees."""
        if self.settings.soft_rounding.method != "none":
            self.sharpness = sharpness(step, self.settings.steps, self.settings.soft_rounding)

    def scales(self, index: int, source: torch.Tensor) -> torch.Tensor:
        """E8M0 bytes of the blocks of `source`, float32 of tensor `index`'s shape."""
        chosen = block_scales(source, scale_rule=self.scale_rule, axis=self.tensors[index].axis)
        if not self.shifts:
            return chosen
        return (chosen.to(torch.int16) + self.shifts[index].data.round().to(torch.int16)).clamp_(0, 253).to(torch.uint8)

    @torch.no_grad()
    def requantize(self, sources: Iterable[torch.Tensor] | None = None) -> None:
        if not self.shifts and self.sharpness is None:
            return super().requantize(sources)
        for i, (tensor, source) in enumerate(zip(self.tensors, sources or self.masters, strict=True)):
            require_finite(f"master of {tensor.name}", source.data)
            scales = self.scales(i, source.data)
            if self.sharpness is None:
                self.put(i, round_at_scales(source.data, scales, axis=tensor.axis), scales)
            else:
                self.put(i, soft_round(source.data, scales, tensor.axis, self.sharpness)[0], None)

    def put(self, index: int, values: torch.Tensor, scales: torch.Tensor | None) -> None:
        """Gives the model rounded values of tensor `index` (float32), with the scales that they are on, if they are."""
        self.tensors[index].parameter.data.copy_(values)

    @torch.no_grad()
    def pull_gradients(self) -> None:
        super().pull_gradients()
        if self.sharpness is None:
            return
        for i, (tensor, master) in enumerate(self):
            master.grad.mul_(soft_round(master.data, self.scales(i, master.data), tensor.axis, self.sharpness)[1])

    @torch.no_grad()
    def take_shift_gradients(self) -> None:
        """Gradients of learned shifts, from those that the masters have by now: means over processes, clipped with them."""
        if self.settings.scales.method != "learned":
            return
        for i, (tensor, master) in enumerate(self):
            limit = E2M1_MAX * scale_values(self.scales(i, master.data)).repeat_interleave(BLOCK_SIZE, dim=tensor.axis)
            rounded = self.rounded(i).float()
            slope = rounded - torch.where(master.data.abs() > limit, 0.0, master.data)
            product = (master.grad * slope).movedim(tensor.axis, -1).unflatten(-1, (-1, BLOCK_SIZE)).sum(-1)
            self.shifts[i].grad = product.movedim(-1, tensor.axis) * math.log(2)

    @torch.no_grad()
    def keep_shifts_in_reach(self) -> None:
        for shift in self.shifts:
            shift.data.clamp_(-LIMIT, LIMIT)

    def start_at(self, index: int, master: torch.Tensor, rounded: torch.Tensor, scales: torch.Tensor) -> None:
        """Sets a master [of the tensor's shape] and its shifts so that it rounds to `rounded` with `scales`, its chosen ones.

        The rule's scale of the new master may lie more than an octave from the chosen one: that block starts on its rounded
        values, which every scale that holds them returns.
        """
        axis = self.tensors[index].axis
        shift = scales.to(torch.int16) - block_scales(master, scale_rule=self.scale_rule, axis=axis).to(torch.int16)
        reached = shift.abs() <= 1
        self.masters[index].data.copy_(torch.where(reached.repeat_interleave(BLOCK_SIZE, dim=axis), master, rounded))
        self.shifts[index].data.copy_(torch.where(reached, shift, 0))

    def state_dict(self) -> dict:
        return {"shifts": [s.data for s in self.shifts]}

    def load_state_dict(self, state: dict) -> None:
        for shift, saved in zip(self.shifts, state["shifts"], strict=True):
            shift.data.copy_(saved)


def _block_shape(t: torch.Tensor, axis: int) -> list[int]:
    shape = list(t.shape)
    shape[axis] //= BLOCK_SIZE
    return shape


def sharpness(step: int, total: int, settings: SoftRounding) -> float | None:
    """k of update `step` (0-based) of `total`: from the first to the last sharpness, geometrically; None: hard."""
    end = settings.until * total
    if step >= end:
        return None
    first, last = settings.sharpness
    return first * (last / first) ** (step / end)


def soft_round(w: torch.Tensor, scales: torch.Tensor, axis: int, k: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(values between the neighbouring codes, derivative with respect to w) at sharpness k, float32 of w's shape.

    Args:
        w: float32; scales: uint8 E8M0 bytes of its blocks along `axis`.
    """
    unit = scale_values(scales).repeat_interleave(BLOCK_SIZE, dim=axis)
    grid = torch.tensor(E2M1_VALUES[:8], device=w.device)
    u = (w.abs() / unit).clamp_max(E2M1_MAX)
    below = torch.bucketize(u, grid, right=True).sub_(1).clamp_(0, 6)
    low, width = grid[below], grid[below + 1] - grid[below]
    bend = torch.tanh(k * ((u - low) / width - 0.5))
    full = math.tanh(k / 2)
    value = low + width * (0.5 + bend / (2 * full))
    slope = k * (1 - bend.square()) / (2 * full)
    slope = torch.where(w.abs() > E2M1_MAX * unit, 1.0, slope)  # as the plain straight-through gradient of saturated elements
    return torch.copysign(value * unit, w), slope


def pull_strength(step: int, total: int, settings: GridPull) -> float:
    """CAGE's lambda at update `step` (0-based) of `total`: 0 until `start`, then linearly up to the full strength."""
    begin = settings.start * total
    return settings.strength * max(0.0, (step + 1 - begin) / (total - begin))


@torch.no_grad()
def pull_to_grid(quantizer: ExpertQuantizer, amount: float) -> None:
    """Moves every master by `amount` (rate * lambda) of its distance to its rounded value, which the model holds."""
    for i, master in enumerate(quantizer.masters):
        master.data.lerp_(quantizer.rounded(i).float(), min(amount, 1.0))


@torch.no_grad()
def searched_scales(weight_EOI: torch.Tensor, importance_EI: torch.Tensor, scale_rule: str) -> torch.Tensor:
    """E8M0 bytes s + d, uint8 [E, O, I / 32]: of d = 0, -1, 1 the first with the least weighted squared error.

    Args:
        weight_EOI: float32. importance_EI: weights of the squared errors along I (the inputs' second moments).
    """
    rule = block_scales(weight_EOI, scale_rule=scale_rule).to(torch.int16)
    best = least = None
    for d in (0, -1, 1):
        scales = (rule + d).clamp_(0, 253).to(torch.uint8)
        error = (weight_EOI - round_at_scales(weight_EOI, scales)).square_() * importance_EI[:, None]
        error = error.unflatten(-1, (-1, BLOCK_SIZE)).sum(-1)
        best = scales if best is None else torch.where(error < least, scales, best)
        least = error if least is None else torch.minimum(error, least)
    return best
