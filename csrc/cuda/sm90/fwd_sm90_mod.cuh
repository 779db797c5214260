/* What the instances with options do to a block of scores, in the accumulator layout of wgmma: softcap, float mask,
 * ALiBi, bool mask, and which weights dropout keeps; in this order (docs of the operator: csrc/fa.h).
 *
 * What comes from memory or costs time and does not depend on the scores is fetched while their product runs. */
#ifndef FA_FWD_SM90_MOD_CUH
#define FA_FWD_SM90_MOD_CUH

#include <float.h>

#include "../ptx/ptx_sm80.cuh"
#include "../tile/softmax.cuh"
#include "../tile/store_rows.cuh"
#include "fwd_sm90_tiles.cuh"
#include "sm90_dropout.cuh"

#define FA_LOG2E 1.4426950408889634f

/* Of one thread. An element is named by i, its row (first + 8 i), c, its group of 8 columns, and x, one of two. */
struct fa_mod_block {
    uint32_t seen[2]; /* bool mask: bit fa_seen_bit(c, x) of seen[i] */
    char *mask;       /* the warp's part of the mask, in shared memory; with dropout alone fa_fetch_columns' place */
    bool climbs;      /* the block's maximum is to be looked for at once */
    bool tame;        /* a float mask that hides nothing, and nothing in it is large */
    uint32_t what;    /* what the list says, */
    int place;        /* and where: fwd_sm90_list.cuh */
    bool late;        /* scores are made together with their weights: fa_late_scores */
};

/* Where this thread's elements lie in a block. */
struct fa_mod_place {
    int row, column; /* of element (0, 0, 0), within the sequence */
};

__device__ __forceinline__ fa_mod_place fa_mod_place_of(int row, int key)
{
    int lane = threadIdx.x % FA_WARP, warp = threadIdx.x / FA_WARP % 4;
    return {row + 16 * warp + lane / 4, key + 2 * (lane % 4)};
}

/* ---- masks ------------------------------------------------------------------------------------------------------- */

/* First element of the mask's row i. Rows behind the last are read as the last. */
__device__ __forceinline__ int64_t fa_mask_row(const fa_fwd_sm90_mod_params &p, const fa_mod_tile &t, int i)
{
    return t.n * p.mask[0] + t.h * p.mask[1] + min(i, p.plain.SQ - 1) * p.mask[2];
}

/* 16 bools as bits: a product moves one bit of each of 4 bytes, of two words at a time, into the highest byte. */
__device__ __forceinline__ uint32_t fa_bools_to_bits(uint4 w)
{
    return __byte_perm((w.x + 16 * w.y) * 0x01020408u, (w.z + 16 * w.w) * 0x01020408u, 0x0073);
}

/* Lane q of a quad reads columns 16 q .. 16 q + 15 of every 64, so that a quad reads whole rows; then each takes its
 * columns of all four lanes' words. */
__device__ __forceinline__ constexpr int fa_seen_bit(int c, int x)
{
    return c / 8 * 16 + c % 2 * 8 + c % 8 / 2 * 2 + x;
}

template <int BN>
__device__ __forceinline__ void fa_copy_seen(const fa_fwd_sm90_mod_params &p, const fa_mod_tile &t, fa_mod_place at,
                                             char *to)
{
    int lane = threadIdx.x % FA_WARP, first = at.column + 14 * (lane % 4); /* column - 2 q + 16 q */
    const uint8_t *mask = (const uint8_t *)p.a.mask.data;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint8_t *row = mask + fa_mask_row(p, t, at.row + 8 * i) + first;
#pragma unroll
        for (int v = 0; v < BN / 64; v++) {
            bool inside = first + 64 * v < p.plain.SK;
            ptx_cp_async(to + ((i * (BN / 64) + v) * FA_WARP + lane) * 16, inside ? row + 64 * v : mask,
                         inside ? 16 : 0);
        }
    }
}

