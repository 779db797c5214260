/* Host side of the Hopper backward kernel: which calls it takes, which instance runs them, tensor maps, launches. */
#include "bwd_sm90.h"

#include <cuda_runtime.h>

#include "../cuda.h"

/* X(head dimensions), the narrowest first. */
#define FA_BWD_SM90_DIMS(X) X(hd64) X(hd128) X(hd192_dv128) X(hd256)

/* Those for one option alone; the widest has none. */
#define FA_ALONE_SM90_DIMS(X) X(hd64) X(hd128) X(hd192_dv128)

enum { FA_BWD_DIMS = 4, FA_ALONE_DIMS = 3 };

#define FA_DECLARE(dims)                                                                                               \
    extern "C" const fa_sm90_instance fa_bwd_sm90_bf16_##dims, fa_bwd_sm90_f16_##dims, fa_bwd_sm90_bf16_##dims##_mod,  \
        fa_bwd_sm90_f16_##dims##_mod, fa_dmask_sm90_bf16_##dims, fa_dmask_sm90_f16_##dims;
FA_BWD_SM90_DIMS(FA_DECLARE)

#define FA_DECLARE_ALONE(dims)                                                                                         \
    extern "C" const fa_sm90_instance fa_bwd_sm90_bf16_##dims##_tiled, fa_bwd_sm90_f16_##dims##_tiled,                 \
        fa_bwd_sm90_bf16_##dims##_bits, fa_bwd_sm90_f16_##dims##_bits, fa_bwd_sm90_bf16_##dims##_dropout,              \
        fa_bwd_sm90_f16_##dims##_dropout;
FA_ALONE_SM90_DIMS(FA_DECLARE_ALONE)

#define FA_BF16_PLAIN(dims) &fa_bwd_sm90_bf16_##dims,
#define FA_F16_PLAIN(dims) &fa_bwd_sm90_f16_##dims,
#define FA_BF16_MOD(dims) &fa_bwd_sm90_bf16_##dims##_mod,
#define FA_F16_MOD(dims) &fa_bwd_sm90_f16_##dims##_mod,
#define FA_BF16_DMASK(dims) &fa_dmask_sm90_bf16_##dims,
#define FA_F16_DMASK(dims) &fa_dmask_sm90_f16_##dims,
#define FA_BF16_TILED(dims) &fa_bwd_sm90_bf16_##dims##_tiled,
#define FA_F16_TILED(dims) &fa_bwd_sm90_f16_##dims##_tiled,
#define FA_BF16_BITS(dims) &fa_bwd_sm90_bf16_##dims##_bits,
#define FA_F16_BITS(dims) &fa_bwd_sm90_f16_##dims##_bits,
#define FA_BF16_DROPOUT(dims) &fa_bwd_sm90_bf16_##dims##_dropout,
#define FA_F16_DROPOUT(dims) &fa_bwd_sm90_f16_##dims##_dropout,

enum { FA_KIND_PLAIN, FA_KIND_MOD, FA_KIND_DMASK, FA_KINDS };
enum { FA_ALONE_TILED, FA_ALONE_BITS, FA_ALONE_DROPOUT, FA_ALONE_KINDS };

static const fa_sm90_instance *const INSTANCES[FA_KINDS][2][FA_BWD_DIMS] = {
    {{FA_BWD_SM90_DIMS(FA_BF16_PLAIN)}, {FA_BWD_SM90_DIMS(FA_F16_PLAIN)}},
    {{FA_BWD_SM90_DIMS(FA_BF16_MOD)}, {FA_BWD_SM90_DIMS(FA_F16_MOD)}},
    {{FA_BWD_SM90_DIMS(FA_BF16_DMASK)}, {FA_BWD_SM90_DIMS(FA_F16_DMASK)}},
};
static const fa_sm90_instance *const ALONE[FA_ALONE_KINDS][2][FA_ALONE_DIMS] = {
    {{FA_ALONE_SM90_DIMS(FA_BF16_TILED)}, {FA_ALONE_SM90_DIMS(FA_F16_TILED)}},
    {{FA_ALONE_SM90_DIMS(FA_BF16_BITS)}, {FA_ALONE_SM90_DIMS(FA_F16_BITS)}},
    {{FA_ALONE_SM90_DIMS(FA_BF16_DROPOUT)}, {FA_ALONE_SM90_DIMS(FA_F16_DROPOUT)}},
};

