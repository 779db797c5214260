/* Backward attention on Hopper: a thread block keeps one block of keys and meets the query blocks that see it.
 *
 *   P  = exp2(scale log2e S - lse)     S  = Q K^T       dV += P^T dO
 *   dS = P o (dP - delta)              dP = dO V^T      dK += dS^T Q      dQ += dS K
 *
 * with delta = rowsum(dO o O) - dlse; dQ and dK are multiplied by scale at the end (Dao et al., "FlashAttention",
 * 2022). S and dP are computed transposed, keys in the rows, so that P^T and dS^T are A operands in registers; only
 * dS^T also goes to shared memory, for dQ. Roles follow Shah et al., "FlashAttention-3", 2024, but for dQ, which has a
 * warpgroup of its own: it adds its sums in fp32 straight from registers, when a flag in device memory says that it is
 * this key block's turn. The order is a function of the shapes alone (bwd_sm90_params.h), so the bits are always the
 * same.
 */
#ifndef FA_BWD_SM90_CUH
#define FA_BWD_SM90_CUH

#include "bwd_sm90_copy.cuh"
#include "bwd_sm90_dq.cuh"
#include "bwd_sm90_ds.cuh"
#include "bwd_sm90_pair.cuh"
#include "bwd_sm90_split.cuh"

/* ---- producer: one thread starts every copy ---------------------------------------------------------------------- */

/* Plain instances know no lengths. */
template <class C>
__device__ __forceinline__ const CUtensorMap *fa_loaded_map(const fa_bwd_sm90_params &p, const CUtensorMap *whole,
                                                            int b, int which)
{
    return fa_has<C>(p.mod, FA_MOD_LENGTHS) ? fa_map_of(p, whole, b, which) : whole;
}

template <class C>
__device__ __forceinline__ void fa_load_keys(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &s,
                                             const fa_bwd_unit &u)
{
    const CUtensorMap *k = fa_loaded_map<C>(p, &p.k_map, u.b, FA_MAP_K);
    const CUtensorMap *v = fa_loaded_map<C>(p, &p.v_map, u.b, FA_MAP_V);
    int row = u.walk.n * C::BN;
    fa_mbar_expect(&s.bar[FA_BAR_K_FULL], sizeof(s.k));
    fa_load_tile<C::BN, C::D>(s.k, k, &s.bar[FA_BAR_K_FULL], row, u.hk * p.k_steps[0], u.b * p.k_steps[1]);
    fa_mbar_expect(&s.bar[FA_BAR_V_FULL], sizeof(s.v));
    fa_load_tile<C::BN, C::DV>(s.v, v, &s.bar[FA_BAR_V_FULL], row, u.hk * p.v_steps[0], u.b * p.v_steps[1]);
}

template <class C>
__device__ __forceinline__ void fa_load_queries(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &s,
                                                const fa_bwd_unit &u, const fa_bwd_step &at, const CUtensorMap *q,
                                                const CUtensorMap *dout)
{
    uint32_t bytes = sizeof(s.q[0]) + sizeof(s.lse[0]);
    int stage = fa_stage_of(at.t);
    int64_t row = fa_query_block(p, u, at) * C::BM;
    uint64_t *q_full = &s.bar[FA_BAR_Q_FULL + stage], *do_full = &s.bar[FA_BAR_DO_FULL + stage];
    uint32_t wild = p.wild ? p.wild[fa_query_block(p, u, at)] : 0;
    fa_mbar_wait(&s.bar[FA_BAR_EMPTY + stage], fa_parity_of(at.t) ^ 1);
    s.query[stage] = at.m * C::BM;
    s.wild[stage] = wild;
    if constexpr (C::MOD) {
        fa_describe_head<C>(p, s, u, at.head, stage);
        bytes += fa_bits_bytes<C>(p.mod);
    }
    fa_mbar_expect(q_full, bytes);
    fa_load_tile<C::BM, C::D>(s.q[stage], q, q_full, at.m * C::BM, at.head * p.q_steps[0], u.b * p.q_steps[1]);
    fa_bulk_load(s.lse[stage], p.row_lse + row, sizeof(s.lse[0]), q_full);
    if constexpr (C::MOD)
        fa_load_bits<C>(p.mod, s, u, at, stage, q_full);
    fa_mbar_expect(do_full, sizeof(s.dout[0]) + sizeof(s.delta[0]));
    fa_load_tile<C::BM, C::DV>(s.dout[stage], dout, do_full, at.m * C::BM, at.head * p.dout_steps[0],
                               u.b * p.dout_steps[1]);
    fa_bulk_load(s.delta[stage], p.row_delta + row, sizeof(s.delta[0]), do_full);
    if constexpr (C::MOD)
        fa_load_bias<C>(p.mod, s, u, at);
}

