/* Before backward: what the main kernel needs of each query row.
 *
 *   row_lse   = lse * log2 e, +inf for a row that sees nothing (all its weights become 0) and past SQ
 *   row_delta = rowsum(dO o O) - dlse, 0 past SQ
 */
#include "../ptx/math.cuh"
#include "../ptx/warpgroup.cuh"
#include "../sm90/bwd_sm90.h"

#include <math_constants.h>

enum { FA_PRE_THREADS = 256, FA_PRE_LANES = 8 }; /* lanes of a row: 8 * 8 elements at a time */

template <typename T> __device__ __forceinline__ float fa_dot_8(const T *x, const T *y)
{
    uint4 a = *(const uint4 *)x, b = *(const uint4 *)y;
    const T *u = (const T *)&a, *v = (const T *)&b;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++)
        sum = fmaf(fa_widen(u[i]), fa_widen(v[i]), sum);
    return sum;
}

__device__ __forceinline__ void fa_store_row(const fa_bwd_sm90_params &p, int64_t at, int b, int h, int i, float sum)
{
    if (i >= p.SQ) {
        p.row_lse[at] = CUDART_INF_F;
        p.row_delta[at] = 0.f;
        return;
    }
    float lse = ((const float *)p.lse.data)[b * p.lse.batch + h * p.lse.head + i * p.lse.row];
    float dlse = p.dlse.data ? ((const float *)p.dlse.data)[b * p.dlse.batch + h * p.dlse.head + i * p.dlse.row] : 0.f;
    bool empty = lse == -CUDART_INF_F;
    p.row_lse[at] = empty ? CUDART_INF_F : lse * 1.44269504088896f;
    p.row_delta[at] = empty ? 0.f : sum - dlse;
}

template <typename T> __global__ void __launch_bounds__(FA_PRE_THREADS) fa_bwd_pre_kernel(const fa_bwd_sm90_params p)
{
    int64_t at = ((int64_t)blockIdx.x * FA_PRE_THREADS + threadIdx.x) / FA_PRE_LANES;
    int lane = threadIdx.x % FA_PRE_LANES, rows = p.q_blocks * p.BM;
    if (at >= (int64_t)p.B * p.HQ * rows)
        return;
    int head = (int)(at / rows), i = (int)(at - (int64_t)head * rows), b = head / p.HQ, h = head - b * p.HQ;
    float sum = 0.f;
    if (i < p.SQ) {
        const T *out = (const T *)p.out.data + b * p.out.batch + h * p.out.head + i * p.out.row;
        const T *dout = (const T *)p.dout.data + b * p.dout.batch + h * p.dout.head + i * p.dout.row;
        for (int column = 8 * lane; column < p.DV; column += 8 * FA_PRE_LANES)
            sum += fa_dot_8(out + column, dout + column);
    }
#pragma unroll
    for (int distance = FA_PRE_LANES / 2; distance > 0; distance /= 2)
        sum += __shfl_xor_sync(0xffffffff, sum, distance);
    if (lane == 0) {
        fa_store_row(p, at, b, h, i, sum);
        if (i % p.BM == 0)
            p.turn[at / p.BM] = 0;
    }
}

extern "C" cudaError_t fa_bwd_pre_launch(const fa_bwd_sm90_params *p, fa_dtype dtype, cudaStream_t stream)
{
    int64_t rows = (int64_t)p->B * p->HQ * p->q_blocks * p->BM; /* a multiple of 64: warps are whole */
    if (rows == 0)
        return cudaSuccess;
    dim3 grid((unsigned)((rows * FA_PRE_LANES + FA_PRE_THREADS - 1) / FA_PRE_THREADS));
    const void *kernel = dtype == FA_BF16 ? (const void *)fa_bwd_pre_kernel<fa_bf16_t>
                                          : (const void *)fa_bwd_pre_kernel<fa_f16_t>;
    void *arguments[] = {(void *)p};
    return cudaLaunchKernel(kernel, grid, dim3(FA_PRE_THREADS), arguments, 0, stream);
}
