/* What the plain kernels share: the score of one pair, in double, as csrc/cpu/cpu_scalar.h has it. They are the only
 * kernels for float64, and take what no other can. */
#ifndef FA_PLAIN_CUH
#define FA_PLAIN_CUH

#include "../cuda.h"
#include "../tile/tile_score.cuh"

enum { FA_PLAIN_WARPS = 4, FA_PLAIN_LANES = 32 };

struct fa_plain_params {
    fa_args a;
    const void *lse2, *delta; /* backward: [B HQ SQ], float or double */
};

/* One query head of one sequence; a warp works on one of its rows. */
struct fa_plain_head {
    const fa_args *a;
    fa_seq seq;
    int64_t h, hk;
    double slope, keep_scale;
    const char *mask;
    fa_dtype mask_dtype;
    int64_t mask_q, mask_k, mask_first;
    uint32_t threshold;
};

__device__ static fa_plain_head fa_plain_head_at(const fa_args *a, int64_t n, int64_t h)
{
    fa_plain_head p = {};
    p.a = a;
    p.seq = fa_seq_at(a, n);
    p.h = h;
    p.hk = h / (a->q.size[1] / a->k.size[1]);
    p.slope = a->alibi.data ? fa_per_head(&a->alibi, n, h) : 0;
    const fa_scores s = fa_scores_of(a, &p.seq, h);
    p.mask = s.mask;
    p.mask_dtype = s.mask_dtype;
    p.mask_q = s.mask_q;
    p.mask_k = s.mask_k;
    p.mask_first = s.mask_first;
    p.threshold = s.threshold;
    p.keep_scale = fa_dropout_factor(a->dropout_p);
    return p;
}

struct fa_plain_score {
    double value; /* in nats; -inf: hidden */
    double slope; /* d value / d (q . k) */
};

__device__ __forceinline__ bool fa_plain_hidden(const fa_plain_head &p, int64_t i, int64_t j)
{
    const fa_span *s = &p.seq.span;
    const int64_t ahead = j - i - s->offset;
    if (i >= s->q_len || j >= s->k_len || (s->right >= 0 && ahead > s->right) || (s->left >= 0 && -ahead > s->left))
        return true;
    return p.mask && p.mask_dtype == FA_BOOL && j >= p.mask_first &&
           !((const uint8_t *)p.mask)[i * p.mask_q + (j - p.mask_first) * p.mask_k];
}

__device__ static fa_plain_score fa_plain_score_of(const fa_plain_head &p, int64_t i, int64_t j, double dot)
{
    const fa_args *a = p.a;
    fa_plain_score s = {a->scale * dot, a->scale};
    if (a->softcap > 0) {
        double t = tanh(s.value / a->softcap);
        s.value = a->softcap * t;
        s.slope *= 1 - t * t;
    }
    if (p.mask && p.mask_dtype != FA_BOOL)
        s.value += fa_load(p.mask, p.mask_dtype, i * p.mask_q + (j - p.mask_first) * p.mask_k);
    if (a->alibi.data)
        s.value -= p.slope * fabs((double)(i + p.seq.span.offset - j));
    return s;
}

/* What dropout makes of a weight: times fa_dropout_factor when kept, else 0. */
__device__ __forceinline__ double fa_plain_dropout(const fa_plain_head &p, int64_t i, int64_t j)
{
    const fa_args *a = p.a;
    if (a->dropout_p == 0)
        return 1;
    const int64_t bh = (a->first_batch + p.seq.n) * a->q.size[1] + p.h;
    return a->dropout_p < 1 && fa_dropout_keep(a->dropout_seed, p.threshold, bh, i, j) ? p.keep_scale : 0;
}

/* sum over d of x[d] y[d]: x in shared memory, y a row of t from element `at` on */
__device__ __forceinline__ double fa_plain_dot(const double *x, const fa_tensor *t, int64_t at, double scale)
{
    double sum = 0;
    for (int64_t d = 0; d < t->size[3]; d++)
        sum += x[d] * (fa_load(t->data, t->dtype, at + d * t->stride[3]) * scale);
    return sum;
}

/* x[0 .. n-1] <- a row of t, or 0 where at < 0; by a warp */
__device__ __forceinline__ void fa_plain_read(double *x, const fa_tensor *t, int64_t at, double scale)
{
    __syncwarp();
    for (int64_t d = threadIdx.x % 32; d < t->size[3]; d += 32)
        x[d] = at < 0 ? 0 : fa_load(t->data, t->dtype, at + d * t->stride[3]) * scale;
    __syncwarp();
}

__device__ __forceinline__ double fa_warp_max(double x)
{
    for (int step = 16; step > 0; step /= 2) {
        double y = __shfl_xor_sync(0xffffffffu, x, step);
        x = y > x ? y : x;
    }
    return x;
}

__device__ __forceinline__ double fa_warp_sum(double x)
{
    for (int step = 16; step > 0; step /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

#endif
