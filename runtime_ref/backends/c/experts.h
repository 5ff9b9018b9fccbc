/* Packed experts without bf16 dot products: codes are decoded in registers, block by block, as the file has them; included by ops.c.

   Rejected: decoded copies in memory (four to eight times the bytes of a step that waits for bytes). */

static float powers[256]; /* of each scale byte; set by prepare() */

/* Call once before anything else. */
void prepare(void) {
    for (uint32_t byte = 0; byte < 256; byte++) {
        const uint32_t bits = byte == 0 ? 0x400000u : byte == 255 ? 0x7fc00000u : byte << 23;
        memcpy(&powers[byte], &bits, sizeof bits);
    }
}

/* The 32 weights of a block before their scale, in registers; `place(i)` is where weight i is. A sum over a block is one chain in
   each lane, times the scale, and blocks are added in their order. */
#define PARTS (32 / NL)
#if defined(__AVX512F__) /* even positions, odd positions: a look-up minds the last four bits of an index only */
static const vf E2M1 = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
INLINE int place(int i) { return i % 2 * L + i / 2; }
INLINE void decode(const uint8_t *codes, nf *out) {
    const vi wide = (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)codes));
    out[0] = __builtin_shuffle(E2M1, wide);
    out[1] = __builtin_shuffle(E2M1, wide >> 4);
}
#elif defined(__AVX2__) /* even positions in the lower half of each register, odd ones in the upper; values are looked up as bf16 */
#define UPPER 0x00, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40, -0x80, -0x41, -0x41, -0x41, -0x40, -0x40, -0x40, -0x40
#define LOWER 0x00, 0x00, -0x80, -0x40, 0x00, 0x40, -0x80, -0x40, 0x00, 0x00, -0x80, -0x40, 0x00, 0x40, -0x80, -0x40
INLINE int place(int i) { return i / 8 * 8 + i % 2 * 4 + i % 8 / 2; }
INLINE void decode(const uint8_t *codes, nf *out) {
    const __m128i pairs = _mm_loadu_si128((const void *)codes);
    const __m256i index = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(pairs, 4), pairs), _mm256_set1_epi8(15));
    const __m256i upper = _mm256_shuffle_epi8(_mm256_setr_epi8(UPPER, UPPER), index);
    const __m256i lower = _mm256_shuffle_epi8(_mm256_setr_epi8(LOWER, LOWER), index), zero = _mm256_setzero_si256();
    const __m256i first = _mm256_unpacklo_epi8(lower, upper), second = _mm256_unpackhi_epi8(lower, upper);
    out[0] = (nf)_mm256_unpacklo_epi16(zero, first), out[1] = (nf)_mm256_unpackhi_epi16(zero, first);
    out[2] = (nf)_mm256_unpacklo_epi16(zero, second), out[3] = (nf)_mm256_unpackhi_epi16(zero, second);
}
#else /* even positions, odd positions; values are looked up as bf16, by the instruction that SSSE3 and NEON have for 16 bytes */
static const vb UPPER = {0x00, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40, 0x80, 0xbf, 0xbf, 0xbf, 0xc0, 0xc0, 0xc0, 0xc0};
static const vb LOWER = {0x00, 0x00, 0x80, 0xc0, 0x00, 0x40, 0x80, 0xc0, 0x00, 0x00, 0x80, 0xc0, 0x00, 0x40, 0x80, 0xc0};
#define SIDES(a, b) __builtin_shuffle(a, b, (vb){0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}), \
                    __builtin_shuffle(a, b, (vb){8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31})
#define FLOATS(a) __builtin_shuffle(zero, a, (vb){0, 0, 16, 17, 0, 0, 18, 19, 0, 0, 20, 21, 0, 0, 22, 23}), \
                  __builtin_shuffle(zero, a, (vb){0, 0, 24, 25, 0, 0, 26, 27, 0, 0, 28, 29, 0, 0, 30, 31})
INLINE int place(int i) { return i % 2 * L + i / 2; }
INLINE void decode(const uint8_t *codes, nf *out) {
    const vb zero = {};
    vb pairs;
    memcpy(&pairs, codes, sizeof pairs);
    for (int odd = 0; odd < 2; odd++) {
        const vb index = odd ? pairs >> 4 : pairs & 15;
        const vb halves[2] = {SIDES(__builtin_shuffle(LOWER, index), __builtin_shuffle(UPPER, index))};
        const vb floats[4] = {FLOATS(halves[0]), FLOATS(halves[1])};
        memcpy(out + 4 * odd, floats, sizeof floats);
    }
}
#endif

/* Weights [n, k] as the products see them: what the contract of bit-exact decoding is tested on. */
void decode_rows(const Packed *w, int64_t n, int64_t k, float *out) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t b = 0; b < k / 32; b++) {
            nf part[PARTS];
            decode(w->codes + i * w->code_stride + b * L, part);
            for (int j = 0; j < 32; j++)
                out[i * k + b * 32 + j] = part[place(j) / NL][place(j) % NL] * powers[w->scales[i * w->scale_stride + b]];
        }
}

