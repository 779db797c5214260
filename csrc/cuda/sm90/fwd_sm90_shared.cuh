/* The Hopper forward kernel's configurations, its shared memory, and the tiles of the instances without options. */
#ifndef FA_FWD_SM90_SHARED_CUH
#define FA_FWD_SM90_SHARED_CUH

#include <type_traits>

#include "../ptx/mbarrier.cuh"
#include "../ptx/warpgroup.cuh"
#include "fwd_sm90_fetch.cuh"
#include "fwd_sm90_list.cuh"
#include "fwd_sm90_mod.cuh"
#include "fwd_sm90_params.h"
#include "fwd_sm90_tiles.cuh"

/* T: element; head dimensions D and DV, multiples of 64; WGS warpgroups of 64 queries; BN keys in a block; STAGES
 * blocks of K and of V in flight; EARLY of the BN / 16 products with V are issued after the turn at the tensor cores
 * is passed. BESIDE: the softmax runs beside a warpgroup's own product with V, which takes BN / 4 more registers.
 * OPTIONS: fwd_sm90_params.h. */
template <typename T_, int D_, int DV_, int WGS_, int BN_, int STAGES_, int EARLY_, bool BESIDE_, int OPTIONS_>
struct fa_fwd_sm90_config {
    static constexpr bool BESIDE = BESIDE_, MOD = OPTIONS_ != FA_PLAIN;
    static constexpr int OPTIONS = OPTIONS_;
    using T = T_;
    static constexpr int D = D_, DV = DV_, WGS = WGS_, BN = BN_, STAGES = STAGES_, EARLY = EARLY_;
    static constexpr int BM = 64 * WGS;
    /* Blocks are: fwd_sm90_list.cuh. */
    static constexpr bool LISTED = OPTIONS == FA_LENGTHS || OPTIONS == FA_CAP || OPTIONS == FA_ALIBI;
    /* One more warpgroup fetches the mask, into so many places: fwd_sm90_fetch.cuh. */
    static constexpr bool FETCH = OPTIONS == FA_BITS || OPTIONS == FA_BIAS;
    static constexpr int FETCHED = !FETCH ? 1 : OPTIONS == FA_BIAS && D > 64 ? 2 : 3;
    static constexpr int MASK_BYTES = OPTIONS == FA_BIAS ? 2 : OPTIONS == FA_BITS ? 1 : 0; /* of an element */
    using fetched = fa_fetched<4 * WGS, FETCH ? 16 * BN * MASK_BYTES : 16, OPTIONS == FA_BITS ? FA_WARP : 1>;
    /* Without that warpgroup, of each of two places; with dropout alone for fa_fetch_columns. */
    static constexpr int MASK = OPTIONS == FA_ALL ? BM * BN * 2 : OPTIONS == FA_DROPOUT ? 4 * WGS * BN / 4 * 16 : 16;
    static constexpr int THREADS = FA_WARPGROUP * (WGS + 1 + FETCH);
    static constexpr int PRODUCER_REGISTERS = WGS == 2 ? 24 : 32, FETCH_REGISTERS = 40;
    static constexpr int CONSUMER_REGISTERS = WGS == 3 ? 160 : FETCH ? 224 : 240;
};

/* FA_MOD_* of the call. */
template <class C> __device__ __forceinline__ int fa_what(const fa_fwd_sm90_mod_params &p)
{
    return C::OPTIONS == FA_ALL ? p.what : C::OPTIONS;
}

/* What only the instances with MOD have. */
template <class C, bool MOD = C::MOD> struct fa_fwd_sm90_types {
    struct shared {};
    using params = fa_fwd_sm90_params;
};
template <class C> struct fa_fwd_sm90_types<C, true> {
    using mod = fa_mod_shared<C::STAGES, C::MASK, C::FETCHED, typename C::fetched>;
    using shared = std::conditional_t<C::LISTED, fa_list_shared<mod>, mod>;
    using params = fa_fwd_sm90_mod_params;
};

/* Tiles lie in panels of 64 columns: rows of 128 bytes, swizzled. Q: one block of 64 rows for each warpgroup. */
template <class C> struct fa_fwd_sm90_shared : fa_fwd_sm90_types<C>::shared {
    alignas(1024) typename C::T q[C::WGS][64 * C::D];
    alignas(1024) typename C::T k[C::STAGES][C::BN * C::D];
    alignas(1024) typename C::T v[C::STAGES][C::BN * C::DV];
    uint64_t q_full[C::WGS], q_empty[C::WGS];
    uint64_t k_full[C::STAGES], k_empty[C::STAGES];
    uint64_t v_full[C::STAGES], v_empty[C::STAGES];
};

enum { FA_BAR_TURN = 1 }; /* named barriers FA_BAR_TURN + warpgroup */

/* ---- work -------------------------------------------------------------------------------------------------------- */

struct fa_query_tile {
    int b, h, row;          /* batch, query head, first query */
    int block_lo, block_hi; /* blocks of BN keys that some query sees; one, of hidden keys, where there is none */
};

/* Part `part` of piece of work `unit`. Neighbouring thread blocks share a head, whose K and V so stay in the
 * second-level cache. Where later queries see more keys, a piece is two tiles of a head, the i-th from the end and then
 * the i-th: all pieces take the same time. Loops over units and parts have bounds that are the same for all threads;
 * only so does the assembler keep stages, addresses and descriptors in uniform registers. */
template <class C> __device__ __forceinline__ fa_query_tile fa_tile_at(const fa_fwd_sm90_params &p, int unit, int part)
{
    int pieces = (p.tiles + p.parts - 1) / p.parts;
    int low = unit % pieces, head = unit / pieces;
    bool alone = 2 * low + 1 == p.tiles; /* the middle tile has no partner: its part 1 lies behind the last query */
    fa_query_tile t;
    t.b = head / p.HQ;
    t.h = head % p.HQ;
    t.row = (part == 0 ? p.tiles - 1 - low : alone ? p.tiles : low) * C::BM;
    int last = min(t.row + C::BM, p.SQ) - 1;
    int key_lo = max(0, t.row + p.lo_shift), key_hi = t.row < p.SQ ? min(p.SK, last + p.hi_shift) : 0;
    t.block_lo = key_lo / C::BN;
    t.block_hi = max((key_hi + C::BN - 1) / C::BN, t.block_lo + 1);
    return t;
}

#endif
