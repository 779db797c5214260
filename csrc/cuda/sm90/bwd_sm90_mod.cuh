/* Weights of the Hopper backward kernel with masks, softcap, ALiBi and dropout: one pass over a tile for each option
 * that the call has.
 *
 * With dropout and softcap dS needs other weights than dV:
 *   dV += (P kept)^T dO     dS = P' o (keep kept dP - delta),  P' = P d softcap(s) / ds
 * P' is never negative, so its sign says what is dropped: two matrices in one go through shared memory. The factor
 * keep, the factor of dropout, of dV is applied at the end. */
#ifndef FA_BWD_SM90_MOD_CUH
#define FA_BWD_SM90_MOD_CUH

#include "../ptx/tma.cuh"
#include "bwd_sm90_tile.cuh"

/* tanh; 4e-7 of its value: a series near 0, where 1 - e would cancel. */
__device__ __forceinline__ float fa_tanh(float x)
{
    float e = fa_exp2(-2.f * FA_LOG2E * fabsf(x)), y = x * x;
    float far = copysignf((1.f - e) * fa_reciprocal(1.f + e), x);
    float near = fmaf(fmaf(fmaf(-17.f / 315.f, y, 2.f / 15.f), y, -1.f / 3.f), y, 1.f) * x;
    return y < 0.0625f ? near : far;
}

/* s becomes cap tanh(cap_scale s) - lse; slopes: d softcap / ds, rounded; a number also where s is NaN, since P of a
 * hidden pair, 0, is multiplied by it. */
template <class C>
__device__ __forceinline__ void fa_cap_scores(const fa_bwd_mod &mod, float (&s)[C::BM / 2], const float *row,
                                              uint32_t (&slopes)[C::BM / 4])
{
    const float2 *lse = (const float2 *)row + threadIdx.x % 4;
#pragma unroll
    for (int c = 0; c < C::BM / 8; c++) {
        float2 l = lse[4 * c];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float &a = s[4 * c + 2 * r], &b = s[4 * c + 2 * r + 1];
            float x = fa_tanh(a * mod.cap_scale), y = fa_tanh(b * mod.cap_scale);
            slopes[2 * c + r] = fa_pack<typename C::T>(fmaxf(fmaf(-x, x, 1.f), 0.f), fmaxf(fmaf(-y, y, 1.f), 0.f));
            a = fmaf(x, mod.cap, -l.x);
            b = fmaf(y, mod.cap, -l.y);
        }
    }
}

/* ---- what is added ----------------------------------------------------------------------------------------------- */

/* The least number counts as a number also in units of log2, and so does everything below FA_BWD_LEAST: -2^127, of
 * which the product is exact. */
__device__ __forceinline__ float fa_bias_of(float x)
{
    return fmaxf(x * FA_LOG2E, FA_BWD_LEAST);
}

/* E: element of the mask, read in place, 16 loads at a time; what lies outside is read from the last row or column, and
 * hidden. Neighbouring lanes have neighbouring keys. */
template <class C, typename E>
__device__ __forceinline__ void fa_add_bias(const fa_bwd_sm90_params &p, const void *mask, float (&s)[C::BM / 2],
                                            fa_place at)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const E *from = (const E *)mask + min(at.key + 8 * r, p.SK - 1) * p.mod.mask_key;
#pragma unroll
        for (int first = 0; first < C::BM / 4; first += 16) {
            E value[16];
#pragma unroll
            for (int i = 0; i < 16; i++)
                value[i] = from[min(at.query + (first + i) / 2 * 8 + i % 2, p.SQ - 1) * p.mod.mask_query];
#pragma unroll
            for (int i = 0; i < 16; i++)
                s[(first + i) / 2 * 4 + 2 * r + i % 2] += fa_bias_of(fa_widen(value[i]));
        }
    }
}

