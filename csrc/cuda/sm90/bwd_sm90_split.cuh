/* Consumers of the Hopper backward kernel, BN = 64: one warpgroup for P and dV, one for dS and dK. */
#ifndef FA_BWD_SM90_SPLIT_CUH
#define FA_BWD_SM90_SPLIT_CUH

#include "bwd_sm90_mod.cuh"
#include "bwd_sm90_wild.cuh"

/* P from one warpgroup to the other; a thread reads what the thread of the same place wrote. */
template <class C>
__device__ __forceinline__ void fa_give_weights(fa_bwd_sm90_shared<C> &sh, int t, const uint32_t (&w)[C::BM / 4])
{
    int stage = fa_stage_of(t);
    fa_mbar_wait(&sh.bar[FA_BAR_P_EMPTY + stage], fa_parity_of(t) ^ 1);
#pragma unroll
    for (int i = 0; i < C::BM / 16; i++)
        sh.p[stage][i][threadIdx.x % FA_WARPGROUP] = make_uint4(w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]);
    fa_warp_arrive(&sh.bar[FA_BAR_P_FULL + stage]);
}

template <class C>
__device__ __forceinline__ void fa_take_weights(fa_bwd_sm90_shared<C> &sh, int t, uint32_t (&w)[C::BM / 4])
{
    int stage = fa_stage_of(t);
    fa_mbar_wait(&sh.bar[FA_BAR_P_FULL + stage], fa_parity_of(t));
    fa_fetch_weights<C>(w, &sh.p[stage][0][threadIdx.x % FA_WARPGROUP]);
}

/* s holds S of step t; w <- P, and the other warpgroup gets its weights. */
template <class C>
__device__ __forceinline__ void fa_split_weights(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &sh,
                                                 const fa_bwd_unit &u, int t, int key0, float (&s)[C::BM / 2],
                                                 uint32_t (&w)[C::BM / 4])
{
    if constexpr (C::MOD) {
        fa_mod_weights<C>(p, sh, u, t, key0, s, w);
        if (fa_has<C>(p.mod, FA_MOD_TWO_WEIGHTS)) {
            int stage = fa_stage_of(t);
            fa_mbar_wait(&sh.bar[FA_BAR_P_EMPTY + stage], fa_parity_of(t) ^ 1);
            fa_round_weights<C>(p.mod, sh, t, key0, s, w, &sh.p[stage][0][threadIdx.x % FA_WARPGROUP]);
            fa_warp_arrive(&sh.bar[FA_BAR_P_FULL + stage]);
            return;
        }
    } else {
        fa_weights<C>(p, sh, u, t, key0, s);
    }
    fa_round<C>(w, s);
    fa_give_weights<C>(sh, t, w);
}

/* dV of step t, once its dO is there. */
template <class C>
__device__ __forceinline__ void fa_split_values(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &sh,
                                                const fa_bwd_unit &u, const fa_bwd_keys<C> &c, int t, int key0,
                                                uint32_t (&w)[C::BM / 4], fa_gradient<C::DV> &dv)
{
    int stage = fa_stage_of(t);
    fa_mbar_wait(&sh.bar[FA_BAR_DO_FULL + stage], fa_parity_of(t));
    if (sh.wild[stage] && fa_hides<C>(p, sh, u, t, key0)) {
        fa_clean<typename C::T, C::BM * C::DV>(sh.dout[stage]);
        fa_publish();
    }
    fa_start_values<C>(c, t, w, dv);
}

/* P and dV. Time runs downwards:
 *
 *   tensor cores       this warpgroup
 *   S t+1              wait for S t+1
 *   dV t               P = exp2(S); wait for dV t; hand back the stage of t; round P, give it to the other warpgroup
 */
template <class C>
__device__ __forceinline__ void fa_values_steps(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &sh,
                                                const fa_bwd_unit &u, const fa_bwd_keys<C> &c, int key0,
                                                fa_gradient<C::DV> &dv)
{
    uint32_t w[C::BM / 4];
    float s[C::BM / 2];
    int t = 0;
    fa_start_scores<C>(sh, c, s, 0);
    fa_wgmma_wait<0>();
    fa_split_weights<C>(p, sh, u, 0, key0, s, w);
    for (; t < u.steps - 1; t++) {
        fa_start_scores<C>(sh, c, s, t + 1);
        fa_split_values<C>(p, sh, u, c, t, key0, w, dv);
        fa_wgmma_wait<0>();
        dv.hold();
        fa_warp_arrive(&sh.bar[FA_BAR_EMPTY + fa_stage_of(t)]);
        fa_split_weights<C>(p, sh, u, t + 1, key0, s, w);
    }
    fa_split_values<C>(p, sh, u, c, t, key0, w, dv);
    fa_wgmma_wait<0>();
    dv.hold();
}

