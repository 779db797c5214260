/* Forward in double: a warp has a query row; its lanes take 32 keys at a time through the online softmax (Milakov and
 * Gimelshein, 2018), then share the columns of V. */
#include "plain.cuh"

enum { COLUMNS = FA_MAX_HEAD_DIM / 32 }; /* of V in a lane */

/* Adds 32 keys, one in each lane: weight 0 for those that take no part. */
__device__ static void add_values(const fa_plain_head &p, double (&acc)[COLUMNS], int64_t j0, double weight)
{
    const fa_args *a = p.a;
    const int lane = threadIdx.x % 32;
    for (int other = 0; other < 32; other++) {
        const double w = __shfl_sync(0xffffffffu, weight, other);
        if (w == 0) /* a hidden V may be NaN */
            continue;
        const int64_t at = fa_k_at(a, &p.seq, &a->v, p.hk, j0 + other);
        const double scale = fa_scale_at(a, &p.seq, &a->v_scale, p.hk, j0 + other);
#pragma unroll
        for (int c = 0; c < COLUMNS; c++)
            if (at >= 0 && lane + 32 * c < a->v.size[3])
                acc[c] += w * (fa_load(a->v.data, a->v.dtype, at + (lane + 32 * c) * a->v.stride[3]) * scale);
    }
}

struct softmax {
    double m, l;
};

__device__ static softmax keys_of_row(const fa_plain_head &p, int64_t i, const double *q, double (&acc)[COLUMNS])
{
    const fa_args *a = p.a;
    softmax x = {-INFINITY, 0};
    if (a->sinks.data) {
        const double sink = fa_per_head(&a->sinks, p.seq.n, p.h);
        if (sink != -INFINITY)
            x = {sink, exp(sink - sink)}; /* 1, or NaN for an infinite sink */
    }
    const fa_range keys = fa_keys_of_queries(&p.seq.span, i, i);
    for (int64_t j0 = fa_max64(keys.lo, 0); j0 < keys.hi; j0 += 32) {
        const int64_t j = j0 + threadIdx.x % 32;
        double s = -INFINITY, weight = 0;
        if (j < keys.hi && !fa_plain_hidden(p, i, j)) {
            const int64_t at = fa_k_at(a, &p.seq, &a->k, p.hk, j);
            const double scale = fa_scale_at(a, &p.seq, &a->k_scale, p.hk, j);
            s = fa_plain_score_of(p, i, j, at < 0 ? 0 : fa_plain_dot(q, &a->k, at, scale)).value;
        }
        const double top = fa_warp_max(s > x.m ? s : x.m);
        if (top != -INFINITY) {
            const double shrink = exp(x.m - top);
            x.l *= shrink;
#pragma unroll
            for (int c = 0; c < COLUMNS; c++)
                acc[c] *= shrink;
            x.m = top;
        }
        if (s != -INFINITY)
            weight = exp(s - x.m); /* NaN for a score of +inf or NaN, as in eager attention */
        x.l += fa_warp_sum(weight);
        if (weight != 0)
            weight *= fa_plain_dropout(p, i, j);
        add_values(p, acc, j0, weight);
    }
    return x;
}

/* warp = (n * HQ + h) * SQ + i, where i runs over the longest that a sequence can be */
__global__ void fa_fwd_plain_kernel(const __grid_constant__ fa_plain_params params)
{
    extern __shared__ __align__(16) char smem[];
    const fa_args *a = &params.a;
    double *q = (double *)smem + threadIdx.x / 32 * a->q.size[3];
    const int64_t row = blockIdx.x % fa_ceil_div(a->q.size[2], FA_PLAIN_WARPS) * FA_PLAIN_WARPS + threadIdx.x / 32;
    const int64_t nh = blockIdx.x / fa_ceil_div(a->q.size[2], FA_PLAIN_WARPS);
    const fa_plain_head p = fa_plain_head_at(a, nh / a->q.size[1], nh % a->q.size[1]);
    if (row >= p.seq.q_rows)
        return;
    double acc[COLUMNS] = {0};
    softmax x = {-INFINITY, 0};
    if (row < p.seq.span.q_len) {
        fa_plain_read(q, &a->q, fa_q_at(&p.seq, &a->q, p.h, row), 1);
        x = keys_of_row(p, row, q, acc);
    }
    const bool nothing_seen = x.l == 0;
    const int64_t out = fa_q_at(&p.seq, &a->out, p.h, row);
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
        const int64_t d = threadIdx.x % 32 + 32 * c;
        if (d < a->v.size[3])
            fa_store(a->out.data, a->out.dtype, out + d * a->out.stride[3], nothing_seen ? 0 : acc[c] / x.l);
    }
    if (threadIdx.x % 32 == 0)
        fa_store(a->lse.data, a->lse.dtype, fa_q_at(&p.seq, &a->lse, p.h, row),
                 nothing_seen ? -INFINITY : x.m + log(x.l));
}

/* ---- launch ------------------------------------------------------------------------------------------------------ */

static const char *const NAMES[] = {"fa_fwd_plain_f32", "fa_fwd_plain_bf16", "fa_fwd_plain_f16", "fa_fwd_plain_f64"};

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

static int64_t sequences(const fa_args *a)
{
    return a->cu_q.data ? a->cu_q.size[0] : a->q.size[0]; /* with the surplus */
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
    p->tasks = sequences(a) * a->q.size[1] * p->panels;
    p->threads = 32 * FA_PLAIN_WARPS;
    p->thread_bytes = sizeof(double) * FA_PLAIN_WARPS * (size_t)a->q.size[3];
    p->why = "a warp to a row, in double: float64, or more shared memory than the device has";
    p->why_splits = "the keys stay whole";
}

static fa_status launch(const fa_args *a, const fa_plan *p, void *workspace, cudaStream_t stream, fa_error *err)
{
    (void)workspace;
    fa_plain_params params = {};
    params.a = *a;
    return fa_launch(p->kernel, fa_fwd_plain_kernel, p->tasks, 1, p->threads, p->thread_bytes, stream, params, err);
}

extern "C" const fa_cuda_family fa_fwd_plain = {"plain", fa_runs_on_sm80, kernel, can, plan, launch};
