/* Host side of the Hopper forward kernel: which calls it takes, which instance runs them, tensor maps, launch. */
#include "fwd_sm90.h"

#include <cuda_runtime.h>
#include <math.h>
#include <stdio.h>

#include "fwd_sm90_instances.h"
#include "fwd_sm90_params.h"

extern "C" {
#define FA_DECLARE(name, ...) extern const fa_sm90_instance fa_fwd_sm90_bf16_##name, fa_fwd_sm90_f16_##name;
FA_FWD_SM90_INSTANCES(FA_DECLARE)
#undef FA_DECLARE
extern const fa_sm90_instance fa_fwd_sm90_f32_hd64, fa_fwd_sm90_f32_hd128;
}

/* Below so many tiles of 128 queries the fp32 kernel leaves calls with more keys to kernels that split them. */
enum { FA_F32_TILES = 64, FA_F32_KEYS = 512 };

/* ---- what it can do -------------------------------------------------------------------------------------------- */

/* Rows in pieces of 16 bytes. */
static bool has_pieces(const fa_tensor *t)
{
    const int64_t piece = 16 / (int64_t)fa_dtype_size(t->dtype);
    bool ok = t->stride[3] == 1 && (uintptr_t)t->data % 16 == 0 && t->size[3] % piece == 0;
    for (int i = 0; i < 3; i++)
        ok = ok && (t->size[i] == 1 || t->stride[i] % piece == 0);
    return ok;
}

/* The kernel for fp32 counts the bytes from row to row of K and V in 32 bits. */
static bool has_short_rows(const fa_tensor *t)
{
    return has_pieces(t) && t->stride[2] < (1 << 29) && t->stride[2] > -(1 << 29);
}

/* By a tensor map. */
static bool readable(const fa_tensor *t)
{
    bool ok = has_pieces(t);
    ok = ok && (t->size[2] == 1 || t->stride[2] != 0); /* a map has no broadcast along the rows of its boxes */
    for (int i = 0; i < 3; i++)
        ok = ok && (t->size[i] == 1 || (t->stride[i] >= 0 && t->stride[i] < (int64_t)1 << 38));
    return ok;
}

/* Packed sequences, but no pages, no quantised keys, no tree masks and no parts of keys. */
static bool is_packed_or_dense(const fa_args *a)
{
    if (!a->by_sequence)
        return true;
    return a->cu_q.data && a->cu_k.data && !a->page_size && !a->tree_mask.data && a->k.dtype == a->q.dtype &&
           a->splits_wanted <= 1 && a->kv_appended == 0;
}

/* fp32, plain; and enough tiles, since keys are not split here: by the shape alone, so that bits are the same on every
 * GPU. */
static bool can_f32(const fa_args *a)
{
    const int64_t tiles = a->q.size[0] * a->q.size[1] * ((a->q.size[2] + 127) / 128);
    const bool sizes = a->q.size[3] <= 128 && a->v.size[3] <= 128 && a->k.size[2] > 0;
    return sizes && (tiles >= FA_F32_TILES || a->k.size[2] <= FA_F32_KEYS) && !a->allow_tf32 &&
           fa_fwd_sm90_is_plain(a) && has_pieces(&a->q) && has_short_rows(&a->k) && has_short_rows(&a->v) &&
           has_pieces(&a->out);
}

extern "C" bool fa_fwd_sm90_can(const fa_args *a)
{
    bool type = a->q.dtype == FA_BF16 || a->q.dtype == FA_F16;
    int64_t tiles = a->q.size[2] / 128 + 1 + (a->cu_q.data ? a->cu_q.size[0] : 0);
    bool sizes = a->q.size[3] <= 256 && a->v.size[3] <= 256 &&
                 a->q.size[0] * a->q.size[1] <= FA_POSITION_BOUND / tiles; /* they are counted in int32 */
    if (a->q.dtype == FA_F32)
        return sizes && can_f32(a);
    return type && sizes && is_packed_or_dense(a) && readable(&a->q) && readable(&a->k) && readable(&a->v) &&
           readable(&a->out);
}

