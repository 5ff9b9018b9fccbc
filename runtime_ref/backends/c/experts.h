/* Packed experts without bf16 dot products: codes are decoded in registers, block by block, as the file has them; included by ops.c.

   Rejected: decoded copies in memory (four to eight times the bytes of a step that waits for bytes). */

static const vf E2M1 = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

static float powers[256]; /* of each scale byte; set by prepare() */

/* Call once before anything else. */
void prepare(void) {
    for (uint32_t byte = 0; byte < 256; byte++) {
        const uint32_t bits = byte == 0 ? 0x400000u : byte == 255 ? 0x7fc00000u : byte << 23;
        memcpy(&powers[byte], &bits, sizeof bits);
    }
}

/* 32 weights of a block: those of even and of odd positions. A table look-up minds the last four bits of an index only. */
INLINE void decode(const uint8_t *codes, uint8_t scale, vf *even, vf *odd) {
    const vu wide = widened(codes);
    *even = __builtin_shuffle(E2M1, (vi)wide) * powers[scale];
    *odd = __builtin_shuffle(E2M1, (vi)(wide >> 4)) * powers[scale];
}

/* Weights [n, k] as the products see them: what the contract of bit-exact decoding is tested on. */
void decode_rows(const Packed *w, int64_t n, int64_t k, float *out) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t b = 0; b < k / 32; b++) {
            vf even, odd;
            decode(w->codes + i * w->code_stride + b * L, w->scales[i * w->scale_stride + b], &even, &odd);
            for (int j = 0; j < L; j++) out[i * k + b * 32 + 2 * j] = even[j], out[i * k + b * 32 + 2 * j + 1] = odd[j];
        }
}

/* x [n] with each block of 32 as 16 even then 16 odd positions. */
static void split_pairs(const float *x, float *out, int64_t n) {
    for (int64_t b = 0; b < n; b += 32)
        for (int64_t i = 0; i < L; i++) out[b + i] = x[b + 2 * i], out[b + L + i] = x[b + 2 * i + 1];
}

/* out[r][0 .. n - 1] gets, or is added, the products of rows of blocks `from` .. `from` + `blocks` with R rows of pairs. */
INLINE void packed_rows(const int R, const Packed *w, int64_t n, int64_t from, int64_t blocks, const float *const *pairs,
                        float *const *out, int add) {
    for (int64_t i = 0; i < n; i += L) {
        vf acc[8][L];
        for (int j = 0; j < L; j++) {
            const uint8_t *codes = w->codes + (i + j) * w->code_stride + from * L;
            const uint8_t *scales = w->scales + (i + j) * w->scale_stride + from;
            vf sum[8];
            for (int r = 0; r < R; r++) sum[r] = splat(0);
            for (int64_t b = 0; b < blocks; b++) {
                vf even, odd;
                decode(codes + b * L, scales[b], &even, &odd);
                for (int r = 0; r < R; r++) {
                    sum[r] = sum[r] + even * load(pairs[r] + b * 32);
                    sum[r] = sum[r] + odd * load(pairs[r] + b * 32 + L);
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
                split_pairs(s->y + s->list[begin + r] / l->top * H, x_pairs + r * H, H);
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
                    split_pairs(share, mid + r * room, 32 * blocks);
                    mids[r] = mid + r * room;
                    outs[r] = s->partial + (p * s->R + s->list[begin + r] / l->top) * H;
                }
                packed_product(R, &w->down, H, first, blocks, mids, outs, 1);
            }
        }
    }
}
