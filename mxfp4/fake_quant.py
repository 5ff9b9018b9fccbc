"""Fake quantization for training: the values of `dequantize(quantize(w))`, bit for bit, with a gradient.

On a CPU with a C compiler blocks along the last axis are rounded in one pass (`mxfp4.compiled`), on a GPU with triton in
one launch (`fake_quant_triton`), except for `mse`, NaN scales and rounding in place. Everything else takes the chunks
below: weights pass through in chunks that fit the cache (on a device one after the other), and each chunk costs about ten
vectorized operations on a float32 scratch. All three compute

    magnitude        a = |w|, and the bits of the block maximum
    scale            S = exponent bits of 2^s: one integer addition on the maximum (see `MANTISSA_BUMP`), one mask
    step             c = max(exponent bits of a, S) = 2^e: around a the E2M1 grid has the step 2^(e - 1)
    rounding         (a + 1.5 * 2^22 * c) - 1.5 * 2^22 * c: the addition drops everything below the step 2^(e - 1), with
                     the floating-point unit's own round-to-nearest-even
    sign             back from w, so that -0.0 survives

Saturation needs one more minimum, and only where the rule can saturate: under `even` the maximum always rounds to 4
or 6 units, and under `rceil` it is not above 6. bfloat16 is widened to float32 because bfloat16 additions are emulated
by widening anyway, each time (26 against 19 us for 2^17 values, measured with AVX-512).

Two kinds of chunk leave this path for the reference codec: magnitudes of 2^100 and above (the large constant would
overflow, the exponent cap applies, or they are not finite) and blocks whose maximum is below 2^-100 without being zero
(their scale may be subnormal). Trained weights have neither; correctness does not depend on it.

Rejected: comparison with midpoints, as the codec does (70 times slower); bfloat16 arithmetic in place (int16 maxima
along a row are not vectorized: 55 against 12 us); torch.compile (half a minute of compiling, and a fifteenth of the speed).
"""

import functools
import importlib.util

import torch

from mxfp4 import compiled
from mxfp4.codec import (
    FLOAT32_MANTISSA_BITS,
    block_scales,
    check_blocks,
    dequantize,
    quantize,
    refuse_non_finite,
    round_to_scales,
    scale_bump,
    scale_values,
)
from mxfp4.format import BLOCK_SIZE, E2M1_MAX, E2M1_MAX_EXPONENT, E8M0_BIAS, ScaleRule

_EXPONENT_BITS = 0x7F800000
_SIGN_BIT = -0x80000000
_ONE = 1 << FLOAT32_MANTISSA_BITS

# a + MAGIC * 2^e has a last place of 2^(e - 1); the odd half keeps the sum inside one binade.
_MAGIC = 1.5 * 2.0 ** (FLOAT32_MANTISSA_BITS - 1)

# Block maxima (float32 bits) between which no intermediate overflows, no exponent is clamped, no scale is subnormal.
_SAFE_MIN = (E8M0_BIAS - 100) << FLOAT32_MANTISSA_BITS
_SAFE_END = {
    torch.float32: (E8M0_BIAS + 100) << FLOAT32_MANTISSA_BITS,
    torch.bfloat16: (E8M0_BIAS + 100) << FLOAT32_MANTISSA_BITS,
    torch.float16: (E8M0_BIAS + 15) << FLOAT32_MANTISSA_BITS,
}

# Rules under which the largest value of a block can be beyond six units.
SATURATE = (ScaleRule.MSE, ScaleRule.FLOOR)

# Values per chunk. Larger chunks spread the cost of starting an operation, smaller ones need less scratch (8 bytes per
# value, 12 under `mse`) and cache. Measured on one thread, bfloat16, `even`: 2^16 15.2 ms, 2^17 11.0, 2^18 9.3, 2^19 7.8.
_CHUNK = 1 << 18


