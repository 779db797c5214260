/* The one place that runs a plan on the CPU: chooses the kernel, hands out tasks, merges split keys. */
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "cpu_finish.h"
#include "cpu_ops.h"
#include "cpu_scalar.h"

static fa_target target_of(const fa_cpu_ops *ops, const fa_cpu_kernel *kernel, fa_dtype t, fa_kernel_kind kind)
{
    return (fa_target){.name = kernel->name, .kind = kind, .lanes = ops->lanes, .panel_rows = ops->panel_rows,
                       .key_block = kind == FA_KERNEL_ROWS ? FA_ROWS_KEY_BLOCK : FA_KEY_BLOCK,
                       .pair_units = ops->pair_units[t]};
}

static bool is_scalar(const fa_cpu_ops *ops, fa_dtype t)
{
    return ops->panel_rows == 1 || t == FA_F64;
}

/* Can the rows kernel run it? Whether it should is settled by the number of rows alone: it reads K and V once, at the
 * speed of memory, and leaves most lanes of a panel kernel's tile to waste. */
static bool rows_kernel_can(const fa_args *a, const fa_cpu_ops *ops)
{
    return ops->decode[a->k.dtype].run && !is_scalar(ops, a->q.dtype) && a->dropout_p == 0 &&
           a->k.stride[3] == 1 && a->v.stride[3] == 1 &&
           fa_group(a) * a->q.size[2] <= FA_ROWS_MAX;
}

static fa_target forward_target(const fa_args *a, const fa_cpu_ops *ops, fa_task_fn **run)
{
    fa_dtype t = a->q.dtype;
    fa_kernel_kind kind = is_scalar(ops, t)          ? FA_KERNEL_SCALAR
                          : rows_kernel_can(a, ops) ? FA_KERNEL_ROWS
                                                    : FA_KERNEL_PANEL;
    const fa_cpu_kernel *kernel = kind == FA_KERNEL_ROWS ? &ops->decode[a->k.dtype] : &ops->fwd[t];
    *run = kernel->run;
    return target_of(ops, kernel, t, kind);
}

static fa_target backward_target(const fa_args *a, const fa_cpu_ops *ops)
{
    fa_dtype t = a->q.dtype;
    return target_of(ops, &ops->bwd[t], t, is_scalar(ops, t) ? FA_KERNEL_SCALAR : FA_KERNEL_PANEL);
}

void fa_plan_forward(const fa_args *a, int num_threads, fa_plan *plan)
{
    fa_cpu_ops ops;
    fa_task_fn *run;
    fa_cpu_ops_init(&ops, fa_cpu_enabled());
    fa_target target = forward_target(a, &ops, &run);
    fa_plan_forward_on(a, &target, num_threads, plan);
}

void fa_plan_backward(const fa_args *a, int num_threads, fa_plan *plan)
{
    fa_cpu_ops ops;
    fa_cpu_ops_init(&ops, fa_cpu_enabled());
    fa_target target = backward_target(a, &ops);
    fa_plan_backward_on(a, &target, num_threads, plan);
}

/* ---- workers --------------------------------------------------------------------------------------------------- */

/* One parallel pass: workers draw tasks from a counter, in increasing order, until none is left. */
typedef struct pass {
    const fa_args *a;
    const fa_plan *plan;
    char *shared, *scratch;
    int64_t tasks;
    _Atomic int64_t next;
    /* one of these */
    fa_task_fn *run;
    fa_rows_fn *rows; /* task: a block of ROWS_A_TASK rows */
    void (*head)(const fa_args *a, int64_t h);
} pass;

enum { ROWS_A_TASK = 64 };

static void work(void *ctx, int worker)
{
    pass *p = ctx;
    char *scratch = p->scratch + (size_t)worker * p->plan->thread_bytes;
    int64_t rows = p->a->q.size[0] * p->a->q.size[1] * p->a->q.size[2], task;
    while ((task = atomic_fetch_add_explicit(&p->next, 1, memory_order_relaxed)) < p->tasks) {
        if (p->run)
            p->run(p->a, p->plan, task, scratch, p->shared);
        else if (p->rows)
            p->rows(p->a, p->shared, task * ROWS_A_TASK, fa_min64((task + 1) * ROWS_A_TASK, rows));
        else
            p->head(p->a, task);
    }
}

static void run_pass(pass *p, const fa_exec *exec)
{
    int64_t workers = fa_min64(p->plan->threads, p->tasks);
    atomic_store(&p->next, 0);
    if (workers > 1 && exec->parallel)
        exec->parallel(exec->pool, (int)workers, work, p);
    else if (workers > 0)
        work(p, 0);
}

/* The plan fits one kernel: between plan and run the environment may have changed. */
static fa_status check_plan(const fa_target *target, const fa_plan *plan, const fa_exec *exec, fa_error *err)
{
    if (strcmp(plan->kernel, target->name)) {
        snprintf(err->text, sizeof err->text, "the plan is for kernel %s; now enabled is %s: plan again", plan->kernel,
                 target->name);
        return FA_ERR_UNSUPPORTED;
    }
    if (exec->workspace && exec->workspace_size >= plan->workspace)
        return FA_OK;
    snprintf(err->text, sizeof err->text, "workspace of %zu bytes; the plan needs %zu",
             exec->workspace ? exec->workspace_size : (size_t)0, plan->workspace);
    return FA_ERR_WORKSPACE;
}

