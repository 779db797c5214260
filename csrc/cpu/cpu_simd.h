/* The vector vocabulary of the instruction set being compiled (FA_ISA), and the mathematics built on it. */
#ifndef FA_CPU_SIMD_H
#define FA_CPU_SIMD_H

#include <math.h>

#include "../common/fa_philox.h"

#if defined(FA_ISA_AVX512)
#include "simd_avx512.h"
#elif defined(FA_ISA_AVX2)
#include "simd_avx2.h"
#else
#error "FA_ISA_<name> must be defined; csrc/CMakeLists.txt compiles this file once for each instruction set"
#endif

#define FA_INLINE static inline __attribute__((always_inline))
#define FA_UNROLL _Pragma("GCC unroll 16")

/* fa_<op>_<isa>_<dtype> */
#define FA_PASTE4_(a, b, c, d) a##b##_##c##_##d
#define FA_PASTE4(a, b, c, d) FA_PASTE4_(a, b, c, d)
#define FA_PASTE3_(a, b, c) a##b##_##c
#define FA_PASTE3(a, b, c) FA_PASTE3_(a, b, c)
#define FA_KERNEL(op, dtype) FA_PASTE4(fa_, op, FA_ISA, dtype)
#define FA_LOCAL(name) FA_PASTE3(fa_, name, FA_ISA)
#define FA_STR_(x) #x
#define FA_STR(x) FA_STR_(x)
#define FA_KERNEL_NAME(op, dtype) FA_STR(FA_KERNEL(op, dtype))

#define FA_LOG2E 1.4426950408889634
#define FA_LN2 0.6931471805599453

/* 2^f for f in [-1/2, 1/2]: minimax in relative error with the constant term held at 1, so that 2^0 is exact.
 * Degree 5: 1.1e-7 (fp32); degree 3: 1.0e-4, finer than the 2e-3 of a weight rounded to bf16. */
FA_INLINE vf v_exp2_fraction(vf f, int degree)
{
    vf p;
    if (degree >= 5) {
        p = v_fma(v_set1(0.001326472731307149f), f, v_set1(0.009671512991189957f));
        p = v_fma(p, f, v_set1(0.05550733581185341f));
        p = v_fma(p, f, v_set1(0.24022242426872253f));
        p = v_fma(p, f, v_set1(0.6931470036506653f));
    } else {
        p = v_fma(v_set1(0.05500893294811249f), f, v_set1(0.2422109693288803f));
        p = v_fma(p, f, v_set1(0.6932829022407532f));
    }
    return v_fma(p, f, v_set1(1.0f));
}

/* 2^x for x <= 127. x = n + f with n the nearest integer: 2^x = 2^n 2^f. Below -126, also at -inf, exactly 0, so that
 * a hidden key has no weight; NaN stays NaN. */
FA_INLINE vf v_exp2(vf x, int degree)
{
    vf n = v_round(x);
    vf y = v_ldexp(v_exp2_fraction(v_sub(x, n), degree), n);
    return v_select(v_lt(x, v_set1(-126.0f)), v_zero(), y);
}

/* tanh(x) = sign(x) (1 - t) / (1 + t) with t = e^(-2|x|). For small |x|, 1 - t cancels, so e^(-2|x|) - 1 is formed
 * without the 1: with 2^n(1 + g) = e^(-2|x|), it is 2^n g + (2^n - 1), exact to rounding. */
FA_INLINE vf v_tanh(vf x)
{
    vf a = v_min(v_set1(20.0f), v_abs(x)); /* v_min returns its second when that is NaN */
    vf y = v_mul(a, v_set1((float)(-2.0 * FA_LOG2E)));
    vf n = v_round(y), f = v_sub(y, n);
    vf g = v_fma(v_set1(0.00015353361959569156f), f, v_set1(0.0013398875016719103f));
    g = v_fma(g, f, v_set1(0.00961843691766262f));
    g = v_fma(g, f, v_set1(0.055503323674201965f));
    g = v_fma(g, f, v_set1(0.24022647738456726f));
    g = v_fma(g, f, v_set1(0.6931471824645996f));
    g = v_mul(g, f);
    vf two_n = v_ldexp(v_set1(1.0f), n);
    vf em1 = v_fma(two_n, g, v_sub(two_n, v_set1(1.0f))); /* t - 1, in (-1, 0] */
    vf r = v_div(v_sub(v_zero(), em1), v_add(v_set1(2.0f), em1));
    return v_select(v_lt(x, v_zero()), v_sub(v_zero(), r), r);
}

/* Philox4x32-7 on VL counters at once: the words of fa_philox.h in out[0..3]. */
FA_INLINE void v_philox(uint64_t seed, vi c0, vi c1, vi c2, vi c3, vi out[4])
{
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    vi m0 = vi_set1((int32_t)FA_PHILOX_M0), m1 = vi_set1((int32_t)FA_PHILOX_M1);
    for (int round = 0; round < FA_PHILOX_ROUNDS; round++) {
        vi hi0, lo0, hi1, lo1;
        vi_mul_wide(c0, m0, &hi0, &lo0);
        vi_mul_wide(c2, m1, &hi1, &lo1);
        c0 = vi_xor(vi_xor(hi1, c1), vi_set1((int32_t)k0));
        c2 = vi_xor(vi_xor(hi0, c3), vi_set1((int32_t)k1));
        c1 = lo1;
        c3 = lo0;
        k0 += FA_PHILOX_W0;
        k1 += FA_PHILOX_W1;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

#endif
