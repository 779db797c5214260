/* Eager attention in double on dense copies: the whole matrices of the definition in fa.h, nothing online, nothing
 * recomputed. And the magnitudes from which follows how far rounding may take a kernel from it. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "checkfa.h"
#include "common/fa_dtype.h"
#include "common/fa_philox.h"

/* ---- one element of what may be broadcast or absent -------------------------------------------------------------- */

static double element(const fa_tensor *t, int64_t b, int64_t h, int64_t i, int64_t j)
{
    const int64_t index[4] = {b, h, i, j};
    int64_t at = 0;
    for (int d = 0; d < 4; d++)
        at += t->size[d] == 1 ? 0 : index[d] * t->stride[d];
    return fa_load(t->data, t->dtype, at);
}

static int64_t length(const fa_tensor *t, int64_t b, int64_t full)
{
    return t->data ? (int64_t)element(t, b, 0, 0, 0) : full;
}

static int64_t position(const fa_args *a, int64_t b, int64_t i)
{
    int64_t q_len = length(&a->q_seqlens, b, a->q.size[2]), k_len = length(&a->kv_seqlens, b, a->k.size[2]);
    return a->bottom_right ? i + k_len - q_len : i;
}

bool ck_sees(const fa_args *a, int64_t b, int64_t h, int64_t i, int64_t j)
{
    if (i >= length(&a->q_seqlens, b, a->q.size[2]) || j >= length(&a->kv_seqlens, b, a->k.size[2]))
        return false;
    const int64_t ahead = j - position(a, b, i);
    if ((a->window_left >= 0 && -ahead > a->window_left) || (a->window_right >= 0 && ahead > a->window_right))
        return false;
    return !a->mask.data || a->mask.dtype != FA_BOOL || element(&a->mask, b, h, i, j) != 0;
}

/* ---- the matrices of one query head ------------------------------------------------------------------------------ */

typedef struct dense {
    const ck_problem *p;
    double *q, *k, *v, *dout, *dlse;
} dense;

typedef struct matrices {
    bool *seen;
    double *score, *slope, *keep, *weight, *dp, *dscore; /* SQ x SK each; see csrc/cpu/cpu_scalar_bwd.c for the names */
    double *sink_weight, *lse, *delta;                   /* SQ */
    double *out;                                         /* SQ x DV */
} matrices;

static double dot(const double *x, const double *y, int64_t n)
{
    double sum = 0;
    for (int64_t d = 0; d < n; d++)
        sum += x[d] * y[d];
    return sum;
}

static matrices matrices_make(const ck_case *c)
{
    const size_t n = (size_t)(c->SQ * c->SK) + 1, rows = (size_t)c->SQ + 1;
    double *all = calloc(6 * n + 3 * rows + rows * (size_t)c->DV, sizeof *all);
    return (matrices){.seen = calloc(n, 1), .score = all, .slope = all + n, .keep = all + 2 * n, .weight = all + 3 * n,
                      .dp = all + 4 * n, .dscore = all + 5 * n, .sink_weight = all + 6 * n,
                      .lse = all + 6 * n + rows, .delta = all + 6 * n + 2 * rows, .out = all + 6 * n + 3 * rows};
}

static void matrices_free(matrices *m)
{
    free(m->seen);
    free(m->score);
}

static void fill_scores(const dense *x, matrices *m, int64_t b, int64_t h)
{
    const ck_case *c = &x->p->c;
    const fa_args *a = &x->p->a;
    const uint32_t threshold = fa_dropout_threshold(a->dropout_p);
    for (int64_t i = 0; i < c->SQ; i++)
        for (int64_t j = 0; j < c->SK; j++) {
            const int64_t ij = i * c->SK + j, hk = h / (c->HQ / c->HK);
            m->seen[ij] = ck_sees(a, b, h, i, j);
            if (!m->seen[ij])
                continue;
            double s = a->scale * dot(x->q + ((b * c->HQ + h) * c->SQ + i) * c->D,
                                      x->k + ((b * c->HK + hk) * c->SK + j) * c->D, c->D);
            m->slope[ij] = a->scale;
            if (a->softcap > 0) {
                m->slope[ij] *= 1 - pow(tanh(s / a->softcap), 2);
                s = a->softcap * tanh(s / a->softcap);
            }
            if (a->mask.data && a->mask.dtype != FA_BOOL)
                s += element(&a->mask, b, h, i, j);
            if (a->alibi.data)
                s -= element(&a->alibi, b, h, 0, 0) * fabs((double)(position(a, b, i) - j));
            m->score[ij] = s;
            m->keep[ij] = 1;
            if (a->dropout_p > 0)
                m->keep[ij] = fa_dropout_keep(a->dropout_seed, threshold, b * c->HQ + h, i, j)
                                  ? fa_dropout_factor(a->dropout_p)
                                  : 0;
        }
}

