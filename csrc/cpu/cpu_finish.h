/* From the running maximum and sum of a row to its log-sum-exp and the factor of its output. */
#ifndef FA_CPU_FINISH_H
#define FA_CPU_FINISH_H

#include <float.h>
#include <math.h>

#include "../common/fa_dtype.h"
#include "../common/fa_philox.h"

typedef struct fa_row_end {
    float scale; /* multiplies the weighted sum of values */
    double lse;  /* natural log */
} fa_row_end;

/* m: maximum score in units of log2; l: sum of 2^(s - m). A sink is one more key whose value is 0. A row that sees
 * nothing has l = 0: its output is 0 and its log-sum-exp -inf (or the sink). */
static inline fa_row_end fa_finish_row(const fa_args *a, int64_t b, int64_t h, float m, float l)
{
    const double ln2 = 0.6931471805599453;
    float keep = (float)fa_dropout_factor(a->dropout_p);
    float top = m, shrink = 1;
    if (a->sinks.data) {
        int64_t at = (a->sinks.size[0] > 1 ? b : 0) * a->sinks.stride[0] + h * a->sinks.stride[1];
        float sink = (float)(fa_load(a->sinks.data, a->sinks.dtype, at) / ln2);
        top = sink > m || isnan(sink) ? sink : m;
        if (top != -INFINITY) {
            shrink = exp2f(m - top);
            l = l * shrink + exp2f(sink - top);
        }
    }
    if (l == 0)
        return (fa_row_end){.scale = 0, .lse = -INFINITY};
    double lse = ((double)top + log2f(l)) * ln2;
    if (top <= -FLT_MAX && !isnan(l)) /* where mask_values cut it off */
        lse = -FLT_MAX;
    return (fa_row_end){.scale = keep * shrink / l, .lse = lse};
}

static inline void fa_store_lse(const fa_args *a, int64_t b, int64_t h, int64_t q, double lse)
{
    fa_store(a->lse.data, a->lse.dtype, b * a->lse.stride[0] + h * a->lse.stride[1] + q * a->lse.stride[2], lse);
}

#endif