extern "C" const fa_sm90_instance *fa_bwd_sm90_instance_at(int i)
{
    const int n = FA_KINDS * 2 * FA_BWD_DIMS, alone = FA_ALONE_KINDS * 2 * FA_ALONE_DIMS;
    return i < n ? INSTANCES[0][0][i] : i < n + alone ? ALONE[0][0][i - n] : NULL;
}

/* ---- options, and the instance for them -------------------------------------------------------------------------- */

static bool is_broadcast(const fa_tensor *t, int dim)
{
    return t->size[dim] == 1 || t->stride[dim] == 0;
}

static bool is_packed(const fa_args *a)
{
    return a->cu_q.data != NULL;
}

static bool has_lengths(const fa_args *a)
{
    return is_packed(a) || a->q_seqlens.data || a->kv_seqlens.data;
}

/* Can tiles of the float mask be copied to shared memory? There they share their place with the weights that softcap
 * and dropout need (bwd_sm90_pair.cuh). */
static bool has_tiles(const fa_args *a, const fa_sm90_instance *f)
{
    const fa_tensor *m = &a->mask;
    int64_t width = m->dtype == FA_F32 ? 4 : 2, room = f->BN == 128 ? 32768 : f->D <= 192 ? 16384 : 0;
    bool ok = m->data && m->dtype != FA_BOOL && f->BM * f->BN * width <= room && (uintptr_t)m->data % 16 == 0 &&
              (f->BN == 64 || (a->softcap == 0 && a->dropout_p == 0));
    for (int i = 0; i < 3; i++)
        ok = ok && (m->size[i] <= 1 || (m->stride[i] >= 0 && m->stride[i] * width % 16 == 0 &&
                                        m->stride[i] < (int64_t)1 << 38));
    return ok && !is_broadcast(m, 2) && m->size[3] > 1 && m->stride[3] == 1;
}

/* f: any of the head dimensions. */
static int32_t options_of(const fa_args *a, const fa_sm90_instance *f)
{
    bool bits = a->mask.data && a->mask.dtype == FA_BOOL, bias = a->mask.data && !bits;
    return (has_lengths(a) ? FA_MOD_LENGTHS : 0) | (is_packed(a) ? FA_MOD_PACKED : 0) | (bits ? FA_MOD_BITS : 0) |
           (bias ? FA_MOD_BIAS : 0) | (has_tiles(a, f) ? FA_MOD_TILES : 0) | (a->softcap > 0 ? FA_MOD_CAP : 0) |
           (a->alibi.data ? FA_MOD_ALIBI : 0) | (a->dropout_p > 0 ? FA_MOD_DROPOUT : 0) |
           (fa_sm90_drops_often(a->dropout_p) ? FA_MOD_OFTEN : 0);
}

/* The narrowest that holds the head dimensions; its place among those of its kind. */
static int place_for(const fa_args *a)
{
    const fa_sm90_instance *const *f = INSTANCES[FA_KIND_MOD][0];
    for (int i = 0; i < FA_BWD_DIMS && (a->q.dtype == FA_BF16 || a->q.dtype == FA_F16); i++)
        if (a->q.size[3] <= f[i]->D && a->v.size[3] <= f[i]->DV)
            return i;
    return -1;
}

