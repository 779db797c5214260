/* NaN and infinity in rows that some other row does not see.
 *
 * A hidden pair has weight 0, but in the products of its tile 0 times a wild value is NaN. So wild values are taken out
 * of the operands of the three products that sum over pairs:
 *
 *   dV += P^T dO, dK += dS^T Q   where the pass before found a wild value in Q or dO of the block; searched again only
 *                                then, and only where the tile has a hidden pair
 *   dQ += dS K                   K is searched once, by the warpgroup of dQ, which has nothing else to do then
 *   dS = P o (dP - delta)        0 where P is 0, in tiles with hidden pairs
 *
 * The pairs that do see a wild value are NaN all the same, through P: a wild Q or K makes the log-sum-exp of its rows
 * NaN, a wild V their delta, and for a wild row of dO the pass before sets the log-sum-exp to NaN. One warpgroup may
 * clean what another still reads: for these pairs either value gives NaN, for the hidden ones 0. */
#ifndef FA_BWD_SM90_WILD_CUH
#define FA_BWD_SM90_WILD_CUH

#include "bwd_sm90_tile.cuh"

/* Is one of 8 elements NaN or infinite? x * 0 is NaN then. */
template <typename T> __device__ __forceinline__ bool fa_is_wild(uint4 x)
{
    uint32_t probe = fa_fma_zero<T>(x.x, fa_fma_zero<T>(x.y, fa_fma_zero<T>(x.z, fa_fma_zero<T>(x.w, 0))));
    return (probe & 0x7fff7fffu) != 0;
}

/* By a warpgroup; afterwards fence and synchronise. */
template <typename T, int ELEMENTS> __device__ __forceinline__ void fa_clean(T *tile)
{
    uint4 *chunk = (uint4 *)tile + threadIdx.x % FA_WARPGROUP;
#pragma unroll 4
    for (int i = 0; i < ELEMENTS / 8; i += FA_WARPGROUP)
        if (fa_is_wild<T>(chunk[i]))
            chunk[i] = make_uint4(0, 0, 0, 0);
}

/* Is some pair of 64 keys from key0 on and the queries of step t hidden? */
template <class C>
__device__ __forceinline__ bool fa_hides(const fa_bwd_sm90_params &p, const fa_bwd_sm90_shared<C> &sh,
                                         const fa_bwd_unit &u, int t, int key0)
{
    bool bits = fa_has<C>(p.mod, FA_MOD_BITS);
    return bits || !fa_all_seen<C>(u.band, key0, sh.query[fa_stage_of(t)]);
}

/* w <- dS of step t, rounded, where it holds P: 0 where that is 0. */
template <class C>
__device__ __forceinline__ void fa_round_seen(uint32_t (&w)[C::BM / 4], const float (&ds)[C::BM / 2])
{
#pragma unroll
    for (int i = 0; i < C::BM / 4; i++)
        w[i] = fa_pack<typename C::T>(ds[2 * i], ds[2 * i + 1]) & fa_not_zero<typename C::T>(w[i]);
}

/* The same before rounding. */
template <class C>
__device__ __forceinline__ void fa_clear_hidden(float (&ds)[C::BM / 2], const uint32_t (&w)[C::BM / 4])
{
#pragma unroll
    for (int i = 0; i < C::BM / 4; i++) {
        ds[2 * i] = w[i] & 0x7fffu ? ds[2 * i] : 0.f;
        ds[2 * i + 1] = w[i] & 0x7fff0000u ? ds[2 * i + 1] : 0.f;
    }
}

#endif
