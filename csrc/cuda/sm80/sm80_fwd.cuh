/* Forward: a block has BM query rows of one head and streams tiles of BN keys through the online softmax (Dao,
 * "FlashAttention-2", 2023). A warp owns 16 or 32 of the rows, so that maximum, sum and output of a row stay in one
 * quad of lanes; with 32 each operand that it reads from shared memory serves two products.
 *
 *   time ->          tile n                              tile n + 1
 *   copy of V, mask  [ V n ......... ]                   [ V n+1 .......
 *   copy of K                        [ K n+1 ......... ]                 [ K n+2
 *   tensor cores     [ S n ]                   [ O += P V n ][ S n+1 ]
 *   other lanes                      [ softmax ]                         [ softmax ]
 *   blocks meet      |               |                   |               |
 *
 * K of the next tile replaces K as soon as S is known, V as soon as O has it: one buffer each, and another block of the
 * same multiprocessor computes where this one waits. */
#ifndef FA_SM80_FWD_CUH
#define FA_SM80_FWD_CUH

#include "sm80_softmax.cuh"

/* DP: head dimensions up to it; above 256 the columns of V are taken in two passes. */
/* P_: what products take, fa_tf32 or the dtype */
template <typename P_, int DP_, bool MOD_> struct fa_fwd_config {
    using P = P_;
    using T = typename fa_stored<P>::type;
    static constexpr fa_sm80_tile TILE = fa_fwd_tile(DP_, sizeof(T) == 4, MOD_);
    static constexpr int DP = DP_, BN = TILE.cols, WARPS = TILE.warps, MT = TILE.mt, THREADS = 32 * WARPS;
    static constexpr int BM = fa_tile_rows(TILE), NT = BN / 8, DA = TILE.da, NA = DA / 8;
    static constexpr int LDB = fa_row_bytes<T>(DP), LDVB = fa_row_bytes<T>(DA);
    static constexpr bool MOD = MOD_;
    static constexpr size_t SHARED = fa_fwd_bytes(TILE, sizeof(T));
    static constexpr int BLOCKS = DP == 64 && sizeof(T) == 2 && !MOD ? 3 : 1; /* at least, on a multiprocessor */
};

/* Shared memory. */
template <class C> struct fa_fwd_tiles {
    typename C::T *q, *k, *v;
    char *mask;

    __device__ __forceinline__ fa_fwd_tiles(char *smem)
        : q((typename C::T *)smem), k((typename C::T *)(smem + C::BM * C::LDB)),
          v((typename C::T *)(smem + (C::BM + C::BN) * C::LDB)), mask(smem + C::SHARED)
    {
    }
};

/* What the block has to do. */
struct fa_fwd_work {
    fa_seq seq;
    int64_t h, hk, split;
    int first, c0;  /* first query of the tile; first column of V */
    int k_lo, k_hi; /* keys */
    int full_lo, full_hi; /* of these every query of the tile sees each */
    bool exists;
};

/* Not inlined, so that nothing of it stays in registers until the results are stored. */
template <class C> __device__ __noinline__ static fa_fwd_work fa_fwd_work_of(const fa_sm80_params &p)
{
    const fa_args *a = &p.a;
    fa_fwd_work w;
    const unsigned heads = (unsigned)a->q.size[1], slots = (unsigned)p.slots, id = blockIdx.x / heads;
    w.h = blockIdx.x % heads;
    w.hk = (unsigned)w.h / (heads / (unsigned)a->k.size[1]);
    const int64_t slot = slots - 1 - id % slots; /* the longest of a causal call come first */
    w.split = id / slots;
    w.c0 = blockIdx.y * C::DA;
    const fa_tile tile = fa_tile_of(&a->cu_q, a->q.size[2], C::BM, slot);
    const fa_seq seq = fa_seq_at(a, tile.n);
    const fa_span *span = &seq.span;
    w.seq = seq;
    w.first = (int)tile.first;
    w.exists = tile.first < seq.q_rows;
    const int64_t q_len = span->q_len, last = fa_min64(tile.first + C::BM, q_len) - 1;
    const fa_range keys = tile.first < q_len ? fa_keys_of_queries(span, tile.first, last) : fa_range{0, 0};
    int64_t part = p.split_keys;
    if (a->splits_wanted > 0) /* of the sequence's own keys, not of the room behind them */
        part = fa_round_up(fa_max64(1, fa_ceil_div(span->k_len, a->splits_wanted)), C::BN);
    const int64_t lo = fa_max64(keys.lo, w.split * part), hi = fa_min64(keys.hi, (w.split + 1) * part);
    w.k_lo = (int)(fa_max64(lo, 0) / C::BN * C::BN);
    w.k_hi = (int)fa_max64(hi, 0);
    if (lo >= hi)
        w.k_lo = w.k_hi = 0;
    const bool whole = tile.first + C::BM <= q_len;
    const int64_t full_hi = span->right < 0 ? span->k_len : tile.first + span->offset + span->right + 1;
    w.full_lo = span->left < 0 ? 0 : (int)fa_clamp(last + span->offset - span->left, 0, span->k_len);
    w.full_hi = whole ? (int)fa_clamp(full_hi, 0, span->k_len) : 0;
    return w;
}

