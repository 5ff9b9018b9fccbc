/* The ops of a step (as backends/torch/ops.py), compiled for the CPU at hand; structs.py builds the structures, backend.py calls run().

   A decoded token multiplies a few megabytes once, so what decides is bytes read and calls made: weights that are exact in
   bf16 are held so, experts are read packed and decoded in registers, and a whole program is one call.

   Row-invariant by construction: every output element is one chain of fused multiply-adds in the order of K (or, for packed
   experts and scores, a chain in each lane of a register, added by one fixed tree); how many rows run beside it only changes how many chains run
   side by side. Accumulation is float32 throughout. With a bf16 stream, activations are rounded to bf16 where they meet bf16
   weights, codes or the cache in a product: here by `rounded`, with bf16 dot products (bf16_dots.h) by the instruction, so
   that processors with and without it compute the same but for the order of sums. In float32 nothing is rounded.

   GCC's vector types rather than intrinsics, but for what GCC 12 makes many instructions of (widening loads, look-ups of 16
   bytes): the same source compiles for AVX-512, AVX2 and NEON. One thread: more cores are used by more ranks. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define DOTS
#endif

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
typedef uint8_t vb __attribute__((vector_size(16)));
typedef float four __attribute__((vector_size(16)));
#define L 16
#define PAGE 64
#define INLINE static inline __attribute__((always_inline))

/* Lanes of a register with AVX-512, with AVX2, and with SSE or NEON. Sums of products are kept in these: GCC keeps wider vectors in
   memory, which costs ten times the time. */
#ifdef __AVX512F__
#define NL 16
#elif defined(__AVX2__)
#define NL 8
#else
#define NL 4
#endif
#define PIECES (L / NL)
typedef float nf __attribute__((vector_size(4 * NL)));
typedef uint32_t nu __attribute__((vector_size(4 * NL)));
typedef int32_t ni __attribute__((vector_size(4 * NL)));
typedef uint16_t nh __attribute__((vector_size(2 * NL)));

/* Mirrored field by field in structs.py. */
/* Panels of w [n, k]: form 0 float32 [n / 16][k][16], 1 bf16, 2 bf16 in pairs, 3 bytes in fours (scales [n], then 128 x the sums). */
typedef struct { const void *data; const float *scales; int64_t form, n, k; } Mat;
typedef struct { const uint8_t *codes, *scales; int64_t code_stride, scale_stride; } Packed; /* rows [n, k / 2], [n, k / 32], or panels */
typedef struct { Packed gate, up, down; } Expert;
/* inner: rows of gate and of up in whole vectors; width: columns of down in a part, the first part from `column` on. */
typedef struct {
    Mat qkv, kv, *o, gate_up, *down, router, *convolutions; /* down and up of attention's and of the MLP's; or NULL */
    const float *input_norm, *post_norm, *q_norm, *k_norm, *sink, *cos, *sin, *correction;
    float *keys, *values;
    const Expert *experts;
    int64_t slots, kind, Q, K, D, V, Dp, Vp, rotated, parts, mlp_parts, inner, width, column, count, top, softmax, normalize, groups, group_top;
    float q_scale, value_scale, epsilon, factor;
} Layer;
typedef struct {
    const Layer *layers;
    const float *embed, *mask, *norm;
    Mat head, fc;
    int64_t H, R, bf16, dots, wanted, gathered_parts;
    float epsilon, unused;
    const int32_t *ids, *positions, *low, *high, *table_at, *table_first, *tables, *slots, *head_rows; /* by kind where it matters */
    float *x, *y, *qkv, *heads, *partial, *inner, *weight, *scratch, *logits;
    const float *gathered, *features;
    float *target_hidden;
    int32_t *index, *list;
    uint16_t *halves;
    int64_t hidden_stride; /* of its rows */
    const int32_t *hidden_place; /* by layer, in units of H */
    const int32_t *numbers; /* ids, positions, then by kind low, high, table_at, table_first, slots; tables, head_rows if `picks` */
    int64_t rows, kinds, pages, picks;
    int32_t *best; /* of each wanted row: the likeliest token, -1 where a logit is not finite */
    float *chance; /* its probability, 0 where there is none; or NULL */
    int64_t vocabulary;
} Step;

