/* Products and elementwise steps of the consumers of the Hopper backward kernel, and their results. */
#ifndef FA_BWD_SM90_TILE_CUH
#define FA_BWD_SM90_TILE_CUH

#include "../ptx/math.cuh"
#include "../ptx/shared_store.cuh"
#include "../ptx/warpgroup.cuh"
#include "../tile/store_rows.cuh"
#include "bwd_sm90_shared.cuh"

/* S^T or dP^T (64 keys, BM): A = K or V, B = Q or dO, both contiguous along COLUMNS, the summed dimension. */
template <class C, int COLUMNS>
__device__ __forceinline__ void fa_issue_scores(float (&s)[C::BM / 2], uint64_t keys, uint64_t queries)
{
#pragma unroll
    for (int i = 0; i < COLUMNS / 16; i++) {
        int panel = i / 4, within = i % 4 * 2; /* 16 columns are 32 bytes */
        fa_wgmma<typename C::T, C::BM>::template ss<0, 0>(s, keys + panel * (C::BN * 128 / 16) + within,
                                                          queries + panel * (C::BM * 128 / 16) + within, i > 0);
    }
}

/* Sum (64, COLUMNS) in registers. In parts of at most 192 columns: an instruction can name no more registers than a
 * thread has when the kernel starts. */
template <int COLUMNS> struct fa_gradient {
    static constexpr int N = COLUMNS > 192 ? COLUMNS / 2 : COLUMNS;
    float part[COLUMNS / N][N / 2];

    __device__ __forceinline__ void clear(void)
    {
#pragma unroll
        for (int i = 0; i < COLUMNS / 2; i++)
            part[i / (N / 2)][i % (N / 2)] = 0.f;
    }

    __device__ __forceinline__ void hold(void)
    {
#pragma unroll
        for (int i = 0; i < COLUMNS / N; i++)
            fa_wgmma_hold(part[i]);
    }
};

/* dV (64 keys, COLUMNS) += P^T dO, or dK += dS^T Q: A in registers, B contiguous along N. */
template <class C, int COLUMNS>
__device__ __forceinline__ void fa_issue_gradient(fa_gradient<COLUMNS> &d, const uint32_t (&w)[C::BM / 4],
                                                  uint64_t queries)
{
    constexpr int N = fa_gradient<COLUMNS>::N;
#pragma unroll
    for (int part = 0; part < COLUMNS / N; part++) {
#pragma unroll
        for (int i = 0; i < C::BM / 16; i++)
            fa_wgmma<typename C::T, N>::template rs<1>(
                d.part[part], &w[4 * i], queries + part * N / 64 * (C::BM * 128 / 16) + i * (16 * 128 / 16), 1);
    }
}

/* Rows (keys) of the accumulator that this thread holds: key, key + 8; columns (queries): query + 8 c + 0, 1. */
struct fa_place {
    int key, query;
};

__device__ __forceinline__ fa_place fa_place_of(int key0, int query0)
{
    int lane = threadIdx.x % FA_WARP, warp = threadIdx.x / FA_WARP % 4;
    fa_place at = {key0 + 16 * warp + lane / 4, query0 + 2 * (lane % 4)};
    return at;
}

/* Is each of 64 keys from key0 on seen by each of BM queries from query0 on? Queries behind the last see nothing: their
 * scores are 0 times K, which is NaN where K is. */
template <class C> __device__ __forceinline__ bool fa_all_seen(const fa_bwd_band &band, int key0, int query0)
{
    return key0 + 64 <= band.SK && query0 + C::BM <= band.SQ && key0 >= query0 + C::BM - 1 + band.lo_shift &&
           key0 + 63 < query0 + band.hi_shift;
}

/* Scores that are hidden become -inf (after the multiplication by scale, which may be negative). */
template <class C>
__device__ __forceinline__ void fa_hide(const fa_bwd_band &band, float (&s)[C::BM / 2], fa_place at)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int key = at.key + 8 * r;
        int lo = key < band.SK ? key - band.hi_shift + 1 - at.query : INT32_MAX;
        int hi = min(key - band.lo_shift, band.SQ - 1) - at.query;
#pragma unroll
        for (int c = 0; c < C::BM / 8; c++) {
#pragma unroll
            for (int x = 0; x < 2; x++) {
                float &score = s[4 * c + 2 * r + x];
                score = 8 * c + x >= lo && 8 * c + x <= hi ? score : -CUDART_INF_F;
            }
        }
    }
}

/* s becomes scale log2e s - lse; row: lse of the block's queries. */
template <class C>
__device__ __forceinline__ void fa_scale_scores(float (&s)[C::BM / 2], const float *row, float scale_log2)
{
    const float2 *lse = (const float2 *)row + threadIdx.x % 4;
#pragma unroll
    for (int c = 0; c < C::BM / 8; c++) {
        float2 l = lse[4 * c];
#pragma unroll
        for (int i = 0; i < 4; i++)
            s[4 * c + i] = fmaf(s[4 * c + i], scale_log2, i % 2 ? -l.y : -l.x);
    }
}