extern "C" const fa_sm90_instance *fa_bwd_sm90_choose(const fa_args *a)
{
    int i = place_for(a), half = a->q.dtype == FA_F16;
    if (i < 0)
        return NULL;
    int32_t options = options_of(a, INSTANCES[FA_KIND_MOD][half][i]);
    if (i < FA_ALONE_DIMS && options == FA_MOD_TILED)
        return ALONE[FA_ALONE_TILED][half][i];
    if (i < FA_ALONE_DIMS && options == FA_MOD_BITS)
        return ALONE[FA_ALONE_BITS][half][i];
    if (i < FA_ALONE_DIMS && options == FA_MOD_DROPOUT)
        return ALONE[FA_ALONE_DROPOUT][half][i];
    return INSTANCES[options ? FA_KIND_MOD : FA_KIND_PLAIN][half][i];
}

/* ---- what it can do ---------------------------------------------------------------------------------------------- */

static bool rows_of_16_bytes(const fa_tensor *t, int64_t least_stride)
{
    bool ok = t->stride[3] == 1 && (uintptr_t)t->data % 16 == 0 && t->size[3] % 8 == 0;
    for (int i = 0; i < 3; i++)
        ok = ok && (t->size[i] <= 1 || (t->stride[i] >= least_stride && t->stride[i] % 8 == 0 &&
                                        t->stride[i] < (int64_t)1 << 38));
    return ok;
}

static bool readable(const fa_tensor *t)
{
    return rows_of_16_bytes(t, 0) && (t->size[2] <= 1 || t->stride[2] > 0);
}

static bool writable(const fa_tensor *t)
{
    return !t->data || rows_of_16_bytes(t, 1);
}

/* Every block of 64 rows of every head has a number below 2^31. */
static bool countable(const fa_args *a)
{
    int64_t rows = a->q.size[2] > a->k.size[2] ? a->q.size[2] : a->k.size[2], heads = a->q.size[0] * a->q.size[1];
    int64_t sequences = a->cu_q.data ? a->cu_q.size[0] : 0;
    int64_t tiles = a->dmask.data ? (a->q.size[2] / 128 + 1) * (a->k.size[2] / 64 + 1) : 0;
    return heads <= INT32_MAX && heads * (rows / 64 + 2 + sequences) <= INT32_MAX && heads * tiles < INT32_MAX / 2;
}

extern "C" bool fa_bwd_sm90_can(const fa_args *a)
{
    bool inputs = readable(&a->q) && readable(&a->k) && readable(&a->v) && readable(&a->out) && readable(&a->dout);
    bool sequences = !a->by_sequence || (a->cu_q.data && a->cu_k.data && !a->mask.data);
    return fa_bwd_sm90_choose(a) && sequences && a->dropout_p < 1 && countable(a) && inputs && writable(&a->dq) &&
           writable(&a->dk) && writable(&a->dv);
}

/* ---- workspace --------------------------------------------------------------------------------------------------- */

typedef struct workspace_parts {
    size_t dq_sum, row_lse, row_delta, turn, wild, maps, firsts, rows, bits, end; /* offsets in bytes */
} workspace_parts;

static size_t align_256(size_t bytes)
{
    return (bytes + 255) / 256 * 256;
}

static int64_t blocks_of(int64_t rows, int block)
{
    return (rows + block - 1) / block;
}

/* Words of a bool mask along each dimension (bwd_sm90_params.h). One key takes two, for copies of 16 bytes. */
static void words_of(const fa_args *a, const fa_sm90_instance *f, int64_t (&words)[4])
{
    const fa_tensor *m = &a->mask;
    words[0] = is_broadcast(m, 0) ? 1 : m->size[0];
    words[1] = is_broadcast(m, 1) ? 1 : m->size[1];
    words[2] = is_broadcast(m, 2) ? 1 : blocks_of(m->size[2], f->BM) * (f->BM / 64);
    words[3] = is_broadcast(m, 3) ? 2 : blocks_of(m->size[3], f->BN) * f->BN;
}

/* Blocks of `size` rows of a head; those of packed sequences as bwd_sm90_params.h has them. */
static int64_t numbers_of(const fa_args *a, const fa_tensor *cu, int64_t rows, int size)
{
    return is_packed(a) ? rows / size + cu->size[0] : blocks_of(rows, size);
}

