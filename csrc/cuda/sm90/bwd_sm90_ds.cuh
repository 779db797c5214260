/* dS as the gradient of a float mask, where each element of the mask belongs to one pair of a query and a key of one
 * head and batch: nothing has to be summed, so the main kernel stores what it has for dQ.
 *
 * One warp turns a tile round, from rows of 64 queries to rows of 64 keys, while dQ takes it; the copy engine stores
 * it. A stage of ds is empty when both have it. */
#ifndef FA_BWD_SM90_DS_CUH
#define FA_BWD_SM90_DS_CUH

#include "../ptx/tma.cuh"
#include "bwd_sm90_tile.cuh"

/* 16 keys from `key` on, of 64 queries: from ds to boxes of 64 queries and 64 keys, both swizzled. */
template <class C> __device__ __forceinline__ void fa_turn_ds(uint32_t staged, uint32_t ds, int panel, int key)
{
    int lane = threadIdx.x % FA_WARP, matrix = lane / 8, line = lane % 8;
    int query = matrix / 2 * 8 + line, chunk = key % 64 / 8 + matrix % 2;
    uint32_t from = ds + panel * (C::BN * 128) + (key + matrix % 2 * 8 + line) * 128, w[4][4];
    uint32_t to = staged + (panel * C::BN + key / 64 * 64 + query) * 128 + ((chunk ^ line) << 4);
#pragma unroll
    for (int part = 0; part < 4; part++) /* 16 queries */
        fa_ldmatrix_x4_trans(w[part], from + ((2 * part + matrix / 2 ^ line) << 4));
#pragma unroll
    for (int part = 0; part < 4; part++)
        fa_stmatrix_x4(to + part * (16 * 128), w[part][0], w[part][1], w[part][2], w[part][3]);
}

/* By one thread: what is staged, to block m of queries. */
template <class C>
__device__ __forceinline__ void fa_store_staged(const fa_bwd_sm90_params &p, uint32_t staged, const fa_bwd_unit &u,
                                                int head, int m)
{
#pragma unroll
    for (int panel = 0; panel < C::BM / 64; panel++) {
#pragma unroll
        for (int key = 0; key < C::BN; key += 64)
            fa_tma_store_4d(&p.mod.dmask_map, staged + (panel * C::BN + key) * 128, u.walk.n * C::BN + key,
                            m * C::BM + panel * 64, head * p.mod.dmask_steps[0], u.b * p.mod.dmask_steps[1]);
    }
    fa_bulk_commit();
}

/* Query blocks that see none of the keys get zeros. */
template <class C>
__device__ __forceinline__ void fa_store_unseen(const fa_bwd_sm90_params &p, uint32_t staged, const fa_bwd_unit &u)
{
    int lane = threadIdx.x % FA_WARP;
    fa_bulk_wait_read();
    __syncwarp();
    for (int i = lane; i < C::BM * C::BN * 2 / 16; i += FA_WARP)
        fa_store_shared_16(staged + 16 * i, 0, 0, 0, 0);
    fa_fence_shared_async();
    __syncwarp();
    for (int head = u.hk * p.group; lane == 0 && head < (u.hk + 1) * p.group; head++) {
        for (int m = 0; m < p.q_blocks; m++)
            if (m < u.walk.lo || m >= u.walk.hi)
                fa_store_staged<C>(p, staged, u, head, m);
    }
}

/* All steps, by a warp. */
template <class C>
__device__ __forceinline__ void fa_store_mask_gradient(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &s,
                                                       const fa_bwd_unit &u)
{
    uint32_t staged = fa_shared_address(s.staged);
    for (fa_bwd_step at = fa_first_step(p, u); at.t < u.steps; fa_next_step(p, u, at)) {
        int stage = fa_stage_of(at.t);
        fa_mbar_wait(&s.bar[FA_BAR_DS_FULL + stage], fa_parity_of(at.t));
        fa_bulk_wait_read();
        __syncwarp();
#pragma unroll 1
        for (int key = 0; key < C::BN; key += 16) {
#pragma unroll
            for (int panel = 0; panel < C::BM / 64; panel++)
                fa_turn_ds<C>(staged, fa_shared_address(s.ds[stage]), panel, key);
        }
        fa_fence_shared_async();
        fa_warp_arrive(&s.bar[FA_BAR_DS_EMPTY + stage]);
        if (threadIdx.x % FA_WARP == 0)
            fa_store_staged<C>(p, staged, u, at.head, at.m);
    }
    if (u.walk.hi - u.walk.lo < p.q_blocks)
        fa_store_unseen<C>(p, staged, u);
    fa_bulk_wait_read();
}

#endif
