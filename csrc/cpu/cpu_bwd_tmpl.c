/* Backward, queries in the lanes. Compiled once for each instruction set.
 *
 * With P = 2^(S - LSE) recomputed, dP = dO V^T and delta = rowsum(dO * O) - dLSE (Dao et al., 2022, appendix B):
 *
 *     dS = P * (dP - delta)      dV = P^T dO      dK = scale dS^T Q      dQ = scale dS K
 *
 * One task is one block of BN keys of one (batch, kv head): dK and dV stay in scratch while the panels of all query
 * heads of the group pass, and are rounded once. dQ is shared by the blocks of a sequence: each panel of it has a turn
 * counter, and a task adds to the panel when all earlier blocks have. Tasks are drawn in the order of the keys, so that
 * the task waited for is always under way; the order of every sum is fixed, whatever the number of threads.
 *
 *   for each panel of queries that sees the block      K, V block and dK, dV: scratch
 *       S[key][row] = scale * K Q^T     -> softcap, bias, ALiBi, band -> P
 *       G[key][row] = V dO^T            -> dS
 *       dV += P dO;   dK += dS Q;   wait for the turn;   dQ += dS^T K;   pass the turn on
 */
#include <stdatomic.h>

#include "cpu_bwd_tile.h"
#include "cpu_ops.h"

/* ---- dQ, dK, dV -------------------------------------------------------------------------------------------------- */

/* The panel's rows of t as operand B. One head's consecutive rows may serve as they lie, if all are valid. */
FA_INLINE fa_operand panel_rows_b(const bwd *w, float *dst, const fa_lanes *l, const fa_tensor *t, fa_dtype dtype,
                                  bool pairs)
{
    int64_t width = fa_padded(t->size[3], VL);
    if (!w->panels.packed && l->all_valid)
        return operand_b(dst, rows_at(t, w->b, l->head[0], l->query[0], dtype), l->n, dtype, pairs, NULL);
    size_t size = dtype == FA_F32 ? 4 : 2;
    for (int i = 0; i < l->n; i += pairs ? 2 : 1) {
        uint8_t skip[2] = {!l->valid[i], i + 1 >= l->n || !l->valid[i + 1]};
        const char *row = row_of(t, w->b, l->head[i], l->query[i], size);
#ifdef FA_ISA_AVX512BF16
        if (pairs) {
            const char *next = i + 1 < l->n ? row_of(t, w->b, l->head[i + 1], l->query[i + 1], size) : row;
            pack_pairs(dst + i / 2 * width, width, row, next - row, 2, t->size[3], t->stride[3], skip);
            continue;
        }
#endif
        pack_rows(dst + i * width, width, row, 0, 1, t->size[3], t->stride[3], dtype, skip);
    }
    return (fa_operand){(const char *)dst, width * 4};
}

/* C[key][.] += tile[key][row] B[row][.] */
FA_INLINE void add_over_rows(const bwd *w, const fa_lanes *l, const key_block *kb, const float *tile, fa_operand b,
                             float *c, int64_t width, bool pairs)
{
    fa_gemm g = {.m = kb->nk, .nv = (int)(width / VL), .k = l->n, .a = tile, .am = BM * 4, .ak = 4,
                 .b = b.p, .bk = b.bytes, .c = c, .cm = width};
#ifdef FA_ISA_AVX512BF16
    if (pairs) {
        pair_lanes(at(w, w->at.s_pairs), tile, kb->nk, l->nv);
        g.a = at(w, w->at.s_pairs);
        g.am = BM * 2;
        g.k = (l->n + 1) / 2;
    }
#endif
    (void)w;
    add_product(&g, NULL, pairs);
}

/* The rows of dQ of a panel: in the tensor, or in the fp32 copy [B * HQ * SQ][D]. Consecutive in both. */
FA_INLINE float *dq_rows(const bwd *w, const fa_lanes *l, int64_t *step)
{
    const fa_tensor *dq = &w->a->dq;
    if (w->common.dq_direct) {
        *step = dq->stride[2];
        return (float *)(void *)(uintptr_t)row_of(dq, w->b, l->head[0], l->query[0], 4);
    }
    *step = dq->size[3];
    return (float *)(void *)(w->shared + w->common.dq) +
           ((int64_t)l->bh[0] * w->a->q.size[2] + l->query[0]) * dq->size[3];
}

