/* Tensors of a case: guarded memory, layouts, values, poison. */
#define _GNU_SOURCE /* MAP_ANONYMOUS */
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "checkfa.h"
#include "common/fa_dtype.h"
#include "common/fa_mask.h"

enum { CANARY = 0xA5, POISON = 0xFF /* NaN in every float dtype */ };

/* ---- memory ------------------------------------------------------------------------------------------------------ */

ck_guarded ck_guard(size_t bytes)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), used = (bytes + 64 + page - 1) / page * page;
    ck_guarded g = {.map_bytes = used + page, .bytes = bytes};
    g.map = mmap(NULL, g.map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (g.map == MAP_FAILED || mprotect(g.map + used, page, PROT_NONE)) {
        perror("checkfa: guarded memory");
        exit(2);
    }
    g.start = g.map + used - bytes;
    memset(g.map, CANARY, used - bytes);
    memset(g.start, POISON, bytes);
    return g;
}

bool ck_guard_intact(const ck_guarded *g)
{
    for (const char *p = g->map; p < g->start; p++)
        if ((unsigned char)*p != CANARY)
            return false;
    return true;
}

void ck_guard_free(ck_guarded *g)
{
    if (g->map)
        munmap(g->map, g->map_bytes);
    *g = (ck_guarded){0};
}

/* ---- tensors ----------------------------------------------------------------------------------------------------- */

fa_tensor *ck_tensor(fa_args *a, int id)
{
    fa_tensor *all[CK_TENSORS] = {&a->q, &a->k, &a->v, &a->mask, &a->sinks, &a->alibi, &a->q_seqlens, &a->kv_seqlens,
                                  &a->out, &a->lse, &a->dout, &a->dlse, &a->dq, &a->dk, &a->dv, &a->dmask, &a->dsinks};
    return all[id];
}

const char *ck_tensor_name(int id)
{
    static const char *const names[CK_TENSORS] = {"q", "k", "v", "mask", "sinks", "alibi", "q_seqlens", "kv_seqlens",
                                                  "out", "lse", "dout", "dlse", "dq", "dk", "dv", "dmask", "dsinks"};
    return names[id];
}

int64_t ck_count(const fa_tensor *t)
{
    return t->size[0] * t->size[1] * t->size[2] * t->size[3];
}

/* Dimensions from the innermost out; strides follow. */
static void set_strides(fa_tensor *t, ck_layout layout)
{
    static const int dense[4] = {3, 2, 1, 0}, bshd[4] = {3, 1, 2, 0}, rows_inside[4] = {2, 3, 1, 0};
    const int *order = layout == CK_BSHD ? bshd : layout == CK_ROWS_INSIDE ? rows_inside : dense;
    int64_t step = layout == CK_STEP2 ? 2 : 1;
    for (int n = 0; n < 4; n++) {
        int d = order[n];
        bool shared = (layout == CK_SHARED_ALL && d <= 1) || (layout == CK_SHARED_HEADS && d == 1);
        t->stride[d] = shared ? 0 : step;
        if (!shared)
            step *= t->size[d];
        if (layout == CK_PADDED && d == 3)
            step += 3;
    }
}

static int64_t at(const fa_tensor *t, const int64_t i[4])
{
    return i[0] * t->stride[0] + i[1] * t->stride[1] + i[2] * t->stride[2] + i[3] * t->stride[3];
}

/* for each element, in order: i is its index */
#define EACH_ELEMENT(t, i)                                                                                             \
    for (int64_t i[4] = {0}; i[0] < (t)->size[0]; i[0]++)                                                              \
        for (i[1] = 0; i[1] < (t)->size[1]; i[1]++)                                                                    \
            for (i[2] = 0; i[2] < (t)->size[2]; i[2]++)                                                                \
                for (i[3] = 0; i[3] < (t)->size[3]; i[3]++)

