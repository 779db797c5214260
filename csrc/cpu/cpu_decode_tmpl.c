/* Forward for few query rows (decode): streams K and V once at the speed of memory. Compiled once for each instruction
 * set.
 *
 * One task is some kv heads of a sequence and a part of its keys; the rows of a head are the queries of all heads of its
 * group, at most FA_ROWS_MAX. Here the head dimension is in the lanes, as K and V lie in memory, each row behind a
 * pointer of its own, so that pages of any size cost nothing. Where the heads of a token lie side by side, a task takes
 * them all in turn, so that memory is read in its own order; where each head has its keys in one piece, one head:
 *
 *   for each block of keys, for each kv head
 *       S[row][key] = q . k                tiles of rows x keys of accumulators, their lanes summed a group of keys at
 *                                          a time; meanwhile the next block of K is prefetched
 *       scale of the key, softcap, bias, ALiBi, visibility                                       keys in the lanes
 *       P = 2^(S - max); rescale, sum; scale of the value
 *       O[row][dv] = rescale * O + P V     tiles of rows x vectors of accumulators over the whole block;
 *                                          meanwhile the next block of V is prefetched
 *
 * K and V of any dtype are widened to fp32 in registers, which is exact. The order of the sums of a row depends neither
 * on the tile nor on the other rows.
 */
#include "../common/fa_sequence.h"
#include "cpu_finish.h"
#include "cpu_ops.h"
#include "cpu_tile.h"

#define KB FA_ROWS_KEY_BLOCK
#define ROWS 4       /* most rows of a tile */
#define GROUP VL     /* keys that all rows take before the next ones */
#define COLS 8       /* most vectors of columns of a tile */
#define FETCH_KEYS 2 /* keys of a tile of values between two steps of fetch */
#define FAR_BYTES (128 << 10) /* of K and V fetched as one block of all heads: a quarter of a second-level cache */

/* Keys of a tile of scores and vectors of a tile of outputs, by its rows: as many sums as registers can hold. */
#ifdef FA_ISA_AVX512
#define TILE_KEYS(rows) ((rows) == 1 ? 8 : 4)
#define TILE_COLS(rows) ((rows) <= 2 ? 8 : 4)
#else
#define TILE_KEYS(rows) ((rows) == 4 ? 2 : 4)
#define TILE_COLS(rows) ((rows) == 1 ? 8 : (rows) == 4 ? 2 : 4)
#endif

typedef struct rows {
    const fa_args *a;
    fa_score_ops ops;
    fa_span span;
    int64_t b, hk, d, dv, d_pad, dv_pad;
    int n;                  /* rows */
    int block;              /* keys of a block, at most KB */
    bool plain;             /* scores need their scale only */
    float *q;               /* [n][d_pad], in the order of place_of, as out */
    float *scores;          /* [n][KB], then the weights */
    float *out;             /* [n][dv_pad] */
    float *max, *sum;       /* [n] */
    int64_t head[FA_ROWS_MAX], query[FA_ROWS_MAX];
    fa_range keys[FA_ROWS_MAX]; /* what each row sees of this part; empty past the sequence's length */
    float slope[FA_ROWS_MAX];
} rows;

_Static_assert(sizeof(rows) <= FA_ROWS_BYTES, "the planner reserves FA_ROWS_BYTES for a head's rows");

/* ---- keys and values -------------------------------------------------------------------------------------------- */

/* Where up to KB keys in a row lie: offsets of the rows of kv head 0 from the start of k and v, in bytes, and of their
 * scales, in elements. */
typedef struct key_places {
    int64_t first;
    int n;
    int64_t k[KB], v[KB], k_scale[KB], v_scale[KB];
} key_places;

/* The rows of one kv head. Pointers past n repeat the last, up to a whole GROUP. */
typedef struct key_block {
    int64_t first;
    int n;
    const char *k[KB], *v[KB];
    float k_scale[KB], v_scale[KB]; /* of quantised keys */
} key_block;

FA_INLINE int64_t size_of(fa_dtype t)
{
    return fa_is_quantised(t) ? 1 : t == FA_F32 ? 4 : 2;
}