/* rows of dQ += tile[n][d_pad], where d elements are no whole number of vectors */
FA_INLINE void add_narrow_rows(float *dq, int64_t step, const float *tile, int64_t d_pad, int n, int64_t d)
{
    for (int i = 0; i < n; i++)
        for (int64_t c = 0; c < d; c += VL) {
            float *to = dq + i * step + c;
            v_store_n(to, part(c, d), v_add(v_load_n(to, part(c, d)), v_load(tile + i * d_pad + c)));
        }
}

/* nk: the keys of the block in grads */
FA_INLINE void add_dq(const bwd *w, const fa_lanes *l, key_block *kb, int nk, bool edge, fa_dtype dtype, bool pairs)
{
    const fa_args *a = w->a;
    int64_t d = a->q.size[3];
    uint8_t marks[BN];
    fa_rows keys = rows_at(&a->k, w->b, w->hk, kb->k0, dtype);
    if (!kb->k_n.p)
        kb->k_n = operand_b(at(w, w->at.k_n), keys, kb->nk, dtype, pairs, NULL);
    if ((edge || w->ops.mask || !l->all_valid) && kb->nonfinite < 0) {
        /* A hidden key must not be multiplied; for a row that sees the key, dS is NaN already. */
        kb->nonfinite = operand_nonfinite(marks, keys, kb->nk, dtype);
        if (kb->nonfinite)
            kb->k_n = operand_b(at(w, w->at.k_n), keys, kb->nk, dtype, pairs, marks);
    }
    int64_t step;
    float *dq = dq_rows(w, l, &step);
    fa_gemm g = {.m = l->n, .nv = (int)(w->d_pad / VL), .k = nk, .a = at(w, w->at.grads), .am = 4, .ak = BM * 4,
                 .b = kb->k_n.p, .bk = kb->k_n.bytes, .c = dq, .cm = step};
#ifdef FA_ISA_AVX512BF16
    if (pairs) {
        pair_keys(at(w, w->at.g_pairs), at(w, w->at.grads), nk, l->nv);
        g.a = at(w, w->at.g_pairs);
        g.k = (nk + 1) / 2;
    }
#endif
    if (d % VL == 0) {
        add_product(&g, NULL, pairs);
        return;
    }
    g.c = at(w, w->at.dq);
    g.cm = w->d_pad;
    product(&g, 1.0f, pairs);
    add_narrow_rows(dq, step, g.c, w->d_pad, l->n, d);
}

/* Blocks add to a panel of dQ in the order of the keys, beginning with the first block the panel sees. */
FA_INLINE _Atomic int32_t *turn_of(const bwd *w, int64_t panel)
{
    int64_t sequence = w->b * w->a->k.size[1] + w->hk;
    return (_Atomic int32_t *)(void *)(w->shared + w->common.turn) + sequence * w->panels.count + panel;
}

FA_INLINE void wait_for_turn(const _Atomic int32_t *turn, int32_t mine)
{
    while (atomic_load_explicit(turn, memory_order_acquire) != mine)
        _mm_pause();
}

