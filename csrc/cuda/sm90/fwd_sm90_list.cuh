/* Which blocks of keys a tile of the Hopper forward kernel is computed against, where that is more than a range: the
 * warp that finds tiles lists the blocks that hold a key which a padding mask (a bool mask, the same for all queries
 * of a head) lets through, with the mask as bits, and all other warps go by the list. What is hidden as a whole costs
 * nothing wherever it lies, and what is seen as a whole costs what it does without a mask.
 *
 *   warp that finds tiles    a tile into the ring of tiles, its blocks into the ring of listed blocks, ahead of need
 *   thread that loads        K and V of the listed blocks, one after the other
 *   warps that compute       look up which block is next while products of the one before run
 *
 * A place in the list is free again when K of the block behind has been released, and rows of V are cleared where they
 * must be. */
#ifndef FA_FWD_SM90_LIST_CUH
#define FA_FWD_SM90_LIST_CUH

#include "../ptx/mbarrier.cuh"
#include "../ptx/warpgroup.cuh"
#include "fwd_sm90_mod.cuh"
#include "fwd_sm90_tiles.cuh"

struct alignas(16) fa_listed {
    uint32_t what;    /* FA_FRESH, .., and the tile's place in the ring times FA_PLACE */
    int32_t block;    /* with FA_END the last piece of work of the thread block */
    int32_t row;      /* of the tile */
    int32_t tail;     /* rows of V that belong to the sequence; BN: none to be cleared */
    uint32_t seen[4]; /* padding mask: a bit for each key */
};

enum {
    FA_FRESH = 1,  /* the first of its tile */
    FA_LAST = 2,
    FA_EDGE = 4,   /* some query of the tile does not see some of its keys, or a warp is ragged: fwd_sm90.cuh */
    FA_MIXED = 8,  /* the mask hides some of its keys */
    FA_END = 16,   /* there are no more blocks */
    FA_PLACE = 32,
    FA_LISTED = 16 /* places in the list */
};

template <class Base> struct fa_list_shared : Base {
    fa_listed listed[FA_LISTED];
    uint64_t listed_full[FA_LISTED], listed_empty[FA_LISTED];
};

/* ---- the warp that finds tiles ----------------------------------------------------------------------------------- */

/* A padding mask's bits of 1024 keys: each lane has 32 of them. */
struct fa_padding {
    uint32_t own;  /* behind the last key 0 */
    uint32_t some; /* lanes with a key that is seen */
    uint32_t all;  /* lanes without a key that is hidden */
};

enum { FA_PADDING_KEYS = 1024 };

/* Keys first .. first + 1023, of those that the tile needs. */
template <int BN>
__device__ __forceinline__ fa_padding fa_read_padding(const fa_fwd_sm90_mod_params &p, const fa_mod_tile &t, int first)
{
    const int lane = threadIdx.x % FA_WARP, lo = t.block_lo * BN, hi = min(t.k_len, t.block_hi * BN);
    const uint8_t *row = (const uint8_t *)p.a.mask.data + t.n * p.mask[0] + t.h * p.mask[1] + first * p.mask[3];
    fa_padding m = {};
    if (p.mask[3] == 1 && first + FA_PADDING_KEYS <= p.plain.SK && (uintptr_t)row % 16 == 0) {
        const uint4 *w = (const uint4 *)row + 2 * lane;
        m.own = __byte_perm(fa_bools_to_bits(w[0]), fa_bools_to_bits(w[1]), 0x5410);
    } else {
#pragma unroll 8
        for (int i = 0; i < FA_WARP; i++) {
            int at = FA_WARP * i + lane;
            bool seen = first + at >= lo && first + at < hi && row[at * p.mask[3]];
            uint32_t word = __ballot_sync(0xffffffff, seen);
            m.own = lane == i ? word : m.own;
        }
    }
    const int keys = hi - first - FA_WARP * lane;
    const uint32_t behind = keys >= FA_WARP ? 0 : 0xffffffffu << max(keys, 0);
    m.own &= ~behind;
    m.some = __ballot_sync(0xffffffff, m.own != 0);
    m.all = __ballot_sync(0xffffffff, (m.own | behind) == 0xffffffffu);
    return m;
}

/* The block that was written last is handed on. */
template <class Shared> __device__ __forceinline__ void fa_list_pass(Shared &s, fa_stage<FA_LISTED> &to)
{
    __syncwarp();
    fa_mbar_arrive_warp(&s.listed_full[to.index]);
    to.next();
}

/* Blocks that begin at these keys or between are no edges. */
struct fa_inner {
    int lo, hi;
};

