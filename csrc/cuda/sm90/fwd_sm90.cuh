/* Forward attention on Hopper: TMA loads by one warp, products by wgmma, softmax in registers.
 *
 *   O = softmax(scale Q K^T) V       one tile: BM = 64 * WGS queries of one head against blocks of BN keys
 *
 * Online softmax (Milakov and Gimelshein, 2018) with blocks of keys taken from the last to the first; the pipeline of
 * two products that overlap with the softmax, and warpgroups that take turns, follow Shah et al., "FlashAttention-3",
 * 2024. Maxima: tile/softmax.cuh.
 */
#ifndef FA_FWD_SM90_CUH
#define FA_FWD_SM90_CUH

#include "../ptx/math.cuh"
#include "../ptx/mbarrier.cuh"
#include "../ptx/tma.cuh"
#include "../ptx/warpgroup.cuh"
#include "../ptx/wgmma.cuh"
#include "../tile/softmax.cuh"
#include "../tile/store_rows.cuh"
#include "fwd_sm90_fetch.cuh"
#include "fwd_sm90_find.cuh"
#include "fwd_sm90_list.cuh"
#include "fwd_sm90_mod.cuh"
#include "fwd_sm90_params.h"
#include "fwd_sm90_produce.cuh"
#include "fwd_sm90_repair.cuh"
#include "fwd_sm90_shared.cuh"
#include "fwd_sm90_tiles.cuh"

/* ---- consumers: 64 queries each ---------------------------------------------------------------------------------- */

/* S (64, BN) = Q K^T */
template <class C> __device__ __forceinline__ void fa_issue_qk(float (&s)[C::BN / 2], uint32_t q, uint32_t k)
{
#pragma unroll
    for (int i = 0; i < C::D / 16; i++) {
        int panel = i / 4, within = i % 4 * 2; /* 16 columns are 32 bytes */
        fa_wgmma<typename C::T, C::BN>::template ss<0, 0>(s, q + panel * (64 * 128 / 16) + within,
                                                          k + panel * (C::BN * 128 / 16) + within, i > 0);
    }
}

/* O (64, DV) += P V over the keys 16 First .. 16 Last - 1 of the block */
template <class C, int First, int Last>
__device__ __forceinline__ void fa_issue_pv(float (&o)[C::DV / 2], const uint32_t (&p)[C::BN / 4], uint32_t v)
{
#pragma unroll
    for (int i = First; i < Last; i++)
        fa_wgmma<typename C::T, C::DV>::template rs<1>(o, &p[4 * i], v + i * (16 * 128 / 16), 1);
}

template <class C> struct fa_consumer {
    int warpgroup;
    fa_stage<C::STAGES> ks, vs;
    uint32_t q_parity = 0;
    uint32_t q_desc, k_desc, v_desc; /* of stage 0 */
    bool spoilt = false;             /* this thread held a result that is not finite */
    int mask = 0;                    /* which of the two places holds the mask of the block at hand */
    fa_stage<C::FETCHED> fs;         /* where what is fetched for it lies */
    int full_lo, full_hi;            /* in blocks that begin at these keys or between, all queries see all, but for a
                                        padding mask */
    fa_stage<FA_LISTED> ls;          /* place of the next block in the list, */
    uint32_t what;                   /* and what is written there */
    int block, row;
};

/* A warp says that it is done. */
__device__ __forceinline__ void fa_release(uint64_t *bar)
{
    fa_mbar_arrive_warp(bar);
}

/* Done with K of a block and, after the last block of a tile, with Q. */
template <class C>
__device__ __forceinline__ void fa_release_keys(fa_fwd_sm90_shared<C> &sh, fa_consumer<C> &c, bool last)
{
    fa_release(&sh.k_empty[c.ks.index]);
    c.ks.next();
    if (last) {
        fa_release(&sh.q_empty[c.warpgroup]);
        c.q_parity ^= 1;
    }
}

