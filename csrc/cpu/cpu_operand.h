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

/* Consecutive rows of one head. */
typedef struct fa_rows {
    const char *p;
    int64_t bytes;  /* from one row to the next */
    int64_t stride; /* of the elements of a row */
    int64_t d;
} fa_rows;

/* the rows of t from row i on */
FA_INLINE fa_rows rows_at(const fa_tensor *t, int64_t b, int64_t h, int64_t i, fa_dtype dtype)
{
    size_t size = dtype == FA_F32 ? 4 : 2;
    return (fa_rows){row_of(t, b, h, i, size), row_step(t, size), t->stride[3], t->size[3]};
}

/* One row of a cache in the query's dtype, which holds every value of int8 and float8 exactly. */
FA_INLINE void stage_row(char *to, const char *from, int64_t stride, int64_t d, fa_dtype stored, fa_dtype dtype)
{
    if (stored == dtype && stride == 1) {
        memcpy(to, from, (size_t)d * (dtype == FA_F32 ? 4 : 2));
        return;
    }
    for (int64_t c = 0; c < d; c += VL) {
        float x[VL];
        for (int i = 0; i < part(c, d); i++)
            x[i] = (float)fa_load(from, stored, (c + i) * stride);
        store_f32(to, c, part(c, d), 1, dtype, v_load_n(x, part(c, d)));
    }
}

/* Rows i .. i+n-1 of k or v: the tensor itself, or where they lie on several pages or are quantised a copy in stage,
 * in the query's dtype and before their scales. */
FA_INLINE fa_rows key_rows(char *stage, const fa_args *a, const fa_tensor *t, int64_t b, int64_t h, int64_t i, int n,
                           fa_dtype dtype)
{
    bool one_page = !a->page_size || i / a->page_size == (i + n - 1) / a->page_size;
    int64_t d = t->size[3];
    if (one_page && t->dtype == dtype) {
        size_t size = dtype == FA_F32 ? 4 : 2;
        return (fa_rows){(const char *)t->data + fa_key_row(a, t, b, h, i), row_step(t, size), t->stride[3], d};
    }
    int64_t bytes = d * (dtype == FA_F32 ? 4 : 2);
    for (int r = 0; r < n; r++)
        stage_row(stage + r * bytes, (const char *)t->data + fa_key_row(a, t, b, h, i + r), t->stride[3], d, t->dtype,
                  dtype);
    return (fa_rows){stage, bytes, 1, d};
}

/* n rows as operand A: every unit of a row is broadcast, so rows of fp32, or of an even number of bf16 where the kernel
 * takes pairs, serve as they lie. */
FA_INLINE fa_operand operand_a(float *scratch, fa_rows r, int n, fa_dtype dtype, bool pairs)
{
    if (r.stride == 1 && (dtype == FA_F32 || (pairs && r.d % 2 == 0)))
        return (fa_operand){r.p, r.bytes};
    int64_t width = fa_padded(pairs ? (r.d + 1) / 2 : r.d, VL);
#ifdef FA_ISA_AVX512BF16
    if (pairs)
        pack_u16(scratch, width, r.p, r.bytes, n, r.d, r.stride);
    else
#endif
        pack_rows(scratch, width, r.p, r.bytes, n, r.d, r.stride, dtype, NULL);
    return (fa_operand){(const char *)scratch, width * 4};
}

/* n rows as operand B, read by whole vectors. Rows marked in skip (may be NULL) are 0. */
FA_INLINE fa_operand operand_b(float *scratch, fa_rows r, int n, fa_dtype dtype, bool pairs, const uint8_t *skip)
{
    int64_t width = fa_padded(r.d, VL);
    if (dtype == FA_F32 && r.stride == 1 && r.d % VL == 0 && !skip)
        return (fa_operand){r.p, r.bytes};
#ifdef FA_ISA_AVX512BF16
    if (pairs)
        pack_pairs(scratch, width, r.p, r.bytes, n, r.d, r.stride, skip);
    else
#endif
        pack_rows(scratch, width, r.p, r.bytes, n, r.d, r.stride, dtype, skip);
    (void)pairs;
    return (fa_operand){(const char *)scratch, width * 4};
}

/* Marks rows of K or V with NaN or infinity; returns their number. */
FA_INLINE int operand_nonfinite(uint8_t *marks, fa_rows r, int n, fa_dtype dtype)
{
    return find_nonfinite(marks, r.p, r.bytes, n, r.d, r.stride, dtype);
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
