/* Filling a cache and merging partial results, as csrc/cpu/cpu_append.c and cpu_merge.c do it: a warp to a row. What
 * has no room in the cache, or no page, is dropped. */
#include <float.h>

#include <type_traits>

#include "../cuda.h"
#include "../tile/tile_load.cuh"

enum { WARPS = 4 };

__device__ __forceinline__ char *address(const fa_tensor *t, int64_t b, int64_t h, int64_t s)
{
    return (char *)t->data + (b * t->stride[0] + h * t->stride[1] + s * t->stride[2]) * fa_dtype_width(t->dtype);
}

/* ---- one row ----------------------------------------------------------------------------------------------------- */

/* Element d of a row, turned by the angles of `position`: pairs (x, y) -> (x cos - y sin, x sin + y cos) */
template <typename R>
__device__ static R turned(const fa_append_args *a, const fa_tensor *t, const char *row, int64_t position, int64_t d)
{
    const fa_tensor *c = &a->rope_cos, *s = &a->rope_sin;
    const int64_t half = c->data && position < c->size[0] ? c->size[1] : 0;
    const R own = (R)fa_load(row, t->dtype, d * t->stride[3]);
    if (d >= 2 * half)
        return own;
    const bool second = a->rope_interleaved ? d % 2 : d >= half;
    const int64_t angle = a->rope_interleaved ? d / 2 : d % half, step = a->rope_interleaved ? 1 : half;
    const R other = (R)fa_load(row, t->dtype, (second ? d - step : d + step) * t->stride[3]);
    const R cosine = (R)fa_load(c->data, c->dtype, position * c->stride[0] + angle * c->stride[1]);
    const R sine = (R)fa_load(s->data, s->dtype, position * s->stride[0] + angle * s->stride[1]);
    return second ? other * sine + own * cosine : own * cosine - other * sine;
}

struct source {
    const fa_tensor *t;
    const char *row;
    int64_t position; /* -1: not turned */
};

__device__ __forceinline__ double element(const fa_append_args *a, const source &s, int64_t d)
{
    if (s.position < 0)
        return fa_load(s.row, s.t->dtype, d * s.t->stride[3]);
    return s.t->dtype == FA_F64 ? turned<double>(a, s.t, s.row, s.position, d)
                                : (double)turned<float>(a, s.t, s.row, s.position, d);
}

/* What a stored element counts: given, or such that the row's largest magnitude becomes the dtype's largest number, and
 * then written; 1 for a row of zeros. NaN is no magnitude, and infinity counts as the largest float. */
__device__ static float scale_of_row(const fa_append_args *a, float *scale, const source &s, fa_dtype stored)
{
    if (!a->scale_per_token)
        return *scale;
    float most = 0;
    for (int64_t d = threadIdx.x % 32; d < s.t->size[3]; d += 32)
        most = fmaxf(most, fabsf((float)element(a, s, d)));
    for (int step = 16; step > 0; step /= 2)
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
    const float by = fminf(most, FLT_MAX) / (stored == FA_I8 ? 127.0f : 448.0f);
    if (threadIdx.x % 32 == 0)
        *scale = by > 0 ? by : 1;
    return by > 0 ? by : 1;
}

__device__ static void move_row(const fa_append_args *a, const source &s, const fa_tensor *target, char *to,
                                float *scale)
{
    const float by = scale ? scale_of_row(a, scale, s, target->dtype) : 1;
    for (int64_t d = threadIdx.x % 32; d < s.t->size[3]; d += 32) {
        const double x = element(a, s, d);
        fa_store(to, target->dtype, d * target->stride[3], scale ? (float)x / by : x);
    }
}

/* One angle of a rotary table in fp32 or T. */
template <typename T> __device__ __forceinline__ float angle_at(const fa_tensor *t, int64_t position, int64_t i)
{
    const int64_t at = position * t->stride[0] + i * t->stride[1];
    return t->dtype == FA_F32 ? ((const float *)t->data)[at] : fa_to_f32(((const T *)t->data)[at]);
}

