/* Forward: a block has BM query rows of one head and streams tiles of BN keys through the online softmax (Dao,
 * "FlashAttention-2", 2023). A warp owns 16 of the rows, so that maximum, sum and output of a row stay in one quad of
 * lanes.
 *
 *   time ->          tile n                              tile n + 1
 *   copy of K        . . [ K n+1 ......... ]             . . [ K n+2
 *   copy of V        [ V n ........ ]                    [ V n+1 ......
 *   tensor cores     [ S n ]           [ O += P V n ]    [ S n+1 ]
 *   other lanes             [ softmax ]                           [ softmax ]
 *
 * K of the next tile replaces K as soon as S is known, V as soon as O has it: one buffer each. */
#ifndef FA_SM80_FWD_CUH
#define FA_SM80_FWD_CUH

#include "sm80.cuh"

/* DP: head dimensions up to it; above 256 the columns of V are taken in two passes. */
template <typename T_, int DP_, bool MOD_> struct fa_fwd_config {
    using T = T_;
    static constexpr fa_sm80_tile TILE = fa_fwd_tile(DP_, sizeof(T) == 4);
    static constexpr int DP = DP_, BN = TILE.cols, WARPS = TILE.warps, BM = 16 * WARPS, THREADS = 32 * WARPS;
    static constexpr int NT = BN / 8, DA = TILE.da, NA = DA / 8, LD = fa_tile_ld<T>(DP), LDV = fa_tile_ld<T>(DA);
    static constexpr bool MOD = MOD_;
    static constexpr size_t SHARED = fa_fwd_bytes(TILE, sizeof(T));
};

/* The running softmax of a lane's two rows: row g and g + 8 of the warp. */
template <int NA> struct fa_fwd_rows {
    float acc[NA][4], max[2], sum[2]; /* sum: of this lane's columns only */
};

/* What the block has to do. */
struct fa_fwd_work {
    fa_seq seq;
    fa_scores scores;
    int64_t h, hk, split;
    int first, c0;  /* first query of the tile; first column of V */
    int k_lo, k_hi; /* keys */
};

template <class C> __device__ static bool fa_fwd_work_of(fa_fwd_work *w, const fa_sm80_params &p)
{
    const fa_args *a = &p.a;
    int64_t id = blockIdx.x;
    w->h = id % a->q.size[1], id /= a->q.size[1];
    w->hk = w->h / (a->q.size[1] / a->k.size[1]);
    int64_t slot = p.slots - 1 - id % p.slots; /* the longest of a causal call come first */
    w->split = id / p.slots;
    w->c0 = blockIdx.y * C::DA;
    fa_tile tile = fa_tile_of(&a->cu_q, a->q.size[2], C::BM, slot);
    w->seq = fa_seq_at(a, tile.n);
    w->first = (int)tile.first;
    if (tile.first >= w->seq.q_rows)
        return false;
    w->scores = fa_scores_of(a, &w->seq, w->h);
    const int64_t q_len = w->seq.span.q_len;
    fa_range keys = {0, 0};
    if (tile.first < q_len)
        keys = fa_keys_of_queries(&w->seq.span, tile.first, fa_min64(tile.first + C::BM, q_len) - 1);
    int64_t part = p.split_keys;
    if (a->splits_wanted > 0) /* of the sequence's own keys, not of the room behind them */
        part = fa_round_up(fa_max64(1, fa_ceil_div(w->seq.span.k_len, a->splits_wanted)), C::BN);
    int64_t lo = fa_max64(keys.lo, w->split * part), hi = fa_min64(keys.hi, (w->split + 1) * part);
    w->k_lo = (int)(fa_max64(lo, 0) / C::BN * C::BN);
    w->k_hi = (int)fa_max64(hi, 0);
    if (lo >= hi)
        w->k_lo = w->k_hi = 0;
    return true;
}

