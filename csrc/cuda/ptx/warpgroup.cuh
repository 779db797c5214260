/* What warps and warpgroups (4 warps, 128 threads) do together: registers, named barriers, one lane for all. */
#ifndef FA_PTX_WARPGROUP_CUH
#define FA_PTX_WARPGROUP_CUH

#include <stdint.h>

enum { FA_WARP = 32, FA_WARPGROUP = 128 };

/* Registers per thread from here on, a multiple of 8; every warp of the warpgroup must execute it. */
template <int N> __device__ __forceinline__ void fa_registers_grow(void)
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N> __device__ __forceinline__ void fa_registers_shrink(void)
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

/* Named barriers 1 .. 15 (0 is __syncthreads): a phase ends when `threads` have synchronised or arrived. */
__device__ __forceinline__ void fa_bar_sync(int id, int threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void fa_bar_arrive(int id, int threads)
{
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#endif
