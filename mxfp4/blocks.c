/* Blocks of 32 weights and their MXFP4 values, in the bits of mxfp4/codec.py, for the range of numbers that trained weights have.

   Each function goes through `blocks` blocks and returns how many it did: fewer where the next block is not for it. Loops over a
   block have a fixed length and no calls, so that the compiler makes vectors of them; every sum is exact, in any order. */

#include <stdint.h>
#include <string.h>

enum { BLOCK = 32, LANES = 16 };
#define EXPONENT 0x7f800000u
#define ONE (1u << 23)
/* Block maxima between which no intermediate overflows and no scale is subnormal. */
#define SAFE_MIN ((127u - 100) << 23)
#define SAFE_END ((127u + 100) << 23)

static inline float as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t as_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

static inline uint32_t widen_float(float x) { return as_bits(x); }
static inline uint32_t widen_bf16(uint16_t x) { return (uint32_t)x << 16; }
static inline float narrow_float(uint32_t bits) { return as_float(bits); }
static inline uint16_t narrow_bf16(uint32_t bits) { return bits >> 16; } /* exact: the values have two bits of mantissa */

/* Whether half of the scale has less squared error: codec.prefers_finer_scale, in multiples of the scale, as one sum. */
static inline uint32_t prefers_finer(const float *a, uint32_t scale)
{
    float unit = as_float(scale), coarse = unit * (1.5f * 1024), sums[LANES] = {0};
    for (int part = 0; part < BLOCK; part += LANES)
        for (int i = 0; i < LANES; i++) {
            float x = (a[part + i] + coarse) - coarse; /* to multiples of 2^-13 units */
            float large = x > unit * 3.5f ? x : unit * 3.5f;
            float near = __builtin_fabsf(__builtin_fabsf(x - unit * 0.5f) - unit * 0.25f);
            sums[i] += 4 * large + (near < unit * 0.125f ? near : unit * 0.125f);
        }
    float sum = 0;
    for (int i = 0; i < LANES; i++)
        sum += sums[i];
    return sum < unit * (BLOCK * (0.125f + 4 * 3.5f));
}

/* Rounds blocks. `bump`: codec.scale_bump of the rule; `finer`: the rule chooses between two scales; `saturates`: its scales can
   be too small for the maximum. `out` may be `w`. */
#define ROUND(NAME, IN, WIDEN, OUT, NARROW) \
int64_t NAME(const IN *w, OUT *out, int64_t blocks, uint32_t bump, int finer, int saturates) \
{ \
    for (int64_t block = 0; block < blocks; block++, w += BLOCK, out += BLOCK) { \
        uint32_t bits[BLOCK], top = 0; \
        float a[BLOCK]; \
        for (int i = 0; i < BLOCK; i++) \
            bits[i] = WIDEN(w[i]); \
        for (int i = 0; i < BLOCK; i++) { \
            uint32_t magnitude = bits[i] & ~(1u << 31); \
            top = magnitude > top ? magnitude : top; \
            a[i] = as_float(magnitude); \
        } \
        if (top >= SAFE_END || (top && top < SAFE_MIN)) \
            return block; \
        uint32_t scale = top ? ((top + bump) & EXPONENT) - 2 * ONE : 0; \
        if (finer && top) \
            scale -= prefers_finer(a, scale) * ONE; \
        float most = saturates && top ? as_float(scale + 2 * ONE + ONE / 2) : as_float(SAFE_END); \
        for (int i = 0; i < BLOCK; i++) { \
            float x = a[i] < most ? a[i] : most; \
            uint32_t own = as_bits(x) & EXPONENT; \
            float step = as_float(own > scale ? own : scale) * (1.5f * (1 << 22)); /* its last place is half a step of the grid */ \
            out[i] = NARROW(as_bits((x + step) - step) | (bits[i] & 1u << 31)); \
        } \
    } \
    return blocks; \
}

ROUND(round_float_float, float, widen_float, float, narrow_float)
ROUND(round_float_bf16, float, widen_float, uint16_t, narrow_bf16)
ROUND(round_bf16_bf16, uint16_t, widen_bf16, uint16_t, narrow_bf16)
ROUND(round_bf16_float, uint16_t, widen_bf16, float, narrow_float)

/* Codes and scales of bf16 values on the grid. Twice the exponent over half a unit, and the first bit of the mantissa, are the code:
   0 for half a unit (whose code is 1), 1 for what is not on the grid, 2 to 7 for themselves. */
int64_t pack_bf16(const uint16_t *w, uint8_t *codes, uint8_t *scales, int64_t blocks)
{
    for (int64_t block = 0; block < blocks; block++, w += BLOCK, codes += BLOCK / 2) {
        uint16_t top = 0, off = 0, found[BLOCK];
        for (int i = 0; i < BLOCK; i++) {
            uint16_t magnitude = w[i] & 0x7fff;
            top = magnitude > top ? magnitude : top;
        }
        int exponent = top >> 7;
        if (exponent >= 255 || (top && exponent < 9))
            return block;
        uint16_t half = top ? 2 * (exponent - 3) : 0;
        for (int i = 0; i < BLOCK; i++) {
            uint16_t magnitude = w[i] & 0x7fff, sign = w[i] >> 15 << 3, code = (magnitude >> 6) - half;
            off |= magnitude ? (magnitude & 0x3f) | (code > 7) | (code == 1) : 0;
            found[i] = magnitude ? sign | (code ? code : 1) : sign;
        }
        if (off)
            return block;
        for (int i = 0; i < BLOCK / 2; i++) {
            uint32_t pair; /* the even element in its lower half: little-endian machines, as safetensors' files */
            memcpy(&pair, found + 2 * i, 4);
            codes[i] = (pair | pair >> 12) & 0xff;
        }
        scales[block] = top ? exponent - 2 : 0;
    }
    return blocks;
}

/* The bf16 values of a block; scale bytes from 2 to 252, for which all of them are normal. */
static inline void values_of(const uint8_t *codes, uint8_t scale, uint16_t *out)
{
    uint16_t base = (scale - 1) << 7;
    for (int i = 0; i < BLOCK / 2; i++)
        for (int high = 0; high < 2; high++) {
            uint16_t code = codes[i] >> 4 * high, magnitude = code & 7;
            uint16_t value = base + ((magnitude - (magnitude == 1)) << 6);
            out[2 * i + high] = (code & 8) << 12 | (magnitude ? value : 0);
        }
}

int64_t unpack_bf16(const uint8_t *codes, const uint8_t *scales, uint16_t *out, int64_t blocks)
{
    for (int64_t block = 0; block < blocks; block++, codes += BLOCK / 2, out += BLOCK) {
        if (scales[block] < 2 || scales[block] > 252)
            return block;
        values_of(codes, scales[block], out);
    }
    return blocks;
}

/* Stops at a block that decodes to something else than `expected`, too. */
int64_t compare_bf16(const uint8_t *codes, const uint8_t *scales, const uint16_t *expected, int64_t blocks)
{
    uint16_t values[BLOCK];
    for (int64_t block = 0; block < blocks; block++, codes += BLOCK / 2, expected += BLOCK) {
        if (scales[block] < 2 || scales[block] > 252)
            return block;
        values_of(codes, scales[block], values);
        if (memcmp(values, expected, sizeof values))
            return block;
    }
    return blocks;
}
