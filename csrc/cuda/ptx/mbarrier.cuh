/* mbarrier: a barrier in shared memory that counts arrivals and bytes of bulk copies (PTX ISA, "mbarrier"). It is one
 * 64-bit word; a phase ends when the expected arrivals came and the announced bytes have landed. */
#ifndef FA_PTX_MBARRIER_CUH
#define FA_PTX_MBARRIER_CUH

#include <stdint.h>

/* Address in the shared window, as PTX wants it. */
__device__ __forceinline__ uint32_t fa_shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

__device__ __forceinline__ void fa_mbar_init(uint64_t *bar, uint32_t arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(fa_shared_address(bar)), "r"(arrivals) : "memory");
}

/* Makes initialised barriers visible to the copy engine; then the block still has to synchronise. */
__device__ __forceinline__ void fa_mbar_fence_init(void)
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/* One arrival that announces bytes still to come. */
__device__ __forceinline__ void fa_mbar_expect(uint64_t *bar, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(fa_shared_address(bar)), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void fa_mbar_arrive(uint64_t *bar)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(fa_shared_address(bar)) : "memory");
}

/* One arrival for a warp, whose threads have met since they did what it tells of.
 * FA_ARRIVE_ALL, for debugging: an arrival of each thread instead. compute-sanitizer's racecheck (2025.3) takes an
 * arrival for that of the thread alone, and reports what the rest of its warp did. */
#ifdef FA_ARRIVE_ALL
enum { FA_WARP_ARRIVALS = 32 };
#else
enum { FA_WARP_ARRIVALS = 1 };
#endif

__device__ __forceinline__ void fa_mbar_arrive_warp(uint64_t *bar)
{
    if (FA_WARP_ARRIVALS > 1 || threadIdx.x % 32 == 0)
        fa_mbar_arrive(bar);
}

/* Waits until the phase of this parity has ended; phases have the parities 0, 1, 0, .. . The loop is inside the
 * assembly, where it is one step for all threads of the warp: the compiler keeps what follows in uniform registers.
 * FA_WAIT_LIMIT, for debugging: tries after which a wait that never ends becomes an error of the launch. */
__device__ __forceinline__ void fa_mbar_wait(uint64_t *bar, uint32_t parity)
{
#ifdef FA_WAIT_LIMIT
    asm volatile("{\n\t.reg .pred p;\n\t.reg .b32 n;\n\tmov.b32 n, 0;\n"
                 "again:\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n\t@p bra.uni done;\n\t"
                 "add.u32 n, n, 1;\n\tsetp.gt.u32 p, n, %2;\n\t@p trap;\n\tbra.uni again;\n"
                 "done:\n\t}" ::"r"(fa_shared_address(bar)),
                 "r"(parity), "n"(FA_WAIT_LIMIT)
                 : "memory");
#else
    asm volatile("{\n\t.reg .pred p;\n"
                 "again:\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n\t@p bra.uni done;\n\t"
                 "bra.uni again;\n"
                 "done:\n\t}" ::"r"(fa_shared_address(bar)),
                 "r"(parity)
                 : "memory");
#endif
}

#endif