template <class C>
__device__ __forceinline__ void fa_fwd_load_queries(const fa_fwd_tiles<C> &sh, const fa_sm80_params &p,
                                                    const fa_fwd_work &w)
{
    using T = typename C::T;
    const fa_seq seq = w.seq;
    const fa_load_rows rows = fa_rows_q(&p.a, &seq, &p.a.q, w.h, p.vectors & FA_VEC_Q);
    fa_load_tile<T, C::BM, C::THREADS>(sh.q, C::LDB / (int)sizeof(T), rows, w.first, seq.span.q_len, 0, C::DP);
}

/* What is done to the scores of a lane's rows. */
template <class C>
__device__ __forceinline__ fa_sm80_scores fa_fwd_scores_of(const fa_args *a, const fa_fwd_work &w)
{
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * C::MT + lane / 4;
    return fa_sm80_scores_of<C::MOD>(a, &w.seq, w.h, w.first + row, lane % 4 * (C::BN / 4));
}

/* All keys of the block: the time table above. */
template <class C>
__device__ __forceinline__ void fa_fwd_keys(fa_fwd_rows<C::MT, C::NA> &r, const fa_sm80_params &p, const fa_fwd_work &w,
                                            const fa_fwd_tiles<C> &sh)
{
    using T = typename C::T;
    const fa_args *a = &p.a;
    const uint32_t q = fa_lane_left<C::LDB>(ptx_shared(sh.q), threadIdx.x / 32 * 16 * C::MT);
    const uint32_t k = fa_lane_nk<C::LDB>(ptx_shared(sh.k)), v = fa_lane_kn<T, C::LDVB>(ptx_shared(sh.v));
    const bool narrow = a->q.size[3] <= fa_fewer<T>(C::DP), narrow_v = a->v.size[3] - w.c0 <= fa_fewer<T>(C::DA);
    const int k_len = (int)w.seq.span.k_len;
    const fa_sm80_scores f = fa_fwd_scores_of<C>(a, w);
    const fa_row_tiles<T, C::BN, C::THREADS, C::DP> keys(a, &a->k, fa_first_key_at(a, &w.seq, &a->k, w.hk), w.seq.n, 0);
    const fa_row_tiles<T, C::BN, C::THREADS, C::DA> values(a, &a->v, fa_first_key_at(a, &w.seq, &a->v, w.hk), w.seq.n,
                                                           w.c0);

    keys.template load<true>(ptx_shared(sh.k), w.k_lo, k_len);
    ptx_cp_async_commit();
    ptx_cp_async_wait<0>();
    __syncthreads();
#pragma unroll 1
    for (int k0 = w.k_lo; k0 < w.k_hi; k0 += C::BN) {
        values.template load<true>(ptx_shared(sh.v), k0, k_len);
        if (C::MOD && f.p.mask)
            fa_fetch_mask<C::MT, C::NT, C::THREADS>(sh.mask, f, p.mask_width, k0);
        ptx_cp_async_commit();
        float s[C::MT][C::NT][4] = {};
        fa_nk<typename C::P, C::DP, C::MT, C::NT>::run(s, q, k, narrow);
        ptx_cp_async_wait<0>();
        __syncthreads();
        if (k0 + C::BN < w.k_hi)
            keys.template load<true>(ptx_shared(sh.k), k0 + C::BN, k_len);
        ptx_cp_async_commit();
        fa_sm80_score<T, C::MOD, false, C::THREADS>(s, s, f, sh.mask, k0, k0 < w.full_lo || k0 + C::BN > w.full_hi);
        fa_fwd_softmax(s, r, f.c);
        if (C::MOD && f.p.dropout)
            fa_drop_weights(s, f, k0);
        fa_product_kn<typename C::P, C::LDVB>(r.acc, s, v, narrow_v);
        ptx_cp_async_wait<0>();
        __syncthreads();
    }
    fa_fwd_end(r, f.c);
}

