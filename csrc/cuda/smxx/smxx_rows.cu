/* Passes over rows that every family needs: what backward wants of each row of q, the gradient of the sinks, and the
 * merge of split keys. All sums go in an order that depends on the shape alone. */
#include "../cuda.h"
#include "../tile/tile_score.cuh"

enum { WARPS = 4 };

static int64_t rows_of(const fa_args *a)
{
    return a->q.size[0] * a->q.size[1] * a->q.size[2];
}

/* The sequence that has row i of a packed q; of those that begin there the last, which is the one that is not empty. */
__device__ static int64_t sequence_of(const fa_tensor *cu, int64_t length, int64_t i)
{
    int64_t lo = 0, hi = cu->size[0] - 1;
    while (lo < hi) {
        int64_t mid = (lo + hi + 1) / 2;
        if (fa_offset_at(cu, mid, length) <= i)
            lo = mid;
        else
            hi = mid - 1;
    }
    return lo;
}

struct row {
    int64_t b, h, i, n;
    bool exists; /* within the length of its sequence */
};

/* row = (b * HQ + h) * SQ + i */
__device__ static row row_at(const fa_args *a, int64_t index)
{
    row r;
    r.i = index % a->q.size[2];
    r.h = index / a->q.size[2] % a->q.size[1];
    r.b = index / a->q.size[2] / a->q.size[1];
    r.n = a->cu_q.data ? sequence_of(&a->cu_q, a->q.size[2], r.i) : r.b;
    if (a->cu_q.data)
        r.exists = r.n + 1 < a->cu_q.size[0];
    else
        r.exists = r.i < fa_length(&a->q_seqlens, r.n, a->q.size[2]);
    return r;
}

__device__ static int64_t offset_of(const fa_tensor *t, const row &r)
{
    return r.b * t->stride[0] + r.h * t->stride[1] + r.i * t->stride[2];
}

struct params {
    fa_args a;
    void *lse2, *delta; /* [B HQ][rows] */
    int64_t rows;
    const float *parts;
    int64_t splits;
};

/* ---- what backward wants of each row ----------------------------------------------------------------------------- */

