/* Bulk tensor copies (TMA): one thread moves a box of a tensor, described by a tensor map, to shared memory. What lies
 * outside the tensor arrives as zeros (PTX ISA, "cp.async.bulk.tensor"). */
#ifndef FA_PTX_TMA_CUH
#define FA_PTX_TMA_CUH

#include <cuda.h> /* CUtensorMap; nothing of libcuda is linked */

#include "mbarrier.cuh"

__device__ __forceinline__ void fa_tma_prefetch_map(const CUtensorMap *map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/* Rewrites the size of dimension DIM of a map in global memory (PTX ISA, "tensormap.replace"); afterwards release it,
 * and acquire it where it is used. */
template <int DIM> __device__ __forceinline__ void fa_tensor_map_resize(CUtensorMap *map, uint32_t size)
{
    asm volatile("tensormap.replace.tile.global_dim.global.b1024.b32 [%0], %1, %2;" ::"l"(map), "n"(DIM), "r"(size)
                 : "memory");
}

/* The same of its address, a multiple of 16. */
__device__ __forceinline__ void fa_tensor_map_move(CUtensorMap *map, const void *to)
{
    asm volatile("tensormap.replace.tile.global_address.global.b1024.b64 [%0], %1;" ::"l"(map), "l"(to) : "memory");
}

__device__ __forceinline__ void fa_tensor_map_release(void)
{
    asm volatile("fence.proxy.tensormap::generic.release.gpu;" ::: "memory");
}

__device__ __forceinline__ void fa_tensor_map_acquire(const CUtensorMap *map)
{
    asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"(map) : "memory");
}

/* Coordinates from the innermost dimension outwards, in elements; the bytes of the whole box are counted on bar. */
__device__ __forceinline__ void fa_tma_load_4d(void *to, const CUtensorMap *map, uint64_t *bar, int32_t x0, int32_t x1,
                                               int32_t x2, int32_t x3)
{
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(fa_shared_address(to)),
                 "l"(map), "r"(fa_shared_address(bar)), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
                 : "memory");
}

/* What is read or written once may leave the second-level cache first. */
__device__ __forceinline__ uint64_t fa_policy_once(void)
{
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ void fa_tma_load_4d_once(void *to, const CUtensorMap *map, uint64_t *bar, int32_t x0,
                                                    int32_t x1, int32_t x2, int32_t x3)
{
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
                 " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(fa_shared_address(to)),
                 "l"(map), "r"(fa_shared_address(bar)), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "l"(fa_policy_once())
                 : "memory");
}

/* The other way; what lies outside the tensor is left out. from: address in the shared window. Committed in groups. */
__device__ __forceinline__ void fa_tma_store_4d(const CUtensorMap *map, uint32_t from, int32_t x0, int32_t x1,
                                                int32_t x2, int32_t x3)
{
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group.L2::cache_hint"
                 " [%0, {%2, %3, %4, %5}], [%1], %6;" ::"l"(map),
                 "r"(from), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "l"(fa_policy_once())
                 : "memory");
}

__device__ __forceinline__ void fa_bulk_commit(void)
{
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/* Until all groups of this thread have read what they store. */
__device__ __forceinline__ void fa_bulk_wait_read(void)
{
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

#endif
