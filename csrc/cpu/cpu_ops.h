/* The table of CPU kernels: the scalar reference fills it, each instruction set overwrites what it does better. */
#ifndef FA_CPU_OPS_H
#define FA_CPU_OPS_H

#include "../plan/plan.h"

/* One unit of parallel work of a plan; task is in [0, plan->tasks). scratch is plan->thread_bytes of this worker's own,
 * shared is plan->shared_bytes common to all workers; both are 64-byte aligned and hold anything at entry. */
typedef void fa_task_fn(const fa_args *a, const fa_plan *plan, int64_t task, char *scratch, char *shared);

typedef struct fa_cpu_kernel {
    const char *name;
    fa_task_fn *run;
} fa_cpu_kernel;

/* Part of a parallel pass over rows: the rows (b * HQ + h) * SQ + i in [first, last). */
typedef void fa_rows_fn(const fa_args *a, char *shared, int64_t first, int64_t last);

/* Work to time for the machine's ceilings; each returns how much it did. NULL: this instruction set has none. */
typedef struct fa_cpu_probes {
    double (*fma)(int64_t steps);                       /* FLOP, fp32 multiply-adds */
    double (*dot_bf16)(int64_t steps);                  /* FLOP, pairs of bf16 */
    double (*read)(const float *data, int64_t floats);  /* bytes */
} fa_cpu_probes;

typedef struct fa_cpu_ops {
    fa_cpu_kernel fwd[4];      /* by dtype: f32, bf16, f16, f64. Panels of queries in the lanes */
    fa_cpu_kernel decode[FA_F8E4M3 + 1]; /* few query rows, by dtype of the keys; run NULL: the fwd kernel does it */
    fa_cpu_kernel bwd[4];
    fa_cpu_kernel dmask[4];    /* gradient of the mask, a pass of its own */
    fa_rows_fn *bwd_pre[4];    /* fills lse2 and delta, clears dQ; NULL: bwd needs no preparation */
    fa_rows_fn *bwd_post[4];   /* rounds dQ to its dtype */
    int panel_rows;            /* BM of fwd and bwd; 1 = the scalar kernel */
    int lanes;                 /* fp32 lanes of a vector register */
    bool pair_units[4];        /* operands are packed as pairs of bf16 */
    fa_cpu_probes probes;
    const char *target;
} fa_cpu_ops;

/* Tasks of the vector targets' dmask kernels, from the shape alone. */
int64_t fa_dmask_tiles(const fa_args *a, int64_t panel_rows);

/* The best kernels for these flags. Each call fills the table anew: it is cheap and keeps no state. */
void fa_cpu_ops_init(fa_cpu_ops *ops, unsigned cpu_flags);

void fa_cpu_ops_scalar(fa_cpu_ops *ops);
void fa_cpu_ops_avx2(fa_cpu_ops *ops);
void fa_cpu_ops_avx512(fa_cpu_ops *ops);
void fa_cpu_ops_avx512bf16(fa_cpu_ops *ops);

#endif
