/* Forward attention on Hopper for fp32: products by wgmma on two parts of fp16 (fwd_sm90_f32_split.cuh).
 *
 * Two warpgroups read K and V, split them and store the parts where wgmma reads them; two compute, 64 queries each, and
 * take turns at the tensor cores. The tensor cores cut off their sums instead of rounding them: so a block's
 * product with V starts from zero and is added to O by an ordinary multiply-add, which also takes the inverse of V's
 * power of two, and small products come before large ones.
 */
#ifndef FA_FWD_SM90_F32_CUH
#define FA_FWD_SM90_F32_CUH

#include "../ptx/shared_store.cuh"
#include "fwd_sm90.cuh"
#include "fwd_sm90_f32_repair.cuh"
#include "fwd_sm90_f32_split.cuh"

/* Head dimensions D and DV, 64 or 128; blocks of BN keys, STAGES of them. QUERIES_HELD: the parts of Q stay in
 * registers, else in shared memory. */
template <int D_, int DV_, int BN_, int STAGES_, bool QUERIES_HELD_> struct fa_f32_config {
    using T = fa_f16_t;
    static constexpr int D = D_, DV = DV_, WGS = 2, BN = BN_, BM = 64 * WGS, STAGES = STAGES_;
    static constexpr bool QUERIES_HELD = QUERIES_HELD_;
    static constexpr int PRODUCERS = 2, THREADS = FA_WARPGROUP * (WGS + PRODUCERS);
    static constexpr int SPLITTERS = PRODUCERS * FA_WARPGROUP / FA_WARP; /* warps that split */
    static constexpr int PRODUCER_REGISTERS = 56, CONSUMER_REGISTERS = 200;
    static constexpr int K_PART = BN * D * 2, V_PART = BN * DV * 2, Q_PART = 64 * D * 2; /* bytes */
};

/* High parts, then low ones. */
template <class C> struct fa_f32_shared {
    alignas(1024) unsigned char q[C::QUERIES_HELD ? 1 : C::WGS][C::QUERIES_HELD ? 16 : 2 * C::Q_PART];
    alignas(1024) unsigned char k[C::STAGES][2 * C::K_PART];
    alignas(1024) unsigned char v[C::STAGES][2 * C::V_PART];
    float k_inverse[C::STAGES], v_inverse[C::STAGES]; /* of the powers of two */
    alignas(16) uint32_t k_peak[C::SPLITTERS], v_peak[C::SPLITTERS], v_least[C::SPLITTERS]; /* of the block at hand */
    uint64_t k_full[C::STAGES], k_empty[C::STAGES];
    uint64_t v_full[C::STAGES], v_empty[C::STAGES];
};

/* Named barriers: FA_BAR_QUERIES + warpgroup, FA_BAR_WARP + warp of the producer. */
enum { FA_BAR_SPLIT = FA_BAR_TURN + 2, FA_BAR_QUERIES, FA_BAR_WARP = FA_BAR_QUERIES + 2 };

/* ---- producer ---------------------------------------------------------------------------------------------------- */

/* The blocks of all tiles of this thread block, one after the other; behind the last it stays at that. */
template <class C> struct fa_f32_cursor {
    int unit = blockIdx.x, part = 0, block;
    fa_query_tile t;

    __device__ __forceinline__ fa_f32_cursor(const fa_fwd_sm90_params &p)
    {
        t = fa_tile_at<C>(p, unit, part);
        block = t.block_hi - 1;
    }

    __device__ __forceinline__ bool next(const fa_fwd_sm90_params &p)
    {
        if (block > t.block_lo) {
            block--;
            return true;
        }
        if (++part == p.parts) {
            part = 0;
            unit += gridDim.x;
        }
        if (unit >= p.units)
            return false;
        t = fa_tile_at<C>(p, unit, part);
        block = t.block_hi - 1;
        return true;
    }
};

template <class Block, class C>
__device__ __forceinline__ typename Block::source fa_f32_source(const fa_fwd_sm90_params &p, const fa_fwd_sm90_view &v,
                                                                const fa_f32_cursor<C> &c, int columns)
{
    return Block::of(fa_row_of<float>(v, c.t.b, c.t.h / p.group, 0), v.row, c.block * C::BN, p.SK, columns);
}

