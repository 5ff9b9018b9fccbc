"""Per-layer, per-expert health of the quantized weights, written to metrics.jsonl while the run goes on.

For every expert: signal-to-quantization-noise ratio of its weights (dB, against the float32 master), share of codes that
changed value since the last report, share of saturated elements, share of elements rounded to zero, and tokens routed
to it since the last report. A dead expert, a collapsing scale or endless oscillation shows here long before the loss.
"""

from __future__ import annotations

import torch
from torch import nn

from mxfp4 import dequantize, quantize
from mxfp4.fake_quant import saturated
from qat.attach import ExpertQuantizer


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

    def take(self, name: str) -> list[int]:
        """Counts since the last call, which starts them again."""
        counts = self.counts[name].tolist()
        self.counts[name].zero_()
        return counts


class Health:
    """Compares the quantized weights with their masters and with those of the last report (kept packed, 4.25 bits)."""

    def __init__(self, model: nn.Module, quantizer: ExpertQuantizer):
        self.quantizer = quantizer
        self.routed = RoutedTokens(model, quantizer)
        self.rebase()

    def rebase(self) -> None:
        """Makes the present codes those that the next report compares with."""
        self._last = [self._packed(tensor) for tensor in self.quantizer.tensors]

    def _packed(self, tensor):
        return quantize(tensor.parameter.data, scale_rule=self.quantizer.scale_rule, axis=tensor.axis)

    @torch.no_grad()
    def report(self) -> list[dict]:
        """One record per expert tensor: name and, for each expert, the five figures (rounded to 6 digits)."""
        records = []
        taken: dict[str, list[int]] = {}
        for i, (tensor, master) in enumerate(self.quantizer):
            now = tensor.parameter.data
            before = dequantize(*self._last[i], dtype=now.dtype, axis=tensor.axis)
            error = (now.float() - master).square().flatten(1).sum(1)
            signal = master.square().flatten(1).sum(1)
            sqnr = 10 * torch.log10(signal / error.clamp_min(torch.finfo(torch.float32).tiny))
            clipped = saturated(master, scale_rule=self.quantizer.scale_rule, axis=tensor.axis)
            if tensor.module not in taken:
                taken[tensor.module] = self.routed.take(tensor.module)
            records.append({
                "tensor": tensor.name,
                "sqnr_db": _rounded(sqnr),
                "flipped": _share(now != before),
                "saturated": _share(clipped),
                "zeroed": _share((now == 0) & (master != 0)),
                "tokens": taken[tensor.module],
            })
            self._last[i] = self._packed(tensor)
        return records

    def state_dict(self) -> dict:
        return {"last": self._last, "routed": self.routed.counts}

    def load_state_dict(self, state: dict) -> None:
        self._last = state["last"]
        self.routed.counts = state["routed"]


def _share(mask: torch.Tensor) -> list[float]:
    return _rounded(mask.flatten(1).float().mean(1))


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(float(v), 6) for v in values]
