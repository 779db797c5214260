/* From products of queries and keys to scores in units of log2: scale, softcap, mask, ALiBi, what is hidden; and which
 * weights dropout keeps. One function each, on a tile of results as ptx_sm80.cuh lays them out. */
#ifndef FA_TILE_SCORE_CUH
#define FA_TILE_SCORE_CUH

#include <float.h>

#include "../../common/fa_philox.h"
#include "tile_load.cuh"

#define FA_LOG2E_F 1.4426950408889634f

/* What one query head of one sequence does to its scores. */
struct fa_scores {
    float scale;            /* of Q K^T, into the units of the first step that follows */
    float cap;              /* softcap in units of log2; 0 = off */
    float slope;            /* ALiBi, in units of log2 */
    bool alibi;
    const char *mask;       /* its element (0, 0), or NULL */
    fa_dtype mask_dtype;
    int64_t mask_q, mask_k; /* elements to the next query, key; 0 where it is broadcast */
    int mask_first;         /* key of its first column; keys before are not hidden by it */
    int q_len, k_len, offset, left, right; /* as fa_span; a side that is unbounded is INT32_MAX */
    bool dropout;
    uint32_t threshold, bh;
    uint64_t seed;
};

__device__ static fa_scores fa_scores_of(const fa_args *a, const fa_seq *s, int64_t h)
{
    fa_scores p = {};
    const double log2e = 1.4426950408889634;
    p.cap = (float)(a->softcap * log2e);
    p.scale = (float)(a->softcap > 0 ? a->scale / a->softcap : a->scale * log2e);
    if (a->alibi.data) {
        p.alibi = true;
        p.slope = (float)(fa_per_head(&a->alibi, s->n, h) * log2e);
    }
    const fa_tensor *m = a->tree_mask.data ? &a->tree_mask : &a->mask;
    if (m->data) {
        int64_t at = (m->size[0] > 1 ? s->n * m->stride[0] : 0) + (m->size[1] > 1 ? h * m->stride[1] : 0);
        p.mask = (const char *)m->data + at * fa_dtype_width(m->dtype);
        p.mask_dtype = m->dtype;
        p.mask_q = m->size[2] > 1 ? m->stride[2] : 0;
        p.mask_k = m->size[3] > 1 ? m->stride[3] : 0;
        p.mask_first = a->tree_mask.data ? (int)(s->span.k_len - s->q_rows) : (int)a->mask_first;
    }
    p.q_len = (int)s->span.q_len;
    p.k_len = (int)s->span.k_len;
    p.offset = (int)s->span.offset;
    p.left = s->span.left < 0 || s->span.left > INT32_MAX ? INT32_MAX : (int)s->span.left;
    p.right = s->span.right < 0 || s->span.right > INT32_MAX ? INT32_MAX : (int)s->span.right;
    p.dropout = a->dropout_p > 0;
    p.threshold = fa_dropout_threshold(a->dropout_p);
    p.seed = a->dropout_seed;
    p.bh = (uint32_t)((a->first_batch + s->n) * a->q.size[1] + h);
    return p;
}

/* What the mask adds, in units of log2: -inf hides. The least float is a number. */
__device__ __forceinline__ float fa_mask_value(const fa_scores &p, int i, int j)
{
    if (j < p.mask_first)
        return 0;
    int64_t at = i * p.mask_q + (j - p.mask_first) * p.mask_k;
    float x;
    switch (p.mask_dtype) {
    case FA_BOOL: return ((const uint8_t *)p.mask)[at] ? 0 : -INFINITY;
    case FA_F32: x = ((const float *)p.mask)[at]; break;
    case FA_BF16: x = __bfloat162float(((const __nv_bfloat16 *)p.mask)[at]); break;
    default: x = __half2float(((const __half *)p.mask)[at]); break;
    }
    float y = x * FA_LOG2E_F;
    return y == -INFINITY && x != -INFINITY ? -FLT_MAX : y;
}

/* ---- the end of a row -------------------------------------------------------------------------------------------- */

struct fa_row_end {
    float scale; /* multiplies the weighted sum of values */
    double lse;  /* natural log */
};

/* m: maximum score in units of log2; l: sum of 2^(s - m); keep: fa_dropout_factor. A sink is one more key whose value
 * is 0. */
__device__ static fa_row_end fa_finish_row(const fa_args *a, int64_t n, int64_t h, float m, float l, float keep)
{
    const double ln2 = 0.6931471805599453;
    float top = m, shrink = 1;
    if (a->sinks.data) {
        float sink = (float)(fa_per_head(&a->sinks, n, h) / ln2);
        top = sink > m || isnan(sink) ? sink : m;
        if (top != -INFINITY) {
            shrink = exp2f(m - top);
            l = l * shrink + exp2f(sink - top);
        }
    }
    if (l == 0)
        return {0, -INFINITY};
    double lse = ((double)top + log2f(l)) * ln2;
    if (top <= -FLT_MAX && !isnan(l)) /* where fa_mask_value cut it off */
        lse = -FLT_MAX;
    return {keep * shrink / l, lse};
}

__device__ static fa_row_end fa_finish_row(const fa_args *a, int64_t n, int64_t h, float m, float l)
{
    return fa_finish_row(a, n, h, m, l, (float)fa_dropout_factor(a->dropout_p));
}

#endif
