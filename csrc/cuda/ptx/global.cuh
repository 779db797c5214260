/* Device memory shared by thread blocks of one launch: sums, flags, and plain bulk copies. */
#ifndef FA_PTX_GLOBAL_CUH
#define FA_PTX_GLOBAL_CUH

#include "mbarrier.cuh"

/* Adds four floats at a 16-byte aligned address in the second-level cache; nothing comes back. */
__device__ __forceinline__ void fa_red_add_f32x4(float *p, float a, float b, float c, float d)
{
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(a), "f"(b), "f"(c), "f"(d)
                 : "memory");
}

__device__ __forceinline__ void fa_store_f32x4(float *p, float a, float b, float c, float d)
{
    asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(a), "f"(b), "f"(c), "f"(d)
                 : "memory");
}

__device__ __forceinline__ uint32_t fa_load_acquire(const uint32_t *p)
{
    uint32_t x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}

/* Whatever this thread has seen happen, also of other threads through barriers, is performed before x appears. */
__device__ __forceinline__ void fa_store_release(uint32_t *p, uint32_t x)
{
    asm volatile("fence.acq_rel.gpu;\n\tst.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}

/* bytes: a multiple of 16, both addresses aligned to 16; counted on bar. */
__device__ __forceinline__ void fa_bulk_load(void *to, const void *from, uint32_t bytes, uint64_t *bar)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     fa_shared_address(to)),
                 "l"(from), "r"(bytes), "r"(fa_shared_address(bar))
                 : "memory");
}

#endif
