/* Append and merge, in guarded memory, against their definitions in double. Both are plain C, one for all machines. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkfa.h"
#include "cpu/cpu_row.h"

enum { MOST = 5, TENSORS = 16, ROUNDS = 400, QUICK_ROUNDS = 60 };

/* Tensors in memory that ends at a page which faults. */
typedef struct pool {
    ck_guarded memory[TENSORS];
    int count;
} pool;

/* (b, h, s, d) with tokens before heads in memory, or with heads before tokens; the last stride is 1 or 2 */
static fa_tensor make(pool *p, ck_rng *r, fa_dtype dtype, int64_t b, int64_t h, int64_t s, int64_t d)
{
    const int64_t step = ck_chance(r, 25) ? 2 : 1, row = d * step;
    const bool tokens_first = ck_chance(r, 75);
    ck_guarded *g = &p->memory[p->count++];
    const int64_t elements = b * h * s * row;
    *g = ck_guard((size_t)(elements > 0 ? elements : 1) * fa_dtype_size(dtype));
    memset(g->start, 0x81, g->bytes);
    return (fa_tensor){.data = g->start,
                       .size = {b, h, s, d},
                       .stride = {s * h * row, tokens_first ? row : s * row, tokens_first ? h * row : row, step},
                       .dtype = dtype};
}

static fa_tensor make_index(pool *p, ck_rng *r, int64_t n, int64_t m)
{
    fa_tensor t = make(p, r, ck_chance(r, 50) ? FA_I64 : FA_I32, n, m, 1, 1);
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < m; j++)
            fa_store(t.data, t.dtype, i * t.stride[0] + j * t.stride[1], -7);
    return t;
}

static int64_t at(const fa_tensor *t, int64_t b, int64_t h, int64_t s, int64_t d)
{
    return b * t->stride[0] + h * t->stride[1] + s * t->stride[2] + d * t->stride[3];
}

static double get(const fa_tensor *t, int64_t b, int64_t h, int64_t s, int64_t d)
{
    return fa_load(t->data, t->dtype, at(t, b, h, s, d));
}

static void fill(fa_tensor *t, ck_rng *r)
{
    for (int64_t b = 0; b < t->size[0]; b++)
        for (int64_t h = 0; h < t->size[1]; h++)
            for (int64_t s = 0; s < t->size[2]; s++)
                for (int64_t d = 0; d < t->size[3]; d++)
                    fa_store(t->data, t->dtype, at(t, b, h, s, d), ck_chance(r, 3) ? 0 : ck_normal(r));
}

static bool release(pool *p)
{
    bool intact = true;
    for (int i = 0; i < p->count; i++) {
        intact = intact && ck_guard_intact(&p->memory[i]);
        ck_guard_free(&p->memory[i]);
    }
    return intact;
}

/* ---- append ------------------------------------------------------------------------------------------------------ */

typedef struct append_problem {
    pool memory;
    fa_append_args a;
    int64_t N, page, length[MOST], added[MOST], first[MOST + 1];
    char text[200];
} append_problem;

static const fa_dtype FLOATS[] = {FA_F32, FA_BF16, FA_F16, FA_F64};

static void make_scales(append_problem *p, ck_rng *r)
{
    fa_tensor *scales[] = {&p->a.k_scale, &p->a.v_scale};
    const int64_t *size = p->a.k_cache.size;
    p->a.scale_per_token = ck_chance(r, 50);
    for (int i = 0; i < 2; i++) {
        const bool heads = ck_chance(r, 70), each = heads && ck_chance(r, 50);
        if (p->a.scale_per_token)
            *scales[i] = make(&p->memory, r, FA_F32, size[0], size[1], size[2], 1);
        else
            *scales[i] = make(&p->memory, r, FA_F32, each ? p->N : 1, heads ? size[1] : 1, 1, 1);
        for (int64_t b = 0; b < scales[i]->size[0] && !p->a.scale_per_token; b++)
            for (int64_t h = 0; h < scales[i]->size[1]; h++)
                ((float *)scales[i]->data)[at(scales[i], b, h, 0, 0)] = (float)(0.01 + 0.05 * ck_uniform(r));
    }
}

