/* The producer of the Hopper forward kernel: one thread starts every copy. */
#ifndef FA_FWD_SM90_PRODUCE_CUH
#define FA_FWD_SM90_PRODUCE_CUH

#include "../ptx/mbarrier.cuh"
#include "../ptx/tma.cuh"
#include "fwd_sm90_shared.cuh"

/* Rows first .. first + ROWS - 1 of one head, COLUMNS wide, in panels of 64 columns. */
template <int ROWS, int COLUMNS, typename T>
__device__ __forceinline__ void fa_load_rows(T *to, const CUtensorMap *map, uint64_t *bar, int first, int head,
                                             int batch)
{
#pragma unroll
    for (int c = 0; c < COLUMNS; c += 64)
        fa_tma_load_4d(to + c * ROWS, map, bar, c, first, head, batch);
}

/* Rows of a tile's queries and keys in the tensors. */
__device__ __forceinline__ int fa_query_row(const fa_query_tile &t)
{
    return t.row;
}

__device__ __forceinline__ int fa_query_row(const fa_mod_tile &t)
{
    return t.q_row + t.row;
}

__device__ __forceinline__ int fa_key_row(const fa_query_tile &)
{
    return 0;
}

__device__ __forceinline__ int fa_key_row(const fa_mod_tile &t)
{
    return t.k_row;
}

template <class C, class Tile>
__device__ __forceinline__ void fa_load_queries(const fa_fwd_sm90_params &p, fa_fwd_sm90_shared<C> &s, const Tile &t,
                                                uint32_t &parity)
{
#pragma unroll
    for (int w = 0; w < C::WGS; w++) {
        fa_mbar_wait(&s.q_empty[w], parity ^ 1);
        fa_mbar_expect(&s.q_full[w], sizeof(s.q[w]));
        fa_load_rows<64, C::D>(s.q[w], &p.q_map, &s.q_full[w], fa_query_row(t) + 64 * w, t.h * p.q_steps[0],
                             t.b * p.q_steps[1]);
    }
    parity ^= 1;
}

template <class C, class Tile>
__device__ __forceinline__ void fa_load_keys(const fa_fwd_sm90_params &p, fa_fwd_sm90_shared<C> &s, const Tile &t,
                                             int block, fa_stage<C::STAGES> &ks)
{
    fa_mbar_wait(&s.k_empty[ks.index], ks.parity ^ 1);
    fa_mbar_expect(&s.k_full[ks.index], sizeof(s.k[0]));
    fa_load_rows<C::BN, C::D>(s.k[ks.index], &p.k_map, &s.k_full[ks.index], fa_key_row(t) + block * C::BN,
                              t.h / p.group * p.k_steps[0], t.b * p.k_steps[1]);
    ks.next();
}

/* The barrier that V of a block is announced on. */
template <class C>
__device__ __forceinline__ uint64_t *fa_values_bar(fa_fwd_sm90_shared<C> &s, const fa_query_tile &, int, int stage)
{
    return &s.v_full[stage];
}

template <class C>
__device__ __forceinline__ uint64_t *fa_values_bar(fa_fwd_sm90_shared<C> &s, const fa_mod_tile &t, int block, int stage)
{
    return t.tail < C::BN && block == t.block_hi - 1 ? &s.v_raw[stage] : &s.v_full[stage];
}

template <class C, class Tile>
__device__ __forceinline__ void fa_load_values(const fa_fwd_sm90_params &p, fa_fwd_sm90_shared<C> &s, const Tile &t,
                                               int block, fa_stage<C::STAGES> &vs)
{
    uint64_t *bar = fa_values_bar<C>(s, t, block, vs.index);
    fa_mbar_wait(&s.v_empty[vs.index], vs.parity ^ 1);
    fa_mbar_expect(bar, sizeof(s.v[0]));
    fa_load_rows<C::BN, C::DV>(s.v[vs.index], &p.v_map, bar, fa_key_row(t) + block * C::BN,
                               t.h / p.group * p.v_steps[0], t.b * p.v_steps[1]);
    vs.next();
}

