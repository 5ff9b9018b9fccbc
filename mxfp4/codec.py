"""Reference codec: weights -> (codes, scales) -> weights.

Written to be compared with the page `mxfp4.format`, line by line, and used wherever bytes are made or read: export,
loading, health reports. Everything else that rounds to MXFP4 (`mxfp4.fake_quant`, kernels) has this file as its oracle
and must equal it bit for bit, including the sign of zero.

Scales come from integer arithmetic on the bits of the block maximum. Logarithms were rejected: log2 of a value just
below a power of two rounds up to it in float32 (and much sooner in bfloat16), which silently doubles a scale. Elements
are rounded by comparing with the seven midpoints, which is slower than arithmetic tricks and leaves nothing to trust.

Shapes: `w` [..., n, ...] with n values along `axis`, n a multiple of 32. Codes have n / 2 and scales n / 32 entries
along the same axis; all other dimensions, such as the experts of [E, out, in], are kept.
"""

import torch

from mxfp4.format import (
    BLOCK_SIZE,
    E2M1_MAX_EXPONENT,
    E2M1_ROUND_UP_FROM,
    E2M1_VALUES,
    E8M0_BIAS,
    E8M0_NAN,
    MANTISSA_BUMP,
    MAX_SCALE_EXPONENT,
    MIN_SCALE_EXPONENT,
    ScaleRule,
)

FLOAT32_MANTISSA_BITS = 23

# Working storage is about 30 times a chunk of bfloat16 weights; this keeps it near 16 MB for tensors of any size.
BLOCKS_PER_CHUNK = 8192

# Scales above this make 4 or 6 units infinite in the weights' own dtype (float16 ends at 65504).
_MAX_EXPONENT = {torch.float32: MAX_SCALE_EXPONENT, torch.bfloat16: MAX_SCALE_EXPONENT, torch.float16: 13}


