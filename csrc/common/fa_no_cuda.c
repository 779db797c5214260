/* What fa_cuda_* answer in a build without CUDA. */
#include <stdio.h>

#include "../fa.h"

int fa_cuda_devices(void)
{
    return 0;
}

int fa_cuda_kernels(fa_kernel_info *list, int n)
{
    (void)list, (void)n;
    return 0;
}

void fa_cuda_plan_forward(const fa_args *a, fa_plan *plan)
{
    (void)a;
    *plan = (fa_plan){.kernel = "none", .kind = FA_KERNEL_CUDA, .why = "built without CUDA", .why_splits = "none"};
}

void fa_cuda_plan_backward(const fa_args *a, fa_plan *plan)
{
    fa_cuda_plan_forward(a, plan);
}

static fa_status no_cuda(fa_error *err)
{
    snprintf(err->text, sizeof err->text, "this build has no CUDA kernels: every tensor must be on cpu");
    return FA_ERR_UNSUPPORTED;
}

fa_status fa_cuda_run(const fa_args *a, const fa_plan *plan, const fa_exec *exec, fa_error *err)
{
    (void)a, (void)plan, (void)exec;
    return no_cuda(err);
}

int fa_cuda_launches(const fa_args *a, const fa_plan *plan, fa_cuda_launch *list, int n, fa_error *err)
{
    (void)a, (void)plan, (void)list, (void)n;
    no_cuda(err);
    return -1;
}

fa_status fa_cuda_run_append(const fa_append_args *a, const fa_exec *exec, fa_error *err)
{
    (void)a, (void)exec;
    return no_cuda(err);
}

fa_status fa_cuda_run_merge(const fa_merge_args *a, int device, const fa_exec *exec, fa_error *err)
{
    (void)a, (void)device, (void)exec;
    return no_cuda(err);
}

fa_status fa_cuda_read(void *to, const void *from, size_t bytes, fa_error *err)
{
    (void)to, (void)from, (void)bytes;
    return no_cuda(err);
}
