/* Before backward: what the main kernel needs of each query row.
 *
 *   row_lse   = lse * log2 e, +inf for a row that sees nothing (all its weights become 0) and past the length
 *   row_delta = rowsum(dO o O) - dlse, 0 past the length
 *
 * and where the call has them: tensor maps that end at the lengths of each batch, and a bool mask as bits.
 */
#include "../ptx/math.cuh"
#include "../ptx/tma.cuh"
#include "../ptx/warpgroup.cuh"
#include "../sm90/bwd_sm90.h"
#include "../sm90/bwd_sm90_walk.cuh"

#include <float.h>
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

/* len: queries of the batch. The log-sum-exp may be the least number, which in units of log2 would be -inf. */
__device__ __forceinline__ void fa_store_row(const fa_bwd_sm90_params &p, int64_t at, int b, int h, int i, int len,
                                             float sum)
{
    if (i >= len) {
        p.row_lse[at] = CUDART_INF_F;
        p.row_delta[at] = 0.f;
        return;
    }
    float lse = ((const float *)p.lse.data)[b * p.lse.batch + h * p.lse.head + i * p.lse.row];
    float dlse = p.dlse.data ? ((const float *)p.dlse.data)[b * p.dlse.batch + h * p.dlse.head + i * p.dlse.row] : 0.f;
    bool empty = lse == -CUDART_INF_F;
    p.row_lse[at] = empty ? CUDART_INF_F : lse >= -FLT_MAX ? fmaxf(lse * 1.44269504088896f, -FLT_MAX) : lse;
    p.row_delta[at] = empty ? 0.f : sum - dlse;
}

template <typename T> __global__ void __launch_bounds__(FA_PRE_THREADS) fa_bwd_pre_kernel(const fa_bwd_sm90_params p)
{
    int64_t at = ((int64_t)blockIdx.x * FA_PRE_THREADS + threadIdx.x) / FA_PRE_LANES;
    int lane = threadIdx.x % FA_PRE_LANES, rows = p.q_blocks * p.BM;
    if (at >= (int64_t)p.B * p.HQ * rows)
        return;
    int head = (int)(at / rows), i = (int)(at - (int64_t)head * rows), b = head / p.HQ, h = head - b * p.HQ;
    int len = p.mod.options & FA_MOD_LENGTHS ? fa_length_of(p.mod.q_len, b, p.SQ) : p.SQ;
    float sum = 0.f;
    if (i < len) {
        const T *out = (const T *)p.out.data + b * p.out.batch + h * p.out.head + i * p.out.row;
        const T *dout = (const T *)p.dout.data + b * p.dout.batch + h * p.dout.head + i * p.dout.row;
        for (int column = 8 * lane; column < p.DV; column += 8 * FA_PRE_LANES)
            sum += fa_dot_8(out + column, dout + column);
    }
#pragma unroll
    for (int distance = FA_PRE_LANES / 2; distance > 0; distance /= 2)
        sum += __shfl_xor_sync(0xffffffff, sum, distance);
    if (lane == 0) {
        fa_store_row(p, at, b, h, i, len, sum);
        if (i % p.BM == 0)
            p.turn[at / p.BM] = 0;
        if (at == 0 && p.spoilt)
            *p.spoilt = 0;
    }
}

/* ---- tensor maps ------------------------------------------------------------------------------------------------- */

/* Thread: one of the maps of a batch. What lies past a length then is never read and arrives as zeros. */
__global__ void __launch_bounds__(FA_PRE_THREADS) fa_bwd_maps_kernel(const __grid_constant__ fa_bwd_sm90_params p)
{
    int i = blockIdx.x * FA_PRE_THREADS + threadIdx.x, b = i / FA_MAPS, which = i % FA_MAPS;
    if (b >= p.B)
        return;
    fa_bwd_band band = fa_band_of(p, b);
    const CUtensorMap *whole[] = {&p.q_map, &p.dout_map, &p.k_map, &p.v_map};
    for (int word = 0; word < (int)(sizeof(CUtensorMap) / sizeof(uint4)); word++)
        ((uint4 *)(p.mod.maps + i))[word] = ((const uint4 *)whole[which])[word];
    int rows = which == FA_MAP_Q || which == FA_MAP_DOUT ? band.SQ : band.SK;
    fa_tensor_map_resize<1>(p.mod.maps + i, max(rows, 1));
    fa_tensor_map_release();
}

/* ---- bool masks -------------------------------------------------------------------------------------------------- */

/* Thread: a word, of 64 queries and one key. What lies past the mask is hidden. */
__global__ void __launch_bounds__(FA_PRE_THREADS) fa_bwd_bits_kernel(const __grid_constant__ fa_bwd_sm90_params p)
{
    const fa_bwd_mod &m = p.mod;
    int64_t keys = m.bits_key ? (int64_t)p.k_blocks * p.BN : 2, blocks = m.mask_query ? p.q_blocks * (p.BM / 64) : 1;
    int64_t heads = m.bits_head ? p.HQ : 1, at = (int64_t)blockIdx.x * FA_PRE_THREADS + threadIdx.x;
    int64_t key = at % keys, block = at / keys % blocks, head = at / keys / blocks % heads, b = at / keys / blocks / heads;
    if (b >= (m.bits_batch ? p.B : 1))
        return;
    const uint8_t *mask = (const uint8_t *)m.mask + b * m.mask_batch + head * m.mask_head + key * m.mask_key;
    bool inside = !m.bits_key || key < p.SK;
    uint64_t word = 0;
#pragma unroll 16
    for (int i = 0; i < 64; i++) {
        int64_t query = 64 * block + i;
        bool seen = inside && (!m.mask_query || query < p.SQ) && mask[query * m.mask_query];
        word |= (uint64_t)seen << i;
    }
    m.bits[at] = word;
}

static int64_t words_of(const fa_bwd_sm90_params *p)
{
    const fa_bwd_mod *m = &p->mod;
    return (m->bits_batch ? p->B : 1) * (int64_t)(m->bits_head ? p->HQ : 1) *
           (m->mask_query ? p->q_blocks * (p->BM / 64) : 1) * (m->bits_key ? (int64_t)p->k_blocks * p->BN : 2);
}

static cudaError_t launch(const void *kernel, int64_t threads, const fa_bwd_sm90_params *p, cudaStream_t stream)
{
    void *arguments[] = {(void *)p};
    dim3 grid((unsigned)((threads + FA_PRE_THREADS - 1) / FA_PRE_THREADS));
    return cudaLaunchKernel(kernel, grid, dim3(FA_PRE_THREADS), arguments, 0, stream);
}

extern "C" cudaError_t fa_bwd_pre_launch(const fa_bwd_sm90_params *p, fa_dtype dtype, cudaStream_t stream)
{
    int64_t rows = (int64_t)p->B * p->HQ * p->q_blocks * p->BM; /* a multiple of 64: warps are whole */
    if (rows == 0)
        return cudaSuccess;
    const void *kernel = dtype == FA_BF16 ? (const void *)fa_bwd_pre_kernel<fa_bf16_t>
                                          : (const void *)fa_bwd_pre_kernel<fa_f16_t>;
    cudaError_t e = launch(kernel, rows * FA_PRE_LANES, p, stream);
    if (e == cudaSuccess && (p->mod.options & FA_MOD_LENGTHS))
        e = launch((const void *)fa_bwd_maps_kernel, (int64_t)p->B * FA_MAPS, p, stream);
    if (e == cudaSuccess && (p->mod.options & FA_MOD_BITS))
        e = launch((const void *)fa_bwd_bits_kernel, words_of(p), p, stream);
    return e;
}
