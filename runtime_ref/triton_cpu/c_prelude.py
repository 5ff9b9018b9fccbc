"""What every kernel's C begins and ends with: conversions and products, and the launch of a grid's programs."""

PREAMBLE = r"""
#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
static inline float wide(uint16_t b) { union { uint32_t u; float f; } x = {(uint32_t)b << 16}; return x.f; }
static inline uint16_t narrow(float f) {
  union { float f; uint32_t u; } x = {f};
  uint32_t rounded = (x.u + 0x7FFF + (x.u >> 16 & 1)) >> 16;
  return f != f ? 0x7FC0 : (uint16_t)rounded;
}
static float fp8_values[256];
static const float fp4_values[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};
static inline float e8m0(uint8_t b) {
  union { uint32_t u; float f; } x = {b ? (uint32_t)b << 23 : 1u << 22};
  return b == 255 ? NAN : x.f;
}
__attribute__((constructor)) static void fill(void) {
  for (int i = 0; i < 256; i++) {
    int e = i >> 3 & 15, m = i & 7;
    float v = e ? ldexpf(8 + m, e - 10) : ldexpf(m, -9);
    fp8_values[i] = (i & 127) == 127 ? NAN : i & 128 ? -v : v;
  }
}
static inline uint32_t bits_f32(float f) { union { float f; uint32_t u; } x = {f}; return x.u; }
static inline float f32_bits(uint32_t u) { union { uint32_t u; float f; } x = {u}; return x.f; }
static inline uint64_t bits_f64(double f) { union { double f; uint64_t u; } x = {f}; return x.u; }
static inline double f64_bits(uint64_t u) { union { uint64_t u; double f; } x = {u}; return x.f; }
static inline uint16_t bits_f16(_Float16 f) { union { _Float16 f; uint16_t u; } x = {f}; return x.u; }
static inline _Float16 f16_bits(uint16_t u) { union { uint16_t u; _Float16 f; } x = {u}; return x.f; }
#define EXTREME(name, sign) \
  static inline int32_t name(int32_t *at, int32_t value, int order) { \
    int32_t old = __atomic_load_n(at, __ATOMIC_RELAXED); \
    while (value sign old && !__atomic_compare_exchange_n(at, &old, value, 0, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)) {} \
    return old; \
  }
EXTREME(fetch_max, >)
EXTREME(fetch_min, <)
typedef float Eight __attribute__((vector_size(32), aligned(4)));
// c [M, N] += a [M, K] b [K, N], K from first to last; M is a multiple of 4, N of 8.
static inline __attribute__((always_inline)) void multiply(int M, int N, int K, const float *a, const float *b, float *c) {
  for (int n = 0; n < N; n += 8)
    for (int m = 0; m < M; m += 4) {
      Eight s[4];
      for (int r = 0; r < 4; r++) s[r] = *(Eight *)(c + (m + r) * N + n);
      for (int k = 0; k < K; k++) {
        Eight row = *(const Eight *)(b + k * N + n);
        for (int r = 0; r < 4; r++) s[r] += a[(m + r) * K + k] * row;
      }
      for (int r = 0; r < 4; r++) *(Eight *)(c + (m + r) * N + n) = s[r];
    }
}
typedef struct { int at[3], count[3]; } Place;
#ifdef BOUNDS
// The first access outside of all arguments is kept, and none of them is made.
static struct { const char *low, *high; } bounds[128];
static int bounded;
static int64_t fault[6];
static int inside(const void *at, int size, int kind, const Place *place) {
  const char *p = at;
  for (int i = 0; i < bounded; i++)
    if (p >= bounds[i].low && p + size <= bounds[i].high) return 1;
  int64_t none = 0;
  if (__atomic_compare_exchange_n(fault, &none, kind, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    fault[1] = (int64_t)p, fault[2] = size;
    for (int i = 0; i < 3; i++) fault[3 + i] = place->at[i];
  }
  return 0;
}
void set_bounds(int count, const int64_t *ends) {
  memset(fault, 0, sizeof fault);
  bounded = count;
  for (int i = 0; i < count; i++) bounds[i].low = (char *)ends[2 * i], bounds[i].high = (char *)ends[2 * i + 1];
}
int64_t *found_fault(void) { return fault; }
static void prefetched(const void *at) {
  static const Place nowhere;
  inside(at, 1, 4, &nowhere);
}
#else
#define inside(at, size, kind, place) 1
#define prefetched(at)
#endif
typedef union { int64_t i; double f; void *p; } Slot;
"""

# All programs one after another, or at once as threads (with stacks of their own: tensors are arrays on it), or `only` one.
LAUNCHER = r"""
typedef struct { Place place; const Slot *slots; int alone; } Work;
static void *work(void *given) {
  Work *own = given;
  Place p = own->place;
  if (!own->alone) program(&p, own->slots);
  else
    for (p.at[2] = 0; p.at[2] < p.count[2]; p.at[2]++)
      for (p.at[1] = 0; p.at[1] < p.count[1]; p.at[1]++)
        for (p.at[0] = 0; p.at[0] < p.count[0]; p.at[0]++) program(&p, own->slots);
  return 0;
}
int launch(int only, int x, int y, int z, int together, const Slot *slots) {
  if (only >= 0) {
    Place p = {{only, 0, 0}, {x, y, z}};
    program(&p, slots);
    return 0;
  }
  int threads = together ? x * y * z : 1, failed = 0, started = 0;
  if (threads < 1) return 0;
  if (!together && STACK < 1 << 20) {
    Work own = {{{0, 0, 0}, {x, y, z}}, slots, 1};
    work(&own);
    return 0;
  }
  pthread_t ids[threads];
  Work works[threads];
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, STACK + (1 << 20));
  for (int i = 0; i < threads; i++) {
    works[i] = (Work){{{i % x, i / x % y, i / (x * y)}, {x, y, z}}, slots, !together};
    if (pthread_create(&ids[i], &attributes, work, &works[i])) { failed = 1; break; }
    started++;
  }
  for (int i = 0; i < started; i++) pthread_join(ids[i], 0);
  pthread_attr_destroy(&attributes);
  return failed;
}
"""
