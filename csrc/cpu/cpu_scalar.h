/* What the scalar kernels share: where elements are, the score of one (query, key) pair, and which pairs exist.
 *
 * These kernels are the definition the vector kernels are checked against, and the only ones for float64. All
 * arithmetic is in double; results are rounded once. They keep O(D) numbers, never a row of scores. */
#ifndef FA_CPU_SCALAR_H
#define FA_CPU_SCALAR_H

#include <math.h>

#include "../common/fa_philox.h"
#include "../common/fa_sequence.h"
#include "cpu_ops.h"

/* Bodies take the dtype as an argument and are inlined with a constant, so that no element pays for a switch. */
#define FA_SCALAR_BODY static inline __attribute__((always_inline))

/* What plan.c gives a worker of these kernels; backward keeps a row of K, V, dK and dV in it. */
_Static_assert(4 * FA_MAX_HEAD_DIM * sizeof(double) <= 16384, "four rows of doubles must fit the scratch");

void fa_cpu_ops_scalar_bwd(fa_cpu_ops *ops); /* fa_cpu_ops_scalar calls it for the entries of cpu_scalar_bwd.c */

/* Parallel units of ops->dmask for this mask. */
int64_t fa_dmask_tasks(const fa_args *a);
/* Gradient of the sinks of one query head, all sequences of the batch; needs only sinks, out, lse, dout and dlse, and
 * serves every instruction set. No other call writes the same elements. */
void fa_dsinks(const fa_args *a, int64_t h);

/* (b, h, i, 0) of a tensor; an index into a size of 1 is broadcast */
static inline int64_t fa_row_at(const fa_tensor *t, int64_t b, int64_t h, int64_t i)
{
    return (t->size[0] == 1 ? 0 : b * t->stride[0]) + (t->size[1] == 1 ? 0 : h * t->stride[1]) +
           (t->size[2] == 1 ? 0 : i * t->stride[2]);
}

/* One query head of one sequence. */
typedef struct fa_scalar_head {
    const fa_args *a;
    int64_t b, h, hk; /* hk: the key/value head it reads */
    fa_span span;
    double alibi;     /* slope, 0 without ALiBi */
    double sink;      /* -inf without a sink */
    uint32_t threshold;
    double keep_scale; /* fa_dropout_factor */
} fa_scalar_head;

static inline fa_scalar_head fa_scalar_head_at(const fa_args *a, int64_t b, int64_t h)
{
    fa_scalar_head head = {
        .a = a,
        .b = b,
        .h = h,
        .hk = h / (a->q.size[1] / a->k.size[1]),
        .span = fa_span_at(a, b),
        .alibi = a->alibi.data ? fa_load(a->alibi.data, a->alibi.dtype, fa_row_at(&a->alibi, b, h, 0)) : 0,
        .sink = a->sinks.data ? fa_load(a->sinks.data, a->sinks.dtype, fa_row_at(&a->sinks, b, h, 0)) : -INFINITY,
        .threshold = fa_dropout_threshold(a->dropout_p),
        .keep_scale = fa_dropout_factor(a->dropout_p),
    };
    return head;
}

static inline int64_t fa_mask_at(const fa_tensor *mask, int64_t b, int64_t h, int64_t i, int64_t j)
{
    return fa_row_at(mask, b, h, i) + (mask->size[3] == 1 ? 0 : j * mask->stride[3]);
}

/* A key hidden by a bool mask is skipped before its K or V is read: they may hold NaN. */
static inline bool fa_scalar_hidden(const fa_scalar_head *head, int64_t i, int64_t j)
{
    const fa_tensor *mask = &head->a->mask;
    return mask->data && mask->dtype == FA_BOOL &&
           j >= head->a->mask_first &&
           !((const uint8_t *)mask->data)[fa_mask_at(mask, head->b, head->h, i, j - head->a->mask_first)];
}

typedef struct fa_scalar_score {
    double value; /* enters the softmax */
    double slope; /* d value / d (q . k) = scale * (1 - tanh^2) */
} fa_scalar_score;

static inline fa_scalar_score fa_scalar_score_of(const fa_scalar_head *head, int64_t i, int64_t j, double dot)
{
    const fa_args *a = head->a;
    fa_scalar_score s = {a->scale * dot, a->scale};
    if (a->softcap > 0) {
        double t = tanh(s.value / a->softcap);
        s.value = a->softcap * t;
        s.slope *= 1 - t * t;
    }
    if (a->mask.data && a->mask.dtype != FA_BOOL)
        s.value += fa_load(a->mask.data, a->mask.dtype, fa_mask_at(&a->mask, head->b, head->h, i, j));
    if (a->alibi.data)
        s.value -= head->alibi * fabs((double)(i + head->span.offset - j));
    return s;
}

/* What dropout makes of a weight: times fa_dropout_factor when kept, else 0. */
static inline double fa_scalar_dropout(const fa_scalar_head *head, int64_t i, int64_t j)
{
    const fa_args *a = head->a;
    if (a->dropout_p == 0)
        return 1;
    const int64_t bh = (a->first_batch + head->b) * a->q.size[1] + head->h;
    return a->dropout_p < 1 && fa_dropout_keep(a->dropout_seed, head->threshold, bh, i, j) ? head->keep_scale : 0;
}

/* ---- rows of D or DV elements, `at` and `step` in elements ------------------------------------------------------- */

FA_SCALAR_BODY double fa_scalar_dot_step(const double *x, const void *y, int64_t at, int64_t step, int64_t n,
                                         fa_dtype T)
{
    double sum[4] = {0}; /* four chains: one would wait for the addition before */
    int64_t d = 0;
    for (; d + 4 <= n; d += 4)
        for (int lane = 0; lane < 4; lane++)
            sum[lane] += x[d + lane] * fa_load(y, T, at + (d + lane) * step);
    for (; d < n; d++)
        sum[0] += x[d] * fa_load(y, T, at + d * step);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

FA_SCALAR_BODY double fa_scalar_dot(const double *x, const void *y, int64_t at, int64_t step, int64_t n, fa_dtype T)
{
    return step == 1 ? fa_scalar_dot_step(x, y, at, 1, n, T) : fa_scalar_dot_step(x, y, at, step, n, T);
}

FA_SCALAR_BODY void fa_scalar_add_step(double *sum, double w, const void *y, int64_t at, int64_t step, int64_t n,
                                       fa_dtype T)
{
    for (int64_t d = 0; d < n; d++)
        sum[d] += w * fa_load(y, T, at + d * step);
}

/* sum += w * y */
FA_SCALAR_BODY void fa_scalar_add(double *sum, double w, const void *y, int64_t at, int64_t step, int64_t n, fa_dtype T)
{
    if (step == 1)
        fa_scalar_add_step(sum, w, y, at, 1, n, T);
    else
        fa_scalar_add_step(sum, w, y, at, step, n, T);
}

FA_SCALAR_BODY void fa_scalar_read(double *row, const void *y, int64_t at, int64_t step, int64_t n, fa_dtype T)
{
    for (int64_t d = 0; d < n; d++)
        row[d] = fa_load(y, T, at + d * step);
}

FA_SCALAR_BODY void fa_scalar_write(void *y, int64_t at, int64_t step, const double *row, int64_t n, fa_dtype T)
{
    for (int64_t d = 0; d < n; d++)
        fa_store(y, T, at + d * step, row[d]);
}

#endif