/* what a widened element must be multiplied by, besides its scale */
static inline float unit_of(fa_dtype t)
{
    return t == FA_F8E4M3 ? 256 : 1;
}

/* vectors that one step along a row gives: bf16 comes as even and odd elements, fp8 as lower and upper ones */
FA_INLINE int vectors_of(fa_dtype t)
{
    return t == FA_BF16 || t == FA_F8E4M3 ? 2 : 1;
}

/* where q and out keep element d of a row */
FA_INLINE int64_t place_of(int64_t d, fa_dtype t)
{
    int64_t at = d % (2 * VL);
    return t == FA_BF16 ? d - at + at % 2 * VL + at / 2 : d;
}

/* n elements of a row from d on, 0 past them: vectors_of(t) vectors */
FA_INLINE void load_step(vf x[2], const char *row, int64_t d, int n, fa_dtype t)
{
    const uint16_t *h = (const uint16_t *)(const void *)row + d;
    switch (t) {
    case FA_BF16: n >= 2 * VL ? v_load2_bf16(h, &x[0], &x[1]) : v_load2_bf16_n(h, n, &x[0], &x[1]); break;
    case FA_I8: x[0] = n >= VL ? v_load_i8(row + d) : v_load_i8_n(row + d, n); break;
    case FA_F8E4M3:
        n >= 2 * VL ? v_load2_f8(row + d, &x[0], &x[1]) : v_load2_f8_n(row + d, n, &x[0], &x[1]);
        break;
    default: x[0] = load_f32(row, d, n, 1, t); break;
    }
}

/* elements left for the step that starts at d */
FA_INLINE int step_part(int64_t d, int64_t n, fa_dtype t)
{
    int64_t step = vectors_of(t) * VL;
    return (int)(n - d < step ? n - d : step);
}

/* Keys of a block where memory sets the pace: about 4096 bytes of K, then as many of V. In turns this short the
 * prefetched blocks and the current ones fit the first-level cache together, and memory delivers two streams faster
 * than one. */
static inline int block_keys(int64_t row_bytes)
{
    int n = KB;
    while (n > GROUP && n * row_bytes > 4096)
        n /= 2;
    return n;
}

/* The keys first .., at most a block of them and none past `end`. */
static void find_places(key_places *to, const rows *w, int64_t first, int64_t end)
{
    const fa_args *a = w->a;
    const int64_t size = size_of(a->k.dtype), k_step = row_step(&a->k, (size_t)size),
                  v_step = row_step(&a->v, (size_t)size);
    to->first = first;
    to->n = (int)fa_max64(0, fa_min64(w->block, end - first));
    const int64_t page_size = a->page_size ? a->page_size : INT64_MAX;
    int64_t inside = first % page_size;
    for (int i = 0; i < to->n; inside = 0) {
        int64_t k = fa_key_row(a, &a->k, w->b, 0, first + i), v = fa_key_row(a, &a->v, w->b, 0, first + i);
        int last = (int)fa_min64(to->n, i + page_size - inside);
        for (; i < last; i++, k += k_step, v += v_step) {
            to->k[i] = k;
            to->v[i] = v;
        }
    }
    if (a->k_scale.data && a->scale_per_token)
        for (int i = 0; i < to->n; i++) {
            to->k_scale[i] = fa_key_scale_at(a, &a->k_scale, 0, first + i) - (const float *)a->k_scale.data;
            to->v_scale[i] = fa_key_scale_at(a, &a->v_scale, 0, first + i) - (const float *)a->v_scale.data;
        }
}

/* One head's rows of these keys. */
static void point_at(key_block *to, const rows *w, const key_places *at)
{
    const fa_args *a = w->a;
    const int64_t size = size_of(a->k.dtype);
    const char *k = (const char *)a->k.data + w->hk * a->k.stride[1] * size;
    const char *v = (const char *)a->v.data + w->hk * a->v.stride[1] * size;
    to->first = at->first;
    to->n = at->n;
    for (int i = 0; i < at->n; i++) {
        to->k[i] = k + at->k[i];
        to->v[i] = v + at->v[i];
    }
    for (int i = at->n; i % GROUP; i++) {
        to->k[i] = to->k[at->n - 1];
        to->v[i] = to->v[at->n - 1];
    }
}