/* Brings the rows to the maximum that the tile makes; s <- weights */
template <int NT, int NA> __device__ __forceinline__ void fa_fwd_softmax(float (&s)[NT][4], fa_fwd_rows<NA> &r)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float top = r.max[i];
#pragma unroll
        for (int n = 0; n < NT; n++)
            top = fmaxf(top, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        const float base = top == -INFINITY ? 0 : top; /* nothing seen yet: every weight is 2^-inf = 0 */
        const float shrink = ptx_exp2(r.max[i] - base);
        float sum = 0;
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 2 * i; e < 2 * i + 2; e++) {
                s[n][e] = ptx_exp2(s[n][e] - base);
                sum += s[n][e];
            }
        r.sum[i] = r.sum[i] * shrink + sum;
        r.max[i] = top;
#pragma unroll
        for (int n = 0; n < NA; n++) {
            r.acc[n][2 * i] *= shrink;
            r.acc[n][2 * i + 1] *= shrink;
        }
    }
}

/* Rows of V that hold NaN or infinity go one by one to the queries that give them a weight, and then become 0. */
template <class C>
__device__ static void fa_fwd_wild(float (&w)[C::NT][4], fa_fwd_rows<C::NA> &r, typename C::T *sV, uint32_t *sWild)
{
    if (!fa_find_wild<typename C::T, C::BN, C::THREADS>(sV, C::LDV, C::DA, sWild))
        return;
    const int lane = threadIdx.x % 32, t = lane % 4;
    for (int j = 0; j < C::BN; j++) {
        if (!(sWild[j / 32] >> (j % 32) & 1))
            continue;
        float weight[2] = {0, 0};
#pragma unroll
        for (int n = 0; n < C::NT; n++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (n == j / 8)
                    weight[i] = j % 2 ? w[n][2 * i + 1] : w[n][2 * i];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            weight[i] = __shfl_sync(0xffffffffu, weight[i], lane / 4 * 4 + j % 8 / 2);
            if (weight[i] == 0)
                continue;
#pragma unroll
            for (int n = 0; n < C::NA; n++) {
                r.acc[n][2 * i] += weight[i] * fa_to_f32(sV[j * C::LDV + n * 8 + 2 * t]);
                r.acc[n][2 * i + 1] += weight[i] * fa_to_f32(sV[j * C::LDV + n * 8 + 2 * t + 1]);
            }
        }
    }
    __syncthreads();
    fa_clear_wild<typename C::T, C::BN, C::THREADS>(sV, C::LDV, C::DA, sWild);
    __syncthreads();
}

/* All keys of the block: the time table above. */
template <class C>
__device__ __forceinline__ void fa_fwd_keys(fa_fwd_rows<C::NA> &r, const fa_sm80_params &p, const fa_fwd_work &w,
                                            typename C::T *sQ, typename C::T *sK, typename C::T *sV, uint32_t *sWild)
{
    using T = typename C::T;
    const fa_args *a = &p.a;
    const int row0 = threadIdx.x / 32 * 16, width = fa_steps(a->q.size[3]);
    const fa_load_rows q = fa_rows_q(a, &w.seq, &a->q, w.h, p.vectors & FA_VEC_Q);
    const fa_load_rows k = fa_rows_k(a, &w.seq, &a->k, &a->k_scale, w.hk, p.vectors & FA_VEC_K);
    const fa_load_rows v = fa_rows_k(a, &w.seq, &a->v, &a->v_scale, w.hk, p.vectors & FA_VEC_V);
    const bool scan = a->tree_mask.data || (a->mask.data && a->mask.dtype == FA_BOOL);

    fa_load_tile<T, C::BM, C::THREADS>(sQ, C::LD, q, w.first, w.seq.span.q_len, 0, width);
    fa_load_tile<T, C::BN, C::THREADS>(sK, C::LD, k, w.k_lo, w.seq.span.k_len, 0, width);
    ptx_cp_async_commit();
    for (int k0 = w.k_lo; k0 < w.k_hi; k0 += C::BN) {
        const bool edges =
            !fa_all_visible(&w.seq.span, w.first, w.first + C::BM - 1, k0, k0 + C::BN - 1);
        fa_load_tile<T, C::BN, C::THREADS>(sV, C::LDV, v, k0, w.seq.span.k_len, w.c0, C::DA);
        ptx_cp_async_commit();
        ptx_cp_async_wait<1>();
        __syncthreads();
        float s[C::NT][4];
        fa_product_nk<T, C::NT>(s, sQ, C::LD, row0, sK, C::LD, width);
        __syncthreads();
        if (k0 + C::BN < w.k_hi)
            fa_load_tile<T, C::BN, C::THREADS>(sK, C::LD, k, k0 + C::BN, w.seq.span.k_len, 0, width);
        ptx_cp_async_commit();
        fa_score_tile<false, C::MOD, false>(s, s, w.scores, w.first + row0, k0, edges);
        fa_fwd_softmax(s, r);
        if (C::MOD && w.scores.dropout)
            fa_drop_tile<false>(s, w.scores, w.first + row0, k0);
        ptx_cp_async_wait<1>();
        __syncthreads();
        if (edges || scan)
            fa_fwd_wild<C>(s, r, sV, sWild);
        fa_product_kn<T>(r.acc, s, sV, C::LDV);
        __syncthreads();
    }
}