template <class C> __device__ __forceinline__ void fa_exponentials(float (&s)[C::BM / 2])
{
#pragma unroll
    for (int i = 0; i < C::BM / 2; i++)
        s[i] = fa_exp2(s[i]);
}

template <class C> __device__ __forceinline__ void fa_round(uint32_t (&w)[C::BM / 4], const float (&s)[C::BM / 2])
{
#pragma unroll
    for (int i = 0; i < C::BM / 4; i++)
        w[i] = fa_pack<typename C::T>(s[2 * i], s[2 * i + 1]);
}

/* Has all of w decide something that is hardly ever so (no rounding gives NaNs of all ones) and does not matter: the
 * assembler then cannot move
 * the work behind the wait that follows, where it would no longer run beside the product in flight. */
template <int R> __device__ __forceinline__ void fa_settle(const uint32_t (&w)[R])
{
    uint32_t all = 0xffffffffu;
#pragma unroll
    for (int i = 0; i < R; i++)
        all &= w[i];
    asm volatile("{\n\t.reg .pred p;\n\tsetp.eq.u32 p, %0, 0xffffffff;\n\t@p nanosleep.u32 1;\n\t}" ::"r"(all)
                 : "memory");
}

template <typename T> __device__ __forceinline__ float2 fa_unpack(uint32_t w);

template <> __device__ __forceinline__ float2 fa_unpack<fa_bf16_t>(uint32_t w)
{
    return make_float2(__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u));
}

template <> __device__ __forceinline__ float2 fa_unpack<fa_f16_t>(uint32_t w)
{
    fa_f16_t lo = {(uint16_t)(w & 0xffff)}, hi = {(uint16_t)(w >> 16)};
    return make_float2(fa_widen(lo), fa_widen(hi));
}

/* dp becomes dS = P o (dP - delta); w: P, rounded; row: delta of the block's queries. HIDES: 0 where P is 0, whatever dP
 * is (bwd_sm90_wild.cuh). */
template <class C, bool HIDES = false>
__device__ __forceinline__ void fa_score_gradient(float (&dp)[C::BM / 2], const uint32_t (&w)[C::BM / 4],
                                                  const float *row)
{
    const float2 *delta = (const float2 *)row + threadIdx.x % 4;
#pragma unroll
    for (int c = 0; c < C::BM / 8; c++) {
        float2 d = delta[4 * c];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float2 weight = fa_unpack<typename C::T>(w[2 * c + r]);
            float &x = dp[4 * c + 2 * r], &y = dp[4 * c + 2 * r + 1];
            x = HIDES && weight.x == 0.f ? 0.f : weight.x * (x - d.x);
            y = HIDES && weight.y == 0.f ? 0.f : weight.y * (y - d.y);
        }
    }
}

/* dS^T to shared memory: rows `row` .. + 63 (keys) of panels of 64 queries. */
template <class C>
__device__ __forceinline__ void fa_store_ds(typename C::T *to, const uint32_t (&ds)[C::BM / 4], int row)
{
    int lane = threadIdx.x % FA_WARP, warp = threadIdx.x / FA_WARP % 4;
    uint32_t base = fa_shared_address(to) + (row + 16 * warp + lane % 16) * 128, swizzle = lane % 8;
#pragma unroll
    for (int i = 0; i < C::BM / 16; i++) {
        uint32_t chunk = 2 * i % 8 + lane / 16; /* 16 bytes: 8 queries */
        fa_stmatrix_x4(base + i / 4 * (C::BN * 128) + ((chunk ^ swizzle) << 4), ds[4 * i], ds[4 * i + 1], ds[4 * i + 2],
                       ds[4 * i + 3]);
    }
}

template <class C, int COLUMNS>
__device__ __forceinline__ void fa_store_gradient(const fa_bwd_sm90_params &p, const fa_bwd_sm90_view &v,
                                                  const fa_bwd_unit &u, fa_gradient<COLUMNS> &d, float factor, int key0,
                                                  int columns)
{
    if (!v.data)
        return;
    fa_rows_out f = {{factor, factor}, {0.f, 0.f}, {false, false}};
    int batch = fa_has<C>(p.mod, FA_MOD_PACKED) ? 0 : u.b;
    typename C::T *to = (typename C::T *)v.data + batch * v.batch + u.hk * v.head + u.k_first * v.row;
    constexpr int N = fa_gradient<COLUMNS>::N;
#pragma unroll
    for (int part = 0; part < COLUMNS / N; part++)
        fa_store_rows<typename C::T, N>(to + part * N, v.row, d.part[part], f, key0, u.k_rows, columns - part * N);
}