template <int BN> __device__ __forceinline__ void fa_take_seen(fa_mod_block &m)
{
    int lane = threadIdx.x % FA_WARP, q = lane % 4;
    const uint4 *own = (const uint4 *)m.mask + lane;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint32_t bits = fa_bools_to_bits(own[i * (BN / 64) * FA_WARP]);
        uint32_t more = BN == 128 ? fa_bools_to_bits(own[(i * (BN / 64) + BN / 64 - 1) * FA_WARP]) : 0;
        bits = __byte_perm(bits, more, 0x5410);
        m.seen[i] = 0;
#pragma unroll
        for (int u = 0; u < 4; u++) {
            uint32_t other = __shfl_sync(0xffffffff, bits, u, 4);
            m.seen[i] |= (other >> 2 * q & 0x03030303u) << 2 * u;
        }
    }
}

/* The same of a mask with any strides. */
template <int BN>
__device__ __forceinline__ void fa_fetch_seen_singly(const fa_fwd_sm90_mod_params &p, const fa_mod_tile &t,
                                                     fa_mod_place at, fa_mod_block &m)
{
    const uint8_t *mask = (const uint8_t *)p.a.mask.data;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint8_t *row = mask + fa_mask_row(p, t, at.row + 8 * i);
        m.seen[i] = 0;
#pragma unroll 4
        for (int e = 0; e < BN / 4; e++) {
            int column = at.column + e / 2 * 8 + e % 2;
            uint32_t seen = row[min(column, p.plain.SK - 1) * p.mask[3]] != 0;
            m.seen[i] |= seen << fa_seen_bit(e / 2, e % 2);
        }
    }
}

template <int BN> __device__ __forceinline__ void fa_hide_unseen(float (&s)[BN / 2], const fa_mod_block &m)
{
    const uint32_t full = BN == 128 ? 0xffffffffu : 0xffffu;
    if (__all_sync(0xffffffff, (m.seen[0] & m.seen[1]) == full))
        return;
#pragma unroll
    for (int e = 0; e < BN / 2; e++)
        s[e] = m.seen[e / 2 % 2] >> fa_seen_bit(e / 4, e % 2) & 1 ? s[e] : -CUDART_INF_F;
}

/* A float mask of 16 bits waits in shared memory: 16 rows of a warp, which no other warp reads, in pieces of 16 bytes
 * whose place is turned by the row, so that neither side has conflicts. */
template <int BN> __device__ __forceinline__ uint32_t fa_bias_place(int row, int piece)
{
    return row * (BN * 2) + (piece ^ row % 8) * 16;
}

__device__ __forceinline__ uint32_t fa_load_shared(uint32_t at)
{
    uint32_t w;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(w) : "r"(at) : "memory");
    return w;
}

/* Lane q of a quad copies columns 8 q .. 8 q + 7 of every 32. */
template <int BN>
__device__ __forceinline__ void fa_copy_bias(const fa_fwd_sm90_mod_params &p, const fa_mod_tile &t, fa_mod_place at,
                                             char *bias)
{
    int lane = threadIdx.x % 4, first = at.column + 6 * lane, own = threadIdx.x % FA_WARP / 4;
    const uint16_t *mask = (const uint16_t *)p.a.mask.data;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint16_t *row = mask + fa_mask_row(p, t, at.row + 8 * i) + first;
#pragma unroll
        for (int v = 0; v < BN / 32; v++) {
            bool inside = first + 32 * v < p.plain.SK;
            ptx_cp_async(bias + fa_bias_place<BN>(own + 8 * i, 4 * v + lane), inside ? row + 32 * v : mask,
                         inside ? 16 : 0);
        }
    }
}