/* move_row of rows of T that lie without gaps, into the same: the same roundings. */
template <typename T> __device__ static void move_row_of(const fa_append_args *a, const source &s, char *to)
{
    const fa_tensor *c = &a->rope_cos;
    const T *row = (const T *)s.row;
    const int width = (int)s.t->size[3];
    const int half = s.position >= 0 && s.position < c->size[0] ? (int)c->size[1] : 0;
#pragma unroll 4
    for (int d = threadIdx.x % 32; d < width; d += 32) {
        float x = fa_to_f32(row[d]);
        if (d < 2 * half) {
            const bool second = a->rope_interleaved ? d % 2 : d >= half;
            const int angle = a->rope_interleaved ? d / 2 : d % half, step = a->rope_interleaved ? 1 : half;
            const float other = fa_to_f32(row[second ? d - step : d + step]);
            const float cosine = angle_at<T>(c, s.position, angle), sine = angle_at<T>(&a->rope_sin, s.position, angle);
            x = second ? other * sine + x * cosine : x * cosine - other * sine;
        }
        ((T *)to)[d] = fa_from<T>(x);
    }
}

/* ---- append ------------------------------------------------------------------------------------------------------ */

/* Sequence n, row i of it, and where that is: in k_new (b, s) and in the cache (batch, row). */
struct place {
    int64_t n, i, b, s, batch, row, position;
    bool exists;
};

__device__ static place place_of(const fa_append_args *a, int64_t token)
{
    place p;
    p.b = 0;
    p.s = token;
    p.exists = true;
    if (a->cu_new.data) {
        const int64_t rows = a->k_new.size[2];
        int64_t lo = 0, hi = a->cu_new.size[0] - 1; /* the last sequence that starts at or before the token */
        while (lo < hi) {
            int64_t mid = (lo + hi + 1) / 2;
            if (fa_offset_at(&a->cu_new, mid, rows) <= token)
                lo = mid;
            else
                hi = mid - 1;
        }
        p.n = lo;
        p.exists = lo + 1 < a->cu_new.size[0];
        p.i = token - fa_offset_at(&a->cu_new, lo, rows);
    } else {
        p.n = p.b = token / a->k_new.size[2];
        p.i = p.s = token % a->k_new.size[2];
    }
    if (!p.exists)
        return p;
    p.position = fa_index(&a->seqlens, p.n * a->seqlens.stride[0]) + p.i;
    p.batch = p.n;
    p.row = p.position;
    const int64_t rows = a->k_cache.size[2];
    if (a->block_table.data) {
        const fa_tensor *t = &a->block_table;
        p.exists = p.position >= 0 && p.position < t->size[1] * rows;
        p.batch = p.exists ? fa_index(t, p.n * t->stride[0] + p.position / rows * t->stride[1]) : -1;
        p.row = p.position % rows;
    }
    p.exists = p.exists && p.batch >= 0 && p.batch < a->k_cache.size[0] && p.row >= 0 && p.row < rows;
    return p;
}

__device__ static float *scale_at(const fa_append_args *a, const fa_tensor *t, const place &p, int64_t h)
{
    if (!t->data)
        return NULL;
    if (a->scale_per_token)
        return (float *)address(t, p.batch, h, p.row);
    return (float *)address(t, t->size[0] > 1 ? p.n : 0, t->size[1] > 1 ? h : 0, 0);
}

/* T: what move_row_of takes, else void */
template <typename T>
__device__ __forceinline__ void move(const fa_append_args *a, const source &s, const fa_tensor *target, char *to,
                                     float *scale)
{
    if constexpr (std::is_void<T>::value)
        move_row(a, s, target, to, scale);
    else
        move_row_of<T>(a, s, to);
}

/* warp = (token, head, key or value) of k_new, then (token, head) of q */
template <typename T> __global__ void fa_append_kernel(const __grid_constant__ fa_append_args args)
{
    const fa_append_args *a = &args;
    int64_t id = blockIdx.x * (int64_t)WARPS + threadIdx.x / 32;
    const int64_t heads = a->k_new.size[1], fresh = a->k_new.data ? a->k_new.size[0] * a->k_new.size[2] : 0;
    if (id < fresh * heads * 2) {
        const bool value = id % 2;
        const int64_t h = id / 2 % heads;
        const place p = place_of(a, id / 2 / heads);
        const fa_tensor *from = value ? &a->v_new : &a->k_new, *to = value ? &a->v_cache : &a->k_cache;
        if (p.exists)
            move<T>(a, {from, address(from, p.b, h, p.s), value || !a->rope_cos.data ? -1 : p.position}, to,
                    address(to, p.batch, h, p.row), scale_at(a, value ? &a->v_scale : &a->k_scale, p, h));
        return;
    }
    id -= fresh * heads * 2;
    if (!a->q.data || id >= a->q.size[0] * a->q.size[1] * a->q.size[2])
        return;
    const int64_t i = id % a->q.size[2], h = id / a->q.size[2] % a->q.size[1], n = id / a->q.size[2] / a->q.size[1];
    const int64_t position = fa_index(&a->seqlens, n * a->seqlens.stride[0]) + i;
    move<T>(a, {&a->q, address(&a->q, n, h, i), position < 0 ? 0 : position}, &a->q_out, address(&a->q_out, n, h, i),
            NULL);
}

