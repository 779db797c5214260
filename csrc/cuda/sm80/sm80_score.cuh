/* From products of queries and keys to scores: what options do to a tile of them; and dropout. Rows of the tile are
 * queries and columns keys, or with KEYS the other way round. A lane has MT times two rows, 16 m + g and + 8, and of
 * each the 2 NT columns that follow its first: columns 8n + 2t + e of the products are its columns 2n + e (fa_key_at).
 * So a row of a mask is read in vectors, and one evaluation of dropout's random numbers serves four of a lane's
 * weights, or eight where its columns are as many as 16.
 *
 * Scores are left as products where only 0 or -inf is added to them: then one multiply-add makes the exponent of each.
 * Else they are in nats. Either way weights are 2^(c (s - m)). */
#ifndef FA_SM80_SCORE_CUH
#define FA_SM80_SCORE_CUH

#include "sm80.cuh"

/* What a query head does to its scores, in nats. */
struct fa_sm80_scores {
    fa_scores p;
    bool scaled;     /* the scores are brought to nats */
    float c;         /* from scores to exponents of 2, positive */
    int row, column; /* the lane's first row and, within the tile, first column */
};

template <bool MOD>
__device__ __forceinline__ fa_sm80_scores fa_sm80_scores_of(const fa_args *a, const fa_seq *s, int64_t h, int row,
                                                          int column)
{
    fa_sm80_scores f;
    f.p = fa_scores_of(a, s, h);
    f.p.scale = (float)(a->softcap > 0 ? a->scale / a->softcap : a->scale);
    f.p.cap = (float)a->softcap;
    if (a->alibi.data)
        f.p.slope = (float)fa_per_head(&a->alibi, s->n, h);
    f.scaled = a->scale <= 0 || (MOD && (f.p.cap > 0 || f.p.alibi || (f.p.mask && f.p.mask_dtype != FA_BOOL)));
    f.c = f.scaled ? FA_LOG2E_F : (float)(a->scale * 1.4426950408889634);
    f.row = row;
    f.column = column;
    return f;
}

/* ---- masks ------------------------------------------------------------------------------------------------------- */

/* KEYS elements of SIZE bytes of each of a lane's rows: they are copied into shared memory that no other lane reads, in
 * vectors and asynchronously where they lie so, and taken from there row by row. */
template <int SIZE, int MT, int KEYS, int THREADS> struct fa_mask_rows {
    static constexpr int BYTES = KEYS * SIZE, WORD = BYTES < 16 ? BYTES : 16, WORDS = BYTES / WORD;

    static __device__ __forceinline__ void fetch(uint32_t sMask, const fa_sm80_scores &f, int k0)
    {
        const char *from = f.p.mask + (f.row * f.p.mask_q + k0 + f.column) * SIZE;
        const uint32_t to = sMask + threadIdx.x * WORD;
#pragma unroll
        for (int x = 0; x < 2 * MT; x++, from += 8 * f.p.mask_q * SIZE)
            if (f.row + 8 * x < f.p.q_len)
#pragma unroll
                for (int v = 0; v < WORDS; v++)
                    ptx_cp_async_few<WORD>(to + (x * WORDS + v) * THREADS * WORD, from + v * WORD);
    }

    /* the same for any stride, and at the edges of the mask */
    static __device__ __forceinline__ void fetch_elements(char *sMask, const fa_sm80_scores &f, int k0)
    {
        const int first = k0 + f.column;
#pragma unroll 1
        for (int x = 0; x < 2 * MT; x++) {
            const int i = f.row + 8 * x;
#pragma unroll 1
            for (int y = 0; y < KEYS; y++) {
                const int word = (x * WORDS + y * SIZE / WORD) * THREADS + threadIdx.x;
                char *to = sMask + word * WORD + y * SIZE % WORD;
                const int j = first + y - f.p.mask_first;
                const bool exists = i < f.p.q_len && first + y < f.p.k_len && j >= 0;
                const char *from = f.p.mask + (exists ? i * f.p.mask_q + j * f.p.mask_k : 0) * SIZE;
                if (SIZE == 1)
                    *to = exists ? *from : 1;
                else if (SIZE == 2)
                    *(uint16_t *)to = exists ? *(const uint16_t *)from : 0;
                else
                    *(uint32_t *)to = exists ? *(const uint32_t *)from : 0;
            }
        }
    }

    static __device__ __forceinline__ void take(uint32_t (&w)[BYTES / 4], const char *sMask, int x)
    {
        struct __align__(WORD) word {
            uint32_t part[WORD / 4];
        };
#pragma unroll
        for (int v = 0; v < WORDS; v++) {
            const word one = ((const word *)sMask)[(x * WORDS + v) * THREADS + threadIdx.x];
#pragma unroll
            for (int i = 0; i < WORD / 4; i++)
                w[v * (WORD / 4) + i] = one.part[i];
        }
    }
};