/* The head's scales of these keys. */
static void scales_of(key_block *to, const rows *w, const key_places *at, fa_dtype dtype)
{
    const fa_tensor *k = &w->a->k_scale, *v = &w->a->v_scale;
    const bool each = w->a->scale_per_token;
    const float *ks = (const float *)k->data + (k->size[1] > 1 ? w->hk * k->stride[1] : 0);
    const float *vs = (const float *)v->data + (v->size[1] > 1 ? w->hk * v->stride[1] : 0);
    for (int i = 0; i < at->n; i++) {
        to->k_scale[i] = unit_of(dtype) * ks[each ? at->k_scale[i] : 0];
        to->v_scale[i] = unit_of(dtype) * vs[each ? at->v_scale[i] : 0];
    }
}

/* ---- fetching ahead ---------------------------------------------------------------------------------------------- */

/* Rows at base + at[key] + inside, where inside grows by step up to span, and then the next key begins. */
typedef struct row_walk {
    const char *base;
    const int64_t *at;
    int64_t inside, step, span;
} row_walk;

/* What is fetched while a block of one head is worked on. */
typedef struct key_walk {
    int n; /* rows of each */
    row_walk k, v;
} key_walk;

/* Head hk's rows of these keys. */
static row_walk walk_of_head(const fa_tensor *t, int64_t hk, const int64_t *at)
{
    const int64_t step = t->stride[1] * size_of(t->dtype);
    return (row_walk){.base = (const char *)t->data + hk * step, .at = at, .step = 1, .span = 1}; /* one row a key */
}

/* Of the rows of `heads` heads from hk on, all heads of a key in a row, as they lie in memory: from row `first` on. */
static row_walk walk_of_heads(const fa_tensor *t, int64_t hk, int heads, const int64_t *at, int first)
{
    const int64_t step = t->stride[1] * size_of(t->dtype);
    return (row_walk){.base = (const char *)t->data + hk * step, .at = at + first / heads,
                      .inside = first % heads * step, .step = step, .span = heads * step};
}

/* The rows, fetched evenly over the work, as a core has room for about 20 misses. */
typedef struct ahead {
    row_walk walk;
    int rows, steps; /* rows are due over this many steps */
    int due;         /* in rows * steps */
    int64_t bytes;   /* of a row */
} ahead;

FA_INLINE void fetch(ahead *f)
{
    for (f->due += f->rows; f->due >= f->steps; f->due -= f->steps) {
        row_walk *w = &f->walk;
        const char *row = w->base + *w->at + w->inside;
        for (int64_t i = 0; i < f->bytes; i += 64)
            _mm_prefetch(row + i, _MM_HINT_T0);
        w->inside += w->step;
        if (w->inside == w->span) {
            w->inside = 0;
            w->at++;
        }
    }
}

/* ---- scores ------------------------------------------------------------------------------------------------------ */

/* acc += the products of one step */
FA_INLINE void dot_step(vf acc[ROWS][GROUP], const rows *w, const char *const *k, const float *q, int nr, int64_t d,
                        int n, fa_dtype dtype)
{
    const int nk = TILE_KEYS(nr);
    vf x[GROUP][2];
    FA_UNROLL
    for (int j = 0; j < nk; j++)
        load_step(x[j], k[j], d, n, dtype);
    FA_UNROLL
    for (int p = 0; p < vectors_of(dtype); p++) {
        FA_UNROLL
        for (int r = 0; r < nr; r++) {
            vf y = v_keep(v_load(q + r * w->d_pad + d + p * VL));
            FA_UNROLL
            for (int j = 0; j < nk; j++)
                acc[r][j] = v_fma(x[j][p], y, acc[r][j]);
        }
    }
}

