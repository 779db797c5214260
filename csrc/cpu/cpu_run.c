/* The one place that runs a plan on the CPU: chooses the kernel, hands out tasks, merges split keys. */
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "../common/fa_sequence.h"
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

static fa_target backward_target(const fa_args *a, const fa_cpu_ops *ops, fa_task_fn **run)
{
    fa_dtype t = a->q.dtype;
    *run = ops->bwd[t].run;
    return target_of(ops, &ops->bwd[t], t, is_scalar(ops, t) ? FA_KERNEL_SCALAR : FA_KERNEL_PANEL);
}

/* ---- calls: the whole batch is one, or each of its sequences ------------------------------------------------------- */

enum { ROWS_A_TASK = 64 };

/* What is planned and run as one: with by_sequence a sequence, else the whole call. */
typedef struct fa_part {
    fa_target target;
    fa_plan plan;
    fa_task_fn *run;
    size_t shared;      /* where its part of the shared scratch begins */
    int64_t first_task; /* of the pass under way */
} fa_part;

static int64_t parts_of(const fa_args *a)
{
    return a->by_sequence ? fa_sequences(a) : 1;
}

/* The call of part n; storage holds it where it is a sequence. */
static const fa_args *part_args(const fa_args *a, int64_t n, fa_args *storage)
{
    if (!a->by_sequence)
        return a;
    fa_make_sequence(a, n, storage);
    return storage;
}

static fa_part part_plan(const fa_args *a, const fa_cpu_ops *ops, bool forward, int num_threads)
{
    fa_part p = {.shared = 0};
    if (forward) {
        p.target = forward_target(a, ops, &p.run);
        fa_plan_forward_on(a, &p.target, num_threads, &p.plan);
    } else {
        p.target = backward_target(a, ops, &p.run);
        fa_plan_backward_on(a, &p.target, num_threads, &p.plan);
    }
    return p;
}

/* Plans all parts; keeps them in `parts` unless that is NULL. */
static void plan_parts(const fa_args *a, bool forward, int num_threads, fa_plan *plan, fa_part *parts)
{
    fa_cpu_ops ops;
    fa_args storage;
    fa_cpu_ops_init(&ops, fa_cpu_enabled());
    int64_t n = parts_of(a);
    if (!a->by_sequence) {
        fa_part whole = part_plan(a, &ops, forward, num_threads);
        *plan = whole.plan;
        if (parts)
            parts[0] = whole;
        return;
    }
    *plan = (fa_plan){.kernel = "none", .splits = 1, .why = "no sequences", .why_splits = "no sequences",
                      .shared_bytes = (size_t)fa_round_up(n * (int64_t)sizeof(fa_part), 64)};
    double most = -1;
    for (int64_t i = 0; i < n; i++) {
        fa_part part = part_plan(part_args(a, i, &storage), &ops, forward, num_threads);
        part.shared = plan->shared_bytes;
        if (part.plan.flops + part.plan.bytes > most) { /* the report shows the largest */
            fa_plan sums = *plan;
            most = part.plan.flops + part.plan.bytes;
            *plan = part.plan;
            plan->tasks = sums.tasks, plan->flops = sums.flops, plan->bytes = sums.bytes;
            plan->thread_bytes = sums.thread_bytes, plan->shared_bytes = sums.shared_bytes;
        }
        plan->tasks += part.plan.tasks;
        plan->flops += part.plan.flops;
        plan->bytes += part.plan.bytes;
        plan->shared_bytes += part.plan.shared_bytes;
        if (part.plan.thread_bytes > plan->thread_bytes)
            plan->thread_bytes = part.plan.thread_bytes;
        if (parts)
            parts[i] = part;
    }
    fa_plan_finish(plan, num_threads);
}

void fa_plan_forward(const fa_args *a, int num_threads, fa_plan *plan)
{
    plan_parts(a, true, num_threads, plan, NULL);
}

void fa_plan_backward(const fa_args *a, int num_threads, fa_plan *plan)
{
    plan_parts(a, false, num_threads, plan, NULL);
}

/* ---- workers --------------------------------------------------------------------------------------------------- */

/* A call under way. */
typedef struct fa_job {
    const fa_args *a;
    const fa_plan *plan;
    const fa_exec *exec;
    char *shared, *scratch;
    fa_cpu_ops ops;
    int64_t count;
    fa_part *parts;
    fa_part one;
} fa_job;

/* One task of a pass: of part p, whose call is a. */
typedef void fa_step_fn(const fa_job *job, const fa_part *p, const fa_args *a, int64_t task, char *scratch,
                        char *shared);

/* One parallel pass: workers draw tasks from a counter, in increasing order, until none is left. */
typedef struct fa_pass {
    const fa_job *job;
    fa_step_fn *step;
    bool whole; /* tasks of the whole call, not of its parts */
    int64_t tasks;
    _Atomic int64_t next;
} fa_pass;