template <class C> __device__ __forceinline__ void fa_turn_wait(const fa_consumer<C> &c)
{
    fa_bar_sync(FA_BAR_TURN + c.warpgroup, 2 * FA_WARPGROUP);
}

template <class C> __device__ __forceinline__ void fa_turn_pass(const fa_consumer<C> &c)
{
    fa_bar_arrive(FA_BAR_TURN + (c.warpgroup + 1 == C::WGS ? 0 : c.warpgroup + 1), 2 * FA_WARPGROUP);
}

/* Hides keys in one block of scores, if any is hidden from any of these 64 queries. */
template <class C>
__device__ __forceinline__ void fa_mask_block(const fa_fwd_sm90_params &p, fa_fwd_sm90_shared<C> &,
                                              fa_consumer<C> &, const fa_query_tile &, float (&s)[C::BN / 2], int row,
                                              int key, bool, fa_mod_block &)
{
    bool all = key >= row + 63 + p.lo_shift && key + C::BN <= min(p.SK, row + p.hi_shift);
    if (!all)
        fa_hide_keys<C::BN>(s, row, key, p.SK, p.lo_shift, p.hi_shift);
}

/* What a block needs besides its scores, while they are computed. */
template <class C>
__device__ __forceinline__ void fa_fetch_block(const fa_fwd_sm90_params &, fa_fwd_sm90_shared<C> &, fa_consumer<C> &,
                                               const fa_query_tile &, int, int, bool, bool, fa_mod_block &)
{
}

/* Weights of the block's scores. */
template <class C>
__device__ __forceinline__ void fa_weigh_block(const fa_fwd_sm90_params &p, fa_fwd_sm90_shared<C> &, fa_consumer<C> &,
                                               const fa_query_tile &, const float (&s)[C::BN / 2],
                                               uint32_t (&w)[C::BN / 4], fa_rows &r, int, int, const fa_mod_block &)
{
    fa_softmax_block<typename C::T, C::BN>(fa_scores_at_hand<C::BN>{s, p.scale_log2}, w, r);
}

/* Has this warp rows that are queries and others that are not, but hold something? Rows of a warp raise their maxima
 * together, and nothing of a query may depend on what is no query: so these become what rows behind the tensor's end
 * are, zero. Rows of other warps do not matter. */
__device__ __forceinline__ bool fa_is_ragged(const fa_fwd_sm90_mod_params &p, const fa_mod_tile &t, int row)
{
    int first = fa_mod_place_of(row, 0).row & ~15;
    return first < t.q_len && first + 16 > t.q_len && t.q_row + t.q_len < p.plain.SQ;
}

template <int R> __device__ __forceinline__ void fa_clear_rows(float (&s)[R], const fa_mod_tile &t, int row)
{
    int first = fa_mod_place_of(row, 0).row;
#pragma unroll
    for (int e = 0; e < R; e++)
        s[e] = first + e / 2 % 2 * 8 < t.q_len ? s[e] : 0.f;
}

/* Do these 64 queries see all keys of the block, but for masks, and is the warp not ragged? What the list says is said
 * of all queries of the tile. */
template <class C>
__device__ __forceinline__ bool fa_is_full(const fa_fwd_sm90_mod_params &p, fa_consumer<C> &c, const fa_mod_tile &t,
                                           int row, int key, bool fresh, const fa_mod_block &m)
{
    if (C::LISTED && !(m.what & FA_EDGE))
        return true;
    if (C::LISTED || fresh) {
        c.full_lo = row + 63 + t.lo_shift;
        c.full_hi = fa_is_ragged(p, t, row) ? -1 : min(t.k_len, row + t.hi_shift) - C::BN;
    }
    return __all_sync(0xffffffff, key >= c.full_lo && key <= c.full_hi);
}