static void make_tensor(ck_problem *p, int id, fa_dtype dtype, const int64_t size[4], ck_layout layout)
{
    fa_tensor *t = ck_tensor(&p->a, id);
    int64_t elements = 1;
    t->dtype = dtype;
    memcpy(t->size, size, sizeof t->size);
    set_strides(t, layout);
    if (ck_count(t) == 0)
        return; /* a shape without data */
    for (int d = 0; d < 4; d++)
        elements += (t->size[d] - 1) * t->stride[d];
    p->memory[id] = ck_guard((size_t)elements * fa_dtype_size(dtype));
    t->data = p->memory[id].start;
}

double *ck_dense(const fa_tensor *t)
{
    double *x = malloc(sizeof *x * (size_t)(ck_count(t) + 1)), *next = x;
    EACH_ELEMENT(t, i)
        *next++ = fa_load(t->data, t->dtype, at(t, i));
    return x;
}

void ck_poison(ck_problem *p, int id)
{
    if (p->memory[id].map)
        memset(p->memory[id].start, POISON, p->memory[id].bytes);
}

bool ck_padding_intact(const ck_problem *p, int id)
{
    const ck_guarded *g = &p->memory[id];
    if (!g->map)
        return true;
    if (!ck_guard_intact(g))
        return false;
    const fa_tensor *t = ck_tensor((fa_args *)&p->a, id);
    const size_t bytes = fa_dtype_size(t->dtype);
    if ((size_t)ck_count(t) * bytes == g->bytes)
        return true;
    char *rest = malloc(g->bytes); /* what is left when the tensor's own elements are poisoned again */
    memcpy(rest, g->start, g->bytes);
    EACH_ELEMENT(t, i)
        memset(rest + (size_t)at(t, i) * bytes, POISON, bytes);
    bool intact = true;
    for (size_t n = 0; n < g->bytes; n++)
        intact = intact && (unsigned char)rest[n] == POISON;
    free(rest);
    return intact;
}

/* ---- values ------------------------------------------------------------------------------------------------------ */

static void fill_normal(fa_tensor *t, ck_rng *r, double magnitude)
{
    EACH_ELEMENT(t, i)
        fa_store(t->data, t->dtype, at(t, i), magnitude * ck_normal(r));
}

static void fill_lengths(fa_tensor *t, ck_rng *r, int64_t full)
{
    for (int64_t b = 0; b < t->size[0]; b++) {
        int64_t length = ck_chance(r, 20) ? 0 : ck_chance(r, 30) ? full : ck_below(r, full + 1);
        fa_store(t->data, t->dtype, b * t->stride[0], (double)length);
    }
}

static double floor_of(fa_dtype t)
{
    return t == FA_F64 ? -DBL_MAX : t == FA_F16 ? -65504 : t == FA_BF16 ? -0x1.FEp127 : -FLT_MAX;
}

/* A tenth of the rows is hidden as a whole. Rows of nothing but the least finite number stay out of backward: their
 * log-sum-exp rounds to that number, so that no implementation that stores it can know their weights. */
static void fill_mask(fa_tensor *t, const ck_case *c, ck_rng *r, bool backward)
{
    const double hidden = t->dtype == FA_BOOL ? 0 : -INFINITY;
    bool hide_row = false;
    double hide_as = hidden;
    EACH_ELEMENT(t, i) {
        if (i[3] == 0) {
            hide_row = ck_chance(r, 10);
            hide_as = c->mask_floor && t->dtype != FA_BOOL && !backward ? floor_of(t->dtype) : hidden;
        }
        double x = t->dtype == FA_BOOL ? 1 : 2 * ck_normal(r);
        if (hide_row)
            x = hide_as;
        else if (ck_chance(r, 20))
            x = c->mask_floor && t->dtype != FA_BOOL && i[3] > 0 ? floor_of(t->dtype) : i[3] > 0 ? hidden : x;
        fa_store(t->data, t->dtype, at(t, i), x);
    }
}

