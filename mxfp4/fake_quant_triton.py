"""Fake quantization in one Triton launch: each weight is read once and written once. Imported only where triton is installed.

The arithmetic is that of `fake_quant`'s fast path, in registers: the exponent of the block's maximum gives the scale, adding
and subtracting 1.5 * 2^22 steps rounds to the E2M1 grid. Products with the constant are exact (it is multiplied by powers of
two), so a compiler that fuses them into the additions changes nothing. Blocks that this cannot do (magnitudes from 2^100 on,
maxima below 2^-100 that are not zero, non-finite values) raise a flag; the call is then done again by `round_chunks`, which
treats them as the codec does and refuses what is not finite.

Reference: `fake_quant.round_chunks`, bit for bit. `fake_quantize_` calls this on GPUs. The rule `mse` has no kernel and is
refused here.

Rejected: the codec's midpoints (seven comparisons a value); a kernel that writes codes, then one that reads them.
"""

import torch
import triton
import triton.language as tl

from mxfp4.codec import FLOAT32_MANTISSA_BITS, check_blocks, scale_bump
from mxfp4.fake_quant import _SAFE_END, _SAFE_MIN, round_chunks
from mxfp4.format import BLOCK_SIZE, E2M1_MAX_EXPONENT, ScaleRule

_BLOCK = tl.constexpr(BLOCK_SIZE)
_EXPONENT = tl.constexpr(0x7F800000)
_ONE = tl.constexpr(1 << FLOAT32_MANTISSA_BITS)
_TOP = tl.constexpr(E2M1_MAX_EXPONENT)
_MAGIC = tl.constexpr(1.5 * 2.0 ** (FLOAT32_MANTISSA_BITS - 1))
BLOCKS_PER_PROGRAM = 64


@triton.jit
def fake_quantize_kernel(w, out, unsafe, blocks, stride, bump, safe_min, safe_end, SATURATES: tl.constexpr,
                         BLOCKS: tl.constexpr):
    """BLOCKS blocks of w, out [., 32, stride] per program; `unsafe` int32 [1] becomes 1 if one of them needs the codec."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    place = block // stride * (_BLOCK * stride) + block % stride
    at = place[:, None] + (tl.arange(0, _BLOCK) * stride)[None, :]
    mask = (block < blocks)[:, None] & (tl.arange(0, _BLOCK) >= 0)[None, :]
    bits = tl.load(w + at, mask=mask, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    top = tl.max(magnitude, 1)
    bad = (top >= safe_end) | ((top < safe_min) & (top > 0))
    if tl.max(bad.to(tl.int32), 0) > 0:
        tl.atomic_max(unsafe, 1, sem="relaxed")
    scale = ((top + bump) & _EXPONENT) - _TOP * _ONE
    if SATURATES:
        magnitude = tl.minimum(magnitude, (scale + (_TOP * _ONE + _ONE // 2))[:, None])
    step = tl.maximum(magnitude & _EXPONENT, scale[:, None]).to(tl.float32, bitcast=True) * _MAGIC
    rounded = ((magnitude.to(tl.float32, bitcast=True) + step) - step).to(tl.int32, bitcast=True)
    value = (rounded | (bits & -0x80000000)).to(tl.float32, bitcast=True)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@torch.no_grad()
def fake_quantize_fused_(out: torch.Tensor, w: torch.Tensor, *, scale_rule: ScaleRule | str = "even", axis: int = -1,
                         ) -> torch.Tensor:
    """As `fake_quant.fake_quantize_`, in one launch (and one read of a flag, which synchronizes).

    Args:
        out: contiguous, of the shape of w; float32, bfloat16 or float16; another tensor than w.

    Raises:
        ValueError: as there; the rule `mse`; an `out` that is not contiguous or is w.
    """
    rule, axis = ScaleRule(scale_rule), check_blocks(w, axis)
    if rule is ScaleRule.MSE:
        raise ValueError("scale_rule 'mse': the fused fake quantization has floor, rceil and even")
    same = w.numel() > 0 and out.data_ptr() == w.data_ptr()
    if out.shape != w.shape or out.dtype not in _SAFE_END or not out.is_contiguous() or same:
        raise ValueError(f"out is {out.dtype} {list(out.shape)}; expected another contiguous float32, bfloat16 or float16 "
                         f"tensor of shape {list(w.shape)}")
    if not w.numel():
        return out
    w, blocks = w.contiguous(), w.numel() // BLOCK_SIZE
    unsafe = torch.zeros(1, dtype=torch.int32, device=w.device)
    with torch.cuda.device_of(w):  # triton launches on the current GPU, wherever the tensors lie
        fake_quantize_kernel[(triton.cdiv(blocks, BLOCKS_PER_PROGRAM),)](
            w, out, unsafe, blocks, w.shape[axis + 1:].numel(), scale_bump(rule), _SAFE_MIN, _SAFE_END[w.dtype],
            SATURATES=rule is ScaleRule.FLOOR, BLOCKS=BLOCKS_PER_PROGRAM)
    return round_chunks(out, w, rule, axis, False) if int(unsafe) else out