/* The same three with options. */
template <class C>
__device__ __forceinline__ void fa_mask_block(const fa_fwd_sm90_mod_params &p, fa_fwd_sm90_shared<C> &sh,
                                              fa_consumer<C> &c, const fa_mod_tile &t, float (&s)[C::BN / 2], int row,
                                              int key, bool fresh, fa_mod_block &m)
{
    const bool full = fa_is_full<C>(p, c, t, row, key, fresh, m);
    m.late = full && fa_can_be_late<C::BN, C::OPTIONS>(t, fa_mod_place_of(row, key), m);
    if (m.late)
        return;
    if (!full && fa_is_ragged(p, t, row))
        fa_clear_rows(s, t, row);
    fa_mod_scores<typename C::T, C::BN>(p, fa_what<C>(p), t, row, key, m, s);
    if (!full)
        fa_hide_keys<C::BN>(s, row, key, t.k_len, t.lo_shift, t.hi_shift);
    if constexpr (C::LISTED) {
        if (m.what & FA_MIXED) {
            fa_hide_padding<C::BN>(s, fa_take_padding<C::BN>(sh.listed[m.place]));
            __syncwarp(); /* all lanes have read it: K's place, released later, gives this one back too */
        }
    }
}

/* The next block of the list. A reduction's result is the same for all threads to the assembler as well. */
template <class C> __device__ __forceinline__ void fa_look_up(fa_fwd_sm90_shared<C> &sh, fa_consumer<C> &c)
{
    fa_mbar_wait(&sh.listed_full[c.ls.index], c.ls.parity);
    const fa_listed &l = sh.listed[c.ls.index];
    c.what = __reduce_or_sync(0xffffffff, l.what);
    c.block = l.block;
    c.row = l.row;
}

template <class C>
__device__ __forceinline__ void fa_fetch_block(const fa_fwd_sm90_mod_params &p, fa_fwd_sm90_shared<C> &sh,
                                               fa_consumer<C> &c, const fa_mod_tile &t, int row, int key, bool fresh,
                                               bool last, fa_mod_block &m)
{
    int warp = threadIdx.x / FA_WARP - 4;
    m.climbs = fa_what<C>(p) & FA_MOD_ALIBI && fa_alibi_climbs<C::BN, C::LISTED>(t, row, key);
    if constexpr (C::OPTIONS == FA_ALL) {
        int own = warp * (16 * C::BN * 2); /* this warp's part */
        m.mask = sh.mask[c.mask] + own;
        fa_mod_fetch<C::BN>(p, p.what, t, row, key, fresh, last, m, sh.mask[c.mask ^ 1] + own);
        c.mask ^= 1;
    }
    if constexpr (C::OPTIONS == FA_DROPOUT) {
        m.mask = sh.mask[c.mask] + warp * (C::BN / 4 * 16);
        fa_fetch_columns<C::BN>(p, t, key, m.mask);
        c.mask ^= 1;
    }
    if constexpr (C::LISTED) {
        m.what = c.what;
        m.place = c.ls.index;
        c.ls.next();
        fa_look_up<C>(sh, c);
    }
    if constexpr (C::FETCH) {
        fa_mbar_wait(&sh.fetched_full[c.fs.index], c.fs.parity);
        const typename C::fetched &f = sh.fetched[c.fs.index];
        if (C::OPTIONS == FA_BIAS) {
            m.mask = (char *)f.copied[warp];
            m.tame = __any_sync(0xffffffff, f.tame[warp]);
        } else {
            uint2 words = f.words[warp][threadIdx.x % FA_WARP];
            m.seen[0] = words.x;
            m.seen[1] = words.y;
        }
    }
}

