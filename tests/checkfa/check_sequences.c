/* Calls by sequence: packed rows, pages, quantised keys, tree masks, split keys.
 *
 * Each is computed as a whole, then sequence by sequence as lone dense calls of the same kernels: bit for bit the same.
 * The lone calls of the scalar kernel in float64, on the values that the stored keys stand for, say what is right. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkfa.h"
#include "common/fa_sequence.h"
#include "plan/plan.h"

enum { MOST = 6, POISON = 0xFF };

typedef struct seq_case {
    fa_dtype dtype, stored; /* of queries; of keys and values */
    int64_t N, HQ, HK, D, DV, page; /* page 0: packed keys */
    int64_t q_len[MOST], k_len[MOST];
    int64_t left, right, splits;
    double softcap, dropout_p;
    bool sinks, alibi, tree, per_token, backward;
    uint64_t seed;
} seq_case;

/* The whole call and its memory; tensors are views into `memory`. */
typedef struct seq_problem {
    seq_case c;
    fa_args a;
    int64_t q_first[MOST + 1], k_first[MOST + 1];
    ck_guarded memory[32];
    int count;
} seq_problem;

static const char *describe(const seq_case *c)
{
    static char text[400];
    int n = snprintf(text, sizeof text, "%s over %s N%" PRId64 " H%" PRId64 "/%" PRId64 " D%" PRId64 " DV%" PRId64
                     " page %" PRId64 " window (%" PRId64 ", %" PRId64 ") splits %" PRId64 " softcap %g dropout %g%s%s"
                     "%s%s%s lengths", fa_dtype_name(c->dtype), fa_dtype_name(c->stored), c->N, c->HQ, c->HK, c->D,
                     c->DV, c->page, c->left, c->right, c->splits, c->softcap, c->dropout_p, c->sinks ? " sinks" : "",
                     c->alibi ? " alibi" : "", c->tree ? " tree" : "", c->per_token ? " per token" : "",
                     c->backward ? " backward" : "");
    for (int64_t i = 0; i < c->N; i++)
        n += snprintf(text + n, sizeof text - (size_t)n, " %" PRId64 ":%" PRId64, c->q_len[i], c->k_len[i]);
    return text;
}

/* ---- memory ------------------------------------------------------------------------------------------------------ */

/* (size[0], size[2], size[1], size[3]) in memory, as (B, S, H, D) is laid out; poisoned */
static fa_tensor make(seq_problem *p, fa_dtype dtype, int64_t b, int64_t h, int64_t s, int64_t d)
{
    ck_guarded *g = &p->memory[p->count++];
    *g = ck_guard((size_t)(b * h * s * d) * fa_dtype_size(dtype) + 8);
    return (fa_tensor){.data = g->start, .size = {b, h, s, d}, .stride = {s * h * d, d, h * d, 1}, .dtype = dtype};
}

static int64_t at(const fa_tensor *t, int64_t b, int64_t h, int64_t s, int64_t d)
{
    return b * t->stride[0] + h * t->stride[1] + s * t->stride[2] + d * t->stride[3];
}

static void fill_row(fa_tensor *t, int64_t b, int64_t h, int64_t s, ck_rng *r, double magnitude)
{
    for (int64_t d = 0; d < t->size[3]; d++)
        fa_store(t->data, t->dtype, at(t, b, h, s, d), magnitude * ck_normal(r));
}

static void fill(fa_tensor *t, ck_rng *r, double magnitude)
{
    for (int64_t b = 0; b < t->size[0]; b++)
        for (int64_t h = 0; h < t->size[1]; h++)
            for (int64_t s = 0; s < t->size[2]; s++)
                fill_row(t, b, h, s, r, magnitude);
}

/* (n, m, 1, 1) int32 or int64 */
static fa_tensor make_index(seq_problem *p, ck_rng *r, int64_t n, int64_t m)
{
    return make(p, ck_chance(r, 50) ? FA_I32 : FA_I64, n, m, 1, 1);
}

static void put(fa_tensor *t, int64_t i, int64_t j, int64_t x)
{
    fa_store(t->data, t->dtype, i * t->stride[0] + j * t->stride[1], (double)x);
}

