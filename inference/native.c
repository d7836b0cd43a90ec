/* The forward pass of gpt.py on a CPU and the choice of a token, for generation. Weights are fp32 or bf16, everything else is fp32.
 *
 * A step with one sequence takes as long as reading the weights once; a step with many is bound by the products. PyTorch is slower at both:
 * one call per op and layer takes as long as reading the weights, bf16 products without bf16 instructions reach a hundredth of the fp32
 * rate, and products with few rows reach half of it.
 *
 * The tokens of a pass are a flat list. Each has its row in the KV cache and its position there, so prompts and single steps need no
 * separate code. The result of a token does not depend on the other tokens, bit for bit: every output is one sum along K in a fixed order,
 * for any number of rows.
 *
 * native.py compiles this file (cc -O3 -march=native), fills the two structs below and checks shapes and dtypes; `forward` checks the indices.
 * It needs GCC or Clang.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

/* FMA(a, b, c) = a · b + c. Intrinsics, because GCC on AMD fuses `a * b + c` in some loops only, and the results round differently. */
#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#define FMA _mm512_fmadd_ps
#elif defined(__FMA__)
#include <immintrin.h>
#define LANES 8
#define FMA _mm256_fmadd_ps
#elif defined(__aarch64__)
#include <arm_neon.h>
#define LANES 4
#define FMA(a, b, c) ((vec)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#else
#define LANES 8
#define FMA(a, b, c) ((a) * (b) + (c)) /* two roundings everywhere: -ffp-contract=off */
#endif
/* Forces v into a register. Otherwise GCC reads it from memory in each multiply-add, and the reads are the bottleneck. Without AVX a vec does
 * not fit a register. */
#ifdef __AVX__
#define IN_REGISTER(v) __asm__("" : "+v"(v))
#else
#define IN_REGISTER(v) (void)0
#endif
#define PAD(n) (((n) + LANES - 1) / LANES * LANES)
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

