/* What the panel kernels do to one tile besides the matrix products: read rows of any dtype and stride, pack them,
 * apply softcap, bias, ALiBi and visibility to a block of scores, drop weights, write rows.
 *
 * A tile of scores is S[key][lane]: keys down, the query rows of a panel in the lanes. Scores are in units of log2, so
 * that a weight is 2^(S - max).
 */
#ifndef FA_CPU_TILE_H
#define FA_CPU_TILE_H

#include <float.h>
#include <string.h>

#include "../common/fa_sequence.h"
#include "../plan/plan.h"
#include "cpu_simd.h"

#if defined(FA_ISA_AVX512)
#define BM 64
#else
#define BM 48
#endif
#define BM_VECS (BM / VL)
#define BN FA_KEY_BLOCK

/* ---- rows of a tensor ------------------------------------------------------------------------------------------- */

FA_INLINE const char *row_of(const fa_tensor *t, int64_t b, int64_t h, int64_t s, size_t size)
{
    return (const char *)t->data + (b * t->stride[0] + h * t->stride[1] + s * t->stride[2]) * (int64_t)size;
}

/* bytes from one row to the next; where there is only one, its stride may be any number */
FA_INLINE int64_t row_step(const fa_tensor *t, size_t size)
{
    return t->size[2] > 1 ? t->stride[2] * (int64_t)size : 0;
}

/* elements d .. d+n-1 of a row as fp32; 0 past n */
FA_INLINE vf load_f32(const char *row, int64_t d, int n, int64_t stride, fa_dtype t)
{
    if (stride != 1) {
        float x[VL] = {0};
        for (int i = 0; i < n; i++)
            x[i] = (float)fa_load(row, t, (d + i) * stride);
        return v_load(x);
    }
    const uint16_t *h = (const uint16_t *)row + d;
    switch (t) {
    case FA_BF16: return n >= VL ? v_load_bf16(h) : v_load_bf16_n(h, n);
    case FA_F16: return n >= VL ? v_load_f16(h) : v_load_f16_n(h, n);
    default: return n >= VL ? v_load((const float *)row + d) : v_load_n((const float *)row + d, n);
    }
}

FA_INLINE void store_f32(char *row, int64_t d, int n, int64_t stride, fa_dtype t, vf x)
{
    if (stride != 1) {
        float y[VL];
        v_store(y, x);
        for (int i = 0; i < n; i++)
            fa_store(row, t, (d + i) * stride, y[i]);
        return;
    }
    uint16_t *h = (uint16_t *)row + d;
    switch (t) {
    case FA_BF16: n >= VL ? v_store_bf16(h, x) : v_store_bf16_n(h, n, x); break;
    case FA_F16: n >= VL ? v_store_f16(h, x) : v_store_f16_n(h, n, x); break;
    default: n >= VL ? v_store((float *)row + d, x) : v_store_n((float *)row + d, n, x); break;
    }
}

FA_INLINE int part(int64_t d, int64_t n) /* elements left for the vector that starts at d */
{
    return n - d >= VL ? VL : (int)(n - d);
}

/* ---- the lanes of a panel --------------------------------------------------------------------------------------- */

typedef struct fa_lanes {
    int n, nv;              /* rows, and the vectors that hold them */
    int64_t first, last;    /* smallest and largest query among the rows */
    bool any;               /* some row lies within the sequence's length */
    bool valid[BM];         /* the lane has a row, within the length; backward: that sees a key */
    bool all_valid;         /* each row is */
    int64_t head[BM];       /* absolute query head; lanes past n repeat the last row */
    int32_t query[BM];
    int32_t bh[BM];         /* b * HQ + head */
    int32_t pos[BM];        /* query + offset: the key position on the diagonal */
    float slope[BM];        /* ALiBi, in units of log2 */
} fa_lanes;