/* To out and lse, or to this block's part of them. */
template <class C>
__device__ __forceinline__ void fa_fwd_store(fa_fwd_rows<C::NA> &r, const fa_sm80_params &p, const fa_fwd_work &w)
{
    const fa_args *a = &p.a;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, dv = (int)a->v.size[3];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        r.sum[i] += __shfl_xor_sync(0xffffffffu, r.sum[i], 1);
        r.sum[i] += __shfl_xor_sync(0xffffffffu, r.sum[i], 2);
        const int64_t row = w.first + threadIdx.x / 32 * 16 + g + 8 * i;
        if (row >= w.seq.q_rows)
            continue;
        if (p.splits > 1) {
            const int64_t rows = a->q.size[0] * a->q.size[1] * a->q.size[2];
            const int64_t at = (w.seq.q_batch * a->q.size[1] + w.h) * a->q.size[2] + w.seq.q_row + row;
            float *part = p.partial + (w.split * rows + at) * fa_partial_floats(dv);
            part[0] = r.max[i];
            part[1] = r.sum[i];
#pragma unroll
            for (int n = 0; n < C::NA; n++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (w.c0 + n * 8 + 2 * t + e < dv)
                        part[2 + w.c0 + n * 8 + 2 * t + e] = r.acc[n][2 * i + e];
            continue;
        }
        fa_row_end end = {0, -INFINITY};
        if (row < w.seq.span.q_len)
            end = fa_finish_row(a, w.seq.n, w.h, r.max[i], r.sum[i]);
        if (w.c0 == 0 && t == 0)
            ((float *)a->lse.data)[fa_q_at(&w.seq, &a->lse, w.h, row)] = (float)end.lse;
        const bool none = end.scale == 0;
        const int64_t at = fa_q_at(&w.seq, &a->out, w.h, row);
#pragma unroll
        for (int n = 0; n < C::NA; n++)
            fa_store_pair<typename C::T>(&a->out, at, w.c0 + n * 8 + 2 * t, none ? 0 : r.acc[n][2 * i] * end.scale,
                                         none ? 0 : r.acc[n][2 * i + 1] * end.scale);
    }
}

template <class C>
__global__ void __launch_bounds__(C::THREADS) fa_fwd_sm80_kernel(const __grid_constant__ fa_sm80_params p)
{
    extern __shared__ __align__(16) char smem[];
    typename C::T *sQ = (typename C::T *)smem, *sK = sQ + C::BM * C::LD, *sV = sK + C::BN * C::LD;
    fa_fwd_work w;
    if (!fa_fwd_work_of<C>(&w, p))
        return;
    fa_fwd_rows<C::NA> r;
#pragma unroll
    for (int n = 0; n < C::NA; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            r.acc[n][e] = 0;
    r.max[0] = r.max[1] = -INFINITY;
    r.sum[0] = r.sum[1] = 0;
    if (w.k_lo < w.k_hi)
        fa_fwd_keys<C>(r, p, w, sQ, sK, sV, (uint32_t *)(sV + C::BN * C::LDV));
    fa_fwd_store<C>(r, p, w);
}

#endif