INLINE vf load(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vf splat(float a) { vf v = {}; return v + a; }

INLINE nf load_some(const float *p) { nf v; memcpy(&v, p, sizeof v); return v; }
INLINE void store_some(float *p, nf v) { memcpy(p, &v, sizeof v); }

/* Halves of floats, as integers. */
INLINE nu widened_halves(const uint16_t *from) {
#if defined(__AVX512F__)
    return (nu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)from));
#elif defined(__AVX2__)
    return (nu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)from));
#else
    nh half;
    memcpy(&half, from, sizeof half);
    return __builtin_convertvector(half, nu);
#endif
}

INLINE nf load_panel(const Mat *m, int64_t at) {
    if (!m->form) return load_some((const float *)m->data + at);
    return (nf)(widened_halves((const uint16_t *)m->data + at) << 16);
}

static vf round_bf16(vf x) {
    vu u = (vu)x, r = (u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000u;
    vi nan = x != x;
    return (vf)(((vi)r & ~nan) | ((vi)x & nan));
}
INLINE vf rounded(const Step *s, vf x) { return s->bf16 ? round_bf16(x) : x; }
static void round_all(const Step *s, const float *x, float *out, int64_t n) {
    for (int64_t i = 0; i < n; i += L) store(out + i, rounded(s, load(x + i)));
}

/* exp to about one unit in the last place; 0 below -87. */
static vf vexp(vf x) {
    vi tiny = x < -87.3f, huge = x > 88.0f;
    x = (vf)(((vi)x & ~huge) | ((vi)splat(88.0f) & huge));
    vf n = x * 1.44269504f + 12582912.0f - 12582912.0f;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vi e = (__builtin_convertvector(n, vi) + 127) << 23;
    return (vf)((vi)(p * (vf)e) & ~tiny);
}

/* Lane i of the result is the sum of a[i]'s lanes, always by the same tree: neighbours, neighbours of those, and so on. */
#ifdef __AVX512F__
#define SHUF(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
INLINE vf reduce16(const nf *a) {
    vf b[8], c[4], d[2];
    for (int i = 0; i < 8; i++)
        b[i] = SHUF(a[2 * i], a[2 * i + 1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
             + SHUF(a[2 * i], a[2 * i + 1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    for (int i = 0; i < 4; i++)
        c[i] = SHUF(b[2 * i], b[2 * i + 1], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
             + SHUF(b[2 * i], b[2 * i + 1], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    for (int i = 0; i < 2; i++)
        d[i] = SHUF(c[2 * i], c[2 * i + 1], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27)
             + SHUF(c[2 * i], c[2 * i + 1], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    return SHUF(d[0], d[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
         + SHUF(d[0], d[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}
#else
#if NL == 8
#define EVEN 0, 2, 8, 10, 4, 6, 12, 14
#define ODD 1, 3, 9, 11, 5, 7, 13, 15
#else
#define EVEN 0, 2, 4, 6
#define ODD 1, 3, 5, 7
#endif
#define PAIRS(a, b) (__builtin_shuffle(a, b, (ni){EVEN}) + __builtin_shuffle(a, b, (ni){ODD}))
INLINE vf reduce16(const nf *a) {
    float out[L];
    for (int i = 0; i < L; i += 4) {
        const nf fours = PAIRS(PAIRS(a[i], a[i + 1]), PAIRS(a[i + 2], a[i + 3]));
        four sums;
        memcpy(&sums, &fours, sizeof sums);
#if NL == 8
        four upper;
        memcpy(&upper, (const char *)&fours + sizeof sums, sizeof upper);
        sums = sums + upper;
#endif
        memcpy(out + i, &sums, sizeof sums);
    }
    return load(out);
}
#endif
INLINE float lanes(vf a) {
    nf piece[PIECES], all[L] = {};
    memcpy(piece, &a, sizeof a);
    all[0] = piece[0];
    for (int c = 1; c < PIECES; c++) all[0] = all[0] + piece[c];
    return reduce16(all)[0];
}

/* out[r][NL (p .. p + N - 1)] = w x[r] for R rows and N registers of a column's weights; R and N are constants at each call. */
INLINE void tile(const int R, const int N, const Mat *m, const float *x, int64_t xs, float *out, int64_t os, int64_t p) {
    nf acc[8][8];
    for (int r = 0; r < R; r++) for (int n = 0; n < N; n++) acc[r][n] = (nf){};
    const int64_t K = m->k, panel = K * L;
    for (int64_t k = 0; k < K; k++) {
        nf w[8];
        for (int n = 0; n < N; n++) w[n] = load_panel(m, (p + n) / PIECES * panel + k * L + (p + n) % PIECES * NL);
        for (int r = 0; r < R; r++) for (int n = 0; n < N; n++) acc[r][n] = acc[r][n] + w[n] * x[r * xs + k];
    }
    for (int r = 0; r < R; r++) for (int n = 0; n < N; n++) store_some(out + r * os + (p + n) * NL, acc[r][n]);
}
#define TILES(R, N) do { int64_t p = begin; for (; p + N <= end; p += N) tile(R, N, w, x, xs, out, os, p); \
                         for (; p < end; p++) tile(R, 1, w, x, xs, out, os, p); } while (0)
#ifdef __AVX512F__
#define CASES switch (rows) { case 1: TILES(1, 4); break; case 2: TILES(2, 4); break; case 3: TILES(3, 4); break; \
        case 4: TILES(4, 4); break; case 5: TILES(5, 2); break; case 6: TILES(6, 2); break; case 7: TILES(7, 2); break; \
        default: TILES(8, 2); }
#define ROWS 8
#else /* sixteen registers */
#define CASES switch (rows) { case 1: TILES(1, 8); break; case 2: TILES(2, 4); break; case 3: TILES(3, 3); break; default: TILES(4, 3); }
#define ROWS 4
#endif
/* Columns `begin` to `end`, in registers, of `rows` rows; in an engine's form, which is a constant for the loops. */
static void stripe(int64_t rows, const Mat *m, const float *x, int64_t xs, float *out, int64_t os, int64_t begin, int64_t end) {
    const Mat floats = {m->data, NULL, 0, m->n, m->k}, halves = {m->data, NULL, 1, m->n, m->k};
    if (m->form) { const Mat *w = &halves; CASES }
    else { const Mat *w = &floats; CASES }
}
#define TOGETHER 32 /* rows for which a stripe of weights is read once */
#define STRIPE 12 /* registers of columns, for the second-level cache */
#ifdef DOTS
static void dot_product(const Step *s, const Mat *m, const float *x, int64_t xs, float *out, int64_t os, int64_t R);
static void byte_product(const Step *s, const Mat *m, const float *x, int64_t xs, float *out, int64_t os, int64_t R);
#endif
static void product(const Step *s, const Mat *m, const float *x, int64_t xs, float *out, int64_t os, int64_t R) {
#ifdef DOTS
    if (m->form == 2) { dot_product(s, m, x, xs, out, os, R); return; }
    if (m->form == 3) { byte_product(s, m, x, xs, out, os, R); return; }
#endif
    const int64_t P = m->n / NL, width = xs;
    const int rounds = s->bf16 && m->form == 1 && m->k % L == 0; /* as dot_product does */
    const float *from = x;
    if (rounds) x = (const float *)s->halves, xs = m->k;
    for (int64_t left = R; left > 0; left -= TOGETHER, from += TOGETHER * width, out += TOGETHER * os) {
        const int64_t group = left < TOGETHER ? left : TOGETHER, part = group > ROWS ? STRIPE : P;
        if (rounds) for (int64_t r = 0; r < group; r++) round_all(s, from + r * width, (float *)s->halves + r * m->k, m->k);
        else x = from;
        for (int64_t begin = 0; begin < P; begin += part)
            for (int64_t r = 0; r < group; r += ROWS)
                stripe(group - r < ROWS ? group - r : ROWS, m, x + r * xs, xs, out + r * os, os, begin,
                       begin + part < P ? begin + part : P);
    }
}

static void norm(const float *x, const float *weight, float *y, int64_t n, float epsilon) {
    vf sum = splat(0);
    for (int64_t i = 0; i < n; i += L) sum = sum + load(x + i) * load(x + i);
    const float scale = 1.0f / sqrtf(lanes(sum) / (float)n + epsilon);
    for (int64_t i = 0; i < n; i += L) store(y + i, load(x + i) * scale * load(weight + i));
}

/* One head's vector of width D; x and weight [Dp] are zero behind it. */
static void head_norm(float *x, const float *weight, int64_t D, int64_t Dp, float epsilon) {
    vf sum = splat(0);
    for (int64_t i = 0; i < Dp; i += L) sum = sum + load(x + i) * load(x + i);
    const float scale = 1.0f / sqrtf(lanes(sum) / (float)D + epsilon);
    for (int64_t i = 0; i < Dp; i += L) store(x + i, load(x + i) * scale * load(weight + i));
}

static void rotate(float *x, const float *cos, const float *sin, int64_t rotated) {
    const int64_t half = rotated / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = fmaf(b, sin[i], a * cos[i]);
        x[i + half] = fmaf(a, sin[i + half], b * cos[i + half]);
    }
}

/* Rows of [queries |] keys | values into s->qkv, whose rows always leave room for the queries. */
static void project(Step *s, const Layer *l, int with_queries) {
    const int64_t N = l->qkv.n, first = l->Q * l->Dp;
    const Mat *m = with_queries ? &l->qkv : &l->kv;
    product(s, m, s->y, s->H, s->qkv + (with_queries ? 0 : first), N, s->R);
    for (int64_t r = 0; r < s->R; r++) {
        float *row = s->qkv + r * N;
        const float *cos = l->cos + (int64_t)s->positions[r] * l->D, *sin = l->sin + (int64_t)s->positions[r] * l->D;
        for (int64_t h = with_queries ? 0 : l->Q; h < l->Q + l->K; h++) {
            float *head = row + h * l->Dp;
            const float *weight = h < l->Q ? l->q_norm : l->k_norm;
            if (weight) head_norm(head, weight, l->D, l->Dp, l->epsilon);
            rotate(head, cos, sin, l->rotated);
            if (h < l->Q) for (int64_t i = 0; i < l->D; i++) head[i] *= l->q_scale;
        }
        if (l->value_scale != 1.0f)
            for (int64_t i = (l->Q + l->K) * l->Dp; i < N; i++) row[i] *= l->value_scale;
    }
}

#ifdef DOTS
static void dot_write(Step *s, const Layer *l);
static void dot_experts(Step *s, const Layer *l);
#endif
static void write_cache(Step *s, const Layer *l) {
#ifdef DOTS
    if (s->dots) { dot_write(s, l); return; }
#endif
    const int32_t *slots = s->slots + l->kind * s->rows;
    const int64_t N = l->qkv.n;
    for (int64_t r = 0; r < s->R; r++) {
        const float *k = s->qkv + r * N + l->Q * l->Dp, *v = k + l->K * l->Dp;
        for (int64_t h = 0; h < l->K; h++) {
            float *to = l->keys + (h * l->slots + slots[r]) * l->Dp;
            for (int64_t i = 0; i < l->Dp; i += L) store(to + i, rounded(s, load(k + h * l->Dp + i)));
            to = l->values + (h * l->slots + slots[r]) * l->Vp;
            for (int64_t i = 0; i < l->Vp; i += L) store(to + i, rounded(s, load(v + h * l->Vp + i)));
        }
    }
}

INLINE int64_t slot(const int32_t *table, int64_t first, int64_t position) {
    return (int64_t)table[position / PAGE - first] * PAGE + position % PAGE;
}

/* One row and key head: its G query heads over positions low .. high, in their order. */
static void attend_head(Step *s, const Layer *l, int64_t r, int64_t h) {
    const int64_t at = l->kind * s->rows + r, low = s->low[at], high = s->high[at], n = high - low + 1;
    const int64_t first = s->table_first[at], G = l->Q / l->K, width = (n + L - 1) / L * L;
    const int32_t *table = s->tables + s->table_at[at];
    const float *keys = l->keys + h * l->slots * l->Dp, *values = l->values + h * l->slots * l->Vp;
    float *score = s->scratch, *queries = (float *)s->halves;
    round_all(s, s->qkv + r * l->qkv.n + h * G * l->Dp, queries, G * l->Dp);
    for (int64_t i = 0; i < n; i += L) {
        const float *key[L];
        for (int64_t j = 0; j < L; j++) key[j] = keys + slot(table, first, i + j < n ? low + i + j : high) * l->Dp;
        for (int64_t g = 0; g < G; g++) {
            const float *q = queries + g * l->Dp;
            nf acc[L];
            for (int j = 0; j < L; j++) acc[j] = load_some(key[j]) * load_some(q);
            for (int64_t d = NL; d < l->Dp; d += NL) {
                const nf part = load_some(q + d);
                for (int j = 0; j < L; j++) acc[j] = acc[j] + load_some(key[j] + d) * part;
            }
            vf sums = reduce16(acc);
            for (int64_t j = n - i; j < L; j++) sums[j] = -INFINITY;
            store(score + g * width + i, sums);
        }
    }
    for (int64_t g = 0; g < G; g++) {
        float *own = score + g * width, top = l->sink ? l->sink[h * G + g] : -INFINITY, *out = s->heads + r * l->Q * l->Vp + (h * G + g) * l->Vp;
        for (int64_t i = 0; i < n; i++) top = own[i] > top ? own[i] : top;
        vf sum = splat(0);
        for (int64_t i = 0; i < n; i += L) {
            const vf e = vexp(load(own + i) - top);
            store(own + i, rounded(s, e));
            sum = sum + e;
        }
        float total = lanes(sum);
        if (l->sink) total += vexp(splat(l->sink[h * G + g] - top))[0];
        for (int64_t d = 0; d < l->Vp; d += 4 * NL) {
            const int64_t pieces = (l->Vp - d) / NL < 4 ? (l->Vp - d) / NL : 4;
            nf acc[4] = {};
            for (int64_t i = 0; i < n; i++) {
                const float *value = values + slot(table, first, low + i) * l->Vp + d;
                if (pieces == 4) for (int c = 0; c < 4; c++) acc[c] = acc[c] + load_some(value + c * NL) * own[i];
                else for (int64_t c = 0; c < pieces; c++) acc[c] = acc[c] + load_some(value + c * NL) * own[i];
            }
            for (int64_t c = 0; c < pieces; c++) store_some(out + d + c * NL, acc[c] / total);
        }
    }
}

static void merge_heads(Step *s, const Layer *l) {
    const int64_t width = l->Q * l->Vp / l->parts;
    for (int64_t p = 0; p < l->parts; p++)
        product(s, &l->o[p], s->heads + p * width, l->Q * l->Vp, s->partial + p * s->R * s->H, s->H, s->R);
}

static void add_parts(Step *s, int64_t parts) {
    const float *from = s->partial;
    if (s->gathered) from = s->gathered, parts = s->gathered_parts;
    const int64_t all = s->R * s->H;
    for (int64_t i = 0; i < all; i += L) {
        vf total = load(from + i);
        for (int64_t p = 1; p < parts; p++) total = total + load(from + p * all + i);
        store(s->x + i, rounded(s, load(s->x + i) + total));
    }
}

INLINE vf silu(vf a) { return a / (vexp(-a) + 1.0f); }

static void dense_mlp(Step *s, const Layer *l) {
    const int64_t N = l->gate_up.n, half = N / 2, width = l->width;
    for (int64_t begin = 0; begin < s->R; begin += 8) {
        const int64_t n = s->R - begin < 8 ? s->R - begin : 8;
        product(s, &l->gate_up, s->y + begin * s->H, s->H, s->inner, N, n);
        for (int64_t r = 0; r < n; r++)
            for (int64_t i = 0; i < half; i += L) {
                float *at = s->inner + r * N + i;
                store(at, silu(load(at)) * load(at + half));
            }
        for (int64_t p = 0; p < l->mlp_parts; p++)
            product(s, &l->down[p], s->inner + p * width, N, s->partial + (p * s->R + begin) * s->H, s->H, n);
    }
}

static void route(Step *s, const Layer *l) {
    const int64_t E = l->count, N = l->router.n;
    for (int64_t r = 0; r < s->R; r++) {
        float *score = s->inner + r % 8 * N, *choice = s->inner + 8 * N, total = 0;
        if (r % 8 == 0) product(s, &l->router, s->y + r * s->H, s->H, score, N, s->R - r < 8 ? s->R - r : 8);
        if (l->softmax) {
            float top = score[0];
            for (int64_t e = 1; e < E; e++) top = score[e] > top ? score[e] : top;
            for (int64_t e = 0; e < E; e++) total += score[e] = vexp(splat(score[e] - top))[0];
            for (int64_t e = 0; e < E; e++) choice[e] = score[e] /= total;
        } else {
            for (int64_t e = 0; e < N; e += L) store(score + e, 1.0f / (vexp(-load(score + e)) + 1.0f));
            for (int64_t e = 0; e < E; e++) choice[e] = score[e] + l->correction[e];
        }
        if (l->groups > 1) { /* only the groups whose two best choices sum highest */
            const int64_t size = E / l->groups;
            float *sum = choice + N;
            for (int64_t g = 0; g < l->groups; g++) {
                float a = -INFINITY, b = -INFINITY;
                for (int64_t e = g * size; e < (g + 1) * size; e++) {
                    if (choice[e] > a) b = a, a = choice[e];
                    else if (choice[e] > b) b = choice[e];
                }
                sum[g] = a + b;
            }
            for (int64_t drop = l->groups - l->group_top; drop > 0; drop--) {
                int64_t worst = -1;
                for (int64_t g = 0; g < l->groups; g++)
                    if (sum[g] < INFINITY && (worst < 0 || sum[g] <= sum[worst])) worst = g;
                for (int64_t e = worst * size; e < (worst + 1) * size; e++) choice[e] = -INFINITY;
                sum[worst] = INFINITY;
            }
        }
        float chosen = 0;
        for (int64_t a = 0; a < l->top; a++) {
            int64_t best = -1;
            for (int64_t e = 0; e < E; e++) {
                int taken = 0;
                for (int64_t b = 0; b < a; b++) taken |= s->index[r * l->top + b] == e;
                if (!taken && (best < 0 || choice[e] > choice[best])) best = e;
            }
            s->index[r * l->top + a] = (int32_t)best;
            s->weight[r * l->top + a] = score[best];
            chosen = a ? chosen + score[best] : score[best];
        }
        for (int64_t a = 0; a < l->top; a++) {
            float *w = s->weight + r * l->top + a;
            if (l->normalize) *w = *w / (l->softmax ? chosen : chosen + 1e-20f);
            *w *= l->factor;
        }
    }
}

/* Both forms of the experts: where expert `e` was chosen (row * top + choice), into the step's list; returns how often. */
static int64_t places_of(Step *s, const Layer *l, int64_t e) {
    int64_t n = 0;
    for (int64_t i = 0; i < s->R * l->top; i++) if (s->index[i] == e) s->list[n++] = (int32_t)i;
    return n;
}

/* gate = silu(gate) * up * scale, I numbers. */
INLINE void weighted_swiglu(float *gate, const float *up, float scale, int64_t I) {
    for (int64_t i = 0; i < I; i += L) store(gate + i, silu(load(gate + i)) * load(up + i) * scale);
}

#include "experts.h"
#ifdef DOTS
#include "bf16_dots.h"
#endif

/* Whether bf16 dot products were compiled in: only then may `dots` be set, and matrices have form 2. */
int has_dots(void) {
#ifdef DOTS
    return 1;
#else
    return 0;
#endif
}

static void attend(Step *s, const Layer *l) {
#ifdef DOTS
    if (s->dots) { dot_attention(s, l); return; }
#endif
    for (int64_t r = 0; r < s->R; r++) for (int64_t h = 0; h < l->K; h++) attend_head(s, l, r, h);
}

static void embed(Step *s) {
    for (int64_t r = 0; r < s->R; r++) {
        const float *from = s->ids[r] < 0 ? s->mask : s->embed + (int64_t)s->ids[r] * s->H;
        for (int64_t i = 0; i < s->H; i += L) store(s->x + r * s->H + i, rounded(s, load(from + i)));
    }
}

/* y_t + up(down(y_t)) * y_(t - 1) inside blocks; a row with a real token (an anchor) begins one. */
static void convolve(Step *s, const Mat *pair) {
    const int64_t H = s->H;
    float *small = s->scratch;
    for (int64_t r = s->R - 1; r >= 0; r--) {
        if (s->ids[r] >= 0) continue;
        float *change = small + pair[0].n, *y = s->y + r * H;
        product(s, &pair[0], y, H, small, pair[0].n, 1);
        product(s, &pair[1], small, pair[0].n, change, pair[1].n, 1);
        for (int64_t i = 0; i < H; i += L) store(y + i, load(y + i) + load(change + i) * load(y - H + i));
    }
}

enum { EMBED, INPUT_NORM, POST_NORM, FINAL_NORM, PROJECT, WRITE, ATTEND, MERGE, ADD_ATTENTION, ADD_MLP, DENSE, ROUTE, EXPERTS, TARGET_HIDDEN,
       PICK_ROWS, HEAD, FUSE, PROJECT_KV, CONVOLVE_ATTENTION, CONVOLVE_MLP, BEST };

static void choose(Step *s) {
    const int64_t V = s->vocabulary;
    for (int64_t r = 0; r < s->wanted; r++) {
        const float *own = s->logits + r * s->head.n;
        const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        vf most = splat(-INFINITY), nothing = splat(0);
        vi at = {};
        int64_t i = 0;
        for (; i + L <= V; i += L) {
            const vf v = load(own + i);
            const vi higher = v > most;
            most = (vf)(((vi)v & higher) | ((vi)most & ~higher));
            at = ((lane + (int32_t)i) & higher) | (at & ~higher);
            nothing = nothing + v * 0.0f;
        }
        float top = most[0], finite = lanes(nothing);
        int32_t best = at[0];
        for (int j = 1; j < L; j++) if (most[j] > top || (most[j] == top && at[j] < best)) top = most[j], best = at[j];
        for (int64_t j = i; j < V; j++) {
            if (own[j] > top) top = own[j], best = (int32_t)j;
            finite += own[j] * 0.0f;
        }
        s->best[r] = finite == 0.0f ? best : -1;
        if (!s->chance) continue;
        vf sum = splat(0);
        float rest = 0;
        for (int64_t j = 0; j < i; j += L) sum = sum + vexp(load(own + j) - top);
        for (; i < V; i++) rest += vexp(splat(own[i] - top))[0];
        s->chance[r] = s->best[r] < 0 ? 0 : 1.0f / (lanes(sum) + rest);
    }
}

static void find_numbers(Step *s) {
    const int64_t n = s->rows, all = s->kinds * n;
    s->ids = s->numbers, s->positions = s->ids + n, s->low = s->positions + n, s->high = s->low + all;
    s->table_at = s->high + all, s->table_first = s->table_at + all, s->slots = s->table_first + all, s->tables = s->slots + all;
    s->head_rows = s->picks ? s->tables + s->pages : NULL;
}

/* Runs `count` instructions (op, layer). */
void run(Step *s, const int32_t (*code)[2], int64_t count) {
    find_numbers(s);
    for (int64_t c = 0; c < count; c++) {
        const Layer *l = s->layers + (code[c][1] < 0 ? 0 : code[c][1]);
        switch (code[c][0]) {
        case EMBED: embed(s); break;
        case INPUT_NORM: for (int64_t r = 0; r < s->R; r++) norm(s->x + r * s->H, l->input_norm, s->y + r * s->H, s->H, s->epsilon); break;
        case POST_NORM: for (int64_t r = 0; r < s->R; r++) norm(s->x + r * s->H, l->post_norm, s->y + r * s->H, s->H, s->epsilon); break;
        case FINAL_NORM: for (int64_t r = 0; r < s->wanted; r++) norm(s->x + r * s->H, s->norm, s->y + r * s->H, s->H, s->epsilon); break;
        case PROJECT: project(s, l, 1); break;
        case PROJECT_KV: project(s, l, 0); break;
        case CONVOLVE_ATTENTION: convolve(s, l->convolutions); break;
        case CONVOLVE_MLP: convolve(s, l->convolutions + 2); break;
        case WRITE: write_cache(s, l); break;
        case ATTEND: attend(s, l); break;
        case MERGE: merge_heads(s, l); break;
        case ADD_ATTENTION: add_parts(s, l->parts); break;
        case ADD_MLP: add_parts(s, l->mlp_parts); break;
        case DENSE: dense_mlp(s, l); break;
        case ROUTE: route(s, l); break;
        case EXPERTS: experts(s, l); break;
        case TARGET_HIDDEN:
            for (int64_t r = 0; r < s->R; r++)
                memcpy(s->target_hidden + r * s->hidden_stride + s->hidden_place[code[c][1]] * s->H, s->x + r * s->H, sizeof(float) * s->H);
            break;
        case PICK_ROWS: /* ascending, so a row is read before it is overwritten */
            if (s->head_rows)
                for (int64_t r = 0; r < s->wanted; r++)
                    if (s->head_rows[r] != r) memcpy(s->x + r * s->H, s->x + s->head_rows[r] * s->H, sizeof(float) * s->H);
            break;
        case HEAD: product(s, &s->head, s->y, s->H, s->logits, s->head.n, s->wanted); break;
        case BEST: choose(s); break;
        case FUSE: /* features [R, k] -> y */
            product(s, &s->fc, s->features, s->fc.k, s->x, s->H, s->R);
            for (int64_t r = 0; r < s->R; r++) norm(s->x + r * s->H, s->norm, s->y + r * s->H, s->H, s->epsilon);
            break;
        }
    }
}

/* Sequences of a round; mirrored in structs.py. A sequence keeps the drafts that the target is likely to reach: those whose chances,
   each as often true as `truth` says of it, multiply to at least `worth`. */
typedef struct { int64_t row, drafts; float worth; int32_t kept; const float *truth; } Drafted;
#define BINS 16

/* Takes out rows that are not `kept` (ascending), of n; the arrays' stride stays. */
static void drop_rows(Step *s, const int32_t *kept, int64_t n) {
    int32_t *columns = (int32_t *)s->numbers;
    const int64_t count = 2 + 5 * s->kinds;
    for (int64_t c = 0; c < count; c++, columns += s->rows) for (int64_t i = 0; i < n; i++) columns[i] = columns[kept[i]];
    if (s->picks) {
        int32_t *head = (int32_t *)s->head_rows, at = 0;
        int64_t wanted = 0;
        for (int64_t i = 0; i < s->wanted; i++) {
            while (at < n && kept[at] < head[i]) at++;
            if (at < n && kept[at] == head[i]) head[wanted++] = at;
        }
        s->wanted = wanted;
    } else s->wanted = n;
    s->R = n;
}

/* Context (count 0: nothing new), block and the target's step, whose rows of drafts get their tokens between the two. */
void run_round(Step *context, const int32_t (*context_code)[2], int64_t context_count, Step *block, const int32_t (*block_code)[2],
               int64_t block_count, Step *target, const int32_t (*code)[2], int64_t count, Drafted *drafted, int64_t sequences, int32_t *kept) {
    if (context_count) run(context, context_code, context_count);
    run(block, block_code, block_count);
    find_numbers(target);
    int32_t *ids = (int32_t *)target->ids;
    int64_t from = 0, n = 0, next = 0;
    for (int64_t q = 0; q < sequences; q++) {
        Drafted *own = drafted + q;
        float reach = 1;
        int64_t i = 0;
        for (; i < own->drafts; i++) {
            if (block->best[from + i] < 0) break; /* not a number: nothing to propose */
            const int bin = (int)(block->chance[from + i] * BINS);
            reach *= own->truth[bin < BINS ? bin : BINS - 1];
            if (!(reach >= own->worth)) break;
            ids[own->row + 1 + i] = block->best[from + i];
        }
        own->kept = (int32_t)i;
        for (; next <= own->row + i; next++) kept[n++] = (int32_t)next;
        next = own->row + 1 + own->drafts;
        from += own->drafts;
    }
    for (; next < target->rows; next++) kept[n++] = (int32_t)next;
    if (n < target->rows) drop_rows(target, kept, n);
    run(target, code, count);
}