/* ---- steps of both kinds of consumers: start a product, finish what follows it ----------------------------------- */

/* Where the operands lie. */
template <class C> struct fa_bwd_keys {
    int row; /* of the block of keys: 0 or 64 */
    uint64_t k, v, q, dout, q_n, dout_n; /* descriptors; _n: contiguous along N */
};

template <class C> __device__ __forceinline__ fa_bwd_keys<C> fa_keys_of(fa_bwd_sm90_shared<C> &s, int row)
{
    fa_bwd_keys<C> c;
    c.row = row;
    c.k = fa_wgmma_descriptor_64(s.k, 0) + row * (128 / 16);
    c.v = fa_wgmma_descriptor_64(s.v, 0) + row * (128 / 16);
    c.q = fa_wgmma_descriptor_64(s.q[0], 0);
    c.dout = fa_wgmma_descriptor_64(s.dout[0], 0);
    c.q_n = fa_wgmma_descriptor_64(s.q[0], C::BM * 128);
    c.dout_n = fa_wgmma_descriptor_64(s.dout[0], C::BM * 128);
    return c;
}

template <class C> __device__ __forceinline__ uint64_t fa_q_stage(int stage)
{
    return stage * (C::BM * C::D * 2 / 16);
}

template <class C> __device__ __forceinline__ uint64_t fa_do_stage(int stage)
{
    return stage * (C::BM * C::DV * 2 / 16);
}

/* S of step t, once its queries are there. */
template <class C>
__device__ __forceinline__ void fa_start_scores(fa_bwd_sm90_shared<C> &sh, const fa_bwd_keys<C> &c,
                                                float (&s)[C::BM / 2], int t)
{
    int stage = fa_stage_of(t);
    fa_mbar_wait(&sh.bar[FA_BAR_Q_FULL + stage], fa_parity_of(t));
    fa_wgmma_fence();
    fa_issue_scores<C, C::D>(s, c.k, c.q + fa_q_stage<C>(stage));
    fa_wgmma_commit();
}

/* From S of step t to P. */
template <class C>
__device__ __forceinline__ void fa_weights(const fa_bwd_sm90_params &p, const fa_bwd_sm90_shared<C> &sh,
                                           const fa_bwd_unit &u, int t, int key0, float (&s)[C::BM / 2])
{
    int stage = fa_stage_of(t), query0 = sh.query[stage];
    fa_wgmma_hold(s);
    fa_scale_scores<C>(s, sh.lse[stage], p.scale_log2);
    if (!fa_all_seen<C>(u.band, key0, query0))
        fa_hide<C>(u.band, s, fa_place_of(key0, query0));
    fa_exponentials<C>(s);
}

/* dP of step t, once its values are there. */
template <class C>
__device__ __forceinline__ void fa_start_value_scores(fa_bwd_sm90_shared<C> &sh, const fa_bwd_keys<C> &c,
                                                      float (&dp)[C::BM / 2], int t)
{
    int stage = fa_stage_of(t);
    fa_mbar_wait(&sh.bar[FA_BAR_DO_FULL + stage], fa_parity_of(t));
    fa_wgmma_fence();
    fa_issue_scores<C, C::DV>(dp, c.v, c.dout + fa_do_stage<C>(stage));
    fa_wgmma_commit();
}

/* dV from P of step t. */
template <class C>
__device__ __forceinline__ void fa_start_values(const fa_bwd_keys<C> &c, int t, uint32_t (&w)[C::BM / 4],
                                                fa_gradient<C::DV> &dv)
{
    fa_wgmma_hold(w);
    dv.hold();
    fa_wgmma_fence();
    fa_issue_gradient<C, C::DV>(dv, w, c.dout_n + fa_do_stage<C>(fa_stage_of(t)));
    fa_wgmma_commit();
}

/* dK from dS of step t. */
template <class C>
__device__ __forceinline__ void fa_start_keys(const fa_bwd_keys<C> &c, int t, uint32_t (&ds)[C::BM / 4],
                                              fa_gradient<C::D> &dk)
{
    fa_wgmma_hold(ds);
    dk.hold();
    fa_wgmma_fence();
    fa_issue_gradient<C, C::D>(dk, ds, c.q_n + fa_q_stage<C>(fa_stage_of(t)));
    fa_wgmma_commit();
}

template <class C>
__device__ __forceinline__ void fa_hand_over_ds(fa_bwd_sm90_shared<C> &sh, int t, const uint32_t (&ds)[C::BM / 4],
                                                int row)
{
    int stage = fa_stage_of(t);
    fa_mbar_wait(&sh.bar[FA_BAR_DS_EMPTY + stage], fa_parity_of(t) ^ 1);
    fa_store_ds<C>(sh.ds[stage], ds, row);
    fa_fence_shared_async();
    fa_warp_arrive(&sh.bar[FA_BAR_DS_FULL + stage]);
}

#endif
