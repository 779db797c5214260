/* Refusals of what fills and merges caches, worded as in validate.c. */
#include "../common/fa_sequence.h"
#include "validate.h"

/* ---- append: shapes ---------------------------------------------------------------------------------------------- */

static int64_t append_sequences(const fa_append_args *a)
{
    if (is_given(&a->q))
        return a->q.size[0];
    return is_given(&a->cu_new) ? a->cu_new.size[0] - 1 : a->k_new.size[0];
}

/* rows of the cache that one sequence can fill */
static int64_t capacity_of(const fa_append_args *a)
{
    int64_t rows = a->k_cache.size[2];
    return is_given(&a->block_table) ? rows * a->block_table.size[1] : rows;
}

/* The sizes as the user has them: (sequences, tokens, heads, dimension), or (tokens, heads, dimension) where packed. */
static shape_text rows_shape(const int64_t s[4], bool packed)
{
    const int64_t size[4] = {s[0], s[2], s[1], s[3]};
    shape_text text = shape(size);
    if (packed)
        snprintf(text.text, sizeof text.text, "(%" PRId64 ", %" PRId64 ", %" PRId64 ")", s[2], s[1], s[3]);
    return text;
}

static fa_status check_rows(const char *name, const fa_tensor *t, const int64_t size[4], bool packed, fa_error *err)
{
    for (int d = 0; d < 4; d++)
        if (t->size[d] != size[d])
            return refuse(err, FA_ERR_SHAPE, "%s has shape %s: it must be %s", name, rows_shape(t->size, packed).text,
                          rows_shape(size, packed).text);
    return check_tensor(name, t, err);
}

/* Rows that are written. */
static fa_status check_target(const char *name, const fa_tensor *t, const int64_t size[4], fa_error *err)
{
    TRY(check_rows(name, t, size, false, err));
    if (may_overlap(t))
        return refuse(err, FA_ERR_SHAPE, "%s has shape %s and strides %s: elements that are written must not share "
                      "memory",
                      name, rows_shape(t->size, false).text, rows_shape(t->stride, false).text);
    return FA_OK;
}

static fa_status check_new_rows(const fa_append_args *a, fa_error *err)
{
    const fa_tensor *k = &a->k_new, *v = &a->v_new;
    if (!is_float(k->dtype) || k->dtype != v->dtype)
        return refuse(err, FA_ERR_SHAPE,
                      "k_new and v_new have dtypes %s and %s: they must be the same, one of float32, bfloat16, float16 "
                      "and float64",
                      fa_dtype_name(k->dtype), fa_dtype_name(v->dtype));
    const bool packed = is_given(&a->cu_new);
    const int64_t batch = packed ? 1 : append_sequences(a);
    const int64_t k_size[4] = {batch, a->k_cache.size[1], k->size[2], a->k_cache.size[3]};
    const int64_t v_size[4] = {batch, a->k_cache.size[1], k->size[2], a->v_cache.size[3]};
    TRY(check_rows("k_new", k, k_size, packed, err));
    return check_rows("v_new", v, v_size, packed, err);
}

static fa_status check_head_dim(const char *name, int64_t dim, fa_error *err)
{
    if (dim < 1 || dim > FA_MAX_HEAD_DIM)
        return refuse(err, FA_ERR_SHAPE, "%s has head dimension %" PRId64 ": it must be between 1 and %d", name, dim,
                      FA_MAX_HEAD_DIM);
    return FA_OK;
}

static fa_status check_cache(const fa_append_args *a, fa_error *err)
{
    const fa_tensor *k = &a->k_cache, *v = &a->v_cache;
    const bool paged = is_given(&a->block_table);
    if (k->dtype != v->dtype || (k->dtype != a->k_new.dtype && k->dtype != FA_I8 && k->dtype != FA_F8E4M3))
        return refuse(err, FA_ERR_SHAPE,
                      "k_cache and v_cache have dtypes %s and %s: they must be the same, one of k_new's dtype %s, int8 "
                      "and float8_e4m3fn",
                      fa_dtype_name(k->dtype), fa_dtype_name(v->dtype), fa_dtype_name(a->k_new.dtype));
    TRY(check_head_dim("k_cache", k->size[3], err));
    TRY(check_head_dim("v_cache", v->size[3], err));
    const int64_t k_size[4] = {paged ? k->size[0] : append_sequences(a), k->size[1], k->size[2], k->size[3]};
    const int64_t v_size[4] = {k_size[0], k_size[1], k_size[2], v->size[3]};
    TRY(check_target("k_cache", k, k_size, err));
    TRY(check_target("v_cache", v, v_size, err));
    if (paged && k->size[2] < 1)
        return refuse(err, FA_ERR_SHAPE, "k_cache has pages of %" PRId64 " tokens: a page must hold at least 1",
                      k->size[2]);
    return FA_OK;
}