/* Rows of the mask by pieces of 16 bytes: all begin at one, and end with one. */
static bool has_whole_pieces(const fa_tensor *m)
{
    int64_t size = (int64_t)fa_dtype_size(m->dtype);
    bool ok = m->stride[3] == 1 && m->size[3] * size % 16 == 0 && (uintptr_t)m->data % 16 == 0;
    for (int i = 0; i < 3; i++)
        ok = ok && (m->size[i] == 1 || m->stride[i] * size % 16 == 0);
    return ok;
}

/* What the call does to its scores and weights: FA_MOD_*. */
static int what_of(const fa_args *a)
{
    const fa_tensor *m = &a->mask;
    int what = !m->data ? 0 : m->dtype == FA_BOOL ? FA_MOD_BITS : FA_MOD_BIAS;
    what |= what & FA_MOD_BIAS && m->dtype == FA_F32 ? FA_MOD_WIDE : 0;
    what |= what && m->dtype != FA_F32 && m->size[3] == a->k.size[2] && has_whole_pieces(m) ? FA_MOD_VECTORS : 0;
    bool padding = m->size[2] == 1 || m->stride[2] == 0;
    what |= what & FA_MOD_BITS && padding ? FA_MOD_PADDING : 0;
    what |= a->softcap > 0 ? FA_MOD_CAP : 0;
    what |= a->alibi.data ? FA_MOD_ALIBI : 0;
    what |= a->dropout_p > 0 ? FA_MOD_DROPOUT : 0;
    what |= fa_sm90_drops_often(a->dropout_p) ? FA_MOD_OFTEN : 0;
    bool scaled = what & (FA_MOD_CAP | FA_MOD_ALIBI | FA_MOD_BIAS) || a->scale <= 0;
    return what | (scaled ? FA_MOD_SCALED : 0);
}

static bool has_lengths(const fa_args *a)
{
    return a->q_seqlens.data || a->kv_seqlens.data || a->cu_q.data;
}

extern "C" bool fa_fwd_sm90_is_plain(const fa_args *a)
{
    return fa_sm90_is_plain(a) && a->scale > 0;
}

/* ---- launch ---------------------------------------------------------------------------------------------------- */

static fa_fwd_sm90_view view_of(const fa_tensor *t)
{
    fa_fwd_sm90_view v = {t->data, t->stride[0], t->stride[1], t->stride[2]};
    return v;
}

/* processors: 0 where tiles are handed out one by one. */
static void fill_sizes(fa_fwd_sm90_params *p, const fa_args *a, const fa_sm90_instance *f, int processors)
{
    p->q = view_of(&a->q);
    p->k = view_of(&a->k);
    p->v = view_of(&a->v);
    p->out = view_of(&a->out);
    p->lse = (float *)a->lse.data;
    p->B = (int32_t)a->q.size[0];
    p->HQ = (int32_t)a->q.size[1];
    p->group = (int32_t)(a->q.size[1] / a->k.size[1]);
    p->SQ = (int32_t)a->q.size[2];
    p->SK = (int32_t)a->k.size[2];
    p->D = (int32_t)a->q.size[3];
    p->DV = (int32_t)a->v.size[3];
    bool left = a->window_left >= 0, right = a->window_right >= 0;
    fa_sm90_band(a, &p->lo_shift, &p->hi_shift);
    p->hides = left || right;
    p->scale_log2 = (float)(a->scale * 1.4426950408889634);
    p->tiles = (p->SQ + f->BM - 1) / f->BM;
    int64_t heads = a->q.size[0] * a->q.size[1], pairs = heads * ((p->tiles + 1) / 2);
    p->parts = right && !left && processors > 0 && pairs >= processors ? 2 : 1;
    p->units = (int32_t)(p->parts == 2 ? pairs : heads * p->tiles);
}

static void fill_mask(fa_fwd_sm90_mod_params *p, const fa_tensor *m)
{
    for (int i = 0; m->data && i < 4; i++)
        p->mask[i] = m->size[i] > 1 ? m->stride[i] : 0;
    p->heads_outside = m->data && m->size[0] == 1 && m->size[1] > 1;
}

