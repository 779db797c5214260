/* Thread blocks of a cluster: each other's shared memory (PTX ISA, "mapa", "barrier.cluster"). */
#ifndef FA_PTX_CLUSTER_CUH
#define FA_PTX_CLUSTER_CUH

#include "tma.cuh"

__device__ __forceinline__ int fa_cluster_rank(void)
{
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return (int)rank;
}

/* All threads of all thread blocks. */
__device__ __forceinline__ void fa_cluster_sync(void)
{
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

/* At the same barrier of thread block `rank`. */
__device__ __forceinline__ void fa_mbar_arrive_in(uint64_t *bar, int rank)
{
    asm volatile("{\n\t.reg .b32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\t"
                 "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n\t}" ::"r"(fa_shared_address(bar)),
                 "r"(rank)
                 : "memory");
}

/* As fa_tma_load_4d, to the same place of every thread block in the bits of `ranks`, and counted on its barrier. */
__device__ __forceinline__ void fa_tma_load_4d_for(uint16_t ranks, void *to, const CUtensorMap *map, uint64_t *bar,
                                                   int32_t x0, int32_t x1, int32_t x2, int32_t x3)
{
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
                 " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(fa_shared_address(to)),
                 "l"(map), "r"(fa_shared_address(bar)), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "h"(ranks)
                 : "memory");
}

#endif