static fa_status check_scale(const char *name, const fa_tensor *t, const fa_tensor *cache, const fa_append_args *a,
                             fa_error *err)
{
    const bool quantised = fa_is_quantised(cache->dtype);
    const int64_t N = append_sequences(a), HK = cache->size[1], *s = t->size;
    if (is_given(t) != quantised)
        return refuse(err, FA_ERR_SHAPE, "%s is %s and the cache has dtype %s: it must be given for int8 and "
                      "float8_e4m3fn, and for no other dtype",
                      name, quantised ? "None" : "given", fa_dtype_name(cache->dtype));
    if (!quantised)
        return FA_OK;
    if (t->dtype != FA_F32)
        return refuse(err, FA_ERR_SHAPE, "%s has dtype %s: it must be float32", name, fa_dtype_name(t->dtype));
    if (a->scale_per_token) {
        const int64_t per_token[4] = {cache->size[0], HK, cache->size[2], 1};
        return check_target(name, t, per_token, err);
    }
    const bool heads_fit = s[1] == HK || (s[1] == 1 && s[0] == 1);
    if ((s[0] != 1 && s[0] != N) || !heads_fit || s[2] != 1 || s[3] != 1)
        return refuse(err, FA_ERR_SHAPE,
                      "%s has shape (%" PRId64 ", %" PRId64 "): it must be (), (%" PRId64 ",) for the heads of key and "
                      "value, (%" PRId64 ", %" PRId64 ") with the sequences, or one number a token",
                      name, s[0], s[1], HK, N, HK);
    return check_tensor(name, t, err);
}

static fa_status check_table(const fa_append_args *a, fa_error *err)
{
    const fa_tensor *t = &a->block_table;
    if (!is_given(t))
        return FA_OK;
    if (t->dtype != FA_I32 && t->dtype != FA_I64)
        return refuse(err, FA_ERR_SHAPE, "block_table has dtype %s: it must be int32 or int64",
                      fa_dtype_name(t->dtype));
    const int64_t size[4] = {append_sequences(a), t->size[1], 1, 1};
    TRY(check_form("block_table", t, size, t->dtype, err));
    if (t->size[1] > FA_MAX_SEQ || a->k_cache.size[2] > FA_MAX_SEQ)
        return refuse(err, FA_ERR_SHAPE,
                      "block_table has %" PRId64 " columns and pages have %" PRId64 " tokens: both must be at most "
                      "%" PRId64, t->size[1], a->k_cache.size[2], FA_MAX_SEQ);
    return FA_OK;
}

/* ---- append: rotary embedding ------------------------------------------------------------------------------------ */

static fa_status check_query(const fa_append_args *a, fa_error *err)
{
    const fa_tensor *q = &a->q;
    if (!is_given(q))
        return FA_OK;
    if (!is_float(q->dtype) || (is_given(&a->k_new) && q->dtype != a->k_new.dtype))
        return refuse(err, FA_ERR_SHAPE, "query has dtype %s: it must be that of k_new, one of float32, bfloat16, "
                      "float16 and float64",
                      fa_dtype_name(q->dtype));
    TRY(check_head_dim("query", q->size[3], err));
    const int64_t size[4] = {append_sequences(a), q->size[1], q->size[2], q->size[3]};
    TRY(check_rows("query", q, size, false, err));
    return check_result("turned query", &a->q_out, q->size, q->dtype, err);
}

