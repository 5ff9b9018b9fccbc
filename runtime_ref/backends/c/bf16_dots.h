/* The products of a step on bf16 dot products (AVX512-BF16), for an engine in bf16; included by ops.c.

   One instruction multiplies 32 pairs of bf16 and adds them to 16 float32 sums: twice what float32 does. It needs both sides in
   bf16, so activations are rounded where they enter a product, as in every bf16 engine whose matrix products take bf16 (sums,
   norms, softmax and the stream between ops stay as in ops.c). Used for one row as for eight, so that bits do not depend on
   the number of rows: an output element is one chain over the pairs of K in their order (for packed experts one chain per block
   of 32, times its scale, the blocks added in order; for attention over pairs of positions counted from the text's beginning,
   hidden ones adding exact zeros).

   Everything is laid out in pairs along the sum: matrices [n / 16][k / 2][16][2], keys [page][d / 2][64][2], values
   [page][32][v][2], experts' codes [n / 16][k / 8][16][2] words, each with the codes of k, k + 2, k + 4 and k + 6, so that a word
   shifted is an index of the look-up as it is, and scales [n / 16][k / 32][16]. E2M1 is exact in bf16; scales are applied to sums.

   Rejected: bytes for the target's activations too (they would decide tokens); experts decoded to bf16 in memory (four times the
   bytes of a step that, for one row, waits for bytes). */

typedef uint16_t half;

/* x [n] float32 -> bf16; n is a multiple of 16. */
INLINE void to_half(const float *x, half *out, int64_t n) {
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
        _mm512_storeu_si512(out + i, (__m512i)_mm512_cvtne2ps_pbh((__m512)load(x + i + 16), (__m512)load(x + i)));
    if (i < n) _mm256_storeu_si256((void *)(out + i), (__m256i)_mm512_cvtneps_pbh((__m512)load(x + i)));
}

INLINE __m512i whole(const void *from) { return _mm512_loadu_si512(from); }
/* For the next tile, which may be of the next matrix (they lie in the order of their use): several rows leave time to fetch it. */
INLINE void soon(const void *from) { __builtin_prefetch(from, 0, 2); }
INLINE __m512i both(const half *pair) { int32_t v; memcpy(&v, pair, sizeof v); return _mm512_set1_epi32(v); }
INLINE vf dot(vf sum, __m512i a, __m512i b) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }

INLINE void dot_tile(const int R, const int N, const Mat *m, const half *x, float *out, int64_t os, int64_t p) {
    vf acc[8][8];
    for (int r = 0; r < R; r++) for (int n = 0; n < N; n++) acc[r][n] = splat(0);
    const int64_t K = m->k;
    const half *w = (const half *)m->data + p * K * L;
    for (int64_t k = 0; k < K; k += 2) {
        __m512i part[8];
        for (int n = 0; n < N; n++) part[n] = whole(w + n * K * L + k * L);
        if (R > 1) for (int n = 0; n < N; n++) soon(w + (N + n) * K * L + k * L);
        for (int r = 0; r < R; r++) {
            const __m512i a = both(x + r * K + k);
            for (int n = 0; n < N; n++) acc[r][n] = dot(acc[r][n], part[n], a);
        }
    }
    for (int r = 0; r < R; r++) for (int n = 0; n < N; n++) store(out + r * os + (p + n) * L, acc[r][n]);
}

#define DOT_TILES(R, N) do { for (; p + N <= P; p += N) dot_tile(R, N, m, s->halves, out, os, p); \
                        for (; p < P; p++) dot_tile(R, 1, m, s->halves, out, os, p); } while (0)
static void dot_product(const Step *s, const Mat *m, const float *x, int64_t xs, float *out, int64_t os, int64_t R) {
    const int64_t P = m->n / L;
    for (int64_t left = R; left > 0; left -= 8, x += 8 * xs, out += 8 * os) {
        const int64_t rows = left < 8 ? left : 8;
        int64_t p = 0;
        for (int64_t r = 0; r < rows; r++) to_half(x + r * xs, s->halves + r * m->k, m->k);
        switch (rows) {
        case 1: DOT_TILES(1, 8); break; case 2: DOT_TILES(2, 4); break; case 3: DOT_TILES(3, 4); break; case 4: DOT_TILES(4, 4); break;
        case 5: DOT_TILES(5, 4); break; case 6: DOT_TILES(6, 4); break; case 7: DOT_TILES(7, 3); break; default: DOT_TILES(8, 3);
        }
    }
}

