/* Forward for few query rows (decode): streams K and V once at the speed of memory. Compiled once for each instruction
 * set.
 *
 * One task is one (batch, kv head) and a part of its keys; its rows are the queries of all heads of the group, at most
 * FA_ROWS_MAX. Here the head dimension is in the lanes, as K and V lie in memory:
 *
 *   for each block of 64 keys
 *       S[row][key] = q . k                4 keys x up to 4 rows of accumulators, one reduction for four sums;
 *                                          meanwhile the next block of K is prefetched
 *       softcap, bias, ALiBi, visibility   keys in the lanes
 *       P = 2^(S - max); rescale, sum
 *       O[row][dv] = rescale * O + P V     up to 4 rows x 4 vectors of accumulators over the whole block;
 *                                          meanwhile the next block of V is prefetched
 */
#include "cpu_finish.h"
#include "cpu_ops.h"
#include "cpu_tile.h"

#define KB FA_ROWS_KEY_BLOCK
#define ROWS 4     /* rows of a tile */
#define COLS NV_MAX /* vectors of DV of a tile: ROWS * COLS accumulators */

typedef struct rows {
    const fa_args *a;
    fa_score_ops ops;
    fa_span span;
    int64_t b, hk, d, dv, d_pad, dv_pad;
    int n;                  /* rows */
    size_t size;            /* of an element */
    float *q;               /* [n][d_pad] */
    float *scores;          /* [n][KB], then the weights */
    float *out;             /* [n][dv_pad] */
    float *max, *sum;       /* [n] */
    int64_t head[FA_ROWS_MAX], query[FA_ROWS_MAX];
    fa_range keys[FA_ROWS_MAX]; /* what each row sees of this part; empty past the sequence's length */
    float slope[FA_ROWS_MAX];
} rows;

FA_INLINE void prefetch_row(const char *row, int64_t bytes)
{
    for (int64_t i = 0; i < bytes; i += 64)
        _mm_prefetch(row + i, _MM_HINT_T1); /* a block is as large as the first-level cache: not into that */
}

