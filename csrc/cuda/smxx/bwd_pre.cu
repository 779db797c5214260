/* Before backward: what the main kernel needs of each query row.
 *
 *   row_lse   = lse * log2 e, +inf for a row that sees nothing (all its weights become 0) and past the length
 *   row_delta = rowsum(dO o O) - dlse, 0 past the length
 *
 * and where the call has them: offsets of sequences put in order, tensor maps that end at the lengths of each batch,
 * and a bool mask as bits.
 */
#include "../ptx/math.cuh"
#include "../ptx/tma.cuh"
#include "../ptx/warpgroup.cuh"
#include "../sm90/bwd_sm90.h"
#include "../sm90/bwd_sm90_walk.cuh"

#include <math_constants.h>

enum { FA_PRE_THREADS = 256, FA_PRE_LANES = 8 }; /* lanes of a row: 8 * 8 elements at a time */

/* probe becomes NaN where y is not finite. */
template <typename T> __device__ __forceinline__ float fa_dot_8(const T *x, const T *y, float &probe)
{
    uint4 a = *(const uint4 *)x, b = *(const uint4 *)y;
    const T *u = (const T *)&a, *v = (const T *)&b;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        sum = fmaf(fa_widen(u[i]), fa_widen(v[i]), sum);
        probe = fmaf(fa_widen(v[i]), 0.f, probe);
    }
    return sum;
}

/* Over the lanes of a row; those of other rows may be elsewhere. */
__device__ __forceinline__ float fa_row_sum(float x)
{
    uint32_t lanes = ((1u << FA_PRE_LANES) - 1) << threadIdx.x % FA_WARP / FA_PRE_LANES * FA_PRE_LANES;
#pragma unroll
    for (int distance = FA_PRE_LANES / 2; distance > 0; distance /= 2)
        x += __shfl_xor_sync(lanes, x, distance);
    return x;
}

template <typename T> __device__ __forceinline__ const T *fa_row_at(const fa_bwd_sm90_view &v, int b, int h, int i)
{
    return (const T *)v.data + b * v.batch + h * v.head + i * v.row;
}

/* A row's log-sum-exp in units of log2. The least number stays one; infinity comes of infinite scores. */
__device__ __forceinline__ float fa_lse_in_log2(float lse)
{
    if (lse == -CUDART_INF_F)
        return CUDART_INF_F;
    return lse < CUDART_INF_F ? fmaxf(lse * FA_LOG2E, FA_BWD_LEAST) : CUDART_NAN_F;
}

/* Row i of head h, by its lanes. Returns whether Q or dO may hold NaN or infinity: a Q that takes part in a score says
 * so in the log-sum-exp. A wild dO makes it NaN where there are hidden pairs (bwd_sm90_wild.cuh). */
template <typename T>
__device__ __forceinline__ bool fa_pre_row(const fa_bwd_sm90_params &p, int64_t at, int b, int h, int i, int lane)
{
    const T *out = fa_row_at<T>(p.out, b, h, i), *dout = fa_row_at<T>(p.dout, b, h, i), *q = fa_row_at<T>(p.q, b, h, i);
    float lse = *fa_row_at<float>(p.lse, b, h, i), sum = 0.f, probe = 0.f;
    for (int column = 8 * lane; column < p.DV; column += 8 * FA_PRE_LANES)
        sum += fa_dot_8(out + column, dout + column, probe);
    if (p.wild && lse == -CUDART_INF_F)
        for (int column = 8 * lane; column < p.D; column += 8 * FA_PRE_LANES)
            fa_dot_8(q + column, q + column, probe);
    sum = fa_row_sum(sum);
    bool wild = fa_row_sum(probe) != 0.f;
    if (lane == 0) {
        bool empty = lse == -CUDART_INF_F;
        float dlse = p.dlse.data ? *fa_row_at<float>(p.dlse, b, h, i) : 0.f;
        p.row_lse[at] = p.wild && wild && !empty ? CUDART_NAN_F : fa_lse_in_log2(lse);
        p.row_delta[at] = empty ? 0.f : sum - dlse;
    }
    return wild || !(lse < CUDART_INF_F);
}

/* Thread block: the rows of a block of BM queries. */
template <typename T> __global__ void __launch_bounds__(1024) fa_bwd_pre_kernel(const fa_bwd_sm90_params p)
{
    int block = blockIdx.x, head = block / p.q_blocks, row = threadIdx.x / FA_PRE_LANES, b = head / p.HQ;
    fa_bwd_slot slot = fa_slot_of(p.mod, p.mod.first_q, p.SQ, p.BM, block - head * p.q_blocks);
    int i = slot.block * p.BM + row, lane = threadIdx.x % FA_PRE_LANES;
    int64_t at = (int64_t)block * p.BM + row;
    bool wild = false;
    if (i < fa_band_of(p, b + slot.b).SQ) {
        wild = fa_pre_row<T>(p, at, b, head - b * p.HQ, slot.first + i, lane);
    } else if (lane == 0) {
        p.row_lse[at] = CUDART_INF_F;
        p.row_delta[at] = 0.f;
    }
    wild = __syncthreads_or(wild);
    if (threadIdx.x == 0) {
        p.turn[block] = 0;
        if (p.wild)
            p.wild[block] = wild;
    }
}

/* ---- sequences --------------------------------------------------------------------------------------------------- */