static int64_t batches_of(const fa_args *a)
{
    return is_packed(a) ? a->cu_q.size[0] : a->q.size[0];
}

static workspace_parts parts_of(const fa_args *a, const fa_sm90_instance *f)
{
    size_t blocks = (size_t)(a->q.size[0] * a->q.size[1] * numbers_of(a, &a->cu_q, a->q.size[2], f->BM));
    size_t rows = blocks * f->BM, batches = (size_t)batches_of(a);
    bool bits = a->mask.data && a->mask.dtype == FA_BOOL;
    int64_t words[4];
    words_of(a, f, words);
    workspace_parts w = {};
    w.row_lse = w.dq_sum + align_256(rows * f->D * sizeof(float));
    w.row_delta = w.row_lse + align_256(rows * sizeof(float));
    w.turn = w.row_delta + align_256(rows * sizeof(float));
    w.wild = w.turn + align_256(blocks * sizeof(uint32_t));
    w.maps = w.wild + align_256(blocks * sizeof(uint32_t));
    w.firsts = w.maps + (has_lengths(a) ? align_256(batches * FA_MAPS * sizeof(CUtensorMap)) : 0);
    w.rows = w.firsts + (is_packed(a) ? align_256(2 * (batches + 1) * sizeof(int32_t)) : 0);
    w.bits = w.rows + (is_packed(a) && a->dsinks.data ? align_256(fa_bwd_rows_bytes(a)) : 0);
    w.end = w.bits + (bits ? align_256((size_t)(words[0] * words[1] * words[2] * words[3]) * sizeof(uint64_t)) : 0);
    return w;
}

extern "C" size_t fa_bwd_sm90_workspace(const fa_args *a)
{
    return parts_of(a, fa_bwd_sm90_choose(a)).end;
}

/* ---- what the kernels are handed --------------------------------------------------------------------------------- */

static fa_bwd_sm90_view view_of(const fa_tensor *t)
{
    fa_bwd_sm90_view v = {t->data, t->stride[0], t->stride[1], t->stride[2]};
    return v;
}

static void fill_sizes(fa_bwd_sm90_params *p, const fa_args *a, const fa_sm90_instance *f)
{
    p->B = (int32_t)a->q.size[0];
    p->HQ = (int32_t)a->q.size[1];
    p->HK = (int32_t)a->k.size[1];
    p->group = p->HQ / p->HK;
    p->SQ = (int32_t)a->q.size[2];
    p->SK = (int32_t)a->k.size[2];
    p->D = (int32_t)a->q.size[3];
    p->DV = (int32_t)a->v.size[3];
    p->BM = f->BM;
    p->BN = f->BN;
    p->q_blocks = (int32_t)numbers_of(a, &a->cu_q, p->SQ, f->BM);
    p->k_blocks = (int32_t)numbers_of(a, &a->cu_k, p->SK, f->BN);
    p->scale = (float)a->scale;
    p->scale_log2 = (float)(a->scale * 1.4426950408889634);
}

static int32_t clamp_count(int32_t x, int32_t lo, int32_t hi)
{
    return x < lo ? lo : x > hi ? hi : x;
}

/* Heads whose thread blocks start in turn: with more, key blocks of a head follow each other in a greater distance, and
 * wait less; with fewer, what is at work stays in the second-level cache. Measured (docs/kernels/bwd_sm90.md). */
static int32_t heads_in_turn(const fa_bwd_sm90_params *p, const fa_sm90_instance *f)
{
    return f->D <= 64 ? 32 : f->D <= 128 ? 16 : p->SK < 8192 ? 8 : 4;
}