static void fill_weights(const dense *x, matrices *m, int64_t b, int64_t h)
{
    const ck_case *c = &x->p->c;
    const fa_args *a = &x->p->a;
    for (int64_t i = 0; i < c->SQ; i++) {
        const double *s = m->score + i * c->SK;
        const bool *seen = m->seen + i * c->SK, in_length = i < length(&a->q_seqlens, b, c->SQ);
        double *w = m->weight + i * c->SK, sum = 0;
        const double sink = a->sinks.data && in_length ? element(&a->sinks, b, h, 0, 0) : -INFINITY;
        double most = sink;
        for (int64_t j = 0; j < c->SK; j++)
            if (seen[j] && s[j] > most)
                most = s[j];
        m->sink_weight[i] = sink > -INFINITY ? exp(sink - most) : 0;
        for (int64_t j = 0; j < c->SK; j++) {
            w[j] = seen[j] && s[j] != -INFINITY ? exp(s[j] - most) : 0;
            sum += w[j];
        }
        sum += m->sink_weight[i];
        m->lse[i] = sum == 0 ? -INFINITY : most + log(sum);
        for (int64_t j = 0; j < c->SK && sum != 0; j++)
            w[j] /= sum;
        if (sum != 0)
            m->sink_weight[i] /= sum;
    }
}

static void fill_out(const dense *x, matrices *m, int64_t b, int64_t hk)
{
    const ck_case *c = &x->p->c;
    memset(m->out, 0, sizeof(double) * (size_t)(c->SQ * c->DV));
    for (int64_t i = 0; i < c->SQ; i++)
        for (int64_t j = 0; j < c->SK; j++) {
            const double w = m->weight[i * c->SK + j] * m->keep[i * c->SK + j];
            for (int64_t d = 0; d < c->DV && w != 0; d++)
                m->out[i * c->DV + d] += w * x->v[((b * c->HK + hk) * c->SK + j) * c->DV + d];
        }
}

static void fill_gradients(const dense *x, matrices *m, int64_t b, int64_t h)
{
    const ck_case *c = &x->p->c;
    for (int64_t i = 0; i < c->SQ; i++) {
        const int64_t row = (b * c->HQ + h) * c->SQ + i, hk = h / (c->HQ / c->HK);
        m->delta[i] = 0;
        if (m->lse[i] == -INFINITY)
            continue;
        m->delta[i] = dot(x->dout + row * c->DV, m->out + i * c->DV, c->DV) - (x->dlse ? x->dlse[row] : 0);
        for (int64_t j = 0; j < c->SK; j++) {
            const int64_t ij = i * c->SK + j;
            if (!m->seen[ij] || m->score[ij] == -INFINITY)
                continue;
            m->dp[ij] = m->keep[ij] == 0 ? 0
                                         : m->keep[ij] * dot(x->dout + row * c->DV,
                                                             x->v + ((b * c->HK + hk) * c->SK + j) * c->DV, c->DV);
            m->dscore[ij] = m->weight[ij] * (m->dp[ij] - m->delta[i]);
        }
    }
}

/* ---- gradients of the inputs ------------------------------------------------------------------------------------- */

static void add_row(double *sum, double w, const double *x, int64_t n)
{
    for (int64_t d = 0; d < n && w != 0; d++)
        sum[d] += w * x[d];
}

static int64_t mask_index(const fa_tensor *m, int64_t b, int64_t h, int64_t i, int64_t j)
{
    const int64_t index[4] = {b, h, i, j};
    int64_t at = 0;
    for (int d = 0; d < 4; d++)
        at = at * m->size[d] + (m->size[d] == 1 ? 0 : index[d]);
    return at;
}

static void add_gradients(const dense *x, const matrices *m, ck_eager *e, int64_t b, int64_t h)
{
    const ck_case *c = &x->p->c;
    const fa_args *a = &x->p->a;
    for (int64_t i = 0; i < c->SQ; i++) {
        const int64_t row = (b * c->HQ + h) * c->SQ + i;
        if (a->dsinks.data && m->sink_weight[i] != 0)
            e->result[CK_DSINKS][(a->sinks.size[0] == 1 ? 0 : b) * c->HQ + h] -= m->sink_weight[i] * m->delta[i];
        for (int64_t j = 0; j < c->SK; j++) {
            const int64_t ij = i * c->SK + j, key = (b * c->HK + h / (c->HQ / c->HK)) * c->SK + j;
            if (!m->seen[ij])
                continue;
            const double ds = m->dscore[ij] * m->slope[ij];
            if (a->dq.data)
                add_row(e->result[CK_DQ] + row * c->D, ds, x->k + key * c->D, c->D);
            if (a->dk.data)
                add_row(e->result[CK_DK] + key * c->D, ds, x->q + row * c->D, c->D);
            if (a->dv.data)
                add_row(e->result[CK_DV] + key * c->DV, m->weight[ij] * m->keep[ij], x->dout + row * c->DV, c->DV);
            if (a->dmask.data)
                e->result[CK_DMASK][mask_index(&a->mask, b, h, i, j)] += m->dscore[ij];
        }
    }
}