/* x [n] -> bytes 128 + round(x / scale), scale = the largest magnitude / 127, which is returned (NaN if an x is not finite). */
static float to_bytes(const float *x, uint8_t *out, int64_t n) {
    vf most = splat(0), nothing = splat(0);
    for (int64_t i = 0; i < n; i += L) {
        const vf own = load(x + i);
        most = (vf)_mm512_max_ps((__m512)most, _mm512_abs_ps((__m512)own));
        nothing = nothing + own * 0.0f;
    }
    const float top = _mm512_reduce_max_ps((__m512)most), times = top > 0 ? 127.0f / top : 0;
    for (int64_t i = 0; i < n; i += L) {
        const vi whole_number = (vi)_mm512_cvtps_epi32((__m512)(load(x + i) * times)) + 128;
        _mm_storeu_si128((void *)(out + i), _mm512_cvtepi32_epi8((__m512i)whole_number));
    }
    return top / 127.0f + lanes(nothing);
}

/* Not the intrinsic: GCC 12 copies every sum of it back and forth. */
INLINE __m512i byte_dot(__m512i sum, __m512i x, __m512i w) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
    return sum;
}

INLINE void byte_tile(const int R, const int N, const Mat *m, const uint8_t *x, const float *scale, float *out, int64_t os, int64_t p) {
    __m512i acc[8][8];
    for (int r = 0; r < R; r++) for (int n = 0; n < N; n++) acc[r][n] = _mm512_setzero_si512();
    const int64_t K = m->k;
    const int8_t *w = (const int8_t *)m->data + p * K * L;
    for (int64_t k = 0; k < K; k += 4) {
        __m512i part[8];
        for (int n = 0; n < N; n++) part[n] = whole(w + n * K * L + k * L);
        if (R > 1) for (int n = 0; n < N; n++) soon(w + (N + n) * K * L + k * L);
        for (int r = 0; r < R; r++) {
            const __m512i own = both((const half *)(x + r * K + k));
            for (int n = 0; n < N; n++) acc[r][n] = byte_dot(acc[r][n], own, part[n]);
        }
    }
    for (int n = 0; n < N; n++) {
        const vf weight = load(m->scales + (p + n) * L);
        const vi shift = (vi)whole(m->scales + m->n + (p + n) * L);
        for (int r = 0; r < R; r++)
            store(out + r * os + (p + n) * L, __builtin_convertvector((vi)acc[r][n] - shift, vf) * (weight * scale[r]));
    }
}

/* The drafter's products: integers, exact but for the rounding of both sides to bytes, and twice as fast again. A draft is a
   guess that the target judges, so this costs acceptance (measured: docs/results/runtime.md), never a token. */
#define BYTE_TILES(R, N) do { for (; p + N <= P; p += N) byte_tile(R, N, m, bytes, scale, out, os, p); \
                              for (; p < P; p++) byte_tile(R, 1, m, bytes, scale, out, os, p); } while (0)
static void byte_product(const Step *s, const Mat *m, const float *x, int64_t xs, float *out, int64_t os, int64_t R) {
    const int64_t P = m->n / L;
    uint8_t *bytes = (uint8_t *)s->halves;
    for (int64_t left = R; left > 0; left -= 8, x += 8 * xs, out += 8 * os) {
        const int64_t rows = left < 8 ? left : 8;
        float scale[8];
        int64_t p = 0;
        for (int64_t r = 0; r < rows; r++) scale[r] = to_bytes(x + r * xs, bytes + r * m->k, m->k);
        switch (rows) {
        case 1: BYTE_TILES(1, 8); break; case 2: BYTE_TILES(2, 4); break; case 3: BYTE_TILES(3, 4); break;
        case 4: BYTE_TILES(4, 4); break; case 5: BYTE_TILES(5, 4); break; case 6: BYTE_TILES(6, 4); break;
        case 7: BYTE_TILES(7, 3); break; default: BYTE_TILES(8, 3);
        }
    }
}

/* Both halves of the table alike: the look-up minds five bits of an index, a code has four. */
#define E2M1_HALVES 0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, \
                    (short)0x8000, (short)0xbf00, (short)0xbf80, (short)0xbfc0, (short)0xc000, (short)0xc040, (short)0xc080, (short)0xc0c0
typedef short vs __attribute__((vector_size(64)));
static const vs E2M1_TABLE = {E2M1_HALVES, E2M1_HALVES};

/* 16 bytes as integers. */
INLINE vu widened(const uint8_t *from) { return (vu)_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)from)); }

/* The scales of 16 rows: 2^(byte - 127), NaN for 255. */
INLINE vf scales_of(const uint8_t *bytes) {
    const vu wide = widened(bytes), edge = (vu)(wide - 1 > 253u);
    return (vf)(wide << 23 | (edge & 0x400000u));
}