/* dots of nr rows of q with nk <= 4 keys */
FA_INLINE void dot_tile(const rows *w, const char *k, int64_t k_bytes, int nk, int row, int nr, float *s,
                        fa_dtype dtype)
{
    vf acc[ROWS][4];
    const char *key[4];
    FA_UNROLL
    for (int j = 0; j < 4; j++) {
        key[j] = k + (j < nk ? j : nk - 1) * k_bytes;
        FA_UNROLL
        for (int r = 0; r < nr; r++)
            acc[r][j] = v_zero();
    }
    const float *q = w->q + row * w->d_pad;
    for (int64_t d = 0; d < w->d; d += VL) {
        vf x[4];
        FA_UNROLL
        for (int j = 0; j < 4; j++)
            x[j] = load_f32(key[j], d, part(d, w->d), 1, dtype);
        FA_UNROLL
        for (int r = 0; r < nr; r++) {
            vf y = v_load(q + r * w->d_pad + d);
            FA_UNROLL
            for (int j = 0; j < 4; j++)
                acc[r][j] = v_fma(x[j], y, acc[r][j]);
        }
    }
    FA_UNROLL
    for (int r = 0; r < nr; r++)
        v_hsum4(s + r * KB, acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
}

FA_INLINE void dot_block(const rows *w, int64_t k0, int nk, fa_dtype dtype)
{
    const fa_tensor *t = &w->a->k;
    const char *k = row_of(t, w->b, w->hk, k0, w->size);
    int64_t k_bytes = row_step(t, w->size), row_bytes = w->d * (int64_t)w->size;
    for (int j = 0; j < nk; j += 4) {
        int n = nk - j < 4 ? nk - j : 4;
        for (int i = 0; i < n; i++)
            prefetch_row(k + (j + i + KB) * k_bytes, row_bytes);
        for (int r = 0; r < w->n; r += ROWS) {
            float *s = w->scores + r * KB + j;
            switch (w->n - r) {
            case 1: dot_tile(w, k + j * k_bytes, k_bytes, n, r, 1, s, dtype); break;
            case 2: dot_tile(w, k + j * k_bytes, k_bytes, n, r, 2, s, dtype); break;
            case 3: dot_tile(w, k + j * k_bytes, k_bytes, n, r, 3, s, dtype); break;
            default: dot_tile(w, k + j * k_bytes, k_bytes, n, r, 4, s, dtype); break;
            }
        }
    }
}

/* O of nr rows and nv vectors of columns over the whole block */
FA_INLINE void value_tile(const rows *w, const char *v, int64_t v_bytes, int nk, int row, int nr, int64_t col, int nv,
                          const float *rescale, fa_dtype dtype)
{
    vf acc[ROWS][COLS];
    float *out = w->out + row * w->dv_pad + col;
    const float *p = w->scores + row * KB;
    FA_UNROLL
    for (int r = 0; r < nr; r++) {
        FA_UNROLL
        for (int c = 0; c < nv; c++)
            acc[r][c] = v_zero(); /* a sum of its own: thousands of keys in one chain would lose digits */
    }
    for (int j = 0; j < nk; j++) {
        vf x[COLS];
        FA_UNROLL
        for (int c = 0; c < nv; c++)
            x[c] = load_f32(v, col + c * VL, part(col + c * VL, w->dv), 1, dtype);
        FA_UNROLL
        for (int r = 0; r < nr; r++) {
            vf y = v_set1(p[r * KB + j]);
            FA_UNROLL
            for (int c = 0; c < nv; c++)
                acc[r][c] = v_fma(x[c], y, acc[r][c]);
        }
        if (row == 0)
            prefetch_row(v + KB * v_bytes + col * (int64_t)w->size, nv * VL * (int64_t)w->size);
        v += v_bytes;
    }
    FA_UNROLL
    for (int r = 0; r < nr; r++) {
        FA_UNROLL
        for (int c = 0; c < nv; c++)
            v_store(out + r * w->dv_pad + c * VL,
                    v_fma(v_load(out + r * w->dv_pad + c * VL), v_set1(rescale[row + r]), acc[r][c]));
    }
}

FA_INLINE void value_strip(const rows *w, const char *v, int64_t v_bytes, int nk, int row, int nr, const float *rescale,
                           fa_dtype dtype)
{
    int64_t col = 0;
    for (; col + COLS * VL <= w->dv_pad; col += COLS * VL)
        value_tile(w, v, v_bytes, nk, row, nr, col, COLS, rescale, dtype);
    for (; col < w->dv_pad; col += VL)
        value_tile(w, v, v_bytes, nk, row, nr, col, 1, rescale, dtype);
}

/* A hidden key has weight 0 and must not be multiplied when its value is NaN or infinite. Rare, so plain. */
static __attribute__((noinline)) void values_one_by_one(const rows *w, int64_t k0, int nk, const float *rescale)
{
    const fa_tensor *t = &w->a->v;
    for (int r = 0; r < w->n; r++) {
        float *out = w->out + r * w->dv_pad, acc[FA_MAX_HEAD_DIM] = {0};
        for (int j = 0; j < nk; j++) {
            const char *row = row_of(t, w->b, w->hk, k0 + j, w->size);
            float p = w->scores[r * KB + j];
            for (int64_t d = 0; p != 0 && d < w->dv; d++)
                acc[d] = fmaf(p, (float)fa_load(row, t->dtype, d), acc[d]); /* the bits of value_tile */
        }
        for (int64_t d = 0; d < w->dv; d++)
            out[d] = fmaf(out[d], rescale[r], acc[d]);
    }
}

FA_INLINE void value_block(const rows *w, int64_t k0, int nk, bool hides, const float *rescale, fa_dtype dtype)
{
    const fa_tensor *t = &w->a->v;
    const char *v = row_of(t, w->b, w->hk, k0, w->size);
    int64_t v_bytes = row_step(t, w->size);
    uint8_t marks[KB];
    if (hides && find_nonfinite(marks, v, v_bytes, nk, w->dv, 1, dtype)) {
        values_one_by_one(w, k0, nk, rescale);
        return;
    }
    for (int r = 0; r < w->n; r += ROWS)
        switch (w->n - r) {
        case 1: value_strip(w, v, v_bytes, nk, r, 1, rescale, dtype); break;
        case 2: value_strip(w, v, v_bytes, nk, r, 2, rescale, dtype); break;
        case 3: value_strip(w, v, v_bytes, nk, r, 3, rescale, dtype); break;
        default: value_strip(w, v, v_bytes, nk, r, 4, rescale, dtype); break;
        }
}

/* Scores of one row, keys in the lanes, become weights. Returns whether some key of the block is hidden from it. */
FA_INLINE bool row_weights(const rows *w, int r, int64_t k0, int nk, float *rescale, int degree)
{
    const fa_args *a = w->a;
    float *s = w->scores + r * KB;
    vf hide = v_set1(-INFINITY), top = v_set1(w->max[r]), scale = v_set1(w->ops.scale);
    vm hidden = v_ne(scale, scale);
    vi lo = vi_set1((int32_t)fa_max64(w->keys[r].lo - k0, 0)), hi = vi_set1((int32_t)fa_min64(w->keys[r].hi - k0, nk));
    const char *mask = w->ops.mask ? mask_row(&a->mask, w->b, w->head[r], w->query[r]) : NULL;
    for (int j = 0; j < nk; j += VL) {
        vf x = v_mul(v_load(s + j), scale);
        vi at = vi_add(vi_iota(), vi_set1(j));
        if (w->ops.softcap)
            x = v_mul(v_tanh(x), v_set1((float)(a->softcap * FA_LOG2E)));
        if (mask) {
            vf bias = mask_values(&a->mask, mask, k0 + j, nk - j < VL ? nk - j : VL);
            vm none = v_eq(bias, hide);
            x = v_select(none, hide, v_add(x, bias));
            hidden = vm_or(hidden, none);
        }
        if (w->ops.alibi) {
            int32_t pos = (int32_t)(w->query[r] + w->span.offset - k0);
            x = v_fnma(v_set1(w->slope[r]), v_abs(vi_to_f(vi_sub(at, vi_set1(pos)))), x);
        }
        vm off = vm_or(vi_gt(lo, at), vi_gt(at, vi_sub(hi, vi_set1(1))));
        x = v_select(off, hide, x);
        top = v_max(x, top);
        v_store(s + j, x);
    }
    float m = v_hmax(top);
    rescale[r] = 0;
    if (m > -INFINITY)
        rescale[r] = exp2f(w->max[r] - m);
    w->max[r] = m;
    vf base = v_set1(m > -INFINITY ? m : 0), acc = v_zero();
    for (int j = 0; j < nk; j += VL) {
        vf p = v_exp2(v_sub(v_load(s + j), base), degree);
        acc = v_add(acc, p);
        v_store(s + j, p);
    }
    w->sum[r] = w->sum[r] * rescale[r] + v_hsum(acc);
    return vm_any(hidden) || w->keys[r].lo > k0 || w->keys[r].hi < k0 + nk;
}

FA_INLINE rows rows_begin(const fa_args *a, const fa_plan *plan, int64_t sequence, int64_t split, char *scratch,
                          fa_dtype dtype)
{
    fa_target target = {.lanes = VL, .key_block = KB};
    fa_rows_scratch at = fa_rows_scratch_of(a, &target);
    int64_t heads = a->k.size[1], group = a->q.size[1] / heads, sq = a->q.size[2];
    rows w = {.a = a, .ops = score_ops_of(a), .b = sequence / heads, .hk = sequence % heads,
              .d = a->q.size[3], .dv = a->v.size[3], .n = (int)(group * sq), .size = dtype == FA_F32 ? 4 : 2,
              .q = (float *)(void *)(scratch + at.q), .scores = (float *)(void *)(scratch + at.scores),
              .out = (float *)(void *)(scratch + at.out), .max = (float *)(void *)(scratch + at.max),
              .sum = (float *)(void *)(scratch + at.sum)};
    w.span = fa_span_at(a, w.b);
    w.d_pad = fa_padded(w.d, VL);
    w.dv_pad = fa_padded(w.dv, VL);
    memset(w.out, 0, (size_t)(w.n * w.dv_pad) * 4);
    for (int r = 0; r < w.n; r++) {
        w.head[r] = w.hk * group + r / sq;
        w.query[r] = r % sq;
        w.max[r] = -INFINITY;
        w.sum[r] = 0;
        w.keys[r] = (fa_range){0, 0};
        if (w.query[r] < w.span.q_len) {
            fa_range seen = fa_keys_of_queries(&w.span, w.query[r], w.query[r]);
            w.keys[r].lo = fa_max64(seen.lo, split * plan->split_keys);
            w.keys[r].hi = fa_min64(seen.hi, (split + 1) * plan->split_keys);
        }
        if (a->alibi.data) {
            int64_t i = (a->alibi.size[0] > 1 ? w.b : 0) * a->alibi.stride[0] + w.head[r] * a->alibi.stride[1];
            w.slope[r] = (float)(fa_load(a->alibi.data, a->alibi.dtype, i) * FA_LOG2E);
        }
        pack_rows(w.q + r * w.d_pad, w.d_pad, row_of(&a->q, w.b, w.head[r], w.query[r], w.size), 0, 1, w.d,
                  a->q.stride[3], dtype, NULL);
    }
    return w;
}

FA_INLINE void rows_end(const rows *w, float *partial, fa_dtype dtype)
{
    const fa_args *a = w->a;
    for (int r = 0; r < w->n; r++) {
        const float *o = w->out + r * w->dv_pad;
        int64_t h = w->head[r], q = w->query[r];
        if (partial) {
            float *to = partial + ((w->b * a->q.size[1] + h) * a->q.size[2] + q) * fa_partial_floats(w->dv);
            to[0] = w->max[r];
            to[1] = w->sum[r];
            memcpy(to + 2, o, (size_t)w->dv * 4);
            continue;
        }
        fa_row_end end = {0, -INFINITY};
        bool valid = q < w->span.q_len;
        if (valid)
            end = fa_finish_row(a, w->b, h, w->max[r], w->sum[r]);
        fa_store_lse(a, w->b, h, q, end.lse);
        char *row = (char *)(uintptr_t)row_of(&a->out, w->b, h, q, w->size);
        for (int64_t d = 0; d < w->dv; d += VL)
            store_f32(row, d, part(d, w->dv), a->out.stride[3], dtype, v_mul(v_load(o + d), v_set1(end.scale)));
    }
}

FA_INLINE void rows_task(const fa_args *a, const fa_plan *plan, int64_t task, char *scratch, char *shared,
                         fa_dtype dtype)
{
    int64_t split = task % plan->splits;
    rows w = rows_begin(a, plan, task / plan->splits, split, scratch, dtype);
    fa_range keys = {INT64_MAX, 0};
    for (int r = 0; r < w.n; r++)
        if (w.keys[r].lo < w.keys[r].hi) {
            keys.lo = fa_min64(keys.lo, w.keys[r].lo);
            keys.hi = fa_max64(keys.hi, w.keys[r].hi);
        }
    for (int64_t k0 = keys.lo; k0 < keys.hi; k0 += KB) {
        int nk = (int)fa_min64(KB, keys.hi - k0);
        float rescale[FA_ROWS_MAX];
        bool hides = false;
        dot_block(&w, k0, nk, dtype);
        for (int r = 0; r < w.n; r++)
            hides |= row_weights(&w, r, k0, nk, rescale, dtype == FA_BF16 ? 3 : 5);
        value_block(&w, k0, nk, hides, rescale, dtype);
    }
    int64_t all = a->q.size[0] * a->q.size[1] * a->q.size[2];
    rows_end(&w, plan->splits > 1 ? (float *)(void *)shared + split * all * fa_partial_floats(w.dv) : NULL, dtype);
}

#define DECODE(name, dtype)                                                                                            \
    void FA_KERNEL(decode, name)(const fa_args *a, const fa_plan *p, int64_t task, char *scratch, char *shared);       \
    void FA_KERNEL(decode, name)(const fa_args *a, const fa_plan *p, int64_t task, char *scratch, char *shared)        \
    {                                                                                                                  \
        rows_task(a, p, task, scratch, shared, dtype);                                                                 \
    }

DECODE(f32, FA_F32)
DECODE(bf16, FA_BF16)
DECODE(f16, FA_F16)