template <class C>
__device__ __forceinline__ void fa_weigh_block(const fa_fwd_sm90_mod_params &p, fa_fwd_sm90_shared<C> &sh,
                                               fa_consumer<C> &c, const fa_mod_tile &t, float (&s)[C::BN / 2],
                                               uint32_t (&w)[C::BN / 4], fa_rows &r, int row, int key,
                                               const fa_mod_block &m)
{
    r.blind = r.blind || m.climbs;
    bool done = m.late &&
                fa_softmax_block<typename C::T, C::BN>(
                    fa_late_scores_of<typename C::T, C::BN, C::OPTIONS>(p, t, fa_mod_place_of(row, key), m, s), w, r);
    if (!done) {
        const fa_scores_at_hand<C::BN> made = {s, p.plain.scale_log2};
        if (C::OPTIONS == FA_CAP && m.late)
            fa_softcap_near(s, p);
        if (fa_what<C>(p) & FA_MOD_DROPOUT)
            fa_softmax_block<typename C::T, C::BN>(
                made, w, r, fa_dropping<C::OPTIONS == FA_DROPOUT>(p, t, fa_mod_place_of(row, key), m.mask));
        else
            fa_softmax_block<typename C::T, C::BN>(made, w, r);
    }
    if constexpr (C::FETCH) {
        __syncwarp();
        fa_release(&sh.fetched_empty[c.fs.index]);
        c.fs.next();
    }
}

template <class C> __device__ __forceinline__ uint32_t fa_k_at(const fa_consumer<C> &c)
{
    return c.k_desc + c.ks.index * (C::BN * C::D * 2 / 16);
}

template <class C> __device__ __forceinline__ uint32_t fa_v_at(const fa_consumer<C> &c)
{
    return c.v_desc + c.vs.index * (C::BN * C::DV * 2 / 16);
}

/* The first block of all where there are no options: code of its own is faster than branches in that of all others. */
template <class C, class P, class Tile>
__device__ __forceinline__ void fa_first_block(const P &p, fa_fwd_sm90_shared<C> &sh, fa_consumer<C> &c, const Tile &t,
                                               int block, bool last, float (&s)[C::BN / 2], uint32_t (&w)[C::BN / 4],
                                               fa_rows &r)
{
    int row = t.row + 64 * c.warpgroup, key = block * C::BN;
    fa_mod_block m;
    fa_mbar_wait(&sh.q_full[c.warpgroup], c.q_parity);
    fa_mbar_wait(&sh.k_full[c.ks.index], c.ks.parity);
    fa_wgmma_hold(s);
    fa_wgmma_fence();
    fa_issue_qk<C>(s, c.q_desc, fa_k_at(c));
    fa_wgmma_commit();
    fa_fetch_block<C>(p, sh, c, t, row, key, true, last, m);
    fa_wgmma_wait<0>();
    fa_wgmma_hold(s);
    fa_release_keys(sh, c, last);
    fa_mask_block<C>(p, sh, c, t, s, row, key, true, m);
    fa_rows_start(r);
    fa_weigh_block<C>(p, sh, c, t, s, w, r, row, key, m);
}

/* Rows of a tile that is done; O is zero for the next. */
template <class C>
__device__ __forceinline__ void fa_store_tile(const fa_fwd_sm90_params &p, fa_fwd_sm90_shared<C> &, fa_consumer<C> &c,
                                              const fa_query_tile &t, float (&o)[C::DV / 2], const fa_rows &r)
{
    int row = t.row + 64 * c.warpgroup;
    c.spoilt = c.spoilt || fa_any_not_finite(o);
    typename C::T *out = (typename C::T *)p.out.data + t.b * p.out.batch + t.h * p.out.head;
    float *lse = p.lse + ((int64_t)t.b * p.HQ + t.h) * p.SQ;
    fa_rows_out f = fa_finish_rows(r, p.scale_log2);
    fa_store_lse(lse, f, row, p.SQ);
    fa_store_rows<typename C::T, C::DV>(out, p.out.row, o, f, row, p.SQ, p.DV);
#pragma unroll
    for (int i = 0; i < C::DV / 2; i++)
        o[i] = 0.f;
}