/* The largest of the warps' numbers, or the least. */
template <int N, class Reduce>
__device__ __forceinline__ uint32_t fa_of_warps(const uint32_t (&x)[N], const Reduce &reduce)
{
    uint32_t y = x[0];
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        uint4 a = *(const uint4 *)&x[i];
        y = reduce(y, reduce(reduce(a.x, a.y), reduce(a.z, a.w)));
    }
    return y;
}

template <int N> __device__ __forceinline__ uint32_t fa_largest_of_warps(const uint32_t (&x)[N])
{
    return fa_of_warps(x, [](uint32_t a, uint32_t b) { return max(a, b); });
}

/* Bits of the largest magnitude of a block of K. */
template <class C, class Block> __device__ __forceinline__ uint32_t fa_f32_peak(fa_f32_shared<C> &s, const Block &x)
{
    uint32_t peak = x.peak();
    if (threadIdx.x % FA_WARP == 0)
        s.k_peak[threadIdx.x / FA_WARP] = peak;
    fa_bar_sync(FA_BAR_SPLIT, C::PRODUCERS * FA_WARPGROUP);
    return fa_largest_of_warps(s.k_peak);
}

/* The same of V; *wide: some are too much smaller. */
template <class C, class Block>
__device__ __forceinline__ uint32_t fa_f32_peak(fa_f32_shared<C> &s, const Block &x, bool *wide)
{
    uint32_t peak, least = x.extremes(&peak);
    if (threadIdx.x % FA_WARP == 0) {
        s.v_peak[threadIdx.x / FA_WARP] = peak;
        s.v_least[threadIdx.x / FA_WARP] = least;
    }
    fa_bar_sync(FA_BAR_SPLIT, C::PRODUCERS * FA_WARPGROUP);
    peak = fa_largest_of_warps(s.v_peak);
    least = fa_of_warps(s.v_least, [](uint32_t a, uint32_t b) { return min(a, b); });
    *wide = peak >= FA_F32_SPREAD && least < peak - FA_F32_SPREAD;
    return peak;
}

/* What was stored is there for wgmma: one arrival for each warp. */
__device__ __forceinline__ void fa_f32_announce(uint64_t *bar)
{
    fa_fence_shared_async();
    __syncwarp();
    fa_release(bar);
}

/* Time runs downwards:
 *
 *   memory       these warpgroups
 *   V j          largest of K j; wait for its place; store the parts of K j, load V j where K j was
 *   K j - 1      largest of V j; wait for its place; store the parts of V j, load K j - 1 where V j was
 */
template <class C> __device__ __forceinline__ void fa_f32_produce(const fa_fwd_sm90_params &p, fa_f32_shared<C> &s)
{
    using Block = fa_split_block<C::D, C::BN, C::PRODUCERS * FA_WARPGROUP>;
    static_assert(C::D == C::DV, "K and V take turns in the same registers");
    fa_f32_cursor<C> at(p);
    const int warp_bar = FA_BAR_WARP + threadIdx.x / FA_WARP;
    fa_stage<C::STAGES> stage;
    Block x;
    typename Block::source from = fa_f32_source<Block>(p, p.k, at, p.D);
#pragma unroll
    for (int i = 0; i < Block::STEPS; i++)
        x.load(from, i);
    for (bool more = true; more; stage.next()) {
        float inverse, power = fa_split_power<FA_SCORE_POWER>(fa_f32_peak(s, x), &inverse);
        fa_mbar_wait(&s.k_empty[stage.index], stage.parity ^ 1);
        s.k_inverse[stage.index] = inverse;
        x.template store<false>(fa_shared_address(s.k[stage.index]), power,
                                fa_f32_source<Block>(p, p.v, at, p.DV), warp_bar);
        fa_f32_announce(&s.k_full[stage.index]);

        bool wide;
        power = fa_split_power<FA_VALUE_POWER>(fa_f32_peak(s, x, &wide), &inverse);
        more = at.next(p);
        fa_mbar_wait(&s.v_empty[stage.index], stage.parity ^ 1);
        s.v_inverse[stage.index] = wide ? CUDART_NAN_F : inverse;
        x.template store<true>(fa_shared_address(s.v[stage.index]), power,
                               fa_f32_source<Block>(p, p.k, at, p.D), warp_bar);
        fa_f32_announce(&s.v_full[stage.index]);
    }
}

