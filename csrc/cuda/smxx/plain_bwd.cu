/* Backward in double, as csrc/cpu/cpu_scalar_bwd.c: a warp has a query row and sums dQ, or a key row and sums dK and
 * dV, or an element of a float mask and sums its gradient. The pair's numbers are computed one pair a lane; then the lanes
 * share the columns. */
#include "plain.cuh"

enum { COLUMNS = FA_MAX_HEAD_DIM / 32 };

/* log-sum-exp in nats and delta of row i */
__device__ static void row_of(const fa_plain_params &params, const fa_plain_head &p, int64_t i, double *lse,
                              double *delta)
{
    const int64_t at = (p.seq.q_batch * p.a->q.size[1] + p.h) * p.a->q.size[2] + p.seq.q_row + i;
    const double ln2 = 0.6931471805599453;
    if (p.a->q.dtype == FA_F64) {
        *lse = ((const double *)params.lse2)[at] * ln2;
        *delta = ((const double *)params.delta)[at];
    } else {
        *lse = ((const float *)params.lse2)[at] * ln2;
        *delta = ((const float *)params.delta)[at];
    }
}

struct pair {
    double w, ds, slope; /* P times what dropout makes of it; dS; d score / d (q . k) */
};

/* q_k: q . k, do_v: dO . V */
__device__ static pair pair_of(const fa_plain_head &p, int64_t i, int64_t j, double lse, double delta, double q_k,
                               double do_v)
{
    const fa_plain_score s = fa_plain_score_of(p, i, j, q_k);
    if (s.value == -INFINITY || lse == INFINITY)
        return {0, 0, 0};
    const double weight = exp(s.value - lse), kept = fa_plain_dropout(p, i, j);
    return {kept * weight, weight * ((kept == 0 ? 0 : kept * do_v) - delta), s.slope};
}

__device__ static void store_row(const fa_tensor *t, int64_t at, const double (&acc)[COLUMNS])
{
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
        const int64_t d = threadIdx.x % 32 + 32 * c;
        if (d < t->size[3])
            fa_store(t->data, t->dtype, at + d * t->stride[3], acc[c]);
    }
}

__device__ static void add_row(double (&acc)[COLUMNS], double w, const fa_tensor *t, int64_t at)
{
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
        const int64_t d = threadIdx.x % 32 + 32 * c;
        if (d < t->size[3])
            acc[c] += w * fa_load(t->data, t->dtype, at + d * t->stride[3]);
    }
}

/* ---- dQ ---------------------------------------------------------------------------------------------------------- */

__global__ void fa_bwd_plain_queries(const __grid_constant__ fa_plain_params params)
{
    extern __shared__ __align__(16) char smem[];
    const fa_args *a = &params.a;
    double *q = (double *)smem + threadIdx.x / 32 * (a->q.size[3] + a->v.size[3]), *dout = q + a->q.size[3];
    const int64_t panels = fa_ceil_div(a->q.size[2], FA_PLAIN_WARPS), nh = blockIdx.x / panels;
    const int64_t i = blockIdx.x % panels * FA_PLAIN_WARPS + threadIdx.x / 32;
    const fa_plain_head p = fa_plain_head_at(a, nh / a->q.size[1], nh % a->q.size[1]);
    if (i >= p.seq.q_rows)
        return;
    double acc[COLUMNS] = {0}, lse = INFINITY, delta = 0;
    if (i < p.seq.span.q_len)
        row_of(params, p, i, &lse, &delta);
    if (lse != INFINITY) {
        fa_plain_read(q, &a->q, fa_q_at(&p.seq, &a->q, p.h, i), 1);
        fa_plain_read(dout, &a->dout, fa_q_at(&p.seq, &a->dout, p.h, i), 1);
        const fa_range keys = fa_keys_of_queries(&p.seq.span, i, i);
        for (int64_t j0 = fa_max64(keys.lo, 0); j0 < keys.hi; j0 += 32) {
            const int64_t j = j0 + threadIdx.x % 32;
            pair x = {0, 0, 0};
            if (j < keys.hi && !fa_plain_hidden(p, i, j))
                x = pair_of(p, i, j, lse, delta, fa_plain_dot(q, &a->k, fa_k_at(a, &p.seq, &a->k, p.hk, j), 1),
                            fa_plain_dot(dout, &a->v, fa_k_at(a, &p.seq, &a->v, p.hk, j), 1));
            for (int other = 0; other < 32; other++) {
                const double w = __shfl_sync(0xffffffffu, x.ds * x.slope, other);
                if (w != 0) /* a hidden K may be NaN */
                    add_row(acc, w, &a->k, fa_k_at(a, &p.seq, &a->k, p.hk, j0 + other));
            }
        }
    }
    store_row(&a->dq, fa_q_at(&p.seq, &a->dq, p.h, i), acc);
}

