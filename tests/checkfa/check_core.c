/* What needs no kernel: dtype conversions, the wording of refusals, and promises of the plan. */
#include <inttypes.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "checkfa.h"
#include "common/fa_dtype.h"

/* ---- dtypes ------------------------------------------------------------------------------------------------------ */

/* Values of the format by its definition: exponent field e, mantissa m of mbits. */
static double narrow_value(unsigned x, int ebits, int mbits)
{
    const int bias = (1 << (ebits - 1)) - 1, e = (int)(x >> mbits & ((1u << ebits) - 1));
    const double m = (double)(x & ((1u << mbits) - 1)) / (1 << mbits), sign = x >> 15 ? -1 : 1;
    if (e == (1 << ebits) - 1)
        return m != 0 ? NAN : sign * INFINITY;
    return sign * (e ? ldexp(1 + m, e - bias) : ldexp(m, 1 - bias));
}

static uint16_t stored(double x, fa_dtype t)
{
    uint16_t bits = 0;
    fa_store(&bits, t, 0, x);
    return bits;
}

/* Every 16-bit pattern loads as its value and stores as itself; halfway to its neighbour goes to the even one, and a
 * little to either side of halfway to the nearer one. */
static void check_narrow(fa_dtype t, int ebits, int mbits)
{
    int wrong = 0;
    for (unsigned x = 0; x < 65536; x++) {
        const uint16_t bits = (uint16_t)x;
        const double value = narrow_value(x, ebits, mbits), loaded = fa_load(&bits, t, 0);
        if (isnan(value)) {
            wrong += !isnan(loaded) || !isnan(narrow_value(stored(loaded, t), ebits, mbits));
            continue;
        }
        wrong += loaded != value || signbit(loaded) != signbit(value) || stored(value, t) != x;
        if (isinf(value))
            continue;
        /* beyond the largest number the next step is where infinity begins */
        const double step = ldexp(1, ilogb(value) < 2 - (1 << (ebits - 1)) || value == 0
                                         ? 2 - (1 << (ebits - 1)) - mbits
                                         : ilogb(value) - mbits);
        const double half = value + copysign(step / 2, value), more = half + copysign(step * 1e-6, value);
        const double less = half - copysign(step * 1e-6, value);
        wrong += stored(half, t) != x + (x & 1) || stored(more, t) != x + 1 || stored(less, t) != x;
    }
    wrong += !isnan(narrow_value(stored(NAN, t), ebits, mbits)) || stored(1e300, t) != stored(INFINITY, t) ||
             stored(-1e-300, t) != 0x8000;
    ck_result("dtypes", wrong == 0, 0, "%d wrong conversions of %s", wrong, fa_dtype_name(t));
}

void ck_check_dtypes(void)
{
    static const size_t sizes[] = {4, 2, 2, 8, 1, 4, 8};
    check_narrow(FA_BF16, 8, 7);
    check_narrow(FA_F16, 5, 10);
    for (int t = FA_F32; t <= FA_I64; t++)
        ck_result("dtypes", fa_dtype_size((fa_dtype)t) == sizes[t], 0, "size of %s", fa_dtype_name((fa_dtype)t));
}

/* ---- refusals ---------------------------------------------------------------------------------------------------- */

typedef struct poke {
    size_t offset;
    enum { NOTHING, INTEGER, REAL, DTYPE, POINTER, ABSENT } kind;
    int64_t integer;
    double real;
} poke;

typedef struct refusal {
    bool backward;
    fa_status status;
    const char *text; /* must be in the message */
    poke pokes[3];
} refusal;

#define AT(field) offsetof(fa_args, field)
#define I(field, x) {.offset = AT(field), .kind = INTEGER, .integer = (x)}
#define R(field, x) {.offset = AT(field), .kind = REAL, .real = (x)}
#define T(field, x) {.offset = AT(field), .kind = DTYPE, .integer = (x)}
#define P(field, x) {.offset = AT(field), .kind = POINTER, .integer = (x)}
#define NO(field) {.offset = AT(field), .kind = ABSENT}

