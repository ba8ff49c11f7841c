/* Six moments of float arrays in one pass over memory, and a pass over weights that measures their change too.
 *
 * Plain C without Python's headers: built when cifarlab is installed where a compiler is at hand, loaded by moments.py, which has
 * the same in torch operations for everything else. Tensors are cut into blocks, which threads take one after the other; every
 * block is summed in its own order and the blocks in theirs, so the result does not depend on threads or on what ran before.
 * Compiled with reassociation, so that sums become SIMD; NaN and Inf are found by their bits, which no such option can touch.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#define EVERY_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EVERY_CPU
#endif
#if defined(__SSE__)
#include <xmmintrin.h>
#endif
#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

enum { STRIP = 256, MOMENTS = 6, BINS = 512 };  /* a strip's sums are kept in registers */

static inline uint32_t bits(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
static inline float from_bits(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

/* The sums of one strip, m <= STRIP long: of x, |x| and x^2, the largest and the least |x|. In floats, for with doubles the passes
 * are bound by arithmetic and not by memory. */
typedef struct { float sum, absolute, squares; uint32_t top, least; } Strip;

#define ADD(S, VALUE)                                   \
    do {                                                \
        float v_ = (VALUE);                             \
        uint32_t u_ = bits(v_) & 0x7fffffffu;           \
        (S).top = u_ > (S).top ? u_ : (S).top;          \
        (S).sum += v_;                                  \
        (S).absolute += from_bits(u_);                  \
        (S).squares += v_ * v_;                         \
    } while (0)

/* The same of x, or x - old, in doubles: where squares leave the range of floats, something is not finite, or the entries are so
 * alike that their variance, which is made of the difference of two sums, would be rounded away. */
static void measure_exactly(const float *x, const float *old, int64_t m, double *out) {
    double sum = 0, absolute = 0, squares = 0;
    for (int64_t j = 0; j < m; j++) {
        float v = old ? x[j] - old[j] : x[j];
        sum += v, absolute += fabs((double)v), squares += (double)v * v;
    }
    out[0] += sum, out[1] += absolute, out[2] += squares;
}

static inline void collect(const Strip *s, const float *x, const float *old, int64_t m, double *out) {
    if (s->top > bits((float)out[3])) out[3] = from_bits(s->top);
    if (s->top - bits(0x1p-50f) > bits(0x1p50f) - bits(0x1p-50f) || s->sum * s->sum > 0.75f * m * s->squares) {
        if (s->top) measure_exactly(x, old, m, out);
    } else {
        out[0] += s->sum, out[1] += s->absolute, out[2] += s->squares;
    }
}

/* How many are 0, and not finite: of strips that have such, as to count along takes a fifth longer than to find the smallest. */
static inline void count(const float *x, int64_t m, double *out) {
    int32_t zeros = 0, bad = 0;
    for (int64_t j = 0; j < m; j++) {
        uint32_t u = bits(x[j]) & 0x7fffffffu;
        zeros += u == 0;
        bad += u >= 0x7f800000u;
    }
    out[4] += zeros, out[5] += bad;
}

static inline void measure_strip(const float *restrict x, int64_t m, double *restrict out) {
    Strip s = {.least = UINT32_MAX};
    for (int64_t j = 0; j < m; j++) {
        uint32_t u = bits(x[j]) & 0x7fffffffu;
        ADD(s, x[j]);
        s.least = u < s.least ? u : s.least;
    }
    collect(&s, x, NULL, m, out);
    if (s.least == 0 || s.top >= 0x7f800000u) count(x, m, out);
}

EVERY_CPU static void measure(const float *restrict x, int64_t n, double *restrict out) {
    for (int64_t i = 0; i < n; i += STRIP) measure_strip(x + i, n - i < STRIP ? n - i : STRIP, out);
}

/* A copy past the caches, which the weights and their gradients need more: it is read once, after the optimizer. */
static inline void stream(const float *restrict x, float *restrict old, int64_t n) {
    int64_t i = 0;
#if defined(__SSE__)
    if ((uintptr_t)old % 16 == 0)
        for (; i + 4 <= n; i += 4) _mm_stream_ps(old + i, _mm_loadu_ps(x + i));
#endif
    memcpy(old + i, x + i, sizeof(float) * (n - i));
}

/* In turns, so that one waits for memory while the other computes. */
EVERY_CPU static void measure_and_copy(const float *restrict x, int64_t n, double *restrict out, const float *restrict w,
                                       float *restrict old) {
    for (int64_t i = 0; i < n; i += STRIP) {
        int64_t m = n - i < STRIP ? n - i : STRIP;
        if (x) measure_strip(x + i, m, out);
        stream(w + i, old + i, m);
    }
#if defined(__SSE__)
    _mm_sfence();
#endif
}

EVERY_CPU static void measure_update(const float *restrict w, float *restrict old, int64_t n, int keeps, double *restrict weight,
                                     double *restrict update) {
    for (int64_t i = 0; i < n; i += STRIP, w += STRIP, old += STRIP) {
        int64_t m = n - i < STRIP ? n - i : STRIP;
        Strip of_weight = {0}, of_update = {0};
        for (int64_t j = 0; j < m; j++) {
            float now = w[j], change = now - old[j];
            ADD(of_weight, now);
            ADD(of_update, change);
        }
        collect(&of_weight, w, NULL, m, weight);
        collect(&of_update, w, old, m, update);
        if (keeps) memcpy(old, w, sizeof(float) * m);
    }
}

typedef struct { int64_t tensor, start, size; } Block;

/* What is done to each block. `launch` is the GOMP_parallel of the OpenMP that torch uses, or NULL: its threads are awake already,
 * for the optimizer has just used them, where threads of our own would have to wait for a core on which torch's are spinning. */
typedef void (*Launch)(void (*)(void *), void *, unsigned, unsigned);
typedef struct Job Job;
struct Job {
    void (*run)(const Job *, int64_t);
    const Block *blocks;
    int64_t num_blocks, taken;
    const float *const *x, *const *w;
    float *const *old;
    double *first, *second;  /* blocks x 6 */
    int keeps;               /* whether `old` becomes the weights */
    unsigned control;        /* of the floating-point unit: whether denormals count as 0 */
};

static void take_blocks(void *argument) {
    Job *job = argument;
#if defined(__SSE__)
    unsigned before = _mm_getcsr();
    _mm_setcsr(job->control);
#endif
#if defined(__GNUC__)
    for (int64_t k; (k = __atomic_fetch_add(&job->taken, 1, __ATOMIC_RELAXED)) < job->num_blocks;) job->run(job, k);
#else
    while (job->taken < job->num_blocks) job->run(job, job->taken++);
#endif
#if defined(__SSE__)
    _mm_setcsr(before);
#endif
}

static void run(Job *job, Launch launch, int64_t threads) {
#if defined(__SSE__)
    job->control = _mm_getcsr();
#endif
#if defined(__GNUC__)
    if (launch && threads > 1) {
        launch(take_blocks, job, (unsigned)threads, 0);
        return;
    }
#endif
    take_blocks(job);
}

static void gather(const Job *job, const double *of_blocks, int64_t tensors, double *out) {
    memset(out, 0, sizeof(double) * MOMENTS * tensors);
    for (int64_t k = 0; k < job->num_blocks; k++) {
        const double *from = of_blocks + MOMENTS * k;
        double *to = out + MOMENTS * job->blocks[k].tensor;
        for (int i = 0; i < MOMENTS; i++)
            if (i != 3) to[i] += from[i];
            else if (bits((float)from[i]) > bits((float)to[i])) to[i] = from[i];  /* by its bits a NaN is the largest */
    }
}

static void moments_of_block(const Job *job, int64_t k) {
    const Block *b = job->blocks + k;
    double *out = job->first + MOMENTS * k;
    memset(out, 0, sizeof(double) * MOMENTS);
    if (job->x[b->tensor]) measure(job->x[b->tensor] + b->start, b->size, out);
}

/* Backwards: an optimizer has just written the last ones, and they are still in the cache. */
static void update_moments_of_block(const Job *job, int64_t k) {
    k = job->num_blocks - 1 - k;
    const Block *b = job->blocks + k;
    double *weight = job->first + MOMENTS * k, *update = job->second + MOMENTS * k;
    memset(weight, 0, sizeof(double) * MOMENTS);
    memset(update, 0, sizeof(double) * MOMENTS);
    measure_update(job->w[b->tensor] + b->start, job->old[b->tensor] + b->start, b->size, job->keeps, weight, update);
}

static void moments_and_copy_of_block(const Job *job, int64_t k) {
    const Block *b = job->blocks + k;
    const float *x = job->x[b->tensor];
    double *out = job->first + MOMENTS * k;
    memset(out, 0, sizeof(double) * MOMENTS);
    measure_and_copy(x ? x + b->start : NULL, b->size, out, job->w[b->tensor] + b->start, job->old[b->tensor] + b->start);
}

/* x: pointers to tensors (NULL: none); blocks: of all tensors in their order; room: blocks x 6; out: tensors x 6. Where `w` is not
 * NULL, these tensors are copied into `old`. Returns how many tensors have entries that are not finite. */
EXPORT int64_t cifarlab_gradient_moments(Launch launch, int64_t threads, const Block *blocks, int64_t num_blocks, int64_t tensors,
                                         const float *const *x, const float *const *w, float *const *old, double *room,
                                         double *out) {
    Job job = {.run = w ? moments_and_copy_of_block : moments_of_block, .blocks = blocks, .num_blocks = num_blocks, .x = x, .w = w,
               .old = old, .first = room};
    run(&job, launch, threads);
    gather(&job, room, tensors, out);
    int64_t bad = 0;
    for (int64_t k = 0; k < tensors; k++) bad += out[MOMENTS * k + 5] > 0;
    return bad;
}

/* room: 2 x blocks x 6; out: 2 x tensors x 6, of the weights and of their change, the counts left 0. keeps: leaves the weights in
 * `old`. */
EXPORT void cifarlab_weight_moments(Launch launch, int64_t threads, const Block *blocks, int64_t num_blocks, int64_t tensors,
                                    const float *const *w, float *const *old, int64_t keeps, double *room, double *out) {
    Job job = {.run = update_moments_of_block, .blocks = blocks, .num_blocks = num_blocks, .w = w, .old = old, .first = room,
               .second = room + MOMENTS * num_blocks, .keeps = keeps != 0};
    run(&job, launch, threads);
    gather(&job, job.first, tensors, out);
    gather(&job, job.second, tensors, out + MOMENTS * tensors);
}

/* Whether two copies of the tensors differ in a bit, as far as one looks: at tensors of at most `small` entries whole, at every
 * `every`th strip of the others, from strip `first` of them all. */
EXPORT int64_t cifarlab_differ(const float *const *x, const float *const *y, const int64_t *n, int64_t tensors, int64_t small,
                               int64_t first, int64_t every) {
    int64_t strip = first;  /* of the large tensor to come */
    for (int64_t k = 0; k < tensors; k++) {
        if (n[k] <= small) {
            if (memcmp(x[k], y[k], sizeof(float) * n[k])) return 1;
            continue;
        }
        int64_t strips = (n[k] + STRIP - 1) / STRIP;
        for (; strip < strips; strip += every) {
            int64_t i = STRIP * strip, m = n[k] - i < STRIP ? n[k] - i : STRIP;
            if (memcmp(x[k] + i, y[k] + i, sizeof(float) * m)) return 1;
        }
        strip -= strips;
    }
    return 0;
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