/* Dots of nr rows of q with TILE_KEYS(nr) keys, as vectors whose lanes are still to be summed: sums[row][GROUP][VL] */
FA_INLINE void dot_tile(const rows *w, const char *const *k, int row, int nr, float *sums, fa_dtype dtype)
{
    const int nk = TILE_KEYS(nr), step = vectors_of(dtype) * VL;
    vf acc[ROWS][GROUP];
    FA_UNROLL
    for (int r = 0; r < nr; r++) {
        FA_UNROLL
        for (int j = 0; j < nk; j++)
            acc[r][j] = v_zero();
    }
    const float *q = w->q + row * w->d_pad;
    int64_t d = 0;
    for (; d + step <= w->d; d += step)
        dot_step(acc, w, k, q, nr, d, step, dtype);
    if (d < w->d)
        dot_step(acc, w, k, q, nr, d, (int)(w->d - d), dtype);
    FA_UNROLL
    for (int r = 0; r < nr; r++) {
        FA_UNROLL
        for (int j = 0; j < nk; j++)
            v_store(sums + (r * GROUP + j) * VL, acc[r][j]);
    }
}

/* Scores of nr rows and a GROUP of keys. The lanes are summed for a whole group: of a single tile they would be summed
 * while the multipliers wait. */
FA_INLINE void dot_strip(const rows *w, const char *const *k, int row, int nr, float *s, ahead *f, fa_dtype dtype)
{
    float sums[ROWS * GROUP * VL];
    for (int j = 0; j < GROUP; j += TILE_KEYS(nr)) {
        fetch(f);
        dot_tile(w, k + j, row, nr, sums + j * VL, dtype);
    }
    for (int r = 0; r < nr; r++)
        v_store(s + r * KB, v_hsums(sums + r * GROUP * VL));
}

/* tiles of a group of keys */
static inline int dot_tiles(int rows)
{
    int rest = rows % ROWS;
    return rows / ROWS * (GROUP / TILE_KEYS(ROWS)) + (rest ? GROUP / TILE_KEYS(rest) : 0);
}

FA_INLINE void dot_block(const rows *w, const key_block *now, const key_walk *next, fa_dtype dtype)
{
    ahead f = {.walk = next->k, .rows = next->n, .bytes = w->d * size_of(dtype),
               .steps = (now->n + GROUP - 1) / GROUP * dot_tiles(w->n)};
    for (int j = 0; j < now->n; j += GROUP)
        for (int r = 0; r < w->n; r += ROWS) {
            float *s = w->scores + r * KB + j;
            switch (w->n - r) {
            case 1: dot_strip(w, now->k + j, r, 1, s, &f, dtype); break;
            case 2: dot_strip(w, now->k + j, r, 2, s, &f, dtype); break;
            case 3: dot_strip(w, now->k + j, r, 3, s, &f, dtype); break;
            default: dot_strip(w, now->k + j, r, 4, s, &f, dtype); break;
            }
        }
}

/* ---- values ------------------------------------------------------------------------------------------------------ */

/* acc += the weights p[row][KB] of one key times its values */
FA_INLINE void value_step(vf acc[ROWS][COLS], const float *p, int nr, const char *v, int64_t dv, int64_t col, int nv,
                          bool whole, fa_dtype dtype)
{
    const int vectors = vectors_of(dtype);
    vf x[COLS];
    FA_UNROLL
    for (int c = 0; c < nv; c += vectors) {
        int64_t at = col + c * VL;
        load_step(x + c, v, at, whole ? vectors * VL : step_part(at, dv, dtype), dtype);
    }
    FA_UNROLL
    for (int r = 0; r < nr; r++) {
        vf y = v_keep(v_set1(p[r * KB]));
        FA_UNROLL
        for (int c = 0; c < nv; c++)
            acc[r][c] = v_fma(x[c], y, acc[r][c]);
    }
}

/* O of nr rows and nv vectors of columns over the whole block; whole: none of the columns lies past DV */
FA_INLINE void value_tile(const rows *w, const key_block *now, int row, int nr, int64_t col, int nv, bool whole,
                          const float *rescale, ahead *f, fa_dtype dtype)
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
    int j = 0;
    for (; j + FETCH_KEYS <= now->n; j += FETCH_KEYS) {
        fetch(f);
        FA_UNROLL
        for (int i = 0; i < FETCH_KEYS; i++)
            value_step(acc, p + j + i, nr, now->v[j + i], w->dv, col, nv, whole, dtype);
    }
    for (; j < now->n; j++)
        value_step(acc, p + j, nr, now->v[j], w->dv, col, nv, whole, dtype);
    FA_UNROLL
    for (int r = 0; r < nr; r++) {
        FA_UNROLL
        for (int c = 0; c < nv; c++)
            v_store(out + r * w->dv_pad + c * VL,
                    v_fma(v_load(out + r * w->dv_pad + c * VL), v_set1(rescale[row + r]), acc[r][c]));
    }
}