/* The same of a mask with any strides. */
template <int BN>
__device__ __forceinline__ void fa_fetch_bias_singly(const fa_fwd_sm90_mod_params &p, const fa_mod_tile &t,
                                                     fa_mod_place at, char *bias)
{
    int own = threadIdx.x % FA_WARP / 4;
    const uint16_t *mask = (const uint16_t *)p.a.mask.data;
#pragma unroll 1
    for (int i = 0; i < 2; i++) {
        const uint16_t *row = mask + fa_mask_row(p, t, at.row + 8 * i);
#pragma unroll 4
        for (int e = 0; e < BN / 4; e++) {
            int column = min(at.column + e / 2 * 8 + e % 2, p.plain.SK - 1);
            char *to = bias + fa_bias_place<BN>(own + 8 * i, e / 2) + threadIdx.x % 4 * 4 + e % 2 * 2;
            *(uint16_t *)to = row[column * p.mask[3]];
        }
    }
    __syncwarp();
}

/* A float mask's value in units of log2; -inf hides, the least float does not. */
__device__ __forceinline__ float fa_bias_log2(float x)
{
    return x == -CUDART_INF_F ? x : fmaxf(x * FA_LOG2E, -FLT_MAX);
}

/* s with bias in it, whose product with log2 e may have become -inf without being it, or which hides. Without branches:
 * they would hold all of s twice. */
__device__ __forceinline__ float fa_mend_biased(float s, float bias)
{
    float y = fmaxf(bias * FA_LOG2E, -FLT_MAX);
    s = bias < -1e38f ? y : s;
    return bias == -CUDART_INF_F ? bias : s;
}

/* Pair j of the elements of this thread. */
template <int BN> __device__ __forceinline__ uint32_t fa_load_bias(const char *bias, int j)
{
    /* of pair 0; that of group c is where these bits are turned by c: fa_bias_place */
    uint32_t at = fa_shared_address(bias) + fa_bias_place<BN>(threadIdx.x % FA_WARP / 4, 0) + threadIdx.x % 4 * 4;
    return fa_load_shared((at ^ j / 2 * 16) + j % 2 * (8 * BN * 2));
}

/* s = s * scale + mask. Values that may be the least float or -inf are looked for in pairs first: they are rare, or all
 * in one place. */
template <typename T, int BN>
__device__ __forceinline__ void fa_add_bias(float (&s)[BN / 2], const char *bias, float scale)
{
    uint32_t least = fa_pack<T>(0.f, 0.f);
#pragma unroll
    for (int j = 0; j < BN / 4; j++) {
        uint32_t w = fa_load_bias<BN>(bias, j);
        float2 b = fa_widen_pair<T>(w);
        least = fa_min_pair<T>(least, w);
        s[2 * j] = fmaf(s[2 * j], scale, b.x * FA_LOG2E);
        s[2 * j + 1] = fmaf(s[2 * j + 1], scale, b.y * FA_LOG2E);
    }
    float2 low = fa_widen_pair<T>(least);
    if (!__any_sync(0xffffffff, fminf(low.x, low.y) < -1e38f))
        return;
#pragma unroll
    for (int j = 0; j < BN / 4; j++) {
        uint32_t w = fa_load_bias<BN>(bias, j);
        float2 b = fa_widen_pair<T>(w);
        s[2 * j] = fa_mend_biased(s[2 * j], b.x);
        s[2 * j + 1] = fa_mend_biased(s[2 * j + 1], b.y);
        if (j % 4 == 3)
            __syncwarp(); /* so that the assembler does not hold all words at once */
    }
}

/* The same of a mask of float32: read when it is needed, a few elements at a time. */
template <int BN>
__device__ __forceinline__ void fa_add_wide_bias(float (&s)[BN / 2], const fa_fwd_sm90_mod_params &p,
                                                 const fa_mod_tile &t, fa_mod_place at, float scale)
{
    const float *row[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
        row[i] = (const float *)p.a.mask.data + fa_mask_row(p, t, at.row + 8 * i);
#pragma unroll
    for (int c = 0; c < BN / 8; c++) {
        float b[4];
#pragma unroll
        for (int e = 0; e < 4; e++)
            b[e] = row[e / 2][min(at.column + 8 * c + e % 2, p.plain.SK - 1) * p.mask[3]];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            float &to = s[4 * c + e];
            to = fa_mend_biased(fmaf(to, scale, b[e] * FA_LOG2E), b[e]);
        }
        asm volatile("" ::: "memory"); /* so that the loads of all groups are not held at once */
    }
}