FA_INLINE void panel_step(const bwd *w, int64_t panel, key_block *kb, fa_dtype dtype, bool pairs)
{
    const fa_args *a = w->a;
    fa_range q = fa_panel_queries(&w->panels, panel);
    q.hi = fa_min64(q.hi, w->span.q_len);
    fa_range keys = {0, 0};
    if (q.lo < q.hi)
        keys = fa_keys_of_queries(&w->span, q.lo, q.hi - 1);
    if (fa_max64(keys.lo, kb->k0) >= fa_min64(keys.hi, kb->k0 + kb->nk))
        return;
    fa_lanes *l = (fa_lanes *)(void *)(w->scratch + w->at.info);
    lanes_init(l, a, &w->panels, &w->span, w->b, w->hk, panel);
    panel_load(w, l, dtype, pairs);
    key_block visible = *kb; /* without the last keys, if no row of the panel sees them */
    visible.nk = (int)fa_min64(kb->nk, fa_round_up(keys.hi - kb->k0, pairs ? 2 : 1));
    bool edge = is_edge(w, l, &visible);
    bool seen = tile_grads(w, l, &visible, true, edge, pairs);
    if (seen && a->dk.data) {
        fa_operand q_n = panel_rows_b(w, at(w, w->at.q_n), l, &a->q, dtype, pairs);
        add_over_rows(w, l, &visible, at(w, w->at.grads), q_n, at(w, w->at.dk), w->d_pad, pairs);
    }
    if (seen && a->dv.data) {
        if (w->ops.dropout)
            apply_dropout(at(w, w->at.scores), l, a, visible.k0, visible.nk);
        fa_operand do_n = panel_rows_b(w, at(w, w->at.do_n), l, &a->dout, dtype, pairs);
        add_over_rows(w, l, &visible, at(w, w->at.scores), do_n, at(w, w->at.dv), w->dv_pad, pairs);
    }
    if (!a->dq.data)
        return;
    _Atomic int32_t *turn = turn_of(w, panel);
    int32_t mine = (int32_t)(kb->index - keys.lo / BN);
    wait_for_turn(turn, mine);
    if (seen)
        add_dq(w, l, kb, visible.nk, edge, dtype, pairs);
    atomic_store_explicit(turn, mine + 1, memory_order_release);
}

/* rows of dK or dV, times factor; keys past the length get 0 */
FA_INLINE void store_block(const bwd *w, const fa_tensor *t, const float *src, int64_t width, const key_block *kb,
                           float factor, fa_dtype dtype)
{
    int64_t rows = fa_min64(BN, t->size[2] - kb->k0);
    for (int64_t i = 0; i < rows; i++) {
        char *row = (char *)(uintptr_t)row_of(t, w->b, w->hk, kb->k0 + i, dtype == FA_F32 ? 4 : 2);
        for (int64_t d = 0; d < t->size[3]; d += VL) {
            vf x = i < kb->nk ? v_mul(v_load(src + i * width + d), v_set1(factor)) : v_zero();
            store_f32(row, d, part(d, t->size[3]), t->stride[3], dtype, x);
        }
    }
}

FA_INLINE void bwd_task(const fa_args *a, const fa_plan *plan, int64_t task, char *scratch, char *shared,
                        fa_dtype dtype, bool pairs)
{
    (void)plan;
    int64_t heads = a->k.size[1], sequences = a->q.size[0] * heads, sequence = task % sequences;
    bwd w = bwd_begin(a, scratch, shared, sequence / heads, sequence % heads, fa_panels_of(a, BM), pairs);
    w.grads = a->dq.data || a->dk.data;
    key_block kb = block_begin(&w, task / sequences, dtype, pairs);
    if (a->dk.data)
        memset(at(&w, w.at.dk), 0, (size_t)(BN * w.d_pad) * 4);
    if (a->dv.data)
        memset(at(&w, w.at.dv), 0, (size_t)(BN * w.dv_pad) * 4);
    if (kb.nk > 0)
        for (int64_t p = 0; p < w.panels.count; p++)
            panel_step(&w, p, &kb, dtype, pairs);
    if (a->dk.data)
        store_block(&w, &a->dk, at(&w, w.at.dk), w.d_pad, &kb, 1.0f, dtype);
    if (a->dv.data)
        store_block(&w, &a->dv, at(&w, w.at.dv), w.dv_pad, &kb, w.ops.dropout ? w.keep : 1.0f, dtype);
}

/* ---- rows: before and after -------------------------------------------------------------------------------------- */

FA_INLINE float dot_rows(const char *x, const fa_tensor *tx, const char *y, const fa_tensor *ty, fa_dtype dtype)
{
    int64_t n = tx->size[3];
    vf acc = v_zero();
    for (int64_t d = 0; d < n; d += VL)
        acc = v_fma(load_f32(x, d, part(d, n), tx->stride[3], dtype), load_f32(y, d, part(d, n), ty->stride[3], dtype),
                    acc);
    return v_hsum(acc);
}