/* ---- consumers: 64 queries each ---------------------------------------------------------------------------------- */

/* The parts of 64 queries as A operands, where they stay in registers. */
template <class C> struct fa_f32_queries {
    uint32_t high[C::QUERIES_HELD ? C::D / 4 : 1], low[C::QUERIES_HELD ? C::D / 4 : 1];
};

/* Weights of a block: high parts, the same divided by FA_F32_LOW_SCALE, low parts. */
template <class C> struct fa_f32_weights {
    uint32_t high[C::BN / 4], shrunk[C::BN / 4], low[C::BN / 4];
};

struct fa_f32_rows {
    float m[2]; /* reference in units of log2, 2^7 below the maximum when it was set; -inf: nothing seen */
    float l[2]; /* of this thread's columns only */
    float factor[2];
    bool grown; /* whether a factor of the warp may differ from 1 */
};

template <class C> struct fa_f32_consumer {
    int warpgroup;
    fa_stage<C::STAGES> ks, vs;
    uint32_t q_desc, k_desc, v_desc; /* of stage 0 */
    float q_factor;                  /* scale * log2 e / power of two of this warp's queries */
    bool spoilt = false;             /* this thread held a result that is not finite */
};

template <class C> __device__ __forceinline__ void fa_f32_turn_wait(const fa_f32_consumer<C> &c)
{
    fa_bar_sync(FA_BAR_TURN + c.warpgroup, 2 * FA_WARPGROUP);
}

template <class C> __device__ __forceinline__ void fa_f32_turn_pass(const fa_f32_consumer<C> &c)
{
    fa_bar_arrive(FA_BAR_TURN + (c.warpgroup ^ 1), 2 * FA_WARPGROUP);
}

/* This warp's 16 queries, in the layout of an A operand. */
template <class C>
__device__ __forceinline__ void fa_f32_load_queries(const fa_fwd_sm90_params &p, fa_f32_shared<C> &sh,
                                                    fa_f32_consumer<C> &c, const fa_query_tile &t,
                                                    fa_f32_queries<C> &q)
{
    const int lane = threadIdx.x % FA_WARP, warp = threadIdx.x / FA_WARP % 4;
    const int row = t.row + 64 * c.warpgroup + 16 * warp + lane / 4, column = lane % 4 * 2;
    const float *from = fa_row_of<float>(p.q, t.b, t.h, row) + column;
    float2 x[C::D / 4];
    float top = 0.f;
#pragma unroll
    for (int i = 0; i < C::D / 4; i++) {
        bool there = row + i % 2 * 8 < p.SQ && column + i / 2 * 8 < p.D;
        x[i] = fa_load_f32x2(from + i % 2 * 8 * p.q.row + i / 2 * 8, there);
    }
#pragma unroll
    for (int i = 0; i < C::D / 4; i++)
        top = fa_max_magnitude(fa_max_magnitude(top, x[i].x), x[i].y);
    float power = fa_split_power<FA_SCORE_POWER>(fa_warp_peak(top), &c.q_factor);
    c.q_factor *= p.scale_log2;
    uint32_t own = fa_shared_address(sh.q[c.warpgroup % (C::QUERIES_HELD ? 1 : C::WGS)]) +
                   (16 * warp + lane % 16) * 128;
#pragma unroll
    for (int i = 0; i < C::D / 16; i++) {
        uint32_t h[4], l[4];
#pragma unroll
        for (int j = 0; j < 4; j++)
            fa_split_pair<false>(x[4 * i + j].x * power, x[4 * i + j].y * power, &h[j], &l[j]);
        if constexpr (C::QUERIES_HELD) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                q.high[4 * i + j] = h[j];
                q.low[4 * i + j] = l[j];
            }
        } else {
            uint32_t to = own + i / 4 * (64 * 128) + ((i % 4 * 2 + lane / 16 ^ lane % 8) << 4);
            fa_stmatrix_x4(to, h[0], h[1], h[2], h[3]);
            fa_stmatrix_x4(to + C::Q_PART, l[0], l[1], l[2], l[3]);
        }
    }
    if constexpr (!C::QUERIES_HELD) {
        fa_fence_shared_async();
        fa_bar_sync(FA_BAR_QUERIES + c.warpgroup, FA_WARPGROUP);
    }
}

