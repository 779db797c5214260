/* Matrix products of a warp, on tensor cores, of tiles in shared memory: MT times 16 rows by NT times 8 columns.
 *
 * Addresses are bytes of shared memory, and a lane's own part of one is formed once: all that follows is a constant
 * distance from it. A row is an odd number of 16-byte words, so that eight rows lie in different banks.
 *
 * float: each operand is cut into two parts of tf32, x = big + small, and big * big + big * small + small * big is
 * summed, so that products keep the accuracy of fp32 (Ootomo and Yokota, "Recovering single precision accuracy from
 * Tensor Cores", 2022). Tensor cores cut off their sums instead of rounding them, so 16 terms of the sum at a time
 * start from 0 and are added by an ordinary addition. fa_tf32 in place of float: big * big only. */
#ifndef FA_TILE_PRODUCT_CUH
#define FA_TILE_PRODUCT_CUH

#include "tile_mma.cuh"

/* In place of float: its products are rounded to tf32. fa_stored: how tensors hold what products take. */
struct fa_tf32 {};
template <typename P> struct fa_stored {
    using type = P;
};
template <> struct fa_stored<fa_tf32> {
    using type = float;
};

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
            uint32_t a[MT][4];
#pragma unroll
            for (int m = 0; m < MT; m++)
                ptx_ldmatrix(a[m], left + m * 16 * LDB + 32 * k);
            fa_nk_step<T, LDB>(c, a, right + 32 * k);
        }
    }

    /* two of them, c from left and right and d behind `left_d` and `right_d` bytes, in turns: twice as many sums, of
     * which none waits for another */
    static __device__ __forceinline__ void run_two(float (&c)[MT][NT][4], float (&d)[MT][NT][4], uint32_t left,
                                                   uint32_t right, int left_d, int right_d, bool narrow)
    {
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            if (k == fa_fewer<T>(WIDTH) / 16 && narrow)
                break;
            uint32_t a[MT][4];
#pragma unroll
            for (int m = 0; m < MT; m++)
                ptx_ldmatrix(a[m], left + m * 16 * LDB + 32 * k);
            fa_nk_step<T, LDB>(c, a, right + 32 * k);
#pragma unroll
            for (int m = 0; m < MT; m++)
                ptx_ldmatrix(a[m], left + left_d + m * 16 * LDB + 32 * k);
            fa_nk_step<T, LDB>(d, a, right + right_d + 32 * k);
        }
    }
};

/* acc += W X: W the results of a product (8 NT columns), X its 8 NT rows, 8 NA columns. right: fa_lane_kn. */
template <typename T, int LDB, int MT, int NT, int NA> struct fa_kn {
    /* the k-th 16 columns of W, and the first WIDTH columns of X */
    template <int WIDTH>
    static __device__ __forceinline__ void step(float (&acc)[MT][NA][4], const float (&w)[MT][NT][4], int k,
                                                uint32_t right)
    {
        uint32_t a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[m][i] = fa_pack(w[m][2 * k + i / 2][i % 2 * 2], w[m][2 * k + i / 2][i % 2 * 2 + 1], T());
#pragma unroll
        for (int n = 0; n < WIDTH / 8; n += 2) {
            uint32_t b[4];
            ptx_ldmatrix_trans(b, right + k * 16 * LDB + n * 16);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                ptx_mma(acc[m][n], a[m], b, T());
                ptx_mma(acc[m][n + 1], a[m], b + 2, T());
            }
        }
    }
};

/* all of it; over fa_fewer(8 NA) columns of X where narrow */
template <typename P, int LDB, int MT, int NT, int NA>
__device__ __forceinline__ void fa_product_kn(float (&acc)[MT][NA][4], const float (&w)[MT][NT][4], uint32_t right,
                                              bool narrow)
{
    using kn = fa_kn<P, LDB, MT, NT, NA>;
    if (narrow) {
#pragma unroll
        for (int k = 0; k < NT / 2; k++)
            kn::template step<fa_fewer<typename fa_stored<P>::type>(8 * NA)>(acc, w, k, right);
        return;
    }
#pragma unroll
    for (int k = 0; k < NT / 2; k++)
        kn::template step<8 * NA>(acc, w, k, right);
}

/* ---- float ------------------------------------------------------------------------------------------------------- */

/* Parts of x. big is rounded to the nearest by the addition: of both the last 13 bits do not count. What is left, at
 * most 2^-12 of x, has either sign, so that what is cut off of it, and its squares, do not add up. */
template <bool WHOLE> __device__ __forceinline__ void fa_parts(uint32_t x, uint32_t &big, uint32_t &small)
{
    big = x + 0x1000u;
    if (WHOLE)
        small = __float_as_uint(__uint_as_float(x) - __uint_as_float(big & 0xffffe000u)) + 0x1000u;
}

/* 16 columns of the left operand in parts: [columns 0 .. 7, 8 .. 15][16 rows] */
template <int MT> struct fa_left_parts {
    uint32_t big[2][MT][4], small[2][MT][4];
};

/* G times 8 columns of c, from 8n on, += 16 columns of a times 16 rows of b: big, small [8 columns][k]. The sums of
 * different rows and columns alternate, as each instruction waits for the one before in its sum. */
