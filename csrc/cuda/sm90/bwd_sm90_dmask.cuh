/* The gradient of a float mask on Hopper: the sum of dS over all heads and batches that share an element.
 *
 * For a tile of 128 x BN elements, a thread block computes S and dP of one head after the other anew and keeps the sum
 * in registers: nothing of the size of the scores is stored but the result, and the order of the sum is fixed. Two
 * products for five of the main kernel. */
#ifndef FA_BWD_SM90_DMASK_CUH
#define FA_BWD_SM90_DMASK_CUH

#include "../ptx/tma.cuh"
#include "bwd_sm90_copy.cuh"
#include "bwd_sm90_mod.cuh"

/* C: configuration of the main kernel, whose tensor maps are used. */
template <class C> struct fa_dmask_config {
    using T = typename C::T;
    static constexpr int D = C::D, DV = C::DV, BM = 128, BN = C::BN, BOX = C::BM;
    static constexpr int THREADS = 3 * FA_WARPGROUP, PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
};

enum { FA_BAR_QK_FULL, FA_BAR_QK_EMPTY, FA_BAR_OV_FULL, FA_BAR_OV_EMPTY, FA_DMASK_BARS };

template <class M> struct fa_dmask_shared {
    alignas(1024) typename M::T q[M::BM * M::D];
    alignas(1024) typename M::T k[M::BN * M::D];
    alignas(1024) typename M::T dout[M::BM * M::DV];
    alignas(1024) typename M::T v[M::BN * M::DV];
    alignas(16) float4 bias[M::BN / 8][2 * FA_WARPGROUP]; /* of a thread's 4 elements of 8 columns; in units of log2 */
    uint64_t bar[FA_DMASK_BARS];
};

/* ---- work -------------------------------------------------------------------------------------------------------- */

/* Element of the mask (batch, head, query, key) from which a tile starts. */
struct fa_dmask_tile {
    int b, h, query, key;
};

/* Tile number `index`; false behind the last. A thread block takes every gridDim.x-th: its copies for the next tile
 * start while the last is stored. */
template <class M>
__device__ __forceinline__ bool fa_dmask_tile_at(const fa_bwd_sm90_params &p, int index, fa_dmask_tile &t)
{
    int columns = (p.SK + M::BN - 1) / M::BN, rows = (p.SQ + M::BM - 1) / M::BM, head = index / (columns * rows);
    int at = index - head * columns * rows;
    t = {head / p.mod.dmask_heads, head % p.mod.dmask_heads, at / columns * M::BM, at % columns * M::BN};
    return t.b < p.mod.dmask_batches;
}

/* The heads that share the tile, one by one; those in which no pair of it meets are left out. */
struct fa_dmask_step {
    int t;       /* number of steps before, also of other tiles */
    int b, h;    /* of q */
    int b_end, h_first, h_end;
    fa_bwd_band band;
};

template <class M> __device__ __forceinline__ bool fa_tile_meets(const fa_bwd_band &band, const fa_dmask_tile &tile)
{
    int last_query = min(band.SQ, tile.query + M::BM) - 1, last_key = min(band.SK, tile.key + M::BN) - 1;
    return tile.query <= last_query && tile.key <= last_key && last_key >= tile.query + band.lo_shift &&
           tile.key < last_query + band.hi_shift;
}

/* To the first step at or behind (b, h); false: there is none. */
template <class M>
__device__ __forceinline__ bool fa_find_step(const fa_bwd_sm90_params &p, const fa_dmask_tile &tile, fa_dmask_step &s)
{
    if (s.h == s.h_end) {
        s.h = s.h_first;
        s.b++;
    }
    for (; s.b < s.b_end; s.b++) {
        s.band = fa_band_of(p, s.b);
        if (fa_tile_meets<M>(s.band, tile))
            return true;
    }
    return false;
}

__device__ __forceinline__ fa_dmask_step fa_first_dmask_step(const fa_bwd_sm90_params &p, const fa_dmask_tile &tile,
                                                             int t)
{
    bool all_b = p.mod.dmask_batches == 1, all_h = p.mod.dmask_heads == 1;
    fa_dmask_step s = {};
    s.t = t;
    s.b = tile.b;
    s.b_end = all_b ? p.B : tile.b + 1;
    s.h = s.h_first = tile.h;
    s.h_end = all_h ? p.HQ : tile.h + 1;
    return s;
}