/* A mask that is the same for all queries. */
template <class C, typename E>
__device__ __forceinline__ void fa_add_key_bias(const fa_bwd_sm90_params &p, const void *mask, float (&s)[C::BM / 2],
                                                fa_place at)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float x = fa_bias_of(fa_widen(((const E *)mask)[min(at.key + 8 * r, p.SK - 1) * p.mod.mask_key]));
#pragma unroll
        for (int c = 0; c < C::BM / 8; c++) {
            s[4 * c + 2 * r] += x;
            s[4 * c + 2 * r + 1] += x;
        }
    }
}

template <class C, typename E>
__device__ __forceinline__ void fa_add_mask(const fa_bwd_sm90_params &p, const void *mask, float (&s)[C::BM / 2],
                                            fa_place at)
{
    if (p.mod.mask_query == 0)
        fa_add_key_bias<C, E>(p, mask, s, at);
    else
        fa_add_bias<C, E>(p, mask, s, at);
}

/* ---- tiles of a float mask in shared memory ---------------------------------------------------------------------- */

/* Two numbers of a mask, those below -2^127 raised to it. */
template <typename T> __device__ __forceinline__ uint32_t fa_not_least(uint32_t w)
{
    return w; /* fp16 has none */
}

template <> __device__ __forceinline__ uint32_t fa_not_least<fa_bf16_t>(uint32_t w)
{
    uint32_t y;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(w), "r"(0xff00ff00u));
    return y;
}

/* Rows of 16-bit elements, read transposed: the pairs of queries come as the accumulator has them. key: of the
 * thread block's, the first of the warp's 16. */
template <class C>
__device__ __forceinline__ void fa_add_tile(const unsigned char *tile, float (&s)[C::BM / 2], int key)
{
    int lane = threadIdx.x % FA_WARP, row = lane / 16 * 8 + lane % 8, chunk = key % 64 / 8 + lane / 8 % 2;
    uint32_t at = fa_shared_address(tile) + key / 64 * (C::BM * 128) + row * 128 + ((chunk ^ row % 8) << 4);
#pragma unroll
    for (int i = 0; i < C::BM / 16; i++) {
        uint32_t w[4];
        fa_ldmatrix_x4_trans(w, at + i * (16 * 128));
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float2 x = fa_unpack<typename C::T>(fa_not_least<typename C::T>(w[j]));
            s[8 * i + 2 * j] = fmaf(x.x, FA_LOG2E, s[8 * i + 2 * j]);
            s[8 * i + 2 * j + 1] = fmaf(x.y, FA_LOG2E, s[8 * i + 2 * j + 1]);
        }
    }
}

/* Rows of fp32: panels of 32 keys. place: key and query of the thread, in the tile. */
template <class C>
__device__ __forceinline__ void fa_add_tile_f32(const unsigned char *tile, float (&s)[C::BM / 2], fa_place place)
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int key = place.key + i / 2 * 8, query = place.query + i % 2, chunk = key % 32 / 4 ^ query % 8;
        const unsigned char *from = tile + key / 32 * (C::BM * 128) + query * 128 + chunk * 16 + key % 4 * 4;
#pragma unroll
        for (int c = 0; c < C::BM / 8; c++)
            s[4 * c + i] += fa_bias_of(*(const float *)(from + c * (8 * 128)));
    }
}

/* of step t, once it is there */
template <class C>
__device__ __forceinline__ void fa_take_tile(const fa_bwd_mod &mod, fa_bwd_sm90_shared<C> &sh, int t, int row,
                                             float (&s)[C::BM / 2])
{
    fa_mbar_wait(&sh.bar[FA_BAR_BIAS_FULL], t & 1);
    if (C::BM * C::BN * 4 <= C::BIAS_BYTES && mod.f32)
        fa_add_tile_f32<C>(sh.bias, s, fa_place_of(row, 0));
    else
        fa_add_tile<C>(sh.bias, s, row + threadIdx.x / FA_WARP % 4 * 16);
    fa_warp_arrive(&sh.bar[FA_BAR_BIAS_EMPTY]);
}