/* Is there a kernel for its dtype alone? */
static bool is_usual(const fa_append_args *a)
{
    const fa_dtype dtype = a->k_new.data ? a->k_new.dtype : a->q.dtype;
    const fa_tensor *rows[] = {&a->k_new, &a->v_new, &a->k_cache, &a->v_cache, &a->q, &a->q_out};
    for (const fa_tensor *t : rows)
        if (t->data && (t->dtype != dtype || (t->stride[3] != 1 && t->size[3] > 1)))
            return false;
    return dtype != FA_F64;
}

static void (*append_kernel(const fa_append_args *a))(fa_append_args)
{
    if (!is_usual(a))
        return fa_append_kernel<void>;
    switch (a->k_new.data ? a->k_new.dtype : a->q.dtype) {
    case FA_BF16: return fa_append_kernel<__nv_bfloat16>;
    case FA_F16: return fa_append_kernel<__half>;
    default: return fa_append_kernel<float>;
    }
}

fa_status fa_append_launch(const fa_append_args *a, cudaStream_t stream, fa_error *err)
{
    const int64_t fresh = a->k_new.data ? 2 * a->k_new.size[0] * a->k_new.size[1] * a->k_new.size[2] : 0;
    const int64_t queries = a->q.data ? a->q.size[0] * a->q.size[1] * a->q.size[2] : 0;
    return fa_launch("fa_append", append_kernel(a), fa_ceil_div(fresh + queries, WARPS), 1, 32 * WARPS, 0, stream, *a,
                     err);
}

/* ---- merge ------------------------------------------------------------------------------------------------------- */

struct weights {
    double a, b, lse; /* a + b = 1, or both 0 where neither part takes part */
};

/* Of the larger log-sum-exp the weight is 1 / (1 + e^-difference): nothing overflows. */
__device__ static weights weigh(double a, double b)
{
    if (a == -INFINITY && b == -INFINITY)
        return {0, 0, -INFINITY};
    if (a == -INFINITY)
        return {0, 1, b};
    if (b == -INFINITY)
        return {1, 0, a};
    const double small = exp(a > b ? b - a : a - b), large = 1 / (1 + small);
    return {a > b ? large : small * large, a > b ? small * large : large, (a > b ? a : b) + log1p(small)};
}

/* A part of weight 0 is not read into the sum: it may hold NaN. */
__global__ void fa_merge_kernel(const __grid_constant__ fa_merge_args a)
{
    const int64_t *size = a.out.size, row = blockIdx.x * (int64_t)WARPS + threadIdx.x / 32;
    if (row >= size[0] * size[1] * size[2])
        return;
    const int64_t b = row / size[2] / size[1], h = row / size[2] % size[1], s = row % size[2];
    const weights w = weigh(fa_load(address(&a.lse_a, b, h, s), a.lse_a.dtype, 0),
                            fa_load(address(&a.lse_b, b, h, s), a.lse_b.dtype, 0));
    if (threadIdx.x % 32 == 0)
        fa_store(address(&a.lse, b, h, s), a.lse.dtype, 0, w.lse);
    for (int64_t d = threadIdx.x % 32; d < size[3]; d += 32) {
        double sum = w.a != 0 ? w.a * fa_load(address(&a.out_a, b, h, s), a.out_a.dtype, d * a.out_a.stride[3]) : 0;
        if (w.b != 0)
            sum += w.b * fa_load(address(&a.out_b, b, h, s), a.out_b.dtype, d * a.out_b.stride[3]);
        fa_store(address(&a.out, b, h, s), a.out.dtype, d * a.out.stride[3], sum);
    }
}

fa_status fa_merge_launch(const fa_merge_args *a, cudaStream_t stream, fa_error *err)
{
    return fa_launch("fa_merge", fa_merge_kernel, fa_ceil_div(a->out.size[0] * a->out.size[1] * a->out.size[2], WARPS),
                     1, 32 * WARPS, 0, stream, *a, err);
}
