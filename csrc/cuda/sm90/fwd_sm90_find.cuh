/* The two warps of the Hopper forward kernel that help the thread that loads, in the instances with lengths and
 * options: one finds tiles, ahead of need, one clears rows of V. */
#ifndef FA_FWD_SM90_FIND_CUH
#define FA_FWD_SM90_FIND_CUH

#include "../ptx/mbarrier.cuh"
#include "../ptx/shared_store.cuh"
#include "../ptx/warpgroup.cuh"
#include "fwd_sm90_list.cuh"
#include "fwd_sm90_tiles.cuh"

/* ---- the warp that finds tiles ----------------------------------------------------------------------------------- */

/* Rows of a tile that sees no key, by one warp. */
template <int BM>
__device__ __forceinline__ void fa_mod_fill_blind(const fa_fwd_sm90_mod_params &p, const fa_mod_tile &t)
{
    const fa_fwd_sm90_view &v = p.plain.out;
    int lane = threadIdx.x % FA_WARP, end = min(t.row + BM, t.q_rows);
    char *out = (char *)v.data + 2 * (t.b * v.batch + t.h * v.head + t.q_row * v.row);
    float *lse = p.plain.lse + ((int64_t)t.b * p.plain.HQ + t.h) * p.plain.SQ + t.q_row;
    for (int row = t.row + lane / 4; row < end; row += 8)
        for (int d = lane % 4 * 8; d < p.plain.DV; d += 32)
            *(uint4 *)(out + 2 * (row * v.row + d)) = make_uint4(0, 0, 0, 0);
    for (int row = t.row + lane; row < end; row += FA_WARP)
        lse[row] = row < t.q_len && p.a.sinks.data ? t.sink * 0.693147180559945f : -INFINITY;
}

/* With other options, of the blocks that a padding mask hides as a whole those at the ends are left out. All lanes
 * read a part of its row. */
template <int BN> __device__ __forceinline__ void fa_mod_narrow(const fa_fwd_sm90_mod_params &p, fa_mod_tile *t)
{
    const uint8_t *row = (const uint8_t *)p.a.mask.data + t->n * p.mask[0] + t->h * p.mask[1];
    int first = INT32_MAX, last = -1, end = min(t->k_len, t->block_hi * BN);
    for (int j = t->block_lo * BN + threadIdx.x % FA_WARP * 16; j < end; j += FA_WARP * 16) {
        const uint4 w = *(const uint4 *)(row + j);
        if (w.x | w.y | w.z | w.w) {
            first = min(first, j);
            last = j + 15;
        }
    }
    first = __reduce_min_sync(0xffffffff, first);
    last = __reduce_max_sync(0xffffffff, last);
    __syncwarp();
    if (threadIdx.x % FA_WARP == 0 && last >= 0) {
        int hi = min(t->block_hi, last / BN + 1);
        t->tail = hi < t->block_hi ? BN : t->tail;
        t->block_lo = max(t->block_lo, first / BN);
        t->block_hi = hi;
    } else if (threadIdx.x % FA_WARP == 0) {
        t->block_hi = t->block_lo;
    }
    __syncwarp();
}

/* Lane 0 writes the tile of this unit and part, if there is one, into the ring. */
template <class C>
__device__ __forceinline__ bool fa_mod_tile_at(const fa_fwd_sm90_mod_params &p, uint32_t unit, int part, fa_mod_tile *t)
{
    bool found = false;
    if (threadIdx.x % FA_WARP == 0) {
        found = fa_mod_tile_place<C::BM>(p, unit, part, t);
        if (found)
            fa_mod_tile_fill<C::BM, C::BN>(p, t);
    }
    __syncwarp();
    found = __shfl_sync(0xffffffff, found, 0);
    const int padding = FA_MOD_PADDING | FA_MOD_VECTORS;
    if (C::OPTIONS == FA_ALL && (p.what & padding) == padding && found)
        fa_mod_narrow<C::BN>(p, t);
    return found;
}

/* The tile at this place is complete and handed on, or its blocks are; false: it has no keys. */
template <class C, class Shared>
__device__ __forceinline__ bool fa_hand_on(const fa_fwd_sm90_mod_params &p, Shared &s, int place,
                                           fa_stage<FA_LISTED> &list)
{
    if constexpr (C::LISTED) {
        return fa_list_blocks<C>(p, s, place, list);
    } else {
        bool any = s.tiles[place].block_hi > s.tiles[place].block_lo;
        if (any && threadIdx.x % FA_WARP == 0)
            fa_mbar_arrive(&s.tile_full[place]);
        return any;
    }
}

