/* The family for few query rows: what it can run, its plans, and the launches of a call. */
#include "decode.cuh"

#define ENTRY(type, dim)                                                                                               \
    {                                                                                                                  \
        "fa_decode_smxx_" #type "_hd" #dim, fa_decode_smxx_##type##_hd##dim, fa_decode_shape_##type##_hd##dim          \
    }
#define ENTRIES(type)                                                                                                  \
    {                                                                                                                  \
        ENTRY(type, 64), ENTRY(type, 128), ENTRY(type, 256)                                                            \
    }

static const struct entry {
    const char *name;
    fa_decode_launch *launch;
    fa_decode_shape_of *shape;
} ENTRIES[3][3] = {ENTRIES(f32), ENTRIES(bf16), ENTRIES(f16)}; /* the first of fa_dtype */

static const entry *entry_of(const fa_args *a)
{
    const int64_t d = fa_max64(a->q.size[3], a->v.size[3]);
    return &ENTRIES[a->q.dtype][d <= 64 ? 0 : d <= 128 ? 1 : 2];
}

static bool kernel_at(int i, fa_kernel_info *info)
{
    if (i >= 9)
        return false;
    info->name = ENTRIES[i / 3][i % 3].name;
    info->dtype = (fa_dtype)(i / 3);
    info->op = "decode";
    return true;
}

/* Query rows of a key head are few: tiles of 16 of them read the keys one after the other, from the second on from the
 * cache. In other calls than those of caches a tile of one head's queries serves better from 17 queries on. */
static bool can(const fa_args *a, int device)
{
    enum { ROWS_MOST = 64, QUERIES_MOST = 16 };
    const int64_t rows = fa_group(a) * a->q.size[2], queries = a->by_sequence ? ROWS_MOST : QUERIES_MOST;
    if (a->q.dtype == FA_F64 || a->cu_q.data || a->cu_k.data || a->dropout_p > 0)
        return false;
    if (a->q.size[3] > 256 || a->v.size[3] > 256 || rows > ROWS_MOST || a->q.size[2] > queries)
        return false;
    return entry_of(a)->shape(a).shared <= fa_cuda_shared_limit(device);
}

/* ---- how keys are cut -----------------------------------------------------------------------------------------------
 * By the shape alone, so that results are the same on every GPU; by that of one sequence where it counts as alone. */

enum {
    BLOCKS = 264,    /* two for each multiprocessor of a large GPU */
    BLOCKS_RUN = 2048, /* where there are more, a block takes several parts: eight waves keep them all busy */
    KEYS_LEAST = 128,
    PARTS_MOST = 128,
};

static int64_t room_for_keys(const fa_args *a)
{
    const int64_t sk = a->page_size ? a->block_table.size[1] * a->page_size : a->k.size[2];
    if (a->window_left < 0 || a->window_right < 0)
        return sk;
    const int64_t seen = fa_min64(a->window_left, sk) + fa_min64(a->window_right, sk) + a->q.size[2];
    return fa_min64(sk, seen + FA_DECODE_STEP);
}

static fa_decode_params params_of(const fa_args *a)
{
    fa_decode_params p = {};
    p.a = *a;
    p.group = (int)fa_group(a);
    p.rows = (int)(p.group * a->q.size[2]);
    p.tiles = (int)fa_max64(1, fa_ceil_div(p.rows, FA_DECODE_ROWS));
    p.q_vectors = fa_rows_are_vectors(&a->q);
    p.k_vectors = fa_rows_are_vectors(&a->k) && fa_rows_are_vectors(&a->v);
    const int64_t alone = fa_max64(1, p.tiles * a->k.size[1] * (a->by_sequence ? 1 : a->q.size[0]));
    const int64_t wanted = fa_min64(fa_ceil_div(BLOCKS, alone), PARTS_MOST), keys = fa_max64(room_for_keys(a), 1);
    p.parts_wanted = (int)(a->splits_wanted > 0 ? fa_min64(a->splits_wanted, FA_MAX_SEQ) : wanted);
    p.least = a->splits_wanted > 0 ? (int)FA_DECODE_STEP : (int)KEYS_LEAST;
    p.parts = (int)fa_min64(p.parts_wanted, fa_ceil_div(keys, p.least));
    const int64_t blocks = p.tiles * a->k.size[1] * a->q.size[0] * p.parts;
    p.run = (int)fa_max64(1, fa_min64(p.parts, blocks / BLOCKS_RUN));
    return p;
}

/* floats in the workspace: two to a row and part, then its values */
static int64_t sums_of(const fa_decode_params &p)
{
    return p.parts > 1 ? 2 * p.parts * p.a.q.size[0] * p.a.q.size[1] * p.a.q.size[2] : 0;
}

static int64_t blocks_of(const fa_decode_params &p)
{
    return p.a.q.size[2] == 0 ? 0 : p.tiles * p.a.k.size[1] * p.a.q.size[0] * fa_ceil_div(p.parts, p.run);
}

static void plan_forward(const fa_args *a, int device, fa_plan *plan)
{
    (void)device;
    const fa_decode_params p = params_of(a);
    const fa_decode_shape shape = entry_of(a)->shape(a);
    plan->kernel = entry_of(a)->name;
    plan->block_rows = FA_DECODE_ROWS;
    plan->block_keys = FA_DECODE_STEP;
    plan->panels = p.tiles;
    plan->splits = p.parts;
    plan->split_keys = fa_round_up(fa_max64(fa_ceil_div(room_for_keys(a), p.parts), p.least), FA_DECODE_STEP);
    plan->tasks = blocks_of(p);
    plan->threads = shape.threads;
    plan->thread_bytes = shape.shared;
    plan->shared_bytes = (size_t)(sums_of(p) / 2 * fa_partial_floats(a->v.size[3])) * 4;
    plan->why = "few query rows: those of a key head in one tile of mma.sync, K and V streamed once by cp.async";
    plan->why_splits = a->splits_wanted > 0 ? "as asked for"
                       : p.parts > 1        ? "at most; a sequence's parts follow from its own length"
                                            : "the keys stay whole";
}

static fa_status launch_forward(const fa_args *a, const fa_plan *plan, void *workspace, cudaStream_t stream,
                                fa_error *err)
{
    fa_decode_params p = params_of(a);
    p.sums = (float *)workspace;
    p.values = p.sums + sums_of(p);
    fa_status status = entry_of(a)->launch(plan->kernel, p, blocks_of(p), stream, err);
    if (!status && p.parts > 1 && blocks_of(p) > 0)
        status = fa_decode_merge_launch(p, stream, err);
    return status;
}

extern "C" const fa_cuda_family fa_fwd_decode = {"decode", fa_runs_on_sm80, kernel_at, can, plan_forward,
                                                 launch_forward};