/* ---- producer ---------------------------------------------------------------------------------------------------- */

/* 128 rows in panels of 64 columns, by boxes of BOX rows. */
template <class M, int COLUMNS>
__device__ __forceinline__ void fa_load_rows(typename M::T *to, const CUtensorMap *map, uint64_t *bar, int row,
                                             int head, int batch)
{
#pragma unroll
    for (int panel = 0; panel < COLUMNS / 64; panel++) {
#pragma unroll
        for (int box = 0; box < M::BM / M::BOX; box++)
            fa_tma_load_4d(to + 64 * (panel * M::BM + box * M::BOX), map, bar, 64 * panel, row + box * M::BOX, head,
                           batch);
    }
}

/* Returns the number of steps so far; before: of other tiles. */
template <class M>
__device__ __forceinline__ int fa_dmask_produce(const fa_bwd_sm90_params &p, fa_dmask_shared<M> &s,
                                                const fa_dmask_tile &tile, int before)
{
    fa_dmask_step at = fa_first_dmask_step(p, tile, before);
    for (; fa_find_step<M>(p, tile, at); at.t++, at.h++) {
        const CUtensorMap *q = fa_map_of(p, &p.q_map, at.b, FA_MAP_Q), *k = fa_map_of(p, &p.k_map, at.b, FA_MAP_K);
        const CUtensorMap *dout = fa_map_of(p, &p.dout_map, at.b, FA_MAP_DOUT),
                          *v = fa_map_of(p, &p.v_map, at.b, FA_MAP_V);
        int hk = at.h / p.group;
        fa_mbar_wait(&s.bar[FA_BAR_QK_EMPTY], at.t & 1 ^ 1);
        fa_mbar_expect(&s.bar[FA_BAR_QK_FULL], sizeof(s.q) + sizeof(s.k));
        fa_load_rows<M, M::D>(s.q, q, &s.bar[FA_BAR_QK_FULL], tile.query, at.h * p.q_steps[0], at.b * p.q_steps[1]);
        fa_load_tile<M::BN, M::D>(s.k, k, &s.bar[FA_BAR_QK_FULL], tile.key, hk * p.k_steps[0], at.b * p.k_steps[1]);
        fa_mbar_wait(&s.bar[FA_BAR_OV_EMPTY], at.t & 1 ^ 1);
        fa_mbar_expect(&s.bar[FA_BAR_OV_FULL], sizeof(s.dout) + sizeof(s.v));
        fa_load_rows<M, M::DV>(s.dout, dout, &s.bar[FA_BAR_OV_FULL], tile.query, at.h * p.dout_steps[0],
                               at.b * p.dout_steps[1]);
        fa_load_tile<M::BN, M::DV>(s.v, v, &s.bar[FA_BAR_OV_FULL], tile.key, hk * p.v_steps[0], at.b * p.v_steps[1]);
    }
    return at.t;
}

/* ---- consumers: 64 queries each ---------------------------------------------------------------------------------- */

/* The thread's place: rows query and query + 8, columns key + 8 c + 0, 1; accumulator element 4 c + 2 r + x. */
__device__ __forceinline__ fa_place fa_dmask_place(const fa_dmask_tile &tile, int row)
{
    int lane = threadIdx.x % FA_WARP, warp = threadIdx.x / FA_WARP % 4;
    fa_place at = {tile.key + 2 * (lane % 4), tile.query + row + 16 * warp + lane / 4};
    return at;
}