/* element x of words of T, as fp32 */
template <typename T> __device__ __forceinline__ float fa_element(const uint32_t *w, int x);
template <> __device__ __forceinline__ float fa_element<float>(const uint32_t *w, int x)
{
    return __uint_as_float(w[x]);
}
template <> __device__ __forceinline__ float fa_element<__nv_bfloat16>(const uint32_t *w, int x)
{
    return __uint_as_float(x % 2 ? w[x / 2] & 0xffff0000u : w[x / 2] << 16);
}
template <> __device__ __forceinline__ float fa_element<__half>(const uint32_t *w, int x)
{
    const uint16_t bits = (uint16_t)(w[x / 2] >> (x % 2 * 16));
    return __half2float(*(const __half *)&bits);
}

/* s <- factor s + mask */
template <typename M, int THREADS, int MT, int NT>
__device__ __forceinline__ void fa_add_mask(float (&s)[MT][NT][4], const char *sMask, float factor)
{
    using R = fa_mask_rows<sizeof(M), MT, 2 * NT, THREADS>;
#pragma unroll
    for (int x = 0; x < 2 * MT; x++) {
        uint32_t w[R::BYTES / 4];
        R::take(w, sMask, x);
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float &at = s[x / 2][n][x % 2 * 2 + e];
                at = fmaf(at, factor, fa_element<M>(w, 2 * n + e));
            }
    }
}

template <int THREADS, int MT, int NT>
__device__ __forceinline__ void fa_hide_masked(float (&s)[MT][NT][4], const char *sMask)
{
    using R = fa_mask_rows<1, MT, 2 * NT, THREADS>;
#pragma unroll
    for (int x = 0; x < 2 * MT; x++) {
        uint32_t w[R::BYTES / 4];
        R::take(w, sMask, x);
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (!(w[n / 2] & 0xffu << (n % 2 * 16 + e * 8)))
                    s[x / 2][n][x % 2 * 2 + e] = -INFINITY;
    }
}

/* width: columns of the mask; 0 where it cannot be read in vectors */
template <int SIZE, int MT, int NT, int THREADS>
__device__ __forceinline__ void fa_fetch_rows(char *sMask, const fa_sm80_scores &f, int width, int k0)
{
    using R = fa_mask_rows<SIZE, MT, 2 * NT, THREADS>;
    if (k0 + 8 * NT <= width)
        R::fetch(ptx_shared(sMask), f, k0);
    else
        R::fetch_elements(sMask, f, k0);
}

template <int MT, int NT, int THREADS>
__device__ __forceinline__ void fa_fetch_mask(char *sMask, const fa_sm80_scores &f, int width, int k0)
{
    if (f.p.mask_dtype == FA_BOOL)
        fa_fetch_rows<1, MT, NT, THREADS>(sMask, f, width, k0);
    else if (f.p.mask_dtype == FA_F32)
        fa_fetch_rows<4, MT, NT, THREADS>(sMask, f, width, k0);
    else
        fa_fetch_rows<2, MT, NT, THREADS>(sMask, f, width, k0);
}

/* s <- factor s + mask; a bool mask hides, and factor is 1 */
template <typename T, int THREADS, int MT, int NT>
__device__ __forceinline__ void fa_apply_mask(float (&s)[MT][NT][4], const fa_sm80_scores &f, const char *sMask,
                                              float factor)
{
    if (f.p.mask_dtype == FA_BOOL)
        fa_hide_masked<THREADS>(s, sMask);
    else if (f.p.mask_dtype == FA_F32)
        fa_add_mask<float, THREADS>(s, sMask, factor);
    else
        fa_add_mask<T, THREADS>(s, sMask, factor);
}

/* ---- scores ------------------------------------------------------------------------------------------------------ */

/* Not inlined: its branches, for each score again, are a fifth of what an instance takes to compile. */
__device__ __noinline__ static float fa_tanh_f32(float x)
{
    return tanhf(x);
}

/* tanh; for 16-bit types from one exponential, off by 2^-22 of 1 */
template <typename T> __device__ __forceinline__ float fa_tanh(float x)
{
    if (sizeof(T) == 4)
        return fa_tanh_f32(x);
    return fmaf(-2, ptx_reciprocal(1 + ptx_exp2(2 * FA_LOG2E_F * x)), 1);
}

template <int MT, int NT> __device__ __forceinline__ void fa_multiply(float (&s)[MT][NT][4], float factor)
{
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                s[m][n][e] *= factor;
}

/* SLOPES: slope <- d score / d (scale Q K^T) */
template <typename T, bool SLOPES, int MT, int NT>
__device__ __forceinline__ void fa_cap(float (&s)[MT][NT][4], float (&slope)[MT][NT][4], const fa_scores &p)
{
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float tanh = fa_tanh<T>(s[m][n][e] * p.scale);
                s[m][n][e] = p.cap * tanh;
                if (SLOPES)
                    slope[m][n][e] = 1 - tanh * tanh;
            }
}

