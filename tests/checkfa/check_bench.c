/* Speed of every kernel on one worker: the fastest of several runs, in GFLOP/s and GB/s of the plan's counts. */
#define _GNU_SOURCE /* clock_gettime */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "checkfa.h"

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Repeats for about 0.3 s, at least twice: the first run touches the memory. */
static double fastest(ck_problem *p, bool backward, const fa_plan *plan)
{
    ck_guarded workspace = ck_guard(plan->workspace);
    const fa_exec exec = {.workspace = workspace.start, .workspace_size = plan->workspace};
    const double start = seconds();
    double best = 1e30;
    fa_error err;
    for (int n = 0; n < 2 || (n < 1000 && seconds() - start < 0.3); n++) {
        const double begin = seconds();
        (backward ? fa_run_backward : fa_run_forward)(&p->a, plan, &exec, &err);
        const double took = seconds() - begin;
        best = took < best ? took : best;
    }
    ck_guard_free(&workspace);
    return best;
}

static void bench(const ck_case *c, bool backward)
{
    const char *isas[8], *before = "";
    const int n = ck_isas(isas);
    ck_problem p;
    ck_problem_make(&p, c, backward);
    for (int i = 0; i < n; i++) {
        fa_plan plan;
        if (ck_opt.isa ? strcmp(ck_opt.isa, isas[i]) != 0 : i == 0)
            continue;
        ck_use_isa(isas[i]);
        (backward ? fa_plan_backward : fa_plan_forward)(&p.a, 1, &plan);
        if (!strcmp(plan.kernel, before) || !ck_kernel_wanted(plan.kernel))
            continue;
        before = plan.kernel;
        const double took = fastest(&p, backward, &plan);
        printf("%-28s B%" PRId64 " H%" PRId64 "/%" PRId64 " SQ%-5" PRId64 " SK%-5" PRId64 " D%-4" PRId64
               "%-7s %9.3f ms %8.1f GFLOP/s %7.1f GB/s\n",
               plan.kernel, c->B, c->HQ, c->HK, c->SQ, c->SK, c->D, c->right == 0 ? "causal" : "full", took * 1e3,
               plan.flops / took * 1e-9, plan.bytes / took * 1e-9);
        fflush(stdout);
    }
    ck_problem_free(&p);
}

void ck_bench(void)
{
    static const fa_dtype dtypes[] = {FA_F32, FA_BF16, FA_F16};
    for (int t = 0; t < 3; t++) {
        for (int64_t S = 512; S <= 2048; S *= 4)
            for (int64_t D = 64; D <= 128; D *= 2)
                for (int causal = 0; causal < 2; causal++) {
                    ck_case c = ck_plain(dtypes[t], 1, 8, 8, S, S, D, D);
                    c.right = causal ? 0 : -1;
                    bench(&c, false);
                    bench(&c, true);
                }
        const ck_case decode = ck_plain(dtypes[t], 1, 32, 8, 1, 4096, 128, 128);
        const ck_case plain = ck_plain(dtypes[t], 1, 32, 32, 1, 4096, 128, 128);
        bench(&decode, false);
        bench(&plain, false);
    }
}