/* ---- the whole call ---------------------------------------------------------------------------------------------- */

static void make_keys(seq_problem *p, ck_rng *r)
{
    const seq_case *c = &p->c;
    fa_args *a = &p->a;
    int64_t widest = 1, pages = 3, next = 0, most = 0;
    for (int64_t n = 0; n < c->N; n++) {
        int64_t used = c->page ? fa_ceil_div(c->k_len[n], c->page) : 0;
        pages += used;
        widest = used + 1 > widest ? used + 1 : widest;
        most += c->k_len[n];
    }
    int64_t b = c->page ? pages : 1, s = c->page ? c->page : most + 2;
    a->k = make(p, c->stored, b, c->HK, s, c->D);
    a->v = make(p, c->stored, b, c->HK, s, c->DV);
    bool quantised = c->stored != c->dtype;
    if (quantised) {
        a->scale_per_token = c->per_token;
        a->k_scale = make(p, FA_F32, c->per_token ? b : 1, c->HK, c->per_token ? s : 1, 1);
        a->v_scale = make(p, FA_F32, c->per_token ? b : 1, c->HK, c->per_token ? s : 1, 1);
    }
    if (c->page) {
        a->page_size = c->page;
        a->block_table = make_index(p, r, c->N, widest);
        a->kv_seqlens = make_index(p, r, c->N, 1);
        for (int64_t n = 0; n < c->N; n++) {
            put(&a->kv_seqlens, n, 0, c->k_len[n]);
            for (int64_t i = 0; i < widest; i++) /* what lies past the length is wild */
                put(&a->block_table, n, i,
                    i < fa_ceil_div(c->k_len[n], c->page) ? pages - 1 - next++ : i % 2 ? INT32_MAX : -7);
        }
    } else {
        a->cu_k = make_index(p, r, c->N + 1, 1);
        for (int64_t n = 0; n <= c->N; n++)
            put(&a->cu_k, n, 0, p->k_first[n]);
    }
    double unit = !quantised ? 1 : c->stored == FA_I8 ? 40 : 3;
    for (int64_t n = 0; n < c->N; n++) {
        fa_args one = fa_sequence(a, n);
        for (int64_t h = 0; h < c->HK; h++)
            for (int64_t j = 0; j < c->k_len[n]; j++) {
                fa_tensor k = one.k, v = one.v; /* rows where fa_key_row finds them */
                k.data = (char *)one.k.data + fa_key_row(&one, &one.k, 0, h, j);
                v.data = (char *)one.v.data + fa_key_row(&one, &one.v, 0, h, j);
                fill_row(&k, 0, 0, 0, r, unit);
                fill_row(&v, 0, 0, 0, r, unit);
                if (quantised && (c->per_token || j == 0)) {
                    const float *ks = fa_key_scale_at(&one, &one.k_scale, h, j);
                    const float *vs = fa_key_scale_at(&one, &one.v_scale, h, j);
                    *(float *)(uintptr_t)ks = (float)((0.5 + ck_uniform(r)) / unit);
                    *(float *)(uintptr_t)vs = (float)((0.5 + ck_uniform(r)) / unit);
                }
            }
    }
}

static void make_options(seq_problem *p, ck_rng *r)
{
    const seq_case *c = &p->c;
    fa_args *a = &p->a;
    a->by_sequence = true;
    a->scale = 1 / sqrt((double)c->D);
    a->softcap = c->softcap;
    a->window_left = c->left;
    a->window_right = c->right;
    a->bottom_right = true;
    a->dropout_p = c->dropout_p;
    a->dropout_seed = ck_next(r);
    a->splits_wanted = c->splits;
    if (c->sinks) {
        a->sinks = make(p, FA_F32, 1, c->HQ, 1, 1);
        fill(&a->sinks, r, 2);
    }
    if (c->alibi) {
        a->alibi = make(p, FA_F32, c->backward ? 1 : c->N, c->HQ, 1, 1);
        fill(&a->alibi, r, 0.1);
    }
}

