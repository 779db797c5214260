/* From the accumulator layout of wgmma to rows in memory, 16 bytes a thread, without shared memory. */
#ifndef FA_TILE_STORE_ROWS_CUH
#define FA_TILE_STORE_ROWS_CUH

#include "softmax.cuh"

/* The 4 x 4 words of a quad (thread, register) transposed. */
__device__ __forceinline__ void fa_quad_transpose(uint32_t (&w)[4])
{
    int lane = threadIdx.x % 4;
#pragma unroll
    for (int bit = 1; bit <= 2; bit <<= 1) {
        bool high = lane & bit;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & bit)
                continue;
            uint32_t got = __shfl_xor_sync(0xffffffff, high ? w[i] : w[i + bit], bit);
            if (high)
                w[i] = got;
            else
                w[i + bit] = got;
        }
    }
}

/* 64 rows from `row` on, those below `rows`, and the first `columns` (a multiple of 8) of DV columns. */
template <typename T, int DV>
__device__ __forceinline__ void fa_store_rows(T *out, int64_t stride, const float (&o)[DV / 2], const fa_rows_out &f,
                                              int row, int rows, int columns)
{
    int lane = threadIdx.x % FA_WARP, warp = threadIdx.x / FA_WARP % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int at = row + 16 * warp + 8 * i + lane / 4;
        T *to = out + at * stride;
#pragma unroll
        for (int c = 0; c < DV / 8; c += 4) {
            uint32_t w[4];
#pragma unroll
            for (int x = 0; x < 4; x++)
                w[x] = fa_pack<T>(o[4 * (c + x) + 2 * i] * f.factor[i], o[4 * (c + x) + 2 * i + 1] * f.factor[i]);
            fa_quad_transpose(w);
            if (f.empty[i]) /* not a product with 0: what hidden keys left in o may be NaN */
                w[0] = w[1] = w[2] = w[3] = 0;
            int column = 8 * (c + lane % 4);
            if (at < rows && column < columns)
                *(uint4 *)(to + column) = make_uint4(w[0], w[1], w[2], w[3]);
        }
    }
}

__device__ __forceinline__ void fa_store_lse(float *lse, const fa_rows_out &f, int row, int rows)
{
    int lane = threadIdx.x % FA_WARP, warp = threadIdx.x / FA_WARP % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int at = row + 16 * warp + 8 * i + lane / 4;
        if (lane % 4 == 0 && at < rows)
            lse[at] = f.lse[i];
    }
}

#endif
