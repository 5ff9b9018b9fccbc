"""MXFP8: activations for tensor cores that multiply E2M1 weights natively (Blackwell), and only there.

Blocks of 32 as in `format`, with one E8M0 byte each and elements of E4M3 (OCP Microscaling Formats v1.0, section 5.3.1). The
scale is the least power of two under which the block's largest magnitude stays within 448, the largest E4M3 number: nothing
saturates. Values are then rounded to nearest even. A block with a value that is not finite gets the byte 255 and decodes to
NaN.

Rejected: the specification's suggestion floor(log2(max)) - 8, which cuts maxima above 1.75 * 2^8 units by up to an eighth.
"""

import torch

from mxfp4.codec import FLOAT32_MANTISSA_BITS, scale_values
from mxfp4.format import BLOCK_SIZE, E8M0_NAN

E4M3_MAX_EXPONENT = 8
# Carries into the exponent where the mantissa is above 1.75, that of 448.
CEILING = (1 << FLOAT32_MANTISSA_BITS) // 4 - 1


def quantize_mxfp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds activations.

    Args:
        x: floating [..., n], n a multiple of 32.

    Returns:
        codes: float8_e4m3fn [..., n]; scales: uint8 [..., n / 32], E8M0. Contiguous.

    Raises:
        ValueError: n that is no multiple of 32.
    """
    if x.shape[-1] % BLOCK_SIZE:
        raise ValueError(f"x {list(x.shape)}: expected a last dimension that is a multiple of {BLOCK_SIZE}")
    blocks = x.detach().float().unflatten(-1, (-1, BLOCK_SIZE))
    finite = blocks.isfinite().all(-1)
    top = blocks.abs().amax(-1).where(finite, 0.0).contiguous().view(torch.int32)
    byte = ((top + CEILING) >> FLOAT32_MANTISSA_BITS) - E4M3_MAX_EXPONENT
    scales = byte.clamp(min=0).where(finite, E8M0_NAN).to(torch.uint8)
    units = (blocks / scale_values(scales)[..., None]).where(finite[..., None], 0.0)
    return units.to(torch.float8_e4m3fn).flatten(-2).contiguous(), scales


def dequantize_mxfp8(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 [..., n] of what `quantize_mxfp8` returns; every value is exact."""
    return (codes.float().unflatten(-1, (-1, BLOCK_SIZE)) * scale_values(scales)[..., None]).flatten(-2)