/* tiles of nr rows */
static inline int value_tiles(const rows *w, int nr, fa_dtype dtype)
{
    int64_t wide = w->dv / (TILE_COLS(nr) * VL), rest = w->dv - wide * TILE_COLS(nr) * VL;
    return (int)(wide + fa_ceil_div(rest, vectors_of(dtype) * VL));
}

FA_INLINE void value_strip(const rows *w, const key_block *now, int row, int nr, const float *rescale, ahead *f,
                           fa_dtype dtype)
{
    const int nv = TILE_COLS(nr), least = vectors_of(dtype);
    int64_t col = 0;
    for (; col + nv * VL <= w->dv; col += nv * VL)
        value_tile(w, now, row, nr, col, nv, true, rescale, f, dtype);
    for (; col < w->dv; col += least * VL)
        value_tile(w, now, row, nr, col, least, false, rescale, f, dtype);
}

/* A hidden key has weight 0 and must not be multiplied when its value is NaN or infinite. Rare, so plain. */
static __attribute__((noinline)) void values_one_by_one(const rows *w, const key_block *now, const float *rescale,
                                                        fa_dtype dtype)
{
    for (int r = 0; r < w->n; r++) {
        float *out = w->out + r * w->dv_pad, acc[FA_MAX_HEAD_DIM] = {0};
        for (int j = 0; j < now->n; j++) {
            float p = w->scores[r * KB + j] / unit_of(dtype);
            for (int64_t d = 0; p != 0 && d < w->dv; d++)
                acc[d] = fmaf(p, (float)fa_load(now->v[j], dtype, d), acc[d]); /* the bits of value_tile */
        }
        for (int64_t d = 0; d < w->dv; d++) {
            float *o = out + place_of(d, dtype);
            *o = fmaf(*o, rescale[r], acc[d]);
        }
    }
}

/* Is there NaN or infinity among the values? x * 0 is NaN exactly for them. */
FA_INLINE bool nonfinite_values(const rows *w, const key_block *now, fa_dtype dtype)
{
    vf acc = v_zero();
    for (int j = 0; j < now->n; j++)
        for (int64_t d = 0; d < w->dv; d += vectors_of(dtype) * VL) {
            vf x[2];
            load_step(x, now->v[j], d, step_part(d, w->dv, dtype), dtype);
            for (int p = 0; p < vectors_of(dtype); p++)
                acc = v_fma(x[p], v_zero(), acc);
        }
    return vm_any(v_ne(acc, acc));
}

FA_INLINE void value_block(const rows *w, const key_block *now, const key_walk *next, bool hides,
                           const float *rescale, fa_dtype dtype)
{
    if (hides && dtype != FA_I8 && nonfinite_values(w, now, dtype)) {
        values_one_by_one(w, now, rescale, dtype);
        return;
    }
    int tiles = 0;
    for (int r = 0; r < w->n; r += ROWS)
        tiles += value_tiles(w, w->n - r < ROWS ? w->n - r : ROWS, dtype);
    ahead f = {.walk = next->v, .rows = next->n, .bytes = w->dv * size_of(dtype),
               .steps = tiles * (now->n / FETCH_KEYS)};
    for (int r = 0; r < w->n; r += ROWS)
        switch (w->n - r) {
        case 1: value_strip(w, now, r, 1, rescale, &f, dtype); break;
        case 2: value_strip(w, now, r, 2, rescale, &f, dtype); break;
        case 3: value_strip(w, now, r, 3, rescale, &f, dtype); break;
        default: value_strip(w, now, r, 4, rescale, &f, dtype); break;
        }
}

/* ---- from scores to weights -------------------------------------------------------------------------------------- */

/* Scale, softcap, bias, ALiBi and visibility of the scores of one row, keys in the lanes; top becomes the largest.
 * Returns whether some key of the block is hidden from the row. */
