/* Backward, from the log-sum-exp of forward (the formulas are at the head of cpu_scalar_bwd.c):
 *
 *   P = 2^(S - lse2),   dP = dO V^T,   dS = P (dP - delta),   dV = P^T dO,   dK = dS^T Q,   dQ = dS K
 *
 * No two blocks add to the same element, so that the bits do not depend on who comes first: one kernel has a tile of
 * keys and runs over the queries of all heads of the group (dK, dV), another has a tile of queries and runs over the
 * keys (dQ), a third has a tile of a float mask's gradient and runs over all scores that the mask took part in. All
 * three compute P and dS of a tile in the same way; which of queries and keys are its rows is the constant KEYS. A warp
 * has 16 rows, so that P and dS go from the results of one product to the left operand of the next in registers.
 *
 *   block's own        streamed           results
 *   K, V (rows)        Q, dO (columns)    dV += P dO, dK += dS Q
 *   Q, dO (rows)       K, V (columns)     dQ += dS K */
#ifndef FA_SM80_BWD_CUH
#define FA_SM80_BWD_CUH

#include "sm80.cuh"

/* DA: columns of dK and dV, or of dQ, that a block sums; more are taken by other blocks, which compute P and dS
 * anew. */
template <typename T_, int DP_, bool KEYS_, bool MOD_> struct fa_bwd_config {
    using T = T_;
    static constexpr fa_sm80_tile TILE = fa_bwd_tile(DP_, sizeof(T) == 4);
    static constexpr int DP = DP_, CN = TILE.cols, WARPS = TILE.warps, RM = 16 * WARPS, THREADS = 32 * WARPS;
    static constexpr int NT = CN / 8, DA = TILE.da, NA = DA / 8, LD = fa_tile_ld<T>(DP);
    static constexpr bool KEYS = KEYS_, MOD = MOD_;
    static constexpr size_t SHARED = fa_bwd_bytes(TILE, sizeof(T));
};

template <class C> struct fa_bwd_tiles {
    typename C::T *r1, *r2, *c1, *c2; /* Q or K and dO or V of the rows, then of the columns */
    float *lse2, *delta;              /* of the columns */
    uint32_t *wild;
};

template <class C> __device__ __forceinline__ fa_bwd_tiles<C> fa_bwd_tiles_at(char *smem)
{
    fa_bwd_tiles<C> s;
    s.r1 = (typename C::T *)smem;
    s.r2 = s.r1 + C::RM * C::LD;
    s.c1 = s.r2 + C::RM * C::LD;
    s.c2 = s.c1 + C::CN * C::LD;
    s.lse2 = (float *)(s.c2 + C::CN * C::LD);
    s.delta = s.lse2 + C::CN;
    s.wild = (uint32_t *)(s.delta + C::CN);
    return s;
}

/* log-sum-exp and delta of a lane's two rows, where rows are queries */
struct fa_bwd_rows {
    float lse2[2], delta[2];
};