/* ---- arithmetic on scores ---------------------------------------------------------------------------------------- */

/* tanh to 1e-7: 1 - 2 / (1 + e^2x) */
__device__ __forceinline__ float fa_tanh(float x)
{
    return fmaf(-2.f, fa_reciprocal(1.f + fa_exp2(2 * FA_LOG2E * x)), 1.f);
}

/* Softcap of a small score s is s times this, z being s * s: the special functions are left to the softmax. How small
 * and how exact: fill_softcap. */
__device__ __forceinline__ float fa_cap_factor(const fa_fwd_sm90_mod_params &p, float z)
{
    return fmaf(fmaf(p.cap_terms[2], z, p.cap_terms[1]), z, p.cap_terms[0]);
}

/* Are all of the warp's small? As with most caps they are. top: the bits of the largest square of this thread's; they
 * are in the order of squares, and NaN is above all. */
__device__ __forceinline__ bool fa_cap_is_far(const fa_fwd_sm90_mod_params &p, int top)
{
    return __all_sync(0xffffffff, __int_as_float(top) <= p.cap_limit);
}

/* s = cap tanh(s scale) */
template <int R> __device__ __forceinline__ void fa_softcap_near(float (&s)[R], const fa_fwd_sm90_mod_params &p)
{
#pragma unroll
    for (int e = 0; e < R; e++)
        s[e] = p.cap * fa_tanh(s[e] * p.scale);
}

template <int R> __device__ __forceinline__ void fa_softcap(float (&s)[R], const fa_fwd_sm90_mod_params &p)
{
    int top = 0;
#pragma unroll
    for (int e = 0; e < R; e += 2)
        top = __vimax3_s32(top, __float_as_int(s[e] * s[e]), __float_as_int(s[e + 1] * s[e + 1]));
    if (!fa_cap_is_far(p, top)) {
        fa_softcap_near(s, p);
        return;
    }
#pragma unroll
    for (int e = 0; e < R; e++)
        s[e] *= fa_cap_factor(p, s[e] * s[e]);
}

/* s = s scale - slope |i + offset - j| */
template <int BN>
__device__ __forceinline__ void fa_add_alibi(float (&s)[BN / 2], const fa_mod_tile &t, fa_mod_place at, float scale)
{
    float slope = t.slope;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float ahead = (float)(at.row + 8 * i + t.offset - at.column);
#pragma unroll
        for (int c = 0; c < BN / 8; c++)
#pragma unroll
            for (int x = 0; x < 2; x++) {
                float &to = s[4 * c + 2 * i + x];
                to = fmaf(to, scale, -slope * fabsf(ahead - (float)(8 * c + x)));
            }
    }
}

/* Do all keys of the block lie on one side of all the warp's queries? */
template <int BN> __device__ __forceinline__ bool fa_alibi_is_straight(const fa_mod_tile &t, fa_mod_place at)
{
    int ahead = at.row + t.offset - at.column;
    return __all_sync(0xffffffff, ahead >= BN || ahead <= -16);
}

/* Does ALiBi raise scores from the blocks before to this one by so much that the maximum so far will not do? Most
 * likely, where a block's worth of slope is 4 powers of 2. Blocks come in the order of fa_block_in_turn (NEAR_FIRST),
 * or from the last to the first. */