/* tanh x = x P(x^2) to 1.2e-6 for |x| <= 0.4, which is 1e-4 of a score, and of its weight, with a cap of 80; with
 * larger ones, to 5e-8 for |x| <= 1/4, and to 1.4e-6 of small scores. */
static void fill_softcap(fa_fwd_sm90_mod_params *p, const fa_args *a)
{
    static const double wide[] = {0.9999788324, -0.3322542888, 0.1194240851};
    static const double narrow[] = {0.9999986331, -0.3331570228, 0.1276224129};
    const double *terms = a->softcap > 80 ? narrow : wide, limit = a->softcap > 80 ? 0.25 : 0.4;
    const double log2e = 1.4426950408889634;
    p->scale = (float)(a->softcap > 0 ? a->scale / a->softcap : a->scale * log2e);
    if (a->softcap <= 0)
        return;
    double square = (a->scale / a->softcap) * (a->scale / a->softcap), power = a->scale * log2e;
    p->cap = (float)(a->softcap * log2e);
    for (int i = 0; i < 3; i++, power *= square)
        p->cap_terms[i] = (float)(terms[i] * power);
    p->cap_limit = isfinite(p->cap_terms[0]) && isfinite(p->cap_terms[2]) ? (float)(limit * limit / square) : -1;
}

static void fill_mod(fa_fwd_sm90_mod_params *p, const fa_args *a, const fa_sm90_instance *f, int processors)
{
    fa_args b = *a;
    b.bottom_right = false; /* the kernel adds each sequence's own offset */
    fill_sizes(&p->plain, &b, f, has_lengths(a) ? 0 : processors);
    p->a = *a;
    p->what = what_of(a);
    fill_mask(p, &a->mask);
    p->dropout = fa_sm90_dropout_of(a->dropout_p, a->dropout_seed);
    fill_softcap(p, a);
    if (p->what & FA_MOD_SCALED)
        p->plain.scale_log2 = 1;
    p->plain.hides |= p->what & FA_MOD_BITS;
    if (a->cu_q.data) {
        p->plain.tiles = (int32_t)(a->q.size[2] / f->BM + a->cu_q.size[0]); /* fa_tile_slots */
        p->plain.units = p->plain.tiles * p->plain.HQ;
    }
}

/* Without keys, what is loaded for the one hidden block does not matter. */
static fa_status fill_maps(fa_fwd_sm90_params *p, const fa_args *a, const fa_sm90_instance *f, fa_error *err)
{
    const fa_tensor *k = p->SK > 0 ? &a->k : &a->q, *v = p->SK > 0 ? &a->v : &a->q;
    const fa_sm90_map maps[] = {{&a->q, 64, &p->q_map, p->q_steps},
                                {k, f->BN, &p->k_map, p->k_steps},
                                {v, f->BN, &p->v_map, p->v_steps}};
    return fa_sm90_encode(f->name, maps, 3, err);
}

static fa_status launch_plain(const fa_args *a, const fa_sm90_instance *f, int processors, cudaStream_t stream,
                              fa_error *err)
{
    fa_fwd_sm90_params p = {};
    fill_sizes(&p, a, f, processors);
    fa_status status = a->q.dtype == FA_F32 ? FA_OK : fill_maps(&p, a, f, err);
    return status ? status : fa_sm90_start(f, min(p.units, processors), &p, stream, err);
}

static fa_status launch_mod(const fa_args *a, const fa_sm90_instance *f, int processors, void *workspace,
                            cudaStream_t stream, fa_error *err)
{
    fa_fwd_sm90_mod_params p = {};
    fill_mod(&p, a, f, processors);
    fa_status status = fill_maps(&p.plain, a, f, err);
    if (status == FA_OK && has_lengths(a)) {
        p.next_unit = (uint32_t *)workspace;
        cudaError_t e = cudaMemsetAsync(workspace, 0, sizeof *p.next_unit, stream);
        status = e == cudaSuccess ? FA_OK : fa_sm90_refuse(err, f->name, cudaGetErrorString(e));
    }
    return status ? status : fa_sm90_start(f, min(p.plain.units, processors), &p, stream, err);
}