enum {
    TILE_ROWS = LANES == 16 ? 6 : 3, /* × TILE_OUT sums fill the registers: 12 multiply-adds for 7 loads on AVX2 */
    TILE_OUT = 4,   /* rows of weights per tile; in fp32 they and the tile's rows of x fit the L1 cache */
    STREAMS = 6,    /* rows of weights that are read concurrently for a single row of x */
    AHEAD = 8,      /* positions that attention prefetches in the KV cache */
    ROW_BLOCK = 64, /* rows of x that stay in the L2 cache while all weights are read */
};

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float vec8 __attribute__((vector_size(32)));
typedef float vec4 __attribute__((vector_size(16)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

typedef struct {
    const float *attention_norm, *mlp_norm, *q_norm, *k_norm;  /* q_norm, k_norm: NULL without QK-norm */
    const void *qkv, *attention_out, *gate_up, *mlp_out;       /* (outputs, inputs), row after row */
} Layer;

typedef struct {
    int64_t n_layer, n_head, n_kv_head, head_dim, width, mlp_width, vocab_size, context, window;  /* window 0: none */
    int64_t is_bf16;  /* of embedding, head and the matrices */
    float eps;
    const void *embedding, *head;
    const float *norm, *cos, *sin;  /* cos, sin: (context, head_dim / 2) */
    const Layer *layers;
} Model;

/* --- y = x Wᵀ ---------------------------------------------------------------------------------------------------------------------- */

/* Convert `rows` consecutive rows of K weights to fp32 rows of PAD(K), padded with zeros. The sequential read suits the hardware prefetcher. */
static void unpack(float *restrict panel, const void *w, int64_t first, int64_t rows, int64_t k, int is_bf16) {
    for (int64_t r = 0; r < rows; r++, panel += PAD(k)) {
        int64_t j = 0;
        if (is_bf16) {
            const uint16_t *p = (const uint16_t *)w + (first + r) * k;
            for (; j + LANES <= k; j += LANES) {
                words bits = __builtin_convertvector(*(const halves *)(p + j), words) << 16;
                memcpy(panel + j, &bits, sizeof bits);
            }
            for (; j < k; j++) {
                uint32_t bits = (uint32_t)p[j] << 16;
                memcpy(panel + j, &bits, 4);
            }
        } else {
            memcpy(panel, (const float *)w + (first + r) * k, 4 * k);
            j = k;
        }
        for (; j < PAD(k); j++) panel[j] = 0;
    }
}

/* The sum of the lanes: add the halves until four are left, then (0 + 2) + (1 + 3). */
static inline vec4 quarters(vec x) {
#if LANES == 4
    return x;
#else
#if LANES == 16
    vec8 a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    vec8 a = x;
#endif
    return __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
#endif
}

static inline float total(vec x) {
    vec4 a = quarters(x);
    return (a[0] + a[2]) + (a[1] + a[3]);
}

/* `total` of four vectors, with the same bits and fewer instructions. */
static inline vec4 totals(const vec x[4]) {
    vec4 a = quarters(x[0]), b = quarters(x[1]), c = quarters(x[2]), d = quarters(x[3]);
    vec4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7); /* a02 b02 a13 b13 */
    vec4 cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

/* Σ a_i b_i. Written with vectors, because a compiler's order of summation may depend on the addresses. */
static inline float dot(const float *a, const float *b, int64_t n) {
    vec sum = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sum = FMA(*(const vec *)(a + i), *(const vec *)(b + i), sum);
    float rest = 0;
    for (; i < n; i++) rest += a[i] * b[i];
    return total(sum) + rest;
}

/* m × n sums along K for rows of x and of w that are kp apart. The callers pass constants for m and n, so the loops unroll and the sums stay
 * in registers. */
static inline __attribute__((always_inline)) void tile(int m, int n, const float *x, const float *w, float *y, int64_t kp, int64_t ldy) {
    vec sum[TILE_ROWS][TILE_OUT];
    for (int i = 0; i < m; i++)
        for (int o = 0; o < n; o++) sum[i][o] = (vec){0};
    for (int64_t j = 0; j < kp; j += LANES) {
        vec xj[TILE_ROWS];
        for (int i = 0; i < m; i++) {
            xj[i] = *(const vec *)(x + i * kp + j);
            IN_REGISTER(xj[i]);
        }
        for (int o = 0; o < n; o++) {
            vec wj = *(const vec *)(w + o * kp + j);
            IN_REGISTER(wj);
            for (int i = 0; i < m; i++) sum[i][o] = FMA(xj[i], wj, sum[i][o]);
        }
    }
    for (int i = 0; i < m; i++) {
        if (n == TILE_OUT) {
            vec4 four = totals(sum[i]);
            memcpy(y + i * ldy, &four, sizeof four);
        } else {
            for (int o = 0; o < n; o++) y[i * ldy + o] = total(sum[i][o]);
        }
    }
}

#define TILE(m) (n == TILE_OUT ? tile(m, TILE_OUT, x, w, y, kp, ldy) : tile(m, 1, x, w, y, kp, ldy))

static inline __attribute__((always_inline)) void tile_of(int64_t m, int n, const float *x, const float *w, float *y, int64_t kp, int64_t ldy) {
    switch (m) {
#if LANES == 16
        case 6: TILE(6); break;
        case 5: TILE(5); break;
        case 4: TILE(4); break;
#endif
        case 3: TILE(3); break;
        case 2: TILE(2); break;
        default: TILE(1);
    }
}

/* m ≤ TILE_ROWS rows of x times n ≤ TILE_OUT rows of w. Not inlined: otherwise GCC runs out of registers. */
static __attribute__((noinline)) void tiles(int64_t m, int64_t n, const float *x, const float *w, float *y, int64_t kp, int64_t ldy) {
    if (n == TILE_OUT) tile_of(m, TILE_OUT, x, w, y, kp, ldy);
    else
        for (int64_t o = 0; o < n; o++) tile_of(m, 1, x, w + o * kp, y + o, kp, ldy);
}

/* The result of a tile for one row of x and n rows of W, `apart` rows from each other, without unpacking W: for a single token that takes as
 * long as the sum. */
static inline __attribute__((always_inline)) void row(float *y, const float *x, const void *w, int64_t first, int64_t apart, const int n, int64_t k, const int is_bf16) {
    vec sum[STREAMS];
    for (int o = 0; o < n; o++) sum[o] = (vec){0};
    const int bytes = is_bf16 ? 2 : 4;
    const char *p = (const char *)w + first * k * bytes;
    int64_t j = 0, stride = apart * k * bytes;
    for (; j + LANES <= k; j += LANES) {
        vec xj = *(const vec *)(x + j);
        for (int o = 0; o < n; o++) {
            const char *at = p + o * stride + j * bytes;
            vec wj;
            if (is_bf16) {
                words bits = __builtin_convertvector(*(const halves *)at, words) << 16;
                wj = (vec)bits;
            } else {
                wj = *(const vec *)at;
            }
            sum[o] = FMA(xj, wj, sum[o]);
        }
    }
    if (j < k) {
        for (int o = 0; o < n; o++) {
            float end[LANES] = {0};
            unpack(end, p + o * stride + j * bytes, 0, 1, k - j, is_bf16);
            sum[o] = FMA(*(const vec *)(x + j), *(const vec *)end, sum[o]);
        }
    }
    for (int o = 0; o < n; o++) y[first + o * apart] = total(sum[o]);
}

/* Reads W at several places concurrently: each sum waits for its last multiply-add, and several streams of memory are faster than one. */
static inline __attribute__((always_inline)) void one_row(float *y, const float *x, const void *w, int64_t n_out, int64_t k, const int is_bf16) {
    int64_t part = n_out / STREAMS;
#pragma omp for schedule(static) nowait
    for (int64_t o = 0; o < part; o++) row(y, x, w, o, part, STREAMS, k, is_bf16);
#pragma omp for schedule(static)
    for (int64_t o = STREAMS * part; o < n_out; o++) row(y, x, w, o, 0, 1, k, is_bf16);
}

/* y (n, n_out) = x (n, k) Wᵀ for W (n_out, k); rows of x are PAD(k) apart and padded with zeros. All threads call it together. */
static void linear(float *y, const float *x, const void *w, int64_t n, int64_t n_out, int64_t k, int is_bf16, float *panels) {
    if (n == 1) {
        if (is_bf16) one_row(y, x, w, n_out, k, 1);
        else one_row(y, x, w, n_out, k, 0);
        return;
    }
    int64_t kp = PAD(k), n_panel = (n_out + TILE_OUT - 1) / TILE_OUT, bytes = k * (is_bf16 ? 2 : 4);
    const int is_ready = !is_bf16 && k == kp;
    for (int64_t start = 0; start < n; start += ROW_BLOCK) {
        int64_t end = MIN(n, start + ROW_BLOCK), n_tile = (end - start + TILE_ROWS - 1) / TILE_ROWS;
#pragma omp for schedule(static)
        for (int64_t p = 0; p < n_panel; p++) {
            int64_t first = p * TILE_OUT, n_row = MIN(TILE_OUT, n_out - first);
            const float *panel = (const float *)w + first * k;
            if (!is_ready) {
                float *own = panels + THREAD * TILE_OUT * kp;
                unpack(own, w, first, n_row, k, is_bf16);
                panel = own;
            }
            /* prefetch the next panel into the L2 cache */
            const char *next = (const char *)w + (first + n_row) * bytes;
            int64_t next_bytes = MIN(TILE_OUT, n_out - first - n_row) * bytes, share = (next_bytes / n_tile + 63) / 64 * 64;
            for (int64_t i = start; i < end; i += TILE_ROWS) {
                for (int64_t b = (i - start) / TILE_ROWS * share, stop = MIN(b + share, next_bytes); b < stop; b += 64)
                    __builtin_prefetch(next + b, 0, 2);
                tiles(MIN(TILE_ROWS, end - i), n_row, x + i * kp, panel, y + i * n_out + first, kp, n_out);
            }
        }
    }
}

/* --- The other ops ----------------------------------------------------------------------------------------------------------------- */

/* y = x / √(mean x² + eps) · weight over n entries; y may be x. */
static void rms_norm(float *y, const float *x, const float *weight, int64_t n, float eps) {
    float scale = 1 / sqrtf(dot(x, x, n) / n + eps);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
}

/* x += delta (unless NULL); h = rms_norm(x), padded with zeros. All threads call it together. */
static void add_norm(float *h, float *x, const float *delta, const float *weight, int64_t n, int64_t width, float eps) {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; i++) {
        float *xi = x + i * width, *hi = h + i * PAD(width);
        if (delta)
            for (int64_t j = 0; j < width; j++) xi[j] += delta[i * width + j];
        rms_norm(hi, xi, weight, width, eps);
        for (int64_t j = width; j < PAD(width); j++) hi[j] = 0;
    }
}

static void rotate(float *x, const float *cos, const float *sin, int64_t half) {
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

/* Prefetch d floats of a later position in the KV cache; the stride is too large for the hardware prefetcher. */
static inline void prefetch(const float *p, int64_t d) {
    for (int64_t i = 0; i < d; i += 16) __builtin_prefetch(p + i);
}

/* out = Σ_j softmax_j(q · k_j / √D) v_j over the keys lo … hi − 1, which are `stride` apart. */
static void attend(float *restrict out, const float *q, const float *k, const float *v, int64_t lo, int64_t hi, int64_t d, int64_t stride, float *restrict score) {
    float scale = 1 / sqrtf(d), top = -INFINITY, sum = 0;
    for (int64_t j = lo; j < hi; j++) {
        prefetch(k + (j + AHEAD) * stride, d);
        float s = dot(q, k + j * stride, d) * scale;
        score[j - lo] = s;
        top = MAX(top, s);
    }
    for (int64_t i = 0; i < d; i++) out[i] = 0;
    for (int64_t j = lo; j < hi; j++) {
        const float *vj = v + j * stride;
        prefetch(vj + AHEAD * stride, d);
        float p = expf(score[j - lo] - top);
        sum += p;
#pragma omp simd
        for (int64_t i = 0; i < d; i++) out[i] += p * vj[i];
    }
    for (int64_t i = 0; i < d; i++) out[i] /= sum;
}

/* --- One pass ---------------------------------------------------------------------------------------------------------------------- */

/* Floats of scratch that `forward` needs for n tokens. */
int64_t scratch_size(const Model *m, int64_t n, int64_t capacity, int64_t n_thread) {
    int64_t heads = m->n_head * m->head_dim, all = heads + 2 * m->n_kv_head * m->head_dim;
    int64_t k = MAX(MAX(m->width, m->mlp_width), heads);
    return n * (3 * PAD(m->width) + all + PAD(heads) + 2 * m->mlp_width + PAD(m->mlp_width)) + n_thread * (TILE_OUT * PAD(k) + capacity);
}

/* Bytes of the two structs, which native.py compares with its own. */
int64_t struct_sizes(void) { return sizeof(Model) * 10000 + sizeof(Layer); }

/* Write n tokens into the KV cache and compute the logits of some of them. Returns NULL, or what is out of range. */
const char *forward(
    const Model *m,
    int64_t n,
    const int64_t *tokens,     /* (n,) */
    const int64_t *rows,       /* (n,) of the cache */
    const int64_t *positions,  /* (n,); earlier positions are in the cache or earlier in this list */
    float *cache,              /* (n_layer, 2, slots, capacity, n_kv_head, head_dim) */
    int64_t slots,
    int64_t capacity,
    int64_t n_last,
    const int64_t *last,  /* (n_last,) indices into the n tokens, ascending */
    float *logits,        /* (n_last, vocab_size) */
    float *scratch,
    int64_t n_thread
) {
    if (n < 1 || n_last < 0 || n_last > n || n_thread < 1) return "sizes";
    if (capacity > m->context) return "capacity";
    for (int64_t i = 0; i < n; i++) {
        if (tokens[i] < 0 || tokens[i] >= m->vocab_size) return "tokens";
        if (rows[i] < 0 || rows[i] >= slots) return "rows";
        if (positions[i] < 0 || positions[i] >= capacity) return "positions";
    }
    for (int64_t i = 0; i < n_last; i++)
        if (last[i] < (i ? last[i - 1] + 1 : 0) || last[i] >= n) return "last";

    const int64_t d = m->head_dim, half = d / 2, width = m->width, n_kv = m->n_kv_head, stride = n_kv * d;
    const int64_t heads = m->n_head * d, all = heads + 2 * stride, group = m->n_head / n_kv;
    float *x = scratch, *h = x + n * PAD(width), *delta = h + n * PAD(width), *qkv = delta + n * PAD(width);
    float *a = qkv + n * all, *gate_up = a + n * PAD(heads), *mlp = gate_up + n * 2 * m->mlp_width;
    float *panels = mlp + n * PAD(m->mlp_width), *scores = panels + n_thread * TILE_OUT * PAD(MAX(MAX(width, m->mlp_width), heads));

#pragma omp parallel num_threads(n_thread)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i++) unpack(h + i * PAD(width), m->embedding, tokens[i], 1, width, m->is_bf16);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i++) memcpy(x + i * width, h + i * PAD(width), 4 * width);

        for (int64_t l = 0; l < m->n_layer; l++) {
            const Layer *w = m->layers + l;
            float *k = cache + 2 * l * slots * capacity * stride, *v = k + slots * capacity * stride;
            add_norm(h, x, l ? delta : 0, w->attention_norm, n, width, m->eps);
            linear(qkv, h, w->qkv, n, all, width, m->is_bf16, panels);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < n; i++) {
                const float *cos = m->cos + positions[i] * half, *sin = m->sin + positions[i] * half;
                for (int64_t head = 0; head < m->n_head + n_kv; head++) {
                    float *p = qkv + i * all + head * d;
                    if (w->q_norm) rms_norm(p, p, head < m->n_head ? w->q_norm : w->k_norm, d, m->eps);
                    rotate(p, cos, sin, half);
                }
                int64_t at = (rows[i] * capacity + positions[i]) * stride;
                memcpy(k + at, qkv + i * all + heads, 4 * stride);
                memcpy(v + at, qkv + i * all + heads + stride, 4 * stride);
                for (int64_t j = heads; j < PAD(heads); j++) a[i * PAD(heads) + j] = 0;
            }
#pragma omp for collapse(2) schedule(dynamic)
            for (int64_t i = 0; i < n; i++)
                for (int64_t head = 0; head < m->n_head; head++) {
                    int64_t hi = positions[i] + 1, lo = m->window ? MAX(0, hi - m->window) : 0;
                    int64_t at = rows[i] * capacity * stride + head / group * d;
                    attend(a + i * PAD(heads) + head * d, qkv + i * all + head * d, k + at, v + at, lo, hi, d, stride, scores + THREAD * capacity);
                }
            linear(delta, a, w->attention_out, n, width, heads, m->is_bf16, panels);

            add_norm(h, x, delta, w->mlp_norm, n, width, m->eps);
            linear(gate_up, h, w->gate_up, n, 2 * m->mlp_width, width, m->is_bf16, panels);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < n; i++) {
                const float *gate = gate_up + i * 2 * m->mlp_width, *up = gate + m->mlp_width;
                float *out = mlp + i * PAD(m->mlp_width);
                for (int64_t j = 0; j < m->mlp_width; j++) out[j] = gate[j] / (1 + expf(-gate[j])) * up[j];
                for (int64_t j = m->mlp_width; j < PAD(m->mlp_width); j++) out[j] = 0;
            }
            linear(delta, mlp, w->mlp_out, n, width, m->mlp_width, m->is_bf16, panels);
        }
        /* Keep only the tokens whose logits are needed. They ascend, so none is overwritten before it is moved. */
#pragma omp single
        for (int64_t i = 0; i < n_last; i++) {
            memmove(x + i * width, x + last[i] * width, 4 * width);
            memmove(delta + i * width, delta + last[i] * width, 4 * width);
        }
        add_norm(h, x, delta, m->norm, n_last, width, m->eps);
        linear(logits, h, m->head, n_last, m->vocab_size, width, m->is_bf16, panels);
    }
    return 0;
}

