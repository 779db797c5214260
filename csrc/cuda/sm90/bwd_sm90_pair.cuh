/* Consumers of the Hopper backward kernel, BN = 128: each of two warpgroups has 64 keys. */
#ifndef FA_BWD_SM90_PAIR_CUH
#define FA_BWD_SM90_PAIR_CUH

#include "bwd_sm90_mod.cuh"
#include "bwd_sm90_wild.cuh"

/* Of the weights of dS; only this thread reads them. They lie where a tile of a float mask would. */
template <class C> __device__ __forceinline__ uint4 *fa_pair_place(fa_bwd_sm90_shared<C> &sh)
{
    constexpr int one = C::BM / 16 * FA_WARPGROUP;
    return (uint4 *)sh.bias + (threadIdx.x / FA_WARPGROUP - FA_WARPGROUP_FIRST) * one + threadIdx.x % FA_WARPGROUP;
}

/* s holds S of step t; w <- P. */
template <class C>
__device__ __forceinline__ void fa_pair_weights(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &sh,
                                                const fa_bwd_unit &u, int t, int key0, float (&s)[C::BM / 2],
                                                uint32_t (&w)[C::BM / 4])
{
    if constexpr (!C::MOD) {
        fa_weights<C>(p, sh, u, t, key0, s);
        fa_round<C>(w, s);
    } else {
        fa_mod_weights<C>(p, sh, u, t, key0, s, w);
        if (fa_has<C>(p.mod, FA_MOD_TWO_WEIGHTS))
            fa_round_weights<C>(p.mod, sh, t, key0, s, w, fa_pair_place(sh));
        else
            fa_round<C>(w, s);
    }
}

/* dp becomes dS; w <- its weights. */
template <class C>
__device__ __forceinline__ void fa_pair_score_gradient(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &sh,
                                                       int stage, float (&dp)[C::BM / 2], uint32_t (&w)[C::BM / 4])
{
    if constexpr (C::MOD) {
        if (fa_has<C>(p.mod, FA_MOD_TWO_WEIGHTS)) {
            fa_fetch_weights<C>(w, fa_pair_place(sh));
            fa_signed_score_gradient<C>(dp, w, sh.delta[stage], p.mod.dropout.factor);
            return;
        }
    }
    fa_score_gradient<C>(dp, w, sh.delta[stage]);
}

/* From P of step t to dS, in w. */
template <class C>
__device__ __forceinline__ void fa_pair_gradient(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &sh,
                                                 const fa_bwd_unit &u, const fa_bwd_keys<C> &c, int t, int key0,
                                                 float (&dp)[C::BM / 2], uint32_t (&w)[C::BM / 4],
                                                 fa_gradient<C::DV> &dv)
{
    int stage = fa_stage_of(t);
    bool hides = p.wild && fa_hides<C>(p, sh, u, t, key0);
    if (hides && sh.wild[stage]) {
        fa_mbar_wait(&sh.bar[FA_BAR_DO_FULL + stage], fa_parity_of(t));
        fa_clean<typename C::T, C::BM * C::D>(sh.q[stage]);
        fa_clean<typename C::T, C::BM * C::DV>(sh.dout[stage]);
        fa_publish();
    }
    fa_start_value_scores<C>(sh, c, dp, t);
    fa_start_values<C>(c, t, w, dv);
    fa_wgmma_wait<0>();
    fa_wgmma_hold(dp);
    dv.hold();
    fa_pair_score_gradient<C>(p, sh, stage, dp, w);
    if (hides)
        fa_round_seen<C>(w, dp);
    else
        fa_round<C>(w, dp);
}

/* dK from dS of step t in shared memory, which this warpgroup has written: w is free for the next P. */
template <class C>
__device__ __forceinline__ void fa_start_keys_shared(fa_bwd_sm90_shared<C> &sh, const fa_bwd_keys<C> &c, int t,
                                                     fa_gradient<C::D> &dk)
{
    uint64_t ds = fa_wgmma_descriptor_64(sh.ds[fa_stage_of(t)], 0) + c.row * (128 / 16);
    uint64_t q = c.q_n + fa_q_stage<C>(fa_stage_of(t));
    fa_bar_sync(FA_BAR_ALONE + threadIdx.x / FA_WARPGROUP, FA_WARPGROUP);
    dk.hold();
    fa_wgmma_fence();
#pragma unroll
    for (int i = 0; i < C::BM / 16; i++)
        fa_wgmma<typename C::T, C::D>::template ss<0, 1>(dk.part[0], ds + i / 4 * (C::BN * 128 / 16) + i % 4 * 2,
                                                         q + i * (16 * 128 / 16), 1);
    fa_wgmma_commit();
}

