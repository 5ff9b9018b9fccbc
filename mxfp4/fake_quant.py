"""Straight-through fake quantization: the values of `dequantize(quantize(w))` with a gradient."""

import torch

from mxfp4.codec import dequantize, quantize
from mxfp4.format import E2M1_MAX, ScaleRule


def fake_quantize(w, *, scale_rule: ScaleRule | str = "even", axis: int = -1, ste: str = "identity", nan_scale=False):
    if ste not in ("identity", "clip"):
        raise ValueError(f"ste {ste!r} is not known; expected identity or clip")
    return _StraightThrough.apply(w, ScaleRule(scale_rule), axis, ste, nan_scale)


@torch.no_grad()
def fake_quantize_(out, w, *, scale_rule: ScaleRule | str = "even", axis: int = -1, nan_scale=False):
    out.copy_(dequantize(*quantize(w, scale_rule=scale_rule, axis=axis, nan_scale=nan_scale), dtype=out.dtype, axis=axis))
    return out


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, rule, axis, ste, nan_scale):
        codes, scales = quantize(w, scale_rule=rule, axis=axis, nan_scale=nan_scale)
        ctx.ste = ste
        if ste == "clip":
            from mxfp4.codec import scale_values
            limit = E2M1_MAX * scale_values(scales)
            ctx.save_for_backward(w.abs().float() > limit.repeat_interleave(32, dim=axis))
        return dequantize(codes, scales, dtype=w.dtype, axis=axis)

    @staticmethod
    def backward(ctx, grad):
        if ctx.ste == "clip":
            grad = grad.masked_fill(ctx.saved_tensors[0], 0)
        return grad, None, None, None, None