static inline void lanes_init(fa_lanes *l, const fa_args *a, const fa_panels *panels, const fa_span *span, int64_t b,
                              int64_t hk, int64_t panel)
{
    int64_t g, q;
    l->n = (int)fa_panel_size(panels, panel);
    l->nv = (l->n + VL - 1) / VL;
    fa_panel_row(panels, panel, 0, &g, &q);
    l->first = l->last = q;
    for (int i = 0; i < l->nv * VL; i++) {
        l->head[i] = hk * panels->group + g;
        l->query[i] = (int32_t)q;
        l->bh[i] = (int32_t)(b * a->q.size[1] + l->head[i]);
        l->pos[i] = (int32_t)(q + span->offset);
        l->valid[i] = i < l->n && q < span->q_len;
        l->first = fa_min64(l->first, q);
        l->last = fa_max64(l->last, q);
        if (a->alibi.data) {
            int64_t at = (a->alibi.size[0] > 1 ? b : 0) * a->alibi.stride[0] + l->head[i] * a->alibi.stride[1];
            l->slope[i] = (float)(fa_load(a->alibi.data, a->alibi.dtype, at) * FA_LOG2E);
        }
        if (i + 1 < l->n && ++q == panels->sq) /* a packed panel goes on with the next head */
            q = 0, g++;
    }
    l->any = l->first < span->q_len;
    l->all_valid = l->last < span->q_len;
    l->last = fa_min64(l->last, span->q_len - 1);
}

/* ---- packing ---------------------------------------------------------------------------------------------------- */

/* dst[unit][BM] <- the panel's rows of t, transposed: fp32, or pairs (d, d + 1) of bf16. Lanes without a row get 0. */
FA_INLINE void pack_transposed(float *dst, const fa_lanes *l, const fa_tensor *t, int64_t b, fa_dtype dtype, bool pairs)
{
    size_t size = dtype == FA_F32 ? 4 : 2;
    int64_t stride = t->stride[3], units = pairs ? (t->size[3] + 1) / 2 : t->size[3];
    for (int v = 0; v < l->nv; v++)
        for (int64_t u = 0; u < units; u += VL) {
            vf r[VL];
            for (int i = 0; i < VL; i++) {
                int lane = v * VL + i;
                r[i] = v_zero();
                if (!l->valid[lane])
                    continue;
                const char *row = row_of(t, b, l->head[lane], l->query[lane], size);
                if (!pairs) {
                    r[i] = load_f32(row, u, part(u, units), stride, dtype);
                } else if (stride == 1 && 2 * (u + VL) <= t->size[3]) {
                    r[i] = v_load((const float *)(const void *)(row + 4 * u));
                } else {
                    uint16_t x[2 * VL] = {0};
                    for (int64_t d = 2 * u; d < t->size[3] && d < 2 * (u + VL); d++)
                        memcpy(&x[d - 2 * u], row + d * stride * 2, 2);
                    r[i] = v_load((const float *)(const void *)x);
                }
            }
            v_transpose(r);
            for (int i = 0; i < part(u, units); i++)
                v_store(dst + (u + i) * BM + v * VL, r[i]);
        }
}

/* dst[row][width] <- n rows of fp32, padded with 0 to width; rows marked in skip become 0 */
FA_INLINE void pack_rows(float *dst, int64_t width, const char *rows, int64_t row_bytes, int n, int64_t d,
                         int64_t stride, fa_dtype dtype, const uint8_t *skip)
{
    for (int i = 0; i < n; i++)
        for (int64_t c = 0; c < width; c += VL) {
            int left = part(c, d);
            bool none = left <= 0 || (skip && skip[i]);
            v_store(dst + i * width + c, none ? v_zero() : load_f32(rows + i * row_bytes, c, left, stride, dtype));
        }
}

