/* One sequence of a call as a call of its own, and where the rows of its keys lie. */
#ifndef FA_SEQUENCE_H
#define FA_SEQUENCE_H

#include "fa_dtype.h"
#include "fa_mask.h"

static inline int64_t fa_index_at(const fa_tensor *t, int64_t at)
{
    return t->dtype == FA_I64 ? ((const int64_t *)t->data)[at] : ((const int32_t *)t->data)[at];
}

/* sequences of the call: N */
static inline int64_t fa_sequences(const fa_args *a)
{
    return a->cu_q.data ? a->cu_q.size[0] - 1 : a->q.size[0];
}

/* Moves t to element `index` of dimension `dim` and leaves `size` of it; an absent or broadcast tensor stays. */
static inline void fa_narrow_to(fa_tensor *t, int dim, int64_t index, int64_t size)
{
    if (!t->data || (t->size[dim] == 1 && size == 1))
        return;
    if (size > 0) /* of an empty part no address is formed */
        t->data = (char *)t->data + index * t->stride[dim] * (int64_t)fa_dtype_size(t->dtype);
    t->size[dim] = size;
}

/* Sequence n of a call that has by_sequence, as a call with a batch of 1, on the same memory. Made in place: returning
 * a struct of this size costs a tiny call as much again as making it. */
static inline void fa_make_sequence(const fa_args *a, int64_t n, fa_args *s)
{
    *s = *a;
    s->by_sequence = false;
    s->first_batch = a->first_batch + n;
    fa_tensor *const rows[] = {&s->q, &s->out, &s->lse, &s->dout, &s->dlse, &s->dq};
    fa_tensor *const keys[] = {&s->k, &s->v, &s->dk, &s->dv};
    fa_tensor *const others[] = {&s->mask, &s->sinks, &s->alibi, &s->q_seqlens, &s->kv_seqlens, &s->tree_mask};
    int64_t q_first = a->cu_q.data ? fa_index_at(&a->cu_q, n * a->cu_q.stride[0]) : 0;
    int64_t q_len = a->cu_q.data ? fa_index_at(&a->cu_q, (n + 1) * a->cu_q.stride[0]) - q_first : a->q.size[2];
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
        fa_narrow_to(rows[i], a->cu_q.data ? 2 : 0, a->cu_q.data ? q_first : n, a->cu_q.data ? q_len : 1);
    int64_t k_first = a->cu_k.data ? fa_index_at(&a->cu_k, n * a->cu_k.stride[0]) : 0;
    int64_t k_len = a->cu_k.data ? fa_index_at(&a->cu_k, (n + 1) * a->cu_k.stride[0]) - k_first : a->k.size[2];
    int64_t used = fa_length_at(&a->kv_seqlens, n, k_len);
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        if (a->block_table.data)
            keys[i]->size[0] = 1;
        else
            fa_narrow_to(keys[i], a->cu_k.data ? 2 : 0, a->cu_k.data ? k_first : n, a->cu_k.data ? k_len : 1);
    }
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++)
        fa_narrow_to(others[i], 0, n, 1);
    fa_narrow_to(&s->block_table, 0, n, 1);
    if (!(a->block_table.data && a->scale_per_token)) { /* of pages they are found as the pages are */
        fa_narrow_to(&s->k_scale, 0, n, 1);
        fa_narrow_to(&s->v_scale, 0, n, 1);
    }
    s->cu_q = s->cu_k = (fa_tensor){0};
    if (!a->dout.data) { /* backward also clears the gradients of keys past the length */
        s->k.size[2] = s->v.size[2] = used;
        s->kv_seqlens = (fa_tensor){0};
    }
    if (a->tree_mask.data) {
        s->mask = s->tree_mask;
        s->mask_first = used - q_len;
        s->tree_mask = (fa_tensor){0};
    }
}

static inline fa_args fa_sequence(const fa_args *a, int64_t n)
{
    fa_args s;
    fa_make_sequence(a, n, &s);
    return s;
}

/* ---- keys and values of a batch of 1 that may be paged or quantised ------------------------------------------------ */

/* bytes from the start of k or v to row j of head h */
static inline int64_t fa_key_row(const fa_args *a, const fa_tensor *t, int64_t b, int64_t h, int64_t j)
{
    int64_t at = h * t->stride[1];
    if (a->page_size) {
        int64_t page = fa_index_at(&a->block_table, j / a->page_size * a->block_table.stride[1]);
        at += page * t->stride[0] + j % a->page_size * t->stride[2];
    } else {
        at += b * t->stride[0] + j * t->stride[2];
    }
    return at * (int64_t)fa_dtype_size(t->dtype);
}

/* where the scale of row j of head h lies */
static inline const float *fa_key_scale_at(const fa_args *a, const fa_tensor *scale, int64_t h, int64_t j)
{
    int64_t at = scale->size[1] > 1 ? h * scale->stride[1] : 0;
    if (a->scale_per_token) {
        int64_t page = a->page_size ? fa_index_at(&a->block_table, j / a->page_size * a->block_table.stride[1]) : 0;
        at += page * scale->stride[0] + (a->page_size ? j % a->page_size : j) * scale->stride[2];
    }
    return (const float *)scale->data + at;
}

/* what a stored element of row j of head h counts; 1 where nothing is quantised */
static inline float fa_key_scale(const fa_args *a, const fa_tensor *scale, int64_t h, int64_t j)
{
    return scale->data ? *fa_key_scale_at(a, scale, h, j) : 1;
}

#endif
