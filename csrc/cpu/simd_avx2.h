/* The vector vocabulary on AVX2 with FMA and F16C. The same names exist in each simd_*.h. */
#ifndef FA_SIMD_AVX2_H
#define FA_SIMD_AVX2_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define VL 8      /* fp32 lanes */
#define NV_MAX 2  /* vectors of a panel row: 6 x 2 accumulators fit the 16 registers */

typedef __m256 vf;
typedef __m256i vi;
typedef __m256 vm; /* all ones or all zeros in each lane */

static inline vf v_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void v_store(float *p, vf x) { _mm256_storeu_ps(p, x); }
/* x, held in a register: else a compiler reads it from memory again for each use, and loads become the limit */
static inline vf v_keep(vf x)
{
    __asm__("" : "+x"(x));
    return x;
}
static inline vf v_set1(float x) { return _mm256_set1_ps(x); }
static inline vf v_zero(void) { return _mm256_setzero_ps(); }
static inline vf v_add(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf v_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
static inline vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf v_div(vf a, vf b) { return _mm256_div_ps(a, b); }
static inline vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline vf v_fnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
/* If either is NaN the second is returned: write the value that may be NaN second to let it through. */
static inline vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline vf v_min(vf a, vf b) { return _mm256_min_ps(a, b); }
static inline vf v_abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline vf v_round(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/* a * 2^n for integral n in [-126, 127]: n goes straight into the exponent field */
static inline vf v_ldexp(vf a, vf n)
{
    __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(a, _mm256_castsi256_ps(e));
}
static inline float v_hmax(vf a)
{
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
static inline float v_hsum(vf a)
{
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
/* In each half: the sums of a's lanes 0 and 2, 1 and 3, then of b's. A blend costs no shuffle. */
static inline __m256 v_fold_pairs(__m256 a, __m256 b)
{
    return _mm256_add_ps(_mm256_blend_ps(a, b, 0xCC), _mm256_shuffle_ps(a, b, 0x4E));
}
/* In each half: the sums of the lanes of a, b, c, d. */
static inline __m256 v_fold_four(__m256 a, __m256 b, __m256 c, __m256 d)
{
    __m256 s = v_fold_pairs(a, c), t = v_fold_pairs(b, d);
    return _mm256_add_ps(_mm256_blend_ps(s, t, 0xAA), _mm256_permute_ps(_mm256_blend_ps(s, t, 0x55), 0xB1));
}
/* lane i: the sum of the lanes of the i-th of VL vectors at p */
static inline vf v_hsums(const float *p)
{
    __m256 x = v_fold_four(v_load(p), v_load(p + VL), v_load(p + 2 * VL), v_load(p + 3 * VL));
    __m256 y = v_fold_four(v_load(p + 4 * VL), v_load(p + 5 * VL), v_load(p + 6 * VL), v_load(p + 7 * VL));
    return _mm256_add_ps(_mm256_blend_ps(x, y, 0xF0), _mm256_permute2f128_ps(x, y, 0x21));
}
/* a0 b0 a1 b1 ... */
static inline void v_zip(vf a, vf b, vf out[2])
{
    __m256 lo = _mm256_unpacklo_ps(a, b), hi = _mm256_unpackhi_ps(a, b);
    out[0] = _mm256_permute2f128_ps(lo, hi, 0x20);
    out[1] = _mm256_permute2f128_ps(lo, hi, 0x31);
}

/* masks; a comparison with NaN is false, but for v_ne */
static inline vm v_lt(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
static inline vm v_eq(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
static inline vm v_ne(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_NEQ_UQ); }
static inline vf v_select(vm m, vf yes, vf no) { return _mm256_blendv_ps(no, yes, m); }
static inline vm vm_or(vm a, vm b) { return _mm256_or_ps(a, b); }
static inline int vm_any(vm m) { return _mm256_movemask_ps(m) != 0; }

static inline vi vi_load(const int32_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
static inline vi vi_set1(int32_t x) { return _mm256_set1_epi32(x); }
static inline vi vi_iota(void) { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
static inline vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
static inline vi vi_sub(vi a, vi b) { return _mm256_sub_epi32(a, b); }
static inline vi vi_xor(vi a, vi b) { return _mm256_xor_si256(a, b); }
static inline vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
static inline vi vi_shr(vi a, int n) { return _mm256_srli_epi32(a, n); }
static inline vi vi_select(vm m, vi yes, vi no) { return _mm256_blendv_epi8(no, yes, _mm256_castps_si256(m)); }
static inline vm vi_gt(vi a, vi b) { return _mm256_castsi256_ps(_mm256_cmpgt_epi32(a, b)); }
static inline vm vi_lt_u(vi a, vi b)
{
    vi flip = vi_set1(INT32_MIN);
    return vi_gt(vi_xor(b, flip), vi_xor(a, flip));
}
static inline vf vi_to_f(vi a) { return _mm256_cvtepi32_ps(a); }
/* high and low halves of the 64-bit products of unsigned lanes */
static inline void vi_mul_wide(vi a, vi b, vi *hi, vi *lo)
{
    vi even = _mm256_mul_epu32(a, b);
    vi odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), b);
    *hi = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
    *lo = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}

/* the first n of VL elements; the rest read as 0 and are not written */
static inline vi v_head(int n) { return _mm256_cmpgt_epi32(vi_set1(n), vi_iota()); }
static inline vf v_load_n(const float *p, int n) { return _mm256_maskload_ps(p, v_head(n)); }
static inline void v_store_n(float *p, int n, vf x) { _mm256_maskstore_ps(p, v_head(n), x); }

static inline vf v_from_bf16(__m128i h)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
static inline __m128i v_load_u16_n(const uint16_t *p, int n)
{
    uint16_t t[VL] = {0};
    memcpy(t, p, (size_t)n * 2);
    return _mm_loadu_si128((const __m128i *)t);
}
static inline void v_store_u16_n(uint16_t *p, int n, __m128i x)
{
    uint16_t t[VL];
    _mm_storeu_si128((__m128i *)t, x);
    memcpy(p, t, (size_t)n * 2);
}
static inline vf v_load_bf16(const uint16_t *p) { return v_from_bf16(_mm_loadu_si128((const __m128i *)p)); }
static inline vf v_load_bf16_n(const uint16_t *p, int n) { return v_from_bf16(v_load_u16_n(p, n)); }
/* 2 VL elements as those of even and those of odd index: a word holds one of each, and neither needs a shuffle */
static inline void v_load2_bf16(const uint16_t *p, vf *even, vf *odd)
{
    vi x = _mm256_loadu_si256((const __m256i *)p);
    *even = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    *odd = _mm256_castsi256_ps(_mm256_and_si256(x, vi_set1((int32_t)0xffff0000)));
}
static inline void v_load2_bf16_n(const uint16_t *p, int n, vf *even, vf *odd)
{
    uint16_t t[2 * VL] = {0};
    memcpy(t, p, (size_t)n * 2);
    v_load2_bf16(t, even, odd);
}
static inline vf v_load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
static inline vf v_load_f16_n(const uint16_t *p, int n) { return _mm256_cvtph_ps(v_load_u16_n(p, n)); }

static inline __m128i v_load_u8_n(const void *p, int n)
{
    uint64_t t = 0;
    memcpy(&t, p, (size_t)n);
    return _mm_cvtsi64_si128((long long)t);
}
static inline vf v_from_i8(__m128i x) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)); }
static inline vf v_load_i8(const void *p) { return v_from_i8(_mm_loadl_epi64((const __m128i *)p)); }
static inline vf v_load_i8_n(const void *p, int n) { return v_from_i8(v_load_u8_n(p, n)); }
/* 2 VL elements of float8_e4m3fn, each / 256: moved to where fp16 has sign, exponent and mantissa, whose bias is larger
 * by 8. The NaN of fp8 has the largest exponent of fp8 only, so it is made one of fp16. */
static inline void v_load2_f8(const void *p, vf *low, vf *high)
{
    vi w = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p));
    vi h = _mm256_and_si256(_mm256_slli_epi16(w, 7), _mm256_set1_epi16((short)0xbfff));
    vi nan = _mm256_cmpeq_epi16(_mm256_or_si256(w, _mm256_set1_epi16((short)0xff80)), _mm256_set1_epi16(-1));
    h = _mm256_or_si256(h, nan);
    *low = _mm256_cvtph_ps(_mm256_castsi256_si128(h));
    *high = _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1));
}
static inline void v_load2_f8_n(const void *p, int n, vf *low, vf *high)
{
    uint8_t t[2 * VL] = {0};
    memcpy(t, p, (size_t)n);
    v_load2_f8(t, low, high);
}