/* The index of the first maximum of each row of n_col numbers, for rows that are `stride` apart; n_col if all are NaN. */
void argmax(const float *x, int64_t n_row, int64_t n_col, int64_t stride, int64_t *index, int64_t n_thread) {
#pragma omp parallel for schedule(static) num_threads(n_thread)
    for (int64_t i = 0; i < n_row; i++) {
        const float *xi = x + i * stride;
        vec top = {0};
        top -= INFINITY;
        int64_t j = 0;
        for (; j + LANES <= n_col; j += LANES) {
            vec xj = *(const vec *)(xi + j);
            words is_more = (words)(xj > top);
            top = (vec)(((words)xj & is_more) | ((words)top & ~is_more));
        }
        float most = -INFINITY;
        for (int lane = 0; lane < LANES; lane++) most = MAX(most, top[lane]);
        for (; j < n_col; j++)
            if (xi[j] > most) most = xi[j]; /* not MAX, which returns NaN */
        for (j = 0; j < n_col && xi[j] != most; j++) {}
        index[i] = j;
    }
}

/* --- the choice of a token ----------------------------------------------------------------------------------------------------------- */

/* A score and a column as one number: larger for a larger score, and for the earlier column of equal ones. */
static inline uint64_t ranked(float score, int64_t column) {
    uint32_t bits;
    score += 0.0f; /* -0 and 0 are equal */
    memcpy(&bits, &score, 4);
    bits = bits >> 31 ? ~bits : bits | 0x80000000u;
    return (uint64_t)bits << 32 | (0xffffffffu - (uint32_t)column);
}