/* See bwd_sm90_params.h. resident: thread blocks that the device runs at the same time. */
static void fill_order(fa_bwd_sm90_params *p, const fa_sm90_instance *f, bool left, bool right, int32_t resident)
{
    bool lengths = p->mod.options & FA_MOD_LENGTHS; /* not every key block sees every query block */
    bool up = right && !left && !lengths && p->SK <= 1024 && p->k_blocks <= resident;
    p->order = up ? FA_BWD_UP : left || right || lengths ? FA_BWD_DOWN : FA_BWD_ROTATE;
    p->ring = p->order == FA_BWD_DOWN ? 1 : clamp_count(p->k_blocks, 1, resident);
    p->heads_together = p->order == FA_BWD_DOWN ? heads_in_turn(p, f) : 1;
    if (p->order == FA_BWD_ROTATE) {
        p->ring = clamp_count(p->q_blocks / 2, 1, p->ring); /* key blocks that follow each other are two steps apart */
        p->heads_together = resident / p->ring;
    }
    p->heads_together = clamp_count(p->heads_together, 1, p->B * p->HK);
}

/* resident: thread blocks that the device runs at the same time. */
static void fill_band(fa_bwd_sm90_params *p, const fa_args *a, const fa_sm90_instance *f, int resident)
{
    bool left = a->window_left >= 0, right = a->window_right >= 0;
    fa_args with_lengths = *a;
    with_lengths.bottom_right = false;
    fa_sm90_band(p->mod.options & FA_MOD_LENGTHS ? &with_lengths : a, &p->lo_shift, &p->hi_shift);
    fill_order(p, f, left, right, resident);
}

static void fill_memory(fa_bwd_sm90_params *p, const fa_args *a, const fa_sm90_instance *f, char *workspace)
{
    workspace_parts w = parts_of(a, f);
    p->dq_sum = (float *)(workspace + w.dq_sum);
    p->row_lse = (float *)(workspace + w.row_lse);
    p->row_delta = (float *)(workspace + w.row_delta);
    p->turn = (uint32_t *)(workspace + w.turn);
    p->mod.maps = (CUtensorMap *)(workspace + w.maps);
    p->mod.first_q = (int32_t *)(workspace + w.firsts);
    p->mod.first_k = p->mod.first_q + batches_of(a) + 1;
    p->mod.bits = (uint64_t *)(workspace + w.bits);
    if (a->window_left >= 0 || a->window_right >= 0 || (p->mod.options & FA_MOD_BITS)) /* some pairs are hidden */
        p->wild = (uint32_t *)(workspace + w.wild);
    p->q = view_of(&a->q);
    p->k = view_of(&a->k);
    p->v = view_of(&a->v);
    p->out = view_of(&a->out);
    p->dout = view_of(&a->dout);
    p->lse = view_of(&a->lse);
    p->dlse = view_of(&a->dlse);
    p->dq = view_of(&a->dq);
    p->dk = view_of(&a->dk);
    p->dv = view_of(&a->dv);
}

/* ---- options of the mod instances -------------------------------------------------------------------------------- */

static int64_t stride_or_0(const fa_tensor *t, int dim)
{
    return is_broadcast(t, dim) ? 0 : t->stride[dim];
}

static fa_bwd_lengths lengths_of(const fa_tensor *t)
{
    fa_bwd_lengths l = {t->data, t->stride[0], t->dtype == FA_I64};
    return l;
}

static void fill_mask(fa_bwd_mod *m, const fa_args *a, const fa_sm90_instance *f)
{
    int64_t words[4];
    words_of(a, f, words);
    m->bits_key = words[3] > 2;
    m->bits_block = words[2] > 1 ? words[3] : 0;
    m->bits_head = words[1] > 1 ? words[2] * words[3] : 0;
    m->bits_batch = words[0] > 1 ? words[1] * words[2] * words[3] : 0;
    m->mask = a->mask.data;
    m->f32 = a->mask.dtype == FA_F32;
    m->mask_batch = stride_or_0(&a->mask, 0);
    m->mask_head = stride_or_0(&a->mask, 1);
    m->mask_query = stride_or_0(&a->mask, 2);
    m->mask_key = stride_or_0(&a->mask, 3);
    m->mask_once = (a->q.size[0] == 1 || m->mask_batch != 0) && (a->q.size[1] == 1 || m->mask_head != 0);
}

