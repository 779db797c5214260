/* The warpgroup that fetches masks, in the instances for just a mask: ahead of the warps that compute, which so are
 * spared the addresses and the waiting. Each warp works for the warps of its number in all warpgroups that compute, and
 * each thread for the threads of its number. */
#ifndef FA_FWD_SM90_FETCH_CUH
#define FA_FWD_SM90_FETCH_CUH

#include "fwd_sm90_mod.cuh"

/* What is fetched for a block. COPIED: bytes of the mask for the 16 rows of a warp; LANES: threads of a warp that get
 * the mask as bits. */
template <int WARPS, int COPIED, int LANES> struct fa_fetched {
    alignas(256) char copied[WARPS][COPIED]; /* a row of a float mask is 256 bytes: fa_load_bias */
    uint2 words[WARPS][LANES]; /* fa_mod_block's seen */
    int32_t tame[WARPS];
};

/* Magnitudes of 16-bit numbers whose bits are below this are moderate, below 10^6 or all that are finite. */
template <typename T> __device__ __forceinline__ uint32_t fa_large(void);

template <> __device__ __forceinline__ uint32_t fa_large<fa_bf16_t>(void)
{
    return 0x4974;
}

template <> __device__ __forceinline__ uint32_t fa_large<fa_f16_t>(void)
{
    return 0x7c00;
}

/* Is the part of a float mask tame that this warp has copied to `bias`? */
template <typename T, int BN> __device__ __forceinline__ bool fa_is_tame(const char *bias)
{
    uint32_t top = 0;
    int lane = threadIdx.x % 4, own = threadIdx.x % FA_WARP / 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int v = 0; v < BN / 32; v++) {
            const uint4 w = *(const uint4 *)(bias + fa_bias_place<BN>(own + 8 * i, 4 * v + lane));
            top = __vimax3_u16x2(top, w.x & 0x7fff7fffu, w.y & 0x7fff7fffu);
            top = __vimax3_u16x2(top, w.z & 0x7fff7fffu, w.w & 0x7fff7fffu);
        }
    }
    return __all_sync(0xffffffff, max(top & 0xffff, top >> 16) < fa_large<T>());
}

/* Where the thread's rows of the mask begin, for each of the warps it works for. */
template <class C> struct fa_mask_rows {
    const char *row[C::WGS][2];
    __device__ __forceinline__ void find(const fa_fwd_sm90_mod_params &p, const fa_mod_tile &t)
    {
        for (int g = 0; g < C::WGS; g++)
            for (int i = 0; i < 2; i++)
                row[g][i] = (const char *)p.a.mask.data +
                            fa_mask_row(p, t, fa_mod_place_of(t.row + 64 * g, 0).row + 8 * i) * C::MASK_BYTES;
    }
};

/* Pieces of 16 bytes: lane q of a quad copies every fourth of its two rows. Those behind the last key are 0. */
template <class C>
__device__ __forceinline__ void fa_copy_rows(const char *const (&row)[2], int key, int keys, char *to)
{
    const int lane = threadIdx.x % FA_WARP;
    const int64_t first = (int64_t)key * C::MASK_BYTES + lane % 4 * 16, end = (int64_t)keys * C::MASK_BYTES;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        constexpr int PIECES = C::BN * C::MASK_BYTES / 64;
#pragma unroll
        for (int v = 0; v < PIECES; v++) {
            int place = C::OPTIONS == FA_BITS ? ((i * PIECES + v) * FA_WARP + lane) * 16
                                              : fa_bias_place<C::BN>(lane / 4 + 8 * i, 4 * v + lane % 4);
            ptx_cp_async(to + place, row[i] + first + 64 * v, first + 64 * v < end ? 16 : 0);
        }
    }
}

/* Starts what a block needs; all threads of a warp. */
template <class C>
__device__ __forceinline__ void fa_fetch_start(const fa_fwd_sm90_mod_params &p, const fa_mask_rows<C> &rows, int key,
                                               typename C::fetched &to)
{
#pragma unroll
    for (int g = 0; g < C::WGS; g++) {
        int warp = 4 * g + threadIdx.x / FA_WARP % 4;
        fa_copy_rows<C>(rows.row[g], key, p.plain.SK, to.copied[warp]);
    }
    ptx_cp_async_commit();
}

/* What is left to do when the copies have landed. */
template <class C, class Shared> __device__ __forceinline__ void fa_fetch_finish(Shared &s, int stage)
{
    typename C::fetched &f = s.fetched[stage];
#pragma unroll 1
    for (int g = 0; g < C::WGS; g++) {
        int warp = 4 * g + threadIdx.x / FA_WARP % 4;
        fa_mod_block m;
        m.mask = f.copied[warp];
        if (C::OPTIONS == FA_BITS) {
            fa_take_seen<C::BN>(m);
            f.words[warp][threadIdx.x % FA_WARP] = make_uint2(m.seen[0], m.seen[1]);
        } else {
            f.tame[warp] = fa_is_tame<typename C::T, C::BN>(m.mask);
        }
    }
    __syncwarp();
    fa_mbar_arrive_warp(&s.fetched_full[stage]);
}

/* While the copies for one block are on their way, those for the block before are finished; with but two places they
 * are finished first, since the next is free only when the block before that is done with. */
template <class C, class Shared>
__device__ __forceinline__ void fa_fetch(const fa_fwd_sm90_mod_params &p, Shared &s)
{
    fa_ring ring;
    fa_stage<C::FETCHED> stage;
    fa_mask_rows<C> rows;
    int before = -1; /* its stage */
    for (;; ring.next()) {
        const fa_mod_tile &t = fa_next_tile(s, ring);
        int hi = t.block_hi;
        if (hi >= 0)
            rows.find(p, t);
        for (int block = hi - 1; hi >= 0 && block >= t.block_lo; block--) {
            if (C::FETCHED == 2 && before >= 0) {
                ptx_cp_async_wait<0>();
                fa_fetch_finish<C>(s, before);
            }
            fa_mbar_wait(&s.fetched_empty[stage.index], stage.parity ^ 1);
            fa_fetch_start<C>(p, rows, block * C::BN, s.fetched[stage.index]);
            if (C::FETCHED > 2 && before >= 0) {
                ptx_cp_async_wait<1>();
                fa_fetch_finish<C>(s, before);
            }
            before = stage.index;
            stage.next();
        }
        if (hi < 0)
            break;
        __syncwarp();
        fa_mbar_arrive_warp(&s.tile_empty[ring.index]);
    }
    if (before >= 0) {
        ptx_cp_async_wait<0>();
        fa_fetch_finish<C>(s, before);
    }
}

#endif