/* ---- dK, dV ------------------------------------------------------------------------------------------------------ */

__device__ static void add_head(const fa_plain_params &params, const fa_plain_head &p, int64_t j, const double *k,
                                const double *v, double (&dk)[COLUMNS], double (&dv)[COLUMNS])
{
    const fa_args *a = p.a;
    const fa_range queries = fa_queries_of_keys(&p.seq.span, j, j);
    for (int64_t i0 = fa_max64(queries.lo, 0); i0 < queries.hi; i0 += 32) {
        const int64_t i = i0 + threadIdx.x % 32;
        pair x = {0, 0, 0};
        double lse = INFINITY, delta = 0;
        if (i < queries.hi && !fa_plain_hidden(p, i, j))
            row_of(params, p, i, &lse, &delta);
        if (lse != INFINITY)
            x = pair_of(p, i, j, lse, delta, fa_plain_dot(k, &a->q, fa_q_at(&p.seq, &a->q, p.h, i), 1),
                        fa_plain_dot(v, &a->dout, fa_q_at(&p.seq, &a->dout, p.h, i), 1));
        for (int other = 0; other < 32; other++) {
            const double w = __shfl_sync(0xffffffffu, x.w, other);
            const double ds = __shfl_sync(0xffffffffu, x.ds * x.slope, other);
            if (w != 0)
                add_row(dv, w, &a->dout, fa_q_at(&p.seq, &a->dout, p.h, i0 + other));
            if (ds != 0)
                add_row(dk, ds, &a->q, fa_q_at(&p.seq, &a->q, p.h, i0 + other));
        }
    }
}

__global__ void fa_bwd_plain_keys(const __grid_constant__ fa_plain_params params)
{
    extern __shared__ __align__(16) char smem[];
    const fa_args *a = &params.a;
    double *k = (double *)smem + threadIdx.x / 32 * (a->q.size[3] + a->v.size[3]), *v = k + a->q.size[3];
    const int64_t panels = fa_ceil_div(a->k.size[2], FA_PLAIN_WARPS), nh = blockIdx.x / panels;
    const int64_t j = blockIdx.x % panels * FA_PLAIN_WARPS + threadIdx.x / 32, hk = nh % a->k.size[1];
    const int64_t group = a->q.size[1] / a->k.size[1], n = nh / a->k.size[1];
    const fa_seq seq = fa_seq_at(a, n);
    if (j >= seq.k_rows)
        return;
    double dk[COLUMNS] = {0}, dv[COLUMNS] = {0};
    if (j < seq.span.k_len) {
        fa_plain_read(k, &a->k, fa_k_at(a, &seq, &a->k, hk, j), 1);
        fa_plain_read(v, &a->v, fa_k_at(a, &seq, &a->v, hk, j), 1);
        for (int64_t h = hk * group; h < (hk + 1) * group; h++)
            add_head(params, fa_plain_head_at(a, n, h), j, k, v, dk, dv);
    }
    if (a->dk.data)
        store_row(&a->dk, fa_k_at(a, &seq, &a->dk, hk, j), dk);
    if (a->dv.data)
        store_row(&a->dv, fa_k_at(a, &seq, &a->dv, hk, j), dv);
}

/* ---- the gradient of a mask -------------------------------------------------------------------------------------- */

struct box { /* the scores that an element of the mask took part in */
    int64_t lo[4], n[4];
};

__device__ static box box_of(const fa_args *a, const int64_t (&at)[4])
{
    const int64_t full[4] = {a->q.size[0], a->q.size[1], a->q.size[2], a->k.size[2]};
    box b;
    for (int d = 0; d < 4; d++) {
        b.lo[d] = a->mask.size[d] == full[d] ? at[d] : 0;
        b.n[d] = a->mask.size[d] == full[d] ? 1 : full[d];
    }
    return b;
}

__device__ static double dmask_pair(const fa_plain_params &params, int64_t b, int64_t h, int64_t i, int64_t j)
{
    const fa_args *a = &params.a;
    const fa_plain_head p = fa_plain_head_at(a, b, h);
    double lse, delta, q_k = 0, do_v = 0;
    if (fa_plain_hidden(p, i, j))
        return 0;
    row_of(params, p, i, &lse, &delta);
    if (lse == INFINITY)
        return 0;
    const int64_t q = fa_q_at(&p.seq, &a->q, h, i), k = fa_k_at(a, &p.seq, &a->k, p.hk, j);
    const int64_t dout = fa_q_at(&p.seq, &a->dout, h, i), v = fa_k_at(a, &p.seq, &a->v, p.hk, j);
    for (int64_t d = 0; d < a->q.size[3]; d++)
        q_k += fa_load(a->q.data, a->q.dtype, q + d * a->q.stride[3]) *
               fa_load(a->k.data, a->k.dtype, k + d * a->k.stride[3]);
    for (int64_t d = 0; d < a->v.size[3]; d++)
        do_v += fa_load(a->dout.data, a->dout.dtype, dout + d * a->dout.stride[3]) *
                fa_load(a->v.data, a->v.dtype, v + d * a->v.stride[3]);
    return pair_of(p, i, j, lse, delta, q_k, do_v).ds;
}