/* All loads are in flight at once: what lies outside is read from the last row or column, and hidden. */
template <class M, typename E>
__device__ __forceinline__ void fa_keep_bias_as(const fa_bwd_sm90_params &p, const E *mask, fa_place at, float4 *to)
{
    E x[M::BN / 2];
#pragma unroll
    for (int i = 0; i < M::BN / 2; i++) {
        int query = min(at.query + i / 2 % 2 * 8, p.SQ - 1), key = min(at.key + i / 4 * 8 + i % 2, p.SK - 1);
        x[i] = mask[query * p.mod.mask_query + key * p.mod.mask_key];
    }
#pragma unroll
    for (int c = 0; c < M::BN / 8; c++) {
        float y[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            y[i] = fa_bias_of(fa_widen(x[4 * c + i]));
        to[c * (2 * FA_WARPGROUP)] = make_float4(y[0], y[1], y[2], y[3]);
    }
}

template <class M>
__device__ __forceinline__ void fa_keep_bias(const fa_bwd_sm90_params &p, const fa_dmask_tile &tile, fa_place at,
                                             float4 *to)
{
    const fa_bwd_mod &m = p.mod;
    int64_t first = tile.b * m.mask_batch + tile.h * m.mask_head;
    if (m.f32)
        fa_keep_bias_as<M>(p, (const float *)m.mask + first, at, to);
    else
        fa_keep_bias_as<M>(p, (const typename M::T *)m.mask + first, at, to);
}

/* (64, BN) of x y^T, both contiguous along COLUMNS; x: descriptor of 64 of 128 rows. */
template <class M, int COLUMNS>
__device__ __forceinline__ void fa_issue_dmask(float (&s)[M::BN / 2], uint64_t x, uint64_t y)
{
    fa_wgmma_fence();
#pragma unroll
    for (int i = 0; i < COLUMNS / 16; i++)
        fa_wgmma<typename M::T, M::BN>::template ss<0, 0>(s, x + i / 4 * (M::BM * 128 / 16) + i % 4 * 2,
                                                          y + i / 4 * (M::BN * 128 / 16) + i % 4 * 2, i > 0);
    fa_wgmma_commit();
}

/* What a step knows of the thread's two rows. */
struct fa_dmask_rows {
    float lse[2], delta[2];
    float slope; /* ALiBi, in units of log2 */
};

template <class M>
__device__ __forceinline__ fa_dmask_rows fa_dmask_rows_of(const fa_bwd_sm90_params &p, const fa_dmask_step &s,
                                                          fa_place at)
{
    const fa_bwd_mod &m = p.mod;
    fa_dmask_rows rows = {};
    int64_t first = ((int64_t)s.b * p.HQ + s.h) * p.q_blocks * p.BM;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int query = at.query + 8 * r;
        rows.lse[r] = query < p.SQ ? p.row_lse[first + query] : CUDART_INF_F;
        rows.delta[r] = query < p.SQ ? p.row_delta[first + query] : 0.f;
    }
    if (m.options & FA_MOD_ALIBI)
        rows.slope = FA_LOG2E * fa_number_at<typename M::T>(m.alibi, m.alibi_f32,
                                                            s.b * m.alibi_batch + s.h * m.alibi_head);
    return rows;
}

/* s becomes what the score is without the mask and ALiBi, less lse. */
template <class M>
__device__ __forceinline__ void fa_dmask_scores(const fa_bwd_sm90_params &p, const fa_dmask_rows &rows,
                                                float (&s)[M::BN / 2])
{
    const fa_bwd_mod &m = p.mod;
    if (m.options & FA_MOD_CAP) {
#pragma unroll
        for (int i = 0; i < M::BN / 2; i++)
            s[i] = fmaf(fa_tanh(s[i] * m.cap_scale), m.cap, -rows.lse[i / 2 % 2]);
    } else {
#pragma unroll
        for (int i = 0; i < M::BN / 2; i++)
            s[i] = fmaf(s[i], p.scale_log2, -rows.lse[i / 2 % 2]);
    }
}

template <class M>
__device__ __forceinline__ void fa_dmask_alibi(float slope, int ahead, float (&s)[M::BN / 2])
{
#pragma unroll
    for (int i = 0; i < M::BN / 2; i++)
        s[i] = fmaf(-slope, fabsf((float)(ahead + i / 2 % 2 * 8 - i / 4 * 8 - i % 2)), s[i]);
}

template <class M>
__device__ __forceinline__ void fa_dmask_hide(const fa_bwd_band &band, fa_place at, float (&s)[M::BN / 2])
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int query = at.query + 8 * r, lo = query + band.lo_shift - at.key;
        int hi = query < band.SQ ? min(band.SK, query + band.hi_shift) - at.key : INT32_MIN;
#pragma unroll
        for (int i = 0; i < M::BN / 4; i++) {
            float &x = s[i / 2 * 4 + 2 * r + i % 2];
            x = i / 2 * 8 + i % 2 >= lo && i / 2 * 8 + i % 2 < hi ? x : -CUDART_INF_F;
        }
    }
}