/* Dense queries of a batch where there is a tree, else packed ones. */
static void make_queries(seq_problem *p, ck_rng *r)
{
    const seq_case *c = &p->c;
    fa_args *a = &p->a;
    int64_t b = c->tree ? c->N : 1, s = c->tree ? c->q_len[0] : p->q_first[c->N] + 3;
    a->q = make(p, c->dtype, b, c->HQ, s, c->D);
    a->out = make(p, c->dtype, b, c->HQ, s, c->DV);
    a->lse = make(p, c->dtype == FA_F64 ? FA_F64 : FA_F32, b, c->HQ, s, 1);
    if (c->tree) {
        fill(&a->q, r, 1);
        a->tree_mask = make(p, FA_BOOL, c->N, 1, s, s);
        for (int64_t i = 0; i < c->N * s * s; i++)
            ((uint8_t *)a->tree_mask.data)[i] = ck_chance(r, 60);
        return;
    }
    a->cu_q = make_index(p, r, c->N + 1, 1);
    for (int64_t n = 0; n <= c->N; n++)
        put(&a->cu_q, n, 0, p->q_first[n]);
    for (int64_t h = 0; h < c->HQ; h++)
        for (int64_t i = 0; i < p->q_first[c->N]; i++) /* the rows past the last sequence stay NaN */
            fill_row(&a->q, 0, h, i, r, 1);
}

static void make_gradients(seq_problem *p, ck_rng *r)
{
    const seq_case *c = &p->c;
    fa_args *a = &p->a;
    a->dout = make(p, c->dtype, 1, c->HQ, a->q.size[2], c->DV);
    a->dlse = make(p, a->lse.dtype, 1, c->HQ, a->q.size[2], 1);
    for (int64_t h = 0; h < c->HQ; h++)
        for (int64_t i = 0; i < p->q_first[c->N]; i++) {
            fill_row(&a->dout, 0, h, i, r, 1);
            fill_row(&a->dlse, 0, h, i, r, 1);
        }
    a->dq = make(p, c->dtype, 1, c->HQ, a->q.size[2], c->D);
    a->dk = make(p, c->dtype, 1, c->HK, a->k.size[2], c->D);
    a->dv = make(p, c->dtype, 1, c->HK, a->v.size[2], c->DV);
}

static void make_problem(seq_problem *p, const seq_case *c)
{
    ck_rng r = ck_seeded(c->seed, 11);
    *p = (seq_problem){.c = *c};
    for (int64_t n = 0; n < c->N; n++) {
        p->q_first[n + 1] = p->q_first[n] + c->q_len[n];
        p->k_first[n + 1] = p->k_first[n] + c->k_len[n];
    }
    make_options(p, &r);
    make_queries(p, &r);
    make_keys(p, &r);
}

static void free_problem(seq_problem *p)
{
    for (int i = 0; i < p->count; i++)
        ck_guard_free(&p->memory[i]);
}

/* ---- runs -------------------------------------------------------------------------------------------------------- */

static bool run(const fa_args *a, bool backward, int threads, fa_plan *plan, fa_error *err)
{
    if (backward ? fa_validate_backward(a, err) : fa_validate_forward(a, err))
        return false;
    backward ? fa_plan_backward(a, threads, plan) : fa_plan_forward(a, threads, plan);
    ck_guarded workspace = ck_guard(plan->workspace);
    fa_exec exec = {.parallel = ck_pool_threads, .workspace = workspace.start, .workspace_size = plan->workspace};
    fa_status status = backward ? fa_run_backward(a, plan, &exec, err) : fa_run_forward(a, plan, &exec, err);
    bool intact = ck_guard_intact(&workspace);
    ck_guard_free(&workspace);
    if (!intact)
        snprintf(err->text, sizeof err->text, "memory before the workspace was written");
    return status == FA_OK && intact;
}