static void make_rope(append_problem *p, ck_rng *r, fa_dtype dtype, int64_t D, int64_t positions, int64_t SQ)
{
    const int64_t half = 1 + ck_below(r, D / 2);
    const fa_dtype table = ck_chance(r, 50) ? FA_F32 : dtype;
    p->a.rope_cos = make(&p->memory, r, table, positions, half, 1, 1);
    p->a.rope_sin = make(&p->memory, r, table, positions, half, 1, 1);
    fill(&p->a.rope_cos, r);
    fill(&p->a.rope_sin, r);
    p->a.rope_interleaved = ck_chance(r, 50);
    p->a.q = make(&p->memory, r, dtype, p->N, 1 + ck_below(r, 4), SQ, D);
    fill(&p->a.q, r);
    p->a.q_out = make(&p->memory, r, dtype, p->N, p->a.q.size[1], SQ, D);
}

/* Pages in random order, those past the last that is written named out of range. */
static void make_table(append_problem *p, ck_rng *r, int64_t columns, int64_t pages)
{
    int64_t order[MOST * 64];
    for (int64_t i = 0; i < pages; i++)
        order[i] = i;
    for (int64_t i = pages - 1; i > 0; i--) {
        const int64_t j = ck_below(r, i + 1), other = order[j];
        order[j] = order[i];
        order[i] = other;
    }
    p->a.block_table = make_index(&p->memory, r, p->N, columns);
    for (int64_t n = 0; n < p->N; n++)
        for (int64_t i = 0; i < (p->length[n] + p->added[n] + p->page - 1) / p->page; i++)
            fa_store(p->a.block_table.data, p->a.block_table.dtype, at(&p->a.block_table, n, i, 0, 0),
                     (double)order[n * columns + i]);
}

static void make_append(append_problem *p, ck_rng *r)
{
    const fa_dtype dtype = FLOATS[ck_below(r, 4)];
    const fa_dtype stored = ck_chance(r, 40) ? dtype : ck_chance(r, 50) ? FA_I8 : FA_F8E4M3;
    const int64_t D = 2 + ck_below(r, 70), DV = 1 + ck_below(r, 70), HK = 1 + ck_below(r, 3);
    const int64_t capacity = 1 + ck_below(r, 60), dense = ck_below(r, capacity + 1);
    const bool packed = ck_chance(r, 30);
    *p = (append_problem){.N = 1 + ck_below(r, MOST), .page = ck_chance(r, 50) ? 1 + ck_below(r, 9) : 0};
    for (int64_t n = 0; n < p->N; n++) {
        p->added[n] = packed ? ck_below(r, capacity + 1) : dense;
        p->length[n] = ck_below(r, capacity - p->added[n] + 1);
        p->first[n + 1] = p->first[n] + p->added[n];
    }
    const int64_t rows = packed ? p->first[p->N] + ck_below(r, 3) : dense, batch = packed ? 1 : p->N;
    p->a.k_new = make(&p->memory, r, dtype, batch, HK, rows, D);
    p->a.v_new = make(&p->memory, r, dtype, batch, HK, rows, DV);
    fill(&p->a.k_new, r);
    fill(&p->a.v_new, r);
    p->a.seqlens = make_index(&p->memory, r, p->N, 1);
    for (int64_t n = 0; n < p->N; n++)
        fa_store(p->a.seqlens.data, p->a.seqlens.dtype, at(&p->a.seqlens, n, 0, 0, 0), (double)p->length[n]);
    if (packed) {
        p->a.cu_new = make_index(&p->memory, r, p->N + 1, 1);
        for (int64_t n = 0; n <= p->N; n++)
            fa_store(p->a.cu_new.data, p->a.cu_new.dtype, at(&p->a.cu_new, n, 0, 0, 0), (double)p->first[n]);
    }
    const int64_t columns = p->page ? (capacity + p->page - 1) / p->page : 0, pages = p->N * columns;
    const int64_t tall = p->page ? pages : p->N, wide = p->page ? p->page : capacity;
    p->a.k_cache = make(&p->memory, r, stored, tall, HK, wide, D);
    p->a.v_cache = make(&p->memory, r, stored, tall, HK, wide, DV);
    if (p->page)
        make_table(p, r, columns, pages);
    if (stored != dtype)
        make_scales(p, r);
    if (ck_chance(r, 50))
        make_rope(p, r, dtype, D, capacity + dense, dense);
    snprintf(p->text, sizeof p->text, "%s into %s N%" PRId64 " HK%" PRId64 " D%" PRId64 " DV%" PRId64 " capacity %"
             PRId64 " page %" PRId64 "%s%s%s", fa_dtype_name(dtype), fa_dtype_name(stored), p->N, HK, D, DV, capacity,
             p->page, packed ? " packed" : "", p->a.rope_cos.data ? " rope" : "",
             p->a.scale_per_token ? " per token" : "");
}

