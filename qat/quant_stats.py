"""Per-layer, per-expert health of the quantized weights, written to metrics.jsonl while the run goes on.

For every expert: signal-to-quantization-noise ratio of its weights (dB, against the float32 master), share of codes that
changed value since the last report, share of saturated elements, share of elements rounded to zero, and tokens routed
to it since the last report by all processes. A ratio that is no number (no signal, no error) is null: JSON has no infinity.
A dead expert, a collapsing scale or endless oscillation shows here long before the loss.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from mxfp4 import dequantize
from mxfp4.fake_quant import saturated
from qat.expert_quantizer import ExpertQuantizer


class RoutedTokens:
    """Counts tokens routed to each expert, by a forward hook on every experts module of the quantizer's model."""

    def __init__(self, model: nn.Module, quantizer: ExpertQuantizer):
        self.counts: dict[str, torch.Tensor] = {}
        sizes = {t.module: t.num_experts for t in quantizer.tensors}
        for name, size in sizes.items():
            self.counts[name] = torch.zeros(size, dtype=torch.int64)
            model.get_submodule(name).register_forward_pre_hook(self._hook(name, size), with_kwargs=True)

    def _hook(self, name: str, size: int):
        def count(module, args, kwargs):
            if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
                return  # evaluation, or recomputation inside a backward pass
            chosen = [a for a in (*args, *kwargs.values())
                      if isinstance(a, torch.Tensor) and a.dtype in (torch.int64, torch.int32)]
            if chosen:
                self.counts[name] += torch.bincount(chosen[0].reshape(-1).cpu().long(), minlength=size)[:size]
        return count

    def gather(self, accelerator) -> None:
        """Moves the counts of all processes to the first one, which alone writes reports and checkpoints."""
        for name, counts in self.counts.items():
            total = accelerator.reduce(counts.to(accelerator.device), reduction="sum").cpu()
            self.counts[name] = total if accelerator.is_main_process else torch.zeros_like(total)

    def take(self, name: str) -> list[int]:
        """Counts since the last call, which starts them again."""
        counts = self.counts[name].tolist()
        self.counts[name].zero_()
        return counts


class Health:
    """Compares the quantized weights with their masters and with those of the last report (kept packed, 4.25 bits).

    With an `accelerator` tokens are counted over its processes, which then report and save together.
    """

    def __init__(self, model: nn.Module, quantizer: ExpertQuantizer, accelerator=None):
        self.quantizer, self.accelerator = quantizer, accelerator
        self.routed = RoutedTokens(model, quantizer)
        self.rebase()

    def rebase(self) -> None:
        """Makes the present codes those that the next report compares with."""
        self._last = [self.quantizer.codes(i) for i in range(len(self.quantizer.tensors))]

    @torch.no_grad()
    def report(self) -> list[dict]:
        """One record per expert tensor: name and, for each expert, the five figures (rounded to 6 digits).

        Tokens are those of all processes on the first, and 0 on the others.
        """
        self._gather()
        records = []
        taken: dict[str, list[int]] = {}
        for i, (tensor, master) in enumerate(self.quantizer):
            now = self.quantizer.rounded(i)
            before = dequantize(*self._last[i], dtype=now.dtype, axis=tensor.axis)
            error = (now.float() - master).square().flatten(1).sum(1)
            signal = master.square().flatten(1).sum(1)
            sqnr = 10 * torch.log10(signal / error.clamp_min(torch.finfo(torch.float32).tiny))
            clipped = saturated(master, scale_rule=self.quantizer.scale_rule, axis=tensor.axis)
            figures = self.quantizer.of_all_experts(i, torch.stack(
                (sqnr, _share(now != before), _share(clipped), _share((now == 0) & (master != 0))), dim=1)).T
            if tensor.module not in taken:
                taken[tensor.module] = self.routed.take(tensor.module)
            records.append({
                "tensor": tensor.name,
                **dict(zip(("sqnr_db", "flipped", "saturated", "zeroed"), map(_rounded, figures), strict=True)),
                "tokens": taken[tensor.module],
            })
            self._last[i] = self.quantizer.codes(i)
        return records

    def _gather(self) -> None:
        if self.accelerator is not None:
            self.routed.gather(self.accelerator)

    def state_dict(self) -> dict:
        """For a checkpoint, which keeps the first process's; all processes call it."""
        self._gather()
        return {"last": self._last, "routed": self.routed.counts}

    def load_state_dict(self, state: dict) -> None:
        """Takes a state that may lie on another device: Accelerate reads checkpoints to the CPU."""
        self._last = [tuple(part.to(tensor.parameter.device) for part in packed)
                      for tensor, packed in zip(self.quantizer.tensors, state["last"], strict=True)]
        counted_here = self.accelerator is None or self.accelerator.is_main_process
        self.routed.counts = {name: counts if counted_here else torch.zeros_like(counts)
                              for name, counts in state["routed"].items()}


def _share(mask: torch.Tensor) -> torch.Tensor:
    return mask.flatten(1).float().mean(1)


def _rounded(values: torch.Tensor) -> list[float | None]:
    return [round(v, 6) if math.isfinite(v) else None for v in values.tolist()]
