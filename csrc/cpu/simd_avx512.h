/* The vector vocabulary on AVX-512 (F, BW, DQ, VL). The same names exist in each simd_*.h. */
#ifndef FA_SIMD_AVX512_H
#define FA_SIMD_AVX512_H

#include <immintrin.h>
#include <stdint.h>

#define VL 16     /* fp32 lanes */
#define NV_MAX 4  /* vectors of a panel row: 6 x 4 accumulators fit the 32 registers */

typedef __m512 vf;
typedef __m512i vi;
typedef __mmask16 vm;

static inline vf v_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void v_store(float *p, vf x) { _mm512_storeu_ps(p, x); }
/* x, held in a register: else a compiler reads it from memory again for each use, and loads become the limit */
static inline vf v_keep(vf x)
{
    __asm__("" : "+v"(x));
    return x;
}
static inline vf v_set1(float x) { return _mm512_set1_ps(x); }
static inline vf v_zero(void) { return _mm512_setzero_ps(); }
static inline vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf v_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
/* If either is NaN the second is returned: write the value that may be NaN second to let it through. */
static inline vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vf v_abs(vf a) { return _mm512_abs_ps(a); }
static inline vf v_round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/* a * 2^n for integral n in [-126, 127] */
static inline vf v_ldexp(vf a, vf n) { return _mm512_scalef_ps(a, n); }
static inline float v_hmax(vf a) { return _mm512_reduce_max_ps(a); }
static inline float v_hsum(vf a) { return _mm512_reduce_add_ps(a); }
/* In each quarter: the sums of the lanes of the four vectors at p. */
static inline __m512 v_fold_four(const float *p)
{
    __m512 a = v_load(p), b = v_load(p + VL), c = v_load(p + 2 * VL), d = v_load(p + 3 * VL);
    __m512 s = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 t = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    return _mm512_add_ps(_mm512_shuffle_ps(s, t, 0x44), _mm512_shuffle_ps(s, t, 0xEE));
}
/* The sums of a's quarters 0 and 1, 2 and 3, then of b's. */
static inline __m512 v_fold_quarters(__m512 a, __m512 b)
{
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}
/* lane i: the sum of the lanes of the i-th of VL vectors at p */
static inline vf v_hsums(const float *p)
{
    __m512 x = v_fold_quarters(v_fold_four(p), v_fold_four(p + 4 * VL));
    __m512 y = v_fold_quarters(v_fold_four(p + 8 * VL), v_fold_four(p + 12 * VL));
    return v_fold_quarters(x, y);
}
/* a0 b0 a1 b1 ... */
static inline void v_zip(vf a, vf b, vf out[2])
{
    vi at = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    out[0] = _mm512_permutex2var_ps(a, at, b);
    out[1] = _mm512_permutex2var_ps(a, _mm512_add_epi32(at, _mm512_set1_epi32(8)), b);
}

/* masks; a comparison with NaN is false, but for v_ne */
static inline vm v_lt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
static inline vm v_eq(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
static inline vm v_ne(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ); }
static inline vf v_select(vm m, vf yes, vf no) { return _mm512_mask_blend_ps(m, no, yes); }
static inline vm vm_or(vm a, vm b) { return (vm)(a | b); }
static inline int vm_any(vm m) { return m != 0; }

static inline vi vi_load(const int32_t *p) { return _mm512_loadu_si512(p); }
static inline vi vi_set1(int32_t x) { return _mm512_set1_epi32(x); }
static inline vi vi_iota(void) { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
static inline vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
static inline vi vi_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
static inline vi vi_xor(vi a, vi b) { return _mm512_xor_si512(a, b); }
static inline vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
static inline vi vi_shr(vi a, int n) { return _mm512_srli_epi32(a, (unsigned)n); }
static inline vi vi_select(vm m, vi yes, vi no) { return _mm512_mask_blend_epi32(m, no, yes); }
static inline vm vi_gt(vi a, vi b) { return _mm512_cmpgt_epi32_mask(a, b); }
static inline vm vi_lt_u(vi a, vi b) { return _mm512_cmplt_epu32_mask(a, b); }
static inline vf vi_to_f(vi a) { return _mm512_cvtepi32_ps(a); }
/* high and low halves of the 64-bit products of unsigned lanes */
static inline void vi_mul_wide(vi a, vi b, vi *hi, vi *lo)
{
    vi even = _mm512_mul_epu32(a, b);
    vi odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), b);
    *hi = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
    *lo = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
}

/* the first n of VL elements; the rest read as 0 and are not written */
static inline vm v_head(int n) { return (vm)((1u << n) - 1); }
static inline vf v_load_n(const float *p, int n) { return _mm512_maskz_loadu_ps(v_head(n), p); }
static inline void v_store_n(float *p, int n, vf x) { _mm512_mask_storeu_ps(p, v_head(n), x); }