/* A dense copy of t in a dtype, as malloc'ed memory; scale may be absent. */
static fa_tensor copy_of(const fa_args *a, const fa_tensor *t, const fa_tensor *scale, bool keys, fa_dtype dtype)
{
    fa_tensor c = {.size = {1, t->size[1], t->size[2], t->size[3]}, .dtype = dtype};
    c.stride[3] = 1, c.stride[2] = c.size[3], c.stride[1] = c.size[2] * c.stride[2], c.stride[0] = c.size[1] * c.stride[1];
    c.data = malloc((size_t)c.stride[0] * fa_dtype_size(dtype) + 8);
    memset(c.data, POISON, (size_t)c.stride[0] * fa_dtype_size(dtype));
    for (int64_t h = 0; h < c.size[1]; h++)
        for (int64_t s = 0; s < c.size[2]; s++)
            for (int64_t d = 0; d < c.size[3]; d++) {
                int64_t row = keys ? fa_key_row(a, t, 0, h, s) / (int64_t)fa_dtype_size(t->dtype) : at(t, 0, h, s, 0);
                double x = fa_load(t->data, t->dtype, row + d * t->stride[3]);
                if (scale && scale->data && dtype == FA_F64)
                    x *= fa_key_scale(a, scale, h, s);
                fa_store(c.data, dtype, at(&c, 0, h, s, d), x);
            }
    return c;
}

static fa_tensor scales_of(const fa_args *a, const fa_tensor *scale, int64_t keys)
{
    fa_tensor c = {.size = {1, a->k.size[1], keys, 1}, .stride = {a->k.size[1] * keys, keys, 1, 1}, .dtype = FA_F32};
    float *x = malloc((size_t)(a->k.size[1] * keys) * 4 + 8);
    for (int64_t i = 0; i < a->k.size[1] * keys; i++)
        x[i] = fa_key_scale(a, scale, i / keys, i % keys);
    c.data = x;
    return c;
}

enum { LONE = 13 };

/* The tree mask of a sequence over all of its keys. */
static fa_tensor whole_mask(const fa_args *s)
{
    int64_t sq = s->mask.size[2], sk = s->k.size[2];
    fa_tensor m = {.size = {1, 1, sq, sk}, .stride = {sq * sk, sq * sk, sk, 1}, .dtype = FA_BOOL};
    uint8_t *x = malloc((size_t)(sq * sk) + 8);
    for (int64_t i = 0; i < sq * sk; i++)
        x[i] = i % sk < s->mask_first ||
               ((uint8_t *)s->mask.data)[i / sk * s->mask.stride[2] + (i % sk - s->mask_first) * s->mask.stride[3]];
    m.data = x;
    return m;
}

/* Sequence n as a lone dense call of malloc'ed tensors. exact: float64, on what the stored keys stand for. */
static fa_args lone_call(const seq_problem *p, int64_t n, bool exact, fa_tensor *owned[LONE], fa_tensor storage[LONE])
{
    fa_args s = fa_sequence(&p->a, n), a = s;
    fa_dtype dtype = exact ? FA_F64 : p->c.dtype, lse = dtype == FA_F64 ? FA_F64 : FA_F32;
    bool quantised = p->c.stored != p->c.dtype && !exact;
    int64_t used = p->c.k_len[n];
    s.k.size[2] = s.v.size[2] = used;
    a.q = copy_of(&s, &s.q, NULL, false, dtype);
    a.k = copy_of(&s, &s.k, &s.k_scale, true, quantised ? p->c.stored : dtype);
    a.v = copy_of(&s, &s.v, &s.v_scale, true, quantised ? p->c.stored : dtype);
    a.out = copy_of(&s, &s.out, NULL, false, dtype);
    a.lse = copy_of(&s, &s.lse, NULL, false, lse);
    a.kv_seqlens = a.block_table = a.k_scale = a.v_scale = (fa_tensor){0};
    a.page_size = a.mask_first = 0;
    a.scale_per_token = quantised;
    a.by_sequence = !exact && (quantised || p->c.splits || p->c.tree);
    a.splits_wanted = exact ? 0 : p->c.splits;
    a.mask = (fa_tensor){0};
    if (p->c.tree && !exact) {
        a.tree_mask = p->a.tree_mask;
        fa_narrow_to(&a.tree_mask, 0, n, 1);
    } else if (p->c.tree) {
        a.mask = whole_mask(&s);
    }
    if (quantised) {
        a.k_scale = scales_of(&s, &s.k_scale, used);
        a.v_scale = scales_of(&s, &s.v_scale, used);
    }
    if (p->c.backward) {
        a.dout = copy_of(&s, &s.dout, NULL, false, dtype);
        a.dlse = copy_of(&s, &s.dlse, NULL, false, lse);
        a.dq = copy_of(&s, &s.dq, NULL, false, dtype);
        a.dk = copy_of(&s, &s.dk, NULL, false, dtype);
        a.dv = copy_of(&s, &s.dv, NULL, false, dtype);
    }
    fa_tensor *all[LONE] = {&a.q, &a.k, &a.v, &a.out, &a.lse, &a.dout, &a.dlse, &a.dq, &a.dk, &a.dv, &a.k_scale,
                             &a.v_scale,
                             &a.mask};
    for (int i = 0; i < LONE; i++) {
        bool mine = i < 5 || (i < 10 ? p->c.backward : i < 12 ? quantised : p->c.tree && exact);
        storage[i] = mine ? *all[i] : (fa_tensor){0};
        owned[i] = &storage[i];
    }
    return a;
}