FA_INLINE void bwd_pre_rows(const fa_args *a, char *shared, int64_t first, int64_t last, fa_dtype dtype)
{
    fa_target t = {.lanes = VL, .panel_rows = BM, .key_block = BN};
    fa_bwd_shared at = fa_bwd_shared_of(a, &t);
    float *lse2 = (float *)(void *)(shared + at.lse2), *delta = (float *)(void *)(shared + at.delta);
    size_t size = dtype == FA_F32 ? 4 : 2;
    int64_t hq = a->q.size[1], sq = a->q.size[2];
    for (int64_t row = first; row < last; row++) {
        int64_t q = row % sq, h = row / sq % hq, b = row / sq / hq;
        float lse = *(const float *)(const void *)row_of(&a->lse, b, h, q, 4);
        bool seen = q < fa_length_at(&a->q_seqlens, b, sq) && lse != -INFINITY;
        lse2[row] = INFINITY;
        delta[row] = 0;
        if (seen) {
            double x = lse * FA_LOG2E;
            lse2[row] = x < -FLT_MAX ? -FLT_MAX : (float)x; /* NaN stays */
            delta[row] = dot_rows(row_of(&a->dout, b, h, q, size), &a->dout, row_of(&a->out, b, h, q, size), &a->out,
                                  dtype);
            if (a->dlse.data)
                delta[row] -= *(const float *)(const void *)row_of(&a->dlse, b, h, q, 4);
        }
        if (a->dq.data && at.dq_direct)
            memset((void *)(uintptr_t)row_of(&a->dq, b, h, q, 4), 0, (size_t)a->q.size[3] * 4);
        else if (a->dq.data)
            memset((float *)(void *)(shared + at.dq) + row * a->q.size[3], 0, (size_t)a->q.size[3] * 4);
    }
}

FA_INLINE void bwd_post_rows(const fa_args *a, char *shared, int64_t first, int64_t last, fa_dtype dtype)
{
    fa_target t = {.lanes = VL, .panel_rows = BM, .key_block = BN};
    const float *dq = (const float *)(const void *)(shared + fa_bwd_shared_of(a, &t).dq);
    int64_t hq = a->q.size[1], sq = a->q.size[2], d = a->q.size[3];
    for (int64_t row = first; row < last; row++) {
        char *to = (char *)(uintptr_t)row_of(&a->dq, row / sq / hq, row / sq % hq, row % sq, dtype == FA_F32 ? 4 : 2);
        for (int64_t i = 0; i < d; i += VL)
            store_f32(to, i, part(i, d), a->dq.stride[3], dtype, v_load_n(dq + row * d + i, part(i, d)));
    }
}

#define BWD(name, dtype, pairs)                                                                                        \
    void FA_KERNEL(bwd, name)(const fa_args *a, const fa_plan *p, int64_t task, char *scratch, char *shared);          \
    void FA_KERNEL(bwd, name)(const fa_args *a, const fa_plan *p, int64_t task, char *scratch, char *shared)           \
    {                                                                                                                  \
        bwd_task(a, p, task, scratch, shared, dtype, pairs);                                                           \
    }                                                                                                                  \
    void FA_KERNEL(bwd_pre, name)(const fa_args *a, char *shared, int64_t first, int64_t last);                        \
    void FA_KERNEL(bwd_pre, name)(const fa_args *a, char *shared, int64_t first, int64_t last)                         \
    {                                                                                                                  \
        bwd_pre_rows(a, shared, first, last, dtype);                                                                   \
    }                                                                                                                  \
    void FA_KERNEL(bwd_post, name)(const fa_args *a, char *shared, int64_t first, int64_t last);                       \
    void FA_KERNEL(bwd_post, name)(const fa_args *a, char *shared, int64_t first, int64_t last)                        \
    {                                                                                                                  \
        bwd_post_rows(a, shared, first, last, dtype);                                                                  \
    }

BWD(f32, FA_F32, false)
BWD(bf16, FA_BF16, BF16_PAIRS)
BWD(f16, FA_F16, false)
