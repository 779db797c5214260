/* One sequence of a call as the kernels see it, and which block works on which part of it. Lengths, offsets and page
 * numbers lie in device memory and are checked by nobody: whatever they hold, what is addressed stays inside the
 * tensors. */
#ifndef FA_TILE_SEQ_CUH
#define FA_TILE_SEQ_CUH

#include "../../common/fa_dtype.h"
#include "../../common/fa_mask.h"
#include "../../plan/plan.h"

typedef struct fa_seq {
    int64_t n;              /* its number, which dropout calls the batch */
    int64_t q_batch, q_row; /* batch index of q and what is like q, and the first row there */
    int64_t k_batch, k_row; /* the same of k and v */
    int64_t q_rows, k_rows; /* rows that belong to it, of k without the unused */
    fa_span span;
} fa_seq;

/* fa_dtype_size, on the device */
__device__ __forceinline__ int64_t fa_dtype_width(fa_dtype t)
{
    return t == FA_F64 || t == FA_I64 ? 8 : t == FA_F32 || t == FA_I32 ? 4 : t == FA_BF16 || t == FA_F16 ? 2 : 1;
}

__device__ __forceinline__ int64_t fa_clamp(int64_t x, int64_t lo, int64_t hi)
{
    return x < lo ? lo : x > hi ? hi : x;
}

__device__ __forceinline__ int64_t fa_index(const fa_tensor *t, int64_t at)
{
    return t->dtype == FA_I64 ? ((const int64_t *)t->data)[at] : ((const int32_t *)t->data)[at];
}

/* offset n of cu_q or cu_k; the last and all behind it are the number of rows, so that they take in the surplus */
__device__ __forceinline__ int64_t fa_offset_at(const fa_tensor *cu, int64_t n, int64_t rows)
{
    return n >= cu->size[0] ? rows : fa_clamp(fa_index(cu, n * cu->stride[0]), 0, rows);
}

__device__ __forceinline__ int64_t fa_length(const fa_tensor *t, int64_t n, int64_t full)
{
    return t->data ? fa_clamp(fa_index(t, n * t->stride[0]), 0, full) : full;
}

/* Sequence n. Behind the last of the packed ones comes one more, of the rows that belong to none: it is empty. */
__device__ static fa_seq fa_seq_at(const fa_args *a, int64_t n)
{
    fa_seq s = {n, n, 0, n, 0, a->q.size[2], a->k.size[2], {}};
    int64_t k_len = a->k.size[2];
    bool surplus = false;
    if (a->cu_q.data) {
        surplus = n + 1 >= a->cu_q.size[0];
        s.q_batch = 0;
        s.q_row = fa_offset_at(&a->cu_q, n, a->q.size[2]);
        s.q_rows = fa_clamp(fa_offset_at(&a->cu_q, n + 1, a->q.size[2]) - s.q_row, 0, a->q.size[2]);
    }
    if (a->cu_k.data) {
        surplus = n + 1 >= a->cu_k.size[0];
        s.k_batch = 0;
        s.k_row = fa_offset_at(&a->cu_k, n, a->k.size[2]);
        s.k_rows = k_len = fa_clamp(fa_offset_at(&a->cu_k, n + 1, a->k.size[2]) - s.k_row, 0, a->k.size[2]);
    } else if (a->page_size) {
        s.k_rows = k_len = a->block_table.size[1] * a->page_size;
    }
    s.span.q_len = surplus ? 0 : fa_length(&a->q_seqlens, n, s.q_rows);
    s.span.k_len = surplus ? 0 : fa_clamp(fa_length(&a->kv_seqlens, n, k_len) + a->kv_appended, 0, k_len);
    s.span.offset = a->bottom_right ? s.span.k_len - s.span.q_len : 0;
    s.span.left = a->window_left;
    s.span.right = a->window_right;
    return s;
}

/* ---- which block has which tile ---------------------------------------------------------------------------------- */

/* Sequences of q, or of k, with the surplus; 1 batch of a packed tensor is cut into tiles of `rows` as follows: the
 * tiles of sequence n are numbered from cu[n] / rows + n on. That is at least as many numbers as it needs, found
 * without a table; those left over are empty. */
static inline __host__ __device__ int64_t fa_tile_slots(const fa_tensor *cu, int64_t batch, int64_t length,
                                                        int64_t rows)
{
    return cu->data ? length / rows + cu->size[0] : batch * fa_ceil_div(length, rows);
}

typedef struct fa_tile {
    int64_t n, first; /* sequence, and first row within it */
} fa_tile;

__device__ static fa_tile fa_tile_of(const fa_tensor *cu, int64_t length, int64_t rows, int64_t slot)
{
    if (!cu->data) {
        const uint32_t tiles = (uint32_t)fa_ceil_div(length, rows), at = (uint32_t)slot; /* 64 bits divide slowly */
        return {at / tiles, at % tiles * rows};
    }
    int64_t lo = 0, hi = cu->size[0] - 1; /* the last n whose first number is at most slot */
    while (lo < hi) {
        int64_t mid = (lo + hi + 1) / 2;
        if (fa_offset_at(cu, mid, length) / rows + mid <= slot)
            lo = mid;
        else
            hi = mid - 1;
    }
    return {lo, (slot - (fa_offset_at(cu, lo, length) / rows + lo)) * rows};
}

/* ---- where rows lie ---------------------------------------------------------------------------------------------- */

/* element offset of row i of head h of q, or of what is like it */
__device__ __forceinline__ int64_t fa_q_at(const fa_seq *s, const fa_tensor *t, int64_t h, int64_t i)
{
    return s->q_batch * t->stride[0] + h * t->stride[1] + (s->q_row + i) * t->stride[2];
}

/* page of key j and its row there; false where the table names no page */
__device__ __forceinline__ bool fa_page_at(const fa_args *a, const fa_seq *s, int64_t j, int64_t *page, int64_t *row)
{
    const fa_tensor *t = &a->block_table;
    *page = fa_index(t, s->n * t->stride[0] + j / a->page_size * t->stride[1]);
    *row = j % a->page_size;
    return *page >= 0 && *page < a->k.size[0];
}

/* element offset of row j of head h of k or v; -1 where there is none */
__device__ __forceinline__ int64_t fa_k_at(const fa_args *a, const fa_seq *s, const fa_tensor *t, int64_t h, int64_t j)
{
    if (!a->page_size)
        return s->k_batch * t->stride[0] + h * t->stride[1] + (s->k_row + j) * t->stride[2];
    int64_t page, row;
    return fa_page_at(a, s, j, &page, &row) ? page * t->stride[0] + h * t->stride[1] + row * t->stride[2] : -1;
}

/* what a stored element of row j counts; 1 where nothing is quantised */
__device__ static float fa_scale_at(const fa_args *a, const fa_seq *s, const fa_tensor *scale, int64_t h, int64_t j)
{
    if (!scale->data)
        return 1;
    int64_t at = scale->size[1] > 1 ? h * scale->stride[1] : 0, batch = s->n, row = s->k_row + j;
    if (a->scale_per_token && a->page_size && !fa_page_at(a, s, j, &batch, &row))
        return 0;
    if (a->scale_per_token)
        at += row * scale->stride[2];
    if (scale->size[0] > 1)
        at += batch * scale->stride[0];
    return ((const float *)scale->data)[at];
}

/* element (n, h) of sinks or alibi */
__device__ __forceinline__ double fa_per_head(const fa_tensor *t, int64_t n, int64_t h)
{
    return fa_load(t->data, t->dtype, (t->size[0] > 1 ? n * t->stride[0] : 0) + h * t->stride[1]);
}

#endif
