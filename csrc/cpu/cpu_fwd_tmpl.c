/* Forward, queries in the lanes (prefill and training). Compiled once for each instruction set.
 *
 * One task is a chunk of panels of one (batch, kv head), and a part of its keys. Keys are outermost, so that each block
 * of K and V is read, and where necessary converted, once for all panels of the chunk:
 *
 *   for each block of BN keys                 K, V block: cache; each panel: Q^T, O, max, sum in scratch
 *       for each panel
 *           S[key][row]  = scale * K Q^T      row in the lanes: K is broadcast as it lies in memory
 *           softcap, bias, ALiBi, band        where the call or the block needs them
 *           P = 2^(S - max); rescale, sum     no horizontal step: a row is a lane
 *           O[row][dv]   = rescale * O + P^T V
 *
 * Online softmax after Milakov and Gimelshein (2018), tiling after Dao et al. (2022). Whole blocks beyond the diagonal,
 * the window or the lengths are never touched; only blocks on an edge compare positions.
 */
#include "cpu_finish.h"
#include "cpu_operand.h"
#include "cpu_ops.h"

typedef struct panel {
    fa_lanes *lanes;
    float *q_t;        /* [units][BM] */
    float *out;        /* [BM][dv_pad] */
    float *max, *sum;  /* [BM] */
    fa_range keys;
} panel;

typedef struct key_block {
    int64_t k0;
    int nk;
    fa_rows v_rows;
    fa_operand k, v;
    const float *k_scale, *v_scale; /* [BN] of quantised keys and values, else NULL */
    int nonfinite;     /* rows of V with NaN or infinity, 0 in the operand; -1: not looked for yet */
    uint8_t marks[BN];
} key_block;

typedef struct fwd {
    const fa_args *a;
    fa_score_ops ops;
    fa_span span;
    fa_fwd_scratch at;
    char *scratch;
    int64_t b, hk;
    int64_t units, dv_pad;
    size_t size; /* of an element */
} fwd;

FA_INLINE panel panel_at(const fwd *f, int64_t i)
{
    char *p = f->scratch + f->at.panel + (size_t)i * f->at.panel_bytes;
    return (panel){
        .lanes = (fa_lanes *)(void *)(p + f->at.info),
        .q_t = (float *)(void *)(p + f->at.q_t),
        .out = (float *)(void *)(p + f->at.out),
        .max = (float *)(void *)(p + f->at.max),
        .sum = (float *)(void *)(p + f->at.sum),
    };
}

FA_INLINE panel panel_begin(const fwd *f, const fa_panels *panels, int64_t slot, int64_t index, fa_range part,
                            fa_dtype dtype, bool pairs)
{
    panel p = panel_at(f, slot);
    lanes_init(p.lanes, f->a, panels, &f->span, f->b, f->hk, index);
    p.keys = (fa_range){0, 0};
    for (int i = 0; i < BM; i++)
        p.max[i] = -INFINITY, p.sum[i] = 0;
    memset(p.out, 0, (size_t)(BM * f->dv_pad) * 4);
    if (p.lanes->any) {
        p.keys = fa_keys_of_queries(&f->span, p.lanes->first, p.lanes->last);
        p.keys.lo = fa_max64(p.keys.lo, part.lo) & ~(int64_t)1; /* whole pairs */
        p.keys.hi = fa_min64(p.keys.hi, part.hi);
    }
    if (p.keys.lo < p.keys.hi)
        pack_transposed(p.q_t, p.lanes, &f->a->q, f->b, dtype, pairs);
    return p;
}