static void fill_row(fa_tensor *t, int64_t b, int64_t h, int64_t i, double x)
{
    if (!t->data)
        return;
    for (int64_t d = 0; d < t->size[3]; d++)
        fa_store(t->data, t->dtype, at(t, (int64_t[4]){b, h, i, d}), x);
}

/* How many queries of the kv head see key j: 0, all (2) or some (1). With strides of 0 a row belongs to several
 * heads: NaN is left out there. */
static int seen_by(const ck_problem *p, int64_t b, int64_t hk, int64_t j)
{
    const int64_t G = p->c.HQ / p->c.HK;
    int64_t seen = 0;
    for (int64_t h = hk * G; h < (hk + 1) * G; h++)
        for (int64_t i = 0; i < p->c.SQ; i++)
            seen += ck_sees(&p->a, b, h, i, j);
    return seen == 0 ? 0 : seen == G * p->c.SQ ? 2 : 1;
}

static void put_nan_in_keys(ck_problem *p)
{
    for (int64_t b = 0; b < p->c.B; b++)
        for (int64_t hk = 0; hk < p->c.HK; hk++) {
            bool once = p->c.nan_seen;
            for (int64_t j = 0; j < p->c.SK; j++) {
                int seen = seen_by(p, b, hk, j);
                bool poison = seen == 0 ? p->c.nan_hidden : seen == 1 && once;
                if (!poison)
                    continue;
                if (seen == 1)
                    once = false;
                fill_row(&p->a.k, b, hk, j, NAN);
                fill_row(&p->a.v, b, hk, j, j % 2 ? NAN : INFINITY);
            }
        }
}

static void put_nan_in_queries(ck_problem *p)
{
    for (int64_t b = 0; b < p->c.B; b++)
        for (int64_t h = 0; h < p->c.HQ; h++)
            for (int64_t i = 0; i < p->c.SQ; i++) {
                bool any = p->c.sinks; /* with a sink even an empty row has a log-sum-exp, and gives it a gradient */
                for (int64_t j = 0; j < p->c.SK && !any; j++)
                    any = ck_sees(&p->a, b, h, i, j);
                if (any && i < fa_length_at(&p->a.q_seqlens, b, p->c.SQ))
                    continue;
                fill_row(&p->a.q, b, h, i, NAN);
                fill_row(&p->a.dout, b, h, i, NAN);
                fill_row(&p->a.dlse, b, h, i, NAN);
            }
}

/* ---- problems ---------------------------------------------------------------------------------------------------- */

static ck_layout of_result(ck_layout l)
{
    return l == CK_SHARED_HEADS || l == CK_SHARED_ALL ? CK_DENSE : l;
}

static void make_mask(ck_problem *p, ck_rng *r, bool backward)
{
    static const fa_dtype dtypes[] = {FA_BOOL, FA_BOOL, FA_F32};
    const ck_case *c = &p->c;
    const int64_t full[4] = {c->B, c->HQ, c->SQ, c->SK};
    int64_t size[4];
    for (int d = 0; d < 4; d++)
        size[d] = c->mask_full >> d & 1 || full[d] == 0 ? full[d] : 1;
    make_tensor(p, CK_MASK, c->mask == CK_SAME_MASK ? c->dtype : dtypes[c->mask], size, of_result(c->layout));
    fill_mask(&p->a.mask, c, r, backward);
    if (c->mask_expanded && p->a.mask.data)
        for (int d = 0; d < 4; d++)
            if (size[d] == 1) {
                p->a.mask.size[d] = full[d];
                p->a.mask.stride[d] = 0;
            }
}

