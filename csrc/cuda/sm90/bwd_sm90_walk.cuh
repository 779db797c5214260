/* Which query blocks a block of keys meets, in which order, and whose turn it is to add to a block of dQ. */
#ifndef FA_BWD_SM90_WALK_CUH
#define FA_BWD_SM90_WALK_CUH

#include "bwd_sm90_params.h"

/* Query blocks lo .. hi - 1 see some key of block n; none when hi <= lo. */
struct fa_walk {
    int n, lo, hi, order;
};

/* head: of keys, counted over the batch. */
__device__ __forceinline__ fa_walk fa_walk_of(const fa_bwd_sm90_params &p, int head, int n, int BM, int BN)
{
    int key0 = n * BN, key1 = min(p.SK, key0 + BN) - 1;
    int first = max(0, key0 - p.hi_shift + 1), end = min(p.SQ, key1 - p.lo_shift + 1);
    int order = p.order != FA_BWD_ALTERNATE ? p.order : head % 2 ? FA_BWD_DOWN : FA_BWD_UP;
    fa_walk w = {n, first / BM, first < end ? (end - 1) / BM + 1 : 0, order};
    return w;
}

__device__ __forceinline__ int fa_walk_steps(const fa_walk &w)
{
    return max(0, w.hi - w.lo);
}

/* The first query block of n, where every n sees every m. */
__device__ __forceinline__ int fa_rotate_start(const fa_bwd_sm90_params &p, int n)
{
    int m = (int)(((int64_t)n * p.q_blocks + p.k_blocks - 1) / p.k_blocks);
    return m == p.q_blocks ? 0 : m;
}

__device__ __forceinline__ int fa_walk_start(const fa_bwd_sm90_params &p, const fa_walk &w)
{
    return w.order == FA_BWD_ROTATE ? fa_rotate_start(p, w.n) : w.order == FA_BWD_UP ? w.lo : w.hi - 1;
}

__device__ __forceinline__ int fa_walk_next(const fa_walk &w, int m)
{
    if (w.order == FA_BWD_DOWN)
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
__device__ __forceinline__ uint32_t fa_turn_of(const fa_bwd_sm90_params &p, const fa_walk &w, int m, int BM, int BN)
{
    if (w.order == FA_BWD_ROTATE) {
        int at = (int)((int64_t)m * p.k_blocks / p.q_blocks) - w.n;
        return at < 0 ? at + p.k_blocks : at;
    }
    fa_key_blocks k = fa_key_blocks_of(p, m, BM, BN);
    return w.order == FA_BWD_UP ? k.hi - 1 - w.n : w.n - k.lo;
}

#endif
