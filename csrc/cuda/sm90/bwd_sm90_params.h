/* What the Hopper backward kernels are handed, and in which order thread blocks add to dQ. */
#ifndef FA_BWD_SM90_PARAMS_H
#define FA_BWD_SM90_PARAMS_H

#include <cuda.h>
#include <stdbool.h>
#include <stdint.h>

#include "sm90_dropout.cuh"

#define FA_LOG2E 1.44269504088896f
#define FA_BWD_LEAST (-0x1p127f * FA_LOG2E) /* no score or log-sum-exp counts as less, in units of log2 */

typedef struct fa_bwd_sm90_view {
    void *data;
    int64_t batch, head, row; /* strides in elements; the last is 1 */
} fa_bwd_sm90_view;

/* Letters: m a block of BM queries, 0 .. q_blocks - 1; n a block of BN keys, 0 .. k_blocks - 1.
 * Thread block n walks over query blocks; the sum of dQ m takes key blocks one after the other. Walk and sum fit
 * together when every m meets its n in the order in which, at equal speed, they get there, some steps apart:
 *   ROTATE  every n sees every m. Key blocks are cut into rings, one after the other in the sum. The i-th of a ring of
 *           r starts at ceil(i q_blocks / r) and goes up, round the end to the start. The sum takes first the one that
 *           starts at or before m, then the one below, .. round.
 *   UP      later queries see more keys: n starts at its first m, on the diagonal. The sum takes descending n.
 *   DOWN    n starts at its last m. The sum takes ascending n.
 * DOWN waits only for thread blocks that were started earlier. The other two need a whole ring, or head, at work at the
 * same time, and are chosen only where the device holds so many. */
enum { FA_BWD_ROTATE, FA_BWD_UP, FA_BWD_DOWN };

/* PACKED: a head of all sequences is cut into blocks as follows. Those of sequence n are numbered from
 * first[n] / size + n on, which are at least as many numbers as it needs, found without a table; q_blocks and k_blocks
 * count them all, and those left over are empty. */

/* Query i of 0 .. SQ - 1 sees the keys i + lo_shift <= j < i + hi_shift of 0 .. SK - 1. */
typedef struct fa_bwd_band {
    int32_t SQ, SK, lo_shift, hi_shift;
} fa_bwd_band;

/* One number per batch, 32 or 64 bits wide; data NULL: as long as the tensor. */
typedef struct fa_bwd_lengths {
    const void *data;
    int64_t step;
    bool wide;
} fa_bwd_lengths;

/* What a call has beside causal and windows. */
enum {
    FA_MOD_LENGTHS = 1,
    FA_MOD_BITS = 2, /* a bool mask */
    FA_MOD_BIAS = 4, /* a float mask, read in place */
    FA_MOD_TILES = 64, /* with BIAS: its tiles are copied to shared memory */
    FA_MOD_PACKED = 128, /* with LENGTHS: sequences one behind the other in a batch of 1 */
    FA_MOD_CAP = 8,
    FA_MOD_ALIBI = 16,
    FA_MOD_DROPOUT = 32,
    FA_MOD_OFTEN = 256, /* with DROPOUT: of more than a half */
    FA_MOD_TWO_WEIGHTS = FA_MOD_CAP | FA_MOD_DROPOUT, /* those of dS differ from those of dV */
    FA_MOD_TILED = FA_MOD_BIAS | FA_MOD_TILES,
    FA_MOD_ANY = -1, /* of an instance: whatever the call has */
};

enum { FA_MAP_Q, FA_MAP_DOUT, FA_MAP_K, FA_MAP_V, FA_MAPS };

/* Strides in elements; 0 where a tensor is broadcast. */
typedef struct fa_bwd_mod {
    int32_t options;
    /* LENGTHS: shifts above are for an offset of 0; maps: the four of each batch, with its lengths as sizes */
    fa_bwd_lengths q_len, k_len;
    bool bottom_right, left, right;
    CUtensorMap *maps; /* (batches, FA_MAPS); with PACKED each starts at the rows of its sequence */
    int32_t batches;   /* B, or sequences; the last of these has the rows that belong to none, and is empty */
    fa_bwd_lengths cu_q, cu_k;  /* PACKED: offsets as given */
    int32_t *first_q, *first_k; /* (batches + 1): in order and within the rows; the last is the number of rows */
    /* BITS: bit q % 64 of word (b, h, q / 64, k); strides in words */
    uint64_t *bits;
    int64_t bits_batch, bits_head, bits_block;
    int32_t bits_key;
    /* either mask as it was given; f32: fp32, else the dtype of q */
    const void *mask;
    int64_t mask_batch, mask_head, mask_query, mask_key;
    bool f32;
    CUtensorMap mask_map; /* TILES: dimensions (SK, SQ, H, B) */
    int32_t mask_steps[2];
    bool mask_once; /* no tile of it is read twice */
    void *dmask; /* its gradient, of the same type; NULL: not wanted */
    int64_t dmask_batch, dmask_head, dmask_query, dmask_key;
    int32_t dmask_batches, dmask_heads; /* its sizes */
    bool dmask_vectors;                 /* of 16 bytes along the keys can be stored */
    bool dmask_here;                    /* the main kernel stores it (bwd_sm90_ds.cuh), by the following map */
    CUtensorMap dmask_map;              /* dimensions (SK, SQ, H, B) */
    int32_t dmask_steps[2];
    float cap, cap_scale; /* CAP: scores are cap * tanh(cap_scale * q k), in units of log2 */
    const void *alibi;
    int64_t alibi_batch, alibi_head;
    bool alibi_f32;
    fa_sm90_dropout dropout;
    uint32_t first_head; /* of dropout */
} fa_bwd_mod;

typedef struct fa_bwd_sm90_params {
    CUtensorMap q_map, k_map, v_map, dout_map; /* dimensions (D, S, H, B) */
    int32_t q_steps[2], k_steps[2], v_steps[2], dout_steps[2]; /* per head and batch: 0 where the stride is 0 */
    fa_bwd_sm90_view out, dout, lse, dlse; /* bwd_pre; lse and dlse fp32, dlse.data may be NULL */
    fa_bwd_sm90_view dq, dk, dv;           /* data NULL: not wanted */
    float *row_lse, *row_delta; /* (B, HQ, q_blocks * BM): lse * log2 e, +inf where nothing is seen; delta */
    float *dq_sum;              /* (B, HQ, q_blocks, BM / 64, D / 8, 128, 4) fp32,
        as the accumulators lie in a warpgroup */
    uint32_t *turn;             /* (B, HQ, q_blocks): key blocks that have added to this block of dQ */
    uint32_t *wild;             /* (B, HQ, q_blocks): does Q or dO of this block hold NaN or infinity? NULL where no
        pair is hidden (bwd_sm90_wild.cuh) */
    fa_bwd_sm90_view q, k, v;
    int32_t B, HQ, HK, group, SQ, SK, D, DV;
    int32_t q_blocks, k_blocks, BM, BN;
    int32_t order, ring, heads_together; /* key blocks in a ring; heads whose thread blocks start in turn */
    int32_t lo_shift, hi_shift;
    float scale, scale_log2; /* scale, scale * log2 e */
    fa_bwd_mod mod;
} fa_bwd_sm90_params;

#endif
