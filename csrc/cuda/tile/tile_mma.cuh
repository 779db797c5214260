/* Matrix products of tiles in shared memory by one warp, on tensor cores: C (16 x 8 NT) += A (16 x 16) B (16 x 8 NT).
 *
 * float: each operand is cut into two parts of tf32, x = big + small, and big * big + big * small + small * big is
 * summed, so that products keep the accuracy of fp32 (Ootomo and Yokota, "Recovering single precision accuracy from
 * Tensor Cores", 2022). Tensor cores cut off their sums instead of rounding them, so each step starts from 0 and is
 * added by an ordinary addition. */
#ifndef FA_TILE_MMA_CUH
#define FA_TILE_MMA_CUH

#include "../ptx/ptx_sm80.cuh"

/* Elements from one row of a tile to the next, for rows of `width`: an odd number of 16-byte words, so that eight rows
 * lie in different banks. */
template <typename T> __host__ __device__ constexpr int fa_tile_ld(int width)
{
    return width + 16 / (int)sizeof(T);
}

/* ---- bf16 and fp16 ----------------------------------------------------------------------------------------------- */

template <typename T> struct fa_frag_a {
    uint32_t r[4];
};
template <typename T> struct fa_frag_b { /* of two neighbouring 8-column tiles */
    uint32_t r[4];
};

/* A <- rows row0 .. +15, columns k0 .. +15 of the tile */
template <typename T>
__device__ __forceinline__ void fa_load_a(fa_frag_a<T> &a, const T *tile, int ld, int row0, int k0)
{
    int lane = threadIdx.x % 32;
    ptx_ldmatrix(a.r, tile + (row0 + lane % 16) * ld + k0 + lane / 16 * 8);
}

/* B <- columns n0 .. +15 of the product from a tile that is stored [n][k] */
template <typename T>
__device__ __forceinline__ void fa_load_b_nk(fa_frag_b<T> &b, const T *tile, int ld, int n0, int k0)
{
    int lane = threadIdx.x % 32;
    ptx_ldmatrix(b.r, tile + (n0 + lane % 8 + lane / 16 * 8) * ld + k0 + lane / 8 % 2 * 8);
}

/* the same from a tile that is stored [k][n] */
template <typename T>
__device__ __forceinline__ void fa_load_b_kn(fa_frag_b<T> &b, const T *tile, int ld, int n0, int k0)
{
    int lane = threadIdx.x % 32;
    ptx_ldmatrix_trans(b.r, tile + (k0 + lane % 16) * ld + n0 + lane / 16 * 8);
}

__device__ __forceinline__ uint32_t fa_pack(float x, float y, __nv_bfloat16)
{
    __nv_bfloat162 p = __floats2bfloat162_rn(x, y);
    return *(uint32_t *)&p;
}
__device__ __forceinline__ uint32_t fa_pack(float x, float y, __half)
{
    __half2 p = __floats2half2_rn(x, y);
    return *(uint32_t *)&p;
}

/* A <- two neighbouring 16 x 8 results */
template <typename T> __device__ __forceinline__ void fa_a_from_c(fa_frag_a<T> &a, const float c0[4], const float c1[4])
{
    a.r[0] = fa_pack(c0[0], c0[1], T());
    a.r[1] = fa_pack(c0[2], c0[3], T());
    a.r[2] = fa_pack(c1[0], c1[1], T());
    a.r[3] = fa_pack(c1[2], c1[3], T());
}

template <typename T>
__device__ __forceinline__ void fa_mma(float c0[4], float c1[4], const fa_frag_a<T> &a, const fa_frag_b<T> &b)
{
    ptx_mma(c0, a.r, b.r, T());
    ptx_mma(c1, a.r, b.r + 2, T());
}

/* ---- float ---------------------------------------------------------------------------------------------------------
 * The sum over k may go in any order as long as A and B agree: lane 4g + t takes k = 2t as its column t and 2t + 1 as
 * its column t + 4, which is also how results lie. */