static const refusal refusals[] = {
    {false, FA_ERR_VALUE, "scale is nan: it must be finite", {R(scale, NAN)}},
    {false, FA_ERR_VALUE, "scale is -inf", {R(scale, -INFINITY)}},
    {false, FA_ERR_VALUE, "softcap is -1", {R(softcap, -1)}},
    {false, FA_ERR_VALUE, "softcap is inf", {R(softcap, INFINITY)}},
    {false, FA_ERR_VALUE, "window is (-2, -1)", {I(window_left, -2)}},
    {false, FA_ERR_VALUE, "window is (-1, 9223372036854775807)", {I(window_right, INT64_MAX)}},
    {false, FA_ERR_VALUE, "dropout_p is 1.5: it must be between 0 and 1", {R(dropout_p, 1.5)}},
    {false, FA_ERR_VALUE, "dropout_p is -0.1", {R(dropout_p, -0.1)}},
    {true, FA_ERR_VALUE, "dropout_p is nan", {R(dropout_p, NAN)}},
    {false, FA_ERR_SHAPE, "float16, float32 and float32", {T(q.dtype, FA_F16)}},
    {false, FA_ERR_SHAPE, "float32, float32 and float64", {T(v.dtype, FA_F64)}},
    {false, FA_ERR_SHAPE, "int32, int32 and int32",
     {T(q.dtype, FA_I32), T(k.dtype, FA_I32), T(v.dtype, FA_I32)}},
    {false, FA_ERR_SHAPE, "batch sizes 2, 3 and 2", {I(k.size[0], 3)}},
    {false, FA_ERR_SHAPE, "key has 2 heads and value 1", {I(v.size[1], 1)}},
    {false, FA_ERR_SHAPE, "query has 3 heads, key and value 2: they must be equal, or with enable_gqa=True",
     {I(q.size[1], 3)}},
    {false, FA_ERR_SHAPE, "query has 4 heads, key and value 0", {I(k.size[1], 0), I(v.size[1], 0)}},
    {false, FA_ERR_SHAPE, "key has length 7 and value 6", {I(v.size[2], 6)}},
    {false, FA_ERR_SHAPE, "query has head dimension 9 and key 8", {I(q.size[3], 9)}},
    {false, FA_ERR_SHAPE, "head dimension 513: it must be between 1 and 512", {I(q.size[3], 513), I(k.size[3], 513)}},
    {false, FA_ERR_SHAPE, "value has head dimension 0", {I(v.size[3], 0)}},
    {false, FA_ERR_SHAPE, "lengths must be at most 1073741824", {I(q.size[2], FA_MAX_SEQ + 1)}},
    {false, FA_ERR_SHAPE, "query has shape (2, 4, -1, 8): sizes must not be negative", {I(q.size[2], -1)}},
    {false, FA_ERR_SHAPE, "its number of bytes must fit",
     {I(q.size[0], INT64_MAX), I(k.size[0], INT64_MAX), I(v.size[0], INT64_MAX)}},
    {false, FA_ERR_SHAPE, "key has strides", {I(k.stride[2], INT64_MAX / 2)}},
    {false, FA_ERR_SHAPE, "value has shape (2, 2, 7, 6) and no data", {P(v.data, 0)}},
    {false, FA_ERR_SHAPE, "query starts at address", {P(q.data, 6)}},
    {false, FA_ERR_SHAPE, "attn_mask has dtype float16 and query has float32", {T(mask.dtype, FA_F16)}},
    {false, FA_ERR_SHAPE, "attn_mask has shape (2, 4, 5, 3): each size must be 1 or that of", {I(mask.size[3], 3)}},
    {false, FA_ERR_SHAPE, "attn_mask has shape (2, 4, 5, 7) and no data", {P(mask.data, 0)}},
    {false, FA_ERR_SHAPE, "sinks has dtype bfloat16 and query has float32", {T(sinks.dtype, FA_BF16)}},
    {false, FA_ERR_SHAPE, "sinks has shape (1, 2, 1, 1)", {I(sinks.size[1], 2)}},
    {false, FA_ERR_SHAPE, "alibi_slopes has shape (3, 4, 1, 1)", {I(alibi.size[0], 3)}},
    {false, FA_ERR_SHAPE, "alibi_slopes has dtype int64", {T(alibi.dtype, FA_I64)}},
    {false, FA_ERR_SHAPE, "q_seqlens has dtype float32: it must be int32 or int64", {T(q_seqlens.dtype, FA_F32)}},
    {false, FA_ERR_SHAPE, "kv_seqlens has shape (1, 1, 1, 1)", {I(kv_seqlens.size[0], 1)}},
    {false, FA_ERR_SHAPE, "out has shape (2, 4, 5, 8): it must be (2, 4, 5, 6)", {I(out.size[3], 8)}},
    {false, FA_ERR_SHAPE, "out has dtype bfloat16: it must be float32", {T(out.dtype, FA_BF16)}},
    {false, FA_ERR_SHAPE, "elements of a result must not share memory", {I(out.stride[1], 0)}},
    {false, FA_ERR_SHAPE, "elements of a result must not share memory", {I(out.stride[2], 3)}},
    {false, FA_ERR_SHAPE, "lse has dtype float64: it must be float32", {T(lse.dtype, FA_F64)}},
    {false, FA_ERR_SHAPE, "lse has shape (2, 4, 5, 1) and no data", {P(lse.data, 0)}},
    {true, FA_ERR_SHAPE, "grad_out has dtype float16", {T(dout.dtype, FA_F16)}},
    {true, FA_ERR_SHAPE, "grad_lse has shape (2, 4, 5, 2)", {I(dlse.size[3], 2)}},
    {true, FA_ERR_SHAPE, "grad_query has shape (2, 4, 5, 7)", {I(dq.size[3], 7)}},
    {true, FA_ERR_SHAPE, "elements of a result must not share memory", {I(dk.stride[0], 0)}},
    {true, FA_ERR_SHAPE, "grad_value has dtype int64: it must be float32", {NO(dk), T(dv.dtype, FA_I64)}},
    {true, FA_ERR_SHAPE, "grad_mask is wanted and attn_mask is bool", {T(mask.dtype, FA_BOOL)}},
    {true, FA_ERR_SHAPE, "grad_mask is wanted and attn_mask is absent", {NO(mask)}},
    {true, FA_ERR_SHAPE, "grad_mask has dtype float64: it must be float32", {T(dmask.dtype, FA_F64)}},
    {true, FA_ERR_SHAPE, "grad_sinks is wanted and sinks is absent", {NO(sinks)}},
    {true, FA_ERR_SHAPE, "grad_sinks has shape (2, 4, 1, 1): it must be (1, 4, 1, 1)", {I(dsinks.size[0], 2)}},
};