#ifdef FA_ISA_AVX512BF16
FA_INLINE vf load_u16_wide(const char *row, int64_t d, int n, int64_t stride)
{
    uint16_t x[VL] = {0};
    if (stride == 1 && n >= VL)
        memcpy(x, row + 2 * d, sizeof x);
    else
        for (int i = 0; i < n; i++)
            memcpy(&x[i], row + (d + i) * stride * 2, 2);
    return _mm512_castsi512_ps(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)));
}

/* dst[row / 2][width] <- n rows of bf16: rows 2r and 2r + 1 side by side in one 32-bit unit; padded with 0 */
FA_INLINE void pack_pairs(float *dst, int64_t width, const char *rows, int64_t row_bytes, int n, int64_t d,
                          int64_t stride, const uint8_t *skip)
{
    for (int i = 0; i < n; i += 2)
        for (int64_t c = 0; c < width; c += VL) {
            int left = part(c, d);
            vi lo = vi_set1(0), hi = vi_set1(0);
            if (left > 0 && !(skip && skip[i]))
                lo = _mm512_castps_si512(load_u16_wide(rows + i * row_bytes, c, left, stride));
            if (left > 0 && i + 1 < n && !(skip && skip[i + 1]))
                hi = _mm512_castps_si512(load_u16_wide(rows + (i + 1) * row_bytes, c, left, stride));
            v_store(dst + i / 2 * width + c, _mm512_castsi512_ps(_mm512_or_si512(lo, _mm512_slli_epi32(hi, 16))));
        }
}

/* dst[row][width units] <- n rows of bf16 as they are, padded with 0: for rows whose d is odd or stride is not 1 */
FA_INLINE void pack_u16(float *dst, int64_t width, const char *rows, int64_t row_bytes, int n, int64_t d,
                        int64_t stride)
{
    for (int i = 0; i < n; i++) {
        uint16_t *to = (uint16_t *)(dst + i * width);
        for (int64_t c = 0; c < d; c++)
            memcpy(to + c, rows + i * row_bytes + c * stride * 2, 2);
        if (d & 1)
            to[d] = 0;
    }
}
#endif

/* Marks the rows that hold NaN or infinity: a hidden key has weight 0, and 0 times these is NaN. Returns their number.
 * x * 0 is NaN exactly for them. */
FA_INLINE int find_nonfinite(uint8_t *marks, const char *rows, int64_t row_bytes, int n, int64_t d, int64_t stride,
                             fa_dtype dtype)
{
    int count = 0;
    for (int i = 0; i < n; i++) {
        vf acc = v_zero();
        for (int64_t c = 0; c < d; c += VL)
            acc = v_fma(load_f32(rows + i * row_bytes, c, part(c, d), stride, dtype), v_zero(), acc);
        marks[i] = (uint8_t)vm_any(v_ne(acc, acc));
        count += marks[i];
    }
    return count;
}

/* ---- what changes scores ----------------------------------------------------------------------------------------- */

/* n values of one row of the mask from key k on, in units of log2; -inf where a bool mask hides; past n anything */
FA_INLINE vf mask_values(const fa_tensor *m, const char *row, int64_t k, int n)
{
    int64_t stride = m->size[3] > 1 ? m->stride[3] : 0;
    vf hide = v_set1(-INFINITY);
    if (m->dtype == FA_BOOL) {
        if (stride == 1 && n >= VL)
            return v_select_bytes((const uint8_t *)row + k, v_zero(), hide);
        uint8_t x[16];
        memset(x, 1, sizeof x);
        for (int i = 0; i < n; i++)
            x[i] = ((const uint8_t *)row)[(k + i) * stride];
        return v_select_bytes(x, v_zero(), hide);
    }
    vf x = stride ? load_f32(row, k, n, stride, m->dtype) : v_set1((float)fa_load(row, m->dtype, 0));
    vf y = v_max(v_set1(-FLT_MAX), v_mul(x, v_set1((float)FA_LOG2E))); /* the least float is a number, not -inf */
    return v_select(v_eq(x, hide), hide, y);
}