def fake_quantize(
    w: torch.Tensor,
    *,
    scale_rule: ScaleRule | str = "even",
    axis: int = -1,
    ste: str = "identity",
    nan_scale: bool = False,
) -> torch.Tensor:
    """Weights rounded to MXFP4, differentiable.

    Args:
        w: float32, bfloat16 or float16 [..., n, ...], n values along `axis`, a multiple of 32.
        scale_rule: floor, rceil, even or mse (see `mxfp4.format`).
        axis: the reduction dimension, along which blocks lie.
        ste: the gradient with respect to w. "identity" passes the output's gradient on unchanged, also for saturated
            elements: they belong to a block whose scale follows its maximum, so a step that shrinks them is useful and
            one that grows them soon raises the scale. "clip" zeroes it where |w| > 6 * 2^s (the derivative of the
            saturating rounding for a fixed scale).
        nan_scale: return NaN for a block with a non-finite value instead of refusing it.

    Returns:
        The shape and dtype of w, contiguous: `dequantize(*quantize(w), dtype=w.dtype)` bit for bit.

    Raises:
        ValueError: as `quantize`; an unknown `ste`.
    """
    if ste not in ("identity", "clip"):
        raise ValueError(f"ste {ste!r} is not known; expected identity or clip")
    return _StraightThrough.apply(w, ScaleRule(scale_rule), axis, ste, nan_scale)


@torch.no_grad()
def fake_quantize_(
    out: torch.Tensor,
    w: torch.Tensor,
    *,
    scale_rule: ScaleRule | str = "even",
    axis: int = -1,
    nan_scale: bool = False,
) -> torch.Tensor:
    """Writes the rounded values of `w` into `out`, without a gradient, and returns `out`.

    `out` has the shape of w and any of the three dtypes: float32 masters become bfloat16 compute weights without a
    tensor in between, equal to `dequantize(*quantize(w), dtype=out.dtype)` bit for bit. `out` may be `w` itself.

    Raises:
        ValueError: as `quantize`, or another shape. After a refused non-finite value `out` is partly written.
    """
    rule = ScaleRule(scale_rule)
    axis = check_blocks(w, axis)
    if out.shape != w.shape or out.dtype not in _SAFE_END:
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)}; expected float32, bfloat16 or float16 of shape {list(w.shape)}"
        )
    if not out.is_contiguous():
        return out.copy_(fake_quantize_(torch.empty_like(out, memory_format=torch.contiguous_format), w,
                                        scale_rule=rule, axis=axis, nan_scale=nan_scale))
    if fuses(w) and rule is not ScaleRule.MSE and not nan_scale and out.data_ptr() != w.data_ptr():
        from mxfp4.fake_quant_triton import fake_quantize_fused_

        return fake_quantize_fused_(out, w, scale_rule=rule, axis=axis)
    return round_chunks(out, w, rule, axis, nan_scale)


@torch.no_grad()
def round_at_scales(w: torch.Tensor, scales: torch.Tensor, *, axis: int = -1) -> torch.Tensor:
    """The nearest MXFP4 values of float32 weights whose block scales are already chosen (`codec.round_to_scales`, faster).

    Args:
        w: float32 [..., n, ...], finite, n a multiple of 32 along `axis`.
        scales: uint8 [..., n / 32, ...], E8M0 bytes.

    Returns:
        float32 of w's shape.
    """
    axis = check_blocks(w, axis)
    rows = w.detach().movedim(axis, -1).unflatten(-1, (-1, BLOCK_SIZE))
    bytes_ = scales.movedim(axis, -1)[..., None]
    unit = scale_values(bytes_)
    low, high = (int(bound) for bound in torch.aminmax(bytes_)) if bytes_.numel() else (E8M0_BIAS, E8M0_BIAS)
    if low < E8M0_BIAS - 100 or high > E8M0_BIAS + 100:
        return round_to_scales(rows, unit).flatten(-2).movedim(-1, axis)
    a = torch.minimum(rows.abs(), unit * E2M1_MAX)
    step = torch.maximum(a.view(torch.int32) & _EXPONENT_BITS, unit.view(torch.int32)).view(torch.float32)
    a.add_(step, alpha=_MAGIC).sub_(step, alpha=_MAGIC)
    return torch.copysign(a, rows).flatten(-2).movedim(-1, axis)


