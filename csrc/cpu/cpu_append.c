/* Fills a cache: rotary embedding of queries and new keys, quantisation, and rows written behind those that each
 * sequence holds. Whatever is not turned, quantised or strided is copied as bytes. */
#include <float.h>
#include <math.h>
#include <stdatomic.h>

#include "../common/fa_sequence.h"
#include "cpu_row.h"

enum { TOKENS_A_TASK = 16, BYTES_A_WORKER = 1 << 17 };

/* ---- rotary embedding -------------------------------------------------------------------------------------------- */

/* cos and sin of one position; half = 0: nothing is turned */
typedef struct turn {
    int64_t half;
    bool interleaved;
    float cos[FA_MAX_HEAD_DIM / 2], sin[FA_MAX_HEAD_DIM / 2];
    double wide_cos[FA_MAX_HEAD_DIM / 2], wide_sin[FA_MAX_HEAD_DIM / 2]; /* of f64 rows */
} turn;

static void turn_at(const fa_append_args *a, int64_t position, bool wide, turn *t)
{
    const fa_tensor *c = &a->rope_cos, *s = &a->rope_sin;
    t->half = c->data ? c->size[1] : 0;
    t->interleaved = a->rope_interleaved;
    for (int64_t d = 0; d < t->half; d++) {
        double x = fa_load(c->data, c->dtype, position * c->stride[0] + d * c->stride[1]);
        double y = fa_load(s->data, s->dtype, position * s->stride[0] + d * s->stride[1]);
        if (wide) {
            t->wide_cos[d] = x;
            t->wide_sin[d] = y;
        } else {
            t->cos[d] = (float)x;
            t->sin[d] = (float)y;
        }
    }
}

/* pairs (x, y) -> (x cos - y sin, x sin + y cos) */
#define DEFINE_TURN(name, real, cosines, sines)                                                                        \
    static void name(real *row, const turn *t)                                                                         \
    {                                                                                                                  \
        const int64_t step = t->interleaved ? 2 : 1, other = t->interleaved ? 1 : t->half;                             \
        for (int64_t d = 0; d < t->half; d++) {                                                                        \
            const real x = row[d * step], y = row[d * step + other];                                                   \
            row[d * step] = x * t->cosines[d] - y * t->sines[d];                                                       \
            row[d * step + other] = x * t->sines[d] + y * t->cosines[d];                                               \
        }                                                                                                              \
    }

DEFINE_TURN(turn_f32, float, cos, sin)
DEFINE_TURN(turn_f64, double, wide_cos, wide_sin)

/* ---- one row of one head ----------------------------------------------------------------------------------------- */

/* What a stored element counts: given, or such that the row's largest magnitude becomes the dtype's largest number, and
 * then written; 1 for a row of zeros. NaN is no magnitude, and infinity counts as the largest float. */
static float scale_of_row(const fa_append_args *a, float *scale, const float *x, fa_dtype stored, int64_t n)
{
    float most = 0;
    if (!a->scale_per_token)
        return *scale;
    for (int64_t d = 0; d < n; d++)
        most = fabsf(x[d]) > most ? fabsf(x[d]) : most;
    const float by = (most < FLT_MAX ? most : FLT_MAX) / (stored == FA_I8 ? 127.0f : 448.0f);
    return *scale = by > 0 ? by : 1;
}

/* Row `from` to row `to`, turned by t (NULL: not) and, where scale is given, divided by it. */
static void move_row(const fa_append_args *a, const fa_tensor *source, const char *from, const fa_tensor *target,
                     char *to, const turn *t, float *scale)
{
    const int64_t n = source->size[3], in = source->stride[3], out = target->stride[3];
    const bool turned = t && t->half > 0;
    float x[FA_MAX_HEAD_DIM];
    if (!scale && !turned && in == 1 && out == 1) {
        memcpy(to, from, (size_t)n * fa_dtype_size(source->dtype));
        return;
    }
    if (source->dtype == FA_F64) {
        double wide[FA_MAX_HEAD_DIM];
        for (int64_t d = 0; d < n; d++)
            wide[d] = fa_load(from, FA_F64, d * in);
        if (turned)
            turn_f64(wide, t);
        for (int64_t d = 0; d < n; d++)
            if (scale)
                x[d] = (float)wide[d];
            else
                fa_store(to, FA_F64, d * out, wide[d]);
        if (!scale)
            return;
    } else {
        fa_row_load(x, from, source->dtype, in, n);
        if (turned)
            turn_f32(x, t);
    }
    if (scale) {
        const float by = scale_of_row(a, scale, x, target->dtype, n);
        for (int64_t d = 0; d < n; d++)
            x[d] /= by;
    }
    fa_row_store(to, target->dtype, out, x, n);
}

static char *row_at(const fa_tensor *t, int64_t b, int64_t h, int64_t s)
{
    int64_t at = b * t->stride[0] + h * t->stride[1] + s * t->stride[2];
    return (char *)t->data + at * (int64_t)fa_dtype_size(t->dtype);
}

/* ---- one token --------------------------------------------------------------------------------------------------- */