/* the last part whose first task is at most `task`: parts without tasks share theirs with the next */
static const fa_part *part_of(const fa_job *job, int64_t task)
{
    int64_t lo = 0, hi = job->count;
    while (hi - lo > 1) {
        int64_t mid = lo + (hi - lo) / 2;
        if (job->parts[mid].first_task <= task)
            lo = mid;
        else
            hi = mid;
    }
    return &job->parts[lo];
}

static void work(void *ctx, int worker)
{
    fa_pass *pass = ctx;
    const fa_job *job = pass->job;
    char *scratch = job->scratch + (size_t)worker * job->plan->thread_bytes;
    fa_args storage;
    int64_t task;
    while ((task = atomic_fetch_add_explicit(&pass->next, 1, memory_order_relaxed)) < pass->tasks) {
        if (pass->whole) {
            pass->step(job, NULL, job->a, task, scratch, job->shared);
            continue;
        }
        const fa_part *p = part_of(job, task);
        pass->step(job, p, part_args(job->a, p - job->parts, &storage), task - p->first_task, scratch,
                   job->shared + p->shared);
    }
}

static void run_tasks(fa_pass *pass)
{
    const fa_exec *exec = pass->job->exec;
    int64_t workers = fa_min64(pass->job->plan->threads, pass->tasks);
    atomic_store(&pass->next, 0);
    if (workers > 1 && exec->parallel)
        exec->parallel(exec->pool, (int)workers, work, pass);
    else if (workers > 0)
        work(pass, 0);
}

typedef int64_t fa_count_fn(const fa_job *job, int64_t part);

/* Runs the tasks of every part, count of each. Counts that do without the part's call leave it unmade. */
static void run_pass(fa_job *job, fa_step_fn *step, fa_count_fn *count)
{
    fa_pass pass = {.job = job, .step = step};
    for (int64_t i = 0; i < job->count; i++) {
        job->parts[i].first_task = pass.tasks;
        pass.tasks += count(job, i);
    }
    run_tasks(&pass);
}

static int64_t main_tasks(const fa_job *job, int64_t part)
{
    return job->parts[part].plan.tasks;
}

static void main_step(const fa_job *job, const fa_part *p, const fa_args *a, int64_t task, char *scratch, char *shared)
{
    (void)job;
    p->run(a, &p->plan, task, scratch, shared);
}

static int64_t row_tasks(const fa_job *job, int64_t part)
{
    fa_args storage;
    const fa_args *a = part_args(job->a, part, &storage);
    return fa_ceil_div(a->q.size[0] * a->q.size[1] * a->q.size[2], ROWS_A_TASK);
}

static char *aligned(void *p)
{
    return (char *)(((uintptr_t)p + 63) & ~(uintptr_t)63);
}

/* The plan fits one kernel: between plan and run the environment may have changed. */
static fa_status job_begin(fa_job *job, const fa_args *a, bool forward, const fa_plan *plan, const fa_exec *exec,
                           fa_error *err)
{
    size_t needed = plan->workspace, table = (size_t)parts_of(a) * sizeof(fa_part) + 64;
    if (a->by_sequence && needed < table)
        needed = table;
    if (!exec->workspace || exec->workspace_size < needed) {
        snprintf(err->text, sizeof err->text, "workspace of %zu bytes; the plan needs %zu",
                 exec->workspace ? exec->workspace_size : (size_t)0, needed);
        return FA_ERR_WORKSPACE;
    }
    char *shared = aligned(exec->workspace);
    *job = (fa_job){.a = a, .plan = plan, .exec = exec, .shared = shared, .scratch = shared + plan->shared_bytes,
                    .count = parts_of(a)};
    job->parts = a->by_sequence ? (fa_part *)(void *)shared : &job->one;
    fa_cpu_ops_init(&job->ops, fa_cpu_enabled());
    fa_plan now;
    plan_parts(a, forward, plan->num_threads, &now, job->parts);
    if (strcmp(plan->kernel, now.kernel) || plan->workspace != now.workspace) {
        snprintf(err->text, sizeof err->text, "the plan is for kernel %s; now enabled is %s: plan again", plan->kernel,
                 now.kernel);
        return FA_ERR_UNSUPPORTED;
    }
    return FA_OK;
}

/* Rows first .. of a packed tensor belong to no sequence. */
static void clear_rows(const fa_tensor *t, int64_t first, double value)
{
    if (!t->data)
        return;
    size_t size = fa_dtype_size(t->dtype);
    for (int64_t h = 0; h < t->size[1]; h++)
        for (int64_t i = first; i < t->size[2]; i++) {
            int64_t at = h * t->stride[1] + i * t->stride[2];
            if (value == 0 && t->stride[3] == 1)
                memset((char *)t->data + at * (int64_t)size, 0, (size_t)t->size[3] * size);
            else
                for (int64_t d = 0; d < t->size[3]; d++)
                    fa_store(t->data, t->dtype, at + d * t->stride[3], value);
        }
}