static fa_status check_rope(const fa_append_args *a, fa_error *err)
{
    const fa_tensor *c = &a->rope_cos, *s = &a->rope_sin;
    if (is_given(c) != is_given(s))
        return refuse(err, FA_ERR_SHAPE, "%s is given and %s is not: rope_cos and rope_sin must be given together",
                      is_given(c) ? "rope_cos" : "rope_sin", is_given(c) ? "rope_sin" : "rope_cos");
    if (!is_given(c))
        return FA_OK;
    const fa_tensor *turned = is_given(&a->k_new) ? &a->k_new : &a->q;
    if (c->dtype != FA_F32 && c->dtype != turned->dtype)
        return refuse(err, FA_ERR_SHAPE, "rope_cos has dtype %s: it must be float32 or k_new's dtype %s",
                      fa_dtype_name(c->dtype), fa_dtype_name(turned->dtype));
    if (c->size[1] < 1 || c->size[1] * 2 > turned->size[3])
        return refuse(err, FA_ERR_SHAPE,
                      "rope_cos has shape (%" PRId64 ", %" PRId64 "): its second size must be between 1 and half the "
                      "head dimension %" PRId64,
                      c->size[0], c->size[1], turned->size[3]);
    const int64_t size[4] = {c->size[0], c->size[1], 1, 1};
    TRY(check_form("rope_cos", c, size, c->dtype, err));
    return check_form("rope_sin", s, size, c->dtype, err);
}

/* ---- append: values ---------------------------------------------------------------------------------------------- */

static fa_status check_cu_new(const fa_append_args *a, fa_error *err)
{
    const fa_tensor *t = &a->cu_new;
    if (!is_given(t))
        return FA_OK;
    const int64_t N = append_sequences(a);
    for (int64_t n = 0; n <= N; n++) {
        int64_t least = n ? fa_index_at(t, (n - 1) * t->stride[0]) : 0, most = n ? a->k_new.size[2] : 0;
        int64_t at = fa_index_at(t, n * t->stride[0]);
        if (at < least || at > most)
            return refuse(err, FA_ERR_SHAPE,
                          "cu_seqlens[%" PRId64 "] is %" PRId64 ": it must be between %" PRId64 " and %" PRId64
                          " (from 0 up to the rows of k_new)",
                          n, at, least, most);
    }
    return FA_OK;
}

static int64_t new_rows(const fa_append_args *a, int64_t n)
{
    const fa_tensor *t = &a->cu_new;
    return t->data ? fa_index_at(t, (n + 1) * t->stride[0]) - fa_index_at(t, n * t->stride[0]) : a->k_new.size[2];
}

static fa_status check_room(const fa_append_args *a, int64_t n, int64_t length, int64_t added, fa_error *err)
{
    const int64_t capacity = capacity_of(a), page = a->k_cache.size[2];
    if (length <= capacity && added <= capacity - length)
        return FA_OK;
    if (is_given(&a->block_table))
        return refuse(err, FA_ERR_SHAPE,
                      "cache_seqlens[%" PRId64 "] is %" PRId64 " and k_new adds %" PRId64 ": block_table has room for "
                      "%" PRId64 " tokens (%" PRId64 " pages of %" PRId64 "), the capacity of a sequence",
                      n, length, added, capacity, a->block_table.size[1], page);
    return refuse(err, FA_ERR_SHAPE,
                  "cache_seqlens[%" PRId64 "] is %" PRId64 " and k_new adds %" PRId64 ": the cache has a capacity of "
                  "%" PRId64 " tokens a sequence",
                  n, length, added, capacity);
}

static fa_status check_pages(const fa_append_args *a, int64_t n, int64_t length, int64_t added, fa_error *err)
{
    const fa_tensor *t = &a->block_table;
    const int64_t rows = a->k_cache.size[2], pages = a->k_cache.size[0];
    if (!t->data || added == 0)
        return FA_OK;
    for (int64_t at = length / rows; at <= (length + added - 1) / rows; at++) {
        int64_t page = fa_index_at(t, n * t->stride[0] + at * t->stride[1]);
        if (page < 0 || page >= pages)
            return refuse(err, FA_ERR_SHAPE,
                          "block_table[%" PRId64 "][%" PRId64 "] is %" PRId64 " and k_new is written there: it must be "
                          "between 0 and %" PRId64 ", the last page of the cache",
                          n, at, page, pages - 1);
    }
    return FA_OK;
}