template <typename S> __device__ __forceinline__ S warp_sum(S x)
{
    for (int step = 16; step > 0; step /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

/* a warp has a row; S: float, or double for float64 */
template <typename S> __global__ void fa_bwd_rows_kernel(const __grid_constant__ params p)
{
    const fa_args *a = &p.a;
    const int64_t index = blockIdx.x * (int64_t)WARPS + threadIdx.x / 32;
    if (index >= a->q.size[0] * a->q.size[1] * a->q.size[2])
        return;
    const row r = row_at(a, index);
    const double lse = fa_load(a->lse.data, a->lse.dtype, offset_of(&a->lse, r));
    const bool sees = r.exists && lse != -INFINITY;
    const int64_t out = offset_of(&a->out, r), dout = offset_of(&a->dout, r);
    S delta = 0;
    for (int64_t d = threadIdx.x % 32; sees && d < a->v.size[3]; d += 32)
        delta += (S)fa_load(a->dout.data, a->dout.dtype, dout + d * a->dout.stride[3]) *
                 (S)fa_load(a->out.data, a->out.dtype, out + d * a->out.stride[3]);
    delta = warp_sum(delta);
    if (threadIdx.x % 32)
        return;
    if (sees && a->dlse.data)
        delta -= (S)fa_load(a->dlse.data, a->dlse.dtype, offset_of(&a->dlse, r));
    ((S *)p.lse2)[index] = sees ? (S)(lse * 1.4426950408889634) : (S)INFINITY;
    ((S *)p.delta)[index] = delta;
}

size_t fa_bwd_rows_bytes(const fa_args *a)
{
    return 2 * (size_t)rows_of(a) * (a->q.dtype == FA_F64 ? 8 : 4);
}

fa_bwd_row_numbers fa_bwd_rows_in(const fa_args *a, const void *workspace)
{
    return {workspace, (const char *)workspace + fa_bwd_rows_bytes(a) / 2, a->q.size[2]};
}

static params params_of(const fa_args *a, const fa_bwd_row_numbers *r)
{
    params p = {};
    p.a = *a;
    p.lse2 = (void *)r->lse2;
    p.delta = (void *)r->delta;
    p.rows = r->rows;
    return p;
}

fa_status fa_bwd_rows_launch(const fa_args *a, void *workspace, cudaStream_t stream, fa_error *err)
{
    const fa_bwd_row_numbers r = fa_bwd_rows_in(a, workspace);
    return fa_launch("fa_bwd_rows", a->q.dtype == FA_F64 ? fa_bwd_rows_kernel<double> : fa_bwd_rows_kernel<float>,
                     fa_ceil_div(rows_of(a), WARPS), 1, 32 * WARPS, 0, stream, params_of(a, &r), err);
}

/* ---- the gradient of the sinks ----------------------------------------------------------------------------------- */

/* dsink = -sum exp(sink - lse) delta: a key whose value is 0. A block has one element; thread x sums the rows x,
 * x + 256, ..., and the threads' sums are added in a fixed tree. */
template <typename S> __global__ void fa_dsinks_kernel(const __grid_constant__ params p)
{
    __shared__ double sSum[256];
    const fa_args *a = &p.a;
    const int64_t h = blockIdx.x % a->q.size[1], row = blockIdx.x / a->q.size[1], SQ = a->q.size[2];
    const bool all = a->sinks.size[0] == 1;
    double sum = 0;
    for (int64_t x = threadIdx.x; x < (all ? a->q.size[0] : 1) * SQ; x += 256) {
        const int64_t b = a->cu_q.data ? 0 : all ? x / SQ : row, i = x % SQ;
        const int64_t at = (b * a->q.size[1] + h) * p.rows + i;
        if (a->cu_q.data && !all && sequence_of(&a->cu_q, SQ, i) != row)
            continue;
        const double lse2 = ((const S *)p.lse2)[at], sink = fa_per_head(&a->sinks, all ? 0 : row, h);
        if (lse2 != INFINITY)
            sum -= exp2(sink * 1.4426950408889634 - lse2) * (double)((const S *)p.delta)[at];
    }
    sSum[threadIdx.x] = sum;
    for (int step = 128; step > 0; step /= 2) {
        __syncthreads();
        if (threadIdx.x < step)
            sSum[threadIdx.x] += sSum[threadIdx.x + step];
    }
    if (threadIdx.x == 0)
        fa_store(a->dsinks.data, a->dsinks.dtype, row * a->dsinks.stride[0] + h * a->dsinks.stride[1], sSum[0]);
}

fa_status fa_dsinks_launch(const fa_args *a, const fa_bwd_row_numbers *r, cudaStream_t stream, fa_error *err)
{
    return fa_launch("fa_dsinks", a->q.dtype == FA_F64 ? fa_dsinks_kernel<double> : fa_dsinks_kernel<float>,
                     a->sinks.size[0] * a->q.size[1], 1, 256, 0, stream, params_of(a, r), err);
}

/* ---- the merge of split keys ------------------------------------------------------------------------------------- */

/* Weights 2^(max of the part - max of all); a warp has a row. */
__global__ void fa_combine_kernel(const __grid_constant__ params p)
{
    const fa_args *a = &p.a;
    const int64_t rows = a->q.size[0] * a->q.size[1] * a->q.size[2], dv = a->v.size[3], each = fa_partial_floats(dv);
    const int64_t index = blockIdx.x * (int64_t)WARPS + threadIdx.x / 32;
    if (index >= rows)
        return;
    const row r = row_at(a, index);
    const float *parts = p.parts + index * each;
    float top = -INFINITY, l = 0;
    for (int64_t s = 0; s < p.splits; s++)
        top = fmaxf(top, parts[s * rows * each]);
    for (int64_t s = 0; s < p.splits && top != -INFINITY; s++)
        l += exp2f(parts[s * rows * each] - top) * parts[s * rows * each + 1];
    for (int64_t s = 0; s < p.splits && top == -INFINITY; s++) /* nothing seen is 0; NaN stays */
        l += parts[s * rows * each + 1];
    fa_row_end end = {0, -INFINITY};
    if (r.exists)
        end = fa_finish_row(a, r.n, r.h, top, l);
    const int64_t out = offset_of(&a->out, r);
    for (int64_t d = threadIdx.x % 32; d < dv; d += 32) {
        float sum = 0;
        for (int64_t s = 0; s < p.splits && top != -INFINITY; s++)
            sum += exp2f(parts[s * rows * each] - top) * parts[s * rows * each + 2 + d];
        fa_store(a->out.data, a->out.dtype, out + d * a->out.stride[3], end.scale == 0 ? 0 : sum * end.scale);
    }
    if (threadIdx.x % 32 == 0)
        ((float *)a->lse.data)[offset_of(&a->lse, r)] = (float)end.lse;
}

fa_status fa_combine_launch(const fa_args *a, const fa_plan *plan, const float *parts, cudaStream_t stream,
                            fa_error *err)
{
    params p = {};
    p.a = *a;
    p.parts = parts;
    p.splits = plan->splits;
    return fa_launch("fa_combine", fa_combine_kernel, fa_ceil_div(rows_of(a), WARPS), 1, 32 * WARPS, 0, stream, p, err);
}