template <int BN, bool NEAR_FIRST>
__device__ __forceinline__ bool fa_alibi_climbs(const fa_mod_tile &t, int row, int key)
{
    int ahead = row + t.offset - key; /* of the first query of 64 over the first key */
    bool falls = ahead < BN && (!NEAR_FIRST || ahead > -64);
    return __any_sync(0xffffffff, t.slope * BN > 4.f ? falls : t.slope * BN < -4.f && ahead > -64);
}

/* ---- dropout ----------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ uint32_t fa_dropout_head(const fa_fwd_sm90_mod_params &p, const fa_mod_tile &t)
{
    return (uint32_t)((p.a.first_batch + t.n) * p.plain.HQ + t.h);
}

/* Lane i of a warp computes what column i of the block's BN / 4 adds to random numbers, for all of the warp's rows. */
template <int BN>
__device__ __forceinline__ void fa_fetch_columns(const fa_fwd_sm90_mod_params &p, const fa_mod_tile &t, int key,
                                                 char *columns)
{
    int lane = threadIdx.x % FA_WARP;
    if (lane < BN / 4)
        ((uint4 *)columns)[lane] =
            fa_draw_column(p.dropout, fa_dropout_column((uint32_t)key) + lane, fa_dropout_head(p, t));
    __syncwarp();
}

/* What the softmax does with its weights, 16 keys at a time: an evaluation serves eight of this thread's, a pair of
 * columns in two groups of 8, in both rows. ALONE: no other option, and not OFTEN; what its columns add lies in shared
 * memory. */
template <bool ALONE> struct fa_dropping {
    const fa_sm90_dropout &d;
    uint32_t column, bh; /* of the first evaluation; ALONE: where it lies */
    uint2 row;

    __device__ __forceinline__ fa_dropping(const fa_fwd_sm90_mod_params &p, const fa_mod_tile &t, fa_mod_place at,
                                           const char *columns)
        : d(p.dropout), bh(fa_dropout_head(p, t))
    {
        column = ALONE ? fa_shared_address(columns) + threadIdx.x % 4 * 16 : fa_dropout_column((uint32_t)at.column);
        row = fa_draw_row(d, fa_dropout_row((uint32_t)at.row), bh);
    }

    /* The weights of 16 keys wait for an evaluation of the 16 before, else the assembler puts all evaluations last. */
    __device__ __forceinline__ void tie(float &x, uint32_t kept) const
    {
        x = __uint_as_float(__float_as_uint(x) ^ kept & d.zero);
    }

    /* Beside the special function, not before: that is what `volatile` is for. */
    __device__ __forceinline__ void operator()(uint32_t (&kept)[4], int a) const
    {
        uint4 own;
        if (ALONE) {
            asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(own.x), "=r"(own.y), "=r"(own.z), "=r"(own.w)
                         : "r"(column + 64 * a)
                         : "memory");
        } else {
            uint32_t at = column + 4 * a;
            asm volatile("" : "+r"(at));
            own = fa_draw_column(d, at, bh);
        }
        fa_philox4 r = fa_draw_signs<!ALONE>(d, own, row);
#pragma unroll
        for (int i = 0; i < 4; i++)
            kept[i / 2 + i % 2 * 2] = fa_mask_of_signs(r.word[i], 0xbb99) ^ (ALONE ? 0 : d.flip);
    }
};

/* ---- a block ----------------------------------------------------------------------------------------------------- */

template <int BN>
__device__ __forceinline__ void fa_copy_mask(const fa_fwd_sm90_mod_params &p, int what, const fa_mod_tile &t, int row,
                                             int key, char *to)
{
    fa_mod_place at = fa_mod_place_of(row, key);
    if (what & FA_MOD_BITS)
        fa_copy_seen<BN>(p, t, at, to);
    else
        fa_copy_bias<BN>(p, t, at, to);
}