/* ---- magnitudes -------------------------------------------------------------------------------------------------- */

static void raise_to(double *most, double x)
{
    x = fabs(x);
    if (isfinite(x) && x > *most) /* NaN is there on purpose, and rounds to nothing */
        *most = x;
}

static double largest_norm(const double *x, int64_t rows, int64_t n)
{
    double most = 0;
    for (int64_t i = 0; i < rows; i++)
        raise_to(&most, sqrt(dot(x + i * n, x + i * n, n)));
    return most;
}

static double largest(const double *x, int64_t n)
{
    double most = 0;
    for (int64_t i = 0; i < n; i++)
        raise_to(&most, x[i]);
    return most;
}

static void input_scales(const dense *x, ck_scales *s)
{
    const ck_case *c = &x->p->c;
    const int64_t queries = c->B * c->HQ * c->SQ, keys = c->B * c->HK * c->SK;
    s->q = largest(x->q, queries * c->D);
    s->k = largest(x->k, keys * c->D);
    s->v = largest(x->v, keys * c->DV);
    s->keep = fa_dropout_factor(c->dropout_p);
    s->score = fabs(c->scale) * largest_norm(x->q, queries, c->D) * largest_norm(x->k, keys, c->D);
    if (x->dout) {
        s->dout = largest(x->dout, queries * c->DV);
        s->dot = largest_norm(x->dout, queries, c->DV) * largest_norm(x->v, keys, c->DV) * s->keep;
    }
}

/* column and mask gather squares of weights: of one key, of one element of the mask */
static void matrix_scales(const dense *x, const matrices *m, ck_scales *s, int64_t b, int64_t h, double *column,
                          double *mask)
{
    const ck_case *c = &x->p->c;
    for (int64_t i = 0; i < c->SQ; i++) {
        raise_to(&s->dp, m->delta[i]);
        for (int64_t j = 0; j < c->SK; j++) {
            const int64_t ij = i * c->SK + j;
            const double w = m->weight[ij] * m->weight[ij];
            if (!m->seen[ij])
                continue;
            if (fabs(m->score[ij]) < 1e30) /* below it a hidden key's least finite number */
                raise_to(&s->score, m->score[ij]);
            raise_to(&s->dp, m->dp[ij]);
            if (!isfinite(w))
                continue;
            column[j] += w;
            if (x->p->c.mask)
                mask[mask_index(&x->p->a.mask, b, h, i, j)] += w;
        }
    }
}

/* ---- all of it --------------------------------------------------------------------------------------------------- */

static void keep_forward(const dense *x, const matrices *m, ck_eager *e, int64_t b, int64_t h)
{
    const ck_case *c = &x->p->c;
    const int64_t row = (b * c->HQ + h) * c->SQ;
    memcpy(e->result[CK_OUT] + row * c->DV, m->out, sizeof(double) * (size_t)(c->SQ * c->DV));
    memcpy(e->result[CK_LSE] + row, m->lse, sizeof(double) * (size_t)c->SQ);
}

static void make_heads(const dense *x, ck_eager *e, bool backward, bool full)
{
    const ck_case *c = &x->p->c;
    const size_t mask_count = c->mask ? (size_t)ck_count(&x->p->a.mask) : 0;
    double *column = malloc(sizeof(double) * (size_t)(c->SK + 1)), *mask = calloc(mask_count + 1, sizeof(double));
    for (int64_t b = 0; b < c->B; b++)
        for (int64_t h = 0; h < c->HQ; h++) {
            matrices m = matrices_make(c);
            if (h % (c->HQ / c->HK) == 0)
                memset(column, 0, sizeof(double) * (size_t)(c->SK + 1));
            fill_scores(x, &m, b, h);
            fill_weights(x, &m, b, h);
            if (full || backward)
                fill_out(x, &m, b, h / (c->HQ / c->HK));
            if (backward)
                fill_gradients(x, &m, b, h);
            if (full)
                keep_forward(x, &m, e, b, h);
            if (full && backward)
                add_gradients(x, &m, e, b, h);
            matrix_scales(x, &m, &e->scales, b, h, column, mask);
            raise_to(&e->scales.column, sqrt(largest(column, c->SK)));
            matrices_free(&m);
        }
    e->scales.mask = sqrt(largest(mask, (int64_t)mask_count));
    free(column);
    free(mask);
}