/* Offsets that nobody checked, put in order: each is the largest up to it, within the rows. */
__device__ __forceinline__ void fa_order_offsets(const fa_bwd_lengths &cu, int batches, int rows, int32_t *first)
{
    __shared__ int last[FA_PRE_THREADS / FA_WARP];
    int lane = threadIdx.x % FA_WARP, warp = threadIdx.x / FA_WARP, before = 0;
    for (int start = 0; start <= batches; start += FA_PRE_THREADS) {
        int n = start + threadIdx.x, x = n < batches ? fa_length_of(cu, n, rows) : rows;
#pragma unroll
        for (int distance = 1; distance < FA_WARP; distance *= 2) {
            int y = __shfl_up_sync(0xffffffff, x, distance);
            x = lane >= distance ? max(x, y) : x;
        }
        if (lane == FA_WARP - 1)
            last[warp] = x;
        __syncthreads();
        for (int w = 0; w < warp; w++)
            x = max(x, last[w]);
        x = max(x, before);
        if (n <= batches)
            first[n] = x;
        for (int w = 0; w < FA_PRE_THREADS / FA_WARP; w++)
            before = max(before, last[w]);
        __syncthreads();
    }
}

/* Two thread blocks: queries, keys. */
__global__ void __launch_bounds__(FA_PRE_THREADS) fa_bwd_offsets_kernel(const __grid_constant__ fa_bwd_sm90_params p)
{
    if (blockIdx.x == 0)
        fa_order_offsets(p.mod.cu_q, p.mod.batches, p.SQ, p.mod.first_q);
    else
        fa_order_offsets(p.mod.cu_k, p.mod.batches, p.SK, p.mod.first_k);
}

/* ---- tensor maps ------------------------------------------------------------------------------------------------- */

/* Thread: one of the maps of a batch. What lies past a length then is never read and arrives as zeros. */
__global__ void __launch_bounds__(FA_PRE_THREADS) fa_bwd_maps_kernel(const __grid_constant__ fa_bwd_sm90_params p)
{
    int i = blockIdx.x * FA_PRE_THREADS + threadIdx.x, b = i / FA_MAPS, which = i % FA_MAPS;
    if (b >= p.mod.batches)
        return;
    fa_bwd_band band = fa_band_of(p, b);
    const CUtensorMap *whole[] = {&p.q_map, &p.dout_map, &p.k_map, &p.v_map};
    const fa_bwd_sm90_view *view[] = {&p.q, &p.dout, &p.k, &p.v};
    for (int word = 0; word < (int)(sizeof(CUtensorMap) / sizeof(uint4)); word++)
        ((uint4 *)(p.mod.maps + i))[word] = ((const uint4 *)whole[which])[word];
    bool of_q = which == FA_MAP_Q || which == FA_MAP_DOUT;
    fa_tensor_map_resize<1>(p.mod.maps + i, max(of_q ? band.SQ : band.SK, 1));
    if (p.mod.options & FA_MOD_PACKED) {
        int first = (of_q ? p.mod.first_q : p.mod.first_k)[b];
        fa_tensor_map_move(p.mod.maps + i, (const char *)view[which]->data + first * view[which]->row * 2);
    }
    fa_tensor_map_release();
}

/* ---- bool masks -------------------------------------------------------------------------------------------------- */

/* Thread: a word, of 64 queries and one key. What lies past the mask is hidden. */
__global__ void __launch_bounds__(FA_PRE_THREADS) fa_bwd_bits_kernel(const __grid_constant__ fa_bwd_sm90_params p)
{
    const fa_bwd_mod &m = p.mod;
    int64_t keys = m.bits_key ? (int64_t)p.k_blocks * p.BN : 2, blocks = m.mask_query ? p.q_blocks * (p.BM / 64) : 1;
    int64_t heads = m.bits_head ? p.HQ : 1, at = (int64_t)blockIdx.x * FA_PRE_THREADS + threadIdx.x;
    int64_t key = at % keys, block = at / keys % blocks, head = at / keys / blocks % heads;
    int64_t b = at / keys / blocks / heads;
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

static cudaError_t launch(const void *kernel, int64_t blocks, int threads, const fa_bwd_sm90_params *p,
                          cudaStream_t stream)
{
    void *arguments[] = {(void *)p};
    return cudaLaunchKernel(kernel, dim3((unsigned)blocks), dim3((unsigned)threads), arguments, 0, stream);
}

/* A thread for each of n. */
static cudaError_t launch_each(const void *kernel, int64_t n, const fa_bwd_sm90_params *p, cudaStream_t stream)
{
    return launch(kernel, (n + FA_PRE_THREADS - 1) / FA_PRE_THREADS, FA_PRE_THREADS, p, stream);
}

extern "C" cudaError_t fa_bwd_pre_launch(const fa_bwd_sm90_params *p, fa_dtype dtype, cudaStream_t stream)
{
    int64_t blocks = (int64_t)p->B * p->HQ * p->q_blocks;
    if (blocks == 0)
        return cudaSuccess;
    const void *kernel = dtype == FA_BF16 ? (const void *)fa_bwd_pre_kernel<fa_bf16_t>
                                          : (const void *)fa_bwd_pre_kernel<fa_f16_t>;
    cudaError_t e = cudaSuccess;
    if (p->mod.options & FA_MOD_PACKED)
        e = launch((const void *)fa_bwd_offsets_kernel, 2, FA_PRE_THREADS, p, stream);
    if (e == cudaSuccess)
        e = launch(kernel, blocks, p->BM * FA_PRE_LANES, p, stream);
    if (e == cudaSuccess && (p->mod.options & FA_MOD_LENGTHS))
        e = launch_each((const void *)fa_bwd_maps_kernel, (int64_t)p->mod.batches * FA_MAPS, p, stream);
    if (e == cudaSuccess && (p->mod.options & FA_MOD_BITS))
        e = launch_each((const void *)fa_bwd_bits_kernel, words_of(p), p, stream);
    return e;
}