/* S (64, BN) = Q K^T in units of both powers of two, the small products first */
template <class C>
__device__ __forceinline__ void fa_f32_issue_qk(float (&s)[C::BN / 2], const fa_f32_consumer<C> &c,
                                                const fa_f32_queries<C> &q)
{
    const uint32_t k = c.k_desc + c.ks.index * (2 * C::K_PART / 16);
#pragma unroll
    for (int pass = 0; pass < 3; pass++) {
        const bool q_low = pass == 0, k_low = pass == 1;
#pragma unroll
        for (int i = 0; i < C::D / 16; i++) {
            const uint32_t b = k + k_low * (C::K_PART / 16) + i / 4 * (C::BN * 128 / 16) + i % 4 * 2;
            if constexpr (C::QUERIES_HELD)
                fa_wgmma<fa_f16_t, C::BN>::template rs<0>(s, q_low ? &q.low[4 * i] : &q.high[4 * i], b, pass + i > 0);
            else
                fa_wgmma<fa_f16_t, C::BN>::template ss<0, 0>(
                    s, c.q_desc + q_low * (C::Q_PART / 16) + i / 4 * (64 * 128 / 16) + i % 4 * 2, b, pass + i > 0);
        }
    }
}

/* part (64, 64) = P V for columns 64 HALF .. 64 HALF + 63, in units of V's power of two */
template <class C, int HALF>
__device__ __forceinline__ void fa_f32_issue_pv(float (&part)[32], const fa_f32_consumer<C> &c,
                                                const fa_f32_weights<C> &w)
{
    const uint32_t v = c.v_desc + c.vs.index * (2 * C::V_PART / 16) + HALF * (C::BN * 128 / 16);
#pragma unroll
    for (int pass = 0; pass < 3; pass++)
#pragma unroll
        for (int i = 0; i < C::BN / 16; i++)
            fa_wgmma<fa_f16_t, 64>::template rs<1>(
                part, pass == 0 ? &w.low[4 * i] : pass == 1 ? &w.shrunk[4 * i] : &w.high[4 * i],
                v + (pass == 1) * (C::V_PART / 16) + i * (16 * 128 / 16), pass + i > 0);
}

template <int HALF, int R> __device__ __forceinline__ void fa_f32_add(float (&o)[R], const float (&part)[32], float f)
{
#pragma unroll
    for (int i = 0; i < 32; i++)
        o[32 * HALF + i] = fmaf(part[i], f, o[32 * HALF + i]);
}

/* s <- weights of the block's keys, at most 2^15; c: from s to units of log2 */
template <class C>
__device__ __forceinline__ void fa_f32_softmax(float (&s)[C::BN / 2], fa_f32_rows &r, float c)
{
    float top[2], base[2];
    bool behind = false;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        top[i] = s[2 * i];
#pragma unroll
        for (int j = 0; j < C::BN / 8; j++)
            top[i] = fmaxf(fmaxf(top[i], s[4 * j + 2 * i]), s[4 * j + 2 * i + 1]);
        top[i] = fa_quad_max(top[i]) * c - 7.f;
        behind |= top[i] > r.m[i] + 8.f;
    }
    r.grown = __any_sync(0xffffffff, behind);
    if (r.grown) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float m = fmaxf(r.m[i], top[i]);
            r.factor[i] = m == r.m[i] ? 1.f : fa_exp2(r.m[i] - m);
            r.l[i] *= r.factor[i];
            r.m[i] = m;
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
        base[i] = r.m[i] == -CUDART_INF_F ? 0.f : -r.m[i];
#pragma unroll
    for (int j = 0; j < C::BN / 2; j++) {
        s[j] = fa_exp2(fmaf(s[j], c, base[j / 2 % 2]));
        r.l[j / 2 % 2] += s[j];
    }
}

template <class C>
__device__ __forceinline__ void fa_f32_split_weights(const float (&s)[C::BN / 2], fa_f32_weights<C> &w)
{
#pragma unroll
    for (int i = 0; i < C::BN / 4; i++) {
        fa_split_pair<false>(s[2 * i], s[2 * i + 1], &w.high[i], &w.low[i]);
        w.shrunk[i] = fa_shrink_pair(w.high[i]);
    }
}