def fuses(w: torch.Tensor) -> bool:
    """Whether the fused kernel takes tensors like w."""
    return w.is_cuda and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def round_chunks(out: torch.Tensor, w: torch.Tensor, rule: ScaleRule, axis: int, nan_scale: bool) -> torch.Tensor:
    """`fake_quantize_` chunk by chunk, whatever the device; arguments as checked there, `out` contiguous."""
    inner = w.shape[axis + 1:].numel()
    shape = (-1, BLOCK_SIZE) if inner == 1 else (-1, BLOCK_SIZE, inner)
    if w.numel():
        rows, rounded = w.contiguous().view(shape), out.view(shape)
        if inner == 1 and compiled.rounds(w, out):
            def otherwise(part: slice) -> None:
                if not nan_scale and not bool(torch.isfinite(rows[part]).all()):
                    refuse_non_finite(w)
                rounded[part] = dequantize(*quantize(rows[part], scale_rule=rule, nan_scale=nan_scale), dtype=out.dtype)

            compiled.round_blocks(rows, rounded, bump=scale_bump(rule), finer=rule is ScaleRule.MSE,
                                  saturates=rule in SATURATE, otherwise=otherwise)
        else:
            _Rounder(w, rule, nan_scale).run(rows, rounded)
    return out


def saturated(w: torch.Tensor, *, scale_rule: ScaleRule | str = "even", axis: int = -1,
              nan_scale: bool = False) -> torch.Tensor:
    """Bool mask of the shape of `w`: True where |w| > 6 * 2^s, beyond the largest value of the element's block.

    With `nan_scale`, False throughout a block with a non-finite value, which is refused otherwise.
    """
    limits = E2M1_MAX * scale_values(block_scales(w, scale_rule=scale_rule, axis=axis, nan_scale=nan_scale))
    return w.detach().abs() > limits.repeat_interleave(BLOCK_SIZE, dim=axis)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, rule, axis, ste, nan_scale):
        ctx.clip = ste == "clip"
        if ctx.clip:
            ctx.save_for_backward(saturated(w, scale_rule=rule, axis=axis, nan_scale=nan_scale))
        out = torch.empty_like(w, memory_format=torch.contiguous_format)
        return fake_quantize_(out, w, scale_rule=rule, axis=axis, nan_scale=nan_scale)

    @staticmethod
    def backward(ctx, grad):
        if ctx.clip:
            grad = grad.masked_fill(ctx.saved_tensors[0], 0)
        return grad, None, None, None, None