/* ---- what is added, hidden or dropped ---------------------------------------------------------------------------- */

/* offset: of query 0 among the keys */
template <class C>
__device__ __forceinline__ void fa_add_alibi(float (&s)[C::BM / 2], float slope, fa_place at, int offset)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float ahead = (float)(at.query + offset - at.key - 8 * r);
#pragma unroll
        for (int c = 0; c < C::BM / 8; c++) {
#pragma unroll
            for (int x = 0; x < 2; x++)
                s[4 * c + 2 * r + x] = fmaf(-slope, fabsf(ahead + (float)(8 * c + x)), s[4 * c + 2 * r + x]);
        }
    }
}

/* bits: those of the thread's first key; the second lies 8 * step further */
template <class C>
__device__ __forceinline__ void fa_hide_by_bits(const uint64_t (&bits)[C::BM / 64][C::BITS ? C::BN : 2], int key,
                                                int step, float (&s)[C::BM / 2])
{
#pragma unroll
    for (int half = 0; half < C::BM / 64; half++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            uint64_t seen = bits[half][(key + 8 * r) * step] >> (2 * (threadIdx.x % 4));
            uint32_t word[2] = {(uint32_t)seen, (uint32_t)(seen >> 32)};
#pragma unroll
            for (int i = 0; i < 16; i++) {
                float &score = s[4 * (8 * half + i / 2) + 2 * r + i % 2];
                score = word[i / 8] >> (i / 2 % 4 * 8 + i % 2) & 1 ? score : -CUDART_INF_F;
            }
        }
    }
}

/* Which weights dropout keeps. Two lanes with neighbouring keys share their evaluations, of which each serves one of two
 * neighbouring queries: each lane draws those of one query, for both, and they exchange signs. */
template <class C> struct fa_kept {
    static constexpr bool OFTEN = C::OPTIONS & FA_MOD_OFTEN;
    uint32_t bits[C::BM / 64]; /* of 64 queries; bit 8 (2 r + x) + 7 - c: query 8 c + x, key 8 r */

    __device__ __forceinline__ void draw(const fa_bwd_mod &mod, int head, fa_place at)
    {
        uint32_t bh = mod.first_head + head, odd = threadIdx.x / 4 % 2, row = fa_dropout_row(at.query) + odd;
        uint4 column = fa_draw_column(mod.dropout, fa_dropout_column(at.key), bh);
#pragma unroll
        for (int half = 0; half < C::BM / 64; half++) {
            uint32_t own = 0;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                uint2 own_row = fa_draw_row(mod.dropout, row + 32 * half + 8 * i, bh);
                fa_philox4 r = fa_draw_signs<OFTEN>(mod.dropout, column, own_row);
                own |= fa_bytes_of_signs(r.word[0], r.word[1]) & 0x80808080u >> 2 * i;
                own |= fa_bytes_of_signs(r.word[2], r.word[3]) & 0x40404040u >> 2 * i;
            }
            uint32_t other = __shfl_xor_sync(0xffffffff, own, 4);
            bits[half] = __byte_perm(own, other, odd ? 0x3715 : 0x6240) ^ (OFTEN ? mod.dropout.flip : 0);
        }
    }

    /* of a pair of queries in group c and key r */
    __device__ __forceinline__ uint32_t mask(int c, int r) const
    {
        return fa_mask_of_signs(bits[c / 8] << c % 8, r ? 0xbbaa : 0x9988);
    }
};

/* ---- weights ----------------------------------------------------------------------------------------------------- */