template <class C>
__device__ __forceinline__ void fa_produce(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &s, const fa_bwd_unit &u)
{
    const CUtensorMap *q = fa_loaded_map<C>(p, &p.q_map, u.b, FA_MAP_Q);
    const CUtensorMap *dout = fa_loaded_map<C>(p, &p.dout_map, u.b, FA_MAP_DOUT);
    fa_load_keys<C>(p, s, u);
    for (fa_bwd_step at = fa_first_step(p, u); at.t < u.steps; fa_next_step(p, u, at))
        fa_load_queries<C>(p, s, u, at, q, dout);
}

/* ---- kernel ------------------------------------------------------------------------------------------------------ */

template <class C>
__device__ __forceinline__ void fa_init_barriers(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &s)
{
    constexpr int one = FA_WARPGROUP / FA_WARP * FA_WARP_ARRIVALS, both = 2 * one; /* of warpgroups */
    int stores_ds = C::STORES_DS && p.mod.dmask_here ? FA_WARP_ARRIVALS : 0;
    fa_mbar_init(&s.bar[FA_BAR_K_FULL], 1);
    fa_mbar_init(&s.bar[FA_BAR_V_FULL], 1);
    fa_mbar_init(&s.bar[FA_BAR_BIAS_FULL], 1);
    fa_mbar_init(&s.bar[FA_BAR_BIAS_EMPTY], C::SPLIT ? one : both);
    fa_mbar_init(&s.bar[FA_BAR_TURN], 1);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        fa_mbar_init(&s.bar[FA_BAR_Q_FULL + i], 1);
        fa_mbar_init(&s.bar[FA_BAR_DO_FULL + i], 1);
        fa_mbar_init(&s.bar[FA_BAR_EMPTY + i], both);
        fa_mbar_init(&s.bar[FA_BAR_DS_FULL + i], C::SPLIT ? one : both);
        fa_mbar_init(&s.bar[FA_BAR_DS_EMPTY + i], one + stores_ds);
        fa_mbar_init(&s.bar[FA_BAR_P_FULL + i], one);
        fa_mbar_init(&s.bar[FA_BAR_P_EMPTY + i], one);
        fa_mbar_init(&s.bar[FA_BAR_ADDED + i], one);
        fa_mbar_init(&s.bar[FA_BAR_SIGNALLED + i], 1);
    }
    fa_mbar_fence_init();
}

template <class C>
__device__ __forceinline__ void fa_serve(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &s, const fa_bwd_unit &u)
{
    int warp = __shfl_sync(0xffffffff, threadIdx.x / FA_WARP, 0);
    if constexpr (C::STORES_DS) {
        if (warp == FA_WARP_DS && p.mod.dmask_here)
            fa_store_mask_gradient<C>(p, s, u);
    }
    if (threadIdx.x % FA_WARP != 0 || u.steps == 0)
        return;
    if (warp == FA_WARP_LOAD)
        fa_produce<C>(p, s, u);
    else if (warp == FA_WARP_TURN)
        fa_await_turns<C>(p, s, u);
    else if (warp == FA_WARP_SIGNAL)
        fa_signal_turns<C>(p, s, u);
}

template <class C>
__global__ void __launch_bounds__(C::THREADS, 1) fa_bwd_sm90_kernel(const __grid_constant__ fa_bwd_sm90_params p)
{
    extern __shared__ __align__(1024) unsigned char raw[];
    fa_bwd_sm90_shared<C> &s = *(fa_bwd_sm90_shared<C> *)raw;
    int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / FA_WARPGROUP, 0);
    fa_bwd_unit u = fa_bwd_unit_of<C>(p);
    if (threadIdx.x == 0)
        fa_init_barriers(p, s);
    __syncthreads();
    if (warpgroup == FA_WARPGROUP_PRODUCER) {
        fa_registers_shrink<C::PRODUCER_REGISTERS>();
        fa_serve<C>(p, s, u);
    } else if (warpgroup == FA_WARPGROUP_DQ) {
        fa_registers_shrink<C::DQ_REGISTERS>();
        if (u.steps > 0)
            fa_sum_dq<C>(p, s, u.steps);
    } else {
        fa_registers_grow<C::CONSUMER_REGISTERS>();
        if constexpr (!C::SPLIT)
            fa_consume_pair<C>(p, s, u, warpgroup == FA_WARPGROUP_FIRST ? 0 : 64);
        else if (warpgroup == FA_WARPGROUP_FIRST)
            fa_consume_for_values<C>(p, s, u);
        else
            fa_consume_for_keys<C>(p, s, u);
    }
}

#endif
