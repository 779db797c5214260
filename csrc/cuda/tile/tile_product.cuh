/* Matrix products of a warp, on tensor cores, of tiles in shared memory: MT times 16 rows by NT times 8 columns.
 *
 * Addresses are bytes of shared memory, and a lane's own part of one is formed once: all that follows is a constant
 * distance from it. A row is an odd number of 16-byte words, so that eight rows lie in different banks.
 *
 * float: each operand is cut into two parts of tf32, x = big + small, and big * big + big * small + small * big is
 * summed, so that products keep the accuracy of fp32 (Ootomo and Yokota, "Recovering single precision accuracy from
 * Tensor Cores", 2022). Tensor cores cut off their sums instead of rounding them, so 16 terms of the sum at a time
 * start from 0 and are added by an ordinary addition. */
#ifndef FA_TILE_PRODUCT_CUH
#define FA_TILE_PRODUCT_CUH

#include "tile_mma.cuh"

/* bytes from one row of a tile to the next, for rows of `width` elements */
template <typename T> __host__ __device__ constexpr int fa_row_bytes(int width)
{
    return width * (int)sizeof(T) + 16;
}

/* Of `width` columns so many are worked on where no more count: whole groups of what a lane takes at a time. */
template <typename T> __host__ __device__ constexpr int fa_fewer(int width)
{
    return sizeof(T) == 4 ? width * 3 / 4 / 32 * 32 : width * 3 / 4;
}

/* ---- where a lane's part lies ------------------------------------------------------------------------------------ */

/* of the left operand, [row][k], from row row0 on */
template <int LDB> __device__ __forceinline__ uint32_t fa_lane_left(uint32_t tile, int row0)
{
    const int lane = threadIdx.x % 32;
    return tile + (row0 + lane % 16) * LDB + lane / 16 * 16;
}

/* of a right operand that is stored [column][k] */
template <int LDB> __device__ __forceinline__ uint32_t fa_lane_nk(uint32_t tile)
{
    const int lane = threadIdx.x % 32;
    return tile + (lane % 8 + lane / 16 * 8) * LDB + lane / 8 % 2 * 16;
}

/* of a right operand that is stored [k][column] */
template <typename T, int LDB> __device__ __forceinline__ uint32_t fa_lane_kn(uint32_t tile)
{
    const int lane = threadIdx.x % 32;
    return sizeof(T) == 4 ? tile + lane % 4 * 2 * LDB + lane / 4 * 16 : tile + lane % 16 * LDB + lane / 16 * 16;
}

/* Column of a product with such an operand that a lane has as column 2t + e of the n-th 8: for float the lanes take
 * four columns at a time of 32. */
template <typename T> __device__ __forceinline__ int fa_column(int n, int e)
{
    const int t = threadIdx.x % 4;
    return sizeof(T) == 4 ? n / 4 * 32 + 8 * t + 4 * e + n % 4 : n * 8 + 2 * t + e;
}

/* ---- bf16 and fp16 ----------------------------------------------------------------------------------------------- */

/* All of the left operand's MT times 16 rows, WIDTH columns, in registers. */
template <int MT, int STEPS> struct fa_left {
    uint32_t r[STEPS][MT][4];
};

template <int LDB, int MT, int STEPS> __device__ __forceinline__ void fa_load_left(fa_left<MT, STEPS> &a, uint32_t left)
{
#pragma unroll
    for (int k = 0; k < STEPS; k++)
#pragma unroll
        for (int m = 0; m < MT; m++)
            ptx_ldmatrix(a.r[k][m], left + m * 16 * LDB + 32 * k);
}

template <typename T, int LDB, int MT, int NT>
__device__ __forceinline__ void fa_nk_step(float (&c)[MT][NT][4], const uint32_t (&a)[MT][4], uint32_t right)
{
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
        uint32_t b[4];
        ptx_ldmatrix(b, right + n * 8 * LDB);
#pragma unroll
        for (int m = 0; m < MT; m++) {
            ptx_mma(c[m][n], a[m], b, T());
            ptx_mma(c[m][n + 1], a[m], b + 2, T());
        }
    }
}