static char *aligned(void *p)
{
    return (char *)(((uintptr_t)p + 63) & ~(uintptr_t)63);
}

static pass pass_of(const fa_args *a, const fa_plan *plan, const fa_exec *exec)
{
    char *shared = aligned(exec->workspace);
    return (pass){.a = a, .plan = plan, .shared = shared, .scratch = shared + plan->shared_bytes};
}

/* ---- forward ----------------------------------------------------------------------------------------------------- */

/* Merges the parts of one row in the order of the keys: weights 2^(max_part - max). */
static void merge_row(const fa_args *a, const float *parts, int64_t part_step, int64_t splits, int64_t row)
{
    int64_t sq = a->q.size[2], hq = a->q.size[1], dv = a->v.size[3];
    int64_t q = row % sq, h = row / sq % hq, b = row / sq / hq;
    int64_t at = b * a->out.stride[0] + h * a->out.stride[1] + q * a->out.stride[2];
    char *out = (char *)a->out.data + at * (int64_t)fa_dtype_size(a->out.dtype);
    float top = -INFINITY, l = 0, sum[FA_MAX_HEAD_DIM] = {0};
    for (int64_t s = 0; s < splits; s++)
        top = parts[s * part_step] > top ? parts[s * part_step] : top;
    for (int64_t s = 0; s < splits; s++) {
        const float *p = parts + s * part_step;
        float w = top == -INFINITY ? 0 : exp2f(p[0] - top);
        l += w * p[1];
        for (int64_t d = 0; d < dv; d++)
            sum[d] += w * p[2 + d];
    }
    bool valid = q < fa_length_at(&a->q_seqlens, b, sq);
    fa_row_end end = {0, -INFINITY};
    if (valid)
        end = fa_finish_row(a, b, h, top, l);
    fa_store_lse(a, b, h, q, end.lse);
    for (int64_t d = 0; d < dv; d++)
        fa_store(out, a->out.dtype, d * a->out.stride[3], valid && a->dropout_p < 1 ? sum[d] * end.scale : 0);
}

static void merge_task(const fa_args *a, const fa_plan *plan, int64_t task, char *scratch, char *shared)
{
    (void)scratch;
    int64_t rows = a->q.size[0] * a->q.size[1] * a->q.size[2], each = fa_partial_floats(a->v.size[3]);
    int64_t last = fa_min64((task + 1) * ROWS_A_TASK, rows);
    for (int64_t row = task * ROWS_A_TASK; row < last; row++)
        merge_row(a, (const float *)(const void *)shared + row * each, rows * each, plan->splits, row);
}

fa_status fa_run_forward(const fa_args *a, const fa_plan *plan, const fa_exec *exec, fa_error *err)
{
    fa_cpu_ops ops;
    fa_cpu_ops_init(&ops, fa_cpu_enabled());
    fa_task_fn *run;
    fa_target target = forward_target(a, &ops, &run);
    fa_status status = check_plan(&target, plan, exec, err);
    if (status)
        return status;
    pass p = pass_of(a, plan, exec);
    p.run = run;
    p.tasks = plan->tasks;
    run_pass(&p, exec);
    if (plan->splits > 1) {
        p.run = merge_task;
        p.tasks = fa_ceil_div(a->q.size[0] * a->q.size[1] * a->q.size[2], ROWS_A_TASK);
        run_pass(&p, exec);
    }
    return FA_OK;
}

/* ---- backward ---------------------------------------------------------------------------------------------------- */

static void run_rows(pass *p, const fa_exec *exec, fa_rows_fn *rows)
{
    p->run = NULL;
    p->rows = rows;
    p->tasks = fa_ceil_div(p->a->q.size[0] * p->a->q.size[1] * p->a->q.size[2], ROWS_A_TASK);
    run_pass(p, exec);
    p->rows = NULL;
}

fa_status fa_run_backward(const fa_args *a, const fa_plan *plan, const fa_exec *exec, fa_error *err)
{
    fa_cpu_ops ops;
    fa_cpu_ops_init(&ops, fa_cpu_enabled());
    fa_dtype t = a->q.dtype;
    bool scalar = is_scalar(&ops, t), wants_tensors = a->dq.data || a->dk.data || a->dv.data;
    fa_target target = backward_target(a, &ops);
    fa_status status = check_plan(&target, plan, exec, err);
    if (status)
        return status;
    pass p = pass_of(a, plan, exec);
    if (!scalar && (wants_tensors || a->dmask.data)) {
        fa_bwd_shared shared = fa_bwd_shared_of(a, &target);
        memset(p.shared + shared.turn, 0, shared.dq - shared.turn);
        run_rows(&p, exec, ops.bwd_pre[t]);
    }
    if (wants_tensors) {
        p.run = ops.bwd[t].run;
        p.tasks = plan->tasks;
        run_pass(&p, exec);
        if (!scalar && a->dq.data && !fa_bwd_shared_of(a, &target).dq_direct)
            run_rows(&p, exec, ops.bwd_post[t]);
    }
    if (a->dmask.data) {
        p.run = ops.dmask[t].run;
        p.tasks = scalar ? fa_dmask_tasks(a) : fa_dmask_tiles(a, ops.panel_rows);
        run_pass(&p, exec);
    }
    if (a->dsinks.data) {
        p.run = NULL;
        p.head = fa_dsinks;
        p.tasks = a->q.size[1];
        run_pass(&p, exec);
    }
    return FA_OK;
}
