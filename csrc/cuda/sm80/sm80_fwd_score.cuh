/* Forward, from products of queries and keys to weights: what options do to a tile of scores, the online softmax, and
 * dropout. A lane has MT times two rows, 16 m + g and + 8, and of each the NT / 4 times 8 keys that follow its first:
 * columns 8n + 2t + e of the products are the keys 2n + e (fa_key_at). So a row of a mask is read in vectors, and one
 * evaluation of dropout's random numbers serves four of a lane's keys.
 *
 * Scores are left as products where only 0 or -inf is added to them: then one multiply-add makes the exponent of each.
 * Else they are in nats. Either way weights are 2^(c (s - m)). */
#ifndef FA_SM80_FWD_SCORE_CUH
#define FA_SM80_FWD_SCORE_CUH

#include "sm80.cuh"

/* What a query head does to its scores, in nats. */
struct fa_fwd_scores {
    fa_scores p;
    bool scaled;     /* the scores are brought to nats */
    float c;         /* from scores to exponents of 2, positive */
    int row, column; /* the lane's first query and, within the tile, first key */
};

template <bool MOD>
__device__ __forceinline__ fa_fwd_scores fa_fwd_scores_of(const fa_args *a, const fa_seq *s, int64_t h, int row,
                                                          int column)
{
    fa_fwd_scores f;
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

    static __device__ __forceinline__ void fetch(uint32_t sMask, const fa_fwd_scores &f, int k0)
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
    static __device__ __forceinline__ void fetch_elements(char *sMask, const fa_fwd_scores &f, int k0)
    {
        const int first = k0 + f.column;
#pragma unroll 1
        for (int x = 0; x < 2 * MT; x++) {
            const int i = f.row + 8 * x;
#pragma unroll 1
            for (int y = 0; y < KEYS; y++) {
                char *to = sMask + (x * WORDS + y * SIZE / WORD) * THREADS * WORD + threadIdx.x * WORD + y * SIZE % WORD;
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
__device__ __forceinline__ void fa_fetch_rows(char *sMask, const fa_fwd_scores &f, int width, int k0)
{
    using R = fa_mask_rows<SIZE, MT, 2 * NT, THREADS>;
    if (k0 + 8 * NT <= width)
        R::fetch(ptx_shared(sMask), f, k0);
    else
        R::fetch_elements(sMask, f, k0);
}

template <int MT, int NT, int THREADS>
__device__ __forceinline__ void fa_fetch_mask(char *sMask, const fa_fwd_scores &f, int width, int k0)
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
__device__ __forceinline__ void fa_apply_mask(float (&s)[MT][NT][4], const fa_fwd_scores &f, const char *sMask,
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

/* tanh; for 16-bit types from one exponential, off by 2^-22 of 1 */
template <typename T> __device__ __forceinline__ float fa_tanh(float x)
{
    if (sizeof(T) == 4)
        return tanhf(x);
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

template <typename T, int MT, int NT>
__device__ __forceinline__ void fa_cap(float (&s)[MT][NT][4], const fa_scores &p)
{
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                s[m][n][e] = p.cap * fa_tanh<T>(s[m][n][e] * p.scale);
}

template <int MT, int NT>
__device__ __forceinline__ void fa_add_alibi(float (&s)[MT][NT][4], const fa_fwd_scores &f, int k0)
{
#pragma unroll
    for (int x = 0; x < 2 * MT; x++) {
        const float ahead = (float)(f.row + 8 * x + f.p.offset - k0 - f.column); /* of the lane's first key */
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float &at = s[x / 2][n][x % 2 * 2 + e];
                at = fmaf(-f.p.slope, fabsf(ahead - (2 * n + e)), at);
            }
    }
}

/* -inf for what is hidden by its place */
template <int MT, int NT>
__device__ __forceinline__ void fa_hide_places(float (&s)[MT][NT][4], const fa_fwd_scores &f, int k0)
{
#pragma unroll
    for (int x = 0; x < 2 * MT; x++) {
        const int64_t i = f.row + 8 * x, at = i + f.p.offset, key = k0 + f.column;
        const int64_t end = i < f.p.q_len ? fa_min64(f.p.k_len, at + f.p.right + 1) : 0;
        const int lo = (int)fa_clamp(at - f.p.left - key, 0, 2 * NT), hi = (int)fa_clamp(end - key, 0, 2 * NT);
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (2 * n + e < lo || 2 * n + e >= hi)
                    s[x / 2][n][x % 2 * 2 + e] = -INFINITY;
    }
}

/* Products to scores. edges: some pair of the tile is hidden by its place. */
template <typename T, bool MOD, int THREADS, int MT, int NT>
__device__ __forceinline__ void fa_fwd_score(float (&s)[MT][NT][4], const fa_fwd_scores &f, const char *sMask,
                                             int k0, bool edges)
{
    const bool biased = MOD && f.p.mask && f.p.mask_dtype != FA_BOOL && !f.p.alibi && f.p.cap <= 0;
    if (MOD && f.p.cap > 0)
        fa_cap<T>(s, f.p);
    else if (f.scaled && !biased)
        fa_multiply(s, f.p.scale);
    if (MOD && f.p.alibi)
        fa_add_alibi(s, f, k0);
    if (MOD && f.p.mask)
        fa_apply_mask<T, THREADS>(s, f, sMask, biased ? f.p.scale : 1); /* one multiply-add */
    if (edges)
        fa_hide_places(s, f, k0);
}

/* ---- softmax ----------------------------------------------------------------------------------------------------- */

/* The running softmax of a lane's rows: sums of 2^(c (s - max)), and of these times values. max is not always the
 * maximum: it follows when it falls behind by more than a factor of 2^FA_BEHIND. */
#define FA_BEHIND 8.0f
template <int MT, int NA> struct fa_fwd_rows {
    float acc[MT][NA][4];
    float max[MT][2]; /* -inf: nothing seen yet */
    float sum[MT][2]; /* of this lane's keys only */
};

/* Rows that have fallen behind follow, and their sums shrink. */
template <int MT, int NA>
__device__ __forceinline__ void fa_fwd_follow(fa_fwd_rows<MT, NA> &r, const float (&top)[MT][2], float c)
{
#pragma unroll
    for (int x = 0; x < 2 * MT; x++) {
        float &max = r.max[x / 2][x % 2], factor = 1;
        if ((top[x / 2][x % 2] - max) * c > FA_BEHIND) {
            factor = max == -INFINITY ? 0 : ptx_exp2((max - top[x / 2][x % 2]) * c);
            max = top[x / 2][x % 2];
        }
        r.sum[x / 2][x % 2] *= factor;
#pragma unroll
        for (int n = 0; n < NA; n++) {
            r.acc[x / 2][n][x % 2 * 2] *= factor;
            r.acc[x / 2][n][x % 2 * 2 + 1] *= factor;
        }
    }
}

/* s <- weights */
template <int MT, int NT, int NA>
__device__ __forceinline__ void fa_fwd_softmax(float (&s)[MT][NT][4], fa_fwd_rows<MT, NA> &r, float c)
{
    float top[MT][2];
    bool behind = false;
#pragma unroll
    for (int x = 0; x < 2 * MT; x++) {
        float most = -INFINITY;
#pragma unroll
        for (int n = 0; n < NT; n++)
            most = fmaxf(most, fmaxf(s[x / 2][n][x % 2 * 2], s[x / 2][n][x % 2 * 2 + 1]));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
        top[x / 2][x % 2] = most;
        behind |= (most - r.max[x / 2][x % 2]) * c > FA_BEHIND;
    }
    if (__any_sync(0xffffffffu, behind))
        fa_fwd_follow(r, top, c);
#pragma unroll
    for (int x = 0; x < 2 * MT; x++) {
        const float max = r.max[x / 2][x % 2];
        float base = max == -INFINITY ? 0 : -max * c; /* nothing seen yet: every weight is 2^-inf = 0 */
        if (base == INFINITY) { /* only what a float mask all but hides */
            base = 0;
#pragma unroll
            for (int n = 0; n < NT; n++) {
                s[x / 2][n][x % 2 * 2] -= max;
                s[x / 2][n][x % 2 * 2 + 1] -= max;
            }
        }
        float sum = 0;
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = x % 2 * 2; e < x % 2 * 2 + 2; e++) {
                s[x / 2][n][e] = ptx_exp2(fmaf(s[x / 2][n][e], c, base));
                sum += s[x / 2][n][e];
            }
        r.sum[x / 2][x % 2] += sum;
    }
}

/* The exponent of 2 that a row's sums are in units of; a finite maximum stays finite. */
__device__ __forceinline__ float fa_fwd_base(float max, float c)
{
    return max == -INFINITY ? max : fmaxf(max * c, -FLT_MAX);
}

/* ---- dropout ----------------------------------------------------------------------------------------------------- */

/* w <- 0 where dropout drops */
template <int MT, int NT>
__device__ __forceinline__ void fa_fwd_drop(float (&w)[MT][NT][4], const fa_fwd_scores &f, int k0)
{
#pragma unroll
    for (int x = 0; x < 2 * MT; x++)
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
            const uint32_t key = (uint32_t)(k0 + f.column + 2 * n);
            const fa_philox4 r = fa_philox(f.p.seed, key >> 2, (uint32_t)(f.row + 8 * x), f.p.bh, 0);
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (r.word[i] < f.p.threshold)
                    w[x / 2][n + i / 2][x % 2 * 2 + i % 2] = 0;
        }
}

#endif