/* Scores to weights, which wait in s. */
template <class C>
__device__ __forceinline__ void fa_f32_weigh(const fa_fwd_sm90_params &p, fa_f32_shared<C> &sh, fa_f32_consumer<C> &c,
                                             const fa_query_tile &t, int block, float (&s)[C::BN / 2], fa_f32_rows &r)
{
    float factor = c.q_factor * sh.k_inverse[c.ks.index];
    __syncwarp(); /* all lanes have read it */
    fa_release(&sh.k_empty[c.ks.index]);
    c.ks.next();
    factor = factor <= FA_F32_SCORE_LIMIT ? factor : CUDART_NAN_F;
    const int row = t.row + 64 * c.warpgroup, key = block * C::BN;
    bool all = key >= row + 63 + p.lo_shift && key + C::BN <= min(p.SK, row + p.hi_shift);
    if (!all)
        fa_hide_keys<C::BN>(s, row, key, p.SK, p.lo_shift, p.hi_shift);
    fa_f32_softmax<C>(s, r, factor);
}

template <class C> __device__ __forceinline__ void fa_f32_hold(fa_f32_weights<C> &w)
{
    fa_wgmma_hold(w.high);
    fa_wgmma_hold(w.shrunk);
    fa_wgmma_hold(w.low);
}

template <class C> __device__ __forceinline__ void fa_f32_hold(fa_f32_queries<C> &q)
{
    if constexpr (C::QUERIES_HELD) {
        fa_wgmma_hold(q.high);
        fa_wgmma_hold(q.low);
    }
}

/* The last part of the product with V of a block, added to O; its place is free. */
template <class C>
__device__ __forceinline__ void fa_f32_finish_values(fa_f32_shared<C> &sh, fa_f32_consumer<C> &c, float (&part)[32],
                                                     fa_f32_weights<C> &w, float (&o)[C::DV / 2], float inverse)
{
    fa_wgmma_wait<0>();
    fa_wgmma_hold(part);
    fa_f32_hold(w);
    fa_release(&sh.v_empty[c.vs.index]);
    c.vs.next();
    fa_f32_add<C::DV / 64 - 1>(o, part, inverse);
}

/* The first block of a tile. */
template <class C>
__device__ __forceinline__ void fa_f32_first_block(const fa_fwd_sm90_params &p, fa_f32_shared<C> &sh,
                                                   fa_f32_consumer<C> &c, const fa_query_tile &t, int block,
                                                   fa_f32_queries<C> &q, float (&s)[C::BN / 2], fa_f32_weights<C> &w,
                                                   fa_f32_rows &r)
{
    fa_mbar_wait(&sh.k_full[c.ks.index], c.ks.parity);
    fa_f32_turn_wait(c);
    fa_wgmma_hold(s);
    fa_f32_hold(q);
    fa_wgmma_fence();
    fa_f32_issue_qk<C>(s, c, q);
    fa_wgmma_commit();
    fa_f32_turn_pass(c);
    fa_wgmma_wait<0>();
    fa_wgmma_hold(s);
    fa_f32_hold(q);
    fa_f32_weigh<C>(p, sh, c, t, block, s, r);
    fa_f32_split_weights<C>(s, w);
}

/* Every further block j, V of the block before it. Time runs downwards; the other warpgroup does the same half a step
 * later:
 *
 *   tensor cores           this warpgroup
 *   P V, columns  0 .. 63  wait for K j, V j + 1 and for its turn; issue it and S j
 *   S j = Q K_j^T          wait for the columns; add them to O; issue the others; pass the turn
 *   P V, columns 64 ..     wait for S j; mask, maximum, exp2, row sums of S j
 *   (other warpgroup)      wait for the others; add them to O; scale O where a maximum grew; split the weights
 */