static void apply(fa_args *a, const poke *p)
{
    char *field = (char *)a + p->offset;
    switch (p->kind) {
    case NOTHING: break;
    case INTEGER: memcpy(field, &p->integer, sizeof p->integer); break;
    case REAL: memcpy(field, &p->real, sizeof p->real); break;
    case DTYPE: *(fa_dtype *)(void *)field = (fa_dtype)p->integer; break;
    case POINTER: *(void **)(void *)field = (void *)(uintptr_t)p->integer; break;
    case ABSENT: *(fa_tensor *)(void *)field = (fa_tensor){0}; break;
    }
}

static ck_case everything(void)
{
    ck_case c = ck_plain(FA_F32, 2, 4, 2, 5, 7, 8, 6);
    c.mask = CK_F32_MASK;
    c.mask_full = 15;
    c.sinks = c.alibi = c.q_lengths = c.k_lengths = c.dlse = true;
    return c;
}

static fa_status validate(const fa_args *a, bool backward, fa_error *err)
{
    return backward ? fa_validate_backward(a, err) : fa_validate_forward(a, err);
}

static void check_length_refusals(ck_problem *p)
{
    static const int64_t bad[] = {-1, 8, INT32_MIN};
    fa_tensor *t = &p->a.kv_seqlens;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        fa_error err = {""};
        char wanted[64];
        const double before = fa_load(t->data, t->dtype, t->stride[0]);
        fa_store(t->data, t->dtype, t->stride[0], (double)bad[i]);
        snprintf(wanted, sizeof wanted, "kv_seqlens[1] is %" PRId64 ": it must be between 0 and 7", bad[i]);
        fa_status status = fa_validate_forward(&p->a, &err);
        ck_result("refusals", status == FA_ERR_SHAPE && strstr(err.text, wanted), 0, "wanted '%s', got %s '%s'", wanted,
                  fa_status_name(status), err.text);
        fa_store(t->data, t->dtype, t->stride[0], before);
    }
}