/* The order in which consumers need them, over all blocks of all tiles: K of a block, then V of the block before. Q of
 * a tile comes last among the copies for its first block, since its place is free last. */
template <class C> __device__ __forceinline__ void fa_produce(const fa_fwd_sm90_params &p, fa_fwd_sm90_shared<C> &s)
{
    fa_stage<C::STAGES> ks, vs;
    uint32_t q_parity = 0;
    fa_query_tile before = {};
    int block_before = -1; /* there is none */
    for (int unit = blockIdx.x; unit < p.units; unit += gridDim.x) {
        for (int part = 0; part < p.parts; part++) {
            fa_query_tile t = fa_tile_at<C>(p, unit, part);
            for (int block = t.block_hi - 1; block >= t.block_lo; block--) {
                fa_load_keys<C>(p, s, t, block, ks);
                if (block_before >= 0)
                    fa_load_values<C>(p, s, before, block_before, vs);
                if (block == t.block_hi - 1)
                    fa_load_queries<C>(p, s, t, q_parity);
                before = t;
                block_before = block;
            }
        }
    }
    fa_load_values<C>(p, s, before, block_before, vs);
}

/* The same over the tiles of the ring. */
template <class C>
__device__ __forceinline__ void fa_produce_ring(const fa_fwd_sm90_params &p, fa_fwd_sm90_shared<C> &s)
{
    fa_stage<C::STAGES> ks, vs;
    fa_ring ring;
    uint32_t q_parity = 0;
    int slot_before = -1, block_before = 0; /* there is none */
    for (;; ring.next()) {
        const fa_mod_tile &t = fa_next_tile(s, ring);
        int hi = t.block_hi;
        for (int block = hi - 1; hi >= 0 && block >= t.block_lo; block--) {
            fa_load_keys<C>(p, s, t, block, ks);
            if (slot_before >= 0)
                fa_load_values<C>(p, s, s.tiles[slot_before], block_before, vs);
            if (block == hi - 1) {
                fa_load_queries<C>(p, s, t, q_parity);
                if (slot_before >= 0)
                    fa_mbar_arrive(&s.tile_empty[slot_before]);
            }
            slot_before = ring.index;
            block_before = block;
        }
        if (hi < 0)
            break;
    }
    if (slot_before >= 0)
        fa_load_values<C>(p, s, s.tiles[slot_before], block_before, vs);
}

/* The same over the listed blocks. */
template <class C>
__device__ __forceinline__ void fa_produce_listed(const fa_fwd_sm90_params &p, fa_fwd_sm90_shared<C> &s)
{
    fa_stage<C::STAGES> ks, vs;
    fa_stage<FA_LISTED> from;
    uint32_t q_parity = 0;
    int slot_before = -1, block_before = 0; /* there is none */
    for (int n = 0;; n++, from.next()) {
        fa_mbar_wait(&s.listed_full[from.index], from.parity);
        const uint32_t what = s.listed[from.index].what;
        const int block = s.listed[from.index].block, slot = what / FA_PLACE;
        if (what & FA_END)
            break;
        fa_load_keys<C>(p, s, s.tiles[slot], block, ks);
        if (n > C::STAGES)
            fa_mbar_arrive(&s.listed_empty[(from.index + FA_LISTED - C::STAGES - 1) % FA_LISTED]);
        if (slot_before >= 0)
            fa_load_values<C>(p, s, s.tiles[slot_before], block_before, vs);
        if (what & FA_FRESH) {
            fa_load_queries<C>(p, s, s.tiles[slot], q_parity);
            if (slot_before >= 0)
                fa_mbar_arrive(&s.tile_empty[slot_before]);
        }
        slot_before = slot;
        block_before = block;
    }
    if (slot_before >= 0)
        fa_load_values<C>(p, s, s.tiles[slot_before], block_before, vs);
}

#endif