/* out[r] gets, or is added, the products of N panels from the p-th of a packed matrix, its eights of columns from `from` to
   before `to`, with R vectors x of so many. A block of 32 that is cut counts as far as it goes. */
INLINE void coded_tile(const int R, const int N, const Packed *w, int64_t p, int64_t from, int64_t to, const half *const *x,
                       float *const *out, int add) {
    const __m512i table = (__m512i)E2M1_TABLE;
    const uint8_t *codes = w->codes + p * w->code_stride, *scales = w->scales + p * w->scale_stride;
    vf total[8][4];
    for (int r = 0; r < R; r++) for (int n = 0; n < N; n++) total[r][n] = add ? load(out[r] + (p + n) * L) : splat(0);
    for (int64_t c = from; c < to;) {
        const int64_t b = c / 4, end = 4 * b + 4 < to ? 4 * b + 4 : to;
        vf part[8][4];
        for (int r = 0; r < R; r++) for (int n = 0; n < N; n++) part[r][n] = splat(0);
        for (; c < end; c++) {
            __m512i four[4];
            for (int n = 0; n < N; n++) four[n] = whole(codes + n * w->code_stride + c * 64);
            if (R > 1) for (int n = 0; n < N; n++) soon(codes + (N + n) * w->code_stride + c * 64);
            for (int j = 0; j < 4; j++) {
                __m512i weight[4];
                for (int n = 0; n < N; n++) weight[n] = _mm512_permutexvar_epi16(_mm512_srli_epi16(four[n], 4 * j), table);
                for (int r = 0; r < R; r++) {
                    const __m512i own = both(x[r] + (c - from) * 8 + j * 2);
                    for (int n = 0; n < N; n++) part[r][n] = dot(part[r][n], weight[n], own);
                }
            }
        }
        for (int n = 0; n < N; n++) {
            const vf scale = scales_of(scales + n * w->scale_stride + b * L);
            for (int r = 0; r < R; r++) total[r][n] = total[r][n] + part[r][n] * scale;
        }
    }
    for (int r = 0; r < R; r++) for (int n = 0; n < N; n++) store(out[r] + (p + n) * L, total[r][n]);
}
#define CODED(R, N) do { for (; p + N <= n / L; p += N) coded_tile(R, N, w, p, from, to, x, out, add); \
                         for (; p < n / L; p++) coded_tile(R, 1, w, p, from, to, x, out, add); } while (0)
static void coded_product(int64_t R, const Packed *w, int64_t n, int64_t from, int64_t to, const half *const *x,
                          float *const *out, int add) {
    int64_t p = 0;
    switch (R) {
    case 1: CODED(1, 4); break; case 2: CODED(2, 4); break; case 3: CODED(3, 2); break; case 4: CODED(4, 2); break;
    case 5: CODED(5, 2); break; case 6: CODED(6, 2); break; case 7: CODED(7, 2); break; default: CODED(8, 2);
    }
}

/* Weights [n, k], k at most 512, as the products see them, column by column, out [k][n]: what the contract of bit-exact decoding is tested on. */
void decode_panels(const Packed *w, int64_t n, int64_t k, float *out) {
    half unit[8][512];
    for (int64_t first = 0; first < k; first += 8) {
        const half *x[8];
        float *to[8];
        memset(unit, 0, sizeof unit);
        for (int64_t r = 0; r < 8; r++) unit[r][first + r] = 0x3f80, x[r] = unit[r], to[r] = out + (first + r) * n;
        coded_product(8, w, n, 0, k / 8, x, to, 0);
    }
}