/* round to nearest even; a NaN stays one */
static inline __m128i v_to_bf16(vf x)
{
    vi u = _mm256_castps_si256(x);
    vi even = _mm256_and_si256(_mm256_srli_epi32(u, 16), vi_set1(1));
    vi r = _mm256_add_epi32(u, _mm256_add_epi32(even, vi_set1(0x7fff)));
    vi quiet = _mm256_or_si256(u, vi_set1(0x400000));
    r = _mm256_blendv_epi8(r, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
    r = _mm256_srli_epi32(r, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
static inline void v_store_bf16(uint16_t *p, vf x) { _mm_storeu_si128((__m128i *)p, v_to_bf16(x)); }
static inline void v_store_bf16_n(uint16_t *p, int n, vf x) { v_store_u16_n(p, n, v_to_bf16(x)); }
static inline __m128i v_to_f16(vf x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline void v_store_f16(uint16_t *p, vf x) { _mm_storeu_si128((__m128i *)p, v_to_f16(x)); }
static inline void v_store_f16_n(uint16_t *p, int n, vf x) { v_store_u16_n(p, n, v_to_f16(x)); }

/* yes where the byte is not 0 */
static inline vf v_select_bytes(const uint8_t *p, vf yes, vf no)
{
    vi b = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
    return v_select(vi_gt(b, _mm256_setzero_si256()), yes, no);
}

/* r[i] lane j <-> r[j] lane i: three rounds that exchange blocks of 1, 2 and 4 lanes */
static inline void v_transpose(vf r[VL])
{
    vf t[VL];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
    for (int j = 0; j < 4; j++) {
        t[j] = _mm256_permute2f128_ps(r[j], r[j + 4], 0x20);
        t[j + 4] = _mm256_permute2f128_ps(r[j], r[j + 4], 0x31);
    }
    for (int j = 0; j < 8; j++)
        r[j] = t[j];
}

#endif