/* A row of this block's part of the results, where the keys are split. */
template <class C>
__device__ __forceinline__ void fa_fwd_store_part(const fa_fwd_rows<C::MT, C::NA> &r, int x, int64_t row, float sum,
                                                  const fa_sm80_params &p, const fa_fwd_work &w)
{
    const fa_args *a = &p.a;
    const int dv = (int)a->v.size[3];
    const int64_t rows = a->q.size[0] * a->q.size[1] * a->q.size[2];
    const int64_t at = (w.seq.q_batch * a->q.size[1] + w.h) * a->q.size[2] + w.seq.q_row + row;
    float *part = p.partial + (w.split * rows + at) * fa_partial_floats(dv);
    part[0] = r.max[x / 2][x % 2];
    part[1] = sum;
#pragma unroll
    for (int n = 0; n < C::NA; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int c = w.c0 + fa_column<typename C::T>(n, e);
            if (c < dv)
                part[2 + c] = r.acc[x / 2][n][x % 2 * 2 + e];
        }
}

template <class C>
__device__ __forceinline__ void fa_fwd_store(fa_fwd_rows<C::MT, C::NA> &r, const fa_sm80_params &p,
                                             const fa_fwd_work &w, char *sQ)
{
    const fa_args *a = &p.a;
    const int row0 = threadIdx.x / 32 * 16 * C::MT;
    float factor[2 * C::MT];
#pragma unroll
    for (int x = 0; x < 2 * C::MT; x++) {
        float sum = r.sum[x / 2][x % 2];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const int64_t row = w.first + row0 + threadIdx.x % 32 / 4 + 8 * x;
        const bool exists = row < w.seq.q_rows;
        if (p.splits > 1) {
            if (exists)
                fa_fwd_store_part<C>(r, x, row, sum, p, w);
            continue;
        }
        fa_row_end end = {0, -INFINITY};
        if (row < w.seq.span.q_len)
            end = fa_finish_row(a, w.seq.n, w.h, r.max[x / 2][x % 2], sum, p.keep);
        if (exists && w.c0 == 0 && threadIdx.x % 4 == 0)
            ((float *)a->lse.data)[fa_q_at(&w.seq, &a->lse, w.h, row)] = (float)end.lse;
        factor[x] = end.scale;
        if (end.scale == 0)
#pragma unroll
            for (int n = 0; n < C::NA; n++)
                r.acc[x / 2][n][x % 2 * 2] = r.acc[x / 2][n][x % 2 * 2 + 1] = 0; /* also NaN */
    }
    if (p.splits == 1)
        fa_store_rows<typename C::T, C::LDB>(sQ + row0 * C::LDB, &a->out, r.acc, factor, w.first + row0, w.seq.q_rows,
                                             w.c0, p.vectors & FA_VEC_OUT,
                                             [&](int64_t i) { return fa_q_at(&w.seq, &a->out, w.h, i); });
}

/* ---- the slow way ------------------------------------------------------------------------------------------------ */

/* 16 rows of a warp: their sums, and their scores or weights */
template <class C> using fa_fwd_slice = fa_fwd_rows<1, C::NA>;
template <class C> using fa_fwd_scores = float[1][C::NT][4];

/* Rows first .. of q, k or v, from column c0 on, to a tile of shared memory. */
template <class C, int ROWS, int WIDTH>
__device__ __forceinline__ void fa_fwd_load_slowly(typename C::T *sTile, fa_load_rows rows, int first, int64_t limit,
                                                   int c0)
{
    using T = typename C::T;
    fa_load_slowly(sTile, fa_row_bytes<T>(WIDTH) / (int)sizeof(T), ROWS, C::THREADS, rows, first, limit, c0, WIDTH,
                rows.keys);
}