/* The same from key k on, where the first column of the mask is key `first`; keys before it are not masked. */
FA_INLINE vf mask_values_from(const fa_tensor *m, const char *row, int64_t k, int n, int64_t first)
{
    if (k >= first)
        return mask_values(m, row, k - first, n);
    int before = (int)fa_min64(first - k, n);
    float x[2 * VL] = {0};
    if (before < n)
        v_store(x + before, mask_values(m, row, 0, n - before));
    return v_load(x);
}

FA_INLINE const char *mask_row(const fa_tensor *m, int64_t b, int64_t h, int64_t q)
{
    int64_t at = (m->size[0] > 1 ? b : 0) * m->stride[0] + (m->size[1] > 1 ? h : 0) * m->stride[1] +
                 (m->size[2] > 1 ? q : 0) * m->stride[2];
    return (const char *)m->data + at * (int64_t)fa_dtype_size(m->dtype);
}

typedef enum { MASK_NOTHING_SEEN, MASK_MIXED, MASK_NO_CHANGE } mask_effect;

/* bias[key][BM] <- the mask for keys k0 .. k0+nk-1, transposed. */
static inline mask_effect stage_mask(float *bias, const fa_args *a, const fa_lanes *l, int64_t b, int64_t k0, int nk)
{
    const fa_tensor *m = &a->mask;
    const char *rows[BM];
    bool same = true;
    for (int i = 0; i < l->nv * VL; i++) {
        rows[i] = mask_row(m, b, l->head[i], l->query[i]);
        same &= rows[i] == rows[0];
    }
    vf zero = v_zero(), hide = v_set1(-INFINITY);
    vm seen = v_ne(zero, zero), changed = seen;
    for (int k = 0; k < nk; k += VL) {
        int n = nk - k < VL ? nk - k : VL;
        for (int v = 0; v < (same ? 1 : l->nv); v++) {
            vf r[VL];
            for (int i = 0; i < VL; i++) {
                r[i] = same && i ? r[0] : mask_values_from(m, rows[v * VL + i], k0 + k, n, a->mask_first);
                seen = vm_or(seen, v_ne(r[i], hide));
                changed = vm_or(changed, v_ne(r[i], zero));
            }
            v_transpose(r);
            for (int i = 0; i < n; i++)
                for (int w = v; w < (same ? l->nv : v + 1); w++)
                    v_store(bias + (k + i) * BM + w * VL, r[i]);
        }
    }
    return !vm_any(seen) ? MASK_NOTHING_SEEN : vm_any(changed) ? MASK_MIXED : MASK_NO_CHANGE;
}

/* s -> cap tanh(s / cap). Scores arrive as scale * s / cap and leave in units of log2. */
static inline void apply_softcap(float *s, int nk, int nv, double cap)
{
    vf c = v_set1((float)(cap * FA_LOG2E));
    for (int k = 0; k < nk; k++)
        for (int v = 0; v < nv; v++)
            v_store(s + k * BM + v * VL, v_mul(c, v_tanh(v_load(s + k * BM + v * VL))));
}

/* -inf in the bias hides: it replaces the score, which may be NaN */
static inline void apply_bias(float *s, const float *bias, int nk, int nv)
{
    vf hide = v_set1(-INFINITY);
    for (int k = 0; k < nk; k++)
        for (int v = 0; v < nv; v++) {
            vf x = v_load(bias + k * BM + v * VL);
            vf y = v_add(v_load(s + k * BM + v * VL), x);
            v_store(s + k * BM + v * VL, v_select(v_eq(x, hide), hide, y));
        }
}

static inline void apply_alibi(float *s, const fa_lanes *l, int64_t k0, int nk)
{
    for (int k = 0; k < nk; k++)
        for (int v = 0; v < l->nv; v++) {
            vf away = v_abs(vi_to_f(vi_sub(vi_load(l->pos + v * VL), vi_set1((int32_t)(k0 + k)))));
            vf y = v_fnma(v_load(l->slope + v * VL), away, v_load(s + k * BM + v * VL));
            v_store(s + k * BM + v * VL, y);
        }
}

