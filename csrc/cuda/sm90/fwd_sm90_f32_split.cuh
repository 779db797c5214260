/* fp32 as two parts of fp16, for products on tensor cores that keep the accuracy of fp32 (Ootomo and Yokota,
 * "Recovering single precision accuracy from Tensor Cores", 2022).
 *
 *   x 2^n = high + low,  high = fp16(x 2^n), low = fp16(x 2^n - high)        22 to 23 bits
 *   a b = high high + high low + low high, low low being below 2^-24 of a b
 *
 * fp16 reaches from 2^-24 to 2^16, so a power of two brings the largest magnitude of a block to 2^14 .. 2^15. What is
 * smaller keeps an error of 2^-40 of that largest. Where this is not enough, or where a number is not finite, the
 * block's inverse power becomes NaN, which no result survives: those rows are computed anew in fp32.
 *   - Scores are exponents: their absolute error counts, and it is small while largest q times largest k, in units of
 *     log2, is below 2^14 (FA_F32_SCORE_LIMIT).
 *   - The low parts of V are kept 2^11 times as large, for which the weights' high parts are made as much smaller: the
 *     error is 2^-51 of the largest. Neither four neighbours of a row nor a thread's numbers of a column may all be
 *     below 2^-24 of it, but zeros. */
#ifndef FA_FWD_SM90_F32_SPLIT_CUH
#define FA_FWD_SM90_F32_SPLIT_CUH

#include <math_constants.h>

#include "../ptx/math.cuh"
#include "../ptx/mbarrier.cuh"
#include "../ptx/warpgroup.cuh"

/* Scores in units of log2 are sums of products of parts times a factor: at most this. */
#define FA_F32_SCORE_LIMIT 0x1p-16f
#define FA_F32_LOW_SCALE 0x1p11f
#define FA_F32_SPREAD (24u << 23) /* of the bits of V's magnitudes */

/* ---- numbers ----------------------------------------------------------------------------------------------------- */

/* max(|m|, |x|), NaN if either is */
__device__ __forceinline__ float fa_max_magnitude(float m, float x)
{
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(m), "f"(fabsf(x)));
    return y;
}

/* The bits of the warp's largest of numbers that are not negative; NaN is above infinity. */
__device__ __forceinline__ uint32_t fa_warp_peak(float m)
{
    return __reduce_max_sync(0xffffffff, __float_as_uint(m));
}

/* The power of two that brings numbers up to that of `peak` bits to below 2^15, and its inverse, NaN where they are not
 * finite. MOST: the largest exponent of the power. */
template <int MOST> __device__ __forceinline__ float fa_split_power(uint32_t peak, float *inverse)
{
    int n = min(141 - (int)(peak >> 23), MOST);
    *inverse = peak < 0x7f800000 ? __uint_as_float((127 - n) << 23) : CUDART_NAN_F;
    return __uint_as_float((127 + n) << 23);
}

/* Q and K: beyond it scores are far below their limit. V: its inverse is still a normal number. */
enum { FA_SCORE_POWER = 60, FA_VALUE_POWER = 126 };

/* Two scaled numbers to pairs of fp16; the low parts times SCALE. */
template <bool SCALED> __device__ __forceinline__ void fa_split_pair(float x, float y, uint32_t *high, uint32_t *low)
{
    uint32_t h = fa_pack<fa_f16_t>(x, y);
    float2 back = fa_widen_pair<fa_f16_t>(h);
    float a = x - back.x, b = y - back.y;
    *high = h;
    *low = SCALED ? fa_pack<fa_f16_t>(a * FA_F32_LOW_SCALE, b * FA_F32_LOW_SCALE) : fa_pack<fa_f16_t>(a, b);
}

/* A pair of fp16 divided by FA_F32_LOW_SCALE */
__device__ __forceinline__ uint32_t fa_shrink_pair(uint32_t h)
{
    uint32_t y;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(h), "r"(0x10001000));
    return y;
}

/* ---- memory ------------------------------------------------------------------------------------------------------ */

/* 16 bytes, before what a barrier behind it orders */
__device__ __forceinline__ float4 fa_load_f32x4(const float *from)
{
    float4 x;
    asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "l"(from)
                 : "memory");
    return x;
}

/* 8 bytes, zeros where they are not `there` */
__device__ __forceinline__ float2 fa_load_f32x2(const float *from, bool there)
{
    float2 x;
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %3, 0;\n\tmov.b32 %0, 0;\n\tmov.b32 %1, 0;\n\t"
                 "@p ld.global.nc.v2.f32 {%0, %1}, [%2];\n\t}"
                 : "=f"(x.x), "=f"(x.y)
                 : "l"(from), "r"((int)there));
    return x;
}

