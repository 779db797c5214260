/* Every refusal a user can see is worded here, in the words of the Python call: the value seen, then the values
 * allowed. Cheap checks of scalars come first; the lengths, the only memory that is read, come last. */
#include <math.h>

#include "../common/fa_sequence.h"
#include "validate.h"

/* Beyond every position a query or key can have, and far enough from the ends of int64 to add positions to it. */
#define MAX_WINDOW ((int64_t)1 << 62)

/* ---- scalars ----------------------------------------------------------------------------------------------------- */

static fa_status check_scalars(const fa_args *a, fa_error *err)
{
    if (!isfinite(a->scale))
        return refuse(err, FA_ERR_VALUE, "scale is %g: it must be finite", a->scale);
    if (!isfinite(a->softcap) || a->softcap < 0)
        return refuse(err, FA_ERR_VALUE, "softcap is %g: it must be finite and at least 0 (0 = off)", a->softcap);
    if (a->window_left < -1 || a->window_left > MAX_WINDOW || a->window_right < -1 || a->window_right > MAX_WINDOW)
        return refuse(err, FA_ERR_VALUE,
                      "window is (%" PRId64 ", %" PRId64
                      "): each side must be -1 (unbounded) or between 0 and %" PRId64,
                      a->window_left, a->window_right, MAX_WINDOW);
    if (!(a->dropout_p >= 0 && a->dropout_p <= 1))
        return refuse(err, FA_ERR_VALUE, "dropout_p is %g: it must be between 0 and 1", a->dropout_p);
    return FA_OK;
}

/* ---- query, key, value ------------------------------------------------------------------------------------------- */

static fa_status check_dims(const fa_args *a, fa_error *err)
{
    const int64_t *q = a->q.size, *k = a->k.size, *v = a->v.size;
    if (!a->by_sequence && (q[0] != k[0] || q[0] != v[0]))
        return refuse(err, FA_ERR_SHAPE,
                      "query, key and value have batch sizes %" PRId64 ", %" PRId64 " and %" PRId64
                      ": they must be equal",
                      q[0], k[0], v[0]);
    if (k[1] != v[1])
        return refuse(err, FA_ERR_SHAPE, "key has %" PRId64 " heads and value %" PRId64 ": they must be equal", k[1],
                      v[1]);
    if (q[1] != k[1] && (k[1] == 0 || q[1] % k[1] != 0))
        return refuse(err, FA_ERR_SHAPE,
                      "query has %" PRId64 " heads, key and value %" PRId64
                      ": they must be equal, or with enable_gqa=True the second number must divide the first",
                      q[1], k[1]);
    if (k[2] != v[2])
        return refuse(err, FA_ERR_SHAPE, "key has length %" PRId64 " and value %" PRId64 ": they must be equal", k[2],
                      v[2]);
    if (q[2] > FA_MAX_SEQ || k[2] > FA_MAX_SEQ)
        return refuse(err, FA_ERR_SHAPE,
                      "query has length %" PRId64 " and key %" PRId64 ": lengths must be at most %" PRId64, q[2], k[2],
                      FA_MAX_SEQ);
    if (q[3] != k[3])
        return refuse(err, FA_ERR_SHAPE, "query has head dimension %" PRId64 " and key %" PRId64 ": they must be equal",
                      q[3], k[3]);
    if (q[3] < 1 || q[3] > FA_MAX_HEAD_DIM)
        return refuse(err, FA_ERR_SHAPE, "query and key have head dimension %" PRId64 ": it must be between 1 and %d",
                      q[3], FA_MAX_HEAD_DIM);
    if (v[3] < 1 || v[3] > FA_MAX_HEAD_DIM)
        return refuse(err, FA_ERR_SHAPE, "value has head dimension %" PRId64 ": it must be between 1 and %d", v[3],
                      FA_MAX_HEAD_DIM);
    return FA_OK;
}