/* s <- P */
template <class M>
__device__ __forceinline__ void fa_dmask_weights(const fa_bwd_sm90_params &p, const fa_dmask_step &step,
                                                 const fa_dmask_rows &rows, fa_place at, const float4 *bias,
                                                 float (&s)[M::BN / 2], bool edges)
{
    fa_dmask_scores<M>(p, rows, s);
#pragma unroll
    for (int c = 0; c < M::BN / 8; c++) {
        float4 b = bias[c * (2 * FA_WARPGROUP)];
        s[4 * c] += b.x;
        s[4 * c + 1] += b.y;
        s[4 * c + 2] += b.z;
        s[4 * c + 3] += b.w;
    }
    if (p.mod.options & FA_MOD_ALIBI)
        fa_dmask_alibi<M>(rows.slope, at.query + fa_offset_of(p, step.band) - at.key, s);
    if (edges)
        fa_dmask_hide<M>(step.band, at, s);
#pragma unroll
    for (int i = 0; i < M::BN / 2; i++)
        s[i] = fa_exp2(s[i]);
}

/* dp <- what dropout makes of it; an evaluation serves eight of the thread's elements. */
template <class M>
__device__ __forceinline__ void fa_dmask_drop(const fa_bwd_mod &m, int head, fa_place at, float (&dp)[M::BN / 2])
{
    uint32_t bh = m.first_head + head;
    uint2 row = fa_draw_row(m.dropout, fa_dropout_row(at.query), bh);
#pragma unroll
    for (int a = 0; a < M::BN / 16; a++) {
        uint4 column = fa_draw_column(m.dropout, fa_dropout_column(at.key) + 4 * a, bh);
        fa_philox4 r = fa_draw_signs<true>(m.dropout, column, row);
#pragma unroll
        for (int i = 0; i < 4; i++) { /* row i / 2, group of 8 columns 2 a + i % 2 */
            uint32_t kept = r.word[i] ^ m.dropout.flip;
            float *pair = dp + 4 * (2 * a + i % 2) + 2 * (i / 2);
            pair[0] *= kept & 0x8000u ? m.dropout.factor : 0.f;
            pair[1] *= kept & 0x80000000u ? m.dropout.factor : 0.f;
        }
    }
}

/* sum += P o (dP - delta); what is hidden adds nothing, whatever its dP is. */
template <class M>
__device__ __forceinline__ void fa_dmask_add(const fa_dmask_rows &rows, const float (&weight)[M::BN / 2],
                                             const float (&dp)[M::BN / 2], float (&sum)[M::BN / 2])
{
#pragma unroll
    for (int i = 0; i < M::BN / 2; i++) {
        float ds = fmaf(weight[i], dp[i] - rows.delta[i / 2 % 2], sum[i]);
        sum[i] = weight[i] != 0.f ? ds : sum[i];
    }
}

/* One head. Time runs downwards; the other warpgroup does the same at times of its own:
 *
 *   tensor cores   this warpgroup
 *   S, dP          wait for S; hand back Q and K
 *   dP             P = exp2(S); wait for dP; hand back dO and V
 *                  sum += P o (dP - delta)
 */
template <class M>
__device__ __forceinline__ void fa_dmask_head(const fa_bwd_sm90_params &p, fa_dmask_shared<M> &sh,
                                              const fa_dmask_tile &tile, const fa_dmask_step &step, fa_place at,
                                              int row, float (&sum)[M::BN / 2])
{
    float s[M::BN / 2], dp[M::BN / 2];
    const fa_bwd_band &band = step.band;
    int query0 = tile.query + row, last_key = tile.key + M::BN - 1;
    bool edges = query0 + 64 > band.SQ || last_key >= band.SK || tile.key < query0 + 63 + band.lo_shift ||
                 last_key >= query0 + band.hi_shift;
    fa_dmask_rows rows = fa_dmask_rows_of<M>(p, step, at);
    fa_mbar_wait(&sh.bar[FA_BAR_QK_FULL], step.t & 1);
    fa_issue_dmask<M, M::D>(s, fa_wgmma_descriptor_64(sh.q, 0) + row * (128 / 16), fa_wgmma_descriptor_64(sh.k, 0));
    fa_mbar_wait(&sh.bar[FA_BAR_OV_FULL], step.t & 1);
    fa_issue_dmask<M, M::DV>(dp, fa_wgmma_descriptor_64(sh.dout, 0) + row * (128 / 16),
                             fa_wgmma_descriptor_64(sh.v, 0));
    fa_wgmma_wait<1>();
    fa_wgmma_hold(s);
    fa_warp_arrive(&sh.bar[FA_BAR_QK_EMPTY]);
    fa_dmask_weights<M>(p, step, rows, at, &sh.bias[0][threadIdx.x - FA_WARPGROUP], s, edges);
    fa_wgmma_wait<0>();
    fa_wgmma_hold(dp);
    fa_warp_arrive(&sh.bar[FA_BAR_OV_EMPTY]);
    if (p.mod.options & FA_MOD_DROPOUT)
        fa_dmask_drop<M>(p.mod, step.b * p.HQ + step.h, at, dp);
    fa_dmask_add<M>(rows, s, dp, sum);
}