/* ---- comparisons ------------------------------------------------------------------------------------------------- */

static bool same(const fa_tensor *x, const fa_tensor *y)
{
    for (int64_t h = 0; h < x->size[1]; h++)
        for (int64_t s = 0; s < x->size[2]; s++)
            for (int64_t d = 0; d < x->size[3]; d++)
                if (memcmp((char *)x->data + at(x, 0, h, s, d) * (int64_t)fa_dtype_size(x->dtype),
                           (char *)y->data + at(y, 0, h, s, d) * (int64_t)fa_dtype_size(y->dtype),
                           fa_dtype_size(x->dtype)))
                    return false;
    return true;
}

/* Largest difference over the tensor, relative to its magnitude and 1; infinite where only one is a number. */
static double distance(const fa_tensor *x, const fa_tensor *y)
{
    double worst = 0, top = 1;
    for (int64_t h = 0; h < x->size[1]; h++)
        for (int64_t s = 0; s < x->size[2]; s++)
            for (int64_t d = 0; d < x->size[3]; d++) {
                double a = fa_load(x->data, x->dtype, at(x, 0, h, s, d));
                double b = fa_load(y->data, y->dtype, at(y, 0, h, s, d));
                if (a == b)
                    continue;
                if (!isfinite(a) || !isfinite(b))
                    return INFINITY;
                top = fabs(b) > top ? fabs(b) : top;
                worst = fabs(a - b) > worst ? fabs(a - b) : worst;
            }
    return worst / top;
}

static double allowed(fa_dtype t)
{
    return t == FA_F64 ? 1e-11 : t == FA_F32 ? 2e-5 : t == FA_F16 ? 4e-3 : 3e-2;
}

/* rows past the last sequence: 0, and -inf as their log-sum-exp */
static bool tail_is(const fa_tensor *t, int64_t first, double value)
{
    for (int64_t h = 0; h < t->size[1]; h++)
        for (int64_t s = first; s < t->size[2]; s++)
            for (int64_t d = 0; d < t->size[3]; d++)
                if (fa_load(t->data, t->dtype, at(t, 0, h, s, d)) != value)
                    return false;
    return true;
}

static void report(const fa_plan *plan, const seq_case *c, bool ok, double worst, const char *what)
{
    ck_result(plan->kernel, ok, worst, "%s: %s", what, describe(c));
}

/* One direction of sequence n: bits against the lone call, values against the exact one. */
static void compare_sequence(const seq_problem *p, int64_t n, bool backward, fa_args *lone, const fa_args *exact)
{
    fa_args s = fa_sequence(&p->a, n);
    fa_plan plan;
    fa_error err = {""};
    bool ran = run(lone, backward, 2, &plan, &err);
    report(&plan, &p->c, ran, 0, err.text);
    if (!ran)
        return;
    const fa_tensor *got[] = {&s.out, &s.lse, &s.dq, &s.dk, &s.dv};
    const fa_tensor *alone[] = {&lone->out, &lone->lse, &lone->dq, &lone->dk, &lone->dv};
    const fa_tensor *right[] = {&exact->out, &exact->lse, &exact->dq, &exact->dk, &exact->dv};
    static const char *const names[] = {"out", "lse", "dq", "dk", "dv"};
    for (int i = backward ? 2 : 0; i < (backward ? 5 : 2); i++) {
        char what[80];
        double d = distance(got[i], right[i]);
        snprintf(what, sizeof what, "%s of sequence %d: not the bits of the lone call", names[i], (int)n);
        report(&plan, &p->c, same(got[i], alone[i]), 0, what);
        snprintf(what, sizeof what, "%s of sequence %d is off by %g", names[i], (int)n, d);
        report(&plan, &p->c, d <= allowed(p->c.dtype), d / allowed(p->c.dtype), what);
    }
}

