/* The families of Hopper's own kernels. */
#include "../cuda.h"
#include "../tile/tile_seq.cuh"
#include "bwd_sm90.h"
#include "fwd_sm90.h"

static bool runs_on_hopper(int major)
{
    return major == 9;
}

static bool kernel_of(const fa_sm90_instance *f, fa_kernel_info *info)
{
    if (f) {
        info->name = f->name;
        info->dtype = f->dtype;
    }
    return f != NULL;
}

static void plan_instance(const fa_args *a, const fa_sm90_instance *f, fa_plan *p)
{
    p->kernel = f->name;
    p->block_rows = f->BM;
    p->block_keys = f->BN;
    p->panels = fa_ceil_div(a->q.size[2], f->BM);
    p->stages = f->stages;
    p->threads = f->threads;
    p->thread_bytes = (size_t)f->shared_bytes;
    p->splits = 1;
    p->split_keys = a->k.size[2];
    p->why_splits = "the keys stay whole";
}

/* ---- forward ----------------------------------------------------------------------------------------------------- */

static bool kernel_forward(int i, fa_kernel_info *info)
{
    return kernel_of(fa_fwd_sm90_instance_at(i), info);
}

static bool can_forward(const fa_args *a, int device)
{
    (void)device;
    return fa_fwd_sm90_can(a);
}

static void plan_forward(const fa_args *a, int device, fa_plan *p)
{
    (void)device;
    plan_instance(a, fa_fwd_sm90_choose(a), p);
    p->tasks = fa_tile_slots(&a->cu_q, a->q.size[0], a->q.size[2], p->block_rows) * a->q.size[1];
    p->shared_bytes = fa_fwd_sm90_workspace(a);
    p->why = a->q.dtype == FA_F32 ? "float32 on Hopper: wgmma on two parts of fp16, split by warps with that role"
             : fa_fwd_sm90_is_plain(a)
                 ? "a plain call on Hopper: wgmma, K and V by the copy engine, warps with roles of their own"
                 : "Hopper: wgmma, K and V by the copy engine; masks are fetched beside the products";
}

static fa_status launch_forward(const fa_args *a, const fa_plan *plan, void *workspace, cudaStream_t stream,
                                fa_error *err)
{
    (void)plan;
    return fa_fwd_sm90_launch(a, workspace, stream, err);
}

/* ---- backward ---------------------------------------------------------------------------------------------------- */

static bool kernel_backward(int i, fa_kernel_info *info)
{
    return kernel_of(fa_bwd_sm90_instance_at(i), info);
}

static bool can_backward(const fa_args *a, int device)
{
    (void)device;
    return fa_bwd_sm90_can(a);
}

static void plan_backward(const fa_args *a, int device, fa_plan *p)
{
    (void)device;
    plan_instance(a, fa_bwd_sm90_choose(a), p);
    p->tasks = fa_ceil_div(a->k.size[2], p->block_keys) * a->q.size[0] * a->k.size[1];
    p->shared_bytes = fa_bwd_sm90_workspace(a);
    p->why = "Hopper: keys stay, wgmma; the parts of dQ are added in a fixed order";
}

static fa_status launch_backward(const fa_args *a, const fa_plan *plan, void *workspace, cudaStream_t stream,
                                 fa_error *err)
{
    (void)plan;
    return fa_bwd_sm90_launch(a, workspace, stream, err);
}

const fa_cuda_family fa_fwd_sm90 = {.target = "sm90", .runs_on = runs_on_hopper,
                                    .kernel = kernel_forward, .can = can_forward, .plan = plan_forward,
                                    .launch = launch_forward};
const fa_cuda_family fa_bwd_sm90 = {.target = "sm90", .runs_on = runs_on_hopper,
                                    .kernel = kernel_backward, .can = can_backward, .plan = plan_backward,
                                    .launch = launch_backward};