static fa_status check_qkv(const fa_args *a, fa_error *err)
{
    fa_dtype t = a->q.dtype;
    bool quantised = a->by_sequence && fa_is_quantised(a->k.dtype);
    if (quantised && a->k.dtype != a->v.dtype)
        return refuse(err, FA_ERR_SHAPE, "key has dtype %s and value %s: they must be the same",
                      fa_dtype_name(a->k.dtype), fa_dtype_name(a->v.dtype));
    if (!is_float(t) || (!quantised && (a->k.dtype != t || a->v.dtype != t)))
        return refuse(err, FA_ERR_SHAPE,
                      "query, key and value have dtypes %s, %s and %s: they must be the same, one of float32, "
                      "bfloat16, float16 and float64",
                      fa_dtype_name(t), fa_dtype_name(a->k.dtype), fa_dtype_name(a->v.dtype));
    TRY(check_dims(a, err));
    TRY(check_tensor("query", &a->q, err));
    TRY(check_tensor("key", &a->k, err));
    if (a->q.size[1] > 0 && fa_sequences(a) > INT32_MAX / a->q.size[1]) /* dropout counts heads in 32 bits */
        return refuse(err, FA_ERR_SHAPE,
                      "query has batch size %" PRId64 " and %" PRId64 " heads: their product must be at most %d",
                      fa_sequences(a), a->q.size[1], INT32_MAX);
    return check_tensor("value", &a->v, err);
}

/* ---- optional inputs --------------------------------------------------------------------------------------------- */

static fa_status check_mask(const fa_args *a, fa_error *err)
{
    const fa_tensor *m = &a->mask;
    const int64_t full[4] = {a->q.size[0], a->q.size[1], a->q.size[2], a->k.size[2]};
    if (!is_given(m))
        return FA_OK;
    if (m->dtype != FA_BOOL && m->dtype != FA_F32 && m->dtype != a->q.dtype)
        return refuse(err, FA_ERR_SHAPE,
                      "attn_mask has dtype %s and query has %s: attn_mask must be bool, float32 or of query's dtype",
                      fa_dtype_name(m->dtype), fa_dtype_name(a->q.dtype));
    for (int d = 0; d < 4; d++)
        if (m->size[d] != 1 && m->size[d] != full[d])
            return refuse(err, FA_ERR_SHAPE,
                          "attn_mask has shape %s: each size must be 1 or that of (batch, heads, query length, key "
                          "length) = %s",
                          shape(m->size).text, shape(full).text);
    return check_tensor("attn_mask", m, err);
}

/* sinks and alibi_slopes: (HQ,) or (B, HQ) to the user */
static fa_status check_per_head(const char *name, const fa_tensor *t, const fa_args *a, fa_error *err)
{
    int64_t B = fa_sequences(a), HQ = a->q.size[1];
    if (!is_given(t))
        return FA_OK;
    if (t->dtype != FA_F32 && t->dtype != a->q.dtype)
        return refuse(err, FA_ERR_SHAPE, "%s has dtype %s and query has %s: %s must be float32 or of query's dtype",
                      name, fa_dtype_name(t->dtype), fa_dtype_name(a->q.dtype), name);
    if ((t->size[0] != 1 && t->size[0] != B) || t->size[1] != HQ || t->size[2] != 1 || t->size[3] != 1)
        return refuse(err, FA_ERR_SHAPE,
                      "%s has shape %s: it must be (1 or batch, heads, 1, 1) with batch %" PRId64 " and heads %" PRId64,
                      name, shape(t->size).text, B, HQ);
    return check_tensor(name, t, err);
}

static fa_status check_length_values(const char *name, const fa_tensor *t, int64_t limit, const char *whose,
                                     fa_error *err)
{
    if (!is_given(t))
        return FA_OK;
    for (int64_t b = 0; b < t->size[0]; b++) {
        int64_t length = fa_index_at(t, b * t->stride[0]);
        if (length < 0 || length > limit)
            return refuse(err, FA_ERR_SHAPE,
                          "%s[%" PRId64 "] is %" PRId64 ": it must be between 0 and %" PRId64 ", the length of %s",
                          name, b, length, limit, whose);
    }
    return FA_OK;
}