/* From dS of step t, in w, to P of step t + 1. */
template <class C>
__device__ __forceinline__ void fa_pair_next(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &sh,
                                             const fa_bwd_unit &u, const fa_bwd_keys<C> &c, int t, int key0,
                                             float (&s)[C::BM / 2], uint32_t (&w)[C::BM / 4], fa_gradient<C::D> &dk)
{
    fa_start_scores<C>(sh, c, s, t + 1);
    if constexpr (C::KEYS_FROM_SHARED) {
        fa_hand_over_ds<C>(sh, t, w, c.row);
        fa_start_keys_shared<C>(sh, c, t, dk);
        fa_wgmma_wait<1>();
        fa_pair_weights<C>(p, sh, u, t + 1, key0, s, w);
        fa_settle(w);
        fa_wgmma_wait<0>();
        dk.hold();
        fa_warp_arrive(&sh.bar[FA_BAR_EMPTY + fa_stage_of(t)]);
    } else {
        fa_start_keys<C>(c, t, w, dk);
        fa_hand_over_ds<C>(sh, t, w, c.row);
        fa_wgmma_wait<0>();
        dk.hold();
        fa_warp_arrive(&sh.bar[FA_BAR_EMPTY + fa_stage_of(t)]);
        fa_pair_weights<C>(p, sh, u, t + 1, key0, s, w);
    }
}

/* All steps. s holds S, P, dP and dS in turn, w holds P and then dS, rounded. Time runs downwards; the other warpgroup
 * does the same at times of its own, and dQ runs beside both:
 *
 *   tensor cores       this warpgroup
 *   dP t, dV t         wait for both
 *                      dS = P o (dP - delta), rounded
 *   S t+1              dS to shared memory for dQ; wait for S t+1
 *   dK t               P = exp2(S), rounded; wait for dK t; hand back the stage of t
 *
 * Without KEYS_FROM_SHARED dK t takes dS from registers that P of the next step needs: it is waited for with S t+1. */
template <class C>
__device__ __forceinline__ void fa_pair_steps(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &sh,
                                              const fa_bwd_unit &u, const fa_bwd_keys<C> &c, int key0,
                                              fa_gradient<C::D> &dk, fa_gradient<C::DV> &dv)
{
    uint32_t w[C::BM / 4];
    float s[C::BM / 2];
    int t = 0;
    fa_start_scores<C>(sh, c, s, 0);
    fa_wgmma_wait<0>();
    fa_pair_weights<C>(p, sh, u, 0, key0, s, w);
    for (; t < u.steps - 1; t++) {
        fa_pair_gradient<C>(p, sh, u, c, t, key0, s, w, dv);
        fa_pair_next<C>(p, sh, u, c, t, key0, s, w, dk);
    }
    fa_pair_gradient<C>(p, sh, u, c, t, key0, s, w, dv);
    fa_start_keys<C>(c, t, w, dk);
    fa_hand_over_ds<C>(sh, t, w, c.row);
    fa_wgmma_wait<0>();
    dk.hold();
}

template <class C>
__device__ __forceinline__ void fa_consume_pair(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &sh,
                                                const fa_bwd_unit &u, int row)
{
    fa_bwd_keys<C> c = fa_keys_of<C>(sh, row);
    int key0 = u.walk.n * C::BN + row;
    fa_gradient<C::D> dk;
    fa_gradient<C::DV> dv;
    dk.clear();
    dv.clear();
    if (u.steps > 0) {
        fa_mbar_wait(&sh.bar[FA_BAR_K_FULL], 0);
        fa_mbar_wait(&sh.bar[FA_BAR_V_FULL], 0);
        fa_pair_steps<C>(p, sh, u, c, key0, dk, dv);
    }
    fa_store_gradient<C, C::DV>(p, p.dv, u, dv, C::MOD ? p.mod.dropout.factor : 1.f, key0, p.DV);
    fa_store_gradient<C, C::D>(p, p.dk, u, dk, p.scale, key0, p.D);
}

#endif
