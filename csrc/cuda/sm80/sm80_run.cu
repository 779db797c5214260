/* The families of sm_80: what they can run, their plans, and the launches of a call. */
#include "sm80.cuh"

static const int DIMS[] = {64, 128, 256, 512};

struct entry {
    const char *name;
    fa_sm80_launch *launch, *plain; /* plain: NULL where there is none */
};

#define ENTRY(family, pass, type, dp, plain)                                                                           \
    {"fa_" #family "_sm80_" #type "_hd" #dp, fa_##pass##_sm80_##type##_hd##dp, plain}
#define ENTRIES(family, pass, type, plain64, plain128, plain256)                                                       \
    {ENTRY(family, pass, type, 64, plain64), ENTRY(family, pass, type, 128, plain128),                                 \
     ENTRY(family, pass, type, 256, plain256), ENTRY(family, pass, type, 512, NULL)}
#define PLAIN_TO_128(family, pass, type)                                                                               \
    ENTRIES(family, pass, type, fa_##pass##_sm80_##type##_hd64_plain, fa_##pass##_sm80_##type##_hd128_plain, NULL)
#define PLAIN_TO_256(family, pass, type)                                                                               \
    ENTRIES(family, pass, type, fa_##pass##_sm80_##type##_hd64_plain, fa_##pass##_sm80_##type##_hd128_plain,           \
            fa_##pass##_sm80_##type##_hd256_plain)
#define NO_PLAIN(family, pass, type) ENTRIES(family, pass, type, NULL, NULL, NULL)

/* by dtype, f32, bf16, f16: the first of fa_dtype; then f32 whose products are tf32 */
typedef entry table[4][4];
static const table FORWARD = {PLAIN_TO_128(fwd, fwd, f32), PLAIN_TO_256(fwd, fwd, bf16), PLAIN_TO_256(fwd, fwd, f16),
                              PLAIN_TO_128(fwd, fwd, tf32)};
static const table DKV = {PLAIN_TO_128(bwd, dkv, f32), PLAIN_TO_128(bwd, dkv, bf16), PLAIN_TO_128(bwd, dkv, f16),
                          PLAIN_TO_128(bwd, dkv, tf32)};
static const table DQ = {PLAIN_TO_128(bwd, dq, f32), PLAIN_TO_128(bwd, dq, bf16), PLAIN_TO_128(bwd, dq, f16),
                         PLAIN_TO_128(bwd, dq, tf32)};
static const table DMASK = {NO_PLAIN(bwd, dmask, f32), NO_PLAIN(bwd, dmask, bf16), NO_PLAIN(bwd, dmask, f16),
                            NO_PLAIN(bwd, dmask, tf32)};

static const entry *entry_of(const table &t, const fa_args *a)
{
    return &t[a->q.dtype == FA_F32 && a->allow_tf32 ? 3 : a->q.dtype][fa_sm80_dim(a)];
}

static fa_status start(const table &t, const fa_sm80_params &p, int64_t blocks, cudaStream_t stream, fa_error *err)
{
    const entry *e = entry_of(t, &p.a);
    fa_sm80_launch *launch = e->plain && !fa_sm80_is_mod(&p.a) ? e->plain : e->launch;
    return launch(e->name, p, blocks, stream, err);
}

bool fa_runs_on_sm80(int major)
{
    return major >= 8;
}

static bool kernel_of(const table &t, int i, fa_kernel_info *info)
{
    if (i >= 16)
        return false;
    info->name = t[i / 4][i % 4].name;
    info->dtype = (fa_dtype)(i / 4 % 3);
    return true;
}

enum pass { FORWARD_PASS, KEYS_PASS, QUERIES_PASS };

static fa_sm80_tile tile_of(const fa_args *a, pass x)
{
    const int dp = DIMS[fa_sm80_dim(a)];
    const bool f32 = a->q.dtype == FA_F32;
    return x == FORWARD_PASS ? fa_fwd_tile(dp, f32, fa_sm80_is_mod(a)) : fa_bwd_tile(dp, f32, x == KEYS_PASS);
}

static size_t mask_bytes(const fa_args *a, pass x)
{
    const fa_tensor *m = a->tree_mask.data ? &a->tree_mask : &a->mask;
    return m->data && x != KEYS_PASS ? fa_mask_bytes(tile_of(a, x), fa_dtype_size(m->dtype)) : 0;
}

static size_t shared_of(const fa_args *a, pass x)
{
    const size_t esize = fa_dtype_size(a->q.dtype);
    const fa_sm80_tile t = tile_of(a, x);
    return (x == FORWARD_PASS ? fa_fwd_bytes(t, esize) : fa_bwd_bytes(t, esize)) + mask_bytes(a, x);
}

static bool fits(const fa_args *a, int device, pass x)
{
    return a->q.dtype != FA_F64 && shared_of(a, x) <= fa_cuda_shared_limit(device);
}

/* Columns of the mask where a lane's part of a row can be read in vectors; else 0 */
static int mask_width(const fa_args *a, pass x)
{
    const fa_tensor *m = &a->mask;
    if (!m->data || a->tree_mask.data || a->mask_first || m->stride[3] != 1 || m->size[3] == 1)
        return 0;
    const int64_t size = (int64_t)fa_dtype_size(m->dtype), word = fa_min64(16, tile_of(a, x).cols / 4 * size);
    bool fits = (uintptr_t)m->data % word == 0;
    for (int i = 0; i < 3; i++)
        fits = fits && (m->size[i] == 1 || m->stride[i] * size % word == 0);
    return fits ? (int)m->size[3] : 0;
}

static fa_sm80_params params_of(const fa_args *a, pass x)
{
    fa_sm80_params p = {};
    p.a = *a;
    p.vectors = fa_sm80_vectors(a, tile_of(a, x).cols);
    p.mask_width = mask_width(a, x);
    p.mask_bytes = mask_bytes(a, x);
    p.keep = (float)fa_dropout_factor(a->dropout_p);
    return p;
}

static void plan_tiles(const fa_args *a, pass x, fa_plan *p)
{
    const fa_sm80_tile t = tile_of(a, x);
    p->block_rows = fa_tile_rows(t);
    p->block_keys = t.cols;
    p->panels = fa_ceil_div(a->q.size[2], p->block_rows);
    p->stages = x == FORWARD_PASS ? 1 : fa_bwd_stages(t.dp, fa_dtype_size(a->q.dtype));
    p->threads = 32 * t.warps;
    p->thread_bytes = shared_of(a, x);
}

/* ---- forward ----------------------------------------------------------------------------------------------------- */

static bool can_forward(const fa_args *a, int device)
{
    return fits(a, device, FORWARD_PASS);
}

/* Keys are split where the tiles leave most of a GPU idle; by the shape alone, so that results are the same on every
 * GPU. A sequence that is planned alone has parts of one size, whatever room lies behind its keys: parts without a key
 * change no bit. */
static void plan_splits(const fa_args *a, int64_t blocks, fa_plan *p)
{
    enum { BLOCKS = 264, KEYS_LEAST = 256, KEYS_ALONE = 512 };
    const int64_t sk = a->page_size ? a->block_table.size[1] * a->page_size : a->k.size[2];
    const int64_t alone = a->by_sequence ? blocks / fa_max64(a->q.size[0], 1) : blocks;
    int64_t keys = fa_max64(sk, 1);
    if (a->splits_wanted > 0)
        keys = fa_ceil_div(keys, a->splits_wanted);
    else if (a->by_sequence && !a->cu_q.data && 2 * alone <= BLOCKS)
        keys = KEYS_ALONE;
    else if (!a->by_sequence && alone > 0)
        keys = fa_ceil_div(keys, fa_max64(1, fa_min64(BLOCKS / alone, sk / KEYS_LEAST)));
    p->split_keys = fa_round_up(keys, p->block_keys);
    p->splits = fa_max64(1, fa_ceil_div(sk, p->split_keys));
    if (a->splits_wanted > 0) /* the kernel cuts each sequence by its own length */
        p->splits = fa_max64(1, fa_min64(a->splits_wanted, fa_ceil_div(sk, p->block_keys)));
}

static void plan_forward(const fa_args *a, int device, fa_plan *p)
{
    (void)device;
    p->kernel = entry_of(FORWARD, a)->name;
    plan_tiles(a, FORWARD_PASS, p);
    int64_t blocks = fa_tile_slots(&a->cu_q, a->q.size[0], a->q.size[2], p->block_rows) * a->q.size[1];
    plan_splits(a, blocks, p);
    p->tasks = blocks * p->splits;
    if (p->splits > 1)
        p->shared_bytes = (size_t)(p->splits * a->q.size[0] * a->q.size[1] * a->q.size[2] *
                                   fa_partial_floats(a->v.size[3])) * 4;
    p->why = "tensor cores by mma.sync, a tile of queries to a block, K and V streamed";
    p->why_splits = p->splits > 1 ? "too few tiles to fill a GPU: the keys are split" : "the keys stay whole";
}

static fa_status launch_forward(const fa_args *a, const fa_plan *plan, void *workspace, cudaStream_t stream,
                                fa_error *err)
{
    fa_sm80_params p = params_of(a, FORWARD_PASS);
    p.slots = fa_tile_slots(&a->cu_q, a->q.size[0], a->q.size[2], plan->block_rows);
    p.splits = plan->splits;
    p.split_keys = plan->split_keys;
    p.partial = (float *)workspace;
    fa_status status = start(FORWARD, p, plan->tasks, stream, err);
    if (!status && plan->splits > 1)
        status = fa_combine_launch(a, plan, (const float *)workspace, stream, err);
    return status;
}

static bool forward_kernel(int i, fa_kernel_info *info)
{
    return kernel_of(FORWARD, i, info);
}

extern "C" const fa_cuda_family fa_fwd_sm80 = {"sm80", fa_runs_on_sm80, forward_kernel, can_forward,
                                               plan_forward, launch_forward};

/* ---- backward ---------------------------------------------------------------------------------------------------- */

static bool can_backward(const fa_args *a, int device)
{
    return fits(a, device, KEYS_PASS) && fits(a, device, QUERIES_PASS);
}

static void plan_backward(const fa_args *a, int device, fa_plan *p)
{
    (void)device;
    p->kernel = entry_of(DKV, a)->name;
    plan_tiles(a, KEYS_PASS, p);
    p->splits = 1;
    p->split_keys = a->k.size[2];
    p->tasks = fa_tile_slots(&a->cu_k, a->k.size[0], a->k.size[2], p->block_rows) * a->k.size[1];
    p->shared_bytes = fa_bwd_rows_bytes(a);
    p->why = "tensor cores by mma.sync; dK and dV by tiles of keys, then dQ by tiles of queries";
    p->why_splits = "no two blocks add to one element";
}

static fa_sm80_params backward_params(const fa_args *a, pass x, const fa_bwd_row_numbers *r)
{
    fa_sm80_params p = params_of(a, x);
    p.lse2 = (const float *)r->lse2;
    p.delta = (const float *)r->delta;
    p.rows = r->rows;
    return p;
}

fa_status fa_dmask_sm80_launch(const fa_args *a, const fa_bwd_row_numbers *r, cudaStream_t stream, fa_error *err)
{
    const fa_sm80_tile t = tile_of(a, QUERIES_PASS);
    const int64_t *m = a->mask.size;
    const int64_t blocks = m[0] * m[1] * fa_ceil_div(m[2], fa_tile_rows(t)) *
                           fa_ceil_div(m[3], FA_DMASK_TILES * t.cols);
    return start(DMASK, backward_params(a, QUERIES_PASS, r), blocks, stream, err);
}

static fa_status launch_backward(const fa_args *a, const fa_plan *plan, void *workspace, cudaStream_t stream,
                                 fa_error *err)
{
    const fa_bwd_row_numbers rows = fa_bwd_rows_in(a, workspace);
    fa_sm80_params p = backward_params(a, QUERIES_PASS, &rows);
    p.slots = fa_tile_slots(&a->cu_q, a->q.size[0], a->q.size[2], fa_tile_rows(tile_of(a, QUERIES_PASS)));
    fa_status status = fa_bwd_rows_launch(a, workspace, stream, err);
    if (!status && (a->dk.data || a->dv.data))
        status = start(DKV, backward_params(a, KEYS_PASS, &rows), plan->tasks, stream, err);
    if (!status && a->dq.data)
        status = start(DQ, p, p.slots * a->q.size[1], stream, err);
    if (!status && a->dmask.data)
        status = fa_dmask_sm80_launch(a, &rows, stream, err);
    if (!status && a->dsinks.data)
        status = fa_dsinks_launch(a, &rows, stream, err);
    return status;
}

static bool backward_kernel(int i, fa_kernel_info *info)
{
    return kernel_of(DKV, i, info);
}

extern "C" const fa_cuda_family fa_bwd_sm80 = {"sm80", fa_runs_on_sm80, backward_kernel, can_backward,
                                               plan_backward, launch_backward};
