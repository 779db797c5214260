/* The cases of backward, and finite differences of the scalar kernel in float64. */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "checkfa.h"
#include "common/fa_dtype.h"

static const fa_dtype dtypes[] = {FA_F32, FA_BF16, FA_F16, FA_F64};
enum { DTYPES = 4 };

static void compare_numbered(const ck_case *c)
{
    ck_rng r;
    if (ck_next_case(&r)) {
        ck_case seeded = *c;
        seeded.seed = ck_next(&r);
        ck_compare(&seeded, true);
    }
}

static void edges(void)
{
    for (int t = 0; t < DTYPES; t++)
        for (int n = 0; n < ck_edge_count * ck_edge_count; n++) {
            ck_rng r;
            bool wanted = ck_next_case(&r);
            const int every = (dtypes[t] == FA_F64 ? 12 : 3) * (ck_opt.quick ? 6 : 1);
            if (!wanted || n % every != t % every)
                continue;
            ck_case c = ck_random(&r, dtypes[t], ck_edges[n / ck_edge_count], ck_edges[n % ck_edge_count], 1.5e6);
            ck_compare(&c, true);
        }
}

static void head_dims(void)
{
    for (int t = 0; t < DTYPES - 1; t++)
        for (int64_t D = 1 + t; D <= FA_MAX_HEAD_DIM; D += ck_opt.quick ? 23 : 7) {
            ck_case c = ck_plain(dtypes[t], 1, 2, 1, 9, 14, D, FA_MAX_HEAD_DIM + 1 - D);
            c.layout = (ck_layout)(D % CK_LAYOUTS);
            compare_numbered(&c);
        }
}

static void masks(void)
{
    for (int t = 0; t < DTYPES; t++)
        for (int kind = CK_BOOL_MASK; kind < CK_MASKS; kind++)
            for (unsigned full = 0; full < 16; full += ck_opt.quick ? 5 : 1) {
                ck_case c = ck_plain(dtypes[t], 2, 4, 2, 33, 141, 24, 16);
                c.mask = (ck_mask_kind)kind;
                c.mask_full = full;
                c.mask_expanded = full % 3 == 1;
                c.sinks = full % 4 == 3;
                c.right = full % 4 == 2 ? 0 : -1;
                c.softcap = full % 5 == 4 ? 3 : 0;
                c.dropout_p = full % 6 == 5 ? 0.3 : 0;
                c.layout = (ck_layout)((full + (unsigned)kind) % CK_LAYOUTS);
                c.wanted = full % 5 == 2 ? CK_WANT_MASK : CK_WANT_ALL;
                compare_numbered(&c);
            }
}

static void empty_sizes(void)
{
    for (int t = 0; t < DTYPES; t++)
        for (int n = 0; n < 4; n++) {
            ck_case c = ck_plain(dtypes[t], n != 0, 2 * (n != 1), 2, 9 * (n != 2), 9 * (n != 3), 8, 8);
            compare_numbered(&c);
            c.mask = CK_F32_MASK;
            c.sinks = c.q_lengths = c.k_lengths = true;
            compare_numbered(&c);
        }
}

static void poisoned(void)
{
    for (int t = 0; t < DTYPES; t++)
        for (int n = 0; n < (ck_opt.quick ? 10 : 40); n++) {
            ck_rng r;
            if (!ck_next_case(&r))
                continue;
            ck_case c = ck_random(&r, dtypes[t], ck_edges[ck_below(&r, ck_edge_count)],
                                  ck_edges[ck_below(&r, ck_edge_count)], 5e5);
            c.nan_hidden = true;
            c.nan_seen = n % 2;
            c.dropout_p = n % 2 ? 0 : c.dropout_p; /* is a dropped NaN a NaN? No answer is promised */
            c.mask = n % 4 < 2 ? CK_BOOL_MASK : CK_NO_MASK;
            c.mask_full = n % 3 ? 12 : 8 + (unsigned)n % 8;
            c.right = n % 3 ? 0 : -1;
            c.q_lengths = c.k_lengths = n % 5 > 2;
            c.layout = (ck_layout)(n % CK_SHARED_HEADS);
            ck_compare(&c, true);
        }
}

/* ---- finite differences ------------------------------------------------------------------------------------------ */

static bool run_scalar(ck_problem *p, bool backward)
{
    char why[512];
    fa_plan plan = {.kernel = "refused"};
    bool ok = ck_run(p, backward, 1, NULL, &plan, why);
    if (!ok)
        ck_result(plan.kernel, false, 0, "%s: %s", why, ck_describe(&p->c));
    return ok;
}

