/* Elements of every dtype as doubles, and back. With a constant dtype the switches fold away. */
#ifndef FA_DTYPE_H
#define FA_DTYPE_H

#include <math.h>
#include <string.h>

#include "../fa.h"
#include "fa_host_device.h"

/* stored values that need a scale */
FA_HD static inline bool fa_is_quantised(fa_dtype t)
{
    return t == FA_I8 || t == FA_F8E4M3;
}

FA_HD static inline float fa_bits_to_f32(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

FA_HD static inline float fa_bf16_to_f32(uint16_t x)
{
    return fa_bits_to_f32((uint32_t)x << 16);
}

FA_HD static inline float fa_f16_to_f32(uint16_t x)
{
    uint32_t sign = (uint32_t)(x & 0x8000) << 16, exponent = (x >> 10) & 31, mantissa = x & 1023;
    /* Subnormals are a whole number of 2^-24. An integer conversion also works where the caller flushes subnormals. */
    float subnormal = (float)mantissa * 0x1p-24f;
    uint32_t biased = exponent == 31 ? 255 : exponent + (127 - 15);
    float normal = fa_bits_to_f32(sign | biased << 23 | mantissa << 13);
    return exponent ? normal : sign ? -subnormal : subnormal;
}

/* 4 bits of exponent with bias 7, 3 of mantissa. All bits of both set is NaN; there is no infinity. */
FA_HD static inline float fa_f8e4m3_to_f32(uint8_t x)
{
    uint32_t sign = (uint32_t)(x & 0x80) << 24, exponent = (x >> 3) & 15, mantissa = x & 7;
    float subnormal = (float)mantissa * 0x1p-9f;
    float normal = fa_bits_to_f32(sign | (exponent + (127 - 7)) << 23 | mantissa << 20);
    if ((x & 0x7f) == 0x7f)
        return fa_bits_to_f32(sign | 0x7fc00000);
    return exponent ? normal : sign ? -subnormal : subnormal;
}

/* x rounded once, ties to even, to 1 sign bit, `ebits` of exponent and `mbits` of mantissa. Overflow gives infinity,
 * NaN gives a quiet NaN of the same sign. */
FA_HD static inline uint16_t fa_narrow(double x, int ebits, int mbits)
{
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = (uint32_t)(bits >> 63) << 15, infinity = ((1u << ebits) - 1) << mbits;
    const int bias = (1 << (ebits - 1)) - 1;
    if (isnan(x))
        return (uint16_t)(sign | infinity | 1u << (mbits - 1));
    int exponent = (int)(bits >> 52 & 2047) - 1023 + bias;
    if (exponent > 2 * bias)
        return (uint16_t)(sign | infinity);
    int drop = 52 - mbits;
    if (exponent < 1) { /* a subnormal of the narrow type loses one more bit for each step below its least exponent */
        drop += 1 - exponent;
        exponent = 1;
    }
    if (drop > 53)
        return (uint16_t)sign;
    uint64_t mantissa = (bits & (((uint64_t)1 << 52) - 1)) | (uint64_t)1 << 52;
    uint64_t kept = mantissa >> drop, rest = mantissa & (((uint64_t)1 << drop) - 1), half = (uint64_t)1 << (drop - 1);
    kept += rest > half || (rest == half && (kept & 1));
    /* kept holds the leading one, which carries into the exponent field: hence exponent - 1. A mantissa that rounds up
     * to the next power of two carries in the same way, up to infinity. */
    return (uint16_t)(sign | (((uint32_t)(exponent - 1) << mbits) + (uint32_t)kept));
}

FA_HD static inline uint16_t fa_f64_to_bf16(double x)
{
    return fa_narrow(x, 8, 7);
}

FA_HD static inline uint16_t fa_f64_to_f16(double x)
{
    return fa_narrow(x, 5, 10);
}

/* Beyond the largest finite value, also at infinity, the largest finite value (448): a cache saturates. */
FA_HD static inline uint8_t fa_f64_to_f8e4m3(double x)
{
    uint8_t sign = signbit(x) ? 0x80 : 0;
    double a = fabs(x);
    if (isnan(x))
        return sign | 0x7f;
    if (a >= 448)
        return sign | 0x7e;
    int exponent; /* a = f 2^exponent, f in [1/2, 1): the unit of the last place is 2^(exponent - 4), at least 2^-9 */
    frexp(a, &exponent);
    int place = exponent - 4 < -9 || a == 0 ? -9 : exponent - 4;
    int units = (int)nearbyint(ldexp(a, -place)); /* 8 .. 16, below 8 for subnormals; 16 carries into the exponent */
    return (uint8_t)(sign | (((place + 9) << 3) + units));
}

/* Ties to even; beyond the range, the end of it; NaN gives 0. */
FA_HD static inline int8_t fa_f64_to_i8(double x)
{
    return isnan(x) ? 0 : x <= -128 ? -128 : x >= 127 ? 127 : (int8_t)nearbyint(x);
}

FA_HD static inline double fa_load(const void *data, fa_dtype dtype, int64_t index)
{
    switch (dtype) {
    case FA_F32: return ((const float *)data)[index];
    case FA_BF16: return fa_bf16_to_f32(((const uint16_t *)data)[index]);
    case FA_F16: return fa_f16_to_f32(((const uint16_t *)data)[index]);
    case FA_F64: return ((const double *)data)[index];
    case FA_BOOL: return ((const uint8_t *)data)[index] != 0;
    case FA_I32: return ((const int32_t *)data)[index];
    case FA_I64: return (double)((const int64_t *)data)[index];
    case FA_I8: return ((const int8_t *)data)[index];
    case FA_F8E4M3: return fa_f8e4m3_to_f32(((const uint8_t *)data)[index]);
    }
    return NAN;
}

FA_HD static inline void fa_store(void *data, fa_dtype dtype, int64_t index, double x)
{
    switch (dtype) {
    case FA_F32: ((float *)data)[index] = (float)x; return;
    case FA_BF16: ((uint16_t *)data)[index] = fa_f64_to_bf16(x); return;
    case FA_F16: ((uint16_t *)data)[index] = fa_f64_to_f16(x); return;
    case FA_F64: ((double *)data)[index] = x; return;
    case FA_BOOL: ((uint8_t *)data)[index] = x != 0; return;
    case FA_I32: ((int32_t *)data)[index] = (int32_t)x; return;
    case FA_I64: ((int64_t *)data)[index] = (int64_t)x; return;
    case FA_I8: ((int8_t *)data)[index] = fa_f64_to_i8(x); return;
    case FA_F8E4M3: ((uint8_t *)data)[index] = fa_f64_to_f8e4m3(x); return;
    }
}

#endif