/* Sequence n, row i of it, and where that is: in k_new (b, s) and in the cache (batch, row). */
typedef struct place {
    int64_t n, i, b, s, batch, row;
} place;

/* the last sequence that starts at or before token: those without tokens start where the next one does */
static int64_t sequence_of(const fa_tensor *cu, int64_t token)
{
    int64_t low = 0, high = cu->size[0] - 1;
    while (high - low > 1) {
        int64_t middle = low + (high - low) / 2;
        if (fa_index_at(cu, middle * cu->stride[0]) <= token)
            low = middle;
        else
            high = middle;
    }
    return low;
}

static place place_of(const fa_append_args *a, int64_t token)
{
    place p;
    if (a->cu_new.data) {
        p.n = sequence_of(&a->cu_new, token);
        p.i = token - fa_index_at(&a->cu_new, p.n * a->cu_new.stride[0]);
        p.b = 0;
        p.s = token;
    } else {
        p.n = p.b = token / a->k_new.size[2];
        p.i = p.s = token % a->k_new.size[2];
    }
    p.batch = p.n;
    p.row = fa_length_at(&a->seqlens, p.n, 0) + p.i;
    if (a->block_table.data) {
        const int64_t rows = a->k_cache.size[2], *step = a->block_table.stride;
        p.batch = fa_index_at(&a->block_table, p.n * step[0] + p.row / rows * step[1]);
        p.row %= rows;
    }
    return p;
}

static float *scale_at(const fa_append_args *a, const fa_tensor *t, const place *p, int64_t h)
{
    if (!t->data)
        return NULL;
    if (a->scale_per_token)
        return (float *)(void *)row_at(t, p->batch, h, p->row);
    return (float *)(void *)row_at(t, t->size[0] > 1 ? p->n : 0, t->size[1] > 1 ? h : 0, 0);
}

static void append_token(const fa_append_args *a, int64_t token)
{
    const place p = place_of(a, token);
    turn t;
    turn_at(a, fa_length_at(&a->seqlens, p.n, 0) + p.i, a->k_new.dtype == FA_F64, &t);
    for (int64_t h = 0; h < a->k_new.size[1]; h++) {
        move_row(a, &a->k_new, row_at(&a->k_new, p.b, h, p.s), &a->k_cache, row_at(&a->k_cache, p.batch, h, p.row), &t,
                 scale_at(a, &a->k_scale, &p, h));
        move_row(a, &a->v_new, row_at(&a->v_new, p.b, h, p.s), &a->v_cache, row_at(&a->v_cache, p.batch, h, p.row),
                 NULL, scale_at(a, &a->v_scale, &p, h));
    }
}

static void turn_query(const fa_append_args *a, int64_t token)
{
    const int64_t n = token / a->q.size[2], i = token % a->q.size[2];
    turn t;
    turn_at(a, fa_length_at(&a->seqlens, n, 0) + i, a->q.dtype == FA_F64, &t);
    for (int64_t h = 0; h < a->q.size[1]; h++)
        move_row(a, &a->q, row_at(&a->q, n, h, i), &a->q_out, row_at(&a->q_out, n, h, i), &t, NULL);
}

/* ---- workers ----------------------------------------------------------------------------------------------------- */

typedef struct job {
    const fa_append_args *a;
    int64_t new_tokens, tokens; /* those of k_new come first, then those of q */
    _Atomic int64_t next;
} job;

static void work(void *ctx, int worker)
{
    job *j = ctx;
    int64_t first;
    (void)worker;
    while ((first = atomic_fetch_add_explicit(&j->next, TOKENS_A_TASK, memory_order_relaxed)) < j->tokens)
        for (int64_t t = first; t < first + TOKENS_A_TASK && t < j->tokens; t++) {
            if (t < j->new_tokens)
                append_token(j->a, t);
            else
                turn_query(j->a, t - j->new_tokens);
        }
}

static int64_t new_tokens(const fa_append_args *a)
{
    const fa_tensor *cu = &a->cu_new;
    if (!a->k_new.data)
        return 0;
    return cu->data ? fa_index_at(cu, (cu->size[0] - 1) * cu->stride[0]) : a->k_new.size[0] * a->k_new.size[2];
}

static int64_t row_bytes(const fa_tensor *t)
{
    return t->data ? t->size[1] * t->size[3] * (int64_t)fa_dtype_size(t->dtype) : 0;
}

fa_status fa_run_append(const fa_append_args *a, int num_threads, const fa_exec *exec, fa_error *err)
{
    (void)err;
    const int64_t keys = new_tokens(a), queries = a->q.data ? a->q.size[0] * a->q.size[2] : 0;
    job j = {.a = a, .new_tokens = keys, .tokens = keys + queries};
    const int64_t bytes = keys * (row_bytes(&a->k_new) + row_bytes(&a->v_new)) + queries * row_bytes(&a->q);
    int64_t workers = 1 + bytes / BYTES_A_WORKER;
    workers = workers < num_threads ? workers : num_threads;
    if (workers > 1 && exec->parallel)
        exec->parallel(exec->pool, (int)workers, work, &j);
    else
        work(&j, 0);
    return FA_OK;
}