/* As `experts` of ops.c. */
static void dot_experts(Step *s, const Layer *l) {
    const int64_t H = s->H, I = l->inner, width = l->width, room = width + 16;
    float *gate = s->inner, *up = gate + 8 * I;
    half *middle = s->halves, *share = middle + 8 * I, *rows = share + 8 * room;
    memset(s->partial, 0, sizeof(float) * l->mlp_parts * s->R * H);
    for (int64_t r = 0; r < s->R; r++) to_half(s->y + r * H, rows + r * H, H);
    for (int64_t e = 0; e < l->count; e++) {
        const Expert *w = l->experts + e;
        const int64_t n = places_of(s, l, e);
        for (int64_t begin = 0; begin < n; begin += 8) {
            const int64_t R = n - begin < 8 ? n - begin : 8;
            const half *own[8], *mids[8];
            float *gates[8], *ups[8], *outs[8];
            for (int64_t r = 0; r < R; r++)
                own[r] = rows + s->list[begin + r] / l->top * H, gates[r] = gate + r * I, ups[r] = up + r * I;
            coded_product(R, &w->gate, I, 0, H / 8, own, gates, 0);
            coded_product(R, &w->up, I, 0, H / 8, own, ups, 0);
            for (int64_t r = 0; r < R; r++) {
                weighted_swiglu(gates[r], ups[r], s->weight[s->list[begin + r]], I);
                to_half(gates[r], middle + r * I, I);
            }
            for (int64_t p = 0; p < l->mlp_parts; p++) {
                const int64_t at = l->column + p * width, before = at % 8;
                for (int64_t r = 0; r < R; r++) {
                    mids[r] = middle + r * I + p * width;
                    outs[r] = s->partial + (p * s->R + s->list[begin + r] / l->top) * H;
                    if (width % 8) { /* a share that begins or ends inside of eight columns: zeros for its neighbours' */
                        half *own_share = share + r * room;
                        memset(own_share, 0, sizeof(half) * room);
                        memcpy(own_share + before, mids[r], sizeof(half) * width);
                        mids[r] = own_share;
                    }
                }
                coded_product(R, &w->down, H, at / 8, (at + width + 7) / 8, mids, outs, 1);
            }
        }
    }
}

static void dot_write(Step *s, const Layer *l) {
    const int32_t *slots = s->slots + l->kind * s->rows;
    const int64_t N = l->qkv.n;
    half rounded_row[512];
    for (int64_t r = 0; r < s->R; r++) {
        const float *k = s->qkv + r * N + l->Q * l->Dp, *v = k + l->K * l->Dp;
        const int64_t page = slots[r] / PAGE, t = slots[r] % PAGE;
        for (int64_t h = 0; h < l->K; h++) {
            half *keys = (half *)l->keys + (h * l->slots + page * PAGE) * l->Dp + 2 * t;
            for (int64_t d = 0; d < l->Dp; d += 256) {
                const int64_t n = l->Dp - d < 256 ? l->Dp - d : 256;
                to_half(k + h * l->Dp + d, rounded_row, n);
                for (int64_t i = 0; i < n; i += 2) memcpy(keys + (d + i) * PAGE, rounded_row + i, 2 * sizeof(half));
            }
            half *values = (half *)l->values + (h * l->slots + page * PAGE) * l->Vp + t / 2 * 2 * l->Vp;
            for (int64_t i = 0; i < l->Vp; i += L) {
                const vu both_of = (vu)whole(values + 2 * i);
                const vu own = (vu)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)load(v + h * l->Vp + i)));
                _mm512_storeu_si512(values + 2 * i, (__m512i)(t % 2 ? (both_of & 0xffffu) | own << 16 : (both_of & ~0xffffu) | own));
            }
        }
    }
}

/* Scores of N queries [N][Dp] with the 16 keys of a block, into columns of score [N][width]. */
INLINE void score_block(const int N, const half *keys, const half *q, int64_t Dp, float *score, int64_t width) {
    vf acc[8];
    for (int n = 0; n < N; n++) acc[n] = splat(0);
    for (int64_t d = 0; d < Dp; d += 2) {
        const __m512i key = whole(keys + d * PAGE);
        for (int n = 0; n < N; n++) acc[n] = dot(acc[n], key, both(q + n * Dp + d));
    }
    for (int n = 0; n < N; n++) store(score + n * width, acc[n]);
}

/* Sums of V vectors of values, weighted by N rows of bf16 weights [N][2 * width] (the first half of each row is used). */
INLINE void mix(const int N, const int V, const half *values, const int32_t *pages, int64_t begin, int64_t end, int64_t Vp,
                const half *weight, int64_t width, vf out[8][4]) {
    vf acc[8][4];
    for (int n = 0; n < N; n++) for (int v = 0; v < V; v++) acc[n][v] = splat(0);
    for (int64_t i = begin; i < end; i += L) {
        const half *at = values + (pages[i / PAGE] * (int64_t)PAGE + i % PAGE) * Vp;
        for (int64_t j = 0; j < L; j += 2, at += 2 * Vp) {
            __m512i value[4];
            for (int v = 0; v < V; v++) value[v] = whole(at + v * 2 * L);
            for (int n = 0; n < N; n++) {
                const __m512i own = both(weight + n * 2 * width + i - begin + j);
                for (int v = 0; v < V; v++) acc[n][v] = dot(acc[n][v], value[v], own);
            }
        }
    }
    for (int n = 0; n < N; n++) for (int v = 0; v < V; v++) out[n][v] = acc[n][v];
}

#define FOR_QUERIES(n, CALL) switch (n) { case 1: CALL(1); break; case 2: CALL(2); break; case 4: CALL(4); break; default: CALL(8); }