FA_INLINE bool finish_scores(const rows *w, int r, const key_block *now, vf *top, fa_dtype dtype)
{
    const fa_args *a = w->a;
    const int64_t k0 = now->first;
    const int nk = now->n;
    float *s = w->scores + r * KB;
    vf hide = v_set1(-INFINITY), scale = v_set1(w->ops.scale);
    vm hidden = v_ne(scale, scale);
    vi lo = vi_set1((int32_t)fa_max64(w->keys[r].lo - k0, 0)), hi = vi_set1((int32_t)fa_min64(w->keys[r].hi - k0, nk));
    const char *mask = w->ops.mask ? mask_row(&a->mask, w->b, w->head[r], w->query[r]) : NULL;
    for (int j = 0; j < nk; j += VL) {
        vf x = v_mul(v_load(s + j), scale);
        if (fa_is_quantised(dtype))
            x = v_mul(x, v_load(now->k_scale + j));
        vi at = vi_add(vi_iota(), vi_set1(j));
        if (w->ops.softcap)
            x = v_mul(v_tanh(x), v_set1((float)(a->softcap * FA_LOG2E)));
        if (mask) {
            vf bias = mask_values_from(&a->mask, mask, k0 + j, nk - j < VL ? nk - j : VL, a->mask_first);
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
        *top = v_max(x, *top);
        v_store(s + j, x);
    }
    return vm_any(hidden) || w->keys[r].lo > k0 || w->keys[r].hi < k0 + nk;
}

/* The same of whole vectors of keys that the row sees, where the scale is all there is: most blocks of most calls. */
FA_INLINE void scale_scores(const rows *w, int r, const key_block *now, vf *top, fa_dtype dtype)
{
    float *s = w->scores + r * KB;
    for (int j = 0; j < now->n; j += VL) {
        vf x = v_mul(v_load(s + j), v_set1(w->ops.scale));
        if (fa_is_quantised(dtype))
            x = v_mul(x, v_load(now->k_scale + j));
        *top = v_max(x, *top);
        v_store(s + j, x);
    }
}

/* Scores of one row become weights. Returns whether some key of the block is hidden from it. */
FA_INLINE bool row_weights(const rows *w, int r, const key_block *now, float *rescale, fa_dtype dtype)
{
    const int degree = dtype == FA_BF16 ? 3 : 5;
    float *s = w->scores + r * KB;
    vf top = v_set1(w->max[r]);
    bool hides = false;
    if (!w->plain || now->n % VL || w->keys[r].lo > now->first || w->keys[r].hi < now->first + now->n)
        hides = finish_scores(w, r, now, &top, dtype);
    else
        scale_scores(w, r, now, &top, dtype);
    float m = v_hmax(top);
    rescale[r] = m == w->max[r] ? 1 : m > -INFINITY ? exp2f(w->max[r] - m) : 0;
    w->max[r] = m;
    vf base = v_set1(m > -INFINITY ? m : 0), acc = v_zero();
    for (int j = 0; j < now->n; j += VL) {
        vf p = v_exp2(v_sub(v_load(s + j), base), degree);
        acc = v_add(acc, p);
        if (fa_is_quantised(dtype)) /* what a hidden key is scaled by may be anything */
            p = v_select(v_eq(p, v_zero()), p, v_mul(p, v_load(now->v_scale + j)));
        v_store(s + j, p);
    }
    w->sum[r] = w->sum[r] * rescale[r] + v_hsum(acc);
    return hides;
}

/* to[d_pad] <- the query of row r */
FA_INLINE void pack_query(float *to, const rows *w, int r, fa_dtype dtype)
{
    const fa_tensor *q = &w->a->q;
    const char *row = row_of(q, w->b, w->head[r], w->query[r], fa_dtype_size(q->dtype));
    if (dtype == FA_BF16 && q->dtype == FA_BF16 && q->stride[3] == 1) {
        for (int64_t d = 0; d < w->d_pad; d += 2 * VL) {
            vf x[2];
            load_step(x, row, d, step_part(d, w->d, dtype), dtype);
            v_store(to + d, x[0]);
            v_store(to + d + VL, x[1]);
        }
        return;
    }
    float x[FA_MAX_HEAD_DIM];
    pack_rows(dtype == FA_BF16 ? x : to, w->d_pad, row, 0, 1, w->d, q->stride[3], q->dtype, NULL);
    for (int64_t d = 0; dtype == FA_BF16 && d < w->d_pad; d++)
        to[place_of(d, dtype)] = x[d];
}

/* Head hk of sequence b, the slot-th of the task. */
FA_INLINE void rows_begin(rows *to, const fa_args *a, const fa_plan *plan, int64_t b, int64_t hk, int64_t split,
                          const fa_rows_scratch *at, char *scratch, int64_t slot, fa_dtype dtype)
{
    int64_t group = fa_group(a), sq = a->q.size[2], n = group * sq;
    rows w = {.a = a, .ops = score_ops_of(a), .b = b, .hk = hk, .d = a->q.size[3], .dv = a->v.size[3], .n = (int)n};
    w.span = fa_span_at(a, w.b);
    w.block = w.n <= ROWS ? block_keys(w.d * size_of(dtype)) : KB;
    w.plain = !w.ops.softcap && !w.ops.mask && !w.ops.alibi;
    w.d_pad = fa_padded(w.d, 2 * VL);
    w.dv_pad = fa_padded(w.dv, 2 * VL);
    w.scores = (float *)(void *)(scratch + at->scores);
    w.q = (float *)(void *)(scratch + at->q) + slot * n * w.d_pad;
    w.out = (float *)(void *)(scratch + at->out) + slot * n * w.dv_pad;
    w.max = (float *)(void *)(scratch + at->max) + slot * n;
    w.sum = (float *)(void *)(scratch + at->sum) + slot * n;
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
        pack_query(w.q + r * w.d_pad, &w, r, dtype);
    }
    *to = w;
}