/* The main kernel stores the gradient of the mask where an element of it belongs to one head and batch and has the type
 * of q (bwd_sm90_ds.cuh). */
static bool stores_dmask(const fa_bwd_mod *m, const fa_args *a, const fa_sm90_instance *f)
{
    const fa_tensor *d = &a->dmask;
    const int64_t size[4] = {a->q.size[0], a->q.size[1], a->q.size[2], a->k.size[2]};
    bool ok = m->options == FA_MOD_TILED && f->D <= 192 && d->dtype == a->q.dtype && d->stride[3] == 1 &&
              (uintptr_t)d->data % 16 == 0 && (a->dq.data || a->dk.data || a->dv.data);
    for (int i = 0; i < 4; i++)
        ok = ok && d->size[i] == size[i];
    for (int i = 0; i < 3; i++)
        ok = ok && (d->size[i] <= 1 || (d->stride[i] > 0 && d->stride[i] % 8 == 0 && d->stride[i] < (int64_t)1 << 38));
    return ok;
}

static void fill_dmask(fa_bwd_mod *m, const fa_args *a, const fa_sm90_instance *f)
{
    const fa_tensor *d = &a->dmask;
    m->dmask = d->data;
    m->dmask_batches = (int32_t)d->size[0];
    m->dmask_heads = (int32_t)d->size[1];
    m->dmask_batch = d->stride[0];
    m->dmask_head = d->stride[1];
    m->dmask_query = d->stride[2];
    m->dmask_key = d->stride[3];
    m->dmask_vectors = d->dtype != FA_F32 && rows_of_16_bytes(d, 1);
    m->dmask_here = stores_dmask(m, a, f);
}

static void fill_mod(fa_bwd_mod *m, const fa_args *a, const fa_sm90_instance *f)
{
    m->options = options_of(a, f);
    m->batches = (int32_t)batches_of(a);
    m->cu_q = lengths_of(&a->cu_q);
    m->cu_k = lengths_of(&a->cu_k);
    m->q_len = lengths_of(&a->q_seqlens);
    m->k_len = lengths_of(&a->kv_seqlens);
    m->bottom_right = a->bottom_right;
    m->left = a->window_left >= 0;
    m->right = a->window_right >= 0;
    if (a->mask.data)
        fill_mask(m, a, f);
    if (a->dmask.data)
        fill_dmask(m, a, f);
    m->cap = (float)(a->softcap * 1.4426950408889634);
    m->cap_scale = (float)(a->softcap > 0 ? a->scale / a->softcap : 0);
    m->alibi = a->alibi.data;
    m->alibi_f32 = a->alibi.dtype == FA_F32;
    m->alibi_batch = stride_or_0(&a->alibi, 0);
    m->alibi_head = a->alibi.stride[1];
    m->dropout = fa_sm90_dropout_of(a->dropout_p, a->dropout_seed);
    m->first_head = (uint32_t)(a->first_batch * a->q.size[1]);
}

/* Without queries or without keys nothing is loaded. */
static fa_status fill_maps(fa_bwd_sm90_params *p, const fa_args *a, const fa_sm90_instance *f, fa_error *err)
{
    const fa_sm90_map maps[] = {{&a->q, f->BM, &p->q_map, p->q_steps},
                                {&a->dout, f->BM, &p->dout_map, p->dout_steps},
                                {&a->k, f->BN, &p->k_map, p->k_steps},
                                {&a->v, f->BN, &p->v_map, p->v_steps},
                                {&a->mask, f->BM, &p->mod.mask_map, p->mod.mask_steps},
                                {&a->dmask, 64, &p->mod.dmask_map, p->mod.dmask_steps}};
    int n = !(p->mod.options & FA_MOD_TILES) ? 4 : p->mod.dmask_here ? 6 : 5;
    return fa_sm90_encode(f->name, maps, p->SQ == 0 || p->SK == 0 ? 0 : n, err);
}

/* ---- launch ------------------------------------------------------------------------------------------------------ */

