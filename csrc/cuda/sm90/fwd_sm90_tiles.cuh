/* The tiles of the Hopper forward kernel's instances with all options: lengths and offsets lie in device memory, so one
 * thread of a block finds the next tile and tells the other warps by a ring in shared memory, ahead of their need. */
#ifndef FA_FWD_SM90_TILES_CUH
#define FA_FWD_SM90_TILES_CUH

#include "../ptx/mbarrier.cuh"
#include "../ptx/shared_store.cuh"
#include "../ptx/warpgroup.cuh"
#include "../tile/tile_seq.cuh"
#include "fwd_sm90_params.h"

/* One tile: rows row .. row + BM - 1 of a sequence. Behind the last comes one with block_hi = -1, whose n is the last
 * piece of work of the thread block. */
struct fa_mod_tile {
    int32_t n, h, row;          /* sequence, query head, first query within the sequence */
    int32_t b, q_row, k_row;    /* batch index in the tensors, and where the sequence starts there */
    int32_t q_rows, q_len;      /* rows of the sequence, and those that are queries */
    int32_t k_len;
    int32_t offset, lo_shift, hi_shift; /* query i sees i + lo_shift <= j < i + hi_shift */
    int32_t block_lo, block_hi; /* blocks of BN keys that some query sees */
    int32_t tail;               /* rows of V in the last of them that belong to the sequence; BN: none to be cleared */
    float slope, sink;          /* ALiBi and sink of the head, in units of log2 */
};

enum { FA_TILES = 4 }; /* in the ring */
#define FA_NO_UNIT 0xffffffffu

template <int STAGES, int MASK, int FETCHED, class Fetched> struct fa_mod_shared {
    alignas(1024) char mask[2][MASK]; /* of the block at hand and of the next: fwd_sm90_mod.cuh */
    Fetched fetched[FETCHED];         /* of blocks to come: fwd_sm90_fetch.cuh */
    fa_mod_tile tiles[FA_TILES];
    uint64_t tile_full[FA_TILES], tile_empty[FA_TILES];
    uint64_t fetched_full[FETCHED], fetched_empty[FETCHED];
    uint64_t v_raw[STAGES]; /* V has landed, and rows behind the sequence are still to be cleared */
};

/* Item i of a queue of N places goes to place i % N, in its round i / N. */
template <int N> struct fa_stage {
    int index = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next(void)
    {
        if (++index == N) {
            index = 0;
            parity ^= 1;
        }
    }
};
using fa_ring = fa_stage<FA_TILES>;

/* ---- which tile -------------------------------------------------------------------------------------------------- */

/* Tile `part` of piece of work `unit`: sequence, head, first row; false where there is none. Rows of neighbouring
 * blocks belong to one head, whose K and V so stay in the second-level cache; the last rows come first. */
template <int BM>
__device__ __forceinline__ bool fa_mod_tile_place(const fa_fwd_sm90_mod_params &p, uint32_t unit, int part,
                                                  fa_mod_tile *t)
{
    const fa_fwd_sm90_params &q = p.plain;
    if (p.a.cu_q.data) { /* sequence n has the slots cu_q[n] / BM + n on: tile_seq.cuh */
        const int HQ = q.HQ;
        t->n = (int)fa_tile_of(&p.a.cu_q, q.SQ, BM, unit / HQ).n;
        int first = (int)fa_offset_at(&p.a.cu_q, t->n, q.SQ) / BM + t->n;
        int behind = t->n + 1 < p.a.cu_q.size[0] ? (int)fa_offset_at(&p.a.cu_q, t->n + 1, q.SQ) / BM + t->n + 1
                                                 : q.tiles;
        int own = max(behind - first, 1), at = max((int)unit - first * HQ, 0);
        t->h = min(at / own, HQ - 1);
        t->row = (own - 1 - at % own) * BM;
        return true;
    }
    int pieces = (q.tiles + q.parts - 1) / q.parts, low = unit % pieces, head = unit / pieces;
    if (part == 1 && 2 * low + 1 == q.tiles)
        return false; /* the middle tile has no partner */
    t->n = p.heads_outside ? head % q.B : head / q.HQ;
    t->h = p.heads_outside ? head / q.B : head % q.HQ;
    t->row = (part == 0 ? q.tiles - 1 - low : low) * BM;
    return true;
}

/* The rest of a tile. */
template <int BM, int BN>
__device__ __forceinline__ void fa_mod_tile_fill(const fa_fwd_sm90_mod_params &p, fa_mod_tile *t)
{
    const fa_seq s = fa_seq_at(&p.a, t->n);
    t->b = (int)s.q_batch;
    t->q_row = (int)s.q_row;
    t->k_row = (int)s.k_row;
    t->q_rows = (int)s.q_rows;
    t->q_len = (int)s.span.q_len;
    t->k_len = (int)s.span.k_len;
    t->offset = (int)s.span.offset;
    const int64_t far = (int64_t)1 << 30; /* no two positions are further apart */
    t->lo_shift = (int)fa_clamp(p.plain.lo_shift + (p.a.window_left >= 0 ? s.span.offset : 0), -far, far);
    t->hi_shift = (int)fa_clamp(p.plain.hi_shift + (p.a.window_right >= 0 ? s.span.offset : 0), -far, far);
    int last = min(t->row + BM, t->q_len) - 1;
    int lo = max(0, t->row + t->lo_shift), hi = t->row < t->q_len ? min(t->k_len, last + t->hi_shift) : 0;
    t->block_lo = lo / BN;
    t->block_hi = lo < hi ? (hi + BN - 1) / BN : t->block_lo;
    int rows = t->k_len - (t->block_hi - 1) * BN;
    t->tail = rows < BN && t->k_row + t->k_len < p.plain.SK ? rows : BN;
    if (t->q_len == 0)
        return; /* also behind the last sequence, which has no slope and no sink */
    t->slope = p.a.alibi.data ? (float)(fa_per_head(&p.a.alibi, t->n, t->h) * 1.4426950408889634) : 0.f;
    t->sink = p.a.sinks.data ? (float)(fa_per_head(&p.a.sinks, t->n, t->h) * 1.4426950408889634) : 0.f;
}