/* The same of a tile of the ring, whose place is then free. */
template <class C>
__device__ __forceinline__ void fa_store_tile(const fa_fwd_sm90_mod_params &p, fa_fwd_sm90_shared<C> &sh,
                                              fa_consumer<C> &c, int place, float (&o)[C::DV / 2],
                                              const fa_rows &r)
{
    const fa_mod_tile &t = sh.tiles[place];
    const fa_fwd_sm90_view &v = p.plain.out;
    int row = t.row + 64 * c.warpgroup;
    c.spoilt = c.spoilt || (fa_mod_place_of(row, 0).row < t.q_len && fa_any_not_finite(o));
    typename C::T *out = (typename C::T *)v.data + t.b * v.batch + t.h * v.head + t.q_row * v.row;
    float *lse = p.plain.lse + ((int64_t)t.b * p.plain.HQ + t.h) * p.plain.SQ + t.q_row;
    fa_rows_out f = fa_mod_finish(p, t, r, row);
    fa_store_lse(lse, f, row, t.q_rows);
    fa_store_rows<typename C::T, C::DV>(out, v.row, o, f, row, t.q_rows, p.plain.DV);
#pragma unroll
    for (int i = 0; i < C::DV / 2; i++)
        o[i] = 0.f;
    __syncwarp();
    fa_release(&sh.tile_empty[place]);
}

/* Every further block, of the same tile or the first of the next, `done` being the tile of the block before. Time runs
 * downwards; the other warpgroup does the same half a step later:
 *
 *   tensor cores          this warpgroup
 *   S j   = Q K_j^T       wait for K j and for its turn; issue S j and O; pass the turn; fetch its mask
 *   O    += P_j+1 V_j+1   wait for S j; mask, maximum, exp2, row sums of S j
 *   (other warpgroup)     wait for O; round P_j; scale O where a maximum grew, or store O of the tile that is done
 *
 * start: of all blocks the first, before which there is none. With options the assembler makes the wait for S j one for
 * O as well (docs/kernels/fwd_sm90.md). */
template <class C, class P, class Tile, class Done>
__device__ __forceinline__ void fa_next_block(const P &p, fa_fwd_sm90_shared<C> &sh, fa_consumer<C> &c, const Tile &t,
                                              int block, bool start, bool fresh, bool last, const Done &done,
                                              float (&s)[C::BN / 2], uint32_t (&w)[C::BN / 4], float (&o)[C::DV / 2],
                                              fa_rows &r)
{
    int row = (C::LISTED ? c.row : t.row) + 64 * c.warpgroup, key = block * C::BN;
    fa_mod_block m;
    fa_mbar_wait(&sh.k_full[c.ks.index], c.ks.parity);
    if (fresh)
        fa_mbar_wait(&sh.q_full[c.warpgroup], c.q_parity);
    fa_turn_wait(c);
    fa_wgmma_hold(s);
    fa_wgmma_hold(o);
    fa_wgmma_hold(w);
    fa_wgmma_fence();
    fa_issue_qk<C>(s, c.q_desc, fa_k_at(c));
    fa_wgmma_commit();
    if (!start) {
        fa_mbar_wait(&sh.v_full[c.vs.index], c.vs.parity);
        fa_wgmma_fence();
        fa_issue_pv<C, 0, C::BN / 16 - C::EARLY>(o, w, fa_v_at(c));
    }
    fa_turn_pass(c);
    if (!start)
        fa_issue_pv<C, C::BN / 16 - C::EARLY, C::BN / 16>(o, w, fa_v_at(c));
    fa_wgmma_commit();
    fa_fetch_block<C>(p, sh, c, t, row, key, fresh, last, m);
    fa_wgmma_wait<1>();
    fa_wgmma_hold(s);
    fa_release_keys(sh, c, last);
    fa_mask_block<C>(p, sh, c, t, s, row, key, fresh, m);
    fa_rows old = r;
    if (fresh)
        fa_rows_start(r);
    uint32_t w_next[C::BN / 4];
    if (C::BESIDE) {
        fa_weigh_block<C>(p, sh, c, t, s, w_next, r, row, key, m);
        fa_wgmma_hold(w_next);
    }
    fa_wgmma_wait<0>();
    fa_wgmma_hold(o);
    fa_wgmma_hold(w);
    if (!start) {
        fa_release(&sh.v_empty[c.vs.index]);
        c.vs.next();
    }
    if (!C::BESIDE)
        fa_weigh_block<C>(p, sh, c, t, s, w_next, r, row, key, m);
#pragma unroll
    for (int i = 0; i < C::BN / 4; i++)
        w[i] = w_next[i];
    if (fresh && !start)
        fa_store_tile<C>(p, sh, c, done, o, old);
    else if (!start)
        fa_rescale_rows<C::DV>(o, r);
}