ck_eager ck_eager_make(const ck_problem *p, bool backward, bool full)
{
    fa_args *a = (fa_args *)&p->a;
    ck_eager e = {0};
    dense x = {.p = p, .q = ck_dense(&a->q), .k = ck_dense(&a->k), .v = ck_dense(&a->v)};
    if (backward) {
        x.dout = ck_dense(&a->dout);
        x.dlse = a->dlse.data ? ck_dense(&a->dlse) : NULL;
    }
    for (int id = CK_OUT; id < CK_TENSORS && full; id++)
        e.result[id] = calloc((size_t)ck_count(ck_tensor(a, id)) + 1, sizeof(double));
    input_scales(&x, &e.scales);
    make_heads(&x, &e, backward, full);
    free(x.q);
    free(x.k);
    free(x.v);
    free(x.dout);
    free(x.dlse);
    return e;
}

void ck_eager_free(ck_eager *e)
{
    for (int id = 0; id < CK_TENSORS; id++)
        free(e->result[id]);
}

/* ---- tolerance --------------------------------------------------------------------------------------------------- */

/* Half a unit in the last place of a number in [1, 2). */
static double roundoff(fa_dtype t)
{
    return t == FA_BF16 ? 0x1p-8 : t == FA_F16 ? 0x1p-11 : t == FA_F32 ? 0x1p-24 : 0x1p-53;
}

/* A score is wrong by about u |score|, u the roundoff of the arithmetic (fp32, or fp64 for float64), so a weight is
 * wrong by that part of itself; bf16 kernels also round weights and their gradients to bf16. From there the bounds
 * follow each formula of csrc/cpu/cpu_scalar_bwd.c, with sums of independent errors taken as their 2-norm. The
 * constants are what vector kernels need with room of about two; a dropped key or a wrong lane is far outside. */
ck_tolerance ck_tolerance_of(const ck_problem *p, const ck_scales *s, int id, bool eager)
{
    const fa_dtype T = p->c.dtype;
    const double u = T == FA_F64 ? 0x1p-53 : 0x1p-24, stored = roundoff(ck_tensor((fa_args *)&p->a, id)->dtype);
    const double weight = 4 * u * (s->score + 8) + (T == FA_BF16 ? 0x1p-8 : 0) + (eager ? roundoff(T) : 0);
    const double ds = 2 * weight * s->dp + 2 * u * s->dot, scale = fabs(p->c.scale);
    ck_tolerance t = {.relative = 2 * stored, .absolute = T == FA_F16 ? 0x1p-24 : 0};
    switch (id) {
    case CK_OUT: t.absolute += weight * s->v * s->keep; break;
    case CK_LSE: t.absolute += 4 * u * (s->score + 8) + (T == FA_BF16 ? 0x1p-10 : 0); break;
    case CK_DQ: t.absolute += scale * s->k * ds; break;
    case CK_DK: t.absolute += scale * s->q * ds * s->column; break;
    case CK_DV: t.absolute += weight * s->dout * s->keep * s->column; break;
    case CK_DMASK: t.absolute += ds * s->mask; break;
    case CK_DSINKS: t.absolute += ds * sqrt((double)(p->c.B * p->c.SQ)); break;
    }
    return t;
}

/* At the end of float's range a number only says that every key had the least finite score: kernels that work in
 * base 2 cannot tell -2.4e38 from -3.4e38. */
static bool both_at_the_end(double x, double y)
{
    return fmin(x, y) > 2e38 || fmax(x, y) < -2e38;
}

double ck_distance(const double *got, const double *want, int64_t n, ck_tolerance t, int64_t *where)
{
    double worst = 0;
    *where = 0;
    for (int64_t i = 0; i < n; i++) {
        double d = fabs(got[i] - want[i]) / (t.absolute + t.relative * fabs(want[i]));
        const bool finite = isfinite(got[i]) && isfinite(want[i]);
        if (got[i] == want[i] || (isnan(got[i]) && isnan(want[i])) || (finite && both_at_the_end(got[i], want[i])))
            d = 0;
        else if (!isfinite(d)) /* one of them is NaN or infinite, or no error is allowed */
            d = INFINITY;
        if (d > worst) {
            worst = d;
            *where = i;
        }
    }
    return worst;
}