static void make_inputs(ck_problem *p, ck_rng *r, bool backward)
{
    const ck_case *c = &p->c;
    const int64_t per_head[4] = {c->per_batch ? c->B : 1, c->HQ, 1, 1}, lengths[4] = {c->B, 1, 1, 1};
    const fa_dtype small = ck_chance(r, 50) ? FA_F32 : c->dtype, integer = ck_chance(r, 50) ? FA_I32 : FA_I64;
    make_tensor(p, CK_Q, c->dtype, (int64_t[4]){c->B, c->HQ, c->SQ, c->D}, c->layout);
    make_tensor(p, CK_K, c->dtype, (int64_t[4]){c->B, c->HK, c->SK, c->D}, c->layout);
    make_tensor(p, CK_V, c->dtype, (int64_t[4]){c->B, c->HK, c->SK, c->DV}, c->layout);
    fill_normal(&p->a.q, r, c->magnitude);
    fill_normal(&p->a.k, r, 1);
    fill_normal(&p->a.v, r, 1);
    if (c->mask)
        make_mask(p, r, backward);
    if (c->sinks) {
        make_tensor(p, CK_SINKS, small, per_head, CK_DENSE);
        fill_normal(&p->a.sinks, r, 2);
    }
    if (c->alibi) {
        make_tensor(p, CK_ALIBI, small, per_head, CK_STEP2);
        fill_normal(&p->a.alibi, r, 0.2);
    }
    if (c->q_lengths) {
        make_tensor(p, CK_QLEN, integer, lengths, CK_STEP2);
        fill_lengths(&p->a.q_seqlens, r, c->SQ);
    }
    if (c->k_lengths) {
        make_tensor(p, CK_KLEN, integer, lengths, CK_DENSE);
        fill_lengths(&p->a.kv_seqlens, r, c->SK);
    }
}

static void make_backward(ck_problem *p, ck_rng *r)
{
    const ck_case *c = &p->c;
    const ck_layout results = of_result(c->layout);
    make_tensor(p, CK_DOUT, c->dtype, p->a.out.size, c->layout);
    fill_normal(&p->a.dout, r, 1);
    if (c->dlse) {
        make_tensor(p, CK_DLSE, p->a.lse.dtype, p->a.lse.size, CK_PADDED);
        fill_normal(&p->a.dlse, r, 1);
    }
    if (c->wanted & CK_WANT_Q)
        make_tensor(p, CK_DQ, c->dtype, p->a.q.size, results);
    if (c->wanted & CK_WANT_K)
        make_tensor(p, CK_DK, c->dtype, p->a.k.size, results);
    if (c->wanted & CK_WANT_V)
        make_tensor(p, CK_DV, c->dtype, p->a.v.size, results);
    if (c->wanted & CK_WANT_MASK && c->mask >= CK_F32_MASK)
        make_tensor(p, CK_DMASK, p->a.mask.dtype, p->a.mask.size, results);
    if (c->wanted & CK_WANT_SINKS && c->sinks)
        make_tensor(p, CK_DSINKS, p->a.lse.dtype, p->a.sinks.size, CK_DENSE);
}

void ck_problem_make(ck_problem *p, const ck_case *c, bool backward)
{
    ck_rng r = ck_seeded(c->seed, 7);
    const bool shared = c->layout == CK_SHARED_HEADS || c->layout == CK_SHARED_ALL;
    *p = (ck_problem){.c = *c};
    p->a.scale = c->scale;
    p->a.softcap = c->softcap;
    p->a.window_left = c->left;
    p->a.window_right = c->right;
    p->a.bottom_right = c->bottom_right;
    p->a.dropout_p = c->dropout_p;
    p->a.dropout_seed = ck_next(&r);
    make_inputs(p, &r, backward);
    make_tensor(p, CK_OUT, c->dtype, (int64_t[4]){c->B, c->HQ, c->SQ, c->DV}, of_result(c->layout));
    make_tensor(p, CK_LSE, c->dtype == FA_F64 ? FA_F64 : FA_F32, (int64_t[4]){c->B, c->HQ, c->SQ, 1}, CK_DENSE);
    if (backward)
        make_backward(p, &r);
    if ((c->nan_hidden || c->nan_seen) && !shared)
        put_nan_in_keys(p);
    if (c->nan_hidden && !shared)
        put_nan_in_queries(p);
}

void ck_problem_free(ck_problem *p)
{
    for (int id = 0; id < CK_TENSORS; id++)
        ck_guard_free(&p->memory[id]);
}