static fa_status launch_gradients(const fa_bwd_sm90_params *p, const fa_sm90_instance *f, cudaStream_t stream,
                                  fa_error *err)
{
    if (!p->dq.data && !p->dk.data && !p->dv.data)
        return FA_OK;
    fa_status status = fa_sm90_start(f, (int64_t)p->B * p->HK * p->k_blocks, p, stream, err);
    if (status != FA_OK || !p->dq.data)
        return status;
    cudaError_t e = fa_bwd_post_launch(p, f->dtype, f->D, stream);
    return e == cudaSuccess ? FA_OK : fa_sm90_refuse(err, f->name, cudaGetErrorString(e));
}

/* A mask that is broadcast along queries or keys is left to the kernels of sm_80. */
static fa_status launch_dmask(const fa_args *a, const fa_bwd_sm90_params *p, const fa_bwd_row_numbers *rows,
                              cudaStream_t stream, fa_error *err)
{
    if (a->mask.size[2] != p->SQ || a->mask.size[3] != p->SK || p->SQ == 0 || p->SK == 0)
        return fa_dmask_sm80_launch(a, rows, stream, err);
    const fa_sm90_instance *f = INSTANCES[FA_KIND_DMASK][a->q.dtype == FA_F16][place_for(a)];
    int processors;
    fa_status status = fa_sm90_prepare(f, &processors, err);
    if (status != FA_OK)
        return status;
    int64_t tiles = a->mask.size[0] * a->mask.size[1] * blocks_of(p->SQ, f->BM) * blocks_of(p->SK, f->BN);
    return fa_sm90_start(f, tiles < processors ? tiles : processors, p, stream, err);
}

/* Of packed sequences the numbers of rows lie in blocks; the sinks' kernel wants them as the rows lie. */
static fa_status launch_dsinks(const fa_args *a, const fa_bwd_row_numbers *rows, void *workspace, cudaStream_t stream,
                               fa_error *err)
{
    if (!is_packed(a))
        return fa_dsinks_launch(a, rows, stream, err);
    const fa_bwd_row_numbers packed = fa_bwd_rows_in(a, workspace);
    fa_status status = fa_bwd_rows_launch(a, workspace, stream, err);
    return status == FA_OK ? fa_dsinks_launch(a, &packed, stream, err) : status;
}

static fa_status fill(fa_bwd_sm90_params *p, const fa_args *a, const fa_sm90_instance *f, char *workspace,
                      int processors, fa_error *err)
{
    fill_sizes(p, a, f);
    fill_mod(&p->mod, a, f);
    fill_band(p, a, f, processors);
    fill_memory(p, a, f, workspace);
    return fill_maps(p, a, f, err);
}

extern "C" fa_status fa_bwd_sm90_launch(const fa_args *a, void *workspace, cudaStream_t stream, fa_error *err)
{
    const fa_sm90_instance *f = fa_bwd_sm90_choose(a);
    fa_bwd_sm90_params p = {};
    int processors;
    fa_status status = fa_sm90_prepare(f, &processors, err);
    if (status != FA_OK || a->q.size[0] * a->k.size[1] == 0)
        return status;
    status = fill(&p, a, f, (char *)workspace, processors, err);
    if (status != FA_OK)
        return status;
    cudaError_t e = fa_bwd_pre_launch(&p, f->dtype, stream);
    if (e != cudaSuccess)
        return fa_sm90_refuse(err, f->name, cudaGetErrorString(e));
    const fa_bwd_row_numbers rows = {p.row_lse, p.row_delta, (int64_t)p.q_blocks * p.BM};
    status = launch_gradients(&p, f, stream, err);
    if (status == FA_OK && a->dmask.data && !p.mod.dmask_here)
        status = launch_dmask(a, &p, &rows, stream, err);
    if (status == FA_OK && a->dsinks.data)
        status = launch_dsinks(a, &rows, (char *)workspace + parts_of(a, f).rows, stream, err);
    return status;
}