template <class C>
__device__ __forceinline__ void fa_f32_next_block(const fa_fwd_sm90_params &p, fa_f32_shared<C> &sh,
                                                  fa_f32_consumer<C> &c, const fa_query_tile &t, int block,
                                                  fa_f32_queries<C> &q, float (&s)[C::BN / 2], fa_f32_weights<C> &w,
                                                  float (&o)[C::DV / 2], fa_f32_rows &r)
{
    float part[32];
    fa_mbar_wait(&sh.v_full[c.vs.index], c.vs.parity);
    const float inverse = sh.v_inverse[c.vs.index];
    fa_mbar_wait(&sh.k_full[c.ks.index], c.ks.parity);
    fa_f32_turn_wait(c);
    fa_wgmma_hold(s);
    fa_f32_hold(q);
    fa_f32_hold(w);
    fa_wgmma_fence();
    if constexpr (C::DV > 64) {
        fa_f32_issue_pv<C, 0>(part, c, w);
        fa_wgmma_commit();
    }
    fa_f32_issue_qk<C>(s, c, q);
    fa_wgmma_commit();
    if constexpr (C::DV > 64) {
        fa_wgmma_wait<1>();
        fa_wgmma_hold(part);
        fa_f32_add<0>(o, part, inverse);
        fa_wgmma_hold(part);
        fa_wgmma_fence();
    }
    fa_f32_issue_pv<C, C::DV / 64 - 1>(part, c, w);
    fa_wgmma_commit();
    fa_f32_turn_pass(c);
    fa_wgmma_wait<1>();
    fa_wgmma_hold(s);
    fa_f32_hold(q);
    fa_f32_weigh<C>(p, sh, c, t, block, s, r);
    fa_wgmma_hold(s);
    fa_f32_finish_values<C>(sh, c, part, w, o, inverse);
    if (r.grown) {
#pragma unroll
        for (int i = 0; i < C::DV / 2; i++)
            o[i] *= r.factor[i / 2 % 2];
    }
    fa_f32_split_weights<C>(s, w);
}

template <class C>
__device__ __forceinline__ void fa_f32_last_product(fa_f32_shared<C> &sh, fa_f32_consumer<C> &c, fa_f32_weights<C> &w,
                                                    float (&o)[C::DV / 2])
{
    float part[32];
    fa_mbar_wait(&sh.v_full[c.vs.index], c.vs.parity);
    const float inverse = sh.v_inverse[c.vs.index];
    fa_f32_turn_wait(c);
    fa_f32_hold(w);
    fa_wgmma_fence();
    if constexpr (C::DV > 64) {
        fa_f32_issue_pv<C, 0>(part, c, w);
        fa_wgmma_commit();
        fa_wgmma_wait<0>();
        fa_wgmma_hold(part);
        fa_f32_add<0>(o, part, inverse);
        fa_wgmma_hold(part);
        fa_wgmma_fence();
    }
    fa_f32_issue_pv<C, C::DV / 64 - 1>(part, c, w);
    fa_wgmma_commit();
    fa_f32_turn_pass(c);
    fa_f32_finish_values<C>(sh, c, part, w, o, inverse);
}

template <class C>
__device__ __forceinline__ void fa_f32_store_tile(const fa_fwd_sm90_params &p, fa_f32_consumer<C> &c,
                                                  const fa_query_tile &t, const float (&o)[C::DV / 2],
                                                  const fa_f32_rows &r)
{
    const int lane = threadIdx.x % FA_WARP, warp = threadIdx.x / FA_WARP % 4;
    bool bad = fa_any_not_finite(o);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float sum = fa_quad_sum(r.l[i]), factor = sum == 0.f ? 0.f : 1.f / sum;
        const int row = t.row + 64 * c.warpgroup + 16 * warp + 8 * i + lane / 4;
        bad = bad || isnan(sum);
        if (row >= p.SQ)
            continue;
        if (lane % 4 == 0)
            p.lse[((int64_t)t.b * p.HQ + t.h) * p.SQ + row] =
                sum == 0.f ? -CUDART_INF_F : (r.m[i] + fa_log2(sum)) * 0.693147180559945f;
        float *out = (float *)fa_row_of<float>(p.out, t.b, t.h, row) + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < C::DV / 8; n++)
            if (lane % 4 * 2 + 8 * n < p.DV)
                *(float2 *)(out + 8 * n) = make_float2(o[4 * n + 2 * i] * factor, o[4 * n + 2 * i + 1] * factor);
    }
    c.spoilt = c.spoilt || bad;
}