/* dP of step t becomes dS. */
template <class C>
__device__ __forceinline__ void fa_split_gradient(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &sh,
                                                  const fa_bwd_unit &u, int t, float (&dp)[C::BM / 2])
{
    uint32_t weights[C::BM / 4];
    fa_take_weights<C>(sh, t, weights);
    fa_wgmma_hold(dp);
    bool hides = fa_hides<C>(p, sh, u, t, u.walk.n * C::BN);
    if (fa_has<C>(p.mod, FA_MOD_TWO_WEIGHTS)) {
        fa_signed_score_gradient<C>(dp, weights, sh.delta[fa_stage_of(t)], p.mod.dropout.factor);
        if (hides)
            fa_clear_hidden<C>(dp, weights);
    } else if (hides) {
        fa_score_gradient<C, true>(dp, weights, sh.delta[fa_stage_of(t)]);
    } else {
        fa_score_gradient<C>(dp, weights, sh.delta[fa_stage_of(t)]);
    }
    fa_warp_arrive(&sh.bar[FA_BAR_P_EMPTY + fa_stage_of(t)]);
}

/* dK of step t. */
template <class C>
__device__ __forceinline__ void fa_split_keys(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &sh,
                                              const fa_bwd_unit &u, const fa_bwd_keys<C> &c, int t,
                                              uint32_t (&ds)[C::BM / 4], fa_gradient<C::D> &dk)
{
    int stage = fa_stage_of(t);
    if (sh.wild[stage] && fa_hides<C>(p, sh, u, t, u.walk.n * C::BN)) {
        fa_mbar_wait(&sh.bar[FA_BAR_Q_FULL + stage], fa_parity_of(t));
        fa_clean<typename C::T, C::BM * C::D>(sh.q[stage]);
        fa_publish();
    }
    fa_start_keys<C>(c, t, ds, dk);
}

/* dS and dK. Time runs downwards:
 *
 *   tensor cores       this warpgroup
 *   dP t+1             dS t to shared memory for dQ; wait for dP t+1
 *   dK t               dS = P o (dP - delta); wait for dK t; hand back the stage of t; round dS
 */
template <class C>
__device__ __forceinline__ void fa_gradient_steps(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &sh,
                                                  const fa_bwd_unit &u, const fa_bwd_keys<C> &c,
                                                  fa_gradient<C::D> &dk)
{
    uint32_t w[C::BM / 4];
    float dp[C::BM / 2];
    int t = 0;
    fa_start_value_scores<C>(sh, c, dp, 0);
    fa_wgmma_wait<0>();
    fa_split_gradient<C>(p, sh, u, 0, dp);
    fa_round<C>(w, dp);
    for (; t < u.steps - 1; t++) {
        fa_start_value_scores<C>(sh, c, dp, t + 1);
        fa_split_keys<C>(p, sh, u, c, t, w, dk);
        fa_hand_over_ds<C>(sh, t, w, 0);
        fa_wgmma_wait<0>();
        dk.hold();
        fa_warp_arrive(&sh.bar[FA_BAR_EMPTY + fa_stage_of(t)]);
        fa_split_gradient<C>(p, sh, u, t + 1, dp);
        fa_round<C>(w, dp);
    }
    fa_split_keys<C>(p, sh, u, c, t, w, dk);
    fa_hand_over_ds<C>(sh, t, w, 0);
    fa_wgmma_wait<0>();
    dk.hold();
}

template <class C>
__device__ __forceinline__ void fa_consume_for_values(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &sh,
                                                      const fa_bwd_unit &u)
{
    fa_bwd_keys<C> c = fa_keys_of<C>(sh, 0);
    int key0 = u.walk.n * C::BN;
    fa_gradient<C::DV> dv;
    dv.clear();
    if (u.steps > 0) {
        fa_mbar_wait(&sh.bar[FA_BAR_K_FULL], 0);
        fa_values_steps<C>(p, sh, u, c, key0, dv);
    }
    fa_store_gradient<C, C::DV>(p, p.dv, u, dv, C::MOD ? p.mod.dropout.factor : 1.f, key0, p.DV);
}

template <class C>
__device__ __forceinline__ void fa_consume_for_keys(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &sh,
                                                    const fa_bwd_unit &u)
{
    fa_bwd_keys<C> c = fa_keys_of<C>(sh, 0);
    fa_gradient<C::D> dk;
    dk.clear();
    if (u.steps > 0) {
        fa_mbar_wait(&sh.bar[FA_BAR_V_FULL], 0);
        fa_gradient_steps<C>(p, sh, u, c, dk);
    }
    fa_store_gradient<C, C::D>(p, p.dk, u, dk, p.scale, u.walk.n * C::BN, p.D);
}

#endif
