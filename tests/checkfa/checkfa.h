/* checkfa: every kernel of every instruction set against the scalar reference, and the reference against a naive
 * eager implementation. No torch, no Python.
 *
 * A case (ck_case) is a description; a problem (ck_problem) is the case with tensors in guarded memory. Tensors that
 * kernels write are poisoned with NaN before each run; memory ends at a page that faults when touched. */
#ifndef CHECKFA_H
#define CHECKFA_H

#include "fa.h"

/* ---- random numbers ---------------------------------------------------------------------------------------------- */

typedef struct ck_rng {
    uint64_t state;
} ck_rng;

ck_rng ck_seeded(uint64_t seed, uint64_t stream);
uint64_t ck_next(ck_rng *r);
int64_t ck_below(ck_rng *r, int64_t n);      /* 0 .. n-1 */
bool ck_chance(ck_rng *r, int percent);
double ck_uniform(ck_rng *r);                /* [0, 1) */
double ck_normal(ck_rng *r);

/* ---- cases ------------------------------------------------------------------------------------------------------- */

typedef enum ck_layout {
    CK_DENSE,
    CK_BSHD,         /* (B, S, H, D) seen as (B, H, S, D) */
    CK_PADDED,       /* rows followed by 3 foreign elements */
    CK_STEP2,        /* last stride 2 */
    CK_ROWS_INSIDE,  /* (B, H, D, S) seen as (B, H, S, D): the last stride is long */
    CK_SHARED_HEADS, /* stride 0 over heads; results are dense instead */
    CK_SHARED_ALL,   /* stride 0 over batch and heads; results are dense instead */
    CK_LAYOUTS
} ck_layout;

typedef enum ck_mask_kind {
    CK_NO_MASK,
    CK_BOOL_MASK,
    CK_F32_MASK,
    CK_SAME_MASK, /* q's dtype */
    CK_MASKS
} ck_mask_kind;

typedef struct ck_case {
    fa_dtype dtype;
    int64_t B, HQ, HK, SQ, SK, D, DV;
    ck_layout layout;
    ck_mask_kind mask;
    unsigned mask_full;    /* bit d: dimension d of the mask has its full size, else 1 */
    bool mask_expanded;    /* the sizes of 1 are stride 0 instead */
    bool mask_floor;       /* some elements are the dtype's least finite number, as transformers writes hidden keys */
    bool sinks, alibi, per_batch; /* per_batch: sinks and slopes have size B */
    bool q_lengths, k_lengths;
    double scale, softcap, dropout_p;
    int64_t left, right;
    bool bottom_right;
    double magnitude;      /* of queries; 1 gives scores of about 1 at the default scale */
    bool nan_hidden;       /* NaN in keys no query sees, in queries that see nothing, and past the lengths */
    bool nan_seen;         /* NaN in one key that only some queries see */
    bool dlse;
    unsigned wanted;       /* backward: CK_WANT_Q and the like */
    uint64_t seed;         /* of the values */
} ck_case;

enum { CK_WANT_Q = 1, CK_WANT_K = 2, CK_WANT_V = 4, CK_WANT_MASK = 8, CK_WANT_SINKS = 16, CK_WANT_ALL = 31 };

/* A plain dense case with everything off. */
ck_case ck_plain(fa_dtype dtype, int64_t B, int64_t HQ, int64_t HK, int64_t SQ, int64_t SK, int64_t D, int64_t DV);
/* Random heads, dims and options for these lengths, at most `budget` multiply-adds forward. */
ck_case ck_random(ck_rng *r, fa_dtype dtype, int64_t SQ, int64_t SK, double budget);
double ck_cost(const ck_case *c);
/* One line; the text lives until the next call. */
const char *ck_describe(const ck_case *c);

/* ---- tensors in guarded memory ----------------------------------------------------------------------------------- */

typedef struct ck_guarded {
    char *map;        /* mapping, its last page inaccessible */
    size_t map_bytes;
    char *start;      /* start + bytes is where that page begins; canaries lie before start */
    size_t bytes;
} ck_guarded;

ck_guarded ck_guard(size_t bytes);
bool ck_guard_intact(const ck_guarded *g);
void ck_guard_free(ck_guarded *g);

enum ck_id {
    CK_Q, CK_K, CK_V, CK_MASK, CK_SINKS, CK_ALIBI, CK_QLEN, CK_KLEN,   /* inputs */
    CK_OUT, CK_LSE,                                                   /* results of forward */
    CK_DOUT, CK_DLSE,                                                 /* inputs of backward */
    CK_DQ, CK_DK, CK_DV, CK_DMASK, CK_DSINKS,                         /* results of backward */
    CK_TENSORS
};

typedef struct ck_problem {
    ck_case c;
    fa_args a;
    ck_guarded memory[CK_TENSORS];
} ck_problem;