extern "C" size_t fa_fwd_sm90_workspace(const fa_args *a)
{
    const int64_t BM = 128, heads = a->q.size[0] * a->q.size[1];
    int64_t tiles = a->cu_q.data ? a->q.size[2] / BM + a->cu_q.size[0] : (a->q.size[2] + BM - 1) / BM;
    return has_lengths(a) ? (size_t)(1 + heads * tiles) * sizeof(uint32_t) : 0;
}

extern "C" fa_status fa_fwd_sm90_launch_instance(const fa_args *a, const fa_sm90_instance *f, void *workspace,
                                                 cudaStream_t stream, fa_error *err)
{
    int processors;
    fa_status status = fa_sm90_prepare(f, &processors, err);
    if (status != FA_OK || a->q.size[0] * a->q.size[1] * a->q.size[2] == 0)
        return status;
    return fa_fwd_sm90_is_plain(a) ? launch_plain(a, f, processors, stream, err)
                                   : launch_mod(a, f, processors, workspace, stream, err);
}

extern "C" const fa_sm90_instance *fa_fwd_sm90_instance_at(int i)
{
#define FA_BOTH(name, ...) &fa_fwd_sm90_bf16_##name, &fa_fwd_sm90_f16_##name,
    static const fa_sm90_instance *const all[] = {FA_FWD_SM90_INSTANCES(FA_BOTH) &fa_fwd_sm90_f32_hd64,
                                                  &fa_fwd_sm90_f32_hd128};
#undef FA_BOTH
    return i < (int)(sizeof all / sizeof all[0]) ? all[i] : NULL;
}

/* The options of the instance for just what the call does. */
static int options_of(const fa_args *a)
{
    int what = what_of(a);
    bool padding = (what | FA_MOD_VECTORS) == (FA_MOD_BITS | FA_MOD_VECTORS | FA_MOD_PADDING);
    return fa_fwd_sm90_is_plain(a) ? FA_PLAIN : padding ? FA_LENGTHS : what;
}

/* The narrowest head dimensions that hold the call's, of the instances with these options; NULL: there is none. */
static const fa_sm90_instance *narrowest(const fa_args *a, int options)
{
    const fa_sm90_instance *f = fa_fwd_sm90_instance_at(0);
    for (int i = 1; f; f = fa_fwd_sm90_instance_at(i++))
        if (f->dtype == a->q.dtype && f->options == options && f->D >= a->q.size[3] && f->DV >= a->v.size[3])
            break;
    return f;
}

/* An instance for just these options, or the one for all. Of those without, by the tile: 192 queries waste much of
 * short causal heads, and blocks of 176 keys pay only over many of them. */
extern "C" const fa_sm90_instance *fa_fwd_sm90_choose(const fa_args *a)
{
#define FA_PICK(name) (a->q.dtype == FA_BF16 ? &fa_fwd_sm90_bf16_##name : &fa_fwd_sm90_f16_##name)
    if (a->q.dtype == FA_F32)
        return a->q.size[3] <= 64 && a->v.size[3] <= 64 ? &fa_fwd_sm90_f32_hd64 : &fa_fwd_sm90_f32_hd128;
    const fa_sm90_instance *f = narrowest(a, options_of(a));
    bool band = a->window_left >= 0 || a->window_right >= 0;
    if (f == FA_PICK(hd64) && band && a->q.size[2] <= 2048)
        return FA_PICK(hd64_bm128);
    if (f == FA_PICK(hd128) && !band && a->k.size[2] >= 8192)
        return FA_PICK(hd128_bn176);
    return f ? f : narrowest(a, FA_ALL);
#undef FA_PICK
}

extern "C" fa_status fa_fwd_sm90_launch(const fa_args *a, void *workspace, cudaStream_t stream, fa_error *err)
{
    return fa_fwd_sm90_launch_instance(a, fa_fwd_sm90_choose(a), workspace, stream, err);
}
