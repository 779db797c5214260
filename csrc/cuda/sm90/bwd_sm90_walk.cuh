/* Which query blocks a block of keys meets, in which order, and whose turn it is to add to a block of dQ. */
#ifndef FA_BWD_SM90_WALK_CUH
#define FA_BWD_SM90_WALK_CUH

#include "bwd_sm90_params.h"

/* Key block n, of the ring ring0 .. ring0 + size - 1. Query blocks lo .. hi - 1 see some key of it; none when
 * hi <= lo. */
struct fa_walk {
    int n, ring0, size, lo, hi;
};

__device__ __forceinline__ fa_walk fa_walk_of(const fa_bwd_sm90_params &p, int n, int ring0, int size, int BM, int BN)
{
    int key0 = n * BN, key1 = min(p.SK, key0 + BN) - 1;
    int first = max(0, key0 - p.hi_shift + 1), end = min(p.SQ, key1 - p.lo_shift + 1);
    fa_walk w = {n, ring0, size, first / BM, first < end ? (end - 1) / BM + 1 : 0};
    return w;
}

__device__ __forceinline__ int fa_walk_steps(const fa_walk &w)
{
    return max(0, w.hi - w.lo);
}

__device__ __forceinline__ int fa_walk_start(const fa_bwd_sm90_params &p, const fa_walk &w)
{
    if (p.order == FA_BWD_DOWN)
        return w.hi - 1;
    if (p.order == FA_BWD_UP)
        return w.lo;
    int m = (int)(((int64_t)(w.n - w.ring0) * p.q_blocks + w.size - 1) / w.size);
    return m == p.q_blocks ? 0 : m;
}

__device__ __forceinline__ int fa_walk_next(const fa_bwd_sm90_params &p, const fa_walk &w, int m)
{
    if (p.order == FA_BWD_DOWN)
        return m == w.lo ? w.hi - 1 : m - 1;
    return m + 1 == w.hi ? w.lo : m + 1;
}

/* Key blocks lo .. hi - 1 are seen by some query of block m. */
struct fa_key_blocks {
    int lo, hi;
};

__device__ __forceinline__ fa_key_blocks fa_key_blocks_of(const fa_bwd_sm90_params &p, int m, int BM, int BN)
{
    int last = min(p.SQ, (m + 1) * BM) - 1;
    int first = max(0, m * BM + p.lo_shift), end = min(p.SK, last + p.hi_shift);
    fa_key_blocks k = {first / BN, first < end ? (end - 1) / BN + 1 : 0};
    return k;
}

/* How many key blocks add to dQ m before w.n does. */
__device__ __forceinline__ uint32_t fa_turn_of(const fa_bwd_sm90_params &p, const fa_walk &w, int m)
{
    if (p.order == FA_BWD_ROTATE) {
        int before = (int)((int64_t)m * w.size / p.q_blocks) - (w.n - w.ring0);
        return w.ring0 + (before < 0 ? before + w.size : before);
    }
    fa_key_blocks k = fa_key_blocks_of(p, m, p.BM, p.BN);
    return p.order == FA_BWD_UP ? k.hi - 1 - w.n : w.n - k.lo;
}

#endif
