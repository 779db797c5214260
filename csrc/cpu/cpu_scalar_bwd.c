/* Backward, from the log-sum-exp of forward:
 *
 *   P_ij = exp(s_ij - lse_i)                     weights, recomputed
 *   R_ij = fa_dropout_factor(p) where dropout kept, or 0
 *   dV_j = sum_i R_ij P_ij dO_i
 *   dP_ij = R_ij dO_i . V_j
 *   delta_i = sum_j P_ij dP_ij - dlse_i = dO_i . O_i - dlse_i
 *   dS_ij = P_ij (dP_ij - delta_i)               gradient of the score, so also of the mask
 *   dQ_i = sum_j dS_ij slope_ij K_j,   dK_j = sum_i dS_ij slope_ij Q_i,   slope_ij = scale (1 - tanh^2)
 *   dsink = -sum_i exp(sink - lse_i) delta_i     a key whose V is 0 and whose score is the sink
 *
 * Each result is summed in double by one task in one order, and rounded once: dQ with the keys inside, dK and dV with
 * the queries inside. A row with lse = -inf saw nothing and is skipped, so that its dO is never read. */
#include "../plan/plan.h"
#include "cpu_scalar.h"

enum { MASK_BLOCK = 128 }; /* mask columns of one dmask task */

FA_SCALAR_BODY fa_dtype lse_dtype(fa_dtype T)
{
    return T == FA_F64 ? FA_F64 : FA_F32;
}

FA_SCALAR_BODY double lse_of(const fa_scalar_head *head, int64_t i, fa_dtype T)
{
    return fa_load(head->a->lse.data, lse_dtype(T), fa_row_at(&head->a->lse, head->b, head->h, i));
}

