/* Thread blocks of a cluster: each other's shared memory (PTX ISA, "mapa", "barrier.cluster"). A thread block that was
 * started alone is the cluster of itself. */
#ifndef FA_PTX_CLUSTER_CUH
#define FA_PTX_CLUSTER_CUH

#include <stdint.h>

/* All threads of all thread blocks; those that have ended do not count. */
__device__ __forceinline__ void fa_cluster_sync(void)
{
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

/* The same place in the shared memory of thread block `rank`. */
__device__ __forceinline__ uint32_t fa_address_in(uint32_t shared, int rank)
{
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared), "r"(rank));
    return there;
}

/* bar: as fa_address_in has it. */
__device__ __forceinline__ void fa_mbar_arrive_at(uint32_t bar)
{
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory");
}

/* From this thread block's shared memory to another's; bytes: a multiple of 16, counted on a barrier there. */
__device__ __forceinline__ void fa_bulk_send(uint32_t to, uint32_t from, uint32_t bytes, uint32_t bar)
{
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "r"(from), "r"(bytes), "r"(bar)
                 : "memory");
}

#endif