__device__ __forceinline__ void fa_store_shared_x2(uint32_t to, uint32_t a, uint32_t b)
{
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(a), "r"(b) : "memory");
}

/* ---- a block of K or V, split by warpgroups --------------------------------------------------------------------- */

/* BN rows of W columns, by the first THREADS threads: each has four columns of every STRIDE-th row. In shared memory
 * the high parts, then the low ones, in panels of 64 columns: rows of 128 bytes, swizzled. What lies outside of the
 * tensor is its last row or its last columns once more: such keys are hidden, and such columns meet zeros of Q or are
 * not stored. */
template <int W, int BN, int THREADS> struct fa_split_block {
    static constexpr int LANES = W / 4, STRIDE = THREADS / LANES, STEPS = BN / STRIDE, PART = BN * W * 2;
    float4 x[STEPS];

    /* Where this thread's numbers of a block come from. */
    struct source {
        const char *at; /* in the tensor's row 0 */
        int row, last;  /* this thread's first row; the tensor's last one */
        int step;       /* bytes from row to row */
    };

    static __device__ __forceinline__ source of(const float *row_0, int64_t stride, int row, int rows, int columns)
    {
        int column = min((int)threadIdx.x % LANES * 4, columns - 4);
        return {(const char *)(row_0 + column), row + (int)threadIdx.x / LANES, rows - 1, (int)stride * 4};
    }

    __device__ __forceinline__ void load(const source &s, int i)
    {
        x[i] = fa_load_f32x4((const float *)(s.at + (int64_t)min(s.row + i * STRIDE, s.last) * s.step));
    }

    static __device__ __forceinline__ float largest_of(const float4 &y)
    {
        return fa_max_magnitude(fa_max_magnitude(fa_max_magnitude(fabsf(y.x), y.y), y.z), y.w);
    }

    /* Bits of the largest magnitude of this warp's part. Returns those of the least magnitude, less 1, that is the
     * largest of four neighbours in a row or of a thread's numbers in a column, zeros left out. */
    __device__ __forceinline__ uint32_t extremes(uint32_t *peak) const
    {
        float4 column = {0.f, 0.f, 0.f, 0.f};
        uint32_t least = 0xffffffff;
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            least = min(least, __float_as_uint(largest_of(x[i])) - 1);
            column.x = fa_max_magnitude(column.x, x[i].x);
            column.y = fa_max_magnitude(column.y, x[i].y);
            column.z = fa_max_magnitude(column.z, x[i].z);
            column.w = fa_max_magnitude(column.w, x[i].w);
        }
        *peak = fa_warp_peak(largest_of(column));
        least = min(least, min(min(__float_as_uint(column.x) - 1, __float_as_uint(column.y) - 1),
                               min(__float_as_uint(column.z) - 1, __float_as_uint(column.w) - 1)));
        return __reduce_min_sync(0xffffffff, least);
    }

    __device__ __forceinline__ uint32_t peak(void) const
    {
        float top = 0.f;
#pragma unroll
        for (int i = 0; i < STEPS; i++)
            top = fa_max_magnitude(fa_max_magnitude(fa_max_magnitude(fa_max_magnitude(top, x[i].x), x[i].y), x[i].z),
                                   x[i].w);
        return fa_warp_peak(top);
    }

    /* Stores the parts of x `power`, and loads the block that comes after this one. warp_bar: a named barrier of
     * this warp's own. */
    template <bool SCALED>
    __device__ __forceinline__ void store(uint32_t to, float power, const source &next_block, int warp_bar)
    {
        int column = threadIdx.x % LANES, row = threadIdx.x / LANES;
        uint32_t own = to + column / 16 * (BN * 128) + column % 2 * 8;
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            uint32_t h[2], l[2];
            float4 y = x[i];
            load(next_block, i);
            fa_split_pair<SCALED>(y.x * power, y.y * power, &h[0], &l[0]);
            fa_split_pair<SCALED>(y.z * power, y.w * power, &h[1], &l[1]);
            int swizzle = (row + i * STRIDE % 8) % 8;
            uint32_t at = own + row * 128 + ((column % 16 / 2 ^ swizzle) << 4) + i * STRIDE * 128;
            fa_store_shared_x2(at, h[0], h[1]);
            fa_store_shared_x2(at + PART, l[0], l[1]);
            if (i % 4 == 3) /* so that the assembler does not move all loads behind all stores */
                fa_bar_sync(warp_bar, FA_WARP);
        }
    }
};

#endif
