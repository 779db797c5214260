/* Wild arguments for the C API: a status must come back, never a crash. Valid problems are run when their tensors lie
 * inside the memory they have and are tiny; others are only validated and planned. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "checkfa.h"

/* ---- mutations --------------------------------------------------------------------------------------------------- */

static int64_t wild_integer(ck_rng *r)
{
    static const int64_t values[] = {-1, 0, 1, 2, 3, 7, 8, 16, 64, 512, 513, 4096, 65536, FA_MAX_SEQ - 1, FA_MAX_SEQ,
                                     FA_MAX_SEQ + 1, INT32_MAX, (int64_t)1 << 32, (int64_t)1 << 40, (int64_t)1 << 61,
                                     (int64_t)1 << 62, INT64_MAX / 3, INT64_MAX - 1, INT64_MAX, INT64_MIN,
                                     INT64_MIN + 1, -7, -4096, -((int64_t)1 << 40)};
    return ck_chance(r, 10) ? (int64_t)ck_next(r) : values[ck_below(r, sizeof values / sizeof values[0])];
}

static double wild_real(ck_rng *r)
{
    static const double values[] = {0, -0.0, 1, -1, 0.5, 1.5, 1e-300, 1e300, -1e300, 1e-40, 3e38, 65504, NAN, INFINITY,
                                    -INFINITY, 0.9999999999, 1e-12};
    return values[ck_below(r, sizeof values / sizeof values[0])];
}

static void mutate_tensor(ck_rng *r, fa_tensor *t)
{
    const int d = (int)ck_below(r, 4);
    switch (ck_below(r, 7)) {
    case 0: t->size[d] = wild_integer(r); break;
    case 1: t->stride[d] = wild_integer(r); break;
    case 2: t->dtype = (fa_dtype)(ck_below(r, 10) - 1); break;
    case 3: t->data = NULL; break;
    case 4: t->data = (char *)t->data + (t->data ? 1 + ck_below(r, 16) : 0); break;
    case 5: *t = (fa_tensor){0}; break;
    case 6: t->size[d] = ck_below(r, 4); break;
    }
}

static void mutate_scalar(ck_rng *r, fa_args *a)
{
    switch (ck_below(r, 6)) {
    case 0: a->scale = wild_real(r); break;
    case 1: a->softcap = wild_real(r); break;
    case 2: a->dropout_p = wild_real(r); break;
    case 3: a->window_left = wild_integer(r); break;
    case 4: a->window_right = wild_integer(r); break;
    case 5: a->bottom_right = !a->bottom_right; break;
    }
}

/* One of B HQ HK SQ SK D DV everywhere at once, over one element of memory: so that huge sizes pass the checks of
 * consistency. The strides of results cannot all be 0; those then grow dense, far outside their memory. */
static void mutate_size(ck_rng *r, fa_args *a)
{
    static const char *const dims[CK_TENSORS] = {"BHSD", "BKLD", "BKLE", "BHSL", "BH11", "BH11", "B111", "B111", "BHSE",
                                                 "BHS1", "BHSE", "BHS1", "BHSD", "BKLD", "BKLE", "BHSL", "BH11"};
    const char which = "BHKSLDE"[ck_below(r, 7)];
    const int64_t size = wild_integer(r);
    for (int id = 0; id < CK_TENSORS; id++) {
        fa_tensor *t = ck_tensor(a, id);
        bool touched = false;
        for (int d = 0; d < 4; d++)
            if (dims[id][d] == which && t->data && t->size[d] != 1) {
                t->size[d] = size;
                t->stride[d] = 0;
                touched = true;
            }
        if (!touched || id < CK_OUT || id == CK_DOUT || id == CK_DLSE)
            continue;
        uint64_t step = 1; /* unsigned: wild sizes may overflow */
        for (int d = 3; d >= 0; d--) {
            t->stride[d] = (int64_t)step;
            step *= (uint64_t)t->size[d];
        }
    }
}

/* ---- what may be touched ----------------------------------------------------------------------------------------- */

static bool inside(const fa_tensor *t, const ck_guarded *g)
{
    if (!t->data)
        return true;
    int64_t low = 0, high = 0;
    for (int d = 0; d < 4; d++) {
        int64_t extent;
        if (t->size[d] <= 0)
            return t->size[d] == 0;
        if (__builtin_mul_overflow(t->size[d] - 1, t->stride[d], &extent) ||
            __builtin_add_overflow(extent < 0 ? low : high, extent, extent < 0 ? &low : &high))
            return false;
    }
    const int64_t bytes = (int64_t)fa_dtype_size(t->dtype), most = 1 << 20;
    if (!g->map || low < -most || high > most)
        return false;
    const char *data = t->data;
    return data + low * bytes >= g->start && data + (high + 1) * bytes <= g->start + g->bytes;
}

