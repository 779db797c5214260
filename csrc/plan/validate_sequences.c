/* Refusals of what only a call by sequence has: packed rows, pages, quantised keys, tree masks. */
#include "../common/fa_sequence.h"
#include "validate.h"

/* What the user calls the lengths of the keys. */
static const char *lengths_name(const fa_args *a)
{
    return a->cu_q.data ? "seqused_k" : "cache_seqlens";
}

static bool is_index(const fa_tensor *t)
{
    return t->dtype == FA_I32 || t->dtype == FA_I64;
}

/* ---- forms ------------------------------------------------------------------------------------------------------- */

static fa_status check_offsets(const char *name, const fa_tensor *cu, const char *whose, const fa_tensor *rows,
                               fa_error *err)
{
    if (!is_given(cu))
        return FA_OK;
    if (!is_index(cu))
        return refuse(err, FA_ERR_SHAPE, "%s has dtype %s: it must be int32 or int64", name, fa_dtype_name(cu->dtype));
    if (cu->size[0] < 1 || cu->size[1] != 1 || cu->size[2] != 1 || cu->size[3] != 1)
        return refuse(err, FA_ERR_SHAPE, "%s has shape %s: it must hold one offset more than there are sequences, at "
                                         "least one", name, shape(cu->size).text);
    if (rows->size[0] != 1)
        return refuse(err, FA_ERR_SHAPE, "%s has batch size %" PRId64 ": with %s it must be 1", whose, rows->size[0],
                      name);
    return check_tensor(name, cu, err);
}

static fa_status check_table(const fa_args *a, fa_error *err)
{
    const fa_tensor *t = &a->block_table;
    int64_t n = fa_sequences(a);
    if (!is_given(t)) {
        if (a->page_size)
            return refuse(err, FA_ERR_SHAPE, "page_size is %" PRId64 " without block_table: it must be 0",
                          a->page_size);
        return FA_OK;
    }
    if (!is_index(t))
        return refuse(err, FA_ERR_SHAPE, "block_table has dtype %s: it must be int32 or int64",
                      fa_dtype_name(t->dtype));
    if (t->size[0] != n || t->size[2] != 1 || t->size[3] != 1)
        return refuse(err, FA_ERR_SHAPE,
                      "block_table has shape (%" PRId64 ", %" PRId64 "): it must have a row for each of the %" PRId64
                      " sequences", t->size[0], t->size[1], n);
    if (a->page_size < 1 || a->page_size != a->k.size[2])
        return refuse(err, FA_ERR_SHAPE,
                      "pages hold %" PRId64 " keys and page_size is %" PRId64 ": they must be equal and at least 1",
                      a->k.size[2], a->page_size);
    if (is_given(&a->cu_k) || !is_given(&a->kv_seqlens))
        return refuse(err, FA_ERR_SHAPE, "block_table is given %s: pages need %s and no cu_seq_k",
                      is_given(&a->cu_k) ? "together with cu_seq_k" : "without lengths", lengths_name(a));
    return check_tensor("block_table", t, err);
}

static fa_status check_key_batch(const fa_args *a, fa_error *err)
{
    int64_t n = fa_sequences(a);
    if (a->k.size[0] != a->v.size[0])
        return refuse(err, FA_ERR_SHAPE, "key has batch size %" PRId64 " and value %" PRId64 ": they must be equal",
                      a->k.size[0], a->v.size[0]);
    if (is_given(&a->block_table))
        return FA_OK;
    if (is_given(&a->cu_k)) {
        if (a->cu_k.size[0] != n + 1)
            return refuse(err, FA_ERR_SHAPE,
                          "cu_seq_k has %" PRId64 " elements: it must have %" PRId64 ", one more than there are "
                          "sequences", a->cu_k.size[0], n + 1);
        return FA_OK;
    }
    if (a->k.size[0] != n)
        return refuse(err, FA_ERR_SHAPE,
                      "key and value have batch size %" PRId64 ": it must be %" PRId64 ", the number of sequences",
                      a->k.size[0], n);
    return FA_OK;
}