static int64_t packed_rows(const fa_tensor *cu, const fa_tensor *t)
{
    return cu->data ? fa_index_at(cu, (cu->size[0] - 1) * cu->stride[0]) : t->size[2];
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

static int64_t merge_tasks(const fa_job *job, int64_t part)
{
    return job->parts[part].plan.splits > 1 ? row_tasks(job, part) : 0;
}

static void merge_step(const fa_job *job, const fa_part *p, const fa_args *a, int64_t task, char *scratch, char *shared)
{
    (void)job, (void)scratch;
    int64_t rows = a->q.size[0] * a->q.size[1] * a->q.size[2], each = fa_partial_floats(a->v.size[3]);
    int64_t last = fa_min64((task + 1) * ROWS_A_TASK, rows);
    for (int64_t row = task * ROWS_A_TASK; row < last; row++)
        merge_row(a, (const float *)(const void *)shared + row * each, rows * each, p->plan.splits, row);
}

fa_status fa_run_forward(const fa_args *a, const fa_plan *plan, const fa_exec *exec, fa_error *err)
{
    fa_job job;
    fa_status status = job_begin(&job, a, true, plan, exec, err);
    if (status)
        return status;
    run_pass(&job, main_step, main_tasks);
    run_pass(&job, merge_step, merge_tasks);
    clear_rows(&a->out, packed_rows(&a->cu_q, &a->q), 0);
    clear_rows(&a->lse, packed_rows(&a->cu_q, &a->q), -INFINITY);
    return FA_OK;
}

/* ---- backward ---------------------------------------------------------------------------------------------------- */

static void rows_step(fa_rows_fn *rows, const fa_args *a, int64_t task, char *shared)
{
    int64_t all = a->q.size[0] * a->q.size[1] * a->q.size[2];
    rows(a, shared, task * ROWS_A_TASK, fa_min64((task + 1) * ROWS_A_TASK, all));
}

static void pre_step(const fa_job *job, const fa_part *p, const fa_args *a, int64_t task, char *scratch, char *shared)
{
    (void)p, (void)scratch;
    rows_step(job->ops.bwd_pre[a->q.dtype], a, task, shared);
}

static void post_step(const fa_job *job, const fa_part *p, const fa_args *a, int64_t task, char *scratch, char *shared)
{
    (void)p, (void)scratch;
    rows_step(job->ops.bwd_post[a->q.dtype], a, task, shared);
}

static int64_t post_tasks(const fa_job *job, int64_t part)
{
    fa_args storage;
    const fa_args *a = part_args(job->a, part, &storage);
    return fa_bwd_shared_of(a, &job->parts[part].target).dq_direct ? 0 : row_tasks(job, part);
}

static int64_t dmask_tasks(const fa_job *job, int64_t part)
{
    fa_args storage;
    const fa_args *a = part_args(job->a, part, &storage);
    return job->parts[part].target.kind == FA_KERNEL_SCALAR ? fa_dmask_tasks(a) : fa_dmask_tiles(a, job->ops.panel_rows);
}

static void dmask_step(const fa_job *job, const fa_part *p, const fa_args *a, int64_t task, char *scratch, char *shared)
{
    job->ops.dmask[a->q.dtype].run(a, &p->plan, task, scratch, shared);
}

static void dsinks_step(const fa_job *job, const fa_part *p, const fa_args *a, int64_t task, char *scratch,
                        char *shared)
{
    (void)job, (void)p, (void)scratch, (void)shared;
    fa_dsinks(a, task); /* of packed sequences too: it needs each row's log-sum-exp only */
}

/* No row has been counted yet: all turns begin at 0. */
static void clear_turns(const fa_job *job)
{
    fa_args storage;
    for (int64_t i = 0; i < job->count; i++) {
        fa_bwd_shared at = fa_bwd_shared_of(part_args(job->a, i, &storage), &job->parts[i].target);
        memset(job->shared + job->parts[i].shared + at.turn, 0, at.dq - at.turn);
    }
}

fa_status fa_run_backward(const fa_args *a, const fa_plan *plan, const fa_exec *exec, fa_error *err)
{
    fa_job job;
    fa_status status = job_begin(&job, a, false, plan, exec, err);
    if (status)
        return status;
    bool scalar = is_scalar(&job.ops, a->q.dtype), wants_tensors = a->dq.data || a->dk.data || a->dv.data;
    if (!scalar && (wants_tensors || a->dmask.data)) {
        clear_turns(&job);
        run_pass(&job, pre_step, row_tasks);
    }
    if (wants_tensors)
        run_pass(&job, main_step, main_tasks);
    if (!scalar && a->dq.data)
        run_pass(&job, post_step, post_tasks);
    if (a->dmask.data)
        run_pass(&job, dmask_step, dmask_tasks);
    if (a->dsinks.data) {
        fa_pass heads = {.job = &job, .step = dsinks_step, .whole = true, .tasks = a->q.size[1]};
        run_tasks(&heads);
    }
    clear_rows(&a->dq, packed_rows(&a->cu_q, &a->q), 0);
    clear_rows(&a->dk, packed_rows(&a->cu_k, &a->k), 0);
    clear_rows(&a->dv, packed_rows(&a->cu_k, &a->k), 0);
    return FA_OK;
}