/* Element d of row i of x (b, h, s), turned by position. */
static double turned(const append_problem *p, const fa_tensor *x, int64_t b, int64_t h, int64_t s, int64_t d,
                     int64_t position, bool is_value)
{
    const fa_tensor *c = &p->a.rope_cos, *sine = &p->a.rope_sin;
    const int64_t half = c->data && !is_value ? c->size[1] : 0;
    if (d >= 2 * half)
        return get(x, b, h, s, d);
    const int64_t pair = p->a.rope_interleaved ? d / 2 : d % half;
    const bool second = p->a.rope_interleaved ? d % 2 : d >= half;
    const double x0 = get(x, b, h, s, p->a.rope_interleaved ? 2 * pair : pair);
    const double x1 = get(x, b, h, s, p->a.rope_interleaved ? 2 * pair + 1 : pair + half);
    const double cosine = get(c, position, pair, 0, 0), sinus = get(sine, position, pair, 0, 0);
    return second ? x0 * sinus + x1 * cosine : x0 * cosine - x1 * sinus;
}

/* How far a stored element may be from what it stands for; scale counts a stored unit. */
static double allowed(fa_dtype stored, double want, double scale)
{
    const double magnitude = fabs(want) + 1e-3; /* sums of the turning cancel */
    switch (stored) {
    case FA_F32: return 4e-7 * (magnitude + 4);
    case FA_F64: return 1e-15 * (magnitude + 4);
    case FA_BF16: return magnitude * 0x1p-8 + 1e-6;
    case FA_F16: return magnitude * 0x1p-11 + 1e-6;
    case FA_I8: return fabs(want) > 127 * scale ? fabs(want) - 127 * scale + 1e-6 : scale * 0.5001 + 1e-6;
    default: return fabs(want) > 448 * scale ? fabs(want) - 448 * scale + 1e-6 : magnitude * 0.0626 + scale * 0x1p-10;
    }
}

static float scale_of(const append_problem *p, const fa_tensor *scale, int64_t n, int64_t h, int64_t b, int64_t s)
{
    if (!scale->data)
        return 1;
    if (p->a.scale_per_token)
        return ((const float *)scale->data)[at(scale, b, h, s, 0)];
    return ((const float *)scale->data)[at(scale, scale->size[0] > 1 ? n : 0, scale->size[1] > 1 ? h : 0, 0, 0)];
}

