/* The ops that are bound by memory, on a CPU: forward and backward, fp32 or bf16 in memory, fp32 in registers.
 *
 * PyTorch's definition of such an op is four to ten calls, each of which goes through memory. Here every tensor is read once and written
 * once, rows of logits three times from the cache. The formulas are those of the op's Triton kernels, in the file of its name. The result
 * does not depend on the number of threads.
 *
 * cpu.py compiles this file (cc -O3 -march=native) and checks shapes, dtypes and strides. It needs GCC or Clang.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define PARALLEL _Pragma("omp parallel for num_threads(n_thread) schedule(static) if (n_thread > 1)")
#define SUM(names) _Pragma(SUM_TEXT(omp simd reduction(+ : names)))
#define SUM2(a, b) _Pragma(SUM_TEXT(omp simd reduction(+ : a, b)))
#define SUM_TEXT(...) #__VA_ARGS__
#define SIMD _Pragma("omp simd")
/* Sums are of parts of BLOCK entries: a long one of fp32 numbers of one sign loses digits. */
#define BLOCK 512
#define EACH_BLOCK(n) for (int64_t first = 0, last = (n) < BLOCK ? (n) : BLOCK; first < (n); first = last, last = (n) - last < BLOCK ? (n) : last + BLOCK)

/* Entry i of a tensor. Every loop exists for both dtypes: `bf16` is a constant after inlining. */
INLINE float get(const void *p, int64_t i, int bf16) {
    if (!bf16) return ((const float *)p)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)p)[i] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint16_t rounded(float value) {  /* to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint16_t high = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return value != value ? 0x7fc0 : high;
}

INLINE void put(void *p, int64_t i, float value, int bf16) {
    if (bf16) ((uint16_t *)p)[i] = rounded(value);
    else ((float *)p)[i] = value;
}

INLINE void *at(const void *p, int64_t i, int bf16) { return (char *)p + i * (bf16 ? 2 : 4); }

/* exp(x) to 2 ulp in [−87, 88.3], 0 below, infinite above: 2^n · exp(r), |r| ≤ ln 2 / 2, by the Taylor polynomial of degree 7. */
INLINE float exponential(float x) {
    int is_zero = x < -87.0f, is_infinite = x > 88.3f;
    x = is_infinite ? 88.0f : is_zero ? -87.0f : x; /* NaN stays */
    float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f; /* adding 1.5 · 2^23 rounds to an integer */
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;                      /* ln 2 in two parts */
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720, p = p * r + 1.0f / 120, p = p * r + 1.0f / 24, p = p * r + 1.0f / 6, p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    bits = (bits - 0x4b400000u + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return is_zero ? 0.0f : is_infinite ? INFINITY : p * power;
}

/* --- RMSNorm ------------------------------------------------------------------------------------------------------------------------ */

INLINE void norm_row(
    const void *restrict x, const void *restrict residual, const float *restrict w, void *restrict y, void *restrict sum, int64_t n,
    float eps, float offset, const int bf16
) {
    float square = 0;
    EACH_BLOCK(n) {
        float part = 0;
        if (residual) {
            SUM(part)
            for (int64_t i = first; i < last; i++) {
                put(sum, i, get(residual, i, bf16) + get(x, i, bf16), bf16);
                float v = get(sum, i, bf16); /* rounded */
                part += v * v;
            }
        } else {
            SUM(part)
            for (int64_t i = first; i < last; i++) part += get(x, i, bf16) * get(x, i, bf16);
        }
        square += part;
    }
    if (residual) x = sum;
    float rho = 1.0f / sqrtf(square / n + eps);
    if (w) {
        SIMD for (int64_t i = 0; i < n; i++) put(y, i, get(x, i, bf16) * rho * (w[i] + offset), bf16);
    } else {
        SIMD for (int64_t i = 0; i < n; i++) put(y, i, get(x, i, bf16) * rho, bf16);
    }
}

/* x, residual (NULL: none), y, sum (M, N); w (N,) fp32 or NULL. Strides are those of rows. */
void rms_norm(
    const void *x, const void *residual, const float *w, void *y, void *sum, int64_t n_rows, int64_t n, int64_t stride_x,
    int64_t stride_residual, float eps, float offset, int64_t bf16, int64_t n_thread
) {
    PARALLEL
    for (int64_t row = 0; row < n_rows; row++) {
        const void *px = at(x, row * stride_x, bf16), *pr = residual ? at(residual, row * stride_residual, bf16) : 0;
        void *py = at(y, row * n, bf16), *ps = residual ? at(sum, row * n, bf16) : 0;
        if (bf16) norm_row(px, pr, w, py, ps, n, eps, offset, 1);
        else norm_row(px, pr, w, py, ps, n, eps, offset, 0);
    }
}

INLINE void norm_row_backward(
    const void *restrict dy, const void *restrict dsum, const void *restrict x, const float *restrict w, void *restrict dx,
    float *restrict dw, int64_t n, float eps, float offset, const int bf16
) {
    float square = 0, dot = 0;
    EACH_BLOCK(n) {
        float part = 0, part_dot = 0;
        if (w) {
            SUM2(part, part_dot)
            for (int64_t i = first; i < last; i++) {
                float v = get(x, i, bf16);
                part += v * v;
                part_dot += get(dy, i, bf16) * (w[i] + offset) * v;
            }
        } else {
            SUM2(part, part_dot)
            for (int64_t i = first; i < last; i++) {
                float v = get(x, i, bf16);
                part += v * v;
                part_dot += get(dy, i, bf16) * v;
            }
        }
        square += part, dot += part_dot;
    }
    float rho = 1.0f / sqrtf(square / n + eps), factor = rho * rho * rho * dot / n;
    SIMD for (int64_t i = 0; i < n; i++) {
        float v = get(x, i, bf16), g = get(dy, i, bf16), d = rho * g * (w ? w[i] + offset : 1.0f) - factor * v;
        if (dw) dw[i] += g * v * rho;
        put(dx, i, dsum ? d + get(dsum, i, bf16) : d, bf16);
    }
}

/* The gradient of the normed tensor x, to which dsum (NULL: none) is added. dw (n_parts, N): sums over parts of the rows, or NULL. */
void rms_norm_backward(
    const void *dy, const void *dsum, const void *x, const float *w, void *dx, float *dw, int64_t n_rows, int64_t n, int64_t n_parts,
    int64_t stride_dy, int64_t stride_dsum, int64_t stride_x, float eps, float offset, int64_t bf16, int64_t n_thread
) {
    PARALLEL
    for (int64_t part = 0; part < n_parts; part++) {
        float *part_dw = dw ? dw + part * n : 0;
        if (dw) memset(part_dw, 0, n * sizeof(float));
        for (int64_t row = part * n_rows / n_parts; row < (part + 1) * n_rows / n_parts; row++) {
            const void *pdy = at(dy, row * stride_dy, bf16), *pds = dsum ? at(dsum, row * stride_dsum, bf16) : 0;
            const void *px = at(x, row * stride_x, bf16);
            void *pdx = at(dx, row * n, bf16);
            if (bf16) norm_row_backward(pdy, pds, px, w, pdx, part_dw, n, eps, offset, 1);
            else norm_row_backward(pdy, pds, px, w, pdx, part_dw, n, eps, offset, 0);
        }
    }
}

/* --- SwiGLU and GeGLU --------------------------------------------------------------------------------------------------------------- */

/* a(g) = g · σ, and its derivative: σ(g), or σ(2z) with z = √(2/π) (g + 0.044715 g³). */
INLINE float sigmoid(float g, int gelu) {
    float z = gelu ? 1.5957691216f * (g + 0.044715f * g * g * g) : g;
    return 1.0f / (1.0f + exponential(-z));
}

INLINE void glu_row(const void *restrict gate, const void *restrict up, void *restrict h, int64_t n, const int gelu, const int bf16) {
    SIMD for (int64_t i = 0; i < n; i++) {
        float g = get(gate, i, bf16);
        put(h, i, g * sigmoid(g, gelu) * get(up, i, bf16), bf16);
    }
}

INLINE void glu_row_backward(
    const void *restrict dh, const void *restrict gate, const void *restrict up, void *restrict dgate, void *restrict dup, int64_t n,
    const int gelu, const int bf16
) {
    SIMD for (int64_t i = 0; i < n; i++) {
        float g = get(gate, i, bf16), d = get(dh, i, bf16), s = sigmoid(g, gelu);
        float dz = gelu ? 1.5957691216f * (1 + 3 * 0.044715f * g * g) : 1.0f;
        put(dup, i, d * g * s, bf16);
        put(dgate, i, d * get(up, i, bf16) * (s + g * s * (1 - s) * dz), bf16);
    }
}

/* gate, up (M, N) with row strides; h (M, N). With dh: backward, to dgate and dup of row stride stride_d. */
void glu(
    const void *gate, const void *up, const void *dh, void *h, void *dgate, void *dup, int64_t n_rows, int64_t n, int64_t stride_gate,
    int64_t stride_up, int64_t stride_dh, int64_t stride_d, int64_t gelu, int64_t bf16, int64_t n_thread
) {
    PARALLEL
    for (int64_t row = 0; row < n_rows; row++) {
        const void *pg = at(gate, row * stride_gate, bf16), *pu = at(up, row * stride_up, bf16);
        if (dh) {
            const void *pd = at(dh, row * stride_dh, bf16);
            void *pdg = at(dgate, row * stride_d, bf16), *pdu = at(dup, row * stride_d, bf16);
            if (gelu && bf16) glu_row_backward(pd, pg, pu, pdg, pdu, n, 1, 1);
            else if (gelu) glu_row_backward(pd, pg, pu, pdg, pdu, n, 1, 0);
            else if (bf16) glu_row_backward(pd, pg, pu, pdg, pdu, n, 0, 1);
            else glu_row_backward(pd, pg, pu, pdg, pdu, n, 0, 0);
        } else {
            void *ph = at(h, row * n, bf16);
            if (gelu && bf16) glu_row(pg, pu, ph, n, 1, 1);
            else if (gelu) glu_row(pg, pu, ph, n, 1, 0);
            else if (bf16) glu_row(pg, pu, ph, n, 0, 1);
            else glu_row(pg, pu, ph, n, 0, 0);
        }
    }
}

/* --- Rotary embedding --------------------------------------------------------------------------------------------------------------- */

/* One head x (2 half + rest) to y; y may be x. */
INLINE void rotate(const void *x, void *y, const float *cos, const float *sin, float sign, int64_t half, int64_t rest, const int bf16) {
    SIMD for (int64_t i = 0; i < half; i++) {
        float a = get(x, i, bf16), b = get(x, half + i, bf16), c = cos[i], s = sign * sin[i];
        put(y, i, a * c - b * s, bf16);
        put(y, half + i, b * c + a * s, bf16);
    }
    if (rest && x != y) memcpy(at(y, 2 * half, bf16), at(x, 2 * half, bf16), rest * (bf16 ? 2 : 4));
}

/* q (B, T, H, D), k (B, T, H_kv, D) with three strides each, then those of the results; cos, sin (T_max, half) fp32; sign −1: backward.
 * positions: int64, stride_p between sequences, or NULL. */
void rope(
    const void *q, const void *k, void *q_out, void *k_out, const float *cos, const float *sin, const int64_t *positions,
    const int64_t *strides, int64_t n_batch, int64_t n_tokens, int64_t n_head, int64_t n_kv_head, int64_t half, int64_t rest,
    int64_t stride_p, float sign, int64_t bf16, int64_t n_thread
) {
    PARALLEL
    for (int64_t token = 0; token < n_batch * n_tokens; token++) {
        int64_t b = token / n_tokens, t = token % n_tokens, position = positions ? positions[b * stride_p + t] : t;
        const float *pc = cos + position * half, *ps = sin + position * half;
        for (int64_t head = 0; head < n_head + n_kv_head; head++) {
            int is_k = head >= n_head;
            const int64_t *in = strides + (is_k ? 3 : 0), *out = strides + (is_k ? 9 : 6);
            int64_t h = is_k ? head - n_head : head;
            const void *px = at(is_k ? k : q, b * in[0] + t * in[1] + h * in[2], bf16);
            void *py = at(is_k ? k_out : q_out, b * out[0] + t * out[1] + h * out[2], bf16);
            if (bf16) rotate(px, py, pc, ps, sign, half, rest, 1);
            else rotate(px, py, pc, ps, sign, half, rest, 0);
        }
    }
}

/* --- RMSNorm of the heads of q and k, then rotary embedding ------------------------------------------------------------------------- */

INLINE void norm_rotate(
    const void *restrict x, void *restrict y, const float *restrict w, const float *restrict cos, const float *restrict sin, int64_t half,
    int64_t rest, float eps, const int bf16
) {
    float square = 0;
    int64_t d = 2 * half + rest;
    SUM(square)
    for (int64_t i = 0; i < d; i++) square += get(x, i, bf16) * get(x, i, bf16);
    float rho = 1.0f / sqrtf(square / d + eps);
    SIMD for (int64_t i = 0; i < half; i++) {
        float a = get(x, i, bf16) * rho * w[i], b = get(x, half + i, bf16) * rho * w[half + i];
        put(y, i, a * cos[i] - b * sin[i], bf16);
        put(y, half + i, b * cos[i] + a * sin[i], bf16);
    }
    for (int64_t i = 2 * half; i < d; i++) put(y, i, get(x, i, bf16) * rho * w[i], bf16);
}

/* qkv (B, T, (H + 2 H_kv) D) with two strides, to q (B, T, H, D), k, v (B, T, H_kv, D), contiguous. weights: (2, D) fp32, of q and k. */
void qk_norm_rope(
    const void *qkv, const float *weights, const float *cos, const float *sin, const int64_t *positions, void *q, void *k, void *v,
    const int64_t *strides, int64_t n_batch, int64_t n_tokens, int64_t n_head, int64_t n_kv_head, int64_t half, int64_t rest,
    int64_t stride_p, float eps, int64_t bf16, int64_t n_thread
) {
    int64_t d = 2 * half + rest;
    PARALLEL
    for (int64_t token = 0; token < n_batch * n_tokens; token++) {
        int64_t b = token / n_tokens, t = token % n_tokens, position = positions ? positions[b * stride_p + t] : t;
        const float *pc = cos + position * half, *ps = sin + position * half;
        const void *px = at(qkv, b * strides[0] + t * strides[1], bf16);
        for (int64_t head = 0; head < n_head + n_kv_head; head++, px = at(px, d, bf16)) {
            int is_k = head >= n_head;
            void *py = is_k ? at(k, (token * n_kv_head + head - n_head) * d, bf16) : at(q, (token * n_head + head) * d, bf16);
            if (bf16) norm_rotate(px, py, weights + is_k * d, pc, ps, half, rest, eps, 1);
            else norm_rotate(px, py, weights + is_k * d, pc, ps, half, rest, eps, 0);
        }
        memcpy(at(v, token * n_kv_head * d, bf16), px, n_kv_head * d * (bf16 ? 2 : 4));
    }
}

/* g: fp32 scratch of one head, for the gradient rotated back. */
INLINE void norm_rotate_backward(
    const void *restrict dy, const void *restrict x, void *restrict dx, float *restrict dw, float *restrict g, const float *restrict w,
    const float *restrict cos, const float *restrict sin, int64_t half, int64_t rest, float eps, const int bf16
) {
    float square = 0, dot = 0;
    int64_t d = 2 * half + rest;
    SIMD for (int64_t i = 0; i < half; i++) {
        float a = get(dy, i, bf16), b = get(dy, half + i, bf16);
        g[i] = a * cos[i] + b * sin[i];
        g[half + i] = b * cos[i] - a * sin[i];
    }
    for (int64_t i = 2 * half; i < d; i++) g[i] = get(dy, i, bf16);
    SUM2(square, dot)
    for (int64_t i = 0; i < d; i++) {
        float v = get(x, i, bf16);
        square += v * v;
        dot += g[i] * w[i] * v;
    }
    float rho = 1.0f / sqrtf(square / d + eps), factor = rho * rho * rho * dot / d;
    SIMD for (int64_t i = 0; i < d; i++) {
        float v = get(x, i, bf16);
        dw[i] += g[i] * v * rho;
        put(dx, i, rho * g[i] * w[i] - factor * v, bf16);
    }
}

/* dq, dk, dv with three strides each, then the two of qkv; dqkv is contiguous. dw (n_parts, 3, D): sums over parts of the tokens for the
 * weights of q and k, and scratch. */
void qk_norm_rope_backward(
    const void *dq, const void *dk, const void *dv, const void *qkv, const float *weights, const float *cos, const float *sin,
    const int64_t *positions, void *dqkv, float *dw, const int64_t *strides, int64_t n_batch, int64_t n_tokens, int64_t n_head,
    int64_t n_kv_head, int64_t half, int64_t rest, int64_t n_parts, int64_t stride_p, float eps, int64_t bf16, int64_t n_thread
) {
    int64_t d = 2 * half + rest, n = n_batch * n_tokens;
    PARALLEL
    for (int64_t part = 0; part < n_parts; part++) {
        float *part_dw = dw + part * 3 * d;
        memset(part_dw, 0, 2 * d * sizeof(float));
        for (int64_t token = part * n / n_parts; token < (part + 1) * n / n_parts; token++) {
            int64_t b = token / n_tokens, t = token % n_tokens, position = positions ? positions[b * stride_p + t] : t;
            const float *pc = cos + position * half, *ps = sin + position * half;
            const void *px = at(qkv, b * strides[9] + t * strides[10], bf16);
            void *pdx = at(dqkv, token * (n_head + 2 * n_kv_head) * d, bf16);
            for (int64_t head = 0; head < n_head + n_kv_head; head++, px = at(px, d, bf16), pdx = at(pdx, d, bf16)) {
                int is_k = head >= n_head;
                const int64_t *in = strides + 3 * is_k;
                const void *pdy = at(is_k ? dk : dq, b * in[0] + t * in[1] + (is_k ? head - n_head : head) * in[2], bf16);
                const float *pw = weights + is_k * d;
                float *pdw = part_dw + is_k * d;
                if (bf16) norm_rotate_backward(pdy, px, pdx, pdw, part_dw + 2 * d, pw, pc, ps, half, rest, eps, 1);
                else norm_rotate_backward(pdy, px, pdx, pdw, part_dw + 2 * d, pw, pc, ps, half, rest, eps, 0);
            }
            for (int64_t head = 0; head < n_kv_head; head++, pdx = at(pdx, d, bf16))
                memcpy(pdx, at(dv, b * strides[6] + t * strides[7] + head * strides[8], bf16), d * (bf16 ? 2 : 4));
        }
    }
}

/* --- Cross-entropy ------------------------------------------------------------------------------------------------------------------ */

/* The gradient of a row's loss times scale; d may be s. */
INLINE void logits_gradient(
    const void *s, void *d, int64_t n, int64_t target, float top, float log_total, float scale, float label_smoothing, float z_loss,
    const int bf16
) {
    float factor = z_loss ? scale * (1 + 2 * z_loss * (top + log_total)) : scale; /* 0 · inf is NaN */
    float smooth = scale * label_smoothing / n;
    float at_target = exponential(get(s, target, bf16) - top - log_total) * factor - scale * (1 - label_smoothing) - smooth;
    factor /= expf(log_total); /* not exp(s − top − log_total): that would round each sum */
    SIMD for (int64_t i = 0; i < n; i++) put(d, i, exponential(get(s, i, bf16) - top) * factor - smooth, bf16);
    put(d, target, at_target, bf16);
}

INLINE void softmax_row(const void *s, int64_t n, float *top, float *log_total, float *sum, const int is_smooth, const int bf16) {
    float most = -INFINITY, total = 0, differences = 0;
    _Pragma("omp simd reduction(max : most)") for (int64_t i = 0; i < n; i++) {
        float v = get(s, i, bf16);
        most = v > most ? v : most;
    }
    EACH_BLOCK(n) {
        float part = 0, part_differences = 0;
        SUM2(part, part_differences)
        for (int64_t i = first; i < last; i++) { /* a difference first, which keeps the digits of large logits */
            float v = get(s, i, bf16) - most;
            part += exponential(v);
            if (is_smooth) part_differences += v;
        }
        total += part, differences += part_differences;
    }
    *top = most, *log_total = logf(total), *sum = differences;
}

INLINE int is_first(const void *s, int64_t target, float top, const int bf16) { /* whether no entry before the target is the maximum */
    int n_before = 0;
    SUM(n_before)
    for (int64_t i = 0; i < target; i++) n_before += get(s, i, bf16) == top;
    return !n_before && get(s, target, bf16) == top;
}

INLINE int64_t wrong_target(const int64_t *targets, int64_t n_rows, int64_t n, int64_t ignore_index) {
    for (int64_t row = 0; row < n_rows; row++)
        if (targets[row] != ignore_index && (targets[row] < 0 || targets[row] >= n)) return row + 1;
    return 0;
}

/* Of each row of logits s (N, V): loss, nll, top = max s, log_total = log Σ exp(s − top), correct (NULL: not needed), and the gradient of
 * loss · scale (NULL: not needed), which may overwrite the logits. All are 0 in ignored rows. Returns 1 + a row whose target is outside
 * of 0 … V − 1, or 0. */
int64_t cross_entropy(
    const void *logits, const int64_t *targets, const float *scale, float *loss, float *nll, float *top, float *log_total, uint8_t *correct,
    void *gradient, int64_t n_rows, int64_t n, int64_t stride, int64_t stride_gradient, int64_t ignore_index, float label_smoothing,
    float z_loss, int64_t bf16, int64_t n_thread
) {
    int64_t wrong = wrong_target(targets, n_rows, n, ignore_index);
    if (wrong) return wrong;
    PARALLEL
    for (int64_t row = 0; row < n_rows; row++) {
        const void *s = at(logits, row * stride, bf16);
        void *d = gradient ? at(gradient, row * stride_gradient, bf16) : 0;
        int64_t target = targets[row];
        if (target == ignore_index) {
            loss[row] = nll[row] = top[row] = log_total[row] = 0;
            if (correct) correct[row] = 0;
            if (d) memset(d, 0, n * (bf16 ? 2 : 4));
            continue;
        }
        float sum;
        if (bf16 && label_smoothing) softmax_row(s, n, top + row, log_total + row, &sum, 1, 1);
        else if (bf16) softmax_row(s, n, top + row, log_total + row, &sum, 0, 1);
        else if (label_smoothing) softmax_row(s, n, top + row, log_total + row, &sum, 1, 0);
        else softmax_row(s, n, top + row, log_total + row, &sum, 0, 0);
        float lse = top[row] + log_total[row];
        nll[row] = log_total[row] - ((bf16 ? get(s, target, 1) : get(s, target, 0)) - top[row]);
        loss[row] = nll[row];
        if (label_smoothing) loss[row] = (1 - label_smoothing) * nll[row] + label_smoothing * (log_total[row] - sum / n);
        if (z_loss) loss[row] += z_loss * lse * lse; /* 0 · inf is NaN */
        if (correct) correct[row] = nll[row] != nll[row] ? 0 : bf16 ? is_first(s, target, top[row], 1) : is_first(s, target, top[row], 0);
        if (d && bf16) logits_gradient(s, d, n, target, top[row], log_total[row], scale[row], label_smoothing, z_loss, 1);
        else if (d) logits_gradient(s, d, n, target, top[row], log_total[row], scale[row], label_smoothing, z_loss, 0);
    }
    return 0;
}

int64_t cross_entropy_backward(
    const void *logits, const int64_t *targets, const float *scale, const float *top, const float *log_total, void *gradient,
    int64_t n_rows, int64_t n, int64_t stride, int64_t stride_gradient, int64_t ignore_index, float label_smoothing, float z_loss,
    int64_t bf16, int64_t n_thread
) {
    int64_t wrong = wrong_target(targets, n_rows, n, ignore_index);
    if (wrong) return wrong;
    PARALLEL
    for (int64_t row = 0; row < n_rows; row++) {
        const void *s = at(logits, row * stride, bf16);
        void *d = at(gradient, row * stride_gradient, bf16);
        if (targets[row] == ignore_index) memset(d, 0, n * (bf16 ? 2 : 4));
        else if (bf16) logits_gradient(s, d, n, targets[row], top[row], log_total[row], scale[row], label_smoothing, z_loss, 1);
        else logits_gradient(s, d, n, targets[row], top[row], log_total[row], scale[row], label_smoothing, z_loss, 0);
    }
    return 0;
}
