"""bf16 products on processors that have no instructions for them.

torch multiplies bf16 matrices through oneDNN where a CPU has AVX-512, and by plain loops elsewhere: about eight times as slow
as float32. What oneDNN computes is a float32 sum of the operands' products, rounded to bf16 once; the same comes of converting
the operands, multiplying in float32 and rounding, at nearly the speed of float32. Only kernels of the CPU are replaced, in this
process alone; other dtypes stay torch's own, bit for bit (each product of any dtype costs some 30 microseconds more). While a
product runs, its operands are held in float32 too. Of few rows torch's loops are the faster way, and stay.

Rejected: a dispatch mode (Python at every operation, and none in a backward pass on another thread); float32 models (other
numbers than are served, twice the memory).
"""

from __future__ import annotations

import functools
import warnings

import torch

FEW = 6  # rows, from which on converting the other operand pays

_aten = torch.ops.aten
_REPLACED = torch.library.Library("aten", "IMPL")  # what is registered through it holds as long as it does


@functools.cache
def speed_up_bf16_products() -> bool:
    """Replaces torch's bf16 products where this processor has none of its own; whether it did. Once per process."""
    if not torch.backends.mkldnn.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there was a kernel before
        for name, product in {"mm": _mm, "mm.out": _mm_into, "bmm": _bmm, "addmm": _addmm, "baddbmm": _baddbmm}.items():
            _REPLACED.impl(name, product, "CPU", allow_override=True)
    return True


def _shape(a: torch.Tensor, b: torch.Tensor) -> tuple[int, ...]:
    return (*a.shape[:-1], b.shape[-1])


def _run(out_variant, a: torch.Tensor, b: torch.Tensor, *first: torch.Tensor, **options) -> torch.Tensor:
    """first, a x b by torch's own kernel, which its variant with `out` still is: bf16 of many rows by way of float32."""
    operands, via = (*first, a, b), a.dtype
    if a.ndim < 2 or b.ndim < 2:
        return out_variant(*operands, **options, out=a.new_empty(0))  # raises, in torch's words
    if all(t.dtype is torch.bfloat16 for t in operands) and a.shape[-2] >= FEW:
        via, operands = torch.float32, tuple(t.float() for t in operands)
    return out_variant(*operands, **options, out=torch.empty(_shape(a, b), dtype=via)).to(a.dtype)


def _mm(a, b):
    # Not mm.out, which is replaced too (grouped products of experts call it): with beta = 0 the first operand is not read.
    return _run(_aten.addmm.out, a, b, a.new_empty(()), beta=0)


def _mm_into(a, b, *, out):
    ours = a.ndim == b.ndim == 2 and out.shape == _shape(a, b) and a.dtype is b.dtype is out.dtype is torch.bfloat16
    if ours and out.untyped_storage().data_ptr() not in [t.untyped_storage().data_ptr() for t in (a, b)]:
        return out.copy_(_mm(a, b))
    return _aten.addmm.out(a.new_empty(()), a, b, beta=0, out=out)


def _bmm(a, b):
    return _run(_aten.bmm.out, a, b)


def _addmm(bias, a, b, *, beta=1, alpha=1):
    return _run(_aten.addmm.out, a, b, bias, beta=beta, alpha=alpha)


def _baddbmm(bias, a, b, *, beta=1, alpha=1):
    return _run(_aten.baddbmm.out, a, b, bias, beta=beta, alpha=alpha)
