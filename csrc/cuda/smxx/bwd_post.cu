/* After backward: dQ = scale * dq_sum, rounded, from the layout of accumulators to rows. */
#include "../ptx/warpgroup.cuh"
#include "../sm90/bwd_sm90.h"
#include "../sm90/bwd_sm90_walk.cuh"
#include "../tile/store_rows.cuh"

/* Thread block x: 64 rows, those of sum x. */
template <typename T, int D>
__global__ void __launch_bounds__(FA_WARPGROUP) fa_bwd_post_kernel(const fa_bwd_sm90_params p)
{
    int tiles = p.q_blocks * (p.BM / 64), head = blockIdx.x / tiles, tile = blockIdx.x - head * tiles;
    int b = head / p.HQ, h = head - b * p.HQ, part = tile % (p.BM / 64);
    fa_bwd_slot slot = fa_slot_of(p.mod, p.mod.first_q, p.SQ, p.BM, tile / (p.BM / 64));
    fa_key_blocks keys = fa_key_blocks_of(fa_band_of(p, b + slot.b), slot.block, p.BM, p.BN);
    const float4 *sum = (const float4 *)(p.dq_sum + (int64_t)blockIdx.x * 64 * D) + threadIdx.x;
    float dq[D / 2];
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
        float4 x = keys.lo < keys.hi ? sum[i * FA_WARPGROUP] : make_float4(0.f, 0.f, 0.f, 0.f);
        dq[4 * i] = x.x;
        dq[4 * i + 1] = x.y;
        dq[4 * i + 2] = x.z;
        dq[4 * i + 3] = x.w;
    }
    fa_rows_out f = {{p.scale, p.scale}, {0.f, 0.f}, {false, false}};
    T *to = (T *)p.dq.data + b * p.dq.batch + h * p.dq.head + slot.first * p.dq.row;
    fa_store_rows<T, D>(to, p.dq.row, dq, f, slot.block * p.BM + part * 64, slot.rows, p.D);
}

template <typename T> static const void *fa_bwd_post_for(int D)
{
    return D == 64    ? (const void *)fa_bwd_post_kernel<T, 64>
           : D == 128 ? (const void *)fa_bwd_post_kernel<T, 128>
           : D == 192 ? (const void *)fa_bwd_post_kernel<T, 192>
                      : (const void *)fa_bwd_post_kernel<T, 256>;
}

extern "C" cudaError_t fa_bwd_post_launch(const fa_bwd_sm90_params *p, fa_dtype dtype, int D, cudaStream_t stream)
{
    int64_t tiles = (int64_t)p->B * p->HQ * p->q_blocks * (p->BM / 64);
    if (tiles == 0)
        return cudaSuccess;
    const void *kernel = dtype == FA_BF16 ? fa_bwd_post_for<fa_bf16_t>(D) : fa_bwd_post_for<fa_f16_t>(D);
    void *arguments[] = {(void *)p};
    return cudaLaunchKernel(kernel, dim3((unsigned)tiles), dim3(FA_WARPGROUP), arguments, 0, stream);
}
