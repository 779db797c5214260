/* What the Hopper forward kernel is handed: sizes, strides and tensor maps of one call. */
#ifndef FA_FWD_SM90_PARAMS_H
#define FA_FWD_SM90_PARAMS_H

#include <cuda.h>
#include <stdint.h>

typedef struct fa_fwd_sm90_view {
    const void *data;
    int64_t batch, head, row; /* strides in elements; the last is 1 */
} fa_fwd_sm90_view;

/* Query i sees the keys i + lo_shift <= j < i + hi_shift of 0 .. SK - 1. */
typedef struct fa_fwd_sm90_params {
    CUtensorMap q_map, k_map, v_map; /* dimensions (D, S, H, B) */
    fa_fwd_sm90_view q, k, v;        /* the same tensors, for rows that have to be repaired */
    fa_fwd_sm90_view out;
    float *lse;                      /* (B, HQ, SQ) */
    int32_t q_steps[2], k_steps[2], v_steps[2]; /* coordinate steps per head and batch: 0 where the stride is 0 */
    int32_t B, HQ, group, SQ, SK, D, DV;
    int32_t lo_shift, hi_shift;
    int32_t hides;                   /* some query may not see some key */
    float scale_log2;                /* scale * log2 e > 0 */
    int32_t tiles;                   /* blocks of BM queries in a head */
    int32_t parts;                   /* 2: a piece of work is a long tile and a short one; 1: one tile */
    int32_t units;                   /* pieces of work of all heads */
} fa_fwd_sm90_params;

#endif