/* There are no more tiles. */
template <class C, class Shared>
__device__ __forceinline__ void fa_hand_end(Shared &s, int place, uint32_t last_unit, fa_stage<FA_LISTED> &list)
{
    if constexpr (C::LISTED) {
        fa_list_end(s, last_unit, list);
    } else if (threadIdx.x % FA_WARP == 0) {
        s.tiles[place].n = (int32_t)last_unit;
        s.tiles[place].block_hi = -1;
        fa_mbar_arrive(&s.tile_full[place]);
    }
}

/* Tiles without keys are dealt with at once and never seen by the other warps. */
template <class C, class Shared>
__device__ __forceinline__ void fa_find_tiles(const fa_fwd_sm90_mod_params &p, Shared &s)
{
    fa_ring ring;
    fa_stage<FA_LISTED> list;
    int lane = threadIdx.x % FA_WARP;
    uint32_t unit = blockIdx.x, before = FA_NO_UNIT;
    fa_mbar_wait(&s.tile_empty[0], 1);
    for (;; before = unit, unit += gridDim.x) {
        if (p.next_unit)
            unit = __shfl_sync(0xffffffff, lane == 0 ? atomicAdd(p.next_unit, 1) : 0, 0);
        if (unit >= (uint32_t)p.plain.units)
            break;
        if (p.next_unit && lane == 0)
            p.next_unit[1 + unit] = before;
        for (int part = 0; part < p.plain.parts; part++) {
            fa_mod_tile *t = &s.tiles[ring.index];
            if (!fa_mod_tile_at<C>(p, unit, part, t))
                continue;
            if (!fa_hand_on<C>(p, s, ring.index, list)) {
                fa_mod_fill_blind<C::BM>(p, *t);
                __syncwarp();
                continue;
            }
            ring.next();
            fa_mbar_wait(&s.tile_empty[ring.index], ring.parity ^ 1);
        }
    }
    fa_hand_end<C>(s, ring.index, before, list);
}

/* ---- the warp that clears rows of V ------------------------------------------------------------------------------ */

/* In the last block of a sequence whose tensor goes on behind it, V holds rows that belong to nobody or to another:
 * their weight is 0, but 0 times NaN is NaN. */
template <class C, class Shared>
__device__ __forceinline__ void fa_clear_tail(Shared &s, int stage, int tail, uint32_t parity)
{
    const int lane = threadIdx.x % FA_WARP;
    fa_mbar_wait(&s.v_raw[stage], parity);
#pragma unroll 1
    for (int panel = 0; panel < C::DV / 64; panel++)
        for (int at = tail * 8 + lane; at < C::BN * 8; at += FA_WARP)
            ((uint4 *)s.v[stage])[panel * C::BN * 8 + at] = make_uint4(0, 0, 0, 0);
    fa_fence_shared_async();
    __syncwarp();
    if (lane == 0)
        fa_mbar_arrive(&s.v_full[stage]);
}

/* In the last block of each tile of the ring. */
template <class C, class Shared> __device__ __forceinline__ void fa_clear_tails(Shared &s)
{
    fa_ring ring;
    int stage = 0;
    uint32_t parities = 0;
    for (;; ring.next()) {
        const fa_mod_tile &t = fa_next_tile(s, ring);
        int blocks = t.block_hi - t.block_lo, tail = t.tail;
        bool end = t.block_hi < 0;
        __syncwarp();
        fa_mbar_arrive_warp(&s.tile_empty[ring.index]);
        if (end)
            return;
        if (tail < C::BN) {
            fa_clear_tail<C>(s, stage, tail, parities >> stage & 1);
            parities ^= 1u << stage;
        }
        stage = (stage + blocks) % C::STAGES;
    }
}

/* The same where blocks are listed. */
template <class C, class Shared> __device__ __forceinline__ void fa_clear_listed_tails(Shared &s)
{
    fa_stage<FA_LISTED> from;
    fa_stage<C::STAGES> vs;
    uint32_t parities = 0;
    for (;; from.next(), vs.next()) {
        fa_mbar_wait(&s.listed_full[from.index], from.parity);
        uint32_t what = s.listed[from.index].what;
        int tail = s.listed[from.index].tail;
        __syncwarp();
        fa_mbar_arrive_warp(&s.listed_empty[from.index]);
        if (what & FA_END)
            return;
        if (tail < C::BN) {
            fa_clear_tail<C>(s, vs.index, tail, parities >> vs.index & 1);
            parities ^= 1u << vs.index;
        }
    }
}

#endif