/* hides keys off the band [pos - left, pos + right] */
static inline void apply_band(float *s, const fa_lanes *l, const fa_span *span, int64_t k0, int nk)
{
    vf hide = v_set1(-INFINITY);
    vi right = vi_set1(span->right < 0 ? INT32_MAX : (int32_t)fa_min64(span->right, INT32_MAX));
    vi left = vi_set1(span->left < 0 ? INT32_MAX : (int32_t)fa_min64(span->left, INT32_MAX));
    for (int v = 0; v < l->nv; v++) {
        vi pos = vi_load(l->pos + v * VL);
        for (int k = 0; k < nk; k++) {
            vi ahead = vi_sub(vi_set1((int32_t)(k0 + k)), pos), behind = vi_sub(vi_set1(0), ahead);
            vm off = vm_or(vi_gt(ahead, right), vi_gt(behind, left));
            v_store(s + k * BM + v * VL, v_select(off, hide, v_load(s + k * BM + v * VL)));
        }
    }
}

/* w[lane] = 0 where dropped */
static inline void drop_lanes(float *w, vm dropped)
{
    v_store(w, v_select(dropped, v_zero(), v_load(w)));
}

/* For the tile of keys k0 .. k0+nk-1: w[key][lane] = 0 where dropout drops, kept otherwise. Of the two queries that an
 * evaluation serves, a lane is one. */
static inline void apply_dropout(float *w, const fa_lanes *l, const fa_args *a, int64_t k0, int nk)
{
    if (a->dropout_p >= 1) { /* also the few that no threshold of 16 bits drops */
        memset(w, 0, (size_t)nk * BM * sizeof *w);
        return;
    }
    const int32_t threshold = (int32_t)fa_dropout_threshold(a->dropout_p);
    const vi even = vi_set1(threshold), odd = vi_set1((int32_t)((uint32_t)threshold << 16));
    vi first = vi_set1((int32_t)(a->first_batch * a->q.size[1]));
    for (int v = 0; v < l->nv; v++) {
        vi q = vi_load(l->query + v * VL), bh = vi_add(first, vi_load(l->bh + v * VL));
        vi row = vi_add(vi_shr(vi_and(q, vi_set1(~15)), 1), vi_and(q, vi_set1(7)));
        vm second = vi_gt(vi_and(q, vi_set1(8)), vi_set1(0));
        for (int k = -(int)(k0 % 16); k < nk; k += 16)
            for (int c = 0; c < 4; c++) {
                vi word[4];
                v_philox(a->dropout_seed, vi_set1((int32_t)((k0 + k) / 4) + c), row, bh, vi_set1(0), word);
                for (int i = 0; i < 2; i++) {
                    const int key = k + 8 * i + 2 * c;
                    vi x = vi_select(second, word[2 + i], word[i]);
                    if (key >= 0 && key < nk)
                        drop_lanes(w + key * BM + v * VL, vi_lt_u(vi_and(x, vi_set1(0xffff)), even));
                    if (key >= -1 && key + 1 < nk)
                        drop_lanes(w + (key + 1) * BM + v * VL, vi_lt_u(x, odd));
                }
            }
    }
}

/* What a call asks of its score tiles, decided once. */
typedef struct fa_score_ops {
    float scale; /* of Q K^T, into the units of the first step that follows */
    bool softcap, mask, alibi, dropout;
} fa_score_ops;

static inline fa_score_ops score_ops_of(const fa_args *a)
{
    fa_score_ops o = {
        .softcap = a->softcap > 0, .mask = a->mask.data, .alibi = a->alibi.data, .dropout = a->dropout_p > 0};
    o.scale = (float)(o.softcap ? a->scale / a->softcap : a->scale * FA_LOG2E);
    return o;
}

#endif