static void run_direction(seq_problem *p, bool backward, fa_args lone[MOST], fa_args exact[MOST])
{
    fa_plan plan = {.kernel = "sequences"};
    for (int threads = 1; threads <= 3; threads += 2) {
        fa_error err = {""};
        const fa_tensor *results[] = {&p->a.out, &p->a.lse, &p->a.dq, &p->a.dk, &p->a.dv};
        for (int i = backward ? 2 : 0; i < (backward ? 5 : 2); i++)
            memset(results[i]->data, POISON, (size_t)ck_count(results[i]) * fa_dtype_size(results[i]->dtype));
        bool ok = run(&p->a, backward, threads, &plan, &err);
        report(&plan, &p->c, ok, 0, err.text);
        if (!ok)
            return;
        for (int64_t n = 0; n < p->c.N; n++)
            compare_sequence(p, n, backward, &lone[n], &exact[n]);
        if (!p->c.tree) {
            const fa_tensor *tail = backward ? &p->a.dq : &p->a.out;
            report(&plan, &p->c, tail_is(tail, p->q_first[p->c.N], 0), 0, "rows past the last sequence are not 0");
            report(&plan, &p->c, backward || tail_is(&p->a.lse, p->q_first[p->c.N], -INFINITY), 0,
                   "log-sum-exp past the last sequence is not -inf");
        }
        if (backward)
            report(&plan, &p->c, tail_is(&p->a.dk, p->k_first[p->c.N], 0) && tail_is(&p->a.dv, p->k_first[p->c.N], 0),
                   0, "key gradients past the last sequence are not 0");
    }
    for (int i = 0; i < p->count; i++)
        report(&plan, &p->c, ck_guard_intact(&p->memory[i]), 0, "memory before a tensor was written");
}

static void compare(const seq_case *c)
{
    const char *isas[8];
    int count = ck_isas(isas);
    seq_problem p;
    make_problem(&p, c);
    if (c->backward)
        make_gradients(&p, &(ck_rng){c->seed});
    fa_tensor storage[2][MOST][LONE], *owned[2][MOST][LONE];
    fa_args lone[MOST], exact[MOST];
    for (int64_t n = 0; n < c->N; n++) {
        lone[n] = lone_call(&p, n, false, owned[0][n], storage[0][n]);
        exact[n] = lone_call(&p, n, true, owned[1][n], storage[1][n]);
        fa_plan plan;
        fa_error err = {""};
        bool ok = run(&exact[n], false, 1, &plan, &err) && (!c->backward || run(&exact[n], true, 1, &plan, &err));
        report(&plan, c, ok, 0, err.text);
    }
    for (int i = 0; i < count; i++) {
        if (ck_opt.isa && strcmp(ck_opt.isa, isas[i]))
            continue;
        ck_use_isa(isas[i]);
        run_direction(&p, false, lone, exact);
        if (c->backward) /* from the forward of the same kernels */
            run_direction(&p, true, lone, exact);
    }
    for (int64_t n = 0; n < c->N; n++)
        for (int i = 0; i < LONE; i++) {
            free(owned[0][n][i]->data);
            free(owned[1][n][i]->data);
        }
    free_problem(&p);
}

/* ---- cases ------------------------------------------------------------------------------------------------------- */

