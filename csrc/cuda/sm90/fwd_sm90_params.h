/* What the Hopper forward kernel is handed: sizes, strides and tensor maps of one call. */
#ifndef FA_FWD_SM90_PARAMS_H
#define FA_FWD_SM90_PARAMS_H

#include <cuda.h>
#include <stdint.h>

#include "../../fa.h"
#include "sm90_dropout.cuh"

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
    float scale_log2;                /* from what the softmax is given to units of log2: scale * log2 e > 0 */
    int32_t tiles;                   /* blocks of BM queries in a head */
    int32_t parts;                   /* 2: a piece of work is a long tile and a short one; 1: one tile */
    int32_t units;                   /* pieces of work of all heads */
} fa_fwd_sm90_params;

/* What a call does to its scores and weights besides causal and windows. */
enum {
    FA_MOD_BITS = 1,     /* bool mask */
    FA_MOD_BIAS = 2,     /* float mask */
    FA_MOD_VECTORS = 4,  /* rows of the mask can be read 16 bytes at a time, and it is not of float32 */
    FA_MOD_CAP = 8,
    FA_MOD_ALIBI = 16,
    FA_MOD_DROPOUT = 32,
    FA_MOD_SCALED = 64,  /* scores come to units of log2 before the softmax; scale_log2 is then 1 */
    FA_MOD_WIDE = 128,   /* the mask is of float32 */
    FA_MOD_OFTEN = 256,  /* with DROPOUT: of more than a half */
    FA_MOD_PADDING = 512, /* a bool mask, the same for all queries of a head */
};

/* What an instance is for: nothing but causal and windows; also lengths, packed rows, sinks and a padding mask; all
 * options; or, with lengths and so on, calls of which FA_MOD_* say just this. */
enum {
    FA_ALL = -2,
    FA_PLAIN = -1,
    FA_LENGTHS = 0,
    FA_BITS = FA_MOD_BITS | FA_MOD_VECTORS,
    FA_BIAS = FA_MOD_BIAS | FA_MOD_VECTORS | FA_MOD_SCALED,
    FA_CAP = FA_MOD_CAP | FA_MOD_SCALED,
    FA_ALIBI = FA_MOD_ALIBI | FA_MOD_SCALED,
    FA_DROPOUT = FA_MOD_DROPOUT,
};

/* Of the instances with lengths and options. */
typedef struct fa_fwd_sm90_mod_params {
    fa_fwd_sm90_params plain;
    fa_args a;             /* for lengths, packed rows and what is read once for a tile */
    int32_t what;          /* FA_MOD_* */
    int32_t heads_outside; /* heads are the outer loop over tiles, batches the inner: they share a mask */
    float scale;           /* of Q K^T: by softcap if there is one, else into units of log2 */
    float cap;             /* softcap in units of log2 */
    float cap_terms[3];    /* of a small s, it is s times a polynomial in s^2 of these coefficients; */
    float cap_limit;       /* small: s^2 is at most this */
    fa_sm90_dropout dropout;
    int64_t mask[4];       /* strides of the mask in elements, 0 where it is broadcast */
    uint32_t *next_unit;   /* where pieces of work are handed out one by one: the next, then for each the one that its
                              thread block had before it; NULL: in turn */
} fa_fwd_sm90_mod_params;

#endif