/* The mask of the next block of the tile is on its way to `next` while this one's is used: it comes from far. */
template <int BN>
__device__ __forceinline__ void fa_mod_fetch(const fa_fwd_sm90_mod_params &p, int what, const fa_mod_tile &t, int row,
                                             int key, bool fresh, bool last, fa_mod_block &m, char *next)
{
    fa_mod_place at = fa_mod_place_of(row, key);
    if (what & FA_MOD_VECTORS) {
        __syncwarp(); /* the mask that was at `next` is used up */
        if (fresh)
            fa_copy_mask<BN>(p, what, t, row, key, m.mask);
        ptx_cp_async_commit();
        if (!last)
            fa_copy_mask<BN>(p, what, t, row, key - BN, next);
        ptx_cp_async_commit();
        ptx_cp_async_wait<1>();
        __syncwarp();
        if (what & FA_MOD_BITS)
            fa_take_seen<BN>(m);
    } else if (what & FA_MOD_BITS) {
        fa_fetch_seen_singly<BN>(p, t, at, m);
    } else if ((what & (FA_MOD_BIAS | FA_MOD_WIDE)) == FA_MOD_BIAS) {
        fa_fetch_bias_singly<BN>(p, t, at, m.mask);
    }
}

/* Scores in units of log2: scale, softcap, float mask, ALiBi. */
template <typename T, int BN>
__device__ __forceinline__ void fa_scale_scores(const fa_fwd_sm90_mod_params &p, int what, const fa_mod_tile &t,
                                                fa_mod_place at, const fa_mod_block &m, float (&s)[BN / 2])
{
    float scale = p.scale; /* that is still to be applied */
    if (what & FA_MOD_CAP) {
        fa_softcap(s, p);
        scale = 1.f;
    }
    if (what & FA_MOD_BIAS) {
        if (what & FA_MOD_WIDE)
            fa_add_wide_bias<BN>(s, p, t, at, scale);
        else
            fa_add_bias<T, BN>(s, m.mask, scale);
        scale = 1.f;
    }
    if (what & FA_MOD_ALIBI) {
        fa_add_alibi<BN>(s, t, at, scale);
    } else if (!(what & (FA_MOD_CAP | FA_MOD_BIAS))) {
#pragma unroll
        for (int e = 0; e < BN / 2; e++)
            s[e] *= scale;
    }
}

template <typename T, int BN>
__device__ __forceinline__ void fa_mod_scores(const fa_fwd_sm90_mod_params &p, int what, const fa_mod_tile &t, int row,
                                              int key, const fa_mod_block &m, float (&s)[BN / 2])
{
    if (what & FA_MOD_SCALED)
        fa_scale_scores<T, BN>(p, what, t, fa_mod_place_of(row, key), m, s);
    if (what & FA_MOD_BITS)
        fa_hide_unseen<BN>(s, m);
}

/* ---- scores that are made together with their weights ------------------------------------------------------------ */

/* Can the block's be? They can where fa_mod_scores would take its common way; with a softcap that shows when they are
 * made. */
template <int BN, int OPTIONS>
__device__ __forceinline__ bool fa_can_be_late(const fa_mod_tile &t, fa_mod_place at, const fa_mod_block &m)
{
    return OPTIONS == FA_BITS || OPTIONS == FA_CAP || (OPTIONS == FA_BIAS && m.tame) ||
           (OPTIONS == FA_ALIBI && fa_alibi_is_straight<BN>(t, at));
}

