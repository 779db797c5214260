/* Arithmetic that has an instruction of its own. */
#ifndef FA_PTX_MATH_CUH
#define FA_PTX_MATH_CUH

#include <stdint.h>

#include "wgmma.cuh"

/* 2^x; 2 ulp, subnormals to 0, 2^-inf = 0. */
__device__ __forceinline__ float fa_exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 1 / x; 1 ulp. */
__device__ __forceinline__ float fa_reciprocal(float x)
{
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float fa_log2(float x)
{
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* Two numbers rounded to nearest even, lo in the lower half. */
template <typename T> __device__ __forceinline__ uint32_t fa_pack(float lo, float hi);

template <> __device__ __forceinline__ uint32_t fa_pack<fa_bf16_t>(float lo, float hi)
{
    uint32_t w;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(hi), "f"(lo));
    return w;
}

template <> __device__ __forceinline__ uint32_t fa_pack<fa_f16_t>(float lo, float hi)
{
    uint32_t w;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(hi), "f"(lo));
    return w;
}

/* x * 0 + c, on pairs. */
template <typename T> __device__ __forceinline__ uint32_t fa_fma_zero(uint32_t x, uint32_t c);

template <> __device__ __forceinline__ uint32_t fa_fma_zero<fa_bf16_t>(uint32_t x, uint32_t c)
{
    uint32_t y;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(x), "r"(0), "r"(c));
    return y;
}

template <> __device__ __forceinline__ uint32_t fa_fma_zero<fa_f16_t>(uint32_t x, uint32_t c)
{
    uint32_t y;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(x), "r"(0), "r"(c));
    return y;
}

/* For each of two numbers all ones where it is not 0. */
template <typename T> __device__ __forceinline__ uint32_t fa_not_zero(uint32_t x);

template <> __device__ __forceinline__ uint32_t fa_not_zero<fa_bf16_t>(uint32_t x)
{
    uint32_t y;
    asm("set.neu.u32.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(x), "r"(0));
    return y;
}

template <> __device__ __forceinline__ uint32_t fa_not_zero<fa_f16_t>(uint32_t x)
{
    uint32_t y;
    asm("set.neu.u32.f16x2 %0, %1, %2;" : "=r"(y) : "r"(x), "r"(0));
    return y;
}

__device__ __forceinline__ float fa_widen(fa_bf16_t x)
{
    return __uint_as_float((uint32_t)x.bits << 16);
}

__device__ __forceinline__ float fa_widen(fa_f16_t x)
{
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

__device__ __forceinline__ float fa_widen(float x)
{
    return x;
}

/* The two numbers of a word; the lesser of two words' numbers, of which the first is not NaN. */
template <typename T> __device__ __forceinline__ float2 fa_widen_pair(uint32_t w)
{
    return make_float2(fa_widen(T{(uint16_t)w}), fa_widen(T{(uint16_t)(w >> 16)}));
}

template <typename T> __device__ __forceinline__ uint32_t fa_min_pair(uint32_t a, uint32_t b);

template <> __device__ __forceinline__ uint32_t fa_min_pair<fa_bf16_t>(uint32_t a, uint32_t b)
{
    uint32_t w;
    asm("min.bf16x2 %0, %1, %2;" : "=r"(w) : "r"(a), "r"(b));
    return w;
}

template <> __device__ __forceinline__ uint32_t fa_min_pair<fa_f16_t>(uint32_t a, uint32_t b)
{
    uint32_t w;
    asm("min.f16x2 %0, %1, %2;" : "=r"(w) : "r"(a), "r"(b));
    return w;
}

#endif