template <bool KEYS, int MT, int NT>
__device__ __forceinline__ void fa_add_alibi(float (&s)[MT][NT][4], const fa_sm80_scores &f, int c0)
{
#pragma unroll
    for (int x = 0; x < 2 * MT; x++) { /* ahead: of the lane's first column */
        const float ahead = (float)(f.row + 8 * x + (KEYS ? -f.p.offset : f.p.offset) - c0 - f.column);
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float &at = s[x / 2][n][x % 2 * 2 + e];
                at = fmaf(-f.p.slope, fabsf(ahead - (2 * n + e)), at);
            }
    }
}

/* -inf for what is hidden by its place; c0: first column of the tile */
template <bool KEYS, int MT, int NT>
__device__ __forceinline__ void fa_hide_places(float (&s)[MT][NT][4], const fa_sm80_scores &f, int c0)
{
    const int rows = KEYS ? f.p.k_len : f.p.q_len, columns = KEYS ? f.p.q_len : f.p.k_len;
    const int behind = KEYS ? f.p.right : f.p.left, ahead = KEYS ? f.p.left : f.p.right;
#pragma unroll
    for (int x = 0; x < 2 * MT; x++) {
        const int64_t row = f.row + 8 * x, at = KEYS ? row - f.p.offset : row + f.p.offset, column = c0 + f.column;
        const int64_t end = row < rows ? fa_min64(columns, at + ahead + 1) : 0;
        const int lo = (int)fa_clamp(at - behind - column, 0, 2 * NT), hi = (int)fa_clamp(end - column, 0, 2 * NT);
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (2 * n + e < lo || 2 * n + e >= hi)
                    s[x / 2][n][x % 2 * 2 + e] = -INFINITY;
    }
}

/* What is done to products before the mask; returns what the mask's addition has to multiply by. */
template <typename T, bool KEYS, bool MOD, bool SLOPES, int MT, int NT>
__device__ __forceinline__ float fa_score_before_mask(float (&s)[MT][NT][4], float (&slope)[MT][NT][4],
                                                      const fa_sm80_scores &f, int c0)
{
    const bool biased = MOD && f.p.mask && f.p.mask_dtype != FA_BOOL && !f.p.alibi && f.p.cap <= 0;
    if (MOD && f.p.cap > 0)
        fa_cap<T, SLOPES>(s, slope, f.p);
    else if (f.scaled && !biased)
        fa_multiply(s, f.p.scale);
    if (MOD && f.p.alibi)
        fa_add_alibi<KEYS>(s, f, c0);
    return biased ? f.p.scale : 1; /* one multiply-add */
}

/* Products of queries (rows) and keys to scores; the mask lies in sMask. edges: some pair is hidden by its place. */
template <typename T, bool MOD, bool SLOPES, int THREADS, int MT, int NT>
__device__ __forceinline__ void fa_sm80_score(float (&s)[MT][NT][4], float (&slope)[MT][NT][4], const fa_sm80_scores &f,
                                              const char *sMask, int k0, bool edges)
{
    const float factor = fa_score_before_mask<T, false, MOD, SLOPES>(s, slope, f, k0);
    if (MOD && f.p.mask)
        fa_apply_mask<T, THREADS>(s, f, sMask, factor);
    if (edges)
        fa_hide_places<false>(s, f, k0);
}

/* ---- dropout ----------------------------------------------------------------------------------------------------- */

/* w <- 0 where dropout drops. Of the eight weights of an evaluation a lane has those of both its rows: all, where its
 * columns are a whole block of 16, else those of the four keys on one side of it. */
template <int MT, int NT>
__device__ __forceinline__ void fa_drop_weights(float (&w)[MT][NT][4], const fa_sm80_scores &f, int k0)
{
    static_assert(NT <= 8, "no more than a block of 16");
    constexpr int SIDES = NT == 8 ? 2 : 1;
    const uint32_t threshold = f.p.threshold << 16;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT / SIDES; n++) {
            const uint32_t key = (uint32_t)(k0 + f.column + 2 * n);
            const fa_philox4 r =
                fa_philox(f.p.seed, fa_dropout_column(key), fa_dropout_row((uint32_t)(f.row + 16 * m)), f.p.bh, 0);
#pragma unroll
            for (int i = 0; i < 2 * SIDES; i++) {
                const int x = i / SIDES, side = i % SIDES;
                const uint32_t word = r.word[2 * x + side], y = SIDES == 1 && key & 8 ? r.word[2 * x + 1] : word;
                if (y << 16 < threshold)
                    w[m][n + 4 * side][2 * x] = 0;
                if (y < threshold)
                    w[m][n + 4 * side][2 * x + 1] = 0;
            }
        }
}

#endif