/* fa_validate reads the lengths: those outside their memory are taken away. */
static void keep_lengths_inside(ck_problem *p)
{
    for (int id = CK_QLEN; id <= CK_KLEN; id++) {
        fa_tensor *t = ck_tensor(&p->a, id);
        if (!inside(t, &p->memory[id]) || t->size[0] > 64)
            *t = (fa_tensor){0};
    }
}

static bool tiny_and_inside(ck_problem *p)
{
    const double B = (double)p->a.q.size[0], HQ = (double)p->a.q.size[1], SQ = (double)p->a.q.size[2];
    if (B * HQ * SQ * (double)(p->a.k.size[2] + 1) * 1024 > 1e8 || B * (double)p->a.k.size[1] > 100)
        return false;
    for (int id = 0; id < CK_TENSORS; id++)
        if (!inside(ck_tensor(&p->a, id), &p->memory[id]))
            return false;
    return true;
}

/* ---- one round --------------------------------------------------------------------------------------------------- */

static ck_case tiny_case(ck_rng *r)
{
    ck_case c = ck_random(r, (fa_dtype)ck_below(r, 4), ck_below(r, 9), ck_below(r, 9), 2e4);
    if (ck_chance(r, 10))
        c.SQ = 0;
    if (c.dtype == FA_F64)
        c.magnitude = 1;
    c.q_lengths = c.k_lengths = ck_chance(r, 50);
    return c;
}

/* counts[0]: refused, 1: planned only, 2: run */
static void try_args(ck_problem *p, ck_rng *r, bool backward, int64_t counts[3])
{
    char text[600];
    fa_plan plan;
    fa_error err = {""};
    const int threads = 1 + (int)ck_below(r, 5);
    fa_status status = backward ? fa_validate_backward(&p->a, &err) : fa_validate_forward(&p->a, &err);
    if (status != FA_OK) {
        counts[0]++;
        ck_result("fuzz", (status == FA_ERR_SHAPE || status == FA_ERR_VALUE) && err.text[0] &&
                              strlen(err.text) < sizeof err.text - 1,
                  0, "status %s with the text '%s'", fa_status_name(status), err.text);
        return;
    }
    (backward ? fa_plan_backward : fa_plan_forward)(&p->a, threads, &plan);
    const int length = fa_plan_print(&plan, &p->a, text, (size_t)ck_below(r, sizeof text + 1));
    ck_result("fuzz", length > 0 && plan.threads >= 1 && plan.threads <= threads && plan.tasks >= 0, 0,
              "plan of %" PRId64 " tasks on %d threads", plan.tasks, plan.threads);
    counts[1]++;
    if (!tiny_and_inside(p) || plan.workspace > (size_t)64 << 20)
        return;
    ck_guarded workspace = ck_guard(plan.workspace);
    fa_exec exec = {.parallel = ck_chance(r, 50) ? ck_pool_threads : ck_pool_serial, .workspace = workspace.start,
                    .workspace_size = plan.workspace};
    status = (backward ? fa_run_backward : fa_run_forward)(&p->a, &plan, &exec, &err);
    bool intact = ck_guard_intact(&workspace);
    for (int id = 0; id < CK_TENSORS; id++)
        intact = intact && (!p->memory[id].map || ck_guard_intact(&p->memory[id]));
    ck_result(plan.kernel, status == FA_OK && intact, 0, "fuzz: status %s, memory %s", fa_status_name(status),
              intact ? "intact" : "written outside");
    ck_guard_free(&workspace);
    counts[2]++;
}

void ck_fuzz(int64_t rounds)
{
    const char *isas[8];
    const int n = ck_isas(isas);
    int64_t counts[3] = {0};
    for (int64_t i = 0; i < rounds; i++) {
        ck_rng r = ck_seeded(ck_opt.seed, 1000000000 + (uint64_t)i);
        const bool backward = ck_chance(&r, 50);
        const ck_case c = tiny_case(&r);
        ck_problem p;
        ck_use_isa(isas[ck_below(&r, n)]);
        ck_problem_make(&p, &c, backward);
        for (int64_t m = ck_below(&r, 4); m > 0; m--)
            switch (ck_below(&r, 4)) {
            case 0: mutate_scalar(&r, &p.a); break;
            case 1: mutate_size(&r, &p.a); break;
            default: mutate_tensor(&r, ck_tensor(&p.a, (int)ck_below(&r, CK_TENSORS))); break;
            }
        keep_lengths_inside(&p);
        ck_now("fuzz round %" PRId64 " %s: %s", i, backward ? "backward" : "forward", ck_describe(&c));
        try_args(&p, &r, backward, counts);
        ck_problem_free(&p);
    }
    printf("fuzz: %" PRId64 " rounds: %" PRId64 " refused, %" PRId64 " planned, %" PRId64 " run\n", rounds, counts[0],
           counts[1], counts[2]);
}