/* n elements of rows of out to a row of any dtype and stride, in their own order */
FA_INLINE void store_row(char *to, int64_t stride, fa_dtype t, const float *o, int64_t n, float scale, fa_dtype dtype)
{
    for (int64_t d = 0; d < n; d += 2 * VL) {
        vf x[2] = {v_load(o + d), v_load(o + d + VL)};
        if (dtype == FA_BF16)
            v_zip(x[0], x[1], x);
        for (int p = 0; p < 2 && d + p * VL < n; p++)
            store_f32(to, d + p * VL, part(d + p * VL, n), stride, t, v_mul(x[p], v_set1(scale)));
    }
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
            store_row((char *)(to + 2), 1, FA_F32, o, w->dv, 1, dtype);
            continue;
        }
        fa_row_end end = {0, -INFINITY};
        if (q < w->span.q_len)
            end = fa_finish_row(a, w->b, h, w->max[r], w->sum[r]);
        fa_store_lse(a, w->b, h, q, end.lse);
        char *to = (char *)(uintptr_t)row_of(&a->out, w->b, h, q, fa_dtype_size(a->out.dtype));
        store_row(to, a->out.stride[3], a->out.dtype, o, w->dv, end.scale, dtype);
    }
}

/* The two products of a block are functions of their own: with all in one, the loops get fewer registers. */
typedef void dot_fn(const rows *w, const key_block *now, const key_walk *next);
typedef void value_fn(const rows *w, const key_block *now, const key_walk *next, bool hides, const float *rescale);

/* Can the next block of all heads be fetched in the order of memory while this one is worked on? It must fit. */
static inline bool walks_heads(const rows *w, int heads)
{
    return heads > 1 && w->a->k.stride[1] != 0 && w->a->v.stride[1] != 0 &&
           w->block * heads * (w->d + w->dv) * size_of(w->a->k.dtype) <= FAR_BYTES;
}

/* What head h of the task's heads has to fetch: its share of the next block of all heads, or the rows that come next. */
static key_walk walk_ahead(const rows *w, int h, int heads, bool in_order, const key_places *here,
                           const key_places *there)
{
    const fa_args *a = w->a;
    if (in_order)
        return (key_walk){there->n, walk_of_heads(&a->k, w->hk, heads, there->k, h * there->n),
                          walk_of_heads(&a->v, w->hk, heads, there->v, h * there->n)};
    const key_places *next = h + 1 < heads ? here : there;
    const int64_t hk = w->hk + (h + 1) % heads;
    return (key_walk){next->n, walk_of_head(&a->k, hk, next->k), walk_of_head(&a->v, hk, next->v)};
}