template <> struct fa_frag_a<float> {
    uint32_t big[2][4], small[2][4]; /* [columns 0 .. 7, 8 .. 15] */
};
template <> struct fa_frag_b<float> {
    uint32_t big[2][2][2], small[2][2][2]; /* [tile][rows 0 .. 7, 8 .. 15] */
};

__device__ __forceinline__ void fa_cut(float x, uint32_t &big, uint32_t &small)
{
    big = ptx_to_tf32(x); /* rounded: what is left, at most 2^-11 of x, may be ignored where it is squared */
    small = ptx_to_tf32(x - __uint_as_float(big));
}

template <>
__device__ __forceinline__ void fa_load_a(fa_frag_a<float> &a, const float *tile, int ld, int row0, int k0)
{
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float2 x = *(const float2 *)(tile + (row0 + g + 8 * i) * ld + k0 + 8 * k + 2 * t);
            fa_cut(x.x, a.big[k][i], a.small[k][i]);
            fa_cut(x.y, a.big[k][i + 2], a.small[k][i + 2]);
        }
}

template <>
__device__ __forceinline__ void fa_load_b_nk(fa_frag_b<float> &b, const float *tile, int ld, int n0, int k0)
{
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int k = 0; k < 2; k++) {
            float2 x = *(const float2 *)(tile + (n0 + 8 * n + g) * ld + k0 + 8 * k + 2 * t);
            fa_cut(x.x, b.big[n][k][0], b.small[n][k][0]);
            fa_cut(x.y, b.big[n][k][1], b.small[n][k][1]);
        }
}

template <>
__device__ __forceinline__ void fa_load_b_kn(fa_frag_b<float> &b, const float *tile, int ld, int n0, int k0)
{
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int k = 0; k < 2; k++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                fa_cut(tile[(k0 + 8 * k + 2 * t + i) * ld + n0 + 8 * n + g], b.big[n][k][i], b.small[n][k][i]);
}

template <>
__device__ __forceinline__ void fa_a_from_c(fa_frag_a<float> &a, const float c0[4], const float c1[4])
{
    const int place[4] = {0, 2, 1, 3}; /* of (row g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1) */
#pragma unroll
    for (int i = 0; i < 4; i++) {
        fa_cut(c0[i], a.big[0][place[i]], a.small[0][place[i]]);
        fa_cut(c1[i], a.big[1][place[i]], a.small[1][place[i]]);
    }
}

__device__ __forceinline__ void fa_mma_one(float c[4], const fa_frag_a<float> &a, const fa_frag_b<float> &b, int n)
{
    float sum[4] = {0, 0, 0, 0};
#pragma unroll
    for (int k = 0; k < 2; k++) {
        ptx_mma_tf32(sum, a.small[k], b.big[n][k]);
        ptx_mma_tf32(sum, a.big[k], b.small[n][k]);
    }
#pragma unroll
    for (int k = 0; k < 2; k++)
        ptx_mma_tf32(sum, a.big[k], b.big[n][k]);
#pragma unroll
    for (int i = 0; i < 4; i++)
        c[i] += sum[i];
}

template <>
__device__ __forceinline__ void fa_mma(float c0[4], float c1[4], const fa_frag_a<float> &a, const fa_frag_b<float> &b)
{
    fa_mma_one(c0, a, b, 0);
    fa_mma_one(c1, a, b, 1);
}

/* ---- products of tiles ------------------------------------------------------------------------------------------- */

/* acc (16 x 8 NA) += W X: W the results of a tile (16 x 8 NT), X its 8 NT rows in shared memory, stored
 * [row][column] */
template <typename T, int NT, int NA>
__device__ __forceinline__ void fa_product_kn(float (&acc)[NA][4], const float (&w)[NT][4], const T *sX, int x_ld)
{
#pragma unroll
    for (int k = 0; k < NT; k += 2) {
        fa_frag_a<T> a;
        fa_a_from_c(a, w[k], w[k + 1]);
#pragma unroll
        for (int n = 0; n < NA; n += 2) {
            fa_frag_b<T> b;
            fa_load_b_kn(b, sX, x_ld, n * 8, k * 8);
            fa_mma(acc[n], acc[n + 1], a, b);
        }
    }
}

#endif