static fa_status check_positions(const fa_append_args *a, int64_t n, int64_t length, int64_t added, fa_error *err)
{
    const int64_t table = a->rope_cos.size[0], queries = a->q.size[2], turned = added > queries ? added : queries;
    if (!is_given(&a->rope_cos) || turned == 0 || (length <= table && turned <= table - length))
        return FA_OK;
    return refuse(err, FA_ERR_SHAPE,
                  "cache_seqlens[%" PRId64 "] is %" PRId64 " and %" PRId64 " tokens are turned from there: rope_cos "
                  "has %" PRId64 " positions",
                  n, length, turned, table);
}

static fa_status check_append_values(const fa_append_args *a, fa_error *err)
{
    TRY(check_cu_new(a, err));
    for (int64_t n = 0; n < append_sequences(a); n++) {
        const int64_t length = fa_length_at(&a->seqlens, n, 0), added = is_given(&a->k_new) ? new_rows(a, n) : 0;
        if (length < 0)
            return refuse(err, FA_ERR_SHAPE, "cache_seqlens[%" PRId64 "] is %" PRId64 ": it must not be negative", n,
                          length);
        if (is_given(&a->k_new)) {
            TRY(check_room(a, n, length, added, err));
            TRY(check_pages(a, n, length, added, err));
        }
        TRY(check_positions(a, n, length, added, err));
    }
    return FA_OK;
}

fa_status fa_validate_append(const fa_append_args *a, fa_error *err)
{
    const int64_t N = append_sequences(a);
    if (is_given(&a->k_new) != is_given(&a->v_new))
        return refuse(err, FA_ERR_SHAPE, "%s is given and %s is not: k_new and v_new must be given together",
                      is_given(&a->k_new) ? "k_new" : "v_new", is_given(&a->k_new) ? "v_new" : "k_new");
    if (N < 0)
        return refuse(err, FA_ERR_SHAPE, "cu_seqlens has no elements: it must hold one more than there are sequences");
    TRY(check_lengths("cache_seqlens", &a->seqlens, N, err));
    if (!is_given(&a->seqlens))
        return refuse(err, FA_ERR_SHAPE, "cache_seqlens is None: it must be given");
    if (is_given(&a->k_new)) {
        TRY(check_lengths("cu_seqlens", &a->cu_new, N + 1, err));
        TRY(check_new_rows(a, err));
        TRY(check_cache(a, err));
        TRY(check_table(a, err));
        TRY(check_scale("k_scale", &a->k_scale, &a->k_cache, a, err));
        TRY(check_scale("v_scale", &a->v_scale, &a->v_cache, a, err));
    }
    TRY(check_query(a, err));
    TRY(check_rope(a, err));
    return a->device_memory ? FA_OK : check_append_values(a, err);
}

/* ---- merge ------------------------------------------------------------------------------------------------------- */

fa_status fa_validate_merge(const fa_merge_args *a, fa_error *err)
{
    const fa_tensor *out = &a->out_a, *lse = &a->lse_a;
    if (!is_float(out->dtype))
        return refuse(err, FA_ERR_SHAPE, "out_a has dtype %s: it must be float32, bfloat16, float16 or float64",
                      fa_dtype_name(out->dtype));
    if (lse->dtype != FA_F32 && lse->dtype != FA_F64)
        return refuse(err, FA_ERR_SHAPE, "lse_a has dtype %s: it must be float32 or float64",
                      fa_dtype_name(lse->dtype));
    const int64_t rows[4] = {out->size[0], out->size[1], out->size[2], 1};
    TRY(check_head_dim("out_a", out->size[3], err));
    TRY(check_tensor("out_a", out, err));
    TRY(check_form("lse_a", lse, rows, lse->dtype, err));
    TRY(check_form("out_b", &a->out_b, out->size, out->dtype, err));
    TRY(check_form("lse_b", &a->lse_b, rows, lse->dtype, err));
    TRY(check_result("out", &a->out, out->size, out->dtype, err));
    return check_result("lse", &a->lse, rows, lse->dtype, err);
}
