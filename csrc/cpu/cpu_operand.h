/* Rows of K and V as operands of the matrix products: the tensor itself where it can serve, else a packed copy of one
 * block in scratch. */
#ifndef FA_CPU_OPERAND_H
#define FA_CPU_OPERAND_H

#include "cpu_gemm.h"
#include "cpu_tile.h"

#ifdef FA_ISA_AVX512BF16
#define BF16_PAIRS true
#else
#define BF16_PAIRS false
#endif

typedef struct fa_operand {
    const char *p;
    int64_t bytes; /* from one row to the next; of operand B in pairs, from one pair of rows to the next */
} fa_operand;

/* n rows from row i on as operand A: every unit of a row is broadcast, so rows of fp32, or of an even number of bf16
 * where the kernel takes pairs, serve as they lie. */
FA_INLINE fa_operand operand_a(float *scratch, const fa_tensor *t, int64_t b, int64_t h, int64_t i, int n,
                               fa_dtype dtype, bool pairs)
{
    size_t size = dtype == FA_F32 ? 4 : 2;
    const char *rows = row_of(t, b, h, i, size);
    int64_t row_bytes = row_step(t, size), d = t->size[3];
    if (t->stride[3] == 1 && (dtype == FA_F32 || (pairs && d % 2 == 0)))
        return (fa_operand){rows, row_bytes};
    int64_t width = fa_padded(pairs ? (d + 1) / 2 : d, VL);
#ifdef FA_ISA_AVX512BF16
    if (pairs)
        pack_u16(scratch, width, rows, row_bytes, n, d, t->stride[3]);
    else
#endif
        pack_rows(scratch, width, rows, row_bytes, n, d, t->stride[3], dtype, NULL);
    return (fa_operand){(const char *)scratch, width * 4};
}

/* n rows from row i on as operand B, read by whole vectors. Rows marked in skip (may be NULL) are 0. */
FA_INLINE fa_operand operand_b(float *scratch, const fa_tensor *t, int64_t b, int64_t h, int64_t i, int n,
                               fa_dtype dtype, bool pairs, const uint8_t *skip)
{
    size_t size = dtype == FA_F32 ? 4 : 2;
    const char *rows = row_of(t, b, h, i, size);
    int64_t row_bytes = row_step(t, size), d = t->size[3], width = fa_padded(d, VL);
    if (dtype == FA_F32 && t->stride[3] == 1 && d % VL == 0 && !skip)
        return (fa_operand){rows, row_bytes};
#ifdef FA_ISA_AVX512BF16
    if (pairs)
        pack_pairs(scratch, width, rows, row_bytes, n, d, t->stride[3], skip);
    else
#endif
        pack_rows(scratch, width, rows, row_bytes, n, d, t->stride[3], dtype, skip);
    (void)pairs;
    return (fa_operand){(const char *)scratch, width * 4};
}

/* Marks rows of K or V with NaN or infinity; returns their number. */
FA_INLINE int operand_nonfinite(uint8_t *marks, const fa_tensor *t, int64_t b, int64_t h, int64_t i, int n,
                                fa_dtype dtype)
{
    size_t size = dtype == FA_F32 ? 4 : 2;
    return find_nonfinite(marks, row_of(t, b, h, i, size), row_step(t, size), n, t->size[3], t->stride[3],
                          dtype);
}

FA_INLINE void product(const fa_gemm *g, float alpha, bool pairs)
{
#ifdef FA_ISA_AVX512BF16
    if (pairs) {
        FA_LOCAL(gemm_store_bf16)(g, alpha, NULL);
        return;
    }
#endif
    (void)pairs;
    FA_LOCAL(gemm_store_f32)(g, alpha, NULL);
}

FA_INLINE void add_product(const fa_gemm *g, const float *beta, bool pairs)
{
#ifdef FA_ISA_AVX512BF16
    if (pairs) {
        FA_LOCAL(gemm_add_bf16)(g, 0, beta);
        return;
    }
#endif
    (void)pairs;
    FA_LOCAL(gemm_add_f32)(g, 0, beta);
}

#ifdef FA_ISA_AVX512BF16
/* dst[key / 2][BM] <- tile values of keys 2r and 2r + 1, rounded to bf16, side by side */
static inline void pair_keys(float *dst, const float *tile, int nk, int nv)
{
    for (int k = 0; k < nk; k += 2)
        for (int v = 0; v < nv; v++) {
            vf hi = k + 1 < nk ? v_load(tile + (k + 1) * BM + v * VL) : v_zero();
            v_store(dst + k / 2 * BM + v * VL, v_pair_bf16(v_load(tile + k * BM + v * VL), hi));
        }
}

/* dst[key][BM / 2] <- tile values of lanes 2r and 2r + 1, rounded to bf16, side by side */
static inline void pair_lanes(float *dst, const float *tile, int nk, int nv)
{
    for (int k = 0; k < nk; k++)
        for (int v = 0; v < nv; v++)
            v_store_bf16((uint16_t *)(dst + k * (BM / 2)) + v * VL, v_load(tile + k * BM + v * VL));
}
#endif

#endif
