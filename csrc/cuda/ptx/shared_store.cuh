/* Between registers and shared memory in the layout of the matrix instructions, and what makes stores visible to wgmma
 * and the copy engine (PTX ISA, "stmatrix", "ldmatrix", "Async proxy"). */
#ifndef FA_PTX_SHARED_STORE_CUH
#define FA_PTX_SHARED_STORE_CUH

#include "mbarrier.cuh"

/* Four 8 x 8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8 and holds, of each
 * matrix, columns 2 (l % 4) and 2 (l % 4) + 1 of row l / 4: the accumulator layout of wgmma. */
__device__ __forceinline__ void fa_stmatrix_x4(uint32_t address, uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(w0),
                 "r"(w1), "r"(w2), "r"(w3)
                 : "memory");
}

/* The other way, each matrix transposed: of it, the lane gets rows 2 (l % 4) and 2 (l % 4) + 1 of column l / 4. */
__device__ __forceinline__ void fa_ldmatrix_x4_trans(uint32_t (&w)[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void fa_store_shared_16(uint32_t address, uint32_t x, uint32_t y, uint32_t z, uint32_t w)
{
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}

/* In every thread that stored, before the barrier that the reader waits for. */
__device__ __forceinline__ void fa_fence_shared_async(void)
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#endif
