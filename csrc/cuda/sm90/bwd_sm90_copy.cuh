/* Copies of tiles for the Hopper backward kernels. */
#ifndef FA_BWD_SM90_COPY_CUH
#define FA_BWD_SM90_COPY_CUH

#include "../ptx/tma.cuh"
#include "bwd_sm90_params.h"

/* The map of a tensor, or that which ends at the length of batch b; which: FA_MAP_Q, .. */
__device__ __forceinline__ const CUtensorMap *fa_map_of(const fa_bwd_sm90_params &p, const CUtensorMap *whole, int b,
                                                        int which)
{
    if (!(p.mod.options & FA_MOD_LENGTHS))
        return whole;
    const CUtensorMap *map = p.mod.maps + b * FA_MAPS + which;
    fa_tensor_map_acquire(map);
    return map;
}

/* Panels of 64 columns. */
template <int ROWS, int COLUMNS, typename T>
__device__ __forceinline__ void fa_load_tile(T *to, const CUtensorMap *map, uint64_t *bar, int row, int head, int batch)
{
#pragma unroll
    for (int panel = 0; panel < COLUMNS / 64; panel++)
        fa_tma_load_4d(to + panel * (64 * ROWS), map, bar, 64 * panel, row, head, batch);
}

#endif