static seq_case random_case(ck_rng *r)
{
    static const fa_dtype dtypes[] = {FA_F32, FA_BF16, FA_F16, FA_F32, FA_BF16, FA_F16, FA_F64};
    static const int64_t groups[] = {1, 1, 2, 3, 4, 8}, pages[] = {1, 3, 16, 64, 128}, dims[] = {1, 8, 17, 40, 64, 128};
    seq_case c = {.dtype = dtypes[ck_below(r, 7)], .N = ck_below(r, MOST), .HK = 1 + ck_below(r, 2), .left = -1,
                  .right = ck_chance(r, 60) ? 0 : -1, .seed = ck_next(r)};
    c.HQ = c.HK * groups[ck_below(r, 6)];
    c.D = dims[ck_below(r, 6)];
    c.DV = ck_chance(r, 60) ? c.D : dims[ck_below(r, 6)];
    c.backward = ck_chance(r, 35);
    c.tree = !c.backward && ck_chance(r, 25);
    c.page = c.backward || ck_chance(r, 40) ? 0 : pages[ck_below(r, 5)];
    c.stored = c.backward || ck_chance(r, 50) ? c.dtype : ck_chance(r, 50) ? FA_I8 : FA_F8E4M3;
    c.per_token = ck_chance(r, 50);
    c.left = ck_chance(r, 30) ? ck_below(r, 100) : -1;
    c.splits = !c.backward && ck_chance(r, 30) ? 1 + ck_below(r, 5) : 0;
    c.softcap = ck_chance(r, 20) ? 5 : 0;
    c.dropout_p = !c.tree && ck_chance(r, 20) ? 0.25 : 0;
    c.sinks = ck_chance(r, 25);
    c.alibi = ck_chance(r, 25);
    int64_t rows = 1 + ck_below(r, ck_chance(r, 50) ? 4 : 20);
    for (int64_t n = 0; n < c.N; n++) {
        static const int64_t lengths[] = {0, 1, 1, 2, 5, 47, 64, 130};
        static const int64_t keys[] = {0, 1, 7, 64, 95, 97, 200, 700};
        c.q_len[n] = c.tree ? rows : lengths[ck_below(r, 8)];
        c.k_len[n] = keys[ck_below(r, 8)];
        if (c.tree) {
            c.right = -1;
            c.k_len[n] += rows;
        }
    }
    return c;
}

/* ---- refusals ---------------------------------------------------------------------------------------------------- */

typedef struct refusal {
    const char *text; /* what the refusal says, in part */
    bool pages, quantised, tree;
    void (*spoil)(fa_args *a);
} refusal;

static void q_starts_late(fa_args *a) { put(&a->cu_q, 0, 0, 1); }
static void q_decreases(fa_args *a) { put(&a->cu_q, 1, 0, 99), put(&a->cu_q, 2, 0, 3); }
static void q_ends_late(fa_args *a) { put(&a->cu_q, 2, 0, 1000); }
static void k_negative(fa_args *a) { put(&a->cu_k, 1, 0, -5); }
static void k_short(fa_args *a) { a->cu_k.size[0] = 2; }
static void q_float(fa_args *a) { a->cu_q.dtype = FA_F32; }
static void no_offsets(fa_args *a) { a->cu_q.size[0] = 0; }
static void length_negative(fa_args *a) { put(&a->kv_seqlens, 1, 0, -1); }
static void length_beyond(fa_args *a) { put(&a->kv_seqlens, 1, 0, 1000); }
static void page_beyond(fa_args *a) { put(&a->block_table, 1, 0, a->k.size[0]); }
static void page_negative(fa_args *a) { put(&a->block_table, 0, 1, -1); }
static void page_sizes(fa_args *a) { a->page_size = 5; }
static void table_rows(fa_args *a) { a->block_table.size[0] = 1; }
static void table_dtype(fa_args *a) { a->block_table.dtype = FA_F32; }
static void no_lengths(fa_args *a) { a->kv_seqlens = (fa_tensor){0}; }
static void no_table(fa_args *a) { a->block_table = (fa_tensor){0}; }
static void no_scale(fa_args *a) { a->v_scale = (fa_tensor){0}; }
static void scale_dtype(fa_args *a) { a->k_scale.dtype = FA_F16; }
static void scale_heads(fa_args *a) { a->k_scale.size[1] = 3; }
static void mixed_keys(fa_args *a) { a->v.dtype = a->k.dtype == FA_I8 ? FA_F8E4M3 : FA_I8; }
static void foreign_scale(fa_args *a) { a->k_scale = a->sinks, a->k_scale.dtype = FA_F32; }
static void tree_size(fa_args *a) { a->tree_mask.size[2]--; }
static void tree_dtype(fa_args *a) { a->tree_mask.dtype = FA_I8; }
static void tree_longer(fa_args *a) { put(&a->kv_seqlens, 0, 0, 1); }
static void negative_splits(fa_args *a) { a->splits_wanted = -2; }
static void with_mask(fa_args *a) { a->mask = a->lse; }
static void not_by_sequence(fa_args *a) { a->by_sequence = false; }
static void key_heads(fa_args *a) { a->k.size[1] = a->v.size[1] = 3; }