template <class C>
__device__ __forceinline__ void fa_last_product(fa_fwd_sm90_shared<C> &sh, fa_consumer<C> &c, uint32_t (&w)[C::BN / 4],
                                                float (&o)[C::DV / 2])
{
    fa_mbar_wait(&sh.v_full[c.vs.index], c.vs.parity);
    fa_wgmma_hold(o);
    fa_wgmma_hold(w);
    fa_wgmma_fence();
    fa_issue_pv<C, 0, C::BN / 16>(o, w, fa_v_at(c));
    fa_wgmma_commit();
    fa_wgmma_wait<0>();
    fa_wgmma_hold(o);
}

/* This warp's rows of all its tiles once more, those that a hidden key has spoilt. */
template <class C> __device__ void fa_repair_tiles(const fa_fwd_sm90_params &p, int warpgroup)
{
    for (int unit = blockIdx.x; unit < p.units; unit += gridDim.x) {
        for (int part = 0; part < p.parts; part++) {
            fa_query_tile t = fa_tile_at<C>(p, unit, part);
            int first = t.row + 64 * warpgroup + threadIdx.x / FA_WARP % 4 * 16;
            for (int row = first; row < min(first + 16, p.SQ); row++) {
                float lse = p.lse[((int64_t)t.b * p.HQ + t.h) * p.SQ + row];
                if (fa_row_is_spoilt<typename C::T, C::DV>(p, t.b, t.h, row, lse))
                    fa_repair_row<typename C::T, C::D, C::DV>(p, t.b, t.h, row, lse);
            }
        }
    }
}

template <class C>
__device__ __forceinline__ fa_consumer<C> fa_consumer_of(fa_fwd_sm90_shared<C> &sh, int warpgroup)
{
    fa_consumer<C> c;
    c.warpgroup = warpgroup;
    c.q_desc = fa_wgmma_descriptor(sh.q[warpgroup], 0);
    c.k_desc = fa_wgmma_descriptor(sh.k[0], 0);
    c.v_desc = fa_wgmma_descriptor(sh.v[0], C::BN * 128);
    if (warpgroup == C::WGS - 1)
        fa_turn_pass(c); /* the first turn is warpgroup 0's */
    return c;
}

/* All blocks of all tiles of this thread block are one pipeline: a tile ends while scores of the next are computed. */
template <class C>
__device__ __forceinline__ void fa_consume(const fa_fwd_sm90_params &p, fa_fwd_sm90_shared<C> &sh, int warpgroup)
{
    fa_consumer<C> c = fa_consumer_of<C>(sh, warpgroup);
    float s[C::BN / 2], o[C::DV / 2] = {};
    uint32_t w[C::BN / 4];
    fa_rows r;
    fa_query_tile done = {};
    bool first = true;
    for (int unit = blockIdx.x; unit < p.units; unit += gridDim.x) {
        for (int part = 0; part < p.parts; part++) {
            fa_query_tile t = fa_tile_at<C>(p, unit, part);
            for (int block = t.block_hi - 1; block >= t.block_lo; block--) {
                bool last = block == t.block_lo;
                if (first)
                    fa_first_block<C>(p, sh, c, t, block, last, s, w, r);
                else
                    fa_next_block<C>(p, sh, c, t, block, false, block == t.block_hi - 1, last, done, s, w, o, r);
                first = false;
            }
            done = t;
        }
    }
    fa_last_product<C>(sh, c, w, o);
    fa_store_tile<C>(p, sh, c, done, o, r);
    __syncwarp();
    if (p.hides && __any_sync(0xffffffff, c.spoilt))
        fa_repair_tiles<C>(p, warpgroup);
}

