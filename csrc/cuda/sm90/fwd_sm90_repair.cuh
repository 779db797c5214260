/* Rows of the output that keys they do not see have spoilt.
 *
 * A hidden key of a block that is computed has weight 0, but 0 times a NaN or an infinity of its value is NaN. Blocks
 * are not searched for such values: a warp notes whether a result of its own was not finite, and only then, behind
 * its last tile, it computes those rows again, from their log-sum-exp (which no hidden key reaches) and the keys they
 * see. */
#ifndef FA_FWD_SM90_REPAIR_CUH
#define FA_FWD_SM90_REPAIR_CUH

#include "../ptx/math.cuh"
#include "../ptx/warpgroup.cuh"
#include "fwd_sm90_mod.cuh"
#include "fwd_sm90_params.h"

/* Is one of these sums of products NaN or infinite? */
template <int R> __device__ __forceinline__ bool fa_any_not_finite(const float (&o)[R])
{
    float probe = 0.f;
#pragma unroll
    for (int i = 0; i < R; i++)
        probe = fmaf(o[i], 0.f, probe); /* NaN from then on */
    return probe != 0.f;
}

__device__ __forceinline__ float fa_warp_sum(float x)
{
#pragma unroll
    for (int i = 16; i > 0; i >>= 1)
        x += __shfl_xor_sync(0xffffffff, x, i);
    return x;
}

template <typename T>
__device__ __forceinline__ const T *fa_row_of(const fa_fwd_sm90_view &v, int b, int h, int64_t row)
{
    return (const T *)v.data + b * v.batch + h * v.head + row * v.row;
}

template <typename T, int DV>
__device__ bool fa_row_is_spoilt(const fa_fwd_sm90_params &p, int b, int h, int row, float lse)
{
    const T *out = fa_row_of<T>(p.out, b, h, row);
    float probe = 0.f;
    for (int d = threadIdx.x % FA_WARP; d < p.DV; d += FA_WARP)
        probe = fmaf(fa_widen(out[d]), 0.f, probe);
    return __any_sync(0xffffffff, probe != 0.f) && fabsf(lse) < CUDART_INF_F; /* a NaN among its scores is its own */
}

/* O = sum of exp(scale q k_j - lse) v_j over the keys that the row sees; the lanes of the warp share d. */
template <typename T, int D, int DV>
__device__ void fa_repair_row(const fa_fwd_sm90_params &p, int b, int h, int row, float lse)
{
    int lane = threadIdx.x % FA_WARP, head = h / p.group;
    int lo = max(0, row + p.lo_shift), hi = min(p.SK, row + p.hi_shift);
    const T *q = fa_row_of<T>(p.q, b, h, row);
    float sum[DV / FA_WARP] = {};
    for (int j = lo; j < hi; j++) {
        const T *k = fa_row_of<T>(p.k, b, head, j), *v = fa_row_of<T>(p.v, b, head, j);
        float score = 0.f;
        for (int d = lane; d < p.D; d += FA_WARP)
            score = fmaf(fa_widen(q[d]), fa_widen(k[d]), score);
        float weight = fa_exp2(fa_warp_sum(score) * p.scale_log2 - lse * 1.4426950408889634f);
#pragma unroll
        for (int i = 0; i < DV / FA_WARP; i++)
            if (lane + i * FA_WARP < p.DV)
                sum[i] = fmaf(weight, fa_widen(v[lane + i * FA_WARP]), sum[i]);
    }
    T *out = (T *)fa_row_of<T>(p.out, b, h, row);
#pragma unroll
    for (int i = 0; i < DV / FA_WARP; i++)
        if (lane + i * FA_WARP < p.DV)
            out[lane + i * FA_WARP].bits = (uint16_t)fa_pack<T>(sum[i], 0.f);
}

/* ---- with all options -------------------------------------------------------------------------------------------- */

/* The score of query i and key j in units of log2, from their product; -inf: hidden by the mask. */
template <typename T>
__device__ __forceinline__ float fa_mod_score(const fa_fwd_sm90_mod_params &p, const fa_mod_tile &t, int i, int j,
                                              float product)
{
    float x = product * (p.what & FA_MOD_SCALED ? p.scale : p.plain.scale_log2);
    if (p.what & FA_MOD_CAP)
        x = p.cap * fa_tanh(x);
    if (p.what & (FA_MOD_BITS | FA_MOD_BIAS)) {
        int64_t at = fa_mask_row(p, t, i) + j * p.mask[3];
        float y = p.what & FA_MOD_BITS   ? (((const uint8_t *)p.a.mask.data)[at] ? 0.f : -CUDART_INF_F)
                  : p.what & FA_MOD_WIDE ? fa_bias_log2(((const float *)p.a.mask.data)[at])
                                         : fa_bias_log2(fa_widen(((const T *)p.a.mask.data)[at]));
        x = y == -CUDART_INF_F ? y : x + y;
    }
    if (p.what & FA_MOD_ALIBI)
        x -= t.slope * fabsf((float)(i + t.offset - j));
    return x;
}