static void check_workspace_refusals(ck_problem *p)
{
    fa_plan plan;
    fa_error err = {""};
    fa_plan_forward(&p->a, 1, &plan);
    ck_guarded workspace = ck_guard(plan.workspace);
    fa_exec small = {.workspace = workspace.start, .workspace_size = plan.workspace - 1};
    fa_exec none = {.workspace_size = plan.workspace};
    ck_result("refusals", fa_run_forward(&p->a, &plan, &small, &err) == FA_ERR_WORKSPACE && err.text[0], 0,
              "a workspace of %zu bytes was accepted, the plan wants %zu", plan.workspace - 1, plan.workspace);
    ck_result("refusals", fa_run_forward(&p->a, &plan, &none, &err) == FA_ERR_WORKSPACE, 0,
              "a missing workspace was accepted");
    fa_plan_backward(&p->a, 1, &plan);
    small.workspace_size = plan.workspace - 1;
    ck_result("refusals", fa_run_backward(&p->a, &plan, &small, &err) == FA_ERR_WORKSPACE, 0,
              "a workspace one byte short was accepted by backward");
    ck_guard_free(&workspace);
}

void ck_check_refusals(void)
{
    ck_problem p;
    const ck_case c = everything();
    ck_problem_make(&p, &c, true);
    for (int backward = 0; backward < 2; backward++) {
        fa_error err = {""};
        fa_status status = validate(&p.a, backward, &err);
        ck_result("refusals", status == FA_OK, 0, "a valid call was refused: %s", err.text);
    }
    for (size_t i = 0; i < sizeof refusals / sizeof refusals[0]; i++) {
        const refusal *r = &refusals[i];
        fa_args a = p.a;
        fa_error err = {""};
        for (int n = 0; n < 3; n++)
            apply(&a, &r->pokes[n]);
        fa_status status = validate(&a, r->backward, &err);
        ck_result("refusals", status == r->status && strstr(err.text, r->text), 0, "wanted %s '%s', got %s '%s'",
                  fa_status_name(r->status), r->text, fa_status_name(status), err.text);
        ck_result("refusals", validate(&a, r->backward, NULL) == r->status, 0, "without room for a text: '%s'",
                  r->text);
    }
    check_length_refusals(&p);
    check_workspace_refusals(&p);
    ck_problem_free(&p);
}

/* ---- plans ------------------------------------------------------------------------------------------------------- */

enum { MEBIBYTE = 1 << 20 };

static void set_tensor(fa_tensor *t, fa_dtype dtype, int64_t B, int64_t H, int64_t S, int64_t D)
{
    *t = (fa_tensor){.data = (void *)64, .size = {B, H, S, D}, .stride = {H * S * D, S * D, D, 1}, .dtype = dtype};
}

