/* The gradient of a float mask, from the dS that the main kernel has.
 *
 * An element of the mask belongs to one query head, and to one batch or to all of them. Where all batches share it, the
 * thread blocks of their same keys are a cluster, one batch each, and take the same steps at nearly the same time. The
 * keys of a tile are dealt out to the ranks of the cluster. A warp of each sends its dS of the others' keys to them,
 * adds up what belongs to its own, in the order of batches, and has the sum stored:
 *
 *   ds of this rank --> place of this rank at the owner             the copy engine, from shared to shared memory
 *   own ds and the places --> staged, keys next to each other --> the mask's gradient
 *
 * Time runs downwards; a stage of ds is empty once dQ and all ranks have taken it, which also says that what was sent
 * has arrived and was read, so places have two stages and no barriers of their own:
 *
 *   consumers           copy engine            this warp
 *   dS t                pieces of t - 1        add t - 1, stage it; hand back ds t - 1 in all ranks; store
 *   dS t + 1            pieces of t            send t; ...
 *
 * With one rank nothing is sent, and t is staged at once. */
#ifndef FA_BWD_SM90_SHARE_CUH
#define FA_BWD_SM90_SHARE_CUH

#include "../ptx/cluster.cuh"
#include "../ptx/tma.cuh"
#include "bwd_sm90_tile.cuh"

/* `keys` of each rank, for PANELS of 64 queries: a piece. In ds and in places, a row is a key and 64 queries. */
template <class C> struct fa_share {
    static constexpr int PANELS = C::BM / 64;
    int ranks, rank, keys;
    uint32_t staged, ds; /* addresses; ds: of stage 0 */

    __device__ __forceinline__ int piece(void) const
    {
        return PANELS * keys * 128;
    }

    /* Behind what is staged: in this thread block, or as seen from it in `to`. */
    __device__ __forceinline__ uint32_t place(int stage, int from, int to) const
    {
        return staged + (1 + stage * (ranks - 1) + from - (from > to)) * piece();
    }

    __device__ __forceinline__ uint32_t in_ds(int stage, int of) const
    {
        return ds + stage * (C::BM * C::BN * 2) + of * keys * 128;
    }
};

/* By one thread: what belongs to others. full: that of the stage. */
template <class C>
__device__ __forceinline__ void fa_send_pieces(const fa_share<C> &f, int stage, uint64_t *full)
{
    fa_mbar_expect(full, (f.ranks - 1) * f.piece());
#pragma unroll 1
    for (int to = 0; to < f.ranks; to++) {
        if (to == f.rank)
            continue;
        uint32_t there = fa_address_in(f.place(stage, f.rank, to), to), bar = fa_address_in(fa_shared_address(full), to);
#pragma unroll
        for (int panel = 0; panel < f.PANELS; panel++)
            fa_bulk_send(there + panel * f.keys * 128, f.in_ds(stage, to) + panel * (C::BN * 128), f.keys * 128, bar);
    }
}

/* sum += 8 numbers */
template <typename T> __device__ __forceinline__ void fa_add_words(float (&sum)[8], const uint32_t (&w)[4])
{
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float2 x = fa_unpack<T>(w[j]);
        sum[2 * j] += x.x;
        sum[2 * j + 1] += x.y;
    }
}

/* 16 keys of 16 queries, of all ranks, in the layout of ldmatrix: `own` in this rank's ds, `first` in the place of the
 * first other rank. */
