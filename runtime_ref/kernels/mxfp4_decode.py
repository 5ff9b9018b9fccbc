"""Packed words and scales -> weights, inside a kernel. Reference: `mxfp4.dequantize` on the codes before `repack`.

`decode_tile` exists twice, chosen at compile time. With PTX, a word of eight codes takes four masks, five shifts, two
merges and four products of two bf16 each: 1.9 instructions per weight. Without, the same bits are moved with integer operations
and the value is built in float32; this runs in Triton's interpreter, which knows no inline assembly, drops bf16 subnormals
and multiplies bf16 matrices wrongly, and on GPUs without PTX. Both are exact, so they agree bit for bit
(`ptx_emulator` runs the assembly on a CPU).

The bit layout is explained in `repack`.
"""

import triton
import triton.language as tl

# $0 $1: lower half of K, $2 $3: upper half; $4: the word; $5 $6 and $7 $8: the scales of either (all four lanes alike).
DECODE_PTX = """
{
.reg .b32 a, b;
and.b32 a, $4, 0x81C081C0;
mul.rn.bf16x2 $0, a, $5;
shl.b32 a, $4, 3;
and.b32 a, a, 0x81C081C0;
mul.rn.bf16x2 $1, a, $6;
shl.b32 a, $4, 6;
and.b32 a, a, 0x81C081C0;
mul.rn.bf16x2 $2, a, $7;
shl.b32 a, $4, 1;
and.b32 a, a, 0x80008000;
shr.b32 b, $4, 5;
and.b32 b, b, 0x01000100;
or.b32 a, a, b;
shr.b32 b, $4, 4;
and.b32 b, b, 0x00C000C0;
or.b32 a, a, b;
mul.rn.bf16x2 $3, a, $8;
}
"""
_PTX = tl.constexpr(DECODE_PTX)


@triton.jit
def scale_tiles(scales, ROWS: tl.constexpr, DEPTH: tl.constexpr, PTX: tl.constexpr):
    """A page's scales (a pointer to the first), both halves of K, each spread over [ROWS, DEPTH / 2].

    bf16 2^(b - 1) with PTX, else float32 of the same value.
    """
    BLOCKS: tl.constexpr = DEPTH // 64
    at = scales + tl.arange(0, ROWS)[:, None] * BLOCKS + tl.arange(0, BLOCKS)[None, :]
    lower = tl.load(at)
    upper = tl.load(at + ROWS * BLOCKS)
    if PTX:
        lower = (lower.to(tl.uint16) << 7).to(tl.bfloat16, bitcast=True)
        upper = (upper.to(tl.uint16) << 7).to(tl.bfloat16, bitcast=True)
    else:
        lower = (lower.to(tl.uint32) << 23).to(tl.float32, bitcast=True)
        upper = (upper.to(tl.uint32) << 23).to(tl.float32, bitcast=True)
    return (tl.broadcast_to(lower[:, :, None], (ROWS, BLOCKS, 32)).reshape(ROWS, DEPTH // 2),
            tl.broadcast_to(upper[:, :, None], (ROWS, BLOCKS, 32)).reshape(ROWS, DEPTH // 2))


@triton.jit
def _unit(half, PAIR: tl.constexpr):
    """float32 E2M1 value times 2^-126 of one pair's code in a 16-bit half word (uint32, any shape)."""
    if PAIR == 0:
        bits = ((half & 0x8000) << 16) | ((half & 0x01C0) << 16)
    elif PAIR == 1:
        bits = ((half & 0x1000) << 19) | ((half & 0x0038) << 19)
    elif PAIR == 2:
        bits = ((half & 0x0200) << 22) | ((half & 0x0007) << 22)
    else:
        bits = ((half & 0x4000) << 17) | ((half & 0x2000) << 11) | ((half & 0x0C00) << 12)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def decode_tile(codes, lower_scale, upper_scale, ROWS: tl.constexpr, DEPTH: tl.constexpr, PTX: tl.constexpr):
    """Weights of both halves of K, each [ROWS, DEPTH / 2]: bfloat16 with PTX, else float32.

    codes is uint8 [ROWS, DEPTH / 2] of a page, the scales come from `scale_tiles`.
    """
    if PTX:
        lower, upper = tl.inline_asm_elementwise(_PTX, "=r,=r,=r,=r,r,r,r,r,r", [codes, lower_scale, upper_scale],
                                                 dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4)
    else:
        quads = codes.reshape(ROWS, DEPTH // 8, 4).to(tl.uint32)
        lane = tl.arange(0, 4)[None, None, :]
        word = tl.sum(quads << (8 * lane).to(tl.uint32), 2)[:, :, None]
        half = (word >> (16 * (lane % 2)).to(tl.uint32)) & 0xFFFF
        first = lane < 2
        lower = tl.where(first, _unit(half, 0), _unit(half, 1)).reshape(ROWS, DEPTH // 2) * lower_scale
        upper = tl.where(first, _unit(half, 2), _unit(half, 3)).reshape(ROWS, DEPTH // 2) * upper_scale
    return lower, upper


@triton.jit
def narrow(value, dtype: tl.constexpr, FLOAT_DOT: tl.constexpr):
    """float32 -> dtype, nearest even. The interpreter would cut bf16 off, so the bits are rounded by hand there."""
    if FLOAT_DOT and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def decode_kernel(pages, lower_out, upper_out, ROWS: tl.constexpr, DEPTH: tl.constexpr, PTX: tl.constexpr):
    """Decodes page p into rows p of lower_out and upper_out [pages, ROWS, DEPTH / 2], float32: the proof of C3."""
    CODE_BYTES: tl.constexpr = ROWS * DEPTH // 2
    p = tl.program_id(0)
    page = pages + p * (CODE_BYTES + ROWS * DEPTH // 32)
    at = tl.arange(0, ROWS)[:, None] * (DEPTH // 2) + tl.arange(0, DEPTH // 2)[None, :]
    lower_scale, upper_scale = scale_tiles(page + CODE_BYTES, ROWS, DEPTH, PTX)
    lower, upper = decode_tile(tl.load(page + at), lower_scale, upper_scale, ROWS, DEPTH, PTX)
    tl.store(lower_out + p * CODE_BYTES + at, lower.to(tl.float32))
    tl.store(upper_out + p * CODE_BYTES + at, upper.to(tl.float32))