FA_SCALAR_BODY double delta_step(const fa_args *a, int64_t dout, int64_t dout_step, int64_t out, int64_t out_step,
                                 fa_dtype T)
{
    const int64_t n = a->v.size[3];
    double sum[4] = {0};
    int64_t d = 0;
    for (; d + 4 <= n; d += 4)
        for (int lane = 0; lane < 4; lane++)
            sum[lane] += fa_load(a->dout.data, T, dout + (d + lane) * dout_step) *
                         fa_load(a->out.data, T, out + (d + lane) * out_step);
    for (; d < n; d++)
        sum[0] += fa_load(a->dout.data, T, dout + d * dout_step) * fa_load(a->out.data, T, out + d * out_step);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

FA_SCALAR_BODY double delta_of(const fa_args *a, int64_t b, int64_t h, int64_t i, fa_dtype T)
{
    const int64_t dout = fa_row_at(&a->dout, b, h, i), out = fa_row_at(&a->out, b, h, i);
    double delta = a->dout.stride[3] == 1 && a->out.stride[3] == 1
                       ? delta_step(a, dout, 1, out, 1, T)
                       : delta_step(a, dout, a->dout.stride[3], out, a->out.stride[3], T);
    if (a->dlse.data)
        delta -= fa_load(a->dlse.data, lse_dtype(T), fa_row_at(&a->dlse, b, h, i));
    return delta;
}

/* ---- dQ: one query row against its keys -------------------------------------------------------------------------- */

typedef struct query_row {
    int64_t i;
    double lse, delta;
    const double *q, *dout;
} query_row;

/* dS_ij; *slope as in the head of this file. A hidden pair gives 0 and 0. */
FA_SCALAR_BODY double pair_gradient(const fa_scalar_head *head, const query_row *row, int64_t j, double *slope,
                                    fa_dtype T)
{
    const fa_args *a = head->a;
    *slope = 0;
    if (fa_scalar_hidden(head, row->i, j))
        return 0;
    double dot =
        fa_scalar_dot(row->q, a->k.data, fa_row_at(&a->k, head->b, head->hk, j), a->k.stride[3], a->k.size[3], T);
    fa_scalar_score s = fa_scalar_score_of(head, row->i, j, dot);
    if (s.value == -INFINITY)
        return 0;
    double kept = fa_scalar_dropout(head, row->i, j), dp = 0;
    if (kept != 0)
        dp = kept * fa_scalar_dot(row->dout, a->v.data, fa_row_at(&a->v, head->b, head->hk, j), a->v.stride[3],
                                  a->v.size[3], T);
    *slope = s.slope;
    return exp(s.value - row->lse) * (dp - row->delta);
}

FA_SCALAR_BODY query_row query_row_of(const fa_scalar_head *head, int64_t i, double *q, double *dout, fa_dtype T)
{
    const fa_args *a = head->a;
    fa_scalar_read(q, a->q.data, fa_row_at(&a->q, head->b, head->h, i), a->q.stride[3], a->q.size[3], T);
    fa_scalar_read(dout, a->dout.data, fa_row_at(&a->dout, head->b, head->h, i), a->dout.stride[3], a->v.size[3], T);
    return (query_row){i, lse_of(head, i, T), delta_of(a, head->b, head->h, i, T), q, dout};
}

FA_SCALAR_BODY void bwd_queries(const fa_scalar_head *head, double *scratch, fa_dtype T)
{
    const fa_args *a = head->a;
    const int64_t SQ = a->q.size[2], D = a->q.size[3];
    double *q = scratch, *dout = q + FA_MAX_HEAD_DIM, *dq = dout + FA_MAX_HEAD_DIM;
    for (int64_t i = 0; i < SQ; i++) {
        for (int64_t d = 0; d < D; d++)
            dq[d] = 0;
        if (i < head->span.q_len && lse_of(head, i, T) != -INFINITY) {
            const query_row row = query_row_of(head, i, q, dout, T);
            const fa_range keys = fa_keys_of_queries(&head->span, i, i);
            for (int64_t j = keys.lo; j < keys.hi; j++) {
                double slope, ds = pair_gradient(head, &row, j, &slope, T);
                ds *= slope;
                if (ds != 0) /* a hidden K may be NaN */
                    fa_scalar_add(dq, ds, a->k.data, fa_row_at(&a->k, head->b, head->hk, j), a->k.stride[3], D,
                                  T);
            }
        }
        fa_scalar_write(a->dq.data, fa_row_at(&a->dq, head->b, head->h, i), a->dq.stride[3], dq, D, T);
    }
}

/* ---- dK, dV: one key row against its queries --------------------------------------------------------------------- */

typedef struct key_row {
    int64_t j;
    const double *k, *v;
    double *dk, *dv;
} key_row;

/* Adds what query i gives to key j. */
FA_SCALAR_BODY void key_add(const fa_scalar_head *head, const key_row *row, int64_t i, fa_dtype T)
{
    const fa_args *a = head->a;
    const int64_t D = a->q.size[3], DV = a->v.size[3], q = fa_row_at(&a->q, head->b, head->h, i);
    const double lse = lse_of(head, i, T);
    if (lse == -INFINITY || fa_scalar_hidden(head, i, row->j))
        return;
    double dot = fa_scalar_dot(row->k, a->q.data, q, a->q.stride[3], D, T);
    const fa_scalar_score s = fa_scalar_score_of(head, i, row->j, dot);
    if (s.value == -INFINITY)
        return;
    const double p = exp(s.value - lse), kept = fa_scalar_dropout(head, i, row->j);
    const int64_t dout = fa_row_at(&a->dout, head->b, head->h, i);
    if (a->dv.data && kept * p != 0)
        fa_scalar_add(row->dv, kept * p, a->dout.data, dout, a->dout.stride[3], DV, T);
    if (!a->dk.data)
        return;
    const double dp = kept == 0 ? 0 : kept * fa_scalar_dot(row->v, a->dout.data, dout, a->dout.stride[3], DV, T);
    const double ds = p * (dp - delta_of(a, head->b, head->h, i, T)) * s.slope;
    if (ds != 0)
        fa_scalar_add(row->dk, ds, a->q.data, q, a->q.stride[3], D, T);
}

FA_SCALAR_BODY void bwd_keys(const fa_args *a, int64_t b, int64_t hk, double *scratch, fa_dtype T)
{
    const int64_t group = a->q.size[1] / a->k.size[1], SK = a->k.size[2], D = a->k.size[3], DV = a->v.size[3];
    const int64_t k_len = fa_span_at(a, b).k_len;
    double *k = scratch, *v = k + FA_MAX_HEAD_DIM, *dk = v + FA_MAX_HEAD_DIM, *dv = dk + FA_MAX_HEAD_DIM;
    for (int64_t j = 0; j < SK; j++) {
        const key_row row = {j, k, v, dk, dv};
        for (int64_t d = 0; d < D; d++)
            dk[d] = 0;
        for (int64_t d = 0; d < DV; d++)
            dv[d] = 0;
        if (j < k_len) {
            fa_scalar_read(k, a->k.data, fa_row_at(&a->k, b, hk, j), a->k.stride[3], D, T);
            fa_scalar_read(v, a->v.data, fa_row_at(&a->v, b, hk, j), a->v.stride[3], DV, T);
        }
        for (int64_t h = hk * group; h < (hk + 1) * group && j < k_len; h++) {
            const fa_scalar_head head = fa_scalar_head_at(a, b, h);
            const fa_range queries = fa_queries_of_keys(&head.span, j, j);
            for (int64_t i = queries.lo; i < queries.hi; i++)
                key_add(&head, &row, i, T);
        }
        if (a->dk.data)
            fa_scalar_write(a->dk.data, fa_row_at(&a->dk, b, hk, j), a->dk.stride[3], dk, D, T);
        if (a->dv.data)
            fa_scalar_write(a->dv.data, fa_row_at(&a->dv, b, hk, j), a->dv.stride[3], dv, DV, T);
    }
}

/* task = b * HK + hk */
FA_SCALAR_BODY void bwd_task(const fa_args *a, int64_t task, char *scratch, fa_dtype T)
{
    const int64_t HK = a->k.size[1], group = a->q.size[1] / HK, b = task / HK, hk = task % HK;
    for (int64_t h = hk * group; h < (hk + 1) * group && a->dq.data; h++) {
        const fa_scalar_head head = fa_scalar_head_at(a, b, h);
        bwd_queries(&head, (double *)scratch, T);
    }
    if (a->dk.data || a->dv.data)
        bwd_keys(a, b, hk, (double *)scratch, T);
}

/* ---- dmask: one block of columns of one mask row, summed over what the mask broadcasts --------------------------- */

int64_t fa_dmask_tasks(const fa_args *a)
{
    const int64_t *size = a->mask.size;
    return size[0] * size[1] * size[2] * fa_ceil_div(size[3], MASK_BLOCK);
}

/* The indices an element of the mask stands for along one dimension: itself, or all of them. */
static inline fa_range mask_extent(int64_t mask_size, int64_t index, int64_t full)
{
    return mask_size == full ? (fa_range){index, index + 1} : (fa_range){0, full};
}

/* Adds the gradients of query i to sum; keys is cut to what the row sees. column: 0 sums all keys into sum[0]. */
FA_SCALAR_BODY void dmask_row(const fa_scalar_head *head, int64_t i, fa_range keys, int column, double *sum,
                              double *scratch, fa_dtype T)
{
    if (i >= head->span.q_len || lse_of(head, i, T) == -INFINITY)
        return;
    const fa_range seen = fa_keys_of_queries(&head->span, i, i);
    const int64_t lo = fa_max64(keys.lo, seen.lo), hi = fa_min64(keys.hi, seen.hi);
    if (lo >= hi)
        return;
    const query_row row = query_row_of(head, i, scratch, scratch + FA_MAX_HEAD_DIM, T);
    for (int64_t j = lo; j < hi; j++) {
        double slope;
        sum[(j - keys.lo) * column] += pair_gradient(head, &row, j, &slope, T);
    }
}

/* task = ((b * H + h) * rows + i) * blocks + block, in the mask's own sizes */
FA_SCALAR_BODY void dmask_task(const fa_args *a, int64_t task, double *scratch, fa_dtype T)
{
    const int64_t *size = a->mask.size, SK = a->k.size[2], blocks = fa_ceil_div(size[3], MASK_BLOCK);
    const int64_t block = task % blocks, mi = task / blocks % size[2], mh = task / blocks / size[2] % size[1];
    const int64_t mb = task / blocks / size[2] / size[1], first = block * MASK_BLOCK;
    const int64_t columns = fa_min64(MASK_BLOCK, size[3] - first);
    const fa_range bs = mask_extent(size[0], mb, a->q.size[0]), hs = mask_extent(size[1], mh, a->q.size[1]);
    const fa_range is = mask_extent(size[2], mi, a->q.size[2]);
    const fa_range keys = size[3] == SK ? (fa_range){first, first + columns} : (fa_range){0, SK};
    double *sum = scratch;
    for (int64_t c = 0; c < columns; c++)
        sum[c] = 0;
    for (int64_t b = bs.lo; b < bs.hi; b++)
        for (int64_t h = hs.lo; h < hs.hi; h++) {
            const fa_scalar_head head = fa_scalar_head_at(a, b, h);
            for (int64_t i = is.lo; i < is.hi; i++)
                dmask_row(&head, i, keys, size[3] == SK, sum, scratch + MASK_BLOCK, T);
        }
    for (int64_t c = 0; c < columns; c++)
        fa_store(a->dmask.data, a->dmask.dtype, fa_row_at(&a->dmask, mb, mh, mi) + (first + c) * a->dmask.stride[3],
                 sum[c]);
}

/* ---- dsinks ------------------------------------------------------------------------------------------------------ */

FA_SCALAR_BODY double dsink_of(const fa_args *a, int64_t b, int64_t h, fa_dtype T)
{
    const double sink = fa_load(a->sinks.data, a->sinks.dtype, fa_row_at(&a->sinks, b, h, 0));
    double sum = 0;
    for (int64_t i = 0; i < a->q.size[2]; i++) {
        const double lse = fa_load(a->lse.data, lse_dtype(T), fa_row_at(&a->lse, b, h, i));
        if (lse != -INFINITY) /* a row past the length or without keys; delta may be NaN there */
            sum -= exp(sink - lse) * delta_of(a, b, h, i, T);
    }
    return sum;
}

FA_SCALAR_BODY void dsinks_body(const fa_args *a, int64_t h, fa_dtype T)
{
    const int64_t B = a->q.size[0], rows = a->sinks.size[0];
    for (int64_t row = 0; row < rows; row++) {
        const fa_range bs = mask_extent(rows, row, B);
        double sum = 0;
        for (int64_t b = bs.lo; b < bs.hi; b++)
            sum += dsink_of(a, b, h, T);
        fa_store(a->dsinks.data, lse_dtype(T), fa_row_at(&a->dsinks, row, h, 0), sum);
    }
}

void fa_dsinks(const fa_args *a, int64_t h)
{
    switch (a->q.dtype) {
    case FA_F32: dsinks_body(a, h, FA_F32); return;
    case FA_BF16: dsinks_body(a, h, FA_BF16); return;
    case FA_F16: dsinks_body(a, h, FA_F16); return;
    default: dsinks_body(a, h, FA_F64); return;
    }
}

/* ---- one instance per dtype -------------------------------------------------------------------------------------- */

#define BWD(dtype, T)                                                                                                  \
    static void fa_bwd_scalar_##dtype(const fa_args *a, const fa_plan *plan, int64_t task, char *scratch,              \
                                      char *shared)                                                                    \
    {                                                                                                                  \
        (void)plan, (void)shared;                                                                                      \
        bwd_task(a, task, scratch, T);                                                                                 \
    }                                                                                                                  \
    static void fa_dmask_scalar_##dtype(const fa_args *a, const fa_plan *plan, int64_t task, char *scratch,            \
                                        char *shared)                                                                  \
    {                                                                                                                  \
        (void)plan, (void)shared;                                                                                      \
        dmask_task(a, task, (double *)scratch, T);                                                                     \
    }

BWD(f32, FA_F32)
BWD(bf16, FA_BF16)
BWD(f16, FA_F16)
BWD(f64, FA_F64)

void fa_cpu_ops_scalar_bwd(fa_cpu_ops *ops)
{
    static const fa_cpu_kernel bwd[4] = {{"fa_bwd_scalar_f32", fa_bwd_scalar_f32},
                                         {"fa_bwd_scalar_bf16", fa_bwd_scalar_bf16},
                                         {"fa_bwd_scalar_f16", fa_bwd_scalar_f16},
                                         {"fa_bwd_scalar_f64", fa_bwd_scalar_f64}};
    static const fa_cpu_kernel dmask[4] = {{"fa_dmask_scalar_f32", fa_dmask_scalar_f32},
                                           {"fa_dmask_scalar_bf16", fa_dmask_scalar_bf16},
                                           {"fa_dmask_scalar_f16", fa_dmask_scalar_f16},
                                           {"fa_dmask_scalar_f64", fa_dmask_scalar_f64}};
    for (int t = 0; t < 4; t++) {
        ops->bwd[t] = bwd[t];
        ops->dmask[t] = dmask[t];
    }
}
