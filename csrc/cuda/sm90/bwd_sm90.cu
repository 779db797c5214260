/* Host side of the Hopper backward kernel: which calls it takes, which instance runs them, tensor maps, launches. */
#include "bwd_sm90.h"

#include <cuda_runtime.h>

extern "C" {
extern const fa_sm90_instance fa_bwd_sm90_bf16_hd64, fa_bwd_sm90_bf16_hd128, fa_bwd_sm90_bf16_hd192_dv128,
    fa_bwd_sm90_bf16_hd256, fa_bwd_sm90_f16_hd64, fa_bwd_sm90_f16_hd128, fa_bwd_sm90_f16_hd192_dv128,
    fa_bwd_sm90_f16_hd256;
}

extern "C" const fa_sm90_instance *fa_bwd_sm90_instance_at(int i)
{
    static const fa_sm90_instance *const all[] = {
        &fa_bwd_sm90_bf16_hd64, &fa_bwd_sm90_bf16_hd128, &fa_bwd_sm90_bf16_hd192_dv128, &fa_bwd_sm90_bf16_hd256,
        &fa_bwd_sm90_f16_hd64,  &fa_bwd_sm90_f16_hd128,  &fa_bwd_sm90_f16_hd192_dv128,  &fa_bwd_sm90_f16_hd256,
    };
    return i < (int)(sizeof all / sizeof all[0]) ? all[i] : NULL;
}

/* The narrowest that holds the head dimensions. */
extern "C" const fa_sm90_instance *fa_bwd_sm90_choose(const fa_args *a)
{
    for (int i = 0;; i++) {
        const fa_sm90_instance *f = fa_bwd_sm90_instance_at(i);
        if (!f || (f->dtype == a->q.dtype && a->q.size[3] <= f->D && a->v.size[3] <= f->DV))
            return f;
    }
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
    return heads <= INT32_MAX && heads * (rows / 64 + 2) <= INT32_MAX;
}

extern "C" bool fa_bwd_sm90_can(const fa_args *a)
{
    bool inputs = readable(&a->q) && readable(&a->k) && readable(&a->v) && readable(&a->out) && readable(&a->dout);
    return fa_bwd_sm90_choose(a) && fa_sm90_is_plain(a) && countable(a) && inputs && writable(&a->dq) && writable(&a->dk) && writable(&a->dv);
}

/* ---- workspace --------------------------------------------------------------------------------------------------- */

typedef struct workspace_parts {
    size_t dq_sum, row_lse, row_delta, turn, end; /* offsets in bytes */
} workspace_parts;

static size_t align_256(size_t bytes)
{
    return (bytes + 255) / 256 * 256;
}

static workspace_parts parts_of(const fa_args *a, const fa_sm90_instance *f)
{
    size_t blocks = (size_t)(a->q.size[0] * a->q.size[1] * ((a->q.size[2] + f->BM - 1) / f->BM)), rows = blocks * f->BM;
    workspace_parts w = {};
    w.row_lse = w.dq_sum + align_256(rows * f->D * sizeof(float));
    w.row_delta = w.row_lse + align_256(rows * sizeof(float));
    w.turn = w.row_delta + align_256(rows * sizeof(float));
    w.end = w.turn + align_256(blocks * sizeof(uint32_t));
    return w;
}

extern "C" size_t fa_bwd_sm90_workspace(const fa_args *a)
{
    return parts_of(a, fa_bwd_sm90_choose(a)).end;
}

/* ---- launch ------------------------------------------------------------------------------------------------------ */

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
    p->q_blocks = (p->SQ + f->BM - 1) / f->BM;
    p->k_blocks = (p->SK + f->BN - 1) / f->BN;
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
    bool up = right && !left && p->SK <= 1024 && p->k_blocks <= resident;
    p->order = up ? FA_BWD_UP : left || right ? FA_BWD_DOWN : FA_BWD_ROTATE;
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
    fa_sm90_band(a, &p->lo_shift, &p->hi_shift);
    fill_order(p, f, left, right, resident);
}

static void fill_memory(fa_bwd_sm90_params *p, const fa_args *a, const fa_sm90_instance *f, char *workspace)
{
    workspace_parts w = parts_of(a, f);
    p->dq_sum = (float *)(workspace + w.dq_sum);
    p->row_lse = (float *)(workspace + w.row_lse);
    p->row_delta = (float *)(workspace + w.row_delta);
    p->turn = (uint32_t *)(workspace + w.turn);
    p->out = view_of(&a->out);
    p->dout = view_of(&a->dout);
    p->lse = view_of(&a->lse);
    p->dlse = view_of(&a->dlse);
    p->dq = view_of(&a->dq);
    p->dk = view_of(&a->dk);
    p->dv = view_of(&a->dv);
}

/* Without queries or without keys nothing is loaded. */
static fa_status fill_maps(fa_bwd_sm90_params *p, const fa_args *a, const fa_sm90_instance *f, fa_error *err)
{
    const fa_sm90_map maps[] = {{&a->q, f->BM, &p->q_map, p->q_steps},
                                {&a->dout, f->BM, &p->dout_map, p->dout_steps},
                                {&a->k, f->BN, &p->k_map, p->k_steps},
                                {&a->v, f->BN, &p->v_map, p->v_steps}};
    return fa_sm90_encode(f->name, maps, p->SQ == 0 || p->SK == 0 ? 0 : 4, err);
}

static cudaError_t launch_main(fa_bwd_sm90_params *p, const fa_sm90_instance *f, cudaStream_t stream)
{
    if (p->k_blocks == 0)
        return cudaSuccess;
    void *arguments[] = {p};
    dim3 grid((unsigned)((int64_t)p->B * p->HK * p->k_blocks)), block((unsigned)f->threads);
    return cudaLaunchKernel(f->kernel, grid, block, arguments, (size_t)f->shared_bytes, stream);
}

extern "C" fa_status fa_bwd_sm90_launch(const fa_args *a, void *workspace, cudaStream_t stream, fa_error *err)
{
    const fa_sm90_instance *f = fa_bwd_sm90_choose(a);
    fa_bwd_sm90_params p = {};
    int processors;
    fa_status status = fa_sm90_prepare(f, &processors, err);
    if (status != FA_OK || a->q.size[0] * a->k.size[1] == 0)
        return status;
    fill_sizes(&p, a, f);
    fill_band(&p, a, f, processors);
    fill_memory(&p, a, f, (char *)workspace);
    status = fill_maps(&p, a, f, err);
    if (status != FA_OK)
        return status;
    cudaError_t e = fa_bwd_pre_launch(&p, f->dtype, stream);
    if (e == cudaSuccess)
        e = launch_main(&p, f, stream);
    if (e == cudaSuccess && p.dq.data)
        e = fa_bwd_post_launch(&p, f->dtype, f->D, stream);
    return e == cudaSuccess ? FA_OK : fa_sm90_refuse(err, f->name, cudaGetErrorString(e));
}