static fa_status check_scale(const char *name, const fa_tensor *s, const char *whose, const fa_args *a, fa_error *err)
{
    const int64_t n = fa_sequences(a), *k = a->k.size;
    if (!fa_is_quantised(a->k.dtype)) {
        if (is_given(s))
            return refuse(err, FA_ERR_SHAPE, "%s is given and %s has dtype %s: scales go with int8 and float8_e4m3fn",
                          name, whose, fa_dtype_name(a->k.dtype));
        return FA_OK;
    }
    if (!is_given(s))
        return refuse(err, FA_ERR_SHAPE, "%s has dtype %s: it needs %s", whose, fa_dtype_name(a->k.dtype), name);
    if (s->dtype != FA_F32)
        return refuse(err, FA_ERR_SHAPE, "%s has dtype %s: it must be float32", name, fa_dtype_name(s->dtype));
    bool fits = a->scale_per_token
                    ? s->size[0] == k[0] && s->size[1] == k[1] && s->size[2] == k[2]
                    : (s->size[1] == k[1] ? s->size[0] == 1 || s->size[0] == n : s->size[0] == 1 && s->size[1] == 1) &&
                          s->size[2] == 1;
    if (!fits || s->size[3] != 1)
        return refuse(err, FA_ERR_SHAPE,
                      "%s has shape %s: as (batch or pages, heads, length, 1) it must be (1, 1, 1, 1), (1 or %" PRId64
                      ", %" PRId64 ", 1, 1) or per token (%" PRId64 ", %" PRId64 ", %" PRId64 ", 1)",
                      name, shape(s->size).text, n, k[1], k[0], k[1], k[2]);
    return check_tensor(name, s, err);
}

static fa_status check_tree(const fa_args *a, fa_error *err)
{
    const fa_tensor *t = &a->tree_mask;
    int64_t n = fa_sequences(a), sq = a->q.size[2];
    if (!is_given(t))
        return FA_OK;
    if (t->dtype != FA_BOOL)
        return refuse(err, FA_ERR_SHAPE, "tree_mask has dtype %s: it must be bool", fa_dtype_name(t->dtype));
    if (is_given(&a->cu_q) || t->size[0] != n || t->size[1] != 1 || t->size[2] != sq || t->size[3] != sq)
        return refuse(err, FA_ERR_SHAPE,
                      "tree_mask has shape (%" PRId64 ", %" PRId64 ", %" PRId64 "): it must be (batch, new tokens, new "
                      "tokens) = (%" PRId64 ", %" PRId64 ", %" PRId64 ")",
                      t->size[0], t->size[2], t->size[3], n, sq, sq);
    return check_tensor("tree_mask", t, err);
}

static fa_status check_inference(const fa_args *a, fa_error *err)
{
    const char *what = is_given(&a->block_table)      ? "block_table"
                       : fa_is_quantised(a->k.dtype)  ? "a quantised key"
                       : is_given(&a->tree_mask)      ? "tree_mask"
                       : a->splits_wanted             ? "num_splits"
                                                      : NULL;
    if (what)
        return refuse(err, FA_ERR_UNSUPPORTED, "%s is given: it is inference-only, there is no gradient with it", what);
    return FA_OK;
}

fa_status fa_check_sequences(const fa_args *a, bool backward, fa_error *err)
{
    if (!a->by_sequence) {
        if (is_given(&a->cu_q) || is_given(&a->cu_k) || is_given(&a->block_table) || is_given(&a->tree_mask) ||
            a->page_size || a->splits_wanted || fa_is_quantised(a->k.dtype))
            return refuse(err, FA_ERR_VALUE, "packed, paged, quantised or tree-masked keys need by_sequence");
        return FA_OK;
    }
    if (is_given(&a->mask) || is_given(&a->q_seqlens))
        return refuse(err, FA_ERR_VALUE, "%s is given: a call by sequence takes none",
                      is_given(&a->mask) ? "attn_mask" : "q_seqlens");
    if (a->splits_wanted < 0)
        return refuse(err, FA_ERR_VALUE, "num_splits is %" PRId64 ": it must be at least 1", a->splits_wanted);
    if (backward)
        TRY(check_inference(a, err));
    TRY(check_offsets("cu_seq_q", &a->cu_q, "query", &a->q, err));
    TRY(check_offsets("cu_seq_k", &a->cu_k, "key", &a->k, err));
    TRY(check_table(a, err));
    TRY(check_key_batch(a, err));
    TRY(check_scale("k_scale", &a->k_scale, "key", a, err));
    TRY(check_scale("v_scale", &a->v_scale, "value", a, err));
    TRY(check_tree(a, err));
    return check_lengths(lengths_name(a), &a->kv_seqlens, fa_sequences(a), err);
}