/* ---- the warp that finds tiles ----------------------------------------------------------------------------------- */

/* Rows of a tile that sees no key, by one warp. */
template <int BM>
__device__ __forceinline__ void fa_mod_fill_blind(const fa_fwd_sm90_mod_params &p, const fa_mod_tile &t)
{
    const fa_fwd_sm90_view &v = p.plain.out;
    int lane = threadIdx.x % FA_WARP, chunks = p.plain.DV / 8, end = min(t.row + BM, t.q_rows);
    char *out = (char *)v.data + 2 * (t.b * v.batch + t.h * v.head + t.q_row * v.row);
    float *lse = p.plain.lse + ((int64_t)t.b * p.plain.HQ + t.h) * p.plain.SQ + t.q_row;
    for (int row = t.row; row < end; row++)
        for (int c = lane; c < chunks; c += FA_WARP)
            *(uint4 *)(out + 2 * (row * v.row + 8 * c)) = make_uint4(0, 0, 0, 0);
    for (int row = t.row + lane; row < end; row += FA_WARP)
        lse[row] = row < t.q_len && p.a.sinks.data ? t.sink * 0.693147180559945f : -INFINITY;
}

/* A bool mask that is the same for all queries of a head (padding) hides whole blocks: those at the ends are left out. All
 * lanes read a part of its row. */
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
    const int padding = FA_MOD_BITS | FA_MOD_VECTORS, what = C::OPTIONS == FA_ALL ? p.what : C::OPTIONS;
    if ((what & padding) == padding && p.mask[2] == 0 && __shfl_sync(0xffffffff, found, 0))
        fa_mod_narrow<C::BN>(p, t);
    return __shfl_sync(0xffffffff, found, 0);
}

/* Tiles without keys are dealt with at once and never seen by the other warps. */
template <class C, class Shared>
__device__ __forceinline__ void fa_find_tiles(const fa_fwd_sm90_mod_params &p, Shared &s)
{
    fa_ring ring;
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
            if (t->block_hi <= t->block_lo) {
                fa_mod_fill_blind<C::BM>(p, *t);
                __syncwarp();
                continue;
            }
            if (lane == 0)
                fa_mbar_arrive(&s.tile_full[ring.index]);
            ring.next();
            fa_mbar_wait(&s.tile_empty[ring.index], ring.parity ^ 1);
        }
    }
    if (lane == 0) {
        s.tiles[ring.index].n = (int32_t)before;
        s.tiles[ring.index].block_hi = -1;
        fa_mbar_arrive(&s.tile_full[ring.index]);
    }
}

/* The piece of work that the thread block had before. */
__device__ __forceinline__ uint32_t fa_unit_before(const fa_fwd_sm90_mod_params &p, uint32_t unit)
{
    if (p.next_unit)
        return p.next_unit[1 + unit];
    return unit >= gridDim.x ? unit - gridDim.x : FA_NO_UNIT;
}

/* The next tile of the ring; its fields stay until it is released. */
template <class Shared> __device__ __forceinline__ const fa_mod_tile &fa_next_tile(Shared &s, const fa_ring &ring)
{
    fa_mbar_wait(&s.tile_full[ring.index], ring.parity);
    return s.tiles[ring.index];
}

/* ---- the warp that clears rows of V ------------------------------------------------------------------------------ */

/* In the last block of a sequence whose tensor goes on behind it, V holds rows that belong to nobody or to another:
 * their weight is 0, but 0 times NaN is NaN. */
template <class C, class Shared> __device__ __forceinline__ void fa_clear_tails(Shared &s)
{
    fa_ring ring;
    int lane = threadIdx.x % FA_WARP, stage = 0;
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
            fa_mbar_wait(&s.v_raw[stage], parities >> stage & 1);
            parities ^= 1u << stage;
#pragma unroll 1
            for (int panel = 0; panel < C::DV / 64; panel++)
                for (int at = tail * 8 + lane; at < C::BN * 8; at += FA_WARP)
                    ((uint4 *)s.v[stage])[panel * C::BN * 8 + at] = make_uint4(0, 0, 0, 0);
            fa_fence_shared_async();
            __syncwarp();
            if (lane == 0)
                fa_mbar_arrive(&s.v_full[stage]);
        }
        stage = (stage + blocks) % C::STAGES;
    }
}

#endif