/* From S of step t to P; slopes as fa_cap_scores has them. */
template <class C>
__device__ __forceinline__ void fa_mod_weights(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &sh,
                                               const fa_bwd_unit &u, int t, int key0, float (&s)[C::BM / 2],
                                               uint32_t (&slopes)[C::BM / 4])
{
    const fa_bwd_mod &mod = p.mod;
    int stage = fa_stage_of(t), query0 = sh.query[stage];
    fa_place at = fa_place_of(key0, query0);
    fa_wgmma_hold(s);
    if (fa_has<C>(mod, FA_MOD_CAP))
        fa_cap_scores<C>(mod, s, sh.lse[stage], slopes);
    else
        fa_scale_scores<C>(s, sh.lse[stage], p.scale_log2);
    if (C::BIAS_BYTES > 0 && fa_has<C>(mod, FA_MOD_TILES))
        fa_take_tile<C>(mod, sh, t, key0 - u.walk.n * C::BN, s);
    else if (fa_has<C>(mod, FA_MOD_BIAS) && mod.f32)
        fa_add_mask<C, float>(p, sh.mod.mask[stage], s, at);
    else if (fa_has<C>(mod, FA_MOD_BIAS))
        fa_add_mask<C, typename C::T>(p, sh.mod.mask[stage], s, at);
    if (fa_has<C>(mod, FA_MOD_ALIBI))
        fa_add_alibi<C>(s, sh.mod.slope[stage], at, fa_offset_of(p, u.band));
    if (fa_has<C>(mod, FA_MOD_BITS))
        fa_hide_by_bits<C>(sh.mod.bits[stage], at.key - u.walk.n * C::BN, mod.bits_key, s);
    if (!fa_all_seen<C>(u.band, key0, query0))
        fa_hide<C>(u.band, s, at);
    fa_exponentials<C>(s);
}

/* w <- P, what is dropped 0; to: this thread's place for the weights of dS. */
template <class C>
__device__ __forceinline__ void fa_round_weights(const fa_bwd_mod &mod, const fa_bwd_sm90_shared<C> &sh, int t,
                                                 int key0, const float (&s)[C::BM / 2], uint32_t (&w)[C::BM / 4],
                                                 uint4 *to)
{
    int stage = fa_stage_of(t);
    bool drops = fa_has<C>(mod, FA_MOD_DROPOUT);
    fa_kept<C> kept = {};
    if (drops)
        kept.draw(mod, sh.mod.head[stage], fa_place_of(key0, sh.query[stage]));
#pragma unroll
    for (int i = 0; i < C::BM / 16; i++) {
        uint32_t x[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int c = 2 * i + j / 2, r = j % 2;
            float a = s[4 * c + 2 * r], b = s[4 * c + 2 * r + 1];
            float2 slope = make_float2(1.f, 1.f);
            if (fa_has<C>(mod, FA_MOD_CAP))
                slope = fa_unpack<typename C::T>(w[2 * c + r]);
            x[j] = fa_pack<typename C::T>(a * slope.x, b * slope.y);
            w[2 * c + r] = fa_pack<typename C::T>(a, b);
            if (drops) {
                uint32_t mask = kept.mask(c, r);
                x[j] |= ~mask & 0x80008000u;
                w[2 * c + r] &= mask;
            }
        }
        to[i * FA_WARPGROUP] = make_uint4(x[0], x[1], x[2], x[3]);
    }
}

/* The weights of dS back from shared memory; from: the same thread's place. */
template <class C> __device__ __forceinline__ void fa_fetch_weights(uint32_t (&w)[C::BM / 4], const uint4 *from)
{
#pragma unroll
    for (int i = 0; i < C::BM / 16; i++) {
        uint4 x = from[i * FA_WARPGROUP];
        w[4 * i] = x.x;
        w[4 * i + 1] = x.y;
        w[4 * i + 2] = x.z;
        w[4 * i + 3] = x.w;
    }
}

/* As fa_score_gradient, with weights whose sign says what is dropped. */
template <class C>
__device__ __forceinline__ void fa_signed_score_gradient(float (&dp)[C::BM / 2], const uint32_t (&w)[C::BM / 4],
                                                         const float *row, float keep)
{
    const float2 *delta = (const float2 *)row + threadIdx.x % 4;
#pragma unroll
    for (int c = 0; c < C::BM / 8; c++) {
        float2 d = delta[4 * c];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float &x = dp[4 * c + 2 * r], &y = dp[4 * c + 2 * r + 1];
            float2 weight = fa_unpack<typename C::T>(w[2 * c + r]);
            x = fabsf(weight.x) * fmaf(x, w[2 * c + r] & 0x8000u ? 0.f : keep, -d.x);
            y = fabsf(weight.y) * fmaf(y, w[2 * c + r] & 0x80000000u ? 0.f : keep, -d.y);
        }
    }
}

