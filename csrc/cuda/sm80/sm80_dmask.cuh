/* The gradient of a float mask: a block has a tile of it and sums dS of all scores that it took part in, with P and dS
 * as backward has them (sm80_bwd.cuh). */
#ifndef FA_SM80_DMASK_CUH
#define FA_SM80_DMASK_CUH

#include "sm80_bwd.cuh"

/* Sums the results of all lanes that share a column of the mask's gradient, or a row of it, or all; what is summed lies
 * in sSum [RM][CN] and is added in the order of its index. */
template <class C>
__device__ static void fa_dmask_store(const fa_args *a, const typename C::product &sum, float *sSum, int64_t mb,
                                      int64_t mh, int64_t i0, int64_t j0, bool all_i, bool all_j)
{
    const fa_tensor *m = &a->dmask;
    const int lane = threadIdx.x % 32;
    __syncthreads();
#pragma unroll
    for (int x = 0; x < 2 * C::MT; x++)
#pragma unroll
        for (int y = 0; y < 2 * C::NT; y++)
            sSum[(threadIdx.x / 32 * 16 * C::MT + lane / 4 + 8 * x) * C::CN + lane % 4 * (C::CN / 4) + y] =
                sum[x / 2][y / 2][x % 2 * 2 + y % 2];
    __syncthreads();
    const int rows = all_i ? C::RM : 1, cols = all_j ? C::CN : 1;
    for (int x = threadIdx.x; x < C::RM / rows * (C::CN / cols); x += C::THREADS) {
        const int r = x / (C::CN / cols), c = x % (C::CN / cols);
        float total = 0;
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < cols; j++)
                total += sSum[(r * rows + i) * C::CN + c * cols + j];
        const int64_t mi = all_i ? 0 : i0 + r, mj = all_j ? j0 : j0 + c;
        if (mi >= m->size[2] || mj >= m->size[3])
            continue;
        const int64_t at = mb * m->stride[0] + mh * m->stride[1] + mi * m->stride[2] + mj * m->stride[3];
        if (m->dtype == FA_F32)
            ((float *)m->data)[at] = total;
        else
            ((typename C::T *)m->data)[at] = fa_from<typename C::T>(total);
    }
}

/* An element of the mask stands for itself along a dimension, or where the mask is broadcast for all. */
__device__ __forceinline__ fa_range fa_extent(int64_t mask_size, int64_t full, int64_t first, int64_t count)
{
    return mask_size == full ? fa_range{first, fa_min64(first + count, full)} : fa_range{0, full};
}

/* What a block of the mask's gradient sums: block = ((mb * H + mh) * row tiles + row tile) * groups of column tiles +
 * group, in the mask's own sizes; not packed. */
struct fa_dmask_work {
    int64_t mb, mh, mi, mj;
    fa_range bs, hs, is, js; /* batches, heads, queries, keys */
};

template <class C> __device__ static fa_dmask_work fa_dmask_work_of(const fa_args *a)
{
    fa_dmask_work w;
    const int64_t *size = a->mask.size;
    constexpr int COLUMNS = FA_DMASK_TILES * C::CN;
    const int64_t col_tiles = fa_ceil_div(size[3], COLUMNS), row_tiles = fa_ceil_div(size[2], C::RM);
    int64_t id = blockIdx.x;
    w.mj = id % col_tiles * COLUMNS, w.mi = id / col_tiles % row_tiles * C::RM;
    id /= col_tiles * row_tiles;
    w.mh = id % size[1], w.mb = id / size[1];
    w.bs = fa_extent(size[0], a->q.size[0], w.mb, 1);
    w.hs = fa_extent(size[1], a->q.size[1], w.mh, 1);
    w.is = fa_extent(size[2], a->q.size[2], w.mi, C::RM);
    w.js = fa_extent(size[3], a->k.size[2], w.mj, COLUMNS);
    return w;
}

/* Adds dS of the keys js of one head and tile of queries; sum: of FA_DMASK_TILES tiles of keys, or where the mask is
 * broadcast along them, the first of all. */