/* Compares the new rows with their definition, and marks their elements in `mine`, bytes of the cache. */
static int wrong_rows(const append_problem *p, const fa_tensor *fresh, const fa_tensor *cache, const fa_tensor *scale,
                      bool is_value, char *mine)
{
    int wrong = 0;
    const size_t bytes = fa_dtype_size(cache->dtype);
    for (int64_t n = 0; n < p->N; n++)
        for (int64_t i = 0; i < p->added[n]; i++)
            for (int64_t h = 0; h < fresh->size[1]; h++) {
                const int64_t row = p->length[n] + i, s = p->a.cu_new.data ? p->first[n] + i : i;
                const int64_t page = p->page ? (int64_t)get(&p->a.block_table, n, row / p->page, 0, 0) : n;
                const int64_t place = p->page ? row % p->page : row;
                const double by = scale_of(p, scale, n, h, page, place);
                double most = 0;
                for (int64_t d = 0; d < fresh->size[3]; d++) {
                    const double want = turned(p, fresh, p->a.cu_new.data ? 0 : n, h, s, d, row, is_value);
                    const double got = get(cache, page, h, place, d) * by;
                    wrong += !(fabs(got - want) <= allowed(cache->dtype, want, by));
                    most = fabs(want) > most ? fabs(want) : most;
                    memset(mine + (size_t)at(cache, page, h, place, d) * bytes, 1, bytes);
                }
                const double largest = cache->dtype == FA_I8 ? 127 : 448, expected = most > 0 ? most / largest : 1;
                wrong += p->a.scale_per_token && scale->data && !(fabs(by - expected) <= 1e-5 * expected + 1e-9);
            }
    return wrong;
}

static int wrong_queries(const append_problem *p)
{
    int wrong = 0;
    const fa_tensor *q = &p->a.q, *out = &p->a.q_out;
    for (int64_t n = 0; q->data && n < p->N; n++)
        for (int64_t h = 0; h < q->size[1]; h++)
            for (int64_t i = 0; i < q->size[2]; i++)
                for (int64_t d = 0; d < q->size[3]; d++) {
                    const double want = turned(p, q, n, h, i, d, p->length[n] + i, false);
                    wrong += !(fabs(get(out, n, h, i, d) - want) <= allowed(out->dtype, want, 1));
                }
    return wrong;
}

static int changed_elsewhere(const fa_tensor *cache, size_t bytes, const char *mine)
{
    int changed = 0;
    for (size_t i = 0; i < bytes; i++)
        changed += !mine[i] && ((const unsigned char *)cache->data)[i] != 0x81;
    return changed;
}

static void check_append(ck_rng *r)
{
    append_problem p;
    fa_error err = {""};
    make_append(&p, r);
    ck_now("append of %s", p.text);
    fa_status status = fa_validate_append(&p.a, &err);
    const fa_exec exec = {.parallel = ck_chance(r, 50) ? ck_pool_threads : ck_pool_serial};
    status = status ? status : fa_run_append(&p.a, 3, &exec, &err);
    int wrong = 0, changed = 0;
    const fa_tensor *fresh[] = {&p.a.k_new, &p.a.v_new}, *caches[] = {&p.a.k_cache, &p.a.v_cache};
    const fa_tensor *scales[] = {&p.a.k_scale, &p.a.v_scale};
    for (int i = 0; i < 2 && !status; i++) {
        const int64_t elements = caches[i]->size[0] * caches[i]->size[1] * caches[i]->size[2] * caches[i]->size[3];
        const size_t bytes = (size_t)(elements * caches[i]->stride[3]) * fa_dtype_size(caches[i]->dtype);
        char *mine = calloc(bytes + 1, 1);
        wrong += wrong_rows(&p, fresh[i], caches[i], scales[i], i == 1, mine);
        changed += changed_elsewhere(caches[i], bytes, mine);
        free(mine);
    }
    wrong += status ? 0 : wrong_queries(&p);
    const bool intact = release(&p.memory);
    ck_result("append", !status && !wrong && !changed && intact, 0, "%s: %s, %d wrong, %d bytes changed elsewhere%s",
              p.text, status ? err.text : "ran", wrong, changed, intact ? "" : ", written outside");
}