/* Maximum, weights, sum for nv vectors of lanes; the running values of max and sum are updated. */
FA_INLINE void softmax_strip(float *s, int nk, int nv, float *max, float *sum, float *rescale, int degree)
{
    vf top[NV_MAX], acc[NV_MAX], none = v_set1(-INFINITY);
    for (int v = 0; v < nv; v++)
        top[v] = v_load(max + v * VL);
    for (int k = 0; k < nk; k++)
        for (int v = 0; v < nv; v++)
            top[v] = v_max(v_load(s + k * BM + v * VL), top[v]); /* NaN is left to the weights */
    for (int v = 0; v < nv; v++) {
        vf old = v_load(max + v * VL);
        v_store(max + v * VL, top[v]);
        top[v] = v_select(v_eq(top[v], none), v_zero(), top[v]); /* -inf - (-inf) would be NaN */
        vf r = v_exp2(v_sub(old, top[v]), 5);
        v_store(rescale + v * VL, r);
        acc[v] = v_zero();
    }
    for (int k = 0; k < nk; k++)
        for (int v = 0; v < nv; v++) {
            float *x = s + k * BM + v * VL;
            vf w = v_exp2(v_sub(v_load(x), top[v]), degree);
            acc[v] = v_add(acc[v], w);
            v_store(x, w);
        }
    for (int v = 0; v < nv; v++)
        v_store(sum + v * VL, v_fma(v_load(sum + v * VL), v_load(rescale + v * VL), acc[v]));
}

FA_INLINE void softmax(float *s, int nk, const panel *p, float *rescale, int degree)
{
    for (int v = 0; v < p->lanes->nv; v += NV_MAX) {
        int left = p->lanes->nv - v, at = v * VL;
        if (left >= NV_MAX)
            softmax_strip(s + at, nk, NV_MAX, p->max + at, p->sum + at, rescale + at, degree);
        else
            softmax_strip(s + at, nk, left, p->max + at, p->sum + at, rescale + at, degree);
    }
}

/* The rows of V left out of the product for their NaN or infinity, for the queries that give them a weight. */
static __attribute__((noinline)) void add_nonfinite(const fwd *f, const panel *p, const key_block *kb, const float *w,
                                                    int first, int nk)
{
    const fa_rows *v = &kb->v_rows;
    for (int k = 0; k < nk; k++) {
        if (!kb->marks[first + k])
            continue;
        const char *row = v->p + (first + k) * v->bytes;
        for (int i = 0; i < p->lanes->n; i++) {
            float weight = w[k * BM + i];
            for (int64_t d = 0; weight != 0 && d < v->d; d++)
                p->out[i * f->dv_pad + d] += weight * (float)fa_load(row, f->a->q.dtype, d * v->stride);
        }
    }
}

/* s[key][lane] *= scale[key]; a weight of 0 stays 0 whatever the scale of its hidden key */
FA_INLINE void scale_keys(float *s, const float *scale, int nk, int nv)
{
    for (int k = 0; k < nk; k++)
        for (int v = 0; v < nv; v++) {
            vf x = v_load(s + k * BM + v * VL);
            v_store(s + k * BM + v * VL, v_select(v_eq(x, v_zero()), v_zero(), v_mul(x, v_set1(scale[k]))));
        }
}

/* Scores of the keys first .. first+nk-1 of the block. Returns false if no row of the panel sees any of them. */
FA_INLINE bool block_scores(const fwd *f, const panel *p, const key_block *kb, int first, int nk, bool edge, float *s,
                            bool pairs)
{
    const fa_args *a = f->a;
    float *bias = (float *)(void *)(f->scratch + f->at.bias);
    mask_effect effect = MASK_NO_CHANGE;
    if (f->ops.mask)
        effect = stage_mask(bias, a, p->lanes, f->b, kb->k0 + first, nk);
    if (effect == MASK_NOTHING_SEEN)
        return false;
    fa_gemm g = {.m = nk, .nv = p->lanes->nv, .k = f->units,
                 .a = kb->k.p + first * kb->k.bytes, .am = kb->k.bytes, .ak = 4,
                 .b = p->q_t, .bk = BM * 4, .c = s, .cm = BM};
    product(&g, f->ops.scale, pairs);
    if (kb->k_scale)
        scale_keys(s, kb->k_scale + first, nk, p->lanes->nv);
    if (f->ops.softcap)
        apply_softcap(s, nk, p->lanes->nv, a->softcap);
    if (effect == MASK_MIXED)
        apply_bias(s, bias, nk, p->lanes->nv);
    if (f->ops.alibi)
        apply_alibi(s, p->lanes, kb->k0 + first, nk);
    if (edge)
        apply_band(s, p->lanes, &f->span, kb->k0 + first, nk);
    return true;
}