/* A plan reads integers only: the data of these tensors does not exist. */
static fa_args large_args(fa_dtype dtype, int64_t B, int64_t HQ, int64_t HK, int64_t SQ, int64_t SK, int64_t D)
{
    fa_args a = {.scale = 1, .window_left = -1, .window_right = 0};
    set_tensor(&a.q, dtype, B, HQ, SQ, D);
    set_tensor(&a.k, dtype, B, HK, SK, D);
    set_tensor(&a.v, dtype, B, HK, SK, D);
    set_tensor(&a.out, dtype, B, HQ, SQ, D);
    set_tensor(&a.lse, FA_F32, B, HQ, SQ, 1);
    a.dq = a.dout = a.q;
    a.dk = a.k;
    a.dv = a.v;
    return a;
}

static void check_plan(const fa_args *a, bool backward, int threads)
{
    fa_plan one, many;
    char text[2000], cut[20];
    (backward ? fa_plan_backward : fa_plan_forward)(a, 1, &one);
    (backward ? fa_plan_backward : fa_plan_forward)(a, threads, &many);
    const double results =
        4.0 * (double)(ck_count(&a->dq) + ck_count(&a->dk) + ck_count(&a->dv)) * (backward ? 1 : 0);
    const double most = results + 2.0 * MEBIBYTE * many.threads + 64;
    const char *name = backward ? "backward" : "forward";
    char shape[100];
    snprintf(shape, sizeof shape, "%s %s HQ %" PRId64 " SQ %" PRId64 " SK %" PRId64 " D %" PRId64, name,
             fa_dtype_name(a->q.dtype), a->q.size[1], a->q.size[2], a->k.size[2], a->q.size[3]);
    ck_result("plans", (double)many.workspace <= most, 0, "workspace %zu > %.0f with %d threads: %s", many.workspace,
              most, many.threads, shape);
    ck_result("plans", many.threads >= 1 && many.threads <= threads && one.threads == 1, 0, "%d threads: %s",
              many.threads, shape);
    ck_result("plans", one.splits == many.splits && one.split_keys == many.split_keys, 0,
              "the keys are split by the number of threads: %s", shape);
    int length = fa_plan_print(&many, a, text, sizeof text);
    ck_result("plans", length > 0 && (size_t)length == strlen(text) && strstr(text, many.kernel) &&
                           fa_plan_print(&many, a, cut, sizeof cut) == length && strlen(cut) == sizeof cut - 1 &&
                           fa_plan_print(&many, a, NULL, 0) == length,
              0, "fa_plan_print: %s", shape);
}

void ck_check_plans(void)
{
    static const int64_t shapes[][6] = {
        {1, 1, 1, 131072, 131072, 64}, {1, 8, 8, 2048, 2048, 128}, {16, 12, 12, 128, 128, 64}, {1, 32, 8, 1, 4096, 128},
        {1, 8, 1, 1, 1 << 20, 128},    {1, 1, 1, 1, FA_MAX_SEQ, 512}, {2, 64, 1, 4096, 4096, 512}, {1, 8, 8, 7, 7, 512},
    };
    static const fa_dtype dtypes[] = {FA_F32, FA_BF16, FA_F16};
    const char *isas[8];
    const int n = ck_isas(isas);
    for (int i = 0; i < n; i++) {
        if (ck_opt.isa && strcmp(ck_opt.isa, isas[i]))
            continue;
        ck_use_isa(isas[i]);
        for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++)
            for (int t = 0; t < 3; t++) {
                const int64_t *x = shapes[s];
                const fa_args a = large_args(dtypes[t], x[0], x[1], x[2], x[3], x[4], x[5]);
                for (int threads = 2; threads <= 64; threads *= 2) {
                    check_plan(&a, false, threads);
                    check_plan(&a, true, threads);
                }
            }
    }
}