/* Products to scores, and what dropout does to weights: four columns of a lane at a time. */
template <class C>
__device__ __forceinline__ void fa_fwd_score_slowly(fa_fwd_scores<C> &s, fa_sm80_scores f, char *sMask, int k0,
                                                    bool edges)
{
#pragma unroll 1
    for (int n = 0; n < C::NT / 2; n++, f.column += 4) {
        if (C::MOD && f.p.mask)
            fa_fetch_mask<1, 2, C::THREADS>(sMask, f, 0, k0);
        float(&four)[1][2][4] = fa_four_columns(s, n);
        fa_sm80_score<typename C::T, C::MOD, false, C::THREADS>(four, four, f, sMask, k0, edges);
    }
}

template <class C>
__device__ __forceinline__ void fa_fwd_drop_slowly(fa_fwd_scores<C> &w, fa_sm80_scores f, int k0)
{
#pragma unroll 1
    for (int n = 0; n < C::NT / 2; n++, f.column += 4)
        fa_drop_weights(fa_four_columns(w, n), f, k0);
}

/* The weights of a slice, of which f knows the first row and q is the left operand. */
template <class C>
__device__ __forceinline__ void fa_fwd_weights_slowly(fa_fwd_scores<C> &w, fa_fwd_slice<C> &r, const fa_sm80_scores &f,
                                                      uint32_t q, uint32_t k, char *sMask, int k0, bool edges)
{
    float s[1][C::NT][4] = {};
    fa_nk<typename C::P, C::DP, 1, C::NT>::run(s, q, k, false);
    fa_copy(w, s);
    fa_fwd_score_slowly<C>(w, f, sMask, k0, edges);
    fa_copy(s, w);
    fa_fwd_softmax(s, r, f.c);
    fa_copy(w, s);
    if (C::MOD && f.p.dropout)
        fa_fwd_drop_slowly<C>(w, f, k0);
}

/* O += P V of a slice */
template <class C>
__device__ __forceinline__ void fa_fwd_add_slowly(fa_fwd_slice<C> &r, fa_fwd_scores<C> &w, uint32_t v)
{
    float acc[1][C::NA][4];
    fa_copy(acc, r.acc);
#pragma unroll 1
    for (int n = 0; n < C::NT / 2; n++)
        fa_product_kn<typename C::P, C::LDVB>(acc, fa_four_columns(w, n), v + n * 16 * C::LDVB, false);
    fa_copy(r.acc, acc);
}

/* Rows of V that hold NaN or infinity go one by one to the queries that give them a weight. */
template <class C>
__device__ static void fa_fwd_add_wild(fa_fwd_slice<C> &r, const fa_fwd_scores<C> &weights, const typename C::T *sV,
                                       const uint32_t *sWild)
{
    using T = typename C::T;
#pragma unroll 1
    for (int j = 0; j < C::BN; j++) {
        if (!(sWild[j / 32] >> (j % 32) & 1))
            continue;
#pragma unroll 1
        for (int x = 0; x < 2; x++) {
            float weight = weights[0][j / 8][x * 2 + j % 2];
            weight = __shfl_sync(0xffffffffu, weight, threadIdx.x % 32 / 4 * 4 + j % 8 / 2);
            if (weight == 0)
                continue;
#pragma unroll 1
            for (int n = 0; n < 2 * C::NA; n++)
                r.acc[0][n / 2][x * 2 + n % 2] +=
                    weight * fa_to_f32(sV[j * (C::LDVB / (int)sizeof(T)) + fa_column<T>(n / 2, n % 2)]);
        }
    }
}

/* All keys of the block with any strides and dtypes, and where hidden keys may hold NaN. Not inlined, so that it takes
 * no registers from the fast way, and short, so that it compiles fast: a tile is worked on when all of it is there, a
 * slice of the warp's rows at a time; sums and weights of all slices lie in the lane's local memory. */