FA_INLINE void block_step(const fwd *f, const panel *p, key_block *kb, fa_dtype dtype, bool pairs)
{
    int64_t lo = fa_max64(kb->k0, p->keys.lo), hi = fa_min64(kb->k0 + kb->nk, p->keys.hi);
    if (lo >= hi)
        return;
    if (pairs) /* the second key of the last pair takes part with weight 0: let the band hide it like any other */
        hi = fa_min64(fa_round_up(hi, 2), kb->k0 + kb->nk);
    int first = (int)(lo - kb->k0), nk = (int)(hi - lo);
    bool edge = !fa_all_visible(&f->span, p->lanes->first, p->lanes->last, lo, hi - 1);
    float *s = (float *)(void *)(f->scratch + f->at.scores);
    float *rescale = (float *)(void *)(f->scratch + f->at.rescale);
    if (!block_scores(f, p, kb, first, nk, edge, s, pairs))
        return;
    if ((edge || f->ops.mask) && kb->nonfinite < 0) {
        kb->nonfinite = operand_nonfinite(kb->marks, kb->v_rows, kb->nk, dtype);
        if (kb->nonfinite)
            kb->v = operand_b((float *)(void *)(f->scratch + f->at.v), kb->v_rows, kb->nk, dtype, pairs, kb->marks);
    }
    softmax(s, nk, p, rescale, dtype == FA_BF16 ? 3 : 5);
    if (f->ops.dropout)
        apply_dropout(s, p->lanes, f->a, lo, nk);
    if (kb->v_scale)
        scale_keys(s, kb->v_scale + first, nk, p->lanes->nv);
    fa_gemm g = {.m = p->lanes->n, .nv = (int)(f->dv_pad / VL), .k = nk,
                 .a = s, .am = 4, .ak = BM * 4,
                 .b = kb->v.p + first * kb->v.bytes, .bk = kb->v.bytes, .c = p->out, .cm = f->dv_pad};
#ifdef FA_ISA_AVX512BF16
    if (pairs) {
        float *w = (float *)(void *)(f->scratch + f->at.pairs);
        pair_keys(w, s, nk, p->lanes->nv);
        g.a = w;
        g.k = (nk + 1) / 2;
        g.b = kb->v.p + first / 2 * kb->v.bytes;
    }
#endif
    add_product(&g, rescale, pairs);
    if (kb->nonfinite > 0)
        add_nonfinite(f, p, kb, s, first, nk);
}

/* normalises and writes the rows, or hands (max, sum, O) of this part of the keys to the merge */
FA_INLINE void panel_end(const fwd *f, const panel *p, float *partial, fa_dtype dtype)
{
    const fa_args *a = f->a;
    int64_t dv = a->v.size[3];
    for (int i = 0; i < p->lanes->n; i++) {
        int64_t h = p->lanes->head[i], q = p->lanes->query[i];
        const float *o = p->out + i * f->dv_pad;
        if (partial) {
            float *to = partial + (p->lanes->bh[i] * a->q.size[2] + q) * fa_partial_floats(dv);
            to[0] = p->max[i];
            to[1] = p->sum[i];
            memcpy(to + 2, o, (size_t)dv * 4);
            continue;
        }
        bool valid = p->lanes->valid[i];
        fa_row_end end = {0, -INFINITY};
        if (valid)
            end = fa_finish_row(a, f->b, h, p->max[i], p->sum[i]);
        bool zero = !valid || a->dropout_p >= 1;
        fa_store_lse(a, f->b, h, q, end.lse);
        char *row = (char *)(uintptr_t)row_of(&a->out, f->b, h, q, f->size);
        for (int64_t d = 0; d < dv; d += VL)
            store_f32(row, d, part(d, dv), a->out.stride[3], dtype,
                      zero ? v_zero() : v_mul(v_load(o + d), v_set1(end.scale)));
    }
}

FA_INLINE const float *block_scales(const fwd *f, size_t at, const fa_tensor *scale, int64_t k0, int nk)
{
    float *s = (float *)(void *)(f->scratch + at);
    if (!scale->data)
        return NULL;
    for (int k = 0; k < nk; k++)
        s[k] = fa_key_scale(f->a, scale, f->hk, k0 + k);
    return s;
}

