/* Which keys a query sees, as ranges: causal, windows and lengths never need a mask tensor. */
#ifndef FA_MASK_H
#define FA_MASK_H

#include "../fa.h"
#include "fa_host_device.h"

typedef struct fa_range {
    int64_t lo, hi; /* lo <= j < hi; empty when hi <= lo */
} fa_range;

/* The lengths and the diagonal of one sequence of the batch. */
typedef struct fa_span {
    int64_t q_len, k_len;
    int64_t offset;      /* query i stands at key position i + offset */
    int64_t left, right; /* -1 = unbounded */
} fa_span;

FA_HD static inline int64_t fa_length_at(const fa_tensor *t, int64_t b, int64_t full)
{
    if (!t->data)
        return full;
    int64_t at = b * t->stride[0];
    return t->dtype == FA_I64 ? ((const int64_t *)t->data)[at] : ((const int32_t *)t->data)[at];
}

FA_HD static inline fa_span fa_span_at(const fa_args *a, int64_t b)
{
    fa_span s = {
        .q_len = fa_length_at(&a->q_seqlens, b, a->q.size[2]),
        .k_len = fa_length_at(&a->kv_seqlens, b, a->k.size[2]),
        .left = a->window_left,
        .right = a->window_right,
    };
    s.offset = a->bottom_right ? s.k_len - s.q_len : 0;
    return s;
}

/* Keys that at least one of the queries first .. last (both below q_len) sees. */
FA_HD static inline fa_range fa_keys_of_queries(const fa_span *s, int64_t first, int64_t last)
{
    fa_range r = {0, s->k_len};
    if (s->left >= 0 && first + s->offset - s->left > r.lo)
        r.lo = first + s->offset - s->left;
    if (s->right >= 0 && last + s->offset + s->right + 1 < r.hi)
        r.hi = last + s->offset + s->right + 1;
    return r;
}

/* Queries that see at least one of the keys first .. last (both below k_len). */
FA_HD static inline fa_range fa_queries_of_keys(const fa_span *s, int64_t first, int64_t last)
{
    fa_range r = {0, s->q_len};
    if (s->right >= 0 && first - s->offset - s->right > r.lo)
        r.lo = first - s->offset - s->right;
    if (s->left >= 0 && last - s->offset + s->left + 1 < r.hi)
        r.hi = last - s->offset + s->left + 1;
    return r;
}

/* Does each of the queries q0 .. q1 see each of the keys k0 .. k1 (all ends included)? */
FA_HD static inline bool fa_all_visible(const fa_span *s, int64_t q0, int64_t q1, int64_t k0, int64_t k1)
{
    return k0 >= 0 && k1 < s->k_len && q1 < s->q_len && (s->left < 0 || k0 >= q1 + s->offset - s->left) &&
           (s->right < 0 || k1 <= q0 + s->offset + s->right);
}

#endif