/* The same over the tiles of the ring. What is read from memory the assembler takes for different in each thread, and a
 * vote for the same: with votes as conditions of all branches, loops end at once for all threads of a warp, and stages,
 * addresses and descriptors stay in uniform registers. */
template <class C>
__device__ __forceinline__ void fa_consume_ring(const fa_fwd_sm90_mod_params &p, fa_fwd_sm90_shared<C> &sh,
                                                int warpgroup)
{
    fa_consumer<C> c = fa_consumer_of<C>(sh, warpgroup);
    float s[C::BN / 2], o[C::DV / 2] = {};
    uint32_t w[C::BN / 4];
    fa_rows r;
    fa_ring ring;
    int done = -1; /* place of the tile before */
    uint32_t last_unit;
    for (;; ring.next()) {
        const fa_mod_tile &t = fa_next_tile(sh, ring);
        last_unit = t.n;
        if (__any_sync(0xffffffff, t.block_hi < 0))
            break;
        int block = t.block_hi - 1;
        for (bool fresh = true, last = false; !last; fresh = false, block--) {
            last = __any_sync(0xffffffff, block == t.block_lo);
            fa_next_block<C>(p, sh, c, t, block, done < 0, fresh, last, done, s, w, o, r);
            done = ring.index;
        }
    }
    if (done < 0)
        return;
    fa_last_product<C>(sh, c, w, o);
    fa_store_tile<C>(p, sh, c, done, o, r);
    if (p.plain.hides && __any_sync(0xffffffff, c.spoilt))
        fa_mod_repair_tiles<C>(p, last_unit, warpgroup);
}

/* The same over the listed blocks. */
template <class C>
__device__ __forceinline__ void fa_consume_listed(const fa_fwd_sm90_mod_params &p, fa_fwd_sm90_shared<C> &sh,
                                                  int warpgroup)
{
    fa_consumer<C> c = fa_consumer_of<C>(sh, warpgroup);
    float s[C::BN / 2], o[C::DV / 2] = {};
    uint32_t w[C::BN / 4];
    fa_rows r;
    int done = -1; /* place of the tile before */
    fa_look_up<C>(sh, c);
    while (!(c.what & FA_END)) {
        const int place = c.what / FA_PLACE;
        const bool fresh = c.what & FA_FRESH, last = c.what & FA_LAST;
        fa_next_block<C>(p, sh, c, sh.tiles[place], c.block, done < 0, fresh, last, done, s, w, o, r);
        done = place;
    }
    if (done < 0)
        return;
    fa_last_product<C>(sh, c, w, o);
    fa_store_tile<C>(p, sh, c, done, o, r);
    if (p.plain.hides && __any_sync(0xffffffff, c.spoilt))
        fa_mod_repair_tiles<C>(p, (uint32_t)c.block, warpgroup);
}

/* ---- kernel ------------------------------------------------------------------------------------------------------ */