/* ---- values ------------------------------------------------------------------------------------------------------ */

static fa_status check_offset_values(const char *name, const fa_tensor *cu, int64_t rows, fa_error *err)
{
    if (!is_given(cu))
        return FA_OK;
    int64_t before = 0;
    for (int64_t n = 0; n < cu->size[0]; n++) {
        int64_t at = fa_index_at(cu, n * cu->stride[0]);
        if (n == 0 && at != 0)
            return refuse(err, FA_ERR_SHAPE, "%s[0] is %" PRId64 ": it must be 0", name, at);
        if (at < before || at > rows)
            return refuse(err, FA_ERR_SHAPE,
                          "%s[%" PRId64 "] is %" PRId64 ": it must be between %" PRId64 ", the offset before it, and %"
                          PRId64 ", the number of rows", name, n, at, before, rows);
        before = at;
    }
    return FA_OK;
}

/* The keys that sequence n has room for. */
static int64_t capacity(const fa_args *a, int64_t n)
{
    if (is_given(&a->block_table))
        return a->block_table.size[1] * a->page_size;
    if (is_given(&a->cu_k))
        return fa_index_at(&a->cu_k, (n + 1) * a->cu_k.stride[0]) - fa_index_at(&a->cu_k, n * a->cu_k.stride[0]);
    return a->k.size[2];
}

static fa_status check_used_pages(const fa_args *a, int64_t n, int64_t used, fa_error *err)
{
    const fa_tensor *t = &a->block_table;
    int64_t pages = is_given(t) ? (used + a->page_size - 1) / a->page_size : 0;
    for (int64_t i = 0; i < pages; i++) {
        int64_t page = fa_index_at(t, n * t->stride[0] + i * t->stride[1]);
        if (page < 0 || page >= a->k.size[0])
            return refuse(err, FA_ERR_SHAPE,
                          "block_table[%" PRId64 "][%" PRId64 "] is %" PRId64 ": the pages of the first %" PRId64
                          " keys must be between 0 and %" PRId64,
                          n, i, page, used, a->k.size[0] - 1);
    }
    return FA_OK;
}

fa_status fa_check_sequence_values(const fa_args *a, fa_error *err)
{
    if (!a->by_sequence)
        return FA_OK;
    TRY(check_offset_values("cu_seq_q", &a->cu_q, a->q.size[2], err));
    TRY(check_offset_values("cu_seq_k", &a->cu_k, a->k.size[2], err));
    if (!is_given(&a->kv_seqlens) && !is_given(&a->tree_mask))
        return FA_OK;
    for (int64_t n = 0; n < fa_sequences(a); n++) {
        int64_t room = capacity(a, n), used = fa_length_at(&a->kv_seqlens, n, room);
        int64_t least = is_given(&a->tree_mask) ? a->q.size[2] : 0;
        if (used < least || used > room)
            return refuse(err, FA_ERR_SHAPE,
                          "%s[%" PRId64 "] is %" PRId64 ": it must be between %" PRId64 " and %" PRId64
                          ", the capacity of the %s",
                          lengths_name(a), n, used, least, room,
                          is_given(&a->block_table) ? "sequence's row of block_table"
                          : is_given(&a->cu_k)      ? "sequence's rows of key"
                                                    : "cache");
        TRY(check_used_pages(a, n, used, err));
    }
    return FA_OK;
}