static fa_status check_inputs(const fa_args *a, bool backward, fa_error *err)
{
    TRY(check_scalars(a, err));
    TRY(check_qkv(a, err));
    TRY(fa_check_sequences(a, backward, err));
    TRY(check_mask(a, err));
    TRY(check_per_head("sinks", &a->sinks, a, err));
    TRY(check_per_head("alibi_slopes", &a->alibi, a, err));
    if (a->by_sequence)
        return FA_OK;
    TRY(check_lengths("q_seqlens", &a->q_seqlens, a->q.size[0], err));
    return check_lengths("kv_seqlens", &a->kv_seqlens, a->q.size[0], err);
}

static fa_status check_all_length_values(const fa_args *a, fa_error *err)
{
    if (a->device_memory)
        return FA_OK;
    if (a->by_sequence)
        return fa_check_sequence_values(a, err);
    TRY(check_length_values("q_seqlens", &a->q_seqlens, a->q.size[2], "query", err));
    return check_length_values("kv_seqlens", &a->kv_seqlens, a->k.size[2], "key", err);
}

/* ---- gradients --------------------------------------------------------------------------------------------------- */

static fa_status check_gradients(const fa_args *a, fa_error *err)
{
    if (is_given(&a->dq))
        TRY(check_result("grad_query", &a->dq, a->q.size, a->q.dtype, err));
    if (is_given(&a->dk))
        TRY(check_result("grad_key", &a->dk, a->k.size, a->k.dtype, err));
    if (is_given(&a->dv))
        TRY(check_result("grad_value", &a->dv, a->v.size, a->v.dtype, err));
    if (is_given(&a->dmask)) {
        if (!is_given(&a->mask) || a->mask.dtype == FA_BOOL)
            return refuse(err, FA_ERR_SHAPE, "grad_mask is wanted and attn_mask is %s: it must be of a float dtype",
                          is_given(&a->mask) ? "bool" : "absent");
        TRY(check_result("grad_mask", &a->dmask, a->mask.size, a->mask.dtype, err));
    }
    if (is_given(&a->dsinks)) {
        if (!is_given(&a->sinks))
            return refuse(err, FA_ERR_SHAPE, "grad_sinks is wanted and sinks is absent: it must be given");
        if (is_given(&a->cu_q) && a->sinks.size[0] != 1)
            return refuse(err, FA_ERR_SHAPE, "sinks has shape %s: packed sequences have a gradient for (heads,) only",
                          shape(a->sinks.size).text);
        TRY(check_result("grad_sinks", &a->dsinks, a->sinks.size, lse_dtype(a), err));
    }
    return FA_OK;
}

/* ---- the two directions ------------------------------------------------------------------------------------------ */

fa_status fa_validate_forward(const fa_args *a, fa_error *err)
{
    TRY(check_inputs(a, false, err));
    const int64_t out[4] = {a->q.size[0], a->q.size[1], a->q.size[2], a->v.size[3]};
    const int64_t lse[4] = {a->q.size[0], a->q.size[1], a->q.size[2], 1};
    TRY(check_result("out", &a->out, out, a->q.dtype, err));
    TRY(check_result("lse", &a->lse, lse, lse_dtype(a), err));
    return check_all_length_values(a, err);
}

fa_status fa_validate_backward(const fa_args *a, fa_error *err)
{
    TRY(check_inputs(a, true, err));
    const int64_t out[4] = {a->q.size[0], a->q.size[1], a->q.size[2], a->v.size[3]};
    const int64_t lse[4] = {a->q.size[0], a->q.size[1], a->q.size[2], 1};
    TRY(check_form("out", &a->out, out, a->q.dtype, err));
    TRY(check_form("lse", &a->lse, lse, lse_dtype(a), err));
    TRY(check_form("grad_out", &a->dout, out, a->q.dtype, err));
    if (is_given(&a->dlse))
        TRY(check_form("grad_lse", &a->dlse, lse, lse_dtype(a), err));
    TRY(check_gradients(a, err));
    return check_all_length_values(a, err);
}