/* warp = an element of the mask; its lanes take the scores of its box in turn */
__global__ void fa_dmask_plain(const __grid_constant__ fa_plain_params params)
{
    const fa_args *a = &params.a;
    const int64_t *size = a->mask.size, warp = blockIdx.x * (int64_t)FA_PLAIN_WARPS + threadIdx.x / 32;
    if (warp >= size[0] * size[1] * size[2] * size[3])
        return;
    const int64_t at[4] = {warp / size[3] / size[2] / size[1], warp / size[3] / size[2] % size[1],
                           warp / size[3] % size[2], warp % size[3]};
    const box b = box_of(a, at);
    double sum = 0;
    for (int64_t x = threadIdx.x % 32; x < b.n[0] * b.n[1] * b.n[2] * b.n[3]; x += 32)
        sum += dmask_pair(params, b.lo[0] + x / b.n[3] / b.n[2] / b.n[1], b.lo[1] + x / b.n[3] / b.n[2] % b.n[1],
                          b.lo[2] + x / b.n[3] % b.n[2], b.lo[3] + x % b.n[3]);
    sum = fa_warp_sum(sum);
    int64_t to = 0;
    for (int d = 0; d < 4; d++)
        to += at[d] * a->dmask.stride[d];
    if (threadIdx.x % 32 == 0)
        fa_store(a->dmask.data, a->dmask.dtype, to, sum);
}

/* ---- launch ------------------------------------------------------------------------------------------------------ */

static const char *const NAMES[] = {"fa_bwd_plain_f32", "fa_bwd_plain_bf16", "fa_bwd_plain_f16", "fa_bwd_plain_f64"};

static bool kernel(int i, fa_kernel_info *info)
{
    if (i > FA_F64)
        return false;
    info->name = NAMES[i];
    info->dtype = (fa_dtype)i;
    return true;
}

static bool can(const fa_args *a, int device)
{
    (void)a, (void)device;
    return true;
}

static void plan(const fa_args *a, int device, fa_plan *p)
{
    (void)device;
    p->kernel = NAMES[a->q.dtype];
    p->block_rows = FA_PLAIN_WARPS;
    p->block_keys = 32;
    p->splits = 1;
    p->split_keys = a->k.size[2];
    p->panels = fa_ceil_div(a->q.size[2], FA_PLAIN_WARPS);
    p->tasks = (a->cu_q.data ? a->cu_q.size[0] : a->q.size[0]) * a->q.size[1] * p->panels;
    p->threads = 32 * FA_PLAIN_WARPS;
    p->thread_bytes = sizeof(double) * FA_PLAIN_WARPS * (size_t)(a->q.size[3] + a->v.size[3]);
    p->shared_bytes = fa_bwd_rows_bytes(a);
    p->why = "a warp to a row, in double: float64, or more shared memory than the device has";
    p->why_splits = "dQ by query rows, dK and dV by key rows";
}

static fa_status launch(const fa_args *a, const fa_plan *p, void *workspace, cudaStream_t stream, fa_error *err)
{
    fa_plain_params params = {};
    const fa_bwd_row_numbers rows = fa_bwd_rows_in(a, workspace);
    params.a = *a;
    params.lse2 = rows.lse2;
    params.delta = rows.delta;
    fa_status status = fa_bwd_rows_launch(a, workspace, stream, err);
    if (!status && a->dq.data)
        status = fa_launch(p->kernel, fa_bwd_plain_queries, p->tasks, 1, p->threads, p->thread_bytes, stream, params,
                           err);
    const int64_t keys = (a->cu_k.data ? a->cu_k.size[0] : a->k.size[0]) * a->k.size[1];
    if (!status && (a->dk.data || a->dv.data))
        status = fa_launch(p->kernel, fa_bwd_plain_keys, keys * fa_ceil_div(a->k.size[2], FA_PLAIN_WARPS), 1,
                           p->threads, p->thread_bytes, stream, params, err);
    const int64_t *m = a->mask.size;
    if (!status && a->dmask.data)
        status = fa_launch(p->kernel, fa_dmask_plain, fa_ceil_div(m[0] * m[1] * m[2] * m[3], FA_PLAIN_WARPS), 1,
                           p->threads, 0, stream, params, err);
    if (!status && a->dsinks.data)
        status = fa_dsinks_launch(a, &rows, stream, err);
    return status;
}

extern "C" const fa_cuda_family fa_bwd_plain = {"plain", fa_runs_on_sm80, kernel, can, plan, launch};