/* Weights of one query in place of its scores, in bf16, for positions low .. high of begin .. begin + width; returns their sum. */
static float soften(float *score, int64_t width, int64_t begin, int64_t low, int64_t high, const float *sink) {
    const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const vf none = splat(-INFINITY);
    vf most = none;
    for (int64_t i = 0; i < width; i += L) {
        const vi position = lane + (int32_t)(begin + i);
        const vi hidden = (position < (int32_t)low) | (position > (int32_t)high);
        const vf own = (vf)(((vi)load(score + i) & ~hidden) | ((vi)none & hidden));
        store(score + i, own);
        most = (vf)_mm512_max_ps((__m512)own, (__m512)most);
    }
    float top = _mm512_reduce_max_ps((__m512)most);
    if (sink && *sink > top) top = *sink;
    vf sum = splat(0);
    for (int64_t i = 0; i < width; i += L) {
        const vf e = vexp(load(score + i) - top);
        sum = sum + e;
        _mm256_storeu_si256((void *)((half *)score + i), (__m256i)_mm512_cvtneps_pbh((__m512)e));
    }
    const float total = lanes(sum);
    return sink ? total + vexp(splat(*sink - top))[0] : total;
}

/* Rows r .. r + T - 1, of one sequence, and one key head. */
static void dot_attend(Step *s, const Layer *l, int64_t r, int64_t T, int64_t h) {
    const int64_t at = l->kind * s->rows + r, G = l->Q / l->K, N = T * G;
    int64_t low = s->low[at], high = s->high[at];
    for (int64_t t = 1; t < T; t++) {
        low = s->low[at + t] < low ? s->low[at + t] : low;
        high = s->high[at + t] > high ? s->high[at + t] : high;
    }
    const int64_t begin = low / L * L, end = high / L * L + L, width = end - begin;
    const int32_t *pages = s->tables + s->table_at[at] - s->table_first[at];
    const half *keys = (const half *)l->keys + h * l->slots * l->Dp, *values = (const half *)l->values + h * l->slots * l->Vp;
    half *q = s->halves;
    float *score = s->scratch, total[8];
    for (int64_t t = 0; t < T; t++) for (int64_t g = 0; g < G; g++)
        to_half(s->qkv + (r + t) * l->qkv.n + (h * G + g) * l->Dp, q + (t * G + g) * l->Dp, l->Dp);
    for (int64_t first = 0, n; first < N; first += n) {
        n = N - first >= 8 ? 8 : N - first >= 4 ? 4 : N - first >= 2 ? 2 : 1;
        for (int64_t i = begin; i < end; i += L) {
            const half *from = keys + pages[i / PAGE] * (int64_t)PAGE * l->Dp + i % PAGE * 2;
#define SCORES(n) score_block(n, from, q + first * l->Dp, l->Dp, score + i - begin, width)
            FOR_QUERIES(n, SCORES)
        }
        for (int64_t i = 0; i < n; i++)
            total[i] = soften(score + i * width, width, begin, s->low[at + (first + i) / G], s->high[at + (first + i) / G],
                              l->sink ? l->sink + h * G + (first + i) % G : NULL);
        for (int64_t v = 0; v < l->Vp;) {
            vf acc[8][4];
            const int64_t left = (l->Vp - v) / L, V = n <= 4 && left >= 4 ? 4 : left >= 2 ? 2 : 1;
#define MIXED(n, V) mix(n, V, values + 2 * v, pages, begin, end, l->Vp, (const half *)score, width, acc)
#define MIX4(n) MIXED((n) < 4 ? (n) : 4, 4)
#define MIX2(n) MIXED(n, 2)
#define MIX1(n) MIXED(n, 1)
            if (V == 4) { FOR_QUERIES(n, MIX4) } else if (V == 2) { FOR_QUERIES(n, MIX2) } else { FOR_QUERIES(n, MIX1) }
            for (int64_t i = 0; i < n; i++)
                for (int64_t c = 0; c < V; c++)
                    store(s->heads + (r + (first + i) / G) * l->Q * l->Vp + (h * G + (first + i) % G) * l->Vp + v + c * L,
                          acc[i][c] / total[i]);
            v += V * L;
        }
    }
}

static void dot_attention(Step *s, const Layer *l) {
    const int32_t *table = s->table_at + l->kind * s->rows;
    for (int64_t r = 0, T; r < s->R; r += T) {
        for (T = 1; T < 8 && r + T < s->R && table[r + T] == table[r]; T++) {}
        for (int64_t h = 0; h < l->K; h++) dot_attend(s, l, r, T, h);
    }
}
