/* Instruction sets, worker pools, and one run of a problem in a guarded workspace. */
#define _GNU_SOURCE /* setenv */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkfa.h"

/* ---- instruction sets -------------------------------------------------------------------------------------------- */

int ck_isas(const char *names[8])
{
    static const struct {
        unsigned flag;
        const char *name;
    } all[] = {{FA_CPU_AVX2, "avx2"}, {FA_CPU_AVX512, "avx512"}, {FA_CPU_AVX512BF16, "avx512bf16"}};
    int n = 0;
    names[n++] = "scalar";
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        if (fa_cpu_detected() & all[i].flag)
            names[n++] = all[i].name;
    return n;
}

void ck_use_isa(const char *name)
{
    setenv("FLASHATTN_EXT_ISA", name, 1);
    fa_cpu_refresh();
}

/* ---- pools ------------------------------------------------------------------------------------------------------- */

void ck_pool_serial(void *pool, int workers, void (*body)(void *ctx, int worker), void *ctx)
{
    (void)pool;
    for (int worker = 0; worker < workers; worker++)
        body(ctx, worker);
}

typedef struct job {
    void (*body)(void *ctx, int worker);
    void *ctx;
    int worker;
} job;

static void *run_job(void *arg)
{
    job *j = arg;
    j->body(j->ctx, j->worker);
    return NULL;
}

void ck_pool_threads(void *pool, int workers, void (*body)(void *ctx, int worker), void *ctx)
{
    enum { MOST = 64 };
    pthread_t threads[MOST];
    job jobs[MOST];
    (void)pool;
    if (workers > MOST)
        workers = MOST;
    for (int worker = 0; worker < workers; worker++) {
        jobs[worker] = (job){body, ctx, worker};
        if (pthread_create(&threads[worker], NULL, run_job, &jobs[worker])) {
            perror("checkfa: pthread_create");
            exit(2);
        }
    }
    for (int worker = 0; worker < workers; worker++)
        pthread_join(threads[worker], NULL);
}

/* ---- runs -------------------------------------------------------------------------------------------------------- */

typedef struct results {
    int first, end;
} results;

static results results_of(bool backward)
{
    return backward ? (results){CK_DQ, CK_DSINKS + 1} : (results){CK_OUT, CK_LSE + 1};
}

static bool results_intact(const ck_problem *p, bool backward, char why[512])
{
    const results r = results_of(backward);
    for (int id = 0; id < CK_TENSORS; id++) {
        bool result = id >= r.first && id < r.end;
        if (result ? ck_padding_intact(p, id) : !p->memory[id].map || ck_guard_intact(&p->memory[id]))
            continue;
        snprintf(why, 512, "memory around %s was written", ck_tensor_name(id));
        return false;
    }
    return true;
}

bool ck_run(ck_problem *p, bool backward, int threads, fa_parallel_fn *pool, fa_plan *plan, char why[512])
{
    const results r = results_of(backward);
    fa_error err = {""};
    for (int id = r.first; id < r.end; id++)
        ck_poison(p, id);
    fa_status status = backward ? fa_validate_backward(&p->a, &err) : fa_validate_forward(&p->a, &err);
    if (status != FA_OK) {
        snprintf(why, 512, "refused: %s", err.text);
        return false;
    }
    if (backward)
        fa_plan_backward(&p->a, threads, plan);
    else
        fa_plan_forward(&p->a, threads, plan);
    ck_now("%s threads %d: %s", plan->kernel, threads, ck_describe(&p->c));
    ck_guarded workspace = ck_guard(plan->workspace);
    fa_exec exec = {.parallel = pool, .workspace = workspace.start, .workspace_size = plan->workspace};
    status = backward ? fa_run_backward(&p->a, plan, &exec, &err) : fa_run_forward(&p->a, plan, &exec, &err);
    bool intact = ck_guard_intact(&workspace);
    ck_guard_free(&workspace);
    if (status != FA_OK) {
        snprintf(why, 512, "%s: %s", fa_status_name(status), err.text);
        return false;
    }
    if (!intact) {
        snprintf(why, 512, "memory before the workspace was written");
        return false;
    }
    return results_intact(p, backward, why);
}
