/* One launch that begins before the launch in front of it has ended. Before sm_90 launches follow each other anyway. */
#ifndef FA_PTX_GRID_CUH
#define FA_PTX_GRID_CUH

/* From here on the next launch may start its blocks where there is room. */
__device__ __forceinline__ void ptx_grid_launch_dependents(void)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* Until the launch in front has ended and what it wrote can be read. */
__device__ __forceinline__ void ptx_grid_wait(void)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#endif
