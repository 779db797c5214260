/* dQ of the Hopper backward kernel: its product, its sum in device memory, and whose turn it is to add. */
#ifndef FA_BWD_SM90_DQ_CUH
#define FA_BWD_SM90_DQ_CUH

#include "../ptx/global.cuh"
#include "bwd_sm90_wild.cuh"

/* ---- turns: does this key block come next in the sum of a block of dQ? ------------------------------------------- */

__device__ __forceinline__ void fa_await_turn(const uint32_t *flag, uint32_t turn)
{
#ifdef FA_WAIT_LIMIT
    for (uint32_t tries = 0; fa_load_acquire(flag) != turn; tries++)
        if (tries > FA_WAIT_LIMIT)
            __trap();
#else
    while (fa_load_acquire(flag) != turn)
        ;
#endif
}

/* Asks for each step whether it is this key block's turn, ahead of the step where it can. At most two steps may be
 * added and not yet signalled: ADDED and SIGNALLED are two barriers each. */
template <class C>
__device__ __forceinline__ void fa_await_turns(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &s,
                                               const fa_bwd_unit &u)
{
    for (fa_bwd_step at = fa_first_step(p, u); at.t < u.steps; fa_next_step(p, u, at)) {
        int64_t block = fa_query_block(p, u, at);
        uint32_t turn = fa_turn_of(p, u.band, u.walk, at.m);
        if (turn > 0)
            fa_await_turn(p.turn + block, turn);
        if (at.t > 0)
            fa_mbar_wait(&s.bar[FA_BAR_ADDED + fa_stage_of(at.t - 1)], fa_parity_of(at.t - 1));
        if (at.t > 1)
            fa_mbar_wait(&s.bar[FA_BAR_SIGNALLED + fa_stage_of(at.t)], fa_parity_of(at.t - 2));
        s.dq.sum = p.dq_sum + block * (C::BM * C::D);
        s.dq.first = turn == 0;
        fa_mbar_arrive(&s.bar[FA_BAR_TURN]);
    }
}

/* Tells the next key block, once all of dQ has arrived in the second-level cache: that takes as long as a few products,
 * so it has a thread of its own. */
template <class C>
__device__ __forceinline__ void fa_signal_turns(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &s,
                                                const fa_bwd_unit &u)
{
    for (fa_bwd_step at = fa_first_step(p, u); at.t < u.steps; fa_next_step(p, u, at)) {
        uint32_t *flag = p.turn + fa_query_block(p, u, at), turn = fa_turn_of(p, u.band, u.walk, at.m);
        fa_mbar_wait(&s.bar[FA_BAR_ADDED + fa_stage_of(at.t)], fa_parity_of(at.t));
        fa_store_release(flag, turn + 1);
        fa_mbar_arrive(&s.bar[FA_BAR_SIGNALLED + fa_stage_of(at.t)]);
    }
}

/* ---- dQ = dS K --------------------------------------------------------------------------------------------------- */

/* 64 x 64 of dQ: 64 queries from `ds` on, 64 columns from `k` on. */
template <class C> __device__ __forceinline__ void fa_issue_dq(float (&dq)[32], uint64_t ds, uint64_t k)
{
#pragma unroll
    for (int i = 0; i < C::BN / 16; i++)
        fa_wgmma<typename C::T, 64>::template ss<1, 1>(dq, ds + i * (16 * 128 / 16), k + i * (16 * 128 / 16), i > 0);
}

/* `to`: this thread's place in the block of dq_sum. The first in a sum stores, so nothing has to be cleared. */
__device__ __forceinline__ void fa_add_dq(float *to, const float (&dq)[32], bool first)
{
    if (first) {
#pragma unroll
        for (int i = 0; i < 8; i++)
            fa_store_f32x4(to + i * (FA_WARPGROUP * 4), dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            fa_red_add_f32x4(to + i * (FA_WARPGROUP * 4), dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
    }
}

template <class C>
__device__ __forceinline__ void fa_sum_dq(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &s, int steps)
{
    constexpr int panel = C::BN * 128 / 16;
    uint64_t ds_desc = fa_wgmma_descriptor_64(s.ds[0], 0), k_desc = fa_wgmma_descriptor_64(s.k, C::BN * 128);
    float dq[32];
    fa_mbar_wait(&s.bar[FA_BAR_K_FULL], 0);
    if (p.wild) {
        fa_clean<typename C::T, C::BN * C::D>(s.k);
        fa_publish();
    }
    for (int t = 0; t < steps; t++) {
        int stage = fa_stage_of(t);
        fa_mbar_wait(&s.bar[FA_BAR_DS_FULL + stage], fa_parity_of(t));
#pragma unroll
        for (int part = 0; part < C::PARTS; part++) {
            int block = part / (C::D / 64), column = part % (C::D / 64);
            fa_wgmma_fence();
            fa_issue_dq<C>(dq, ds_desc + stage * (C::BM * C::BN * 2 / 16) + block * panel, k_desc + column * panel);
            fa_wgmma_commit();
            fa_wgmma_wait<0>();
            fa_wgmma_hold(dq);
            if (part == C::PARTS - 1)
                fa_warp_arrive(&s.bar[FA_BAR_DS_EMPTY + stage]);
            if (part == 0)
                fa_mbar_wait(&s.bar[FA_BAR_TURN], t & 1);
            fa_add_dq(s.dq.sum + (part * 8 * FA_WARPGROUP + threadIdx.x % FA_WARPGROUP) * 4, dq, s.dq.first);
        }
        fa_warp_arrive(&s.bar[FA_BAR_ADDED + stage]);
    }
}

#endif