template <bool WHOLE, int MT, int N, int G>
__device__ __forceinline__ void fa_mma_parts(float (&c)[MT][N][4], int n, const fa_left_parts<MT> &a,
                                             const uint32_t (&big)[G][2][2], const uint32_t (&small)[G][2][2])
{
    float sum[MT][G][4];
#pragma unroll
    for (int x = 0; x < MT * G; x++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            sum[x / G][x % G][i] = WHOLE ? 0 : c[x / G][n + x % G][i];
#pragma unroll
    for (int k = 0; WHOLE && k < 2; k++) {
#pragma unroll
        for (int x = 0; x < MT * G; x++)
            ptx_mma_tf32(sum[x / G][x % G], a.small[k][x / G], big[x % G][k]);
#pragma unroll
        for (int x = 0; x < MT * G; x++)
            ptx_mma_tf32(sum[x / G][x % G], a.big[k][x / G], small[x % G][k]);
    }
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
        for (int x = 0; x < MT * G; x++)
            ptx_mma_tf32(sum[x / G][x % G], a.big[k][x / G], big[x % G][k]);
#pragma unroll
    for (int x = 0; x < MT * G; x++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            c[x / G][n + x % G][i] = WHOLE ? c[x / G][n + x % G][i] + sum[x / G][x % G][i] : sum[x / G][x % G][i];
}

template <bool WHOLE, int WIDTH, int MT, int NT> struct fa_nk_float {
    static constexpr int LDB = fa_row_bytes<float>(WIDTH);

    static __device__ __forceinline__ void run(float (&c)[MT][NT][4], uint32_t left, uint32_t right, bool narrow)
    {
        const int width = narrow ? fa_fewer<float>(WIDTH) : WIDTH;
#pragma unroll 2
        for (int k = 0; k < width; k += 16) {
            fa_left_parts<MT> a;
#pragma unroll
            for (int x = 0; x < 2 * MT; x++) {
                uint32_t r[4];
                ptx_ldmatrix(r, left + x % MT * 16 * LDB + 4 * k + x / MT * 32);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    fa_parts<WHOLE>(r[i], a.big[x / MT][x % MT][i], a.small[x / MT][x % MT][i]);
            }
            step(c, a, right + 4 * k);
        }
    }

    static __device__ __forceinline__ void run_two(float (&c)[MT][NT][4], float (&d)[MT][NT][4], uint32_t left,
                                                   uint32_t right, int left_d, int right_d, bool narrow)
    {
        run(c, left, right, narrow);
        run(d, left + left_d, right + right_d, narrow);
    }

    static __device__ __forceinline__ void step(float (&c)[MT][NT][4], const fa_left_parts<MT> &a, uint32_t right)
    {
        constexpr int G = MT == 1 && NT % 4 == 0 ? 4 : 2;
#pragma unroll
        for (int n = 0; n < NT; n += G) {
            uint32_t big[G][2][2], small[G][2][2]; /* [8 columns][k] */
#pragma unroll
            for (int x = 0; x < G; x++) {
                uint32_t r[4];
                ptx_ldmatrix(r, right + (n + x / 2 * 2) * 8 * LDB + 32 * (x % 2));
#pragma unroll
                for (int i = 0; i < 4; i++)
                    fa_parts<WHOLE>(r[i], big[x / 2 * 2 + i / 2][x % 2][i % 2], small[x / 2 * 2 + i / 2][x % 2][i % 2]);
            }
            fa_mma_parts<WHOLE>(c, n, a, big, small);
        }
    }
};

/* The sum over k may go in any order as long as both operands agree: lane 4g + t takes k = 2t as its column t and
 * 2t + 1 as its column t + 4, which is how results lie. */
template <bool WHOLE, int LDB, int MT, int NT, int NA> struct fa_kn_float {
    template <int WIDTH>
    static __device__ __forceinline__ void step(float (&acc)[MT][NA][4], const float (&w)[MT][NT][4], int k,
                                                uint32_t right)
    {
        const int place[4] = {0, 2, 1, 3}; /* of (row g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1) */
        fa_left_parts<MT> a;
#pragma unroll
        for (int x = 0; x < 2 * MT; x++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                fa_parts<WHOLE>(__float_as_uint(w[x % MT][2 * k + x / MT][i]), a.big[x / MT][x % MT][place[i]],
                                a.small[x / MT][x % MT][place[i]]);
#pragma unroll
        for (int n = 0; n < WIDTH / 8; n += 4)
            columns(acc, a, right + k * 16 * LDB + n * 32, n);
    }

    /* 32 columns */
    static __device__ __forceinline__ void columns(float (&acc)[MT][NA][4], const fa_left_parts<MT> &a, uint32_t right,
                                                   int n)
    {
        uint32_t r[2][2][4]; /* [k][row 2t, 2t + 1][of four 8 columns] */
#pragma unroll
        for (int x = 0; x < 4; x++)
            ptx_load_shared(r[x / 2][x % 2], right + (x / 2 * 8 + x % 2) * LDB);
        constexpr int G = MT == 1 ? 4 : 2;
#pragma unroll
        for (int x = 0; x < 4; x += G) {
            uint32_t big[G][2][2], small[G][2][2];
#pragma unroll
            for (int i = 0; i < 4 * G; i++)
                fa_parts<WHOLE>(r[i / 2 % 2][i % 2][x + i / 4], big[i / 4][i / 2 % 2][i % 2],
                                small[i / 4][i / 2 % 2][i % 2]);
            fa_mma_parts<WHOLE>(acc, n + x, a, big, small);
        }
    }
};

template <int WIDTH, int MT, int NT> struct fa_nk<float, WIDTH, MT, NT> : fa_nk_float<true, WIDTH, MT, NT> {};
template <int WIDTH, int MT, int NT> struct fa_nk<fa_tf32, WIDTH, MT, NT> : fa_nk_float<false, WIDTH, MT, NT> {};
template <int LDB, int MT, int NT, int NA> struct fa_kn<float, LDB, MT, NT, NA> : fa_kn_float<true, LDB, MT, NT, NA> {};
template <int LDB, int MT, int NT, int NA>
struct fa_kn<fa_tf32, LDB, MT, NT, NA> : fa_kn_float<false, LDB, MT, NT, NA> {};

#endif
