/* What the host sides of the Hopper kernels share: instances, tensor maps, which calls are plain. */
#ifndef FA_SM90_HOST_H
#define FA_SM90_HOST_H

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "../../fa.h"

#ifdef __cplusplus
extern "C" {
#endif

#define FA_POSITION_BOUND ((int64_t)1 << 30) /* = FA_MAX_SEQ: no two positions are further apart */

/* One compiled kernel: head dimensions it serves, its tile, and what its launch needs. */
typedef struct fa_sm90_instance {
    const char *name;
    fa_dtype dtype;
    int D, DV, BM, BN;
    int stages; /* blocks of what is streamed that fit its shared memory */
    int threads;
    int shared_bytes;
    const void *kernel;
    int options; /* of forward: fwd_sm90_params.h */
} fa_sm90_instance;

/* Nothing but causal and a window. */
bool fa_sm90_is_plain(const fa_args *a);

/* The range of keys that query i sees: i + *lo_shift <= j < i + *hi_shift. */
void fa_sm90_band(const fa_args *a, int32_t *lo_shift, int32_t *hi_shift);

/* A view (B, H, S, D) in boxes of `rows` rows and 128 bytes of columns, swizzled. A dimension with stride 0 has size 1
 * in the map and its coordinate never moves; steps: of head and batch. */
typedef struct fa_sm90_map {
    const fa_tensor *t;
    int rows;
    CUtensorMap *map;
    int32_t *steps;
} fa_sm90_map;

fa_status fa_sm90_encode(const char *kernel, const fa_sm90_map *maps, int n, fa_error *err);

/* Gives the kernel its shared memory; processors: multiprocessors of the current device. */
fa_status fa_sm90_prepare(const fa_sm90_instance *f, int *processors, fa_error *err);

/* Starts it on the current device; params: its one argument. No blocks: nothing. */
fa_status fa_sm90_start(const fa_sm90_instance *f, int64_t blocks, const void *params, cudaStream_t stream,
                        fa_error *err);

fa_status fa_sm90_refuse(fa_error *err, const char *what, const char *why);

#ifdef __cplusplus
}
#endif
#endif
