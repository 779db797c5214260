/* One row of a head as floats, and back to its dtype: what filling a cache and merging results work on. Plain loops,
 * free of branches, which the compiler turns into vectors. */
#ifndef FA_CPU_ROW_H
#define FA_CPU_ROW_H

#include "../common/fa_dtype.h"

static inline uint32_t fa_f32_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* Bits of a magnitude (the float with bits a, no NaN) rounded, ties to even, to `ebits` of exponent and `mbits` of
 * mantissa, as though larger exponents went on beyond the last. With ebits below 8, floats hold the subnormals as normal
 * numbers; adding `unit`, whose last place is theirs, rounds those. */
static inline uint32_t fa_round_f32(uint32_t a, int ebits, int mbits)
{
    const int bias = (1 << (ebits - 1)) - 1, drop = 23 - mbits;
    const float unit = fa_bits_to_f32((uint32_t)(127 + 1 - bias + drop) << 23);
    const uint32_t small = fa_f32_bits(fa_bits_to_f32(a) + unit) - fa_f32_bits(unit);
    const uint32_t up = (1u << (drop - 1)) - 1 + (a >> drop & 1);
    const uint32_t normal = ((a + up) >> drop) - ((127u - (uint32_t)bias) << mbits);
    return ebits < 8 && a < (uint32_t)(127 + 1 - bias) << 23 ? small : normal;
}

/* fa_narrow of a float, in float: the same bits. */
static inline uint16_t fa_narrow_f32(float x, int ebits, int mbits)
{
    const uint32_t bits = fa_f32_bits(x), sign = bits >> 31 << 15, a = bits & 0x7fffffff;
    const uint32_t infinity = ((1u << ebits) - 1) << mbits, nan = infinity | 1u << (mbits - 1);
    uint32_t r = fa_round_f32(a, ebits, mbits);
    r = a >= 0x7f800000 || r > infinity ? infinity : r;
    return (uint16_t)(sign | (a > 0x7f800000 ? nan : r));
}

/* fa_f64_to_f8e4m3 of a float: 448 (0x43e00000) and beyond saturate, NaN stays NaN. */
static inline uint8_t fa_f32_to_f8e4m3(float x)
{
    const uint32_t sign = fa_f32_bits(x) >> 31 << 7, a = fa_f32_bits(x) & 0x7fffffff;
    const uint32_t r = fa_round_f32(a > 0x43e00000 ? 0x43e00000 : a, 4, 3);
    return (uint8_t)(sign | (a > 0x7f800000 ? 0x7f : r));
}

/* fa_f64_to_i8 of a float. 1.5 * 2^23 has a last place of 1, so adding it rounds to whole numbers. */
static inline int8_t fa_f32_to_i8(float x)
{
    const float whole = 0x1.8p23f;
    float held = x < -128 ? -128 : x > 127 ? 127 : x == x ? x : 0;
    return (int8_t)((held + whole) - whole);
}

/* The n elements at row, row + step, ... */
static inline void fa_row_load(float *x, const void *row, fa_dtype t, int64_t step, int64_t n)
{
    if (t == FA_F32 && step == 1)
        memcpy(x, row, (size_t)n * sizeof *x);
    else if (t == FA_BF16 && step == 1)
        for (int64_t d = 0; d < n; d++)
            x[d] = fa_bf16_to_f32(((const uint16_t *)row)[d]);
    else if (t == FA_F16 && step == 1)
        for (int64_t d = 0; d < n; d++)
            x[d] = fa_f16_to_f32(((const uint16_t *)row)[d]);
    else
        for (int64_t d = 0; d < n; d++)
            x[d] = (float)fa_load(row, t, d * step);
}

/* Each rounded once, ties to even; i8 and f8e4m3 saturate. */
static inline void fa_row_store(void *row, fa_dtype t, int64_t step, const float *x, int64_t n)
{
    if (t == FA_F32 && step == 1)
        memcpy(row, x, (size_t)n * sizeof *x);
    else if (t == FA_BF16 && step == 1)
        for (int64_t d = 0; d < n; d++)
            ((uint16_t *)row)[d] = fa_narrow_f32(x[d], 8, 7);
    else if (t == FA_F16 && step == 1)
        for (int64_t d = 0; d < n; d++)
            ((uint16_t *)row)[d] = fa_narrow_f32(x[d], 5, 10);
    else if (t == FA_I8 && step == 1)
        for (int64_t d = 0; d < n; d++)
            ((int8_t *)row)[d] = fa_f32_to_i8(x[d]);
    else if (t == FA_F8E4M3 && step == 1)
        for (int64_t d = 0; d < n; d++)
            ((uint8_t *)row)[d] = fa_f32_to_f8e4m3(x[d]);
    else
        for (int64_t d = 0; d < n; d++)
            fa_store(row, t, d * step, (double)x[d]);
}

#endif
