/* The family for few query rows: what it can run, its plans, and the launches of a call. */
#include "decode.cuh"

#define ENTRY(name) {"fa_decode_smxx_" #name, fa_decode_smxx_##name, fa_decode_shape_##name},

/* dtypes, each with its dimensions, then the same of quantised keys */
static const int DTYPES = 3, DIMS = 3, KINDS = 2;

static const struct entry {
    const char *name;
    fa_decode_launch *launch;
    fa_decode_shape_of *shape;
} ENTRIES[DTYPES * KINDS * DIMS] = {FA_DECODE_NAMES(ENTRY)};

static const entry *entry_of(const fa_args *a)
{
    const int64_t d = fa_max64(a->q.size[3], a->v.size[3]);
    const int dim = d <= 64 ? 0 : d <= 128 ? 1 : 2, kind = fa_is_quantised(a->k.dtype);
    return &ENTRIES[(a->q.dtype * KINDS + kind) * DIMS + dim]; /* f32, bf16, f16: the first of fa_dtype */
}

static bool kernel_at(int i, fa_kernel_info *info)
{
    if (i >= DTYPES * KINDS * DIMS)
        return false;
    info->name = ENTRIES[i].name;
    info->dtype = (fa_dtype)(i / (KINDS * DIMS));
    info->op = "decode";
    return true;
}

/* keys that a sequence can have */
static int64_t room_for_keys(const fa_args *a)
{
    return a->page_size ? a->block_table.size[1] * a->page_size : a->k.size[2];
}

/* Query rows of a key head are few: tiles of 16 of them read the keys one after the other, from the second on from the
 * cache. In other calls than those of caches a tile of one head's queries serves better from 17 queries on. */
static bool can(const fa_args *a, int device)
{
    enum { ROWS_MOST = 64, QUERIES_MOST = 16, GRID_MOST = 65535 };
    const int64_t rows = fa_group(a) * a->q.size[2], queries = a->by_sequence ? ROWS_MOST : QUERIES_MOST;
    if (a->q.dtype == FA_F64 || a->cu_q.data || a->cu_k.data || a->dropout_p > 0)
        return false;
    if (a->q.size[3] > 256 || a->v.size[3] > 256 || rows > ROWS_MOST || a->q.size[2] > queries)
        return false;
    if (a->q.size[0] > GRID_MOST || a->q.size[1] > GRID_MOST || room_for_keys(a) > FA_DECODE_KEYS_MOST ||
        a->page_size > FA_DECODE_KEYS_MOST || a->k.size[0] > INT32_MAX)
        return false;
    return entry_of(a)->shape().shared <= fa_cuda_shared_limit(device);
}

/* ---- how keys are cut -----------------------------------------------------------------------------------------------
 * By the shape alone, so that results are the same on every GPU; by that of one sequence where it counts as alone. */

enum {
    BLOCKS = 128,      /* one for each multiprocessor of a large GPU; */
    BLOCKS_QUANTISED = 256, /* two where keys are widened: more warps hide it */
    KEYS_LEAST = 128,  /* of a part */
    KEYS_RUN = 2048,   /* of a block at most, where parts are smaller */
    PARTS_MOST = 128,
    SPLITS_MOST = 65535, /* by hand */
    CACHE_BYTES = 32 << 20,
};

static fa_decode_tensor tensor_of(const fa_tensor *t)
{
    const int64_t size = (int64_t)fa_dtype_size(t->dtype);
    return {(char *)t->data, t->stride[0] * size, t->stride[1] * size, t->stride[2] * size};
}

static int side_of(int64_t window)
{
    return window < 0 ? (int)FA_DECODE_UNBOUNDED : (int)fa_min64(window, FA_DECODE_UNBOUNDED);
}

static void describe_keys(const fa_args *a, fa_decode_params *p)
{
    p->k = tensor_of(&a->k);
    p->v = tensor_of(&a->v);
    p->lengths = a->kv_seqlens.data;
    p->lengths_wide = a->kv_seqlens.dtype == FA_I64;
    p->length_step = a->kv_seqlens.stride[0];
    p->table = a->block_table.data;
    p->table_wide = a->block_table.dtype == FA_I64;
    p->table_step = a->block_table.stride[0];
    p->table_page_step = a->block_table.stride[1];
    p->page_size = (int)a->page_size;
    while (p->page_size >> p->page_shift > 1)
        p->page_shift++;
    p->pages = (int)a->k.size[0];
    p->room = (int)room_for_keys(a);
    p->appended = (int)fa_min64(a->kv_appended, p->room);
    p->k_vectors = fa_rows_are_vectors(&a->k) && fa_rows_are_vectors(&a->v);
    const bool whole_tiles = p->page_size >= FA_DECODE_KEYS && p->page_size == 1 << p->page_shift;
    p->regular = p->k_vectors && (!p->table || whole_tiles);
}

