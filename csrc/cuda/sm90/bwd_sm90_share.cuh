/* The gradient of a float mask, from the dS that the main kernel has.
 *
 * An element of the mask belongs to one query head, and to one batch or to all of them. Where all batches share it, the
 * thread blocks of their same keys are a cluster, one batch each, and take the same steps at nearly the same time. The
 * keys of a tile are dealt out in slices of 16 to the ranks of the cluster. A warp of each sends its dS of the others'
 * slices to them, adds up what belongs to it, in the order of batches, and has the sum stored:
 *
 *   ds of this rank --> slot `rank` of shared_ds of the owner     the copy engine, from shared to shared memory
 *   the slots and its own ds --> own slot, keys next to each other --> the mask's gradient
 *
 * A stage of ds is empty once dQ and all ranks have taken it; that also says that what was sent has arrived and was
 * read, so the slots need no barrier of their own. */
#ifndef FA_BWD_SM90_SHARE_CUH
#define FA_BWD_SM90_SHARE_CUH

#include "../ptx/cluster.cuh"
#include "../ptx/tma.cuh"
#include "bwd_sm90_tile.cuh"

enum { FA_SLICE = 16, FA_SLICE_BYTES = FA_SLICE * 128 }; /* keys; bytes for 64 queries */

/* Slices are numbered s = 0 .. BN / 16 - 1 and belong to rank s % ranks; the i-th of its own lies in place i of a slot,
 * with its PANELS of 64 queries. */
template <class C> struct fa_slices {
    static constexpr int COUNT = C::BN / FA_SLICE, PANELS = C::BM / 64;
    int ranks, rank, own;
    uint32_t slots, ds; /* addresses: of slot 0; of the stage of ds */

    __device__ __forceinline__ uint32_t in_slot(int slot, int i, int panel) const
    {
        return slots + ((slot * own + i) * PANELS + panel) * FA_SLICE_BYTES;
    }

    __device__ __forceinline__ uint32_t in_ds(int slice, int panel) const
    {
        return ds + panel * (C::BN * 128) + slice * FA_SLICE_BYTES;
    }

    __device__ __forceinline__ uint32_t bytes_received(void) const
    {
        return (ranks - 1) * own * PANELS * FA_SLICE_BYTES;
    }
};

/* By one thread: what belongs to others. */
template <class C> __device__ __forceinline__ void fa_send_slices(const fa_slices<C> &f, uint64_t *full)
{
    fa_mbar_expect(full, f.bytes_received());
    for (int slice = 0; slice < f.COUNT; slice++) {
        int to = slice % f.ranks;
        if (to == f.rank)
            continue;
#pragma unroll
        for (int panel = 0; panel < f.PANELS; panel++)
            fa_bulk_send(fa_address_in(f.in_slot(f.rank, slice / f.ranks, panel), to), f.in_ds(slice, panel),
                         FA_SLICE_BYTES, fa_address_in(fa_shared_address(full), to));
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

/* One slice of 64 queries, the i-th of this rank. ds has rows of 64 queries, swizzled in 128 bytes; the own slot gets rows
 * of 16 keys, swizzled in 32 bytes as the map of the gradient wants them. */
template <class C> __device__ __forceinline__ void fa_sum_slice(const fa_slices<C> &f, int i, int panel)
{
    int lane = threadIdx.x % FA_WARP, matrix = lane / 8, row = lane % 8;
    int key = matrix % 2 * 8 + row, query = matrix / 2 * 8 + row;
    uint32_t to = f.in_slot(f.rank, i, panel) + query * 32 + ((matrix ^ query / 4) % 2 << 4);
#pragma unroll
    for (int part = 0; part < 4; part++) { /* 16 queries */
        uint32_t within = key * 128 + ((2 * part + matrix / 2 ^ row) << 4), w[4];
        if (f.ranks == 1) {
            fa_ldmatrix_x4_trans(w, f.in_ds(i, panel) + within);
        } else {
            float sum[8] = {};
            for (int from = 0; from < f.ranks; from++) {
                bool mine = from == f.rank;
                fa_ldmatrix_x4_trans(w, (mine ? f.in_ds(i * f.ranks + f.rank, panel) : f.in_slot(from, i, panel)) + within);
                fa_add_words<typename C::T>(sum, w);
            }
#pragma unroll
            for (int j = 0; j < 4; j++)
                w[j] = fa_pack<typename C::T>(sum[2 * j], sum[2 * j + 1]);
        }
        fa_stmatrix_x4(to + part * (16 * 32), w[0], w[1], w[2], w[3]);
    }
}

/* By one thread. */
template <class C>
__device__ __forceinline__ void fa_store_slices(const fa_bwd_sm90_params &p, const fa_slices<C> &f,
                                                const fa_bwd_unit &u, const fa_bwd_step &at)
{
    for (int i = 0; i < f.own; i++) {
#pragma unroll
        for (int panel = 0; panel < f.PANELS; panel++)
            fa_tma_store_4d(&p.mod.dmask_map, f.in_slot(f.rank, i, panel),
                            u.walk.n * C::BN + (i * f.ranks + f.rank) * FA_SLICE, at.m * C::BM + panel * 64,
                            at.head * p.mod.dmask_steps[0], u.b * p.mod.dmask_steps[1]);
    }
    fa_bulk_commit();
}

/* All steps, by a warp. Nothing is sent before what was sent last has been read. */
template <class C>
__device__ __forceinline__ void fa_share_ds(const fa_bwd_sm90_params &p, fa_bwd_sm90_shared<C> &s, const fa_bwd_unit &u)
{
    int lane = threadIdx.x % FA_WARP;
    fa_slices<C> f = {p.cluster, (int)blockIdx.x % p.cluster, fa_slices<C>::COUNT / p.cluster,
                      fa_shared_address(s.mod.shared_ds), 0};
    for (fa_bwd_step at = fa_first_step(p, u); at.t < u.steps; fa_next_step(p, u, at)) {
        int stage = fa_stage_of(at.t);
        f.ds = fa_shared_address(s.ds[stage]);
        fa_mbar_wait(&s.bar[FA_BAR_DS_FULL + stage], fa_parity_of(at.t));
        if (f.ranks > 1) {
            if (at.t > 0)
                fa_mbar_wait(&s.bar[FA_BAR_DS_EMPTY + (stage ^ 1)], fa_parity_of(at.t - 1));
            if (lane == 0)
                fa_send_slices<C>(f, &s.bar[FA_BAR_SHARED_FULL]);
            fa_mbar_wait(&s.bar[FA_BAR_SHARED_FULL], at.t & 1);
        }
        if (lane == 0)
            fa_bulk_wait_read();
        __syncwarp();
        for (int i = 0; i < f.own; i++) {
#pragma unroll
            for (int panel = 0; panel < f.PANELS; panel++)
                fa_sum_slice<C>(f, i, panel);
        }
        fa_fence_shared_async();
        __syncwarp();
        if (lane < f.ranks)
            fa_mbar_arrive_at(fa_address_in(fa_shared_address(&s.bar[FA_BAR_DS_EMPTY + stage]), lane));
        if (lane == 0)
            fa_store_slices<C>(p, f, u, at);
    }
    if (lane == 0)
        fa_bulk_wait_read();
}

#endif