template <class C>
__device__ __noinline__ static void fa_fwd_keys_slowly(fa_fwd_slice<C> (&r)[C::MT], const fa_sm80_params &p, char *smem)
{
    using T = typename C::T;
    const fa_args *a = &p.a;
    const fa_fwd_work w = fa_fwd_work_of<C>(p);
    const fa_fwd_tiles<C> sh(smem);
    const uint32_t q = fa_lane_left<C::LDB>(ptx_shared(sh.q), threadIdx.x / 32 * 16 * C::MT);
    const uint32_t k = fa_lane_nk<C::LDB>(ptx_shared(sh.k)), v = fa_lane_kn<T, C::LDVB>(ptx_shared(sh.v));
    const fa_sm80_scores f = fa_fwd_scores_of<C>(a, w);
    const fa_load_rows queries = fa_rows_q(a, &w.seq, &a->q, w.h, p.vectors & FA_VEC_Q);
    const fa_load_rows keys = fa_rows_k(a, &w.seq, &a->k, &a->k_scale, w.hk, p.vectors & FA_VEC_K);
    const fa_load_rows values = fa_rows_k(a, &w.seq, &a->v, &a->v_scale, w.hk, p.vectors & FA_VEC_V);
    constexpr int LDV = C::LDVB / (int)sizeof(T);
    uint32_t *sWild = (uint32_t *)(sh.v + C::DA); /* the end of the first row is nobody's */
    fa_fwd_scores<C> scores[C::MT];

#pragma unroll 1
    for (int m = 0; m < C::MT; m++)
        fa_fwd_start(r[m]);
    if (w.k_lo >= w.k_hi)
        return;
    fa_fwd_load_slowly<C, C::BM, C::DP>(sh.q, queries, w.first, w.seq.span.q_len, 0);
#pragma unroll 1
    for (int k0 = w.k_lo; k0 < w.k_hi; k0 += C::BN) {
        fa_fwd_load_slowly<C, C::BN, C::DP>(sh.k, keys, k0, w.seq.span.k_len, 0);
        fa_fwd_load_slowly<C, C::BN, C::DA>(sh.v, values, k0, w.seq.span.k_len, w.c0);
        ptx_cp_async_commit();
        ptx_cp_async_wait<0>();
        __syncthreads();
        const bool wild = fa_find_wild<T, C::BN, C::THREADS>(sh.v, LDV, C::DA, sWild);
        fa_sm80_scores fm = f;
#pragma unroll 1
        for (int m = 0; m < C::MT; m++, fm.row += 16) {
            fa_fwd_weights_slowly<C>(scores[m], r[m], fm, q + m * 16 * C::LDB, k, sh.mask, k0,
                                     k0 < w.full_lo || k0 + C::BN > w.full_hi);
            if (wild)
                fa_fwd_add_wild<C>(r[m], scores[m], sh.v, sWild);
        }
        if (wild) {
            __syncthreads();
            fa_clear_wild<T, C::BN, C::THREADS>(sh.v, LDV, C::DA, sWild);
            __syncthreads();
        }
#pragma unroll 1
        for (int m = 0; m < C::MT; m++)
            fa_fwd_add_slowly<C>(r[m], scores[m], v);
        __syncthreads();
    }
#pragma unroll 1
    for (int m = 0; m < C::MT; m++)
        fa_fwd_end(r[m], f.c);
}

template <class C>
__device__ __forceinline__ void fa_fwd_slowly(fa_fwd_rows<C::MT, C::NA> &r, const fa_sm80_params &p, char *smem)
{
    fa_fwd_slice<C> slices[C::MT];
    fa_fwd_keys_slowly<C>(slices, p, smem);
#pragma unroll
    for (int m = 0; m < C::MT; m++) {
        fa_copy(r.acc[m], slices[m].acc[0]);
#pragma unroll
        for (int x = 0; x < 2; x++) {
            r.max[m][x] = slices[m].max[0][x];
            r.sum[m][x] = slices[m].sum[0][x];
        }
    }
}

/* Hidden keys have weight 0, and 0 times NaN or infinity is NaN. So where a sum has become NaN all is done again, with
 * care for such values. Both ways end in the same code. */
template <class C>
__global__ void __launch_bounds__(C::THREADS, C::BLOCKS) fa_fwd_sm80_kernel(const __grid_constant__ fa_sm80_params p)
{
    extern __shared__ __align__(16) char smem[];
    const fa_fwd_tiles<C> sh(smem);
    const int vectors = FA_VEC_K | FA_VEC_V;
    bool good = (p.vectors & vectors) == vectors;
    fa_fwd_rows<C::MT, C::NA> r;
    fa_fwd_start(r);
    if (good) {
        const fa_fwd_work w = fa_fwd_work_of<C>(p);
        if (!w.exists)
            return;
        if (w.k_lo < w.k_hi) {
            fa_fwd_load_queries<C>(sh, p, w);
            fa_fwd_keys<C>(r, p, w, sh);
        }
        good = !__syncthreads_or(fa_spoilt(r.acc));
    }
    if (!good)
        fa_fwd_slowly<C>(r, p, smem);
    fa_fwd_store<C>(r, p, fa_fwd_work_of<C>(p), smem);
}

#endif