/* This warp's rows of all its tiles once more, those that are not finite. */
template <class C> __device__ void fa_f32_repair_tiles(const fa_fwd_sm90_params &p, int warpgroup)
{
    for (int unit = blockIdx.x; unit < p.units; unit += gridDim.x) {
        for (int part = 0; part < p.parts; part++) {
            fa_query_tile t = fa_tile_at<C>(p, unit, part);
            int first = t.row + 64 * warpgroup + threadIdx.x / FA_WARP % 4 * 16;
            for (int row = first; row < min(first + 16, p.SQ); row++)
                if (fa_f32_row_is_spoilt<C::DV>(p, t.b, t.h, row))
                    fa_f32_repair_row<C::D, C::DV>(p, t.b, t.h, row);
        }
    }
}

template <class C>
__device__ __forceinline__ void fa_f32_consume(const fa_fwd_sm90_params &p, fa_f32_shared<C> &sh, int warpgroup)
{
    fa_f32_consumer<C> c;
    c.warpgroup = warpgroup;
    c.q_desc = fa_wgmma_descriptor(sh.q[C::QUERIES_HELD ? 0 : warpgroup], 0);
    c.k_desc = fa_wgmma_descriptor(sh.k[0], 0);
    c.v_desc = fa_wgmma_descriptor(sh.v[0], C::BN * 128);
    if (warpgroup == C::WGS - 1)
        fa_f32_turn_pass(c); /* the first turn is warpgroup 0's */
    for (int unit = blockIdx.x; unit < p.units; unit += gridDim.x) {
        for (int part = 0; part < p.parts; part++) {
            const fa_query_tile t = fa_tile_at<C>(p, unit, part);
            fa_f32_queries<C> q;
            fa_f32_weights<C> w;
            fa_f32_rows r = {{-CUDART_INF_F, -CUDART_INF_F}, {0.f, 0.f}, {1.f, 1.f}, false};
            float s[C::BN / 2], o[C::DV / 2] = {};
            fa_f32_load_queries<C>(p, sh, c, t, q);
            fa_f32_first_block<C>(p, sh, c, t, t.block_hi - 1, q, s, w, r);
            for (int block = t.block_hi - 2; block >= t.block_lo; block--)
                fa_f32_next_block<C>(p, sh, c, t, block, q, s, w, o, r);
            fa_f32_last_product<C>(sh, c, w, o);
            fa_f32_store_tile<C>(p, c, t, o, r);
        }
    }
    __syncwarp();
    if (__any_sync(0xffffffff, c.spoilt))
        fa_f32_repair_tiles<C>(p, warpgroup);
}

/* ---- kernel ------------------------------------------------------------------------------------------------------ */

template <class C> __device__ __forceinline__ void fa_f32_init_barriers(fa_f32_shared<C> &s)
{
    constexpr int consumers = C::WGS * FA_WARPGROUP / FA_WARP * FA_WARP_ARRIVALS;
    constexpr int splitters = C::SPLITTERS * FA_WARP_ARRIVALS;
#pragma unroll
    for (int i = 0; i < C::STAGES; i++) {
        fa_mbar_init(&s.k_full[i], splitters);
        fa_mbar_init(&s.v_full[i], splitters);
        fa_mbar_init(&s.k_empty[i], consumers);
        fa_mbar_init(&s.v_empty[i], consumers);
    }
    fa_mbar_fence_init();
}

/* Persistent: at most one block for each multiprocessor. */
template <class C>
__global__ void __launch_bounds__(C::THREADS, 1) fa_fwd_sm90_f32_kernel(const __grid_constant__ fa_fwd_sm90_params p)
{
    extern __shared__ __align__(1024) unsigned char raw[];
    fa_f32_shared<C> &s = *(fa_f32_shared<C> *)raw;
    int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / FA_WARPGROUP, 0);
    if (threadIdx.x == 0)
        fa_f32_init_barriers(s);
    __syncthreads();
    if (warpgroup < C::PRODUCERS) {
        fa_registers_shrink<C::PRODUCER_REGISTERS>();
        fa_f32_produce<C>(p, s);
    } else {
        fa_registers_grow<C::CONSUMER_REGISTERS>();
        fa_f32_consume<C>(p, s, warpgroup - C::PRODUCERS);
    }
}

#endif
