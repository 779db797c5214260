/* See cpu_gemm.h. Compiled once for each instruction set. */
#include <string.h>

#include "cpu_gemm.h"

#define MR 6 /* with NV_MAX vectors: 12 accumulators of 16 registers (AVX2), 24 of 32 (AVX-512) */

typedef enum { STORE, ADD } gemm_mode;

FA_INLINE vf dot(vf acc, vf a, vf b, int bf16)
{
#ifdef FA_ISA_AVX512BF16
    if (bf16)
        return v_dot_bf16(acc, a, b);
#else
    (void)bf16;
#endif
    return v_fma(a, b, acc);
}

FA_INLINE vf broadcast(const char *p)
{
    float x;
    memcpy(&x, p, 4); /* a pair of bf16 may lie at an odd multiple of 2 bytes */
    return v_set1(x);
}

/* rows x nv accumulators stay in registers over the whole of k. Two row pointers three rows apart let every address be
 * base + {0, 1, 2} * am. */
FA_INLINE void tile(const fa_gemm *g, int row, int col, int rows, int nv, float alpha, const float *beta,
                    gemm_mode mode, int bf16)
{
    vf acc[MR][NV_MAX];
    FA_UNROLL
    for (int i = 0; i < rows; i++) {
        FA_UNROLL
        for (int j = 0; j < nv; j++)
            acc[i][j] = v_zero();
    }
    int64_t am = g->am, ak = g->ak, bk = g->bk;
    const char *a0 = (const char *)g->a + row * am, *a3 = a0 + 3 * am;
    const char *b = (const char *)g->b + (int64_t)col * (VL * 4);
    for (int64_t k = g->k; k > 0; k--) {
        vf vb[NV_MAX];
        FA_UNROLL
        for (int j = 0; j < nv; j++)
            vb[j] = v_load((const float *)b + j * VL);
        FA_UNROLL
        for (int i = 0; i < rows; i++) {
            vf va = broadcast(i < 3 ? a0 + i * am : a3 + (i - 3) * am);
            FA_UNROLL
            for (int j = 0; j < nv; j++)
                acc[i][j] = dot(acc[i][j], va, vb[j], bf16);
        }
        a0 += ak;
        a3 += ak;
        b += bk;
    }
    float *c = g->c + row * g->cm + (int64_t)col * VL;
    FA_UNROLL
    for (int i = 0; i < rows; i++) {
        FA_UNROLL
        for (int j = 0; j < nv; j++) {
            float *p = c + i * g->cm + j * VL;
            if (mode == STORE)
                v_store(p, v_mul(acc[i][j], v_set1(alpha)));
            else if (beta)
                v_store(p, v_fma(v_load(p), v_set1(beta[row + i]), acc[i][j]));
            else
                v_store(p, v_add(v_load(p), acc[i][j]));
        }
    }
}

/* A strip of nv vectors: its part of B stays in the first-level cache while the rows of A pass. */
FA_INLINE void strip(const fa_gemm *g, int col, int nv, float alpha, const float *beta, gemm_mode mode, int bf16)
{
    int row = 0;
    for (; row + MR <= g->m; row += MR)
        tile(g, row, col, MR, nv, alpha, beta, mode, bf16);
    switch (g->m - row) {
    case 5: tile(g, row, col, 5, nv, alpha, beta, mode, bf16); break;
    case 4: tile(g, row, col, 4, nv, alpha, beta, mode, bf16); break;
    case 3: tile(g, row, col, 3, nv, alpha, beta, mode, bf16); break;
    case 2: tile(g, row, col, 2, nv, alpha, beta, mode, bf16); break;
    case 1: tile(g, row, col, 1, nv, alpha, beta, mode, bf16); break;
    default: break;
    }
}

FA_INLINE void gemm(const fa_gemm *g, float alpha, const float *beta, gemm_mode mode, int bf16)
{
    int col = 0;
    for (; col + NV_MAX <= g->nv; col += NV_MAX)
        strip(g, col, NV_MAX, alpha, beta, mode, bf16);
    switch (g->nv - col) {
#if NV_MAX > 3
    case 3: strip(g, col, 3, alpha, beta, mode, bf16); break;
    case 2: strip(g, col, 2, alpha, beta, mode, bf16); break;
#endif
    case 1: strip(g, col, 1, alpha, beta, mode, bf16); break;
    default: break;
    }
}

void FA_LOCAL(gemm_store_f32)(const fa_gemm *g, float alpha, const float *beta) { gemm(g, alpha, beta, STORE, 0); }
void FA_LOCAL(gemm_add_f32)(const fa_gemm *g, float alpha, const float *beta) { gemm(g, alpha, beta, ADD, 0); }
#ifdef FA_ISA_AVX512BF16
void FA_LOCAL(gemm_store_bf16)(const fa_gemm *g, float alpha, const float *beta) { gemm(g, alpha, beta, STORE, 1); }
void FA_LOCAL(gemm_add_bf16)(const fa_gemm *g, float alpha, const float *beta) { gemm(g, alpha, beta, ADD, 1); }
#endif