static void refusals(void)
{
    static const refusal all[] = {
        {"cu_seq_q[0] is 1", 0, 0, 0, q_starts_late},
        {"cu_seq_q[1] is 99", 0, 0, 0, q_decreases},
        {"cu_seq_q[2] is 1000", 0, 0, 0, q_ends_late},
        {"cu_seq_k[1] is -5: it must be between 0", 0, 0, 0, k_negative},
        {"cu_seq_k has 2 elements: it must have 3", 0, 0, 0, k_short},
        {"cu_seq_q has dtype float32", 0, 0, 0, q_float},
        {"at least one", 0, 0, 0, no_offsets},
        {"seqused_k[1] is -1", 1, 0, 0, length_negative},
        {"seqused_k[1] is 1000", 1, 0, 0, length_beyond},
        {"cache_seqlens[1] is 1000", 1, 0, 1, length_beyond},
        {"block_table[1][0] is", 1, 0, 0, page_beyond},
        {"block_table[0][1] is -1", 1, 0, 0, page_negative},
        {"page_size is 5", 1, 0, 0, page_sizes},
        {"block_table has shape (1,", 1, 0, 0, table_rows},
        {"block_table has dtype float32", 1, 0, 0, table_dtype},
        {"without lengths", 1, 0, 0, no_lengths},
        {"without block_table", 1, 0, 0, no_table},
        {"needs v_scale", 1, 1, 0, no_scale},
        {"k_scale has dtype float16", 0, 1, 0, scale_dtype},
        {"k_scale has shape (1, 3, 1, 1)", 0, 1, 0, scale_heads},
        {"they must be the same", 0, 1, 0, mixed_keys},
        {"k_scale is given and key has dtype float32", 0, 0, 0, foreign_scale},
        {"tree_mask has shape (2, 4, 5)", 0, 0, 1, tree_size},
        {"tree_mask has dtype int8", 0, 0, 1, tree_dtype},
        {"cache_seqlens[0] is 1: it must be between 5", 1, 0, 1, tree_longer},
        {"num_splits is -2", 0, 0, 0, negative_splits},
        {"attn_mask is given", 0, 0, 0, with_mask},
        {"need by_sequence", 0, 0, 0, not_by_sequence},
        {"query has 2 heads, key and value 3", 1, 0, 0, key_heads},
    };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        seq_case c = {.dtype = FA_F32, .stored = all[i].quantised ? FA_I8 : FA_F32, .N = 2, .HQ = 2, .HK = 2, .D = 8,
                      .DV = 8, .page = all[i].pages ? 4 : 0, .q_len = {5, 5}, .k_len = {7, 9}, .left = -1,
                      .right = all[i].tree ? -1 : 0, .sinks = true, .tree = all[i].tree, .seed = i};
        seq_problem p;
        fa_error before = {""}, after = {""};
        make_problem(&p, &c);
        fa_status valid = fa_validate_forward(&p.a, &before);
        all[i].spoil(&p.a);
        fa_status status = fa_validate_forward(&p.a, &after);
        ck_result("refusals", valid == FA_OK && status != FA_OK && strstr(after.text, all[i].text), 0,
                  "before '%s', after '%s', which should say '%s'", before.text, after.text, all[i].text);
        free_problem(&p);
    }
}

void ck_check_sequences(void)
{
    refusals();
    for (int n = 0; n < (ck_opt.quick ? 60 : 400); n++) {
        ck_rng r;
        if (!ck_next_case(&r))
            continue;
        seq_case c = random_case(&r);
        compare(&c);
    }
}
