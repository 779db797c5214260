/* Which query blocks a block of keys meets, in which order, and whose turn it is to add to a block of dQ. */
#ifndef FA_BWD_SM90_WALK_CUH
#define FA_BWD_SM90_WALK_CUH

#include "bwd_sm90_params.h"

/* Number b of lengths, cut to 0 .. full. */
__device__ __forceinline__ int fa_length_of(const fa_bwd_lengths &t, int b, int full)
{
    if (!t.data)
        return full;
    int64_t x = t.wide ? ((const int64_t *)t.data)[b * t.step] : ((const int32_t *)t.data)[b * t.step];
    return (int)(x < 0 ? 0 : x > full ? full : x);
}

__device__ __forceinline__ fa_bwd_band fa_whole_band(const fa_bwd_sm90_params &p)
{
    fa_bwd_band band = {p.SQ, p.SK, p.lo_shift, p.hi_shift};
    return band;
}

/* The key position of query 0. */
__device__ __forceinline__ int fa_offset_of(const fa_bwd_sm90_params &p, const fa_bwd_band &band)
{
    return p.mod.bottom_right ? band.SK - band.SQ : 0;
}

/* Rows of batch b: of the tensor, or with PACKED of its sequence. */
__device__ __forceinline__ int fa_rows_in(const int32_t *first, int b)
{
    return first[b + 1] - first[b];
}

/* Sides that are unbounded stay so. */
__device__ __forceinline__ fa_bwd_band fa_band_of(const fa_bwd_sm90_params &p, int b)
{
    fa_bwd_band band = fa_whole_band(p);
    if (!(p.mod.options & FA_MOD_LENGTHS))
        return band;
    if (p.mod.options & FA_MOD_PACKED) {
        bool none = b == p.mod.batches - 1;
        band.SQ = none ? 0 : fa_rows_in(p.mod.first_q, b);
        band.SK = none ? 0 : fa_rows_in(p.mod.first_k, b);
        b = none ? 0 : b;
    }
    band.SQ = fa_length_of(p.mod.q_len, b, band.SQ);
    band.SK = fa_length_of(p.mod.k_len, b, band.SK);
    int offset = fa_offset_of(p, band);
    band.lo_shift += p.mod.left ? offset : 0;
    band.hi_shift += p.mod.right ? offset : 0;
    return band;
}

/* Which sequence has number `slot`, and which of its blocks that is; not PACKED: the tensor's own. */
struct fa_bwd_slot {
    int b, block; /* b is 0 where not PACKED */
    int first, rows; /* of the sequence */
};

__device__ __forceinline__ int fa_first_slot(const int32_t *first, int b, int size)
{
    return first[b] / size + b;
}

__device__ __forceinline__ fa_bwd_slot fa_slot_of(const fa_bwd_mod &mod, const int32_t *first, int rows, int size,
                                                  int slot)
{
    fa_bwd_slot s = {0, slot, 0, rows};
    if (!(mod.options & FA_MOD_PACKED))
        return s;
    int hi = mod.batches - 1; /* the last whose first number is at most slot */
    while (s.b < hi) {
        int mid = (s.b + hi + 1) / 2;
        if (fa_first_slot(first, mid, size) <= slot)
            s.b = mid;
        else
            hi = mid - 1;
    }
    s.block = slot - fa_first_slot(first, s.b, size);
    s.first = first[s.b];
    s.rows = fa_rows_in(first, s.b);
    return s;
}

/* Key block n, of the ring ring0 .. ring0 + size - 1. Query blocks lo .. hi - 1 see some key of it; none when
 * hi <= lo. */
struct fa_walk {
    int n, ring0, size, lo, hi;
};

__device__ __forceinline__ fa_walk fa_walk_of(const fa_bwd_band &band, int n, int ring0, int size, int BM, int BN)
{
    int key0 = n * BN, key1 = min(band.SK, key0 + BN) - 1;
    int first = max(0, key0 - band.hi_shift + 1), end = min(band.SQ, key1 - band.lo_shift + 1);
    fa_walk w = {n, ring0, size, first / BM, first < end && key0 <= key1 ? (end - 1) / BM + 1 : 0};
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

__device__ __forceinline__ fa_key_blocks fa_key_blocks_of(const fa_bwd_band &band, int m, int BM, int BN)
{
    int last = min(band.SQ, (m + 1) * BM) - 1;
    int first = max(0, m * BM + band.lo_shift), end = min(band.SK, last + band.hi_shift);
    fa_key_blocks k = {first / BN, first < end && m * BM <= last ? (end - 1) / BN + 1 : 0};
    return k;
}

/* How many key blocks add to dQ m before w.n does. */
__device__ __forceinline__ uint32_t fa_turn_of(const fa_bwd_sm90_params &p, const fa_bwd_band &band, const fa_walk &w,
                                               int m)
{
    if (p.order == FA_BWD_ROTATE) {
        int before = (int)((int64_t)m * w.size / p.q_blocks) - (w.n - w.ring0);
        return w.ring0 + (before < 0 ? before + w.size : before);
    }
    fa_key_blocks k = fa_key_blocks_of(band, m, p.BM, p.BN);
    return p.order == FA_BWD_UP ? k.hi - 1 - w.n : w.n - k.lo;
}

#endif
