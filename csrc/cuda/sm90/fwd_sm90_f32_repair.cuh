/* Rows whose products could not be taken by parts (fwd_sm90_f32_split.cuh), in fp32: a warp to a row, the keys that it
 * sees one after the other. What it does not see is not read. */
#ifndef FA_FWD_SM90_F32_REPAIR_CUH
#define FA_FWD_SM90_F32_REPAIR_CUH

#include "fwd_sm90_repair.cuh"

/* The online softmax of a row; the lanes of the warp share the columns. */
template <int DV> struct fa_f32_row {
    float m, l, sum[DV / FA_WARP];
};

/* Keys j .. j + N - 1; those from `end` on are left out. */
template <int D, int DV, int N>
__device__ __forceinline__ void fa_f32_row_keys(fa_f32_row<DV> &r, const fa_fwd_sm90_params &p,
                                                const float (&q)[D / FA_WARP], const float *k, const float *v, int j,
                                                int end)
{
    const int lane = threadIdx.x % FA_WARP;
    float x[N], top = r.m;
#pragma unroll
    for (int n = 0; n < N; n++) {
        x[n] = 0.f;
#pragma unroll
        for (int i = 0; i < D / FA_WARP; i++)
            if (j + n < end && lane + i * FA_WARP < p.D)
                x[n] = fmaf(q[i], k[(j + n) * p.k.row + lane + i * FA_WARP], x[n]);
    }
#pragma unroll
    for (int n = 0; n < N; n++) {
        x[n] = j + n < end ? fa_warp_sum(x[n]) * p.scale_log2 : -CUDART_INF_F;
        top = fmaxf(top, x[n]);
    }
    const float base = top == -CUDART_INF_F ? 0.f : top, factor = fa_exp2(r.m - base);
    r.m = top;
    r.l *= factor;
#pragma unroll
    for (int i = 0; i < DV / FA_WARP; i++)
        r.sum[i] *= factor;
#pragma unroll
    for (int n = 0; n < N; n++) {
        const float w = fa_exp2(x[n] - base);
        r.l += w;
#pragma unroll
        for (int i = 0; i < DV / FA_WARP; i++)
            if (j + n < end && lane + i * FA_WARP < p.DV)
                r.sum[i] = fmaf(w, v[(j + n) * p.v.row + lane + i * FA_WARP], r.sum[i]);
    }
}

template <int D, int DV>
__device__ __noinline__ void fa_f32_repair_row(const fa_fwd_sm90_params &p, int b, int h, int row)
{
    const int lane = threadIdx.x % FA_WARP, head = h / p.group;
    const int lo = max(0, row + p.lo_shift), hi = min(p.SK, row + p.hi_shift);
    const float *from = fa_row_of<float>(p.q, b, h, row);
    float q[D / FA_WARP];
#pragma unroll
    for (int i = 0; i < D / FA_WARP; i++)
        q[i] = lane + i * FA_WARP < p.D ? from[lane + i * FA_WARP] : 0.f;
    fa_f32_row<DV> r = {-CUDART_INF_F, 0.f, {}};
#pragma unroll 1
    for (int j = lo; j < hi; j += 8)
        fa_f32_row_keys<D, DV, 8>(r, p, q, fa_row_of<float>(p.k, b, head, 0), fa_row_of<float>(p.v, b, head, 0), j, hi);
    float *out = (float *)fa_row_of<float>(p.out, b, h, row);
#pragma unroll
    for (int i = 0; i < DV / FA_WARP; i++)
        if (lane + i * FA_WARP < p.DV)
            out[lane + i * FA_WARP] = r.l == 0.f ? 0.f : r.sum[i] / r.l;
    if (lane == 0)
        p.lse[((int64_t)b * p.HQ + h) * p.SQ + row] =
            r.l == 0.f ? -CUDART_INF_F : (r.m + fa_log2(r.l)) * 0.693147180559945f;
}

/* Was what this warp stored of the row not finite? */
template <int DV>
__device__ __forceinline__ bool fa_f32_row_is_spoilt(const fa_fwd_sm90_params &p, int b, int h, int row)
{
    const float *out = fa_row_of<float>(p.out, b, h, row);
    float probe = p.lse[((int64_t)b * p.HQ + h) * p.SQ + row];
    probe = probe == -CUDART_INF_F ? 0.f : probe * 0.f;
    for (int d = threadIdx.x % FA_WARP; d < p.DV; d += FA_WARP)
        probe = fmaf(out[d], 0.f, probe);
    return __any_sync(0xffffffff, probe != 0.f);
}

#endif