/* c += A B^T over WIDTH columns of both, or fa_fewer(WIDTH) where narrow. left: fa_lane_left,
 * right: fa_lane_nk. */
template <typename T, int WIDTH, int MT, int NT> struct fa_nk {
    static constexpr int LDB = fa_row_bytes<T>(WIDTH), STEPS = WIDTH / 16;

    static __device__ __forceinline__ void run(float (&c)[MT][NT][4], uint32_t left, uint32_t right, bool narrow)
    {
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            if (k == fa_fewer<T>(WIDTH) / 16 && narrow)
                break;
            fa_left<MT, 1> a;
            fa_load_left<LDB>(a, left + 32 * k);
            fa_nk_step<T, LDB>(c, a.r[0], right + 32 * k);
        }
    }

    static __device__ __forceinline__ void run(float (&c)[MT][NT][4], const fa_left<MT, STEPS> &a, uint32_t right,
                                               bool narrow)
    {
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            if (k == fa_fewer<T>(WIDTH) / 16 && narrow)
                break;
            fa_nk_step<T, LDB>(c, a.r[k], right + 32 * k);
        }
    }
};

/* acc += W X: W the results of a product (8 NT columns), X its 8 NT rows, 8 NA columns, or fa_fewer(8 NA)
 * where narrow. right: fa_lane_kn. */
template <typename T, int LDB, int MT, int NT, int NA> struct fa_kn {
    static __device__ __forceinline__ void run(float (&acc)[MT][NA][4], const float (&w)[MT][NT][4], uint32_t right,
                                               bool narrow)
    {
        constexpr int FEWER = fa_fewer<T>(8 * NA) / 8;
        uint32_t a[NT / 2][MT][4];
#pragma unroll
        for (int k = 0; k < NT / 2; k++)
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    a[k][m][i] = fa_pack(w[m][2 * k + i / 2][i % 2 * 2], w[m][2 * k + i / 2][i % 2 * 2 + 1], T());
        columns<0, FEWER>(acc, a, right);
        if (!narrow)
            columns<FEWER, NA>(acc, a, right);
    }

    template <int FIRST, int LAST>
    static __device__ __forceinline__ void columns(float (&acc)[MT][NA][4], const uint32_t (&a)[NT / 2][MT][4],
                                                   uint32_t right)
    {
#pragma unroll
        for (int k = 0; k < NT / 2; k++)
#pragma unroll
            for (int n = FIRST; n < LAST; n += 2) {
                uint32_t b[4];
                ptx_ldmatrix_trans(b, right + k * 16 * LDB + n * 16);
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    ptx_mma(acc[m][n], a[k][m], b, T());
                    ptx_mma(acc[m][n + 1], a[k][m], b + 2, T());
                }
            }
    }
};

/* ---- float ------------------------------------------------------------------------------------------------------- */

/* 16 columns of the left operand, cut: [columns 0 .. 7, 8 .. 15][16 rows] */
template <int MT> struct fa_left_cut {
    uint32_t big[2][MT][4], small[2][MT][4];
};

template <int MT>
__device__ __forceinline__ void fa_mma_cut(float (&c)[MT][4], const fa_left_cut<MT> &a, const uint32_t (&big)[2][2],
                                           const uint32_t (&small)[2][2])
{
#pragma unroll
    for (int m = 0; m < MT; m++) {
        float sum[4] = {0, 0, 0, 0};
#pragma unroll
        for (int k = 0; k < 2; k++) {
            ptx_mma_tf32(sum, a.small[k][m], big[k]);
            ptx_mma_tf32(sum, a.big[k][m], small[k]);
        }
#pragma unroll
        for (int k = 0; k < 2; k++)
            ptx_mma_tf32(sum, a.big[k][m], big[k]);
#pragma unroll
        for (int i = 0; i < 4; i++)
            c[m][i] += sum[i];
    }
}

