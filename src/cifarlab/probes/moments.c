/* Six moments of float arrays in one pass over memory, and a pass over weights that measures their change too.
 *
 * Plain C without Python's headers: built when cifarlab is installed where a compiler is at hand, loaded by moments.py, which has
 * the same in torch operations for everything else. Every block is summed in its own order and the blocks in theirs, so the
 * result does not depend on threads or on what ran before. Compiled with reassociation, so that sums become SIMD; NaN and Inf
 * are found by their bits, which no such option can touch.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#define EVERY_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EVERY_CPU
#endif
#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

enum { STRIP = 256, MOMENTS = 6, BINS = 512 };  /* a strip's sums are kept in registers */

static inline uint32_t bits(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
static inline float from_bits(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

/* The moments of one strip, m <= STRIP long: sum, sum of |x|, sum of x^2, max |x|; apart from that, how many are 0 and not finite.
 * `absolute` is a float, for a double makes the pass a third slower, and scaled down so that 256 of the largest do not overflow. */
typedef struct { double sum, squares; float absolute; uint32_t top; int32_t zeros, bad; } Strip;

#define ADD(S, VALUE)                                   \
    do {                                                \
        float v_ = (VALUE);                             \
        uint32_t u_ = bits(v_) & 0x7fffffffu;           \
        (S).top = u_ > (S).top ? u_ : (S).top;          \
        (S).sum += v_;                                  \
        (S).absolute += fabsf(v_) * 0x1p-9f;            \
        (S).squares += (double)v_ * v_;                 \
    } while (0)

#define ADD_COUNTS(S, VALUE)                            \
    do {                                                \
        uint32_t k_ = bits(VALUE) & 0x7fffffffu;        \
        (S).zeros += k_ == 0;                           \
        (S).bad += k_ >= 0x7f800000u;                   \
    } while (0)

static inline void collect(const Strip *s, double *out) {
    out[0] += s->sum, out[1] += 0x1p9 * s->absolute, out[2] += s->squares;
    if (s->top > bits((float)out[3])) out[3] = from_bits(s->top);
    out[4] += s->zeros, out[5] += s->bad;
}

EVERY_CPU static void measure(const float *restrict x, int64_t n, double *restrict out) {
    for (int64_t i = 0; i < n; i += STRIP, x += STRIP) {
        int64_t m = n - i < STRIP ? n - i : STRIP;
        Strip s = {0};
        for (int64_t j = 0; j < m; j++) {
            ADD(s, x[j]);
            ADD_COUNTS(s, x[j]);
        }
        collect(&s, out);
    }
}

EVERY_CPU static void measure_update(const float *restrict w, float *restrict old, int64_t n, double *restrict weight,
                                     double *restrict update) {
    for (int64_t i = 0; i < n; i += STRIP, w += STRIP, old += STRIP) {
        int64_t m = n - i < STRIP ? n - i : STRIP;
        Strip of_weight = {0}, of_update = {0};
        for (int64_t j = 0; j < m; j++) {
            float now = w[j], change = now - old[j];
            old[j] = now;
            ADD(of_weight, now);
            ADD(of_update, change);
        }
        collect(&of_weight, weight);
        collect(&of_update, update);
    }
}

/* x: pointers to tensors (NULL: none); n: their sizes; out: tensors x 6 */
EXPORT void cifarlab_moments(const float *const *x, const int64_t *n, int64_t tensors, double *out) {
    memset(out, 0, sizeof(double) * MOMENTS * tensors);
    for (int64_t k = 0; k < tensors; k++)
        if (x[k]) measure(x[k], n[k], out + MOMENTS * k);
}

/* weight, update: tensors x 6 each, the counts left 0. Leaves the weights in `old`. Backwards: an optimizer has just written the last ones, and
 * they are still in the cache. */
EXPORT void cifarlab_update_moments(const float *const *w, float *const *old, const int64_t *n, int64_t tensors, double *weight,
                                    double *update) {
    memset(weight, 0, sizeof(double) * MOMENTS * tensors);
    memset(update, 0, sizeof(double) * MOMENTS * tensors);
    for (int64_t k = tensors; k-- > 0;) measure_update(w[k], old[k], n[k], weight + MOMENTS * k, update + MOMENTS * k);
}

EXPORT void cifarlab_copy(const float *const *w, float *const *old, const int64_t *n, int64_t tensors) {
    for (int64_t k = 0; k < tensors; k++) memcpy(old[k], w[k], sizeof(float) * n[k]);
}

/* How many entries share sign and exponent: out is tensors x 512, indexed by the nine leading bits. */
EXPORT void cifarlab_exponents(const float *const *x, const int64_t *n, int64_t tensors, int64_t *out) {
    memset(out, 0, sizeof(int64_t) * BINS * tensors);
    for (int64_t k = 0; k < tensors; k++) {
        if (!x[k]) continue;
        uint32_t lanes[4][BINS] = {{0}};  /* four: equal neighbours do not wait for each other's increment */
        int64_t i = 0;
        for (; i + 4 <= n[k] && i < UINT32_MAX; i += 4)
            for (int lane = 0; lane < 4; lane++) lanes[lane][bits(x[k][i + lane]) >> 23]++;
        for (; i < n[k]; i++) out[BINS * k + (bits(x[k][i]) >> 23)]++;
        for (int bin = 0; bin < BINS; bin++)
            for (int lane = 0; lane < 4; lane++) out[BINS * k + bin] += lanes[lane][bin];
    }
}