template <class C> __device__ __forceinline__ void fa_init_barriers(fa_fwd_sm90_shared<C> &s)
{
    constexpr int warpgroup = FA_WARPGROUP / FA_WARP * FA_WARP_ARRIVALS, consumers = C::WGS * warpgroup;
#pragma unroll
    for (int i = 0; i < C::WGS; i++) {
        fa_mbar_init(&s.q_full[i], 1);
        fa_mbar_init(&s.q_empty[i], warpgroup);
    }
#pragma unroll
    for (int i = 0; i < C::STAGES; i++) {
        fa_mbar_init(&s.k_full[i], 1);
        fa_mbar_init(&s.v_full[i], 1);
        fa_mbar_init(&s.k_empty[i], consumers);
        fa_mbar_init(&s.v_empty[i], consumers);
    }
    if constexpr (C::MOD) {
        for (int i = 0; i < FA_TILES; i++) {
            fa_mbar_init(&s.tile_full[i], 1);
            /* and the thread that loads, the warps that clear (or go by the list) and fetch */
            fa_mbar_init(&s.tile_empty[i], consumers + 1 + FA_WARP_ARRIVALS * !C::LISTED + warpgroup * C::FETCH);
        }
        for (int i = 0; i < C::FETCHED; i++) {
            fa_mbar_init(&s.fetched_full[i], warpgroup);
            fa_mbar_init(&s.fetched_empty[i], consumers);
        }
        for (int i = 0; i < C::STAGES; i++)
            fa_mbar_init(&s.v_raw[i], 1);
    }
    if constexpr (C::LISTED) {
        for (int i = 0; i < FA_LISTED; i++) {
            fa_mbar_init(&s.listed_full[i], FA_WARP_ARRIVALS);
            fa_mbar_init(&s.listed_empty[i], 1 + FA_WARP_ARRIVALS); /* the thread that loads, the warp that clears */
        }
    }
    fa_mbar_fence_init();
}

/* The work of the warpgroup that loads. */
template <class C> __device__ __forceinline__ void fa_supply(const fa_fwd_sm90_params &p, fa_fwd_sm90_shared<C> &s)
{
    if (threadIdx.x == 0)
        fa_produce<C>(p, s);
}

template <class C> __device__ __forceinline__ void fa_supply(const fa_fwd_sm90_mod_params &p, fa_fwd_sm90_shared<C> &s)
{
    int warp = __shfl_sync(0xffffffff, threadIdx.x / FA_WARP, 0);
    if (threadIdx.x == 0) {
        if constexpr (C::LISTED)
            fa_produce_listed<C>(p.plain, s);
        else
            fa_produce_ring<C>(p.plain, s);
    } else if (warp == 1) {
        fa_find_tiles<C>(p, s);
    } else if (warp == 2) {
        if constexpr (C::LISTED)
            fa_clear_listed_tails<C>(s);
        else
            fa_clear_tails<C>(s);
    }
}

__device__ __forceinline__ const fa_fwd_sm90_params &fa_plain_of(const fa_fwd_sm90_params &p)
{
    return p;
}

__device__ __forceinline__ const fa_fwd_sm90_params &fa_plain_of(const fa_fwd_sm90_mod_params &p)
{
    return p.plain;
}

/* Persistent: at most one block for each multiprocessor. Warpgroup 0 loads, with FETCH the last fetches masks, the
 * others compute. */
template <class C>
__global__ void __launch_bounds__(C::THREADS, 1)
    fa_fwd_sm90_kernel(const __grid_constant__ typename fa_fwd_sm90_types<C>::params p)
{
    extern __shared__ __align__(1024) unsigned char raw[];
    fa_fwd_sm90_shared<C> &s = *(fa_fwd_sm90_shared<C> *)raw;
    int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / FA_WARPGROUP, 0);
    if (threadIdx.x == 0) {
        fa_tma_prefetch_map(&fa_plain_of(p).q_map);
        fa_tma_prefetch_map(&fa_plain_of(p).k_map);
        fa_tma_prefetch_map(&fa_plain_of(p).v_map);
        fa_init_barriers(s);
    }
    __syncthreads();
    if (warpgroup == 0) {
        fa_registers_shrink<C::PRODUCER_REGISTERS>();
        fa_supply<C>(p, s);
    } else if (warpgroup == C::WGS + 1) {
        if constexpr (C::FETCH) {
            fa_registers_shrink<C::FETCH_REGISTERS>();
            fa_fetch<C>(p, s);
        }
    } else {
        fa_registers_grow<C::CONSUMER_REGISTERS>();
        if constexpr (C::LISTED)
            fa_consume_listed<C>(p, s, warpgroup - 1);
        else if constexpr (C::MOD)
            fa_consume_ring<C>(p, s, warpgroup - 1);
        else
            fa_consume<C>(p, s, warpgroup - 1);
    }
}

#endif