/* ---- refusals of append ------------------------------------------------------------------------------------------ */

static void expect(const fa_append_args *a, const char *text)
{
    fa_error err = {""};
    const fa_status status = fa_validate_append(a, &err);
    ck_result("append", status == FA_ERR_SHAPE && strstr(err.text, text), 0, "wanted '%s', got %s '%s'", text,
              fa_status_name(status), err.text);
    ck_result("append", fa_validate_append(a, NULL) == status, 0, "without room for a text: '%s'", text);
}

static void check_append_refusals(void)
{
    float rows[2 * 3 * 4] = {0}, cache[4 * 2 * 4] = {0}, cos[8] = {0};
    int32_t lengths[2] = {1, 2}, table[2] = {0, 3};
    fa_append_args a = {
        .k_new = {.data = rows, .size = {2, 1, 1, 4}, .stride = {4, 4, 4, 1}},
        .v_new = {.data = rows, .size = {2, 1, 1, 4}, .stride = {4, 4, 4, 1}},
        .k_cache = {.data = cache, .size = {4, 1, 2, 4}, .stride = {8, 4, 4, 1}},
        .v_cache = {.data = cache, .size = {4, 1, 2, 4}, .stride = {8, 4, 4, 1}},
        .block_table = {.data = table, .size = {2, 1, 1, 1}, .stride = {1, 1}, .dtype = FA_I32},
        .seqlens = {.data = lengths, .size = {2, 1, 1, 1}, .stride = {1}, .dtype = FA_I32},
    };
    expect(&a, "cache_seqlens[1] is 2 and k_new adds 1: block_table has room for 2 tokens");
    lengths[1] = 1;
    ck_result("append", fa_validate_append(&a, NULL) == FA_OK, 0, "a valid append was refused");
    table[1] = 4;
    expect(&a, "block_table[1][0] is 4 and k_new is written there: it must be between 0 and 3");
    table[1] = 3;
    lengths[0] = INT32_MIN;
    expect(&a, "cache_seqlens[0] is -2147483648: it must not be negative");
    lengths[0] = 0;
    a.rope_cos = a.rope_sin = (fa_tensor){.data = cos, .size = {1, 2, 1, 1}, .stride = {2, 1}};
    expect(&a, "cache_seqlens[1] is 1 and 1 tokens are turned from there: rope_cos has 1 positions");
    a.rope_cos.size[1] = a.rope_sin.size[1] = 3;
    expect(&a, "between 1 and half the head dimension 4");
    a.rope_sin = (fa_tensor){0};
    expect(&a, "rope_cos is given and rope_sin is not");
    a.rope_cos = (fa_tensor){0};
    a.k_cache.stride[0] = 0;
    expect(&a, "elements that are written must not share memory");
    a.k_cache.stride[0] = 8;
    a.k_cache.dtype = a.v_cache.dtype = FA_I8;
    expect(&a, "k_scale is None and the cache has dtype int8");
    a.k_cache.dtype = FA_BF16;
    expect(&a, "dtypes bfloat16 and int8: they must be the same, one of k_new's dtype float32, int8");
    a.k_cache.dtype = a.v_cache.dtype = FA_F32;
    a.v_new = (fa_tensor){0};
    expect(&a, "k_new is given and v_new is not");
}

/* ---- merge ------------------------------------------------------------------------------------------------------- */