/* P (0 where dropout drops) and dS of a tile. SLOPES: dS is the gradient of scale Q K^T, else that of the mask. */
template <class C, bool SLOPES>
__device__ __forceinline__ void fa_bwd_weights(float (&w)[C::NT][4], float (&ds)[C::NT][4], const fa_sm80_params &p,
                                               const fa_bwd_tiles<C> &sh, const fa_scores &scores,
                                               const fa_bwd_rows &rows, int row0, int col0, bool edges)
{
    using T = typename C::T;
    constexpr bool CAP = SLOPES && C::MOD;
    const int warp_row = threadIdx.x / 32 * 16, t = threadIdx.x % 4;
    float slope[C::NT][4];
    fa_product_nk<T, C::NT>(w, sh.r1, C::LD, warp_row, sh.c1, C::LD, fa_steps(p.a.q.size[3]));
    fa_score_tile<C::KEYS, C::MOD, CAP>(w, slope, scores, row0 + warp_row, col0, edges);
    fa_product_nk<T, C::NT>(ds, sh.r2, C::LD, warp_row, sh.c2, C::LD, fa_steps(p.a.v.size[3]));
    if (C::MOD && scores.dropout) {
        const float keep = p.a.dropout_p < 1 ? (float)(1 / (1 - p.a.dropout_p)) : 0;
        const bool all = p.a.dropout_p >= 1;
        float kept[C::NT][4];
#pragma unroll
        for (int n = 0; n < C::NT; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                kept[n][e] = all ? 0 : keep;
        fa_drop_tile<C::KEYS>(kept, scores, row0 + warp_row, col0);
#pragma unroll
        for (int n = 0; n < C::NT; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int c = n * 8 + 2 * t + e % 2;
                const float lse2 = C::KEYS ? sh.lse2[c] : rows.lse2[e / 2];
                const float delta = C::KEYS ? sh.delta[c] : rows.delta[e / 2];
                const bool hidden = w[n][e] == -INFINITY;
                const float weight = hidden ? 0 : ptx_exp2(w[n][e] - lse2);
                const float dp = kept[n][e] == 0 ? 0 : ds[n][e] * kept[n][e];
                ds[n][e] = hidden ? 0 : weight * (dp - delta);
                w[n][e] = kept[n][e] == 0 ? 0 : weight;
                if (CAP && scores.cap > 0)
                    ds[n][e] *= slope[n][e];
            }
        return;
    }
#pragma unroll
    for (int n = 0; n < C::NT; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int c = n * 8 + 2 * t + e % 2;
            const float lse2 = C::KEYS ? sh.lse2[c] : rows.lse2[e / 2];
            const float delta = C::KEYS ? sh.delta[c] : rows.delta[e / 2];
            const bool hidden = w[n][e] == -INFINITY;
            w[n][e] = hidden ? 0 : ptx_exp2(w[n][e] - lse2);
            ds[n][e] = hidden ? 0 : w[n][e] * (ds[n][e] - delta);
            if (CAP && scores.cap > 0 && !hidden)
                ds[n][e] *= slope[n][e];
        }
}

/* index of row i of head h in lse2 and delta */
__device__ __forceinline__ int64_t fa_bwd_row_at(const fa_sm80_params &p, const fa_seq *s, int64_t h)
{
    return (s->q_batch * p.a.q.size[1] + h) * p.rows + s->q_row;
}

template <int NA> __device__ __forceinline__ void fa_zero(float (&x)[NA][4])
{
#pragma unroll
    for (int n = 0; n < NA; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            x[n][e] = 0;
}

/* Rows of a warp's results, times `factor`, to rows first .. of t; row i lies at at(i), and exists below `limit`. */
template <typename T, int NA, class At>
__device__ __forceinline__ void fa_bwd_store(const fa_tensor *t, const float (&acc)[NA][4], float factor, int64_t first,
                                             int64_t limit, int c0, At at)
{
    const int g = threadIdx.x % 32 / 4, lane = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int64_t row = first + threadIdx.x / 32 * 16 + g + 8 * i;
        if (row >= limit)
            continue;
#pragma unroll
        for (int n = 0; n < NA; n++)
            fa_store_pair<T>(t, at(row), c0 + n * 8 + 2 * lane, acc[n][2 * i] * factor, acc[n][2 * i + 1] * factor);
    }
}

/* ---- dK and dV --------------------------------------------------------------------------------------------------- */

/* Q and dO of the tile, and what belongs to their rows; those that see nothing are not read. */
template <class C>
__device__ __forceinline__ void fa_bwd_load_queries(const fa_bwd_tiles<C> &sh, const fa_sm80_params &p,
                                                    const fa_seq *seq, int64_t h, int64_t i0)
{
    using T = typename C::T;
    const fa_args *a = &p.a;
    const int64_t rows = fa_bwd_row_at(p, seq, h), q_len = seq->span.q_len;
    fa_load_rows q = fa_rows_q(a, seq, &a->q, h, p.vectors & FA_VEC_Q);
    fa_load_rows dout = fa_rows_q(a, seq, &a->dout, h, p.vectors & FA_VEC_DOUT);
    q.skip = dout.skip = p.lse2 + rows;
    fa_load_tile<T, C::CN, C::THREADS>(sh.c1, C::LD, q, i0, q_len, 0, C::DP);
    fa_load_tile<T, C::CN, C::THREADS>(sh.c2, C::LD, dout, i0, q_len, 0, C::DP);
    ptx_cp_async_commit();
    if (threadIdx.x < C::CN) {
        const bool inside = i0 + threadIdx.x < q_len;
        sh.lse2[threadIdx.x] = inside ? p.lse2[rows + i0 + threadIdx.x] : INFINITY;
        sh.delta[threadIdx.x] = inside ? p.delta[rows + i0 + threadIdx.x] : 0;
    }
    ptx_cp_async_wait<0>();
    __syncthreads();
}

template <class C>
__global__ void __launch_bounds__(C::THREADS) fa_bwd_sm80_keys(const __grid_constant__ fa_sm80_params p)
{
    extern __shared__ __align__(16) char smem[];
    using T = typename C::T;
    const fa_bwd_tiles<C> sh = fa_bwd_tiles_at<C>(smem);
    const fa_args *a = &p.a;
    const int64_t group = a->q.size[1] / a->k.size[1], hk = blockIdx.x % a->k.size[1], slot = blockIdx.x / a->k.size[1];
    const int c0 = blockIdx.y * C::DA;
    const fa_tile tile = fa_tile_of(&a->cu_k, a->k.size[2], C::RM, slot);
    const fa_seq seq = fa_seq_at(a, tile.n);
    if (tile.first >= seq.k_rows)
        return;
    float dk[C::NA][4], dv[C::NA][4];
    fa_zero(dk);
    fa_zero(dv);
    const int64_t k_len = seq.span.k_len, j0 = tile.first;
    const fa_range queries = j0 < k_len ? fa_queries_of_keys(&seq.span, j0, fa_min64(j0 + C::RM, k_len) - 1)
                                        : fa_range{0, 0};
    fa_load_tile<T, C::RM, C::THREADS>(sh.r1, C::LD, fa_rows_k(a, &seq, &a->k, &a->k_scale, hk, p.vectors & FA_VEC_K),
                                       j0, k_len, 0, C::DP);
    fa_load_tile<T, C::RM, C::THREADS>(sh.r2, C::LD, fa_rows_k(a, &seq, &a->v, &a->v_scale, hk, p.vectors & FA_VEC_V),
                                       j0, k_len, 0, C::DP);
    for (int64_t h = hk * group; h < (hk + 1) * group; h++) {
        const fa_scores scores = fa_scores_of(a, &seq, h);
        for (int64_t i0 = queries.lo / C::CN * C::CN; i0 < queries.hi; i0 += C::CN) {
            fa_bwd_load_queries<C>(sh, p, &seq, h, i0);
            const bool edges = !fa_all_visible(&seq.span, i0, i0 + C::CN - 1, j0, j0 + C::RM - 1);
            float w[C::NT][4], ds[C::NT][4];
            fa_bwd_weights<C, true>(w, ds, p, sh, scores, fa_bwd_rows(), (int)j0, (int)i0, edges);
            fa_product_kn<T>(dv, w, sh.c2 + c0, C::LD);
            fa_product_kn<T>(dk, ds, sh.c1 + c0, C::LD);
            __syncthreads();
        }
    }
    const float keep = a->dropout_p < 1 ? (float)(1 / (1 - a->dropout_p)) : 0;
    const auto dv_at = [&](int64_t j) { return fa_k_at(a, &seq, &a->dv, hk, j); };
    const auto dk_at = [&](int64_t j) { return fa_k_at(a, &seq, &a->dk, hk, j); };
    if (a->dv.data)
        fa_bwd_store<T>(&a->dv, dv, keep, j0, seq.k_rows, c0, dv_at);
    if (a->dk.data)
        fa_bwd_store<T>(&a->dk, dk, (float)a->scale, j0, seq.k_rows, c0, dk_at);
}

/* ---- dQ ---------------------------------------------------------------------------------------------------------- */

/* Q and dO of the block, and of each lane's rows what belongs to them. */
template <class C>
__device__ __forceinline__ fa_bwd_rows fa_bwd_load_rows(const fa_bwd_tiles<C> &sh, const fa_sm80_params &p,
                                                        const fa_seq *seq, int64_t h, int64_t i0)
{
    using T = typename C::T;
    const fa_args *a = &p.a;
    const int64_t rows = fa_bwd_row_at(p, seq, h), q_len = seq->span.q_len;
    fa_load_tile<T, C::RM, C::THREADS>(sh.r1, C::LD, fa_rows_q(a, seq, &a->q, h, p.vectors & FA_VEC_Q), i0, q_len, 0,
                                       C::DP);
    fa_load_tile<T, C::RM, C::THREADS>(sh.r2, C::LD, fa_rows_q(a, seq, &a->dout, h, p.vectors & FA_VEC_DOUT), i0, q_len,
                                       0, C::DP);
    ptx_cp_async_commit();
    fa_bwd_rows r;
    for (int e = 0; e < 2; e++) {
        const int64_t i = i0 + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * e;
        r.lse2[e] = i < q_len ? p.lse2[rows + i] : INFINITY;
        r.delta[e] = i < q_len ? p.delta[rows + i] : 0;
    }
    return r;
}

/* K and V of the tile; rows of K that hold NaN or infinity become 0 where a query of the block may not see them: of
 * those that do, dS is NaN. */
template <class C>
__device__ __forceinline__ void fa_bwd_load_keys(const fa_bwd_tiles<C> &sh, const fa_sm80_params &p, const fa_seq *seq,
                                                 int64_t hk, int64_t j0)
{
    using T = typename C::T;
    const fa_args *a = &p.a;
    const int64_t k_len = seq->span.k_len;
    fa_load_tile<T, C::CN, C::THREADS>(sh.c1, C::LD, fa_rows_k(a, seq, &a->k, &a->k_scale, hk, p.vectors & FA_VEC_K),
                                       j0, k_len, 0, C::DP);
    fa_load_tile<T, C::CN, C::THREADS>(sh.c2, C::LD, fa_rows_k(a, seq, &a->v, &a->v_scale, hk, p.vectors & FA_VEC_V),
                                       j0, k_len, 0, C::DP);
    ptx_cp_async_commit();
    ptx_cp_async_wait<0>();
    __syncthreads();
}

template <class C>
__global__ void __launch_bounds__(C::THREADS) fa_bwd_sm80_queries(const __grid_constant__ fa_sm80_params p)
{
    extern __shared__ __align__(16) char smem[];
    using T = typename C::T;
    const fa_bwd_tiles<C> sh = fa_bwd_tiles_at<C>(smem);
    const fa_args *a = &p.a;
    const int64_t h = blockIdx.x % a->q.size[1], slot = p.slots - 1 - blockIdx.x / a->q.size[1];
    const int64_t hk = h / (a->q.size[1] / a->k.size[1]);
    const int c0 = blockIdx.y * C::DA;
    const fa_tile tile = fa_tile_of(&a->cu_q, a->q.size[2], C::RM, slot);
    const fa_seq seq = fa_seq_at(a, tile.n);
    if (tile.first >= seq.q_rows)
        return;
    float dq[C::NA][4];
    fa_zero(dq);
    const int64_t q_len = seq.span.q_len, i0 = tile.first;
    const fa_range keys = i0 < q_len ? fa_keys_of_queries(&seq.span, i0, fa_min64(i0 + C::RM, q_len) - 1)
                                     : fa_range{0, 0};
    const fa_bwd_rows rows = fa_bwd_load_rows<C>(sh, p, &seq, h, i0);
    const fa_scores scores = fa_scores_of(a, &seq, h);
    const bool scan = a->mask.data && a->mask.dtype == FA_BOOL;
    for (int64_t j0 = fa_max64(keys.lo, 0) / C::CN * C::CN; j0 < keys.hi; j0 += C::CN) {
        fa_bwd_load_keys<C>(sh, p, &seq, hk, j0);
        const bool edges = !fa_all_visible(&seq.span, i0, i0 + C::RM - 1, j0, j0 + C::CN - 1);
        float w[C::NT][4], ds[C::NT][4];
        fa_bwd_weights<C, true>(w, ds, p, sh, scores, rows, (int)i0, (int)j0, edges);
        if ((edges || scan) && fa_find_wild<T, C::CN, C::THREADS>(sh.c1, C::LD, C::DP, sh.wild)) {
            fa_clear_wild<T, C::CN, C::THREADS>(sh.c1, C::LD, C::DP, sh.wild);
            __syncthreads();
        }
        fa_product_kn<T>(dq, ds, sh.c1 + c0, C::LD);
        __syncthreads();
    }
    fa_bwd_store<T>(&a->dq, dq, (float)a->scale, i0, seq.q_rows, c0,
                    [&](int64_t i) { return fa_q_at(&seq, &a->dq, h, i); });
}

/* ---- the gradient of a mask -------------------------------------------------------------------------------------- */

/* Sums the results of all lanes that share a column of the mask's gradient, or a row of it, or all; what is summed lies
 * in sSum [RM][CN] and is added in the order of its index. */
template <class C>
__device__ static void fa_dmask_store(const fa_args *a, const float (&sum)[C::NT][4], float *sSum, int64_t mb,
                                      int64_t mh, int64_t i0, int64_t j0, bool all_i, bool all_j)
{
    const fa_tensor *m = &a->dmask;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    __syncthreads();
#pragma unroll
    for (int n = 0; n < C::NT; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            sSum[(threadIdx.x / 32 * 16 + g + e / 2 * 8) * C::CN + n * 8 + 2 * t + e % 2] = sum[n][e];
    __syncthreads();
    const int rows = all_i ? C::RM : 1, cols = all_j ? C::CN : 1;
    for (int x = threadIdx.x; x < C::RM / rows * (C::CN / cols); x += C::THREADS) {
        const int r = x / (C::CN / cols), c = x % (C::CN / cols);
        float total = 0;
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < cols; j++)
                total += sSum[(r * rows + i) * C::CN + c * cols + j];
        const int64_t mi = all_i ? 0 : i0 + r, mj = all_j ? 0 : j0 + c;
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

/* block = ((mb * H + mh) * row tiles + row tile) * column tiles + column tile, in the mask's own sizes; not packed */
template <class C>
__global__ void __launch_bounds__(C::THREADS) fa_dmask_sm80(const __grid_constant__ fa_sm80_params p)
{
    extern __shared__ __align__(16) char smem[];
    const fa_bwd_tiles<C> sh = fa_bwd_tiles_at<C>(smem);
    const fa_args *a = &p.a;
    const int64_t *size = a->mask.size, SQ = a->q.size[2], SK = a->k.size[2], group = a->q.size[1] / a->k.size[1];
    const int64_t col_tiles = fa_ceil_div(size[3], C::CN), row_tiles = fa_ceil_div(size[2], C::RM);
    int64_t id = blockIdx.x;
    const int64_t mj = id % col_tiles * C::CN, mi = id / col_tiles % row_tiles * C::RM;
    id /= col_tiles * row_tiles;
    const int64_t mh = id % size[1], mb = id / size[1];
    const fa_range bs = fa_extent(size[0], a->q.size[0], mb, 1), hs = fa_extent(size[1], a->q.size[1], mh, 1);
    const fa_range is = fa_extent(size[2], SQ, mi, C::RM), js = fa_extent(size[3], SK, mj, C::CN);
    float sum[C::NT][4];
    fa_zero(sum);
    for (int64_t b = bs.lo; b < bs.hi; b++) {
        const fa_seq seq = fa_seq_at(a, b);
        for (int64_t h = hs.lo; h < hs.hi; h++) {
            const fa_scores scores = fa_scores_of(a, &seq, h);
            for (int64_t i0 = is.lo; i0 < fa_min64(is.hi, seq.span.q_len); i0 += C::RM) {
                const fa_range keys =
                    fa_keys_of_queries(&seq.span, i0, fa_min64(i0 + C::RM, seq.span.q_len) - 1);
                __syncthreads();
                const fa_bwd_rows rows = fa_bwd_load_rows<C>(sh, p, &seq, h, i0);
                for (int64_t j0 = js.lo; j0 < js.hi; j0 += C::CN) {
                    if (j0 + C::CN <= keys.lo || j0 >= keys.hi)
                        continue;
                    __syncthreads();
                    fa_bwd_load_keys<C>(sh, p, &seq, h / group, j0);
                    float w[C::NT][4], ds[C::NT][4];
                    fa_bwd_weights<C, false>(w, ds, p, sh, scores, rows, (int)i0, (int)j0, true);
#pragma unroll
                    for (int n = 0; n < C::NT; n++)
#pragma unroll
                        for (int e = 0; e < 4; e++)
                            sum[n][e] += ds[n][e];
                }
            }
        }
    }
    ptx_cp_async_wait<0>();
    fa_dmask_store<C>(a, sum, (float *)smem, mb, mh, mi, mj, size[2] != SQ, size[3] != SK);
}

#endif