/* keys that the queries of a sequence see at most, from a multiple of the step on */
static int64_t keys_seen(const fa_decode_params &p)
{
    const int64_t window = (int64_t)p.left + p.right + p.queries + FA_DECODE_STEP;
    return fa_max64(1, fa_min64(p.room, window));
}

/* keys of a part of the longest sequence */
static int64_t longest_part(const fa_decode_params &p)
{
    return fa_round_up(fa_max64(fa_ceil_div(keys_seen(p), p.parts_wanted), p.least), FA_DECODE_STEP);
}

static void cut_keys(const fa_args *a, fa_decode_params *p)
{
    const int64_t keys = keys_seen(*p), sequences = a->q.size[0];
    const int64_t alone = fa_max64(1, (int64_t)p->tiles * p->heads * (a->by_sequence ? 1 : sequences));
    const int64_t blocks = fa_is_quantised(a->k.dtype) ? BLOCKS_QUANTISED : BLOCKS;
    const int64_t wanted = fa_min64(fa_ceil_div(blocks, alone), PARTS_MOST);
    p->parts_wanted = (int)(a->splits_wanted > 0 ? fa_min64(a->splits_wanted, SPLITS_MOST) : wanted);
    p->least = a->splits_wanted > 0 ? (int)FA_DECODE_STEP : (int)KEYS_LEAST;
    p->parts = (int)fa_min64(p->parts_wanted, fa_ceil_div(keys, p->least));
    p->keys_wanted = (int)fa_min64(KEYS_RUN, p->tiles * p->heads * sequences * keys / blocks);
    p->runs = (int)fa_ceil_div(p->parts, fa_decode_run(p->keys_wanted, (int)longest_part(*p)));
    const int64_t row_bytes = (p->d + p->dv) * (int64_t)fa_dtype_size(a->k.dtype);
    p->once = p->tiles == 1 && sequences * p->heads * keys * row_bytes > CACHE_BYTES;
}

static fa_decode_params params_of(const fa_args *a)
{
    fa_decode_params p = {};
    p.a = *a;
    p.q = tensor_of(&a->q);
    p.q_vectors = fa_rows_are_vectors(&a->q);
    p.queries = (int)a->q.size[2];
    p.heads = (int)a->k.size[1];
    p.group = (int)fa_group(a);
    p.rows = p.group * p.queries;
    p.tiles = (int)fa_max64(1, fa_ceil_div(p.rows, FA_DECODE_ROWS));
    p.d = (int)a->q.size[3];
    p.dv = (int)a->v.size[3];
    p.left = side_of(a->window_left);
    p.right = side_of(a->window_right);
    p.float8 = a->k.dtype == FA_F8E4M3;
    p.bottom_right = a->bottom_right;
    p.scale = (float)(a->softcap > 0 ? a->scale / a->softcap : a->scale * 1.4426950408889634);
    describe_keys(a, &p);
    cut_keys(a, &p);
    return p;
}

static int64_t blocks_of(const fa_decode_params &p)
{
    return (int64_t)p.rows * p.a.q.size[0] == 0 ? 0 : (int64_t)p.tiles * p.heads * p.runs * p.a.q.size[0];
}

/* floats in the workspace: two to a row and part, then its values, rounded up to vectors */
static int64_t parts_of(const fa_decode_params &p)
{
    return p.parts > 1 ? p.parts * p.a.q.size[0] * p.a.q.size[1] * p.queries : 0;
}

static void plan_forward(const fa_args *a, int device, fa_plan *plan)
{
    (void)device;
    const fa_decode_params p = params_of(a);
    const fa_decode_shape shape = entry_of(a)->shape();
    plan->kernel = entry_of(a)->name;
    plan->block_rows = FA_DECODE_ROWS;
    plan->block_keys = FA_DECODE_STEP;
    plan->panels = p.tiles;
    plan->splits = p.parts;
    plan->split_keys = longest_part(p);
    plan->tasks = blocks_of(p);
    plan->stages = shape.stages;
    plan->threads = shape.threads;
    plan->thread_bytes = shape.shared;
    plan->shared_bytes = (size_t)(fa_round_up(2 * parts_of(p), 4) + parts_of(p) * fa_round_up(p.dv, 4)) * 4;
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
    p.values = p.sums + fa_round_up(2 * parts_of(p), 4);
    if (blocks_of(p) == 0)
        return FA_OK;
    fa_status status = entry_of(a)->launch(plan->kernel, p, stream, err);
    if (!status && p.parts > 1)
        status = fa_decode_merge_launch(p, stream, err);
    return status;
}

extern "C" const fa_cuda_family fa_fwd_decode = {"decode", fa_runs_on_sm80, kernel_at, can, plan_forward,
                                                 launch_forward};