static void check_merge(ck_rng *r)
{
    pool memory = {.count = 0};
    const fa_dtype dtype = FLOATS[ck_below(r, 4)], wide = dtype == FA_F64 || ck_chance(r, 20) ? FA_F64 : FA_F32;
    const int64_t B = 1 + ck_below(r, 3), H = 1 + ck_below(r, 3), S = 1 + ck_below(r, 80), DV = 1 + ck_below(r, 80);
    fa_merge_args a = {0};
    fa_tensor *rows[] = {&a.out_a, &a.out_b, &a.out}, *lses[] = {&a.lse_a, &a.lse_b, &a.lse};
    for (int i = 0; i < 3; i++) {
        *rows[i] = make(&memory, r, dtype, B, H, S, DV);
        *lses[i] = make(&memory, r, wide, B, H, S, 1);
        fill(rows[i], r);
        fill(lses[i], r);
    }
    for (int64_t n = 0; n < B * H * S; n++) /* rows that saw nothing hold NaN */
        for (int i = 0; i < 2; i++)
            if (ck_chance(r, 15)) {
                const int64_t b = n / S / H, h = n / S % H, s = n % S;
                fa_store(lses[i]->data, wide, at(lses[i], b, h, s, 0), -INFINITY);
                fa_store(rows[i]->data, dtype, at(rows[i], b, h, s, DV - 1), NAN);
            }
    ck_now("merge of %s", fa_dtype_name(dtype));
    fa_error err = {""};
    fa_status status = fa_validate_merge(&a, &err);
    const fa_exec exec = {.parallel = ck_pool_threads};
    status = status ? status : fa_run_merge(&a, 3, &exec, &err);
    int wrong = 0;
    for (int64_t n = 0; n < B * H * S && !status; n++) {
        const int64_t b = n / S / H, h = n / S % H, s = n % S;
        const double la = get(&a.lse_a, b, h, s, 0), lb = get(&a.lse_b, b, h, s, 0), sum = exp(la) + exp(lb);
        const double lse = get(&a.lse, b, h, s, 0);
        wrong += sum == 0 ? lse != -INFINITY : !(fabs(lse - log(sum)) <= (wide == FA_F64 ? 1e-14 : 1e-6));
        for (int64_t d = 0; d < DV; d++) {
            const double x = exp(la) > 0 ? exp(la) * get(&a.out_a, b, h, s, d) : 0;
            const double y = exp(lb) > 0 ? exp(lb) * get(&a.out_b, b, h, s, d) : 0;
            const double want = sum == 0 ? 0 : (x + y) / sum;
            wrong += !(fabs(get(&a.out, b, h, s, d) - want) <= allowed(dtype, want, 1));
        }
    }
    const bool intact = release(&memory);
    ck_result("merge", !status && !wrong && intact, 0, "%s B%" PRId64 " H%" PRId64 " S%" PRId64 " DV%" PRId64
              ": %s, %d wrong%s", fa_dtype_name(dtype), B, H, S, DV, status ? err.text : "ran", wrong,
              intact ? "" : ", written outside");
}

/* ---- conversions ------------------------------------------------------------------------------------------------- */

/* Rounding in float gives the bits of rounding in double, for all narrow dtypes. */
static void check_rounding(ck_rng *r)
{
    int wrong = 0;
    for (int i = 0; i < 2000000; i++) {
        const uint32_t bits = i < 1 << 20 ? (uint32_t)i << 12 : (uint32_t)ck_next(r);
        const float x = fa_bits_to_f32(bits);
        wrong += fa_narrow_f32(x, 8, 7) != fa_f64_to_bf16(x) || fa_narrow_f32(x, 5, 10) != fa_f64_to_f16(x) ||
                 fa_f32_to_f8e4m3(x) != fa_f64_to_f8e4m3(x) || fa_f32_to_i8(x) != fa_f64_to_i8(x);
    }
    ck_result("dtypes", wrong == 0, 0, "%d floats round differently in float and in double", wrong);
}

void ck_check_caches(void)
{
    ck_rng r = ck_seeded(ck_opt.seed, 77);
    check_append_refusals();
    check_rounding(&r);
    for (int i = 0; i < (ck_opt.quick ? QUICK_ROUNDS : ROUNDS); i++) {
        check_append(&r);
        check_merge(&r);
    }
}
