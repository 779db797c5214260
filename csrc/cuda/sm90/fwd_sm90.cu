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
}

/* ---- what it can do -------------------------------------------------------------------------------------------- */

static bool readable(const fa_tensor *t)
{
    bool ok = t->stride[3] == 1 && (uintptr_t)t->data % 16 == 0 && t->size[3] % 8 == 0;
    ok = ok && (t->size[2] == 1 || t->stride[2] != 0); /* a map has no broadcast along the rows of its boxes */
    for (int i = 0; i < 3; i++)
        ok = ok && (t->size[i] == 1 || (t->stride[i] >= 0 && t->stride[i] % 8 == 0 && t->stride[i] < (int64_t)1 << 38));
    return ok;
}

extern "C" bool fa_fwd_sm90_can(const fa_args *a)
{
    bool type = a->q.dtype == FA_BF16 || a->q.dtype == FA_F16;
    bool sizes = a->q.size[3] <= 256 && a->v.size[3] <= 256 &&
                 a->q.size[0] * a->q.size[1] <= FA_POSITION_BOUND / (a->q.size[2] / 128 + 1); /* tiles count in int32 */
    return type && sizes && fa_sm90_is_plain(a) && a->scale > 0 && readable(&a->q) && readable(&a->k) && readable(&a->v) &&
           readable(&a->out);
}

/* ---- launch ---------------------------------------------------------------------------------------------------- */

static fa_fwd_sm90_view view_of(const fa_tensor *t)
{
    fa_fwd_sm90_view v = {t->data, t->stride[0], t->stride[1], t->stride[2]};
    return v;
}

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
    p->parts = right && !left && pairs >= processors ? 2 : 1;
    p->units = (int32_t)(p->parts == 2 ? pairs : heads * p->tiles);
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

extern "C" fa_status fa_fwd_sm90_launch_instance(const fa_args *a, const fa_sm90_instance *f, cudaStream_t stream,
                                                 fa_error *err)
{
    fa_fwd_sm90_params p = {};
    int processors;
    fa_status status = fa_sm90_prepare(f, &processors, err);
    if (status != FA_OK || a->q.size[0] * a->q.size[1] * a->q.size[2] == 0)
        return status;
    fill_sizes(&p, a, f, processors);
    status = fill_maps(&p, a, f, err);
    if (status != FA_OK)
        return status;
    void *arguments[] = {&p};
    dim3 grid((unsigned)(p.units < processors ? p.units : processors)), block((unsigned)f->threads);
    cudaError_t e = cudaLaunchKernel(f->kernel, grid, block, arguments, (size_t)f->shared_bytes, stream);
    return e == cudaSuccess ? FA_OK : fa_sm90_refuse(err, f->name, cudaGetErrorString(e));
}

extern "C" const fa_sm90_instance *fa_fwd_sm90_instance_at(int i)
{
#define FA_BOTH(name, ...) &fa_fwd_sm90_bf16_##name, &fa_fwd_sm90_f16_##name,
    static const fa_sm90_instance *const all[] = {FA_FWD_SM90_INSTANCES(FA_BOTH)};
#undef FA_BOTH
    return i < (int)(sizeof all / sizeof all[0]) ? all[i] : NULL;
}

/* The narrowest head dimensions that hold the call's, then the tile: 192 queries waste much of short causal heads, and
 * blocks of 176 keys pay only over many of them. */
extern "C" const fa_sm90_instance *fa_fwd_sm90_choose(const fa_args *a)
{
#define FA_PICK(name) (a->q.dtype == FA_BF16 ? &fa_fwd_sm90_bf16_##name : &fa_fwd_sm90_f16_##name)
    int64_t D = a->q.size[3], DV = a->v.size[3];
    bool band = a->window_left >= 0 || a->window_right >= 0;
    if (D <= 64 && DV <= 64)
        return band && a->q.size[2] <= 2048 ? FA_PICK(hd64_bm128) : FA_PICK(hd64);
    if (D <= 128 && DV <= 128)
        return !band && a->k.size[2] >= 8192 ? FA_PICK(hd128_bn176) : FA_PICK(hd128);
    return D <= 192 && DV <= 128 ? FA_PICK(hd192_dv128) : FA_PICK(hd256);
#undef FA_PICK
}

extern "C" fa_status fa_fwd_sm90_launch(const fa_args *a, void *workspace, cudaStream_t stream, fa_error *err)
{
    (void)workspace;
    return fa_fwd_sm90_launch_instance(a, fa_fwd_sm90_choose(a), stream, err);
}