__device__ __forceinline__ bool fa_mod_keeps(const fa_fwd_sm90_mod_params &p, const fa_mod_tile &t, int i, int j)
{
    if (!(p.what & FA_MOD_DROPOUT))
        return true;
    uint32_t bh = fa_dropout_head(p, t);
    uint4 column = fa_draw_column(p.dropout, fa_dropout_column((uint32_t)j), bh);
    fa_philox4 r = fa_draw_signs<true>(p.dropout, column, fa_draw_row(p.dropout, fa_dropout_row((uint32_t)i), bh));
    return (fa_dropout_bits(&r, (uint32_t)i, (uint32_t)j) ^ p.dropout.flip) & 0x8000u;
}

/* As fa_repair_row; the sum of the weights is taken anew, since a log-sum-exp of the least float is not exact. */
template <typename T, int D, int DV>
__device__ __forceinline__ void fa_mod_repair_row(const fa_fwd_sm90_mod_params &p, const fa_mod_tile &t, int row,
                                                  float lse)
{
    const fa_fwd_sm90_params &f = p.plain;
    int lane = threadIdx.x % FA_WARP, head = t.h / f.group;
    int lo = max(0, row + t.lo_shift), hi = min(t.k_len, row + t.hi_shift);
    float top = fmaxf(lse * FA_LOG2E, -FLT_MAX), total = p.a.sinks.data ? fa_exp2(t.sink - top) : 0.f;
    const T *q = fa_row_of<T>(f.q, t.b, t.h, t.q_row + row);
    float sum[DV / FA_WARP] = {};
#pragma unroll 1
    for (int j = lo; j < hi; j++) {
        const T *k = fa_row_of<T>(f.k, t.b, head, t.k_row + j), *v = fa_row_of<T>(f.v, t.b, head, t.k_row + j);
        float product = 0.f;
#pragma unroll 1
        for (int d = lane; d < f.D; d += FA_WARP)
            product = fmaf(fa_widen(q[d]), fa_widen(k[d]), product);
        float x = fa_mod_score<T>(p, t, row, j, fa_warp_sum(product)), weight = fa_exp2(x - top);
        total += weight;
        bool counts = x != -CUDART_INF_F && fa_mod_keeps(p, t, row, j);
#pragma unroll
        for (int i = 0; i < DV / FA_WARP; i++)
            if (counts && lane + i * FA_WARP < f.DV)
                sum[i] = fmaf(weight, fa_widen(v[lane + i * FA_WARP]), sum[i]);
    }
    T *out = (T *)fa_row_of<T>(f.out, t.b, t.h, t.q_row + row);
#pragma unroll
    for (int i = 0; i < DV / FA_WARP; i++)
        if (lane + i * FA_WARP < f.DV)
            out[lane + i * FA_WARP].bits = (uint16_t)fa_pack<T>(sum[i] * p.dropout.factor / total, 0.f);
}

/* This warp's rows of all tiles of this thread block once more, from the last piece of work to the first. */
template <class C>
__device__ __forceinline__ void fa_mod_repair_tiles(const fa_fwd_sm90_mod_params &p, uint32_t unit, int warpgroup)
{
    for (; unit != FA_NO_UNIT; unit = fa_unit_before(p, unit)) {
        for (int part = 0; part < p.plain.parts; part++) {
            fa_mod_tile t;
            if (!fa_mod_tile_place<C::BM>(p, unit, part, &t))
                continue;
            fa_mod_tile_fill<C::BM, C::BN>(p, &t);
            int first = t.row + 64 * warpgroup + threadIdx.x / FA_WARP % 4 * 16;
            for (int row = first; row < min(first + 16, t.q_len); row++) {
                float lse = p.plain.lse[((int64_t)t.b * p.plain.HQ + t.h) * p.plain.SQ + t.q_row + row];
                if (fa_row_is_spoilt<typename C::T, C::DV>(p.plain, t.b, t.h, t.q_row + row, lse))
                    fa_mod_repair_row<typename C::T, C::D, C::DV>(p, t, row, lse);
            }
        }
    }
}

#endif
