/* Planning: pure functions on integers. What a target can do comes in; tiles, splits, scratch layout come out. */
#ifndef FA_PLAN_H
#define FA_PLAN_H

#include "../common/fa_mask.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What the planner must know of the kernels it plans for. */
typedef struct fa_target {
    const char *name;   /* kernel's name, for the report */
    fa_kernel_kind kind;
    int lanes;          /* fp32 lanes of a vector */
    int panel_rows;     /* BM */
    int key_block;      /* BN */
    bool pair_units;    /* operands are packed as pairs of bf16 */
} fa_target;

enum {
    FA_KEY_BLOCK = 96,       /* scores of a panel stay in the first-level cache; a multiple of the 6-row tile */
    FA_ROWS_KEY_BLOCK = 64,
    FA_ROWS_BYTES = 2048,    /* room for that kernel's record of a kv head */
    FA_ROWS_MAX = 32,        /* query rows of one kv head the rows kernel takes */
    FA_THREAD_BYTES_MAX = 2 << 20,
    FA_SCALAR_BLOCK = 64,
    FA_LANES_BYTES = 2048, /* room for the kernels' record of a panel's lanes */
};

FA_HD static inline int64_t fa_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FA_HD static inline int64_t fa_round_up(int64_t a, int64_t b) { return fa_ceil_div(a, b) * b; }
FA_HD static inline int64_t fa_min64(int64_t a, int64_t b) { return a < b ? a : b; }
FA_HD static inline int64_t fa_max64(int64_t a, int64_t b) { return a > b ? a : b; }

/* ---- panels (tiles.c) ------------------------------------------------------------------------------------------- */

/* The rows of the G = HQ / HK query heads that share a kv head, cut into panels of at most BM rows. Where a head has
 * fewer than BM queries, rows of several heads fill one panel; otherwise panel p holds queries of head p % G only, so
 * that neighbours in p see the same keys. */
typedef struct fa_panels {
    int64_t group;  /* G */
    int64_t sq;
    int64_t rows;   /* BM */
    bool packed;    /* panels hold rows of several heads */
    int64_t count;
} fa_panels;

/* query heads of a kv head; 1 where there are no heads at all */
static inline int64_t fa_group(const fa_args *a)
{
    return a->k.size[1] > 0 ? a->q.size[1] / a->k.size[1] : 1;
}

fa_panels fa_panels_of(const fa_args *a, int64_t panel_rows);
/* rows in panel p */
int64_t fa_panel_size(const fa_panels *p, int64_t panel);
/* head within the group and query of one row of a panel */
void fa_panel_row(const fa_panels *p, int64_t panel, int64_t row, int64_t *head, int64_t *query);
/* queries of which panel p holds rows */
fa_range fa_panel_queries(const fa_panels *p, int64_t panel);

/* ---- scratch of one worker (tiles.c): offsets in bytes, each 64-byte aligned ------------------------------------- */

typedef struct fa_fwd_scratch {
    size_t panel;       /* first of chunk_panels records of panel_bytes each, at these offsets inside: */
    size_t panel_bytes;
    size_t info, q_t, out, max, sum;
    size_t scores;      /* S, then P: [BN][BM] fp32 */
    size_t pairs;       /* P as pairs of bf16 */
    size_t bias;        /* mask of the block: [BN][BM] fp32 */
    size_t rescale;     /* [BM] */
    size_t k, v;        /* a block of K and V, converted or padded */
    size_t k_stage, v_stage; /* a block of K and V gathered from pages, or stored values in the query's dtype */
    size_t k_scale, v_scale; /* [BN] of quantised keys and values */
    size_t bytes;
} fa_fwd_scratch;

fa_fwd_scratch fa_fwd_scratch_of(const fa_args *a, const fa_target *t, int64_t chunk_panels);

typedef struct fa_rows_scratch {
    size_t info, q, out, max, sum; /* of each kv head of a task */
    size_t scores;
    size_t bytes;
} fa_rows_scratch;

fa_rows_scratch fa_rows_scratch_of(const fa_args *a, const fa_target *t, int64_t heads);

typedef struct fa_bwd_scratch {
    size_t info, q_t, q_n, do_t, do_n, lse2, delta;      /* the panel */
    size_t scores, grads, bias, capped, s_pairs, g_pairs; /* [BN][BM] */
    size_t k, v, k_n, dk, dv;                             /* the key block */
    size_t dq;                                            /* [BM][d_pad], where rows of dQ are no whole vectors */
    size_t sum;                                           /* gradient of a tile of the mask */
    size_t bytes;
} fa_bwd_scratch;

fa_bwd_scratch fa_bwd_scratch_of(const fa_args *a, const fa_target *t);

/* What all workers of a backward share: per query row the log-sum-exp in units of log2 (+inf for a row that sees
 * nothing) and rowsum(dO * O) - dLSE; per panel whose turn it is to add to dQ; dQ in fp32 unless the tensor itself can
 * hold it. */
typedef struct fa_bwd_shared {
    size_t lse2, delta, turn, dq;
    bool dq_direct;
    size_t bytes;
} fa_bwd_shared;

fa_bwd_shared fa_bwd_shared_of(const fa_args *a, const fa_target *t);

/* ---- plans ------------------------------------------------------------------------------------------------------ */

/* How many parts the keys are cut into so that a few rows against many keys still fill a machine; from the shape alone,
 * so that results do not depend on the number of threads (split_kv.c). units: tasks without a split; least: keys of a
 * part. */
int64_t fa_split_keys(const fa_args *a, int64_t units, int64_t least, int64_t key_block, int64_t *splits);

/* Partial result of one query row over one part of the keys: maximum, sum, then DV weighted values (fp32). */
FA_HD static inline int64_t fa_partial_floats(int64_t dv) { return 2 + dv; }

/* Threads and workspace of a plan whose tasks, work and scratch are known. */
void fa_plan_finish(fa_plan *plan, int num_threads);
void fa_plan_forward_on(const fa_args *a, const fa_target *t, int num_threads, fa_plan *plan);
void fa_plan_backward_on(const fa_args *a, const fa_target *t, int num_threads, fa_plan *plan);

/* flops and bytes of a call, for the report and for the number of threads */
void fa_plan_work(const fa_args *a, bool backward, fa_plan *plan);

/* fp32 words of one value row, padded to whole vectors */
static inline int64_t fa_padded(int64_t d, int lanes) { return fa_round_up(d, lanes); }

#ifdef __cplusplus
}
#endif
#endif
