/* One tile of the backward: P and dS of a panel of query rows against a block of keys. */
#ifndef FA_CPU_BWD_TILE_H
#define FA_CPU_BWD_TILE_H

#include "cpu_operand.h"

typedef struct bwd {
    const fa_args *a;
    fa_score_ops ops;
    fa_span span;
    fa_bwd_scratch at;
    fa_bwd_shared common;
    char *scratch, *shared;
    fa_panels panels;
    int64_t b, hk;
    int64_t d_units, dv_units, d_pad, dv_pad;
    float keep; /* fa_dropout_factor */
    bool grads; /* dS is wanted, not only P */
} bwd;

typedef struct key_block {
    int64_t k0;
    int nk;
    int index;
    fa_operand k, v;   /* operands A of S and dP */
    fa_operand k_n;    /* operand B of dQ */
    int nonfinite;     /* rows of K with NaN or infinity, 0 in k_n; -1: not looked for */
} key_block;

FA_INLINE float *at(const bwd *w, size_t offset)
{
    return (float *)(void *)(w->scratch + offset);
}

FA_INLINE bwd bwd_begin(const fa_args *a, char *scratch, char *shared, int64_t b, int64_t hk, fa_panels panels,
                        bool pairs)
{
    fa_target t = {.lanes = VL, .panel_rows = BM, .key_block = BN, .pair_units = pairs};
    int64_t d = a->q.size[3], dv = a->v.size[3], pack = pairs ? 2 : 1;
    bwd w = {.a = a, .ops = score_ops_of(a), .at = fa_bwd_scratch_of(a, &t), .common = fa_bwd_shared_of(a, &t),
             .scratch = scratch, .shared = shared, .panels = panels, .b = b, .hk = hk,
             .d_units = (d + pack - 1) / pack, .dv_units = (dv + pack - 1) / pack,
             .d_pad = fa_padded(d, VL), .dv_pad = fa_padded(dv, VL),
             .keep = (float)fa_dropout_factor(a->dropout_p)};
    w.span = fa_span_at(a, b);
    return w;
}

FA_INLINE key_block block_begin(const bwd *w, int64_t index, fa_dtype dtype, bool pairs)
{
    const fa_args *a = w->a;
    key_block kb = {.index = (int)index, .k0 = index * BN, .nonfinite = -1};
    kb.nk = (int)fa_min64(BN, w->span.k_len - kb.k0);
    if (kb.nk <= 0)
        return kb;
    kb.k = operand_a(at(w, w->at.k), rows_at(&a->k, w->b, w->hk, kb.k0, dtype), kb.nk, dtype, pairs);
    kb.v = operand_a(at(w, w->at.v), rows_at(&a->v, w->b, w->hk, kb.k0, dtype), kb.nk, dtype, pairs);
    return kb;
}

/* Q, dO, LSE and delta of a panel. */
FA_INLINE void panel_load(const bwd *w, fa_lanes *l, fa_dtype dtype, bool pairs)
{
    const fa_args *a = w->a;
    const float *lse2 = (const float *)(const void *)(w->shared + w->common.lse2);
    const float *delta = (const float *)(const void *)(w->shared + w->common.delta);
    for (int i = 0; i < l->nv * VL; i++) {
        int64_t row = (int64_t)l->bh[i] * a->q.size[2] + l->query[i];
        l->valid[i] = l->valid[i] && lse2[row] != INFINITY; /* Q and dO of a row that sees nothing are never read */
        l->all_valid &= l->valid[i] || i >= l->n;
        at(w, w->at.lse2)[i] = l->valid[i] ? lse2[row] : INFINITY; /* 2^(S - inf) = 0 */
        at(w, w->at.delta)[i] = l->valid[i] ? delta[row] : 0;
    }
    pack_transposed(at(w, w->at.q_t), l, &a->q, w->b, dtype, pairs);
    if (w->grads)
        pack_transposed(at(w, w->at.do_t), l, &a->dout, w->b, dtype, pairs);
}