static inline int64_t column_of(uint64_t rank) { return 0xffffffffu - (uint32_t)rank; }

static int descending(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x < y) - (x > y);
}

/* Put `value` in the place of the smallest of a heap of k. */
static void replace_smallest(float *heap, int64_t k, float value) {
    int64_t i = 0;
    for (int64_t child; (child = 2 * i + 1) < k; i = child) {
        if (child + 1 < k && heap[child + 1] < heap[child]) child++;
        if (value <= heap[child]) break;
        heap[i] = heap[child];
    }
    heap[i] = value;
}

enum { BLOCK = 4 * LANES }; /* columns that are compared with the k-th largest at once */

static inline float largest(const float *x) {
    vec top = *(const vec *)x;
    for (int i = 1; i < BLOCK / LANES; i++) {
        vec xi = *(const vec *)(x + i * LANES);
        words is_more = (words)(xi > top);
        top = (vec)(((words)xi & is_more) | ((words)top & ~is_more));
    }
    float most = top[0];
    for (int lane = 1; lane < LANES; lane++) most = MAX(most, top[lane]);
    return most;
}

/* One column of each row of n_col logits x, for rows that are `stride` apart, by the filters of sampling.py: the k largest and those equal to
 * the k-th, then top_p, then min_p. u[i] in [0, 1) chooses in row i. A row that holds NaN or infinity gets -1. k < n_col.
 * scores: n_col floats, heap: k floats, kept: n_col numbers of scratch. */