template <class C>
__device__ __forceinline__ void fa_dmask_add(typename C::product (&sum)[FA_DMASK_TILES], const fa_sm80_params &p,
                                             const fa_seq *seq, int64_t h, int64_t i0, fa_range js,
                                             const fa_bwd_tiles<C> &sh)
{
    const fa_args *a = &p.a;
    constexpr int NEXT = C::STAGES - 1;
    const fa_range keys = fa_keys_of_queries(&seq->span, i0, fa_min64(i0 + C::RM, seq->span.q_len) - 1);
    const int lo = (int)(fa_max64(js.lo, keys.lo) / C::CN * C::CN), hi = (int)fa_min64(js.hi, keys.hi);
    const bool broadcast = a->mask.size[3] != a->k.size[2];
    const int vectors = FA_VEC_K | FA_VEC_V;
    const bool slowly = (p.vectors & vectors) != vectors;
    if (lo >= hi)
        return;
    const fa_bwd_key_source<C> from(a, seq, h / (a->q.size[1] / a->k.size[1]));
    fa_bwd_load_own_queries<C, false>(sh, p, seq, h, i0);
    const fa_bwd_head head = fa_bwd_head_of<C>(p, seq, h, (int)i0);
    const fa_bwd_rows<C::MT> rows = fa_bwd_rows_at<C::MT>(p, seq, h, head.f.row);
    int stage = 0;
    if (NEXT)
        fa_bwd_load_keys(sh, 0, p, seq, from, lo, slowly);
#pragma unroll 1
    for (int j0 = lo; j0 < hi; j0 += C::CN) {
        fa_fetch_mask<C::MT, C::NT, C::THREADS>(sh.mask(), head.f, p.mask_width, j0);
        ptx_cp_async_commit();
        if (!NEXT)
            fa_bwd_load_keys(sh, 0, p, seq, from, j0, slowly);
        else if (j0 + C::CN < hi)
            fa_bwd_load_keys(sh, stage ^ 1, p, seq, from, j0 + C::CN, slowly);
        else
            ptx_cp_async_commit();
        ptx_cp_async_wait<NEXT>();
        __syncthreads();
        const bool edges = !fa_all_visible(&seq->span, i0, i0 + C::RM - 1, j0, j0 + C::CN - 1);
        typename C::product s, ds;
        fa_bwd_weights<C, false, true>(s, ds, sh, stage, head, rows, j0, edges);
        const int tile = broadcast ? 0 : (j0 - (int)js.lo) / C::CN;
#pragma unroll
        for (int y = 0; y < FA_DMASK_TILES; y++)
            if (y == tile)
                fa_add(sum[y], ds);
        __syncthreads();
        stage ^= NEXT;
    }
    ptx_cp_async_wait<0>();
    __syncthreads();
}

template <class C>
__global__ void __launch_bounds__(C::THREADS) fa_dmask_sm80(const __grid_constant__ fa_sm80_params p)
{
    extern __shared__ __align__(16) char smem[];
    const fa_bwd_tiles<C> sh{smem};
    const fa_args *a = &p.a;
    const fa_dmask_work w = fa_dmask_work_of<C>(a);
    typename C::product sum[FA_DMASK_TILES];
#pragma unroll
    for (int y = 0; y < FA_DMASK_TILES; y++)
        fa_zero(sum[y]);
    for (int64_t b = w.bs.lo; b < w.bs.hi; b++) {
        const fa_seq seq = fa_seq_at(a, b);
        for (int64_t h = w.hs.lo; h < w.hs.hi; h++)
            for (int64_t i0 = w.is.lo; i0 < fa_min64(w.is.hi, seq.span.q_len); i0 += C::RM)
                fa_dmask_add<C>(sum, p, &seq, h, i0, w.js, sh);
    }
#pragma unroll
    for (int y = 0; y < FA_DMASK_TILES; y++)
        fa_dmask_store<C>(a, sum[y], (float *)smem, w.mb, w.mh, w.mi, w.mj + y * C::CN,
                          a->mask.size[2] != a->q.size[2], a->mask.size[3] != a->k.size[2]);
}

#endif
