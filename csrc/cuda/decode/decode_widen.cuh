/* Stored values of a quantised cache in the dtype of the query: exact, their scales are applied elsewhere. */
#ifndef FA_DECODE_WIDEN_CUH
#define FA_DECODE_WIDEN_CUH

#include <cuda_fp8.h>

#include "../ptx/ptx_sm80.cuh"

/* what four bytes are */
struct fa_stored_i8 {};
struct fa_stored_f8 {};

/* ---- four bytes, lowest first, to four elements ------------------------------------------------------------------ */

__device__ __forceinline__ uint32_t fa_bits(__nv_bfloat162 x)
{
    return *(uint32_t *)&x;
}
__device__ __forceinline__ uint32_t fa_bits(__half2 x)
{
    return *(uint32_t *)&x;
}
__device__ __forceinline__ __nv_bfloat162 fa_bf16x2(uint32_t x)
{
    return *(__nv_bfloat162 *)&x;
}
__device__ __forceinline__ __half2 fa_f16x2(uint32_t x)
{
    return *(__half2 *)&x;
}

/* x + 128 in the last places of 2^23 */
__device__ __forceinline__ void fa_widen4(float *to, uint32_t x, fa_stored_i8)
{
    const uint32_t u = x ^ 0x80808080;
#pragma unroll
    for (int i = 0; i < 4; i++)
        to[i] = __uint_as_float(__byte_perm(u, 0x4b000000, 0x7440 + i)) - 8388736.0f;
}

/* x + 128 in the last places of 1024 */
__device__ __forceinline__ void fa_widen4(__half *to, uint32_t x, fa_stored_i8)
{
    const uint32_t u = x ^ 0x80808080;
    const __half2 from = fa_f16x2(0x64806480); /* 1152 */
    ((__half2 *)to)[0] = __hsub2(fa_f16x2(__byte_perm(u, 0x64646464, 0x4140)), from);
    ((__half2 *)to)[1] = __hsub2(fa_f16x2(__byte_perm(u, 0x64646464, 0x4342)), from);
}

/* The low seven bits in the last places of 128, less 128 or, with the sign bit, 256: bf16 has no room for eight. */
__device__ __forceinline__ void fa_widen4(__nv_bfloat16 *to, uint32_t x, fa_stored_i8)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t pair = __byte_perm(x, 0, i ? 0x4342 : 0x4140);
        ((__nv_bfloat162 *)to)[i] = __hsub2(fa_bf16x2((pair & 0x007f007f) | 0x43004300),
                                            fa_bf16x2((pair & 0x00800080) | 0x43004300));
    }
}

__device__ __forceinline__ __half2 fa_f8_pair(uint32_t pair)
{
    return __half2(__nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)pair, __NV_E4M3));
}

__device__ __forceinline__ void fa_widen4(__half *to, uint32_t x, fa_stored_f8)
{
    ((__half2 *)to)[0] = fa_f8_pair(x & 0xffff);
    ((__half2 *)to)[1] = fa_f8_pair(x >> 16);
}

__device__ __forceinline__ void fa_widen4(float *to, uint32_t x, fa_stored_f8)
{
    const float2 low = __half22float2(fa_f8_pair(x & 0xffff)), high = __half22float2(fa_f8_pair(x >> 16));
    to[0] = low.x, to[1] = low.y, to[2] = high.x, to[3] = high.y;
}

__device__ __forceinline__ void fa_widen4(__nv_bfloat16 *to, uint32_t x, fa_stored_f8)
{
    float wide[4];
    fa_widen4(wide, x, fa_stored_f8());
    ((__nv_bfloat162 *)to)[0] = __floats2bfloat162_rn(wide[0], wide[1]);
    ((__nv_bfloat162 *)to)[1] = __floats2bfloat162_rn(wide[2], wide[3]);
}

/* ---- a tile of one warp ------------------------------------------------------------------------------------------ */

/* ROWS rows of WIDTH elements, a multiple of 64, by one warp: 16 bytes of the result at a time, side by side */
template <typename S, int ROWS, int WIDTH, typename T>
__device__ __forceinline__ void fa_widen_rows(T *to, int to_ld, const uint8_t *from, int from_ld)
{
    constexpr int VEC = 16 / (int)sizeof(T), CHUNKS = WIDTH / VEC;
#pragma unroll 8
    for (int x = threadIdx.x % 32; x < ROWS * CHUNKS; x += 32) {
        const int r = x / CHUNKS, c = x % CHUNKS * VEC;
        __align__(8) uint32_t stored[VEC / 4];
        if constexpr (VEC == 8)
            *(uint2 *)stored = *(const uint2 *)(from + r * from_ld + c);
        else
            stored[0] = *(const uint32_t *)(from + r * from_ld + c);
        __align__(16) T wide[VEC];
#pragma unroll
        for (int i = 0; i < VEC / 4; i++)
            fa_widen4(wide + 4 * i, stored[i], S());
        *(uint4 *)(to + r * to_ld + c) = *(const uint4 *)wide;
    }
}

template <int ROWS, int WIDTH, typename T>
__device__ __forceinline__ void fa_widen_tile(T *to, int to_ld, const uint8_t *from, int from_ld, bool float8)
{
    if (float8)
        fa_widen_rows<fa_stored_f8, ROWS, WIDTH>(to, to_ld, from, from_ld);
    else
        fa_widen_rows<fa_stored_i8, ROWS, WIDTH>(to, to_ld, from, from_ld);
}

#endif