/* The same values as from fa_mod_scores, for one option; the arithmetic hides behind the softmax's special function. */
template <typename T, int BN, int OPTIONS> struct fa_late_scores {
    float (&s)[BN / 2]; /* products */
    const fa_fwd_sm90_mod_params &p;
    const fa_mod_block &m;
    float c;
    float slope, alibi[2]; /* ALiBi of row i and column 8 c + x of the block: alibi[i] + (8 c + x) slope */
    mutable int top;       /* of a softcap: fa_cap_is_far */

    __device__ __forceinline__ void renew(void) const
    {
        if (OPTIONS == FA_CAP)
            fa_wgmma_hold(s);
    }
    __device__ __forceinline__ bool good(void) const
    {
        return OPTIONS != FA_CAP || fa_cap_is_far(p, top);
    }
    __device__ __forceinline__ float2 values(int j, float scale, float base) const
    {
        float x = s[2 * j], y = s[2 * j + 1];
        if (OPTIONS == FA_BITS) {
            uint32_t seen = m.seen[j % 2] >> fa_seen_bit(j / 2, 0);
            return make_float2(seen & 1 ? fmaf(x, scale, base) : -CUDART_INF_F,
                               seen & 2 ? fmaf(y, scale, base) : -CUDART_INF_F);
        }
        if (OPTIONS == FA_CAP) {
            float u = x * x, v = y * y;
            top = __vimax3_s32(top, __float_as_int(u), __float_as_int(v));
            return make_float2(fmaf(x, fa_cap_factor(p, u), base), fmaf(y, fa_cap_factor(p, v), base));
        }
        if (OPTIONS == FA_ALIBI) {
            float first = alibi[j % 2] + base, column = 8 * (j / 2);
            return make_float2(fmaf(x, p.scale, fmaf(column, slope, first)),
                               fmaf(y, p.scale, fmaf(column + 1, slope, first)));
        }
        float2 b = fa_widen_pair<T>(fa_load_bias<BN>(m.mask, j));
        return make_float2(fmaf(x, p.scale, fmaf(b.x, FA_LOG2E, base)), fmaf(y, p.scale, fmaf(b.y, FA_LOG2E, base)));
    }
    __device__ __forceinline__ float2 pair(int j) const
    {
        return values(j, 1.f, 0.f);
    }
    __device__ __forceinline__ float2 powers(int j, float base) const
    {
        return values(j, c, base);
    }
};

template <typename T, int BN, int OPTIONS>
__device__ __forceinline__ fa_late_scores<T, BN, OPTIONS>
fa_late_scores_of(const fa_fwd_sm90_mod_params &p, const fa_mod_tile &t, fa_mod_place at, const fa_mod_block &m,
                  float (&s)[BN / 2])
{
    int ahead = at.row + t.offset - at.column;
    float slope = OPTIONS == FA_ALIBI ? (ahead > 0 ? t.slope : -t.slope) : 0.f;
    return {s, p, m, p.plain.scale_log2, slope, {-slope * (float)ahead, -slope * (float)(ahead + 8)}, 0};
}

/* ---- the end of a tile ------------------------------------------------------------------------------------------- */

/* As fa_finish_rows; a sink is one more key whose value is 0. Rows from q_len on are no queries. */
__device__ __forceinline__ fa_rows_out fa_mod_finish(const fa_fwd_sm90_mod_params &p, const fa_mod_tile &t,
                                                     const fa_rows &r, int row)
{
    fa_rows_out f;
    int at = fa_mod_place_of(row, 0).row;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float sum = fa_quad_sum(r.l[i]), m = r.m[i] * p.plain.scale_log2, top = m, shrink = 1.f;
        bool blind = m == -CUDART_INF_F && sum == 0.f, query = at + 8 * i < t.q_len;
        if (p.a.sinks.data) {
            top = t.sink > m || isnan(t.sink) ? t.sink : m;
            if (top != -CUDART_INF_F) {
                shrink = fa_exp2(m - top);
                sum = sum * shrink + fa_exp2(t.sink - top);
            }
        }
        f.empty[i] = blind || !query || p.dropout.factor == 0.f;
        f.factor[i] = fa_reciprocal(sum) * shrink * p.dropout.factor;
        f.lse[i] = (top + fa_log2(sum)) * 0.693147180559945f;
        if (top <= -FLT_MAX && !isnan(sum)) /* where a float mask was cut off */
            f.lse[i] = -FLT_MAX;
        if (sum == 0.f || !query)
            f.lse[i] = -CUDART_INF_F;
    }
    return f;
}

#endif
