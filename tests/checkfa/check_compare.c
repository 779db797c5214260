/* One case on every kernel that can run it. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkfa.h"

static int64_t case_number = -1;

bool ck_next_case(ck_rng *r)
{
    case_number++;
    *r = ck_seeded(ck_opt.seed, (uint64_t)case_number);
    return ck_opt.only < 0 || ck_opt.only == case_number;
}

/* ---- results of one run ------------------------------------------------------------------------------------------ */

typedef struct snapshot {
    double *dense[CK_TENSORS]; /* elements in order */
    char *bits[CK_TENSORS];    /* memory as it is */
} snapshot;

static snapshot take(const ck_problem *p, bool backward)
{
    snapshot s = {{0}, {0}};
    for (int id = backward ? CK_DQ : CK_OUT; id < (backward ? CK_TENSORS : CK_DOUT); id++) {
        const ck_guarded *g = &p->memory[id];
        if (!g->map)
            continue;
        s.dense[id] = ck_dense(ck_tensor((fa_args *)&p->a, id));
        s.bits[id] = malloc(g->bytes);
        memcpy(s.bits[id], g->start, g->bytes);
    }
    return s;
}

static void drop(snapshot *s)
{
    for (int id = 0; id < CK_TENSORS; id++) {
        free(s->dense[id]);
        free(s->bits[id]);
    }
}

/* The gradient of the mask comes from a kernel of its own: fa_bwd_avx2_f32 -> fa_dmask_avx2_f32. */
static const char *kernel_of(const char *planned, int id)
{
    static char name[128];
    const char *prefix = "fa_bwd_";
    if (id != CK_DMASK || strncmp(planned, prefix, strlen(prefix)))
        return planned;
    snprintf(name, sizeof name, "fa_dmask_%s", planned + strlen(prefix));
    return name;
}

static void compare(const ck_problem *p, const char *kernel, const snapshot *got, double *const want[CK_TENSORS],
                    const ck_scales *scales, bool eager)
{
    for (int id = CK_OUT; id < CK_TENSORS; id++) {
        if (!got->dense[id])
            continue;
        const fa_tensor *t = ck_tensor((fa_args *)&p->a, id);
        const ck_tolerance tolerance = ck_tolerance_of(p, scales, id, eager);
        int64_t where;
        double worst = ck_distance(got->dense[id], want[id], ck_count(t), tolerance, &where);
        ck_result(kernel_of(kernel, id), worst <= 1, worst,
                  "case %" PRId64 " against %s: %s(%" PRId64 ", %" PRId64 ", %" PRId64 ", %" PRId64
                  ") is %.9g, should be %.9g (%.3g tolerances): %s",
                  case_number, eager ? "eager" : "scalar", ck_tensor_name(id),
                  where / (t->size[3] * t->size[2] * t->size[1]), where / (t->size[3] * t->size[2]) % t->size[1],
                  where / t->size[3] % t->size[2], where % t->size[3], got->dense[id][where], want[id][where], worst,
                  ck_describe(&p->c));
    }
}

static void same_bits(const ck_problem *p, const char *kernel, const snapshot *one, const snapshot *many)
{
    for (int id = CK_OUT; id < CK_TENSORS; id++)
        if (one->bits[id])
            ck_result(kernel_of(kernel, id), !memcmp(one->bits[id], many->bits[id], p->memory[id].bytes), 0,
                      "case %" PRId64 ": %s differs between 1 and 3 workers: %s", case_number, ck_tensor_name(id),
                      ck_describe(&p->c));
}

/* ---- one case ---------------------------------------------------------------------------------------------------- */

static const char *planned_kernel(const ck_problem *p, bool backward)
{
    fa_plan plan;
    fa_error err;
    if (backward ? fa_validate_backward(&p->a, &err) : fa_validate_forward(&p->a, &err))
        return "refused";
    if (backward)
        fa_plan_backward(&p->a, 1, &plan);
    else
        fa_plan_forward(&p->a, 1, &plan);
    return plan.kernel;
}

/* Runs once; false and a failed check where it went wrong. */
static bool run(ck_problem *p, bool backward, int threads, fa_parallel_fn *pool, snapshot *s)
{
    char why[512];
    fa_plan plan = {.kernel = "refused"};
    bool ok = ck_run(p, backward, threads, pool, &plan, why);
    if (!ok)
        ck_result(plan.kernel, false, 0, "case %" PRId64 " with %d workers: %s: %s", case_number, threads, why,
                  ck_describe(&p->c));
    *s = take(p, backward);
    return ok;
}

static void check_kernel(ck_problem *p, bool backward, const ck_scales *scales, double *const want[CK_TENSORS],
                         bool eager)
{
    snapshot one, many;
    const char *kernel = planned_kernel(p, backward);
    if (run(p, backward, 1, NULL, &one)) {
        if (want)
            compare(p, kernel, &one, want, scales, eager);
        if (run(p, backward, 3, case_number % 4 ? ck_pool_threads : ck_pool_serial, &many))
            same_bits(p, kernel, &one, &many);
        drop(&many);
    }
    drop(&one);
}

static void check_isas(ck_problem *p, bool backward, const ck_scales *scales, double *const want[CK_TENSORS])
{
    const char *isas[8], *seen[8] = {planned_kernel(p, backward)};
    int kernels = 1, n = ck_isas(isas);
    for (int i = 1; i < n; i++) {
        bool again = false;
        if (ck_opt.isa && strcmp(ck_opt.isa, isas[i]))
            continue;
        ck_use_isa(isas[i]);
        const char *kernel = planned_kernel(p, backward);
        for (int k = 0; k < kernels; k++)
            again = again || !strcmp(seen[k], kernel); /* an instruction set without a kernel of its own */
        if (again || !ck_kernel_wanted(kernel))
            continue;
        seen[kernels++] = kernel;
        check_kernel(p, backward, scales, want, false);
    }
}

void ck_compare(const ck_case *c, bool backward)
{
    enum { SMALL = 500000 }; /* multiply-adds that eager attention may cost */
    ck_problem p;
    snapshot forward = {{0}, {0}}, reference;
    ck_problem_make(&p, c, backward);
    ck_use_isa("scalar");
    const bool isa_wanted = !ck_opt.isa || !strcmp(ck_opt.isa, "scalar");
    const bool scalar = isa_wanted && ck_kernel_wanted(planned_kernel(&p, backward));
    const bool full = scalar && (ck_cost(c) <= SMALL || ck_opt.only >= 0);
    ck_eager eager = ck_eager_make(&p, backward, full);
    bool ok = !backward || run(&p, false, 1, NULL, &forward);
    if (ok && scalar)
        check_kernel(&p, backward, &eager.scales, full ? eager.result : NULL, true);
    if (ok && run(&p, backward, 1, NULL, &reference)) {
        check_isas(&p, backward, &eager.scales, reference.dense);
        drop(&reference);
    }
    drop(&forward);
    ck_eager_free(&eager);
    ck_problem_free(&p);
}
