/* The tiles of the Hopper forward kernel's instances with lengths and options: lengths and offsets lie in device
 * memory, so one warp of a block finds the next tile (fwd_sm90_find.cuh) and tells the other warps by a ring in shared
 * memory, ahead of their need. */
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

#endif