/* One head's turn with one block. */
FA_INLINE void head_step(const rows *w, const key_block *now, const key_walk *next, fa_dtype dtype, dot_fn *dots,
                         value_fn *values)
{
    float rescale[FA_ROWS_MAX];
    bool hides = false;
    dots(w, now, next);
    for (int r = 0; r < w->n; r++)
        hides |= row_weights(w, r, now, rescale, dtype);
    values(w, now, next, hides, rescale);
}

FA_INLINE void rows_task(const fa_args *a, const fa_plan *plan, int64_t task, char *scratch, char *shared,
                         fa_dtype dtype, dot_fn *dots, value_fn *values)
{
    const fa_target target = {.lanes = VL, .key_block = KB};
    const fa_rows_scratch at = fa_rows_scratch_of(a, &target, plan->chunk_panels);
    const int64_t chunks = fa_ceil_div(a->k.size[1], plan->chunk_panels), split = task % plan->splits;
    const int64_t hk = task / plan->splits % chunks * plan->chunk_panels, b = task / plan->splits / chunks;
    const int heads = (int)fa_min64(plan->chunk_panels, a->k.size[1] - hk);
    rows *w = (rows *)(void *)(scratch + at.info);
    for (int h = 0; h < heads; h++)
        rows_begin(&w[h], a, plan, b, hk + h, split, &at, scratch, h, dtype);
    fa_range keys = {INT64_MAX, 0}; /* the same for every head */
    for (int r = 0; r < w->n; r++)
        if (w->keys[r].lo < w->keys[r].hi) {
            keys.lo = fa_min64(keys.lo, w->keys[r].lo);
            keys.hi = fa_max64(keys.hi, w->keys[r].hi);
        }
    key_places places[2];
    key_block now;
    const bool in_order = walks_heads(w, heads);
    find_places(&places[0], w, keys.lo, keys.hi);
    for (int64_t i = 0; keys.lo + i * w->block < keys.hi; i++) {
        const key_places *here = &places[i % 2], *there = &places[(i + 1) % 2];
        find_places(&places[(i + 1) % 2], w, here->first + w->block, keys.hi);
        for (int h = 0; h < heads; h++) {
            const key_walk next = walk_ahead(w, h, heads, in_order, here, there);
            point_at(&now, &w[h], here);
            if (fa_is_quantised(dtype))
                scales_of(&now, &w[h], here, dtype);
            head_step(&w[h], &now, &next, dtype, dots, values);
        }
    }
    int64_t all = a->q.size[0] * a->q.size[1] * a->q.size[2];
    float *partial = plan->splits > 1 ? (float *)(void *)shared + split * all * fa_partial_floats(w->dv) : NULL;
    for (int h = 0; h < heads; h++)
        rows_end(&w[h], partial, dtype);
}

#define DECODE(name, dtype)                                                                                            \
    static __attribute__((noinline)) void dots_##name(const rows *w, const key_block *now, const key_walk *next)       \
    {                                                                                                                  \
        dot_block(w, now, next, dtype);                                                                                \
    }                                                                                                                  \
    static __attribute__((noinline)) void values_##name(const rows *w, const key_block *now, const key_walk *next,     \
                                                        bool hides, const float *rescale)                              \
    {                                                                                                                  \
        value_block(w, now, next, hides, rescale, dtype);                                                              \
    }                                                                                                                  \
    void FA_KERNEL(decode, name)(const fa_args *a, const fa_plan *p, int64_t task, char *scratch, char *shared);       \
    void FA_KERNEL(decode, name)(const fa_args *a, const fa_plan *p, int64_t task, char *scratch, char *shared)        \
    {                                                                                                                  \
        rows_task(a, p, task, scratch, shared, dtype, dots_##name, values_##name);                                     \
    }

DECODE(f32, FA_F32)
DECODE(bf16, FA_BF16)
DECODE(f16, FA_F16)
DECODE(i8, FA_I8)
DECODE(f8e4m3, FA_F8E4M3)
