"""The MXFP4 number format in one page, without torch.

A block is 32 consecutive values along the reduction dimension. It is stored as one E8M0 byte b, the scale 2^(b - 127),
and 32 E2M1 codes of 4 bits: one sign bit, two exponent bits, one mantissa bit. 4.25 bits per value. A value is
`E2M1_VALUES[code] * 2^(b - 127)`; the byte 255 means NaN and makes the whole block NaN (OCP Microscaling Formats v1.0,
sections 5.3, 5.4.1 and 6.3).

What the specification leaves open, and what this package does:

- Scale rule. The file does not say how a scale was chosen, so any rule is legal as long as training and export agree.
  For a block whose largest magnitude is a = m * 2^k, 1 <= m < 2, the exponent s is

      floor   k - 2                       the specification's suggestion; magnitudes above 6 * 2^s saturate (m > 1.5)
      rceil   k - 2, or k - 1 if m > 1.5  the least s with a <= 6 * 2^s: nothing ever saturates
      even    k - 2, or k - 1 if m >= 1.75  the default: bumps only where a rounds to 8 rather than to 6, so a block's
                                          maximum always becomes 4 or 6 units, and nothing is cut by more than rounding
      mse     r or r - 1, r being rceil's exponent: whichever has the smaller squared error. r saturates nothing and
              r - 1 has every step halved but cuts the top. r + 1 is not a candidate (its grid below 6 * 2^r is a subset
              of r's), and neither is r - 2 (it would cut the maximum by half or more). A tie takes r.

- Range. The exponent is clamped to [-127, 125]. The bytes 253 and 254 can be decoded, but 4 * 2^126 is already beyond
  the largest float32 or bfloat16, so a quantizer that wrote them would turn finite weights into infinities. With 125
  the largest magnitudes saturate at 6 * 2^125 = 2.55e38 instead (float16: at most 2^13, where 6 * 2^13 = 49152 is the
  largest). An all-zero block gets the byte 0.
- Rounding. To nearest, ties to the even code, then saturation at 6.
- Negative zero is a value of E2M1 (code 8) and the sign is kept: -0.0 and every negative value that rounds to zero
  become code 8 and decode to -0.0. This is what hardware conversions do, and it makes Q(-w) = -Q(w) hold bit for bit.
- Nibbles. Two codes per byte, the even element in the low nibble, as in every known consumer of packed MXFP4.

Rejected: the `ceil` rule (k - 2, or k - 1 if m > 1), which wastes half of the grid: 1.7 dB worse than `even` on
Gaussian weights.
"""

from enum import StrEnum

BLOCK_SIZE = 32

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Value of each 4-bit code: sign in bit 3, exponent in bits 2 and 1 (bias 1), mantissa in bit 0."""

E2M1_MAX = 6.0
E2M1_MAX_EXPONENT = 2
"""Exponent of the largest E2M1 binade: 4 and 6 are 1.0 * 2^2 and 1.5 * 2^2."""

E2M1_ROUND_UP_FROM = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))
"""Midpoints between neighbouring magnitudes, and whether the midpoint itself rounds up (to the even code)."""

E8M0_BIAS = 127
E8M0_NAN = 255
MIN_SCALE_EXPONENT = -127
MAX_SCALE_EXPONENT = 125


class ScaleRule(StrEnum):
    """How the power-of-two scale of a block is chosen. A plain string ("even") is accepted wherever a rule is."""

    FLOOR = "floor"
    RCEIL = "rceil"
    EVEN = "even"
    MSE = "mse"

    @classmethod
    def _missing_(cls, value: object) -> "ScaleRule":
        raise ValueError(f"scale_rule {value!r} is not known; expected one of {', '.join(rule.value for rule in cls)}")


MANTISSA_BUMP = {ScaleRule.FLOOR: (0, 0), ScaleRule.EVEN: (1, 0), ScaleRule.RCEIL: (2, -1), ScaleRule.MSE: (2, -1)}
"""Each rule as one integer addition. With M mantissa bits, adding `n * 2^(M - 2) + d`, (n, d) from this table, to the
bits of the block maximum carries into the exponent exactly where the rule bumps the exponent: at m >= 1.75 for
(1, 0) and at m > 1.5 for (2, -1). `mse` starts from rceil's exponent."""