def quantize(
    w: torch.Tensor, *, scale_rule: ScaleRule | str = "even", axis: int = -1, nan_scale: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds weights to MXFP4.

    Args:
        w: float32, bfloat16 or float16 [..., n, ...], any strides, n along `axis`.
        scale_rule: floor, rceil, even or mse (see `mxfp4.format`).
        axis: the reduction dimension, along which blocks lie.
        nan_scale: encode a block with a non-finite value as NaN (scale byte 255, codes 0) instead of refusing it.

    Returns:
        codes: uint8 [..., n / 2, ...], two E2M1 codes per byte, the even element in the low nibble.
        scales: uint8 [..., n / 32, ...], E8M0. Both are contiguous.

    Raises:
        ValueError: another dtype, n not a multiple of 32, an unknown rule, or a non-finite value (its index is named).
    """
    axis = check_blocks(w, axis)
    lead = w.detach().movedim(axis, -1)
    rows = lead.reshape(-1, BLOCK_SIZE)
    scales = block_scales(lead, scale_rule=scale_rule, nan_scale=nan_scale, original=w)
    row_scales = scales.view(-1)
    codes = torch.empty((rows.shape[0], BLOCK_SIZE // 2), dtype=torch.uint8, device=w.device)
    for start in range(0, rows.shape[0], BLOCKS_PER_CHUNK):
        chunk = slice(start, start + BLOCKS_PER_CHUNK)
        units = rows[chunk].to(torch.float32) / scale_values(row_scales[chunk])[:, None]
        codes[chunk] = pack(encode(units)).masked_fill_((row_scales[chunk] == E8M0_NAN)[:, None], 0)
    codes = codes.view(*lead.shape[:-1], lead.shape[-1] // 2)
    return codes.movedim(-1, axis).contiguous(), scales.movedim(-1, axis).contiguous()


def dequantize(codes: torch.Tensor, scales: torch.Tensor, *, dtype: torch.dtype, axis: int = -1) -> torch.Tensor:
    """Decodes MXFP4 into a contiguous tensor of `dtype`.

    Every code under every scale byte up to 252 is exact in float32 and bfloat16. Under 253 and 254, which `quantize`
    never writes, large codes decode to infinity there, and float16 over- and underflows as its range demands. Byte 255
    is NaN.

    Args:
        codes: uint8 [..., n / 2, ...].
        scales: uint8 [..., n / 32, ...] (or float8_e8m0fnu, the same bytes).
        dtype: a floating dtype.
        axis: the dimension along which blocks lie.

    Raises:
        ValueError: dtypes or shapes that do not belong together.
    """
    axis = _check_codes(codes, scales, axis)
    scales = scales.view(torch.uint8)
    lead, lead_scales = codes.movedim(axis, -1), scales.movedim(axis, -1)
    rows, row_scales = lead.reshape(-1, BLOCK_SIZE // 2), lead_scales.reshape(-1)
    out = torch.empty((rows.shape[0], BLOCK_SIZE), dtype=dtype, device=codes.device)
    for start in range(0, rows.shape[0], BLOCKS_PER_CHUNK):
        chunk = slice(start, start + BLOCKS_PER_CHUNK)
        out[chunk] = decode(unpack(rows[chunk])) * scale_values(row_scales[chunk])[:, None]
    return out.view(*lead.shape[:-1], lead.shape[-1] * 2).movedim(-1, axis).contiguous()


def block_scales(
    w: torch.Tensor,
    *,
    scale_rule: ScaleRule | str = "even",
    axis: int = -1,
    nan_scale: bool = False,
    original: torch.Tensor | None = None,
) -> torch.Tensor:
    """The scales of `quantize` without the codes: contiguous uint8 [..., n / 32, ...]. Same arguments and errors.

    `original` is the tensor whose indices an error names, when `w` is a view of it.
    """
    rule = ScaleRule(scale_rule)
    axis = check_blocks(w, axis)
    lead = w.detach().movedim(axis, -1)
    rows = lead.reshape(-1, BLOCK_SIZE)
    scales = torch.empty(rows.shape[0], dtype=torch.uint8, device=w.device)
    for start in range(0, rows.shape[0], BLOCKS_PER_CHUNK):
        chunk = slice(start, start + BLOCKS_PER_CHUNK)
        x = rows[chunk].to(torch.float32)
        finite = torch.isfinite(x).all(-1)
        if not bool(finite.all()):
            if not nan_scale:
                refuse_non_finite(w if original is None else original)
            x = torch.where(finite[:, None], x, 0.0)
        scales[chunk] = _choose_scales(x, rule, _MAX_EXPONENT[w.dtype]).masked_fill_(~finite, E8M0_NAN)
    return scales.view(*lead.shape[:-1], lead.shape[-1] // BLOCK_SIZE).movedim(-1, axis).contiguous()


def _choose_scales(x: torch.Tensor, rule: ScaleRule, max_exponent: int) -> torch.Tensor:
    """Scale bytes, uint8 [N], of finite float32 blocks [N, 32]."""
    magnitude_bits = x.abs().amax(-1).view(torch.int32)
    exponent = ((magnitude_bits + scale_bump(rule)) >> FLOAT32_MANTISSA_BITS) - E8M0_BIAS - E2M1_MAX_EXPONENT
    exponent = exponent.clamp(MIN_SCALE_EXPONENT, max_exponent)
    if rule is ScaleRule.MSE:
        finer = prefers_finer_scale(x.abs() / scale_values(exponent + E8M0_BIAS)[:, None])
        exponent = (exponent - finer.to(torch.int32)).clamp(min=MIN_SCALE_EXPONENT)
    return (exponent + E8M0_BIAS).to(torch.uint8)


def scale_bump(rule: ScaleRule) -> int:
    """What a rule adds to the float32 bits of a block maximum before the exponent is read (see `MANTISSA_BUMP`)."""
    quarters, offset = MANTISSA_BUMP[rule]
    return (quarters << (FLOAT32_MANTISSA_BITS - 2)) + offset


def prefers_finer_scale(units: torch.Tensor) -> torch.Tensor:
    """Whether half of rceil's scale has strictly less squared error.

    With u = |w| / 2^r the two grids differ in two places only, and there the difference of the squared errors is
    piecewise linear in u:

        u < 1    the fine grid has the steps 0.25 and the coarse one 0.5. They are equally good near multiples of 0.5,
                 and fine is better around 1/4 and 3/4, by 0.5 * max(0, 1/8 - | |u - 1/2| - 1/4 |)
        u > 3.5  the fine grid stops at 3: it is worse by 2 (u - 3.5) up to u = 5, and by more beyond

    All 32 wins together are at most 2, and a single u of 5 loses 3, so "more beyond 5" can never change the sign and
    is left out. u is rounded to multiples of 2^-13 first (to nearest, ties to even): then every term is a multiple of
    2^-14 and every partial sum fits 24 bits, so the sum is exact, whatever the order in which a machine adds.

    Args:
        units: float32 [N, 32], magnitudes in units of the coarse scale.

    Returns:
        bool [N]. A tie keeps the coarse scale.
    """
    u = (units * 2.0**13).round() * 2.0**-13
    wins = (0.125 - ((u - 0.5).abs() - 0.25).abs()).clamp(min=0).sum(-1)
    losses = (u - 3.5).clamp(min=0).sum(-1)
    return wins > 4 * losses


def encode(x: torch.Tensor) -> torch.Tensor:
    """E2M1 codes (uint8, not packed) of float32 values in units of their scale: nearest, ties to even, saturating."""
    magnitude = x.abs()
    midpoints = torch.tensor([mid for mid, _ in E2M1_ROUND_UP_FROM], dtype=torch.float32, device=x.device)
    rounds_up = torch.tensor([up for _, up in E2M1_ROUND_UP_FROM], device=x.device)
    # bucketize counts the boundaries strictly below a magnitude; one float lower, a midpoint counts for itself.
    boundaries = torch.where(rounds_up, torch.nextafter(midpoints, torch.zeros_like(midpoints)), midpoints)
    codes = torch.bucketize(magnitude.contiguous(), boundaries, out_int32=True).to(torch.uint8)
    return codes | (torch.signbit(x).to(torch.uint8) << 3)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """float32 values of unpacked E2M1 codes (uint8, 0 to 15), of the same shape."""
    values = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=codes.device)
    return values[codes.to(torch.int32)]


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Two codes per byte along the last dimension, even element in the low nibble: uint8 [..., n] -> [..., n / 2]."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack`: uint8 [..., n / 2] -> [..., n]."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def scale_values(scales: torch.Tensor) -> torch.Tensor:
    """float32 2^(b - 127) of E8M0 bytes of any integer dtype; 255 becomes NaN. Built from bits, so 2^-127 is exact."""
    bits = scales.view(torch.uint8) if scales.element_size() == 1 else scales
    bits = bits.to(torch.int32)
    subnormal = 1 << (FLOAT32_MANTISSA_BITS - 1)
    values = torch.where(bits == 0, subnormal, bits << FLOAT32_MANTISSA_BITS).to(torch.int32).view(torch.float32)
    return torch.where(bits == E8M0_NAN, torch.nan, values)


def round_to_scales(w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The nearest MXFP4 value of each float32 weight when its block's scale is already chosen.

    Args:
        w: float32, any shape.
        scale: float32 powers of two (`scale_values` of the bytes), of a shape that broadcasts to w's.

    Returns:
        float32, the shape of w.
    """
    return decode(encode(w / scale)) * scale


def check_blocks(w: torch.Tensor, axis: int) -> int:
    """The non-negative axis; raises ValueError where `w` cannot be cut into blocks of 32 along it."""
    if w.dtype not in _MAX_EXPONENT:
        raise ValueError(f"weights of dtype {w.dtype} cannot be quantized; expected float32, bfloat16 or float16")
    if not -w.ndim <= axis < w.ndim:
        raise ValueError(f"axis {axis} does not exist in a tensor of shape {list(w.shape)}")
    axis %= w.ndim
    if w.shape[axis] % BLOCK_SIZE:
        raise ValueError(
            f"dimension {axis} of shape {list(w.shape)} has {w.shape[axis]} values; "
            f"expected a multiple of the block size {BLOCK_SIZE}"
        )
    return axis


def _check_codes(codes: torch.Tensor, scales: torch.Tensor, axis: int) -> int:
    if codes.dtype is not torch.uint8 or scales.dtype not in (torch.uint8, torch.float8_e8m0fnu):
        raise ValueError(f"codes {codes.dtype} and scales {scales.dtype}; expected uint8 bytes for both")
    if not -codes.ndim <= axis < codes.ndim:
        raise ValueError(f"axis {axis} does not exist in codes of shape {list(codes.shape)}")
    axis %= codes.ndim
    expected = list(codes.shape)
    expected[axis] = expected[axis] * 2 // BLOCK_SIZE
    if codes.shape[axis] * 2 % BLOCK_SIZE or list(scales.shape) != expected:
        raise ValueError(
            f"codes of shape {list(codes.shape)} with scales of shape {list(scales.shape)}: "
            f"expected one scale per {BLOCK_SIZE // 2} bytes of codes along dimension {axis}"
        )
    return axis


def refuse_non_finite(w: torch.Tensor) -> None:
    """Raises ValueError naming the first non-finite element of `w`, which must have one."""
    index = tuple(torch.nonzero(~torch.isfinite(w.detach()))[0].tolist())
    raise ValueError(
        f"{float(w[index])} at index {list(index)} of a tensor of shape {list(w.shape)}: "
        "only finite weights can be rounded to MXFP4"
    )
