/* Forward: one query row at a time, its keys streamed through the online softmax (Milakov and Gimelshein, 2018).
 *
 * After any number of keys, with s the scores seen so far:
 *   m = max s,   l = sum exp(s - m),   acc = sum exp(s - m) V
 * A larger score m' multiplies l and acc by exp(m - m'). At the end out = acc / l and lse = m + log l. A sink is a key
 * whose value row is zero: it starts m and l and never touches acc. */
#include "../plan/plan.h"
#include "cpu_scalar.h"

typedef struct softmax {
    double m, l;
    double *acc;
    int64_t n;
} softmax;

/* The weight exp(s - m) of a new score, everything before brought to the new maximum. */
static inline double softmax_weight(softmax *x, double s)
{
    if (s > x->m) {
        double shrink = exp(x->m - s);
        for (int64_t d = 0; d < x->n; d++)
            x->acc[d] *= shrink;
        x->l *= shrink;
        x->m = s;
    }
    double weight = exp(s - x->m); /* NaN for a score of +inf or NaN, as in eager attention */
    x->l += weight;
    return weight;
}

FA_SCALAR_BODY void fwd_keys(const fa_scalar_head *head, int64_t i, const double *q, softmax *x, fa_dtype T)
{
    const fa_args *a = head->a;
    const fa_range keys = fa_keys_of_queries(&head->span, i, i);
    for (int64_t j = keys.lo; j < keys.hi; j++) {
        if (fa_scalar_hidden(head, i, j))
            continue;
        const char *k = (const char *)a->k.data + fa_key_row(a, &a->k, head->b, head->hk, j);
        double dot = a->k.dtype == T ? fa_scalar_dot(q, k, 0, a->k.stride[3], a->k.size[3], T)
                                     : fa_scalar_dot(q, k, 0, a->k.stride[3], a->k.size[3], a->k.dtype) *
                                           fa_key_scale(a, &a->k_scale, head->hk, j);
        double s = fa_scalar_score_of(head, i, j, dot).value;
        if (s == -INFINITY) /* weight 0, also while m is -inf, where s - m would be NaN */
            continue;
        double weight = softmax_weight(x, s) * fa_scalar_dropout(head, i, j); /* l counts dropped keys too */
        if (weight == 0)
            continue;
        const char *v = (const char *)a->v.data + fa_key_row(a, &a->v, head->b, head->hk, j);
        if (a->v.dtype == T)
            fa_scalar_add(x->acc, weight, v, 0, a->v.stride[3], x->n, T);
        else
            fa_scalar_add(x->acc, weight * fa_key_scale(a, &a->v_scale, head->hk, j), v, 0, a->v.stride[3], x->n,
                          a->v.dtype);
    }
}

FA_SCALAR_BODY void fwd_row(const fa_scalar_head *head, int64_t i, double *q, double *acc, fa_dtype T)
{
    const fa_args *a = head->a;
    const int64_t D = a->q.size[3], DV = a->v.size[3];
    softmax x = {.m = -INFINITY, .l = 0, .acc = acc, .n = DV};
    for (int64_t d = 0; d < DV; d++)
        acc[d] = 0;
    if (i < head->span.q_len) {
        if (head->sink != -INFINITY) {
            x.m = head->sink;
            x.l = exp(head->sink - x.m); /* 1, or NaN for an infinite sink */
        }
        fa_scalar_read(q, a->q.data, fa_row_at(&a->q, head->b, head->h, i), a->q.stride[3], D, T);
        fwd_keys(head, i, q, &x, T);
    }
    const bool nothing_seen = x.l == 0;
    for (int64_t d = 0; d < DV; d++)
        acc[d] = nothing_seen ? 0 : acc[d] / x.l;
    fa_scalar_write(a->out.data, fa_row_at(&a->out, head->b, head->h, i), a->out.stride[3], acc, DV, T);
    fa_store(a->lse.data, T == FA_F64 ? FA_F64 : FA_F32, fa_row_at(&a->lse, head->b, head->h, i),
             nothing_seen ? -INFINITY : x.m + log(x.l));
}

/* task = (b * HQ + h) * blocks + block */
FA_SCALAR_BODY void fwd_task(const fa_args *a, int64_t task, char *scratch, fa_dtype T)
{
    const int64_t HQ = a->q.size[1], SQ = a->q.size[2], blocks = fa_ceil_div(SQ, FA_SCALAR_BLOCK);
    const int64_t first = task % blocks * FA_SCALAR_BLOCK, last = fa_min64(first + FA_SCALAR_BLOCK, SQ);
    const fa_scalar_head head = fa_scalar_head_at(a, task / blocks / HQ, task / blocks % HQ);
    double *q = (double *)scratch, *acc = q + FA_MAX_HEAD_DIM;
    for (int64_t i = first; i < last; i++)
        fwd_row(&head, i, q, acc, T);
}

#define FWD(dtype, T)                                                                                                  \
    static void fa_fwd_scalar_##dtype(const fa_args *a, const fa_plan *plan, int64_t task, char *scratch,              \
                                      char *shared)                                                                    \
    {                                                                                                                  \
        (void)plan, (void)shared;                                                                                      \
        fwd_task(a, task, scratch, T);                                                                                 \
    }

FWD(f32, FA_F32)
FWD(bf16, FA_BF16)
FWD(f16, FA_F16)
FWD(f64, FA_F64)

void fa_cpu_ops_scalar(fa_cpu_ops *ops)
{
    *ops = (fa_cpu_ops){
        .fwd = {{"fa_fwd_scalar_f32", fa_fwd_scalar_f32},
                {"fa_fwd_scalar_bf16", fa_fwd_scalar_bf16},
                {"fa_fwd_scalar_f16", fa_fwd_scalar_f16},
                {"fa_fwd_scalar_f64", fa_fwd_scalar_f64}},
        .panel_rows = 1,
        .lanes = 1,
        .target = "scalar",
    };
    fa_cpu_ops_scalar_bwd(ops);
}
