"""Control of weights that flip back and forth between two codes (weight oscillation).

Late in a run the masters of many weights hover at a rounding threshold: each step flips their codes, the loss sees noise
that does not vanish with the learning rate, and the weights that happen to be current at the last step are what is
released. Three remedies, all optional:

- `ema`: the model is given the rounding of a running mean of the master instead of the master itself, so a code changes
  only when the mean crosses a threshold. This is the idea of TetraJet's Q-EMA (arXiv 2502.20853), which picks between
  the two neighbours of the master by the mean; here the mean itself is rounded.
- `freeze`: an element that has flipped `freeze_flips` times is pinned to the value it has held most recently, and its
  master no longer moves (after Nagel et al., arXiv 2203.11086). A block's scale follows its largest element: where a step
  would move a pinned value by moving the scale, the whole block stays as it was before that step.
- `reset`: over every `reset_every` steps, the ways of each master and of its rounded value are summed up; where the rounded
  value went `reset_ratio` times as far, the master is put on the rounded value, the middle of its cell (OsciReset of
  TetraJet-v2, arXiv 2510.27527).
"""

from __future__ import annotations

import torch

from mxfp4 import BLOCK_SIZE
from qat.expert_quantizer import ExpertQuantizer
from recipes.schema import Oscillation


class OscillationControl:
    """Rounds the masters into the model after each optimizer step, under one of the methods above."""

    def __init__(self, quantizer: ExpertQuantizer, settings: Oscillation, total_steps: int):
        self.quantizer, self.settings = quantizer, settings
        self.first_step = int(settings.start * total_steps)
        self.means: list[torch.Tensor] | None = None
        self.flips: list[torch.Tensor] | None = None
        self.frozen: list[torch.Tensor] | None = None
        self.last: list[torch.Tensor] | None = None  # masters after the step before
        self.ways: list[torch.Tensor] | None = None  # [2, ...] summed movements of masters and of rounded values

    @torch.no_grad()
    def requantize(self, step: int) -> None:
        """Rounds for the state after optimizer step `step` (0-based)."""
        if self.settings.method == "none" or step < self.first_step:
            self.quantizer.requantize()
        elif self.settings.method == "ema":
            self._requantize_means()
        elif self.settings.method == "freeze":
            self._requantize_frozen()
        else:
            self._requantize_reset(step)

    def _requantize_means(self) -> None:
        if self.means is None:
            self.means = [m.data.clone() for m in self.quantizer.masters]
        for mean, master in zip(self.means, self.quantizer.masters, strict=True):
            mean.lerp_(master.data, 1 - self.settings.ema_decay)
        self.quantizer.requantize(self.means)

    def _requantize_frozen(self) -> None:
        count = range(len(self.quantizer.tensors))
        if self.flips is None:
            self.flips = [torch.zeros_like(m, dtype=torch.uint8) for m in self.quantizer.masters]
            self.frozen = [torch.zeros_like(f, dtype=torch.bool) for f in self.flips]
        before = [self.quantizer.rounded(i).clone() for i in count]
        for old, master, frozen in zip(before, self.quantizer.masters, self.frozen, strict=True):
            master.data[frozen] = old[frozen].float()
        self.quantizer.requantize()
        if self._put_back(before):
            self.quantizer.requantize()
        for i, old, flips, frozen in zip(count, before, self.flips, self.frozen, strict=True):
            flipped = self.quantizer.rounded(i) != old
            flips += flipped & (flips < 255)
            frozen |= flips >= self.settings.freeze_flips

    def _put_back(self, before: list[torch.Tensor]) -> bool:
        """Puts the masters of blocks in which a pinned value has moved on the values `before`; whether there were any.

        Values on the grid round to themselves, whatever scale they came from.
        """
        any_moved = False
        for i, (old, master, frozen) in enumerate(zip(before, self.quantizer.masters, self.frozen, strict=True)):
            moved = frozen & (self.quantizer.rounded(i) != old)
            if not bool(moved.any()):
                continue
            any_moved, axis = True, self.quantizer.tensors[i].axis
            blocks = moved.movedim(axis, -1).unflatten(-1, (-1, BLOCK_SIZE)).any(-1).repeat_interleave(BLOCK_SIZE, dim=-1)
            blocks = blocks.movedim(-1, axis)
            master.data.copy_(torch.where(blocks, old.float(), master.data))
        return any_moved

    def _requantize_reset(self, step: int) -> None:
        quantizer, masters = self.quantizer, self.quantizer.masters
        if self.last is None:
            self.last = [m.data.clone() for m in masters]
            self.ways = [torch.zeros(2, *m.shape, device=m.device) for m in masters]
        before = [quantizer.rounded(i).clone() for i in range(len(masters))]
        self.quantizer.requantize()
        reset = (step - self.first_step + 1) % self.settings.reset_every == 0
        for i, (master, last, ways, old) in enumerate(zip(masters, self.last, self.ways, before, strict=True)):
            now = quantizer.rounded(i).float()
            ways[0] += (master.data - last).abs()
            ways[1] += (now - old.float()).abs()
            if reset:
                oscillates = (ways[0] > 0) & (ways[1] >= self.settings.reset_ratio * ways[0])
                master.data[oscillates] = now[oscillates]
                ways.zero_()
            last.copy_(master.data)

    def state_dict(self) -> dict:
        state = {"means": self.means, "flips": self.flips, "frozen": self.frozen}
        return state if self.last is None else state | {"last": self.last, "ways": self.ways}

    def load_state_dict(self, state: dict) -> None:
        """Takes a state that may lie on another device: Accelerate reads checkpoints to the CPU."""
        self.means, self.flips, self.frozen, self.last, self.ways = (
            saved and [s.to(master.device) for s, master in zip(saved, self.quantizer.masters, strict=True)]
            for saved in (state.get(key) for key in ("means", "flips", "frozen", "last", "ways")))