template <class C>
__device__ __forceinline__ void fa_sum_ranks(const fa_share<C> &f, uint32_t own, uint32_t first, uint32_t (&w)[4])
{
    float sum[8] = {};
    fa_ldmatrix_x4_trans(w, f.rank == 0 ? own : first);
#pragma unroll 1
    for (int from = 1; from <= f.ranks; from++) {
        uint32_t next[4] = {};
        if (from < f.ranks)
            fa_ldmatrix_x4_trans(next, from == f.rank ? own : first + (from - (from > f.rank)) * f.piece());
        fa_add_words<typename C::T>(sum, w);
#pragma unroll
        for (int j = 0; j < 4; j++)
            w[j] = next[j];
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
        w[j] = fa_pack<typename C::T>(sum[2 * j], sum[2 * j + 1]);
}

/* 16 own keys from `key` on, of 64 queries. Staged are boxes of 64 queries and at most 64 keys, in rows of `row` bytes,
 * swizzled as the map of the gradient wants them. */
template <class C>
__device__ __forceinline__ void fa_stage_keys(const fa_share<C> &f, int stage, int panel, int key)
{
    int lane = threadIdx.x % FA_WARP, matrix = lane / 8, line = lane % 8, row = min(128, 2 * f.keys);
    int query = matrix / 2 * 8 + line, chunk = key % 64 / 8 + matrix % 2;
    uint32_t within = (key + matrix % 2 * 8 + line) * 128;
    uint32_t own = f.in_ds(stage, f.rank) + panel * (C::BN * 128) + within;
    uint32_t first = f.place(stage, f.rank > 0 ? 0 : 1, f.rank) + panel * f.keys * 128 + within;
    uint32_t to = f.staged + panel * f.keys * 128 + key / 64 * (64 * 128) + query * row +
                  ((chunk ^ query * row / 128 % (row / 16)) << 4);
#pragma unroll
    for (int part = 0; part < 4; part++) { /* 16 queries */
        uint32_t at = (2 * part + matrix / 2 ^ line) << 4, w[4];
        if (f.ranks == 1)
            fa_ldmatrix_x4_trans(w, own + at);
        else
            fa_sum_ranks<C>(f, own + at, first + at, w);
        fa_stmatrix_x4(to + part * (16 * row), w[0], w[1], w[2], w[3]);
    }
}

/* By one thread: the boxes that are staged; head and m as at has them. */
template <class C>
__device__ __forceinline__ void fa_store_boxes(const fa_bwd_sm90_params &p, const fa_share<C> &f, const fa_bwd_unit &u,
                                               const fa_bwd_step &at)
{
#pragma unroll 1
    for (int key = 0; key < f.keys; key += 64) {
#pragma unroll
        for (int panel = 0; panel < f.PANELS; panel++)
            fa_tma_store_4d(&p.mod.dmask_map, f.staged + (panel * f.keys + key) * 128,
                            u.walk.n * C::BN + f.rank * f.keys + key, at.m * C::BM + panel * 64,
                            at.head * p.mod.dmask_steps[0], u.b * p.mod.dmask_steps[1]);
    }
    fa_bulk_commit();
}

/* One step: what belongs to this rank. */
template <class C>
__device__ __forceinline__ void fa_share_step(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &s,
                                              const fa_share<C> &f, const fa_bwd_unit &u, const fa_bwd_step &at)
{
    int lane = threadIdx.x % FA_WARP, stage = fa_stage_of(at.t);
    if (f.ranks > 1)
        fa_mbar_wait(&s.bar[FA_BAR_SHARED_FULL + stage], fa_parity_of(at.t));
    fa_bulk_wait_read();
    __syncwarp();
#pragma unroll 1
    for (int key = 0; key < f.keys; key += 16) {
#pragma unroll
        for (int panel = 0; panel < f.PANELS; panel++)
            fa_stage_keys<C>(f, stage, panel, key);
    }
    fa_fence_shared_async();
    __syncwarp();
    if (lane < f.ranks)
        fa_mbar_arrive_at(fa_address_in(fa_shared_address(&s.bar[FA_BAR_DS_EMPTY + stage]), lane));
    if (lane == 0)
        fa_store_boxes<C>(p, f, u, at);
}

/* What no step of this thread block meets gets no gradient. */
template <class C>
__device__ __forceinline__ void fa_clear_rest(const fa_bwd_sm90_params &p, const fa_share<C> &f, const fa_bwd_unit &u)
{
    int lane = threadIdx.x % FA_WARP;
    fa_bulk_wait_read();
    __syncwarp();
    for (int i = lane; i < f.piece() / 16; i += FA_WARP)
        fa_store_shared_16(f.staged + 16 * i, 0, 0, 0, 0);
    fa_fence_shared_async();
    __syncwarp();
    fa_bwd_step at = {0, u.hk * p.group, 0, 0};
    for (; lane == 0 && at.head < (u.hk + 1) * p.group; at.head++) {
        for (at.m = 0; at.m < p.q_blocks; at.m++)
            if (at.m < u.walk.lo || at.m >= u.walk.hi)
                fa_store_boxes<C>(p, f, u, at);
    }
}

/* All steps, by a warp. */
template <class C>
__device__ __forceinline__ void fa_share_ds(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &s, const fa_bwd_unit &u)
{
    int ranks = C::RANKS == 1 ? 1 : p.cluster, behind = ranks > 1;
    fa_share<C> f = {ranks, (int)blockIdx.x % ranks, C::BN / ranks, fa_shared_address(s.shared_ds),
                     fa_shared_address(s.ds[0])};
    fa_bwd_step at = fa_first_step(p, u);
#pragma unroll 1
    for (int t = 0; at.t < u.steps; t++) {
        int stage = fa_stage_of(t);
        if (t < u.steps) {
            fa_mbar_wait(&s.bar[FA_BAR_DS_FULL + stage], fa_parity_of(t));
            if (ranks > 1 && threadIdx.x % FA_WARP == 0)
                fa_send_pieces<C>(f, stage, &s.bar[FA_BAR_SHARED_FULL + stage]);
        }
        if (t >= behind) {
            fa_share_step<C>(p, s, f, u, at);
            fa_next_step(p, u, at);
        }
    }
    if (u.walk.hi - u.walk.lo < p.q_blocks)
        fa_clear_rest<C>(p, f, u);
    fa_bulk_wait_read();
}

#endif