void draw(const float *x, int64_t n_row, int64_t n_col, int64_t stride, float temperature, int64_t k, double top_p, double min_p,
          const double *u, int64_t *chosen, float *scores, float *heap, uint64_t *kept) {
    for (int64_t row = 0; row < n_row; row++) {
        const float *xi = x + row * stride;
        int is_finite = 1;
        for (int64_t j = 0; j < n_col; j++) {
            scores[j] = xi[j] / temperature;
            is_finite &= xi[j] - xi[j] == 0;
        }
        chosen[row] = -1;
        if (!is_finite) continue;

        for (int64_t j = 0; j < k; j++) heap[j] = -INFINITY;
        for (int64_t j = 0; j < n_col; j += BLOCK) {
            if (j + BLOCK <= n_col && !(largest(scores + j) > heap[0])) continue;
            for (int64_t c = j; c < MIN(j + BLOCK, n_col); c++)
                if (scores[c] > heap[0]) replace_smallest(heap, k, scores[c]);
        }
        int64_t n = 0;
        for (int64_t j = 0; j < n_col; j += BLOCK) {
            if (j + BLOCK <= n_col && largest(scores + j) < heap[0]) continue;
            for (int64_t c = j; c < MIN(j + BLOCK, n_col); c++)
                if (scores[c] >= heap[0]) kept[n++] = ranked(scores[c], c);
        }
        qsort(kept, n, sizeof *kept, descending);

        double top = scores[column_of(kept[0])], all = 0, rest = 0, before = 0;
        for (int64_t i = 0; i < n; i++) all += exp(scores[column_of(kept[i])] - top);
        for (int64_t i = 0; i < n; i++) { /* more likely ones come first, so the filters keep the first ones */
            double p = exp(scores[column_of(kept[i])] - top) / all;
            if (i && ((top_p < 1 && rest >= top_p) || p * all < min_p)) n = i; /* all: 1 / the highest probability */
            else rest += p;
        }
        int64_t i = 0;
        for (; i < n - 1; i++) {
            before += exp(scores[column_of(kept[i])] - top) / all;
            if (before > u[row] * rest) break;
        }
        chosen[row] = column_of(kept[i]);
    }
}
