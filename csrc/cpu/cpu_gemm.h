/* The one matrix product of all kernels: C[m][n] from A[m][k] B[k][n] with n in the lanes.
 *
 * A is read by broadcasting one 32-bit unit at a time, through two strides, so that K, V, P and dS serve as they lie
 * in memory; B is read by vectors. A unit is an fp32, or two bf16 that are adjacent in k (then k counts pairs).
 */
#ifndef FA_CPU_GEMM_H
#define FA_CPU_GEMM_H

#include "cpu_simd.h"

typedef struct fa_gemm {
    int m;              /* rows of C */
    int nv;             /* vectors in a row of C and of B */
    int64_t k;          /* units */
    const void *a;      /* unit (m, k) at byte m * am + k * ak */
    int64_t am, ak;
    const void *b;      /* row k at byte k * bk */
    int64_t bk;
    float *c;           /* row m at element m * cm */
    int64_t cm;
} fa_gemm;

typedef void fa_gemm_fn(const fa_gemm *g, float alpha, const float *beta);

/* C = alpha A B;  beta is ignored */
fa_gemm_fn FA_LOCAL(gemm_store_f32);
/* C = beta[m] C + A B;  beta NULL: C + A B; alpha is ignored */
fa_gemm_fn FA_LOCAL(gemm_add_f32);
#ifdef FA_ISA_AVX512BF16
fa_gemm_fn FA_LOCAL(gemm_store_bf16);
fa_gemm_fn FA_LOCAL(gemm_add_bf16);
#endif

#endif