fa_tensor *ck_tensor(fa_args *a, int id);
const char *ck_tensor_name(int id);
/* Forward makes inputs, out and lse; backward also the rest (out and lse then hold what ck_run_forward left). */
void ck_problem_make(ck_problem *p, const ck_case *c, bool backward);
void ck_problem_free(ck_problem *p);
void ck_poison(ck_problem *p, int id);
/* Nothing outside the elements of the tensor was written. */
bool ck_padding_intact(const ck_problem *p, int id);

/* Elements in order, as doubles; malloc'ed. */
double *ck_dense(const fa_tensor *t);
int64_t ck_count(const fa_tensor *t);

/* ---- instruction sets and runs ----------------------------------------------------------------------------------- */

/* Values of FLASHATTN_EXT_ISA this machine can run; [0] is "scalar". Returns their number. */
int ck_isas(const char *names[8]);
void ck_use_isa(const char *name);

void ck_pool_serial(void *pool, int workers, void (*body)(void *ctx, int worker), void *ctx);
void ck_pool_threads(void *pool, int workers, void (*body)(void *ctx, int worker), void *ctx);

/* Poisons the results, then validates, plans and runs with a workspace of exactly plan->workspace guarded bytes.
 * False: refused, or something was written where it must not be; why says it. */
bool ck_run(ck_problem *p, bool backward, int threads, fa_parallel_fn *pool, fa_plan *plan, char why[512]);

/* ---- eager attention and what rounding may do -------------------------------------------------------------------- */

/* Magnitudes of a problem, from which the tolerance of each result follows (check_oracle.c). */
typedef struct ck_scales {
    double score;       /* largest |q| |k| scale, mask or ALiBi term: scores are rounded relative to it */
    double v, k, q, dout;
    double dp;          /* largest |dP| and |delta| */
    double dot;         /* largest |dO| |V| */
    double column;      /* largest 2-norm of a column of weights over the queries of a kv head */
    double mask;        /* largest 2-norm of the weights that one element of the mask collects */
    double keep;        /* fa_dropout_factor */
} ck_scales;

typedef struct ck_eager {
    double *result[CK_TENSORS]; /* out, lse and the gradients; dense, malloc'ed, NULL where not computed */
    ck_scales scales;
} ck_eager;

/* Does query i of head h see key j? Spelled out, without the ranges of fa_mask.h. */
bool ck_sees(const fa_args *a, int64_t b, int64_t h, int64_t i, int64_t j);

/* full: compute results too; backward: gradients (and their scales) too. Keeps whole S x S matrices. */
ck_eager ck_eager_make(const ck_problem *p, bool backward, bool full);
void ck_eager_free(ck_eager *e);

typedef struct ck_tolerance {
    double absolute, relative;
} ck_tolerance;

/* eager: against eager attention, which knows out and lse unrounded; else against the scalar kernel. */
ck_tolerance ck_tolerance_of(const ck_problem *p, const ck_scales *s, int id, bool eager);
/* Worst |got - want| / tolerance; NaN must match NaN. where: index of the worst element. */
double ck_distance(const double *got, const double *want, int64_t n, ck_tolerance t, int64_t *where);

/* ---- the report -------------------------------------------------------------------------------------------------- */

typedef struct ck_options {
    const char *isa;    /* only this one, or NULL */
    const char *filter; /* only kernels whose name contains it, or NULL */
    uint64_t seed;
    int64_t only;       /* run the case of this number alone; -1 = all */
    bool quick, bench;
    int64_t fuzz;       /* rounds of the fuzzer alone; 0 = the checks */
} ck_options;

extern ck_options ck_opt;

/* One more check of this kernel; worst is a distance, 0 where there is none. Prints what failed. */
void ck_result(const char *kernel, bool ok, double worst, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
bool ck_kernel_wanted(const char *kernel);
/* What is printed when a kernel crashes. */
void ck_now(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* ---- the checks -------------------------------------------------------------------------------------------------- */

/* The lengths where tiles end, plus and minus one. */
extern const int64_t ck_edges[];
extern const int ck_edge_count;

/* Numbers the cases of a run, so that --case can repeat one; false: this one is not asked for. */
bool ck_next_case(ck_rng *r);
/* The scalar kernel against eager attention where S x S is small, then every other kernel against the scalar one; each
 * with 1 and 3 workers, bit for bit. */
void ck_compare(const ck_case *c, bool backward);

void ck_check_dtypes(void);
void ck_check_refusals(void);
void ck_check_plans(void);
void ck_check_forward(void);
void ck_check_backward(void);
void ck_check_sequences(void);
void ck_check_caches(void);
void ck_fuzz(int64_t rounds);
void ck_bench(void);

#endif