template <int WIDTH, int MT, int NT> struct fa_nk<float, WIDTH, MT, NT> {
    static constexpr int LDB = fa_row_bytes<float>(WIDTH);

    static __device__ __forceinline__ void run(float (&c)[MT][NT][4], uint32_t left, uint32_t right, bool narrow)
    {
        const int width = narrow ? fa_fewer<float>(WIDTH) : WIDTH;
#pragma unroll 2
        for (int k = 0; k < width; k += 16) {
            fa_left_cut<MT> a;
#pragma unroll
            for (int x = 0; x < 2 * MT; x++) {
                uint32_t r[4];
                ptx_ldmatrix(r, left + x % MT * 16 * LDB + 4 * k + x / MT * 32);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    fa_cut(__uint_as_float(r[i]), a.big[x / MT][x % MT][i], a.small[x / MT][x % MT][i]);
            }
            step(c, a, right + 4 * k);
        }
    }

    static __device__ __forceinline__ void step(float (&c)[MT][NT][4], const fa_left_cut<MT> &a, uint32_t right)
    {
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
            uint32_t big[2][2][2], small[2][2][2]; /* [of the two 8 columns][k] */
#pragma unroll
            for (int k = 0; k < 2; k++) {
                uint32_t r[4];
                ptx_ldmatrix(r, right + n * 8 * LDB + 32 * k);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    fa_cut(__uint_as_float(r[i]), big[i / 2][k][i % 2], small[i / 2][k][i % 2]);
            }
#pragma unroll
            for (int x = 0; x < 2; x++) {
                float sum[MT][4];
#pragma unroll
                for (int m = 0; m < MT; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        sum[m][i] = c[m][n + x][i];
                fa_mma_cut(sum, a, big[x], small[x]);
#pragma unroll
                for (int m = 0; m < MT; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        c[m][n + x][i] = sum[m][i];
            }
        }
    }
};

/* The sum over k may go in any order as long as both operands agree: lane 4g + t takes k = 2t as its column t and
 * 2t + 1 as its column t + 4, which is how results lie. */
template <int LDB, int MT, int NT, int NA> struct fa_kn<float, LDB, MT, NT, NA> {
    static __device__ __forceinline__ void run(float (&acc)[MT][NA][4], const float (&w)[MT][NT][4], uint32_t right,
                                               bool narrow)
    {
        constexpr int FEWER = fa_fewer<float>(8 * NA) / 8;
        const int place[4] = {0, 2, 1, 3}; /* of (row g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1) */
#pragma unroll
        for (int k = 0; k < NT / 2; k++) {
            fa_left_cut<MT> a;
#pragma unroll
            for (int x = 0; x < 2 * MT; x++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    fa_cut(w[x % MT][2 * k + x / MT][i], a.big[x / MT][x % MT][place[i]],
                           a.small[x / MT][x % MT][place[i]]);
            columns<0, FEWER>(acc, a, right + k * 16 * LDB);
            if (!narrow)
                columns<FEWER, NA>(acc, a, right + k * 16 * LDB);
        }
    }

    template <int FIRST, int LAST>
    static __device__ __forceinline__ void columns(float (&acc)[MT][NA][4], const fa_left_cut<MT> &a, uint32_t right)
    {
#pragma unroll
        for (int n = FIRST; n < LAST; n += 4) {
            uint32_t r[2][2][4]; /* [k][row 2t, 2t + 1][of four 8 columns] */
#pragma unroll
            for (int k = 0; k < 2; k++)
#pragma unroll
                for (int i = 0; i < 2; i++)
                    ptx_load_shared(r[k][i], right + (8 * k + i) * LDB + n * 32);
#pragma unroll
            for (int x = 0; x < 4; x++) {
                uint32_t big[2][2], small[2][2];
#pragma unroll
                for (int k = 0; k < 2; k++)
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        fa_cut(__uint_as_float(r[k][i][x]), big[k][i], small[k][i]);
                float sum[MT][4];
#pragma unroll
                for (int m = 0; m < MT; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        sum[m][i] = acc[m][n + x][i];
                fa_mma_cut(sum, a, big, small);
#pragma unroll
                for (int m = 0; m < MT; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        acc[m][n + x][i] = sum[m][i];
            }
        }
    }
};

#endif