static inline vf v_from_bf16(__m256i h)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
static inline vf v_load_bf16(const uint16_t *p) { return v_from_bf16(_mm256_loadu_si256((const __m256i *)p)); }
static inline vf v_load_bf16_n(const uint16_t *p, int n)
{
    return v_from_bf16(_mm256_maskz_loadu_epi16(v_head(n), p));
}
/* 2 VL elements as those of even and those of odd index: a word holds one of each, and neither needs a shuffle */
static inline void v_split_bf16(vi x, vf *even, vf *odd)
{
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    *odd = _mm512_castsi512_ps(_mm512_and_si512(x, vi_set1((int32_t)0xffff0000)));
}
static inline void v_load2_bf16(const uint16_t *p, vf *even, vf *odd)
{
    v_split_bf16(_mm512_loadu_si512(p), even, odd);
}
static inline void v_load2_bf16_n(const uint16_t *p, int n, vf *even, vf *odd)
{
    v_split_bf16(_mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), p), even, odd);
}
static inline vf v_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline vf v_load_f16_n(const uint16_t *p, int n)
{
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(v_head(n), p));
}

static inline vf v_from_i8(__m128i x) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x)); }
static inline vf v_load_i8(const void *p) { return v_from_i8(_mm_loadu_si128((const __m128i *)p)); }
static inline vf v_load_i8_n(const void *p, int n) { return v_from_i8(_mm_maskz_loadu_epi8(v_head(n), p)); }
/* 2 VL elements of float8_e4m3fn, each / 256: moved to where fp16 has sign, exponent and mantissa, whose bias is larger
 * by 8. The NaN of fp8 has the largest exponent of fp8 only, so it is made one of fp16. */
static inline void v_from_f8(__m256i x, vf *low, vf *high)
{
    vi w = _mm512_cvtepi8_epi16(x);
    vi h = _mm512_and_si512(_mm512_slli_epi16(w, 7), _mm512_set1_epi16((short)0xbfff)), ones = _mm512_set1_epi16(-1);
    __mmask32 nan = _mm512_cmpeq_epi16_mask(_mm512_or_si512(w, _mm512_set1_epi16((short)0xff80)), ones);
    h = _mm512_mask_blend_epi16(nan, h, ones);
    *low = _mm512_cvtph_ps(_mm512_castsi512_si256(h));
    *high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(h, 1));
}
static inline void v_load2_f8(const void *p, vf *low, vf *high)
{
    v_from_f8(_mm256_loadu_si256((const __m256i *)p), low, high);
}
static inline void v_load2_f8_n(const void *p, int n, vf *low, vf *high)
{
    v_from_f8(_mm256_maskz_loadu_epi8((__mmask32)((1ull << n) - 1), p), low, high);
}

/* round to nearest even; a NaN stays one */
static inline __m256i v_to_bf16(vf x)
{
#ifdef FA_ISA_AVX512BF16
    return (__m256i)_mm512_cvtneps_pbh(x);
#else
    vi u = _mm512_castps_si512(x);
    vi even = _mm512_and_si512(_mm512_srli_epi32(u, 16), vi_set1(1));
    vi r = _mm512_add_epi32(u, _mm512_add_epi32(even, vi_set1(0x7fff)));
    vm nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    r = _mm512_mask_or_epi32(r, nan, u, vi_set1(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
#endif
}
static inline void v_store_bf16(uint16_t *p, vf x) { _mm256_storeu_si256((__m256i *)p, v_to_bf16(x)); }
static inline void v_store_bf16_n(uint16_t *p, int n, vf x) { _mm256_mask_storeu_epi16(p, v_head(n), v_to_bf16(x)); }
static inline __m256i v_to_f16(vf x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline void v_store_f16(uint16_t *p, vf x) { _mm256_storeu_si256((__m256i *)p, v_to_f16(x)); }
static inline void v_store_f16_n(uint16_t *p, int n, vf x) { _mm256_mask_storeu_epi16(p, v_head(n), v_to_f16(x)); }

/* yes where the byte is not 0 */
static inline vf v_select_bytes(const uint8_t *p, vf yes, vf no)
{
    __m128i b = _mm_loadu_si128((const __m128i *)p);
    return v_select(_mm_test_epi8_mask(b, b), yes, no);
}

/* r[i] lane j <-> r[j] lane i: four rounds that exchange blocks of 1, 2, 4 and 8 lanes */
static inline void v_transpose(vf r[VL])
{
    vf t[VL];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xEE);
        r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            t[i + j] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0x88);
            t[i + j + 4] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0xDD);
        }
    for (int j = 0; j < 8; j++) {
        r[j] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0x88);
        r[j + 8] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0xDD);
    }
}

#ifdef FA_ISA_AVX512BF16
/* c + a0 b0 + a1 b1 on pairs of bf16 in each 32-bit lane */
static inline vf v_dot_bf16(vf c, vf a, vf b)
{
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
}
/* lanes {lo, hi} of fp32 -> one 32-bit lane of two bf16, lo in the low half */
static inline vf v_pair_bf16(vf lo, vf hi)
{
    vi l = _mm512_cvtepu16_epi32(v_to_bf16(lo));
    vi h = _mm512_slli_epi32(_mm512_cvtepu16_epi32(v_to_bf16(hi)), 16);
    return _mm512_castsi512_ps(_mm512_or_si512(l, h));
}
#endif

#endif
