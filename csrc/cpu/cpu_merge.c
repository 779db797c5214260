/* Two results of attention over disjoint keys become that over all of them: a mean of the rows, weighted by the sums of
 * exponentials that the log-sum-exps stand for. */
#include <math.h>
#include <stdatomic.h>

#include "cpu_row.h"

enum { ROWS_A_TASK = 64, ELEMENTS_A_WORKER = 1 << 15 };

/* ---- one row ----------------------------------------------------------------------------------------------------- */

typedef struct weights {
    double a, b, lse; /* a + b = 1, or both 0 where neither part takes part */
} weights;

/* Of the larger log-sum-exp the weight is 1 / (1 + e^-difference): nothing overflows. */
static weights weigh(double a, double b)
{
    if (a == -INFINITY && b == -INFINITY)
        return (weights){0, 0, -INFINITY};
    if (a == -INFINITY)
        return (weights){0, 1, b};
    if (b == -INFINITY)
        return (weights){1, 0, a};
    const double small = exp(a > b ? b - a : a - b), large = 1 / (1 + small);
    return (weights){a > b ? large : small * large, a > b ? small * large : large, (a > b ? a : b) + log1p(small)};
}

static char *row_at(const fa_tensor *t, const int64_t at[3])
{
    int64_t offset = at[0] * t->stride[0] + at[1] * t->stride[1] + at[2] * t->stride[2];
    return (char *)t->data + offset * (int64_t)fa_dtype_size(t->dtype);
}

static void mix_f64(const fa_merge_args *a, const int64_t at[3], weights w)
{
    const double *x = (void *)row_at(&a->out_a, at), *y = (void *)row_at(&a->out_b, at);
    double *out = (void *)row_at(&a->out, at);
    for (int64_t d = 0; d < a->out.size[3]; d++) {
        double sum = w.a != 0 ? w.a * x[d * a->out_a.stride[3]] : 0;
        out[d * a->out.stride[3]] = w.b != 0 ? sum + w.b * y[d * a->out_b.stride[3]] : sum;
    }
}

/* A part of weight 0 is not read into the sum: it may hold NaN. */
static void mix(const fa_merge_args *a, const int64_t at[3], weights w)
{
    const int64_t n = a->out.size[3];
    const float wa = (float)w.a, wb = (float)w.b;
    float x[FA_MAX_HEAD_DIM], y[FA_MAX_HEAD_DIM];
    memset(x, 0, sizeof x);
    if (w.a != 0) {
        fa_row_load(x, row_at(&a->out_a, at), a->out_a.dtype, a->out_a.stride[3], n);
        for (int64_t d = 0; d < n; d++)
            x[d] *= wa;
    }
    if (w.b != 0) {
        fa_row_load(y, row_at(&a->out_b, at), a->out_b.dtype, a->out_b.stride[3], n);
        for (int64_t d = 0; d < n; d++)
            x[d] += wb * y[d];
    }
    fa_row_store(row_at(&a->out, at), a->out.dtype, a->out.stride[3], x, n);
}

static void merge_row(const fa_merge_args *a, int64_t row)
{
    const int64_t *size = a->out.size;
    const int64_t at[3] = {row / size[2] / size[1], row / size[2] % size[1], row % size[2]};
    const weights w = weigh(fa_load(row_at(&a->lse_a, at), a->lse_a.dtype, 0),
                            fa_load(row_at(&a->lse_b, at), a->lse_b.dtype, 0));
    fa_store(row_at(&a->lse, at), a->lse.dtype, 0, w.lse);
    if (a->out.dtype == FA_F64)
        mix_f64(a, at, w);
    else
        mix(a, at, w);
}

/* ---- workers ----------------------------------------------------------------------------------------------------- */

typedef struct job {
    const fa_merge_args *a;
    int64_t rows;
    _Atomic int64_t next;
} job;

static void work(void *ctx, int worker)
{
    job *j = ctx;
    int64_t first;
    (void)worker;
    while ((first = atomic_fetch_add_explicit(&j->next, ROWS_A_TASK, memory_order_relaxed)) < j->rows)
        for (int64_t row = first; row < first + ROWS_A_TASK && row < j->rows; row++)
            merge_row(j->a, row);
}

fa_status fa_run_merge(const fa_merge_args *a, int num_threads, const fa_exec *exec, fa_error *err)
{
    (void)err;
    job j = {.a = a, .rows = a->out.size[0] * a->out.size[1] * a->out.size[2]};
    int64_t workers = 1 + j.rows * a->out.size[3] / ELEMENTS_A_WORKER;
    workers = workers < num_threads ? workers : num_threads;
    if (workers > 1 && exec->parallel)
        exec->parallel(exec->pool, (int)workers, work, &j);
    else
        work(&j, 0);
    return FA_OK;
}