template <class C>
__device__ __forceinline__ fa_inner fa_inner_of(const fa_fwd_sm90_mod_params &p, const fa_mod_tile &t)
{
    bool ragged = t.q_len < t.row + C::BM && t.q_len % 16 != 0 && t.q_row + t.q_len < p.plain.SQ;
    return {t.row + C::BM - 1 + t.lo_shift, ragged ? -1 : min(t.k_len, t.row + t.hi_shift) - C::BN};
}

/* Block `turn` of a tile: from the last to the first, but with an ALiBi that falls with the distance first those from
 * the last query on to the end, then those before it, so that maxima do not climb from block to block. */
template <class C> __device__ __forceinline__ int fa_block_in_turn(const fa_mod_tile &t, int turn)
{
    const int last = t.block_hi - 1;
    if (C::OPTIONS != FA_ALIBI || t.slope <= 0.f)
        return last - turn;
    const int near = max(t.block_lo, min(last, (t.row + C::BM - 1 + t.offset) / C::BN));
    return near + turn <= last ? near + turn : last - turn;
}

/* Lists the blocks of the tile at this place; false: there are none. One is handed on when the next is found, since
 * only then it is known not to be the last. */
template <class C, class Shared>
__device__ __forceinline__ bool fa_list_blocks(const fa_fwd_sm90_mod_params &p, Shared &s, int place,
                                               fa_stage<FA_LISTED> &to)
{
    constexpr int WORDS = C::BN / 32, BLOCKS = FA_PADDING_KEYS / C::BN;
    const fa_mod_tile &t = s.tiles[place];
    const int lane = threadIdx.x % FA_WARP, blocks = t.block_hi - t.block_lo;
    fa_padding m = {0xffffffffu, 0xffffffffu, 0xffffffffu};
    const fa_inner inner = fa_inner_of<C>(p, t);
    bool any = false;
    for (int turn = 0; turn < blocks; turn++) {
        const int block = fa_block_in_turn<C>(t, turn);
        if (p.a.mask.data && (turn == 0 || block % BLOCKS == BLOCKS - 1))
            m = fa_read_padding<C::BN>(p, t, block / BLOCKS * FA_PADDING_KEYS);
        const int shift = block % BLOCKS * WORDS;
        const uint32_t lanes = ((1u << WORDS) - 1) << shift;
        if (!(m.some & lanes))
            continue;
        if (any)
            fa_list_pass(s, to);
        fa_mbar_wait(&s.listed_empty[to.index], to.parity ^ 1);
        fa_listed &l = s.listed[to.index];
        if (lane == 0) {
            bool edge = block * C::BN < inner.lo || block * C::BN > inner.hi, mixed = (m.all & lanes) != lanes;
            l.what = place * FA_PLACE + (any ? 0 : FA_FRESH) + (edge ? FA_EDGE : 0) + (mixed ? FA_MIXED : 0);
            l.block = block;
            l.row = t.row;
            l.tail = block == t.block_hi - 1 ? t.tail : C::BN;
        }
        if (lanes >> lane & 1)
            l.seen[lane - shift] = m.own;
        any = true;
    }
    if (any) {
        if (lane == 0)
            s.listed[to.index].what |= FA_LAST;
        fa_list_pass(s, to);
    }
    return any;
}

template <class Shared>
__device__ __forceinline__ void fa_list_end(Shared &s, uint32_t last_unit, fa_stage<FA_LISTED> &to)
{
    fa_mbar_wait(&s.listed_empty[to.index], to.parity ^ 1);
    if (threadIdx.x % FA_WARP == 0) {
        s.listed[to.index].what = FA_END;
        s.listed[to.index].block = (int32_t)last_unit;
    }
    fa_list_pass(s, to);
}

/* ---- the warps that compute -------------------------------------------------------------------------------------- */

/* Of the bits of a block's keys those of this thread's columns: bit fa_padding_bit(c, x). */
__device__ __forceinline__ constexpr int fa_padding_bit(int c, int x)
{
    return c % 4 * 8 + c / 4 * 2 + x;
}

template <int BN> __device__ __forceinline__ uint32_t fa_take_padding(const fa_listed &l)
{
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < BN / 32; i++)
        bits |= (l.seen[i] >> threadIdx.x % 4 * 2 & 0x03030303u) << 2 * i;
    return bits;
}

template <int BN> __device__ __forceinline__ void fa_hide_padding(float (&s)[BN / 2], uint32_t seen)
{
#pragma unroll
    for (int e = 0; e < BN / 2; e++)
        s[e] = seen >> fa_padding_bit(e / 4, e % 2) & 1 ? s[e] : -CUDART_INF_F;
}

#endif