/* sum out * dout + sum lse * dlse: the number whose gradients backward gives */
static double loss(const ck_problem *p)
{
    double *out = ck_dense(&p->a.out), *lse = ck_dense(&p->a.lse), sum = 0;
    double *dout = ck_dense(&p->a.dout), *dlse = ck_dense(&p->a.dlse);
    for (int64_t i = 0; i < ck_count(&p->a.out); i++)
        sum += out[i] * dout[i];
    for (int64_t i = 0; i < ck_count(&p->a.lse); i++)
        sum += isfinite(lse[i]) ? lse[i] * dlse[i] : 0;
    free(out), free(lse), free(dout), free(dlse);
    return sum;
}

static void step(fa_tensor *t, const double *from, const double *direction, double h)
{
    int64_t n = 0;
    for (int64_t b = 0; b < t->size[0]; b++)
        for (int64_t x = 0; x < t->size[1]; x++)
            for (int64_t i = 0; i < t->size[2]; i++)
                for (int64_t d = 0; d < t->size[3]; d++, n++)
                    fa_store(t->data, t->dtype,
                             b * t->stride[0] + x * t->stride[1] + i * t->stride[2] + d * t->stride[3],
                             from[n] + h * direction[n]);
}

/* The slope of the loss along a random direction of one input, by differences and by the gradient. */
static void check_slope(ck_problem *p, ck_rng *r, int input, int gradient)
{
    const double h = 1e-5;
    fa_tensor *t = ck_tensor(&p->a, input), *g = ck_tensor(&p->a, gradient);
    const int64_t n = ck_count(t);
    double *from = ck_dense(t), *slope = ck_dense(g), *direction = malloc(sizeof(double) * (size_t)n);
    double by_gradient = 0, size = 0;
    for (int64_t i = 0; i < n; i++) {
        direction[i] = ck_normal(r);
        by_gradient += direction[i] * slope[i];
        size += fabs(direction[i] * slope[i]);
    }
    step(t, from, direction, h);
    bool ok = run_scalar(p, false);
    double up = loss(p);
    step(t, from, direction, -h);
    ok = ok && run_scalar(p, false);
    double by_difference = (up - loss(p)) / (2 * h);
    step(t, from, direction, 0);
    double error = fabs(by_difference - by_gradient) / (1e-7 + 1e-5 * size);
    ck_result(gradient == CK_DMASK ? "fa_dmask_scalar_f64" : "fa_bwd_scalar_f64", ok && error <= 1, error,
              "slope along %s is %.9g by differences, %.9g by the gradient: %s", ck_tensor_name(input), by_difference,
              by_gradient, ck_describe(&p->c));
    free(from), free(slope), free(direction);
}

static void differences(void)
{
    static const int pairs[][2] = {{CK_Q, CK_DQ}, {CK_K, CK_DK}, {CK_V, CK_DV}, {CK_MASK, CK_DMASK},
                                   {CK_SINKS, CK_DSINKS}};
    ck_use_isa("scalar");
    if (!ck_kernel_wanted("fa_bwd_scalar_f64") || (ck_opt.isa && strcmp(ck_opt.isa, "scalar")))
        return;
    for (int n = 0; n < 40; n++) {
        ck_rng r;
        ck_problem p;
        if (!ck_next_case(&r))
            continue;
        ck_case c = ck_random(&r, FA_F64, 1 + ck_below(&r, 9), 1 + ck_below(&r, 9), 1e4);
        c.mask = n % 2 ? CK_SAME_MASK : c.mask == CK_F32_MASK ? CK_NO_MASK : c.mask;
        c.layout = (ck_layout)(n % CK_SHARED_HEADS);
        c.magnitude = 1;
        c.mask_expanded = c.nan_hidden = false;
        c.dlse = true;
        c.wanted = CK_WANT_ALL;
        ck_problem_make(&p, &c, true);
        if (p.a.sinks.data && p.a.sinks.dtype != FA_F64)
            c.sinks = false; /* a step of 1e-5 in float32 is too coarse */
        if (run_scalar(&p, false) && run_scalar(&p, true))
            for (int i = 0; i < 5; i++)
                if (p.memory[pairs[i][1]].map && (pairs[i][0] != CK_SINKS || c.sinks))
                    check_slope(&p, &r, pairs[i][0], pairs[i][1]);
        ck_problem_free(&p);
    }
}

void ck_check_backward(void)
{
    edges();
    head_dims();
    masks();
    empty_sizes();
    poisoned();
    differences();
}