class _Rounder:
    """The chunk loop and its scratch. Blocks lie along dimension 1 of every view."""

    def __init__(self, w: torch.Tensor, rule: ScaleRule, nan_scale: bool):
        self.w, self.rule, self.nan_scale = w, rule, nan_scale
        self.safe_end = _SAFE_END[w.dtype]
        self.chunk = min(_chunk_values(w.device), w.numel())
        buffers = 3 if rule is ScaleRule.MSE else 2
        self.scratch = torch.empty((buffers, self.chunk), dtype=torch.float32, device=w.device)
        self.shape, self.views = None, ()
        # 0-dim tensors: an integer operation with a Python number converts it anew on every call.
        self.exponent_mask = torch.tensor(_EXPONENT_BITS, dtype=torch.int32, device=w.device)
        self.sign_mask = torch.tensor(_SIGN_BIT, dtype=torch.int32, device=w.device)

    def run(self, w: torch.Tensor, out: torch.Tensor) -> None:
        """Rounds w [P, 32] or [P, 32, Q] into out of the same shape."""
        columns = w.shape[2] if w.ndim == 3 else 1
        width = min(columns, self.chunk // BLOCK_SIZE)
        rows = self.chunk // (BLOCK_SIZE * width)
        for start in range(0, w.shape[0], rows):
            if w.ndim == 2:
                self._round(w[start:start + rows], out[start:start + rows])
                continue
            for left in range(0, columns, width):
                part = (slice(start, start + rows), slice(None), slice(left, left + width))
                self._round(w[part], out[part])

    def _views(self, shape: torch.Size) -> tuple[torch.Tensor, ...]:
        """Scratch in the shape of a chunk: magnitudes, steps, their bits, and the third buffer under `mse`."""
        if shape != self.shape:  # nearly all chunks have one shape, and making views takes as long as a tenth of the rounding
            a, c, *spare = (buffer[:shape.numel()].view(shape) for buffer in self.scratch)
            self.shape, self.views = shape, (a, c, a.view(torch.int32), c.view(torch.int32), *spare)
        return self.views

    def _round(self, w: torch.Tensor, out: torch.Tensor) -> None:
        a, c, a_bits, c_bits, *spare = self._views(w.shape)
        if w.dtype is torch.float32:
            torch.abs(w, out=a)
        else:
            a.copy_(w).abs_()
        top = a_bits.amax(1, keepdim=True)
        if not self._is_safe(top):
            out.copy_(dequantize(*quantize(w, scale_rule=self.rule, axis=1, nan_scale=self.nan_scale),
                                 dtype=out.dtype, axis=1))
            return
        scale = top.add_(scale_bump(self.rule)).bitwise_and_(self.exponent_mask).sub_(E2M1_MAX_EXPONENT * _ONE)
        if self.rule is ScaleRule.MSE:
            scale.sub_(self._prefers_finer_scale(a, scale, c, *spare), alpha=_ONE)
        if self.rule in SATURATE:
            six_units = scale + (E2M1_MAX_EXPONENT * _ONE + _ONE // 2)
            torch.minimum(a_bits, six_units, out=a_bits)
        torch.bitwise_and(a_bits, self.exponent_mask, out=c_bits)
        torch.maximum(c_bits, scale, out=c_bits)
        a.add_(c, alpha=_MAGIC).sub_(c, alpha=_MAGIC)
        if w.dtype is out.dtype and w.dtype is not torch.float32:
            # Through scratch, because out may be w, whose signs are still needed.
            narrow = c.view(-1).view(out.dtype)[:w.numel()].view(w.shape).copy_(a)
            torch.copysign(narrow, w, out=out)
            return
        source = w if w.dtype is torch.float32 else c.copy_(w)
        torch.bitwise_and(source.view(torch.int32), self.sign_mask, out=c_bits)
        if out.dtype is torch.float32:
            torch.bitwise_or(a_bits, c_bits, out=out.view(torch.int32))
        else:
            a_bits.bitwise_or_(c_bits)
            out.copy_(a)

    def _is_safe(self, top: torch.Tensor) -> bool:
        """Whether all block maxima (float32 bits) can take the fast path. Raises where one is not finite."""
        low, high = (int(bound) for bound in torch.aminmax(top))
        if _SAFE_MIN <= low and high < self.safe_end:
            return True
        if high >= _EXPONENT_BITS and not self.nan_scale:
            refuse_non_finite(self.w)
        return high < self.safe_end and not bool(((top > 0) & (top < _SAFE_MIN)).any())

    def _prefers_finer_scale(self, a: torch.Tensor, scale: torch.Tensor, u: torch.Tensor, v: torch.Tensor):
        """`codec.prefers_finer_scale` of the chunk as int32 [P, 1] or [P, 1, Q]; `u` and `v` are scratch.

        In multiples of the scale, not in units of it, which saves a pass (scales are powers of two far from both ends, so
        every product here is exact), and with one sum instead of two: of 4 max(u, 3.5) + min(||u - 1/2| - 1/4|, 1/8), which
        are multiples of 2^-13 units and come to less than 2^10 of them in all, so that 24 bits hold every partial sum.
        """
        unit = scale.view(torch.float32)
        if self.w.dtype is torch.float32:
            # Ties-to-even rounding to 2^-13 units. The other dtypes have no bits there (where it matters, above 1/8).
            coarse = unit * (1.5 * 2.0**10)
            a = torch.add(a, coarse, out=u).sub_(coarse)
        losses = torch.maximum(a, unit * 3.5, out=v)
        torch.sub(a, unit * 0.5, out=u).abs_().sub_(unit * 0.25).abs_()
        torch.minimum(u, unit * 0.125, out=u)
        balance = u.add_(losses, alpha=4.0).sum(1, keepdim=True)
        return (balance < unit * (BLOCK_SIZE * (0.125 + 4 * 3.5))).to(torch.int32)


def _chunk_values(device: torch.device) -> int:
    if device.type != "cpu":
        return 1 << 26
    # One or two threads share a chunk, so that scratch stays below a quarter of a 16 MB tensor.
    return max(_CHUNK, torch.get_num_threads() * _CHUNK // 2)