/* x [n], each block in the places of its weights. */
static void as_decoded(const float *x, float *out, int64_t n) {
    for (int64_t b = 0; b < n; b += 32)
        for (int i = 0; i < 32; i++) out[b + place(i)] = x[b + i];
}

/* out[r][0 .. n - 1] gets, or is added, the products of rows of blocks `from` .. `from` + `blocks` with R vectors that `as_decoded` ordered. */
INLINE void packed_rows(const int R, const Packed *w, int64_t n, int64_t from, int64_t blocks, const float *const *pairs,
                        float *const *out, int add) {
    for (int64_t i = 0; i < n; i += L) {
        nf acc[8][L];
        for (int j = 0; j < L; j++) {
            const uint8_t *codes = w->codes + (i + j) * w->code_stride + from * L;
            const uint8_t *scales = w->scales + (i + j) * w->scale_stride + from;
            nf sum[8];
            for (int r = 0; r < R; r++) sum[r] = (nf){};
            for (int64_t b = 0; b < blocks; b++) {
                nf part[PARTS];
                decode(codes + b * L, part);
                for (int r = 0; r < R; r++) {
                    const float *own = pairs[r] + b * 32;
                    nf block = part[0] * load_some(own);
                    for (int c = 1; c < PARTS; c++) block = block + part[c] * load_some(own + c * NL);
                    sum[r] = sum[r] + block * powers[scales[b]];
                }
            }
            for (int r = 0; r < R; r++) acc[r][j] = sum[r];
        }
        for (int r = 0; r < R; r++) {
            const vf sums = reduce16(acc[r]);
            store(out[r] + i, add ? load(out[r] + i) + sums : sums);
        }
    }
}
static void packed_product(int64_t R, const Packed *w, int64_t n, int64_t from, int64_t blocks, const float *const *pairs,
                           float *const *out, int add) {
    switch (R) {
    case 1: packed_rows(1, w, n, from, blocks, pairs, out, add); break;
    case 2: packed_rows(2, w, n, from, blocks, pairs, out, add); break;
    case 3: packed_rows(3, w, n, from, blocks, pairs, out, add); break;
    case 4: packed_rows(4, w, n, from, blocks, pairs, out, add); break;
    case 5: packed_rows(5, w, n, from, blocks, pairs, out, add); break;
    case 6: packed_rows(6, w, n, from, blocks, pairs, out, add); break;
    case 7: packed_rows(7, w, n, from, blocks, pairs, out, add); break;
    default: packed_rows(8, w, n, from, blocks, pairs, out, add);
    }
}

/* The chosen experts in ascending order; rows of an expert eight at a time. */
static void experts(Step *s, const Layer *l) {
#ifdef DOTS
    if (s->dots) { dot_experts(s, l); return; }
#endif
    const int64_t H = s->H, I = l->inner, width = l->width, room = width + 64;
    float *x_pairs = s->inner, *gate = x_pairs + 8 * H, *up = gate + 8 * I, *mid = up + 8 * I, *share = mid + 8 * room;
    memset(s->partial, 0, sizeof(float) * l->mlp_parts * s->R * H);
    for (int64_t e = 0; e < l->count; e++) {
        const Expert *w = l->experts + e;
        const int64_t n = places_of(s, l, e);
        for (int64_t begin = 0; begin < n; begin += 8) {
            const int64_t R = n - begin < 8 ? n - begin : 8;
            const float *pairs[8], *mids[8];
            float *gates[8], *ups[8], *outs[8];
            for (int64_t r = 0; r < R; r++) {
                as_decoded(s->y + s->list[begin + r] / l->top * H, x_pairs + r * H, H);
                round_all(s, x_pairs + r * H, x_pairs + r * H, H);
                pairs[r] = x_pairs + r * H, gates[r] = gate + r * I, ups[r] = up + r * I;
            }
            packed_product(R, &w->gate, I, 0, H / 32, pairs, gates, 0);
            packed_product(R, &w->up, I, 0, H / 32, pairs, ups, 0);
            for (int64_t r = 0; r < R; r++) {
                weighted_swiglu(gates[r], ups[r], s->weight[s->list[begin + r]], I);
                round_all(s, gates[r], gates[r], I);
            }
            for (int64_t p = 0; p < l->mlp_parts; p++) {
                const int64_t at = l->column + p * width, first = at / 32, blocks = (at + width + 31) / 32 - first;
                for (int64_t r = 0; r < R; r++) { /* whole blocks, with zeros for the neighbours' columns */
                    memset(share, 0, sizeof(float) * room);
                    memcpy(share + at % 32, gates[r] + p * width, sizeof(float) * width);
                    as_decoded(share, mid + r * room, 32 * blocks);
                    mids[r] = mid + r * room;
                    outs[r] = s->partial + (p * s->R + s->list[begin + r] / l->top) * H;
                }
                packed_product(R, &w->down, H, first, blocks, mids, outs, 1);
            }
        }
    }
}