FA_INLINE key_block block_begin(const fwd *f, int64_t k0, int nk, fa_dtype dtype, bool pairs)
{
    const fa_args *a = f->a;
    fa_rows k = key_rows(f->scratch + f->at.k_stage, a, &a->k, f->b, f->hk, k0, nk, dtype);
    fa_rows v = key_rows(f->scratch + f->at.v_stage, a, &a->v, f->b, f->hk, k0, nk, dtype);
    return (key_block){
        .k0 = k0, .nk = nk, .nonfinite = -1, .v_rows = v,
        .k = operand_a((float *)(void *)(f->scratch + f->at.k), k, nk, dtype, pairs),
        .v = operand_b((float *)(void *)(f->scratch + f->at.v), v, nk, dtype, pairs, NULL),
        .k_scale = block_scales(f, f->at.k_scale, &a->k_scale, k0, nk),
        .v_scale = block_scales(f, f->at.v_scale, &a->v_scale, k0, nk),
    };
}

FA_INLINE void fwd_task(const fa_args *a, const fa_plan *plan, int64_t task, char *scratch, char *shared,
                        fa_dtype dtype, bool pairs)
{
    fa_target target = {.lanes = VL, .panel_rows = BM, .key_block = BN, .pair_units = pairs};
    int64_t d = a->q.size[3], hk = a->k.size[1], sequences = a->q.size[0] * hk;
    int64_t chunks = fa_ceil_div(plan->panels, plan->chunk_panels);
    int64_t split = task % plan->splits, rest = task / plan->splits;
    int64_t chunk = chunks - 1 - rest / sequences; /* under a causal mask the last rows are the longest: start there */
    fwd f = {.a = a, .ops = score_ops_of(a), .at = fa_fwd_scratch_of(a, &target, plan->chunk_panels),
             .scratch = scratch, .b = rest % sequences / hk, .hk = rest % sequences % hk,
             .units = pairs ? (d + 1) / 2 : d, .dv_pad = fa_padded(a->v.size[3], VL), .size = dtype == FA_F32 ? 4 : 2};
    f.span = fa_span_at(a, f.b);
    fa_panels panels = fa_panels_of(a, BM);
    int64_t first = chunk * plan->chunk_panels, count = fa_min64(plan->chunk_panels, plan->panels - first);
    fa_range keys_part = {split * plan->split_keys, fa_min64((split + 1) * plan->split_keys, a->k.size[2])};
    fa_range keys = {INT64_MAX, 0};
    panel p[16];
    for (int64_t i = 0; i < count; i++) {
        p[i] = panel_begin(&f, &panels, i, first + i, keys_part, dtype, pairs);
        if (p[i].keys.lo < p[i].keys.hi) {
            keys.lo = fa_min64(keys.lo, p[i].keys.lo);
            keys.hi = fa_max64(keys.hi, p[i].keys.hi);
        }
    }
    for (int64_t k0 = keys.lo; k0 < keys.hi;) {
        int64_t next = fa_min64((k0 / BN + 1) * BN, keys.hi); /* blocks lie on multiples of BN for every chunk */
        key_block kb = block_begin(&f, k0, (int)(next - k0), dtype, pairs);
        for (int64_t i = 0; i < count; i++)
            block_step(&f, &p[i], &kb, dtype, pairs);
        k0 = next;
    }
    int64_t rows = a->q.size[0] * a->q.size[1] * a->q.size[2];
    float *partial = plan->splits > 1 ? (float *)(void *)shared + split * rows * fa_partial_floats(a->v.size[3]) : NULL;
    for (int64_t i = 0; i < count; i++)
        panel_end(&f, &p[i], partial, dtype);
}

#define FWD(name, dtype, pairs)                                                                                        \
    void FA_KERNEL(fwd, name)(const fa_args *a, const fa_plan *p, int64_t task, char *scratch, char *shared);          \
    void FA_KERNEL(fwd, name)(const fa_args *a, const fa_plan *p, int64_t task, char *scratch, char *shared)           \
    {                                                                                                                  \
        fwd_task(a, p, task, scratch, shared, dtype, pairs);                                                           \
    }

FWD(f32, FA_F32, false)
FWD(bf16, FA_BF16, BF16_PAIRS)
FWD(f16, FA_F16, false)