/* s <- P = 2^(S - LSE): 0 for a hidden key and for a lane without a row, whatever NaN the other of the two may hold */
FA_INLINE void weights(const bwd *w, const fa_lanes *l, float *s, int nk)
{
    vf none = v_set1(INFINITY), hide = v_set1(-INFINITY);
    vm dead[BM_VECS];
    for (int v = 0; v < l->nv; v++)
        dead[v] = v_eq(v_load(at(w, w->at.lse2) + v * VL), none);
    for (int k = 0; k < nk; k++)
        for (int v = 0; v < l->nv; v++) {
            float *x = s + k * BM + v * VL;
            vf score = v_load(x), y = v_sub(score, v_load(at(w, w->at.lse2) + v * VL));
            y = v_exp2(v_min(v_zero(), y), 5); /* scores of 1e9 round by more than their distance to the sum */
            v_store(x, v_select(vm_or(dead[v], v_eq(score, hide)), v_zero(), y));
        }
}

/* g <- P * (g - delta), the gradient of the score as it enters the softmax; of_dot: times the derivative of softcap and
 * scale, for the gradient of q . k. A weight of 0 gives 0: behind it dP may be NaN. */
FA_INLINE void score_grads(const bwd *w, const fa_lanes *l, const float *p, float *g, int nk, bool of_dot)
{
    const float *capped = at(w, w->at.capped);
    vf f = v_set1(of_dot ? (float)w->a->scale : 1.0f);
    for (int k = 0; k < nk; k++)
        for (int v = 0; v < l->nv; v++) {
            int64_t i = k * BM + v * VL;
            vf x = v_load(p + i);
            vf y = v_mul(v_mul(x, f), v_sub(v_load(g + i), v_load(at(w, w->at.delta) + v * VL)));
            if (of_dot && w->ops.softcap) {
                vf t = v_load(capped + i);
                y = v_mul(y, v_fnma(t, t, v_set1(1.0f)));
            }
            v_store(g + i, v_select(v_eq(x, v_zero()), v_zero(), y));
        }
}

/* s -> cap tanh(s / cap) in units of log2, keeping the tanh for its derivative */
static inline void softcap_keeping(float *s, float *capped, int nk, int nv, double cap)
{
    vf c = v_set1((float)(cap * FA_LOG2E));
    for (int k = 0; k < nk; k++)
        for (int v = 0; v < nv; v++) {
            vf t = v_tanh(v_load(s + k * BM + v * VL));
            v_store(capped + k * BM + v * VL, t);
            v_store(s + k * BM + v * VL, v_mul(c, t));
        }
}

/* P of the tile into scores and, where w->grads, dS into grads (see score_grads). Returns false, and leaves both, if
 * the mask hides every key of the block from every row of the panel. */
FA_INLINE bool tile_grads(const bwd *w, const fa_lanes *l, const key_block *kb, bool of_dot, bool edge, bool pairs)
{
    const fa_args *a = w->a;
    float *s = at(w, w->at.scores), *g = at(w, w->at.grads), *bias = at(w, w->at.bias);
    mask_effect effect = MASK_NO_CHANGE;
    if (w->ops.mask)
        effect = stage_mask(bias, a, l, w->b, kb->k0, kb->nk);
    if (effect == MASK_NOTHING_SEEN)
        return false;
    fa_gemm qk = {.m = kb->nk, .nv = l->nv, .k = w->d_units, .a = kb->k.p, .am = kb->k.bytes, .ak = 4,
                  .b = at(w, w->at.q_t), .bk = BM * 4, .c = s, .cm = BM};
    product(&qk, w->ops.scale, pairs);
    if (w->ops.softcap)
        softcap_keeping(s, at(w, w->at.capped), kb->nk, l->nv, a->softcap);
    if (effect == MASK_MIXED)
        apply_bias(s, bias, kb->nk, l->nv);
    if (w->ops.alibi)
        apply_alibi(s, l, kb->k0, kb->nk);
    if (edge)
        apply_band(s, l, &w->span, kb->k0, kb->nk);
    weights(w, l, s, kb->nk);
    if (!w->grads)
        return true;
    fa_gemm ov = {.m = kb->nk, .nv = l->nv, .k = w->dv_units, .a = kb->v.p, .am = kb->v.bytes, .ak = 4,
                  .b = at(w, w->at.do_t), .bk = BM * 4, .c = g, .cm = BM};
    product(&ov, w->ops.dropout ? w->keep : 1.0f, pairs);
    if (w->ops.dropout)
        apply_dropout(g, l, a, kb->k0, kb->nk);
    score_grads(w, l, s, g, kb->nk, of_dot);
    return true;
}

FA_INLINE bool is_edge(const bwd *w, const fa_lanes *l, const key_block *kb)
{
    return !fa_all_visible(&w->span, l->first, l->last, kb->k0, kb->k0 + kb->nk - 1);
}

#endif