/* ---- producer: what belongs to the head of a step ---------------------------------------------------------------- */

template <typename T>
__device__ __forceinline__ float fa_number_at(const void *data, bool f32, int64_t at)
{
    return f32 ? ((const float *)data)[at] : fa_widen(((const T *)data)[at]);
}

/* The tile of a float mask for step t. */
template <class C>
__device__ __forceinline__ void fa_load_bias(const fa_bwd_mod &mod, fa_bwd_sm90_shared<C> &s, const fa_bwd_unit &u,
                                             const fa_bwd_step &at)
{
    if (C::BIAS_BYTES == 0 || !fa_has<C>(mod, FA_MOD_TILES))
        return;
    uint64_t *full = &s.bar[FA_BAR_BIAS_FULL];
    int columns = mod.f32 ? 32 : 64; /* of a panel */
    fa_mbar_wait(&s.bar[FA_BAR_BIAS_EMPTY], at.t & 1 ^ 1);
    fa_mbar_expect(full, C::BN / columns * C::BM * 128);
    for (int panel = 0; panel < C::BN / columns; panel++) {
        unsigned char *to = s.bias + panel * (C::BM * 128);
        int key = u.walk.n * C::BN + panel * columns, query = at.m * C::BM;
        int head = at.head * mod.mask_steps[0], batch = u.b * mod.mask_steps[1];
        if (mod.mask_once)
            fa_tma_load_4d_once(to, &mod.mask_map, full, key, query, head, batch);
        else
            fa_tma_load_4d(to, &mod.mask_map, full, key, query, head, batch);
    }
}

/* Bytes that fa_load_bits copies. */
template <class C> __device__ __forceinline__ uint32_t fa_bits_bytes(const fa_bwd_mod &mod)
{
    return fa_has<C>(mod, FA_MOD_BITS) ? C::BM / 64 * (mod.bits_key ? C::BN * 8 : 16) : 0;
}

template <class C>
__device__ __forceinline__ void fa_load_bits(const fa_bwd_mod &mod, fa_bwd_sm90_shared<C> &s, const fa_bwd_unit &u,
                                             const fa_bwd_step &at, int stage, uint64_t *bar)
{
    if (!fa_has<C>(mod, FA_MOD_BITS))
        return;
    const uint64_t *bits = mod.bits + u.b * mod.bits_batch + at.head * mod.bits_head +
                           (int64_t)u.walk.n * C::BN * mod.bits_key;
#pragma unroll
    for (int i = 0; i < C::BM / 64; i++)
        fa_bulk_load(s.mod.bits[stage][i], bits + (at.m * (C::BM / 64) + i) * mod.bits_block,
                     fa_bits_bytes<C>(mod) / (C::BM / 64), bar);
}

template <class C>
__device__ __forceinline__ void fa_describe_head(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &s,
                                                 const fa_bwd_unit &u, int head, int stage)
{
    const fa_bwd_mod &mod = p.mod;
    int64_t at = u.b * mod.mask_batch + head * mod.mask_head;
    s.mod.head[stage] = u.b * p.HQ + head;
    s.mod.mask[stage] = (const char *)mod.mask + at * (mod.f32 ? 4 : 2);
    if (fa_has<C>(mod, FA_MOD_ALIBI))
        s.mod.slope[stage] = FA_LOG2E * fa_number_at<typename C::T>(mod.alibi, mod.alibi_f32,
                                                                    u.b * mod.alibi_batch + head * mod.alibi_head);
}

#endif