template <class M>
__device__ __forceinline__ void fa_dmask_store(const fa_bwd_sm90_params &p, const fa_dmask_tile &tile, fa_place at,
                                               int row, float (&sum)[M::BN / 2])
{
    const fa_bwd_mod &m = p.mod;
    int64_t first = tile.b * m.dmask_batch + tile.h * m.dmask_head;
    if (m.dmask_vectors) {
        fa_rows_out f = {{1.f, 1.f}, {0.f, 0.f}, {false, false}};
        fa_store_rows<typename M::T, M::BN>((typename M::T *)m.dmask + first + tile.key, m.dmask_query, sum, f,
                                            tile.query + row, p.SQ, p.SK - tile.key);
        return;
    }
#pragma unroll
    for (int i = 0; i < M::BN / 2; i++) {
        int query = at.query + i / 2 % 2 * 8, key = at.key + i / 4 * 8 + i % 2;
        int64_t to = first + query * m.dmask_query + key * m.dmask_key;
        if (query >= p.SQ || key >= p.SK)
            continue;
        if (m.f32)
            ((float *)m.dmask)[to] = sum[i];
        else
            ((typename M::T *)m.dmask)[to].bits = (uint16_t)fa_pack<typename M::T>(sum[i], 0.f);
    }
}

template <class M>
__device__ __forceinline__ int fa_dmask_consume(const fa_bwd_sm90_params &p, fa_dmask_shared<M> &s,
                                                const fa_dmask_tile &tile, int row, int before)
{
    fa_place at = fa_dmask_place(tile, row);
    float sum[M::BN / 2] = {};
    fa_keep_bias<M>(p, tile, at, &s.bias[0][threadIdx.x - FA_WARPGROUP]);
    fa_dmask_step step = fa_first_dmask_step(p, tile, before);
    for (; fa_find_step<M>(p, tile, step); step.t++, step.h++)
        fa_dmask_head<M>(p, s, tile, step, at, row, sum);
    fa_dmask_store<M>(p, tile, at, row, sum);
    return step.t;
}

template <class M>
__global__ void __launch_bounds__(M::THREADS, 1) fa_dmask_sm90_kernel(const __grid_constant__ fa_bwd_sm90_params p)
{
    extern __shared__ __align__(1024) unsigned char raw[];
    fa_dmask_shared<M> &s = *(fa_dmask_shared<M> *)raw;
    int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / FA_WARPGROUP, 0);
    fa_dmask_tile tile;
    int steps = 0, index = blockIdx.x;
    if (threadIdx.x == 0) {
        fa_mbar_init(&s.bar[FA_BAR_QK_FULL], 1);
        fa_mbar_init(&s.bar[FA_BAR_OV_FULL], 1);
        fa_mbar_init(&s.bar[FA_BAR_QK_EMPTY], 2 * FA_WARPGROUP / FA_WARP * FA_WARP_ARRIVALS);
        fa_mbar_init(&s.bar[FA_BAR_OV_EMPTY], 2 * FA_WARPGROUP / FA_WARP * FA_WARP_ARRIVALS);
        fa_mbar_fence_init();
    }
    __syncthreads();
    if (warpgroup == 0) {
        fa_registers_shrink<M::PRODUCER_REGISTERS>();
        for (; threadIdx.x == 0 && fa_dmask_tile_at<M>(p, index, tile); index += gridDim.x)
            steps = fa_dmask_produce<M>(p, s, tile, steps);
    } else {
        fa_registers_grow<M::CONSUMER_REGISTERS>();
        for (; fa_dmask_tile_at<M>(p, index, tile); index += gridDim.x)
            steps = fa_dmask_consume<M>(p, s, tile, 64 * (warpgroup - 1), steps);
    }
}

#endif
