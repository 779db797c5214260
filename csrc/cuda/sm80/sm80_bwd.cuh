/* Backward, from the log-sum-exp of forward (the formulas are at the head of cpu_scalar_bwd.c):
 *
 *   P = 2^(S - lse2),   dP = dO V^T,   dS = P (dP - delta),   dV = P^T dO,   dK = dS^T Q,   dQ = dS K
 *
 * No two blocks add to the same element, so that the bits do not depend on who comes first: one kernel has a tile of
 * keys and runs over the queries of all heads of the group (dK, dV), another has a tile of queries and runs over the
 * keys (dQ), a third has a tile of a float mask's gradient and runs over all scores that the mask took part in
 * (sm80_dmask.cuh). All three compute P and dS of a tile in the same way; which of queries and keys are its rows is
 * the constant KEYS. A warp has 16 or 32 rows, so that P and dS go from the results of one product to the left operand
 * of the next in registers.
 *
 *   block's own        streamed           results
 *   K, V (rows)        Q, dO (columns)    dV += P dO, dK += dS Q
 *   Q, dO (rows)       K, V (columns)     dQ += dS K
 *
 *   time ->          tile n                                    tile n + 1
 *   copies           [ columns of n + 1 .................... ] [ columns of n + 2
 *   tensor cores     [ S ][ dP ]           [ += P ..][ += dS ] [ S ][ dP ]
 *   other lanes                 [ P, dS ]                                 [ P, dS ]
 *
 * A hidden pair has P = 0 and dS = 0 times what may be NaN. So sums that hold NaN are computed again with care, and as
 * slowly as operands that are no vectors. Both ways end in the same code. */
#ifndef FA_SM80_BWD_CUH
#define FA_SM80_BWD_CUH

#include "sm80_score.cuh"

/* DA: columns of dK and dV, or of dQ, that a block sums; more are taken by other blocks, which compute P and dS
 * anew. */
template <typename P_, int DP_, bool KEYS_, bool MOD_> struct fa_bwd_config {
    using P = P_; /* what products take, fa_tf32 or the dtype */
    using T = typename fa_stored<P>::type;
    static constexpr fa_sm80_tile TILE = fa_bwd_tile(DP_, sizeof(T) == 4, KEYS_);
    static constexpr int DP = DP_, CN = TILE.cols, WARPS = TILE.warps, MT = TILE.mt, THREADS = 32 * WARPS;
    static constexpr int RM = fa_tile_rows(TILE), NT = CN / 8, DA = TILE.da, NA = DA / 8, LDB = fa_row_bytes<T>(DP);
    static constexpr int STAGES = fa_bwd_stages(DP, sizeof(T));
    static constexpr bool KEYS = KEYS_, MOD = MOD_;
    static constexpr size_t SHARED = fa_bwd_bytes(TILE, sizeof(T));
    using product = float[MT][NT][4];
    using sums = float[MT][NA][4];
    using tiles = fa_row_tiles<T, CN, THREADS, DP>;
};

/* The same blocks and tiles, but 16 rows of a warp at a time; and of these four of a lane's columns. */
template <class C> struct fa_bwd_slice : C {
    static constexpr int MT = 1;
    using product = float[1][C::NT][4];
    using sums = float[1][C::NA][4];
};
template <class C> struct fa_bwd_four : C {
    static constexpr int MT = 1, NT = 2;
    using product = float[1][2][4];
};

/* Shared memory: rows, then for each stage columns and what belongs to them. */
template <class C> struct fa_bwd_tiles {
    static constexpr int ROWS = C::RM * C::LDB, COLUMNS = C::CN * C::LDB, STAGE = 2 * COLUMNS + 8 * C::CN;
    char *smem;

    __device__ __forceinline__ typename C::T *row(int which) const /* 0: Q or K; 1: dO or V */
    {
        return (typename C::T *)(smem + which * ROWS);
    }
    __device__ __forceinline__ typename C::T *column(int stage, int which) const
    {
        return (typename C::T *)(smem + 2 * ROWS + stage * STAGE + which * COLUMNS);
    }
    __device__ __forceinline__ float *lse2(int stage) const /* [CN], then delta [CN] */
    {
        return (float *)(smem + 2 * ROWS + stage * STAGE + 2 * COLUMNS);
    }
    __device__ __forceinline__ uint32_t *wild(void) const
    {
        return (uint32_t *)(smem + 2 * ROWS + C::STAGES * STAGE);
    }
    __device__ __forceinline__ char *mask(void) const
    {
        return smem + C::SHARED;
    }
};

/* log-sum-exp and delta of a lane's rows, where rows are queries */
template <int MT> struct fa_bwd_rows {
    float lse2[2 * MT], delta[2 * MT];
};

/* What is the same for all tiles of a head. */
struct fa_bwd_head {
    fa_sm80_scores f;
    float keep;
    bool narrow, all_dropped;
};

template <class C>
__device__ __forceinline__ fa_bwd_head fa_bwd_head_of(const fa_sm80_params &p, const fa_seq *seq, int64_t h, int first)
{
    const fa_args *a = &p.a;
    const int lane = threadIdx.x % 32, row = first + threadIdx.x / 32 * 16 * C::MT + lane / 4;
    fa_bwd_head x;
    x.f = fa_sm80_scores_of<C::MOD>(a, seq, h, row, lane % 4 * (C::CN / 4));
    x.keep = p.keep;
    x.all_dropped = p.keep == 0;
    x.narrow = fa_max64(a->q.size[3], a->v.size[3]) <= fa_fewer<typename C::T>(C::DP);
    return x;
}

/* ---- P and dS ---------------------------------------------------------------------------------------------------- */

/* s <- factor s + mask, where rows are keys: eight lanes read neighbours. */
template <typename M, int MT, int NT>
__device__ __forceinline__ void fa_mask_keys(float (&s)[MT][NT][4], const fa_sm80_scores &f, int i0, float factor)
{
    const M *mask = (const M *)f.p.mask + (f.row - f.p.mask_first) * f.p.mask_k;
#pragma unroll
    for (int y = 0; y < 2 * NT; y++) {
        const int i = i0 + f.column + y;
        const M *at = mask + i * f.p.mask_q;
#pragma unroll
        for (int x = 0; x < 2 * MT; x++) {
            const int j = f.row + 8 * x;
            float &score = s[x / 2][y / 2][x % 2 * 2 + y % 2];
            if (i >= f.p.q_len || j >= f.p.k_len || j < f.p.mask_first)
                continue;
            if constexpr (sizeof(M) == 1)
                score = at[8 * x * f.p.mask_k] ? score : -INFINITY;
            else
                score = fmaf(score, factor, fa_to_f32(at[8 * x * f.p.mask_k]));
        }
    }
}

template <class C, bool SLOPES>
__device__ __forceinline__ void fa_bwd_score(typename C::product &s, typename C::product &slope,
                                             const fa_sm80_scores &f, const char *sMask, int col0, bool edges)
{
    using T = typename C::T;
    if constexpr (C::KEYS) {
        const float factor = fa_score_before_mask<T, true, C::MOD, SLOPES>(s, slope, f, col0);
        if (C::MOD && f.p.mask) {
            if (f.p.mask_dtype == FA_BOOL)
                fa_mask_keys<uint8_t>(s, f, col0, 1);
            else if (f.p.mask_dtype == FA_F32)
                fa_mask_keys<float>(s, f, col0, factor);
            else
                fa_mask_keys<T>(s, f, col0, factor);
        }
        if (edges)
            fa_hide_places<true>(s, f, col0);
    } else {
        fa_sm80_score<T, C::MOD, SLOPES, C::THREADS>(s, slope, f, sMask, col0, edges);
    }
}

/* Bit e + 4 n of word m: dropout drops s[m][n][e]. Of an evaluation's eight weights a lane has, with rows of queries,
 * those of both its rows and two neighbouring columns; with rows of keys, of both its rows and one column. */
template <class C>
__device__ __forceinline__ void fa_bwd_dropped(uint32_t (&dropped)[C::MT], const fa_bwd_head &head, int col0)
{
    static_assert(4 * C::NT <= 32 && C::NT <= 4, "a bit for each of a lane's results; columns on one side of 16");
    const fa_sm80_scores &f = head.f;
    const uint32_t threshold = f.p.threshold << 16;
#pragma unroll
    for (int m = 0; m < C::MT; m++) {
        const uint32_t row = (uint32_t)(f.row + 16 * m);
        dropped[m] = head.all_dropped ? 0xffffffffu : 0;
#pragma unroll
        for (int y = 0; y < 2 * C::NT; y += C::KEYS ? 1 : 2) {
            const uint32_t column = (uint32_t)(col0 + f.column + y), i = C::KEYS ? column : row;
            const fa_philox4 r =
                fa_philox(f.p.seed, fa_dropout_column(C::KEYS ? row : column), fa_dropout_row(i), f.p.bh, 0);
#pragma unroll
            for (int x = 0; x < 2; x++) {
                const uint32_t near = r.word[C::KEYS ? x : 2 * x], far = r.word[C::KEYS ? 2 + x : 2 * x + 1];
                const uint32_t word = column & 8 ? far : near, odd = C::KEYS ? word << (row & 1 ? 0 : 16) : word;
                const int at = y / 2 * 4 + 2 * x + y % 2;
                dropped[m] |= (uint32_t)(odd < threshold) << (C::KEYS ? at : at + 1);
                if (!C::KEYS)
                    dropped[m] |= (uint32_t)(word << 16 < threshold) << at;
            }
        }
    }
}

/* w: scores to P, 0 where dropout drops; ds: dP to dS. CARE: what is hidden may meet NaN. */
template <class C, bool SLOPES, bool CARE>
__device__ __forceinline__ void fa_bwd_gradients(typename C::product &w, typename C::product &ds,
                                                 const typename C::product &slope, const fa_bwd_head &head,
                                                 const float *sLse2, const fa_bwd_rows<C::MT> &rows, int col0)
{
    const bool dropout = C::MOD && head.f.p.dropout, capped = SLOPES && head.f.p.cap > 0;
    uint32_t dropped[C::MT];
    if (dropout)
        fa_bwd_dropped<C>(dropped, head, col0);
#pragma unroll
    for (int n = 0; n < C::NT; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const float *column = sLse2 + head.f.column + 2 * n + e;
            const float lse2 = C::KEYS ? column[0] : 0, delta = C::KEYS ? column[C::CN] : 0;
#pragma unroll
            for (int x = 0; x < 2 * C::MT; x++) {
                const int at = x % 2 * 2 + e;
                float &p = w[x / 2][n][at], &g = ds[x / 2][n][at];
                const bool hidden = CARE && p == -INFINITY;
                const bool drop = dropout && (dropped[x / 2] >> (4 * n + at) & 1);
                const float weight = ptx_exp2(fmaf(p, head.f.c, C::KEYS ? -lse2 : -rows.lse2[x]));
                if (dropout)
                    g = drop ? 0 : g * head.keep;
                g = weight * (g - (C::KEYS ? delta : rows.delta[x]));
                if (capped)
                    g *= slope[x / 2][n][at];
                if (hidden)
                    g = 0;
                p = drop || hidden ? 0 : weight;
            }
        }
}

/* S and dP of a tile, unscaled, of rows row0 .. of the block */
template <class C>
__device__ __forceinline__ void fa_bwd_products(typename C::product &s, typename C::product &dp,
                                                const fa_bwd_tiles<C> &sh, int row0, int stage, bool narrow)
{
    using nk = fa_nk<typename C::P, C::DP, C::MT, C::NT>;
    fa_zero(s);
    fa_zero(dp);
    nk::run_two(s, dp, fa_lane_left<C::LDB>(ptx_shared(sh.row(0)), row0),
                fa_lane_nk<C::LDB>(ptx_shared(sh.column(stage, 0))), sh.ROWS, sh.COLUMNS, narrow);
}

/* P (0 where dropout drops) and dS of a tile. SLOPES: dS is the gradient of scale Q K^T, else that of the mask. */
template <class C, bool SLOPES, bool CARE>
__device__ __forceinline__ void fa_bwd_weights(typename C::product &w, typename C::product &ds,
                                               const fa_bwd_tiles<C> &sh, int stage, const fa_bwd_head &head,
                                               const fa_bwd_rows<C::MT> &rows, int col0, bool edges)
{
    typename C::product slope;
    fa_bwd_products<C>(w, ds, sh, threadIdx.x / 32 * 16 * C::MT, stage, head.narrow);
    fa_bwd_score<C, SLOPES && C::MOD>(w, slope, head.f, sh.mask(), col0, edges);
    fa_bwd_gradients<C, SLOPES && C::MOD, CARE>(w, ds, slope, head, sh.lse2(stage), rows, col0);
}

/* The same for slice m of the warp's rows, of which `head` knows the first, with care; four columns at a time, in the
 * lane's local memory. */
template <class C>
__device__ __forceinline__ void fa_bwd_weights_slowly(typename fa_bwd_slice<C>::product &w,
                                                      typename fa_bwd_slice<C>::product &ds,
                                                      const fa_bwd_tiles<fa_bwd_slice<C>> &sh, int m, fa_bwd_head head,
                                                      const fa_bwd_rows<1> &rows, int col0, bool edges)
{
    using S = fa_bwd_slice<C>;
    using F = fa_bwd_four<C>;
    typename S::product s, dp;
    fa_bwd_products<S>(s, dp, sh, threadIdx.x / 32 * 16 * C::MT + 16 * m, 0, false);
    fa_copy(w, s);
    fa_copy(ds, dp);
    head.f.row += 16 * m;
#pragma unroll 1
    for (int n = 0; n < C::NT / 2; n++, head.f.column += 4) {
        typename F::product slope, &p = fa_four_columns(w, n);
        if (!C::KEYS && C::MOD && head.f.p.mask)
            fa_fetch_mask<1, 2, C::THREADS>(sh.mask(), head.f, 0, col0);
        fa_bwd_score<F, C::MOD>(p, slope, head.f, sh.mask(), col0, edges);
        fa_bwd_gradients<F, C::MOD, true>(p, fa_four_columns(ds, n), slope, head, sh.lse2(0), rows, col0);
    }
}

/* acc += w times 8 NA columns, from c0 on, of columns' tile `which`; narrow: the last quarter of them is 0 */
template <class C>
__device__ __forceinline__ void fa_bwd_add(typename C::sums &acc, const typename C::product &w,
                                           const fa_bwd_tiles<C> &sh, int stage, int which, int c0, bool narrow)
{
    using T = typename C::T;
    const uint32_t tile = ptx_shared(sh.column(stage, which)) + c0 * (int)sizeof(T);
    fa_product_kn<typename C::P, C::LDB>(acc, w, fa_lane_kn<T, C::LDB>(tile), narrow);
}

template <class C> __device__ __forceinline__ bool fa_bwd_is_narrow(int64_t d, int c0)
{
    return d - c0 <= fa_fewer<typename C::T>(C::DA);
}

/* The same for a slice, over all of them, where w and the sums lie in the lane's local memory. */
template <class C>
__device__ __forceinline__ void fa_bwd_add_slowly(typename fa_bwd_slice<C>::sums &sums,
                                                  typename fa_bwd_slice<C>::product &w,
                                                  const fa_bwd_tiles<fa_bwd_slice<C>> &sh, int which, int c0)
{
    using T = typename C::T;
    const uint32_t tile = fa_lane_kn<T, C::LDB>(ptx_shared(sh.column(0, which)) + c0 * (int)sizeof(T));
    typename fa_bwd_slice<C>::sums acc;
    fa_copy(acc, sums);
#pragma unroll 1
    for (int n = 0; n < C::NT / 2; n++)
        fa_product_kn<typename C::P, C::LDB>(acc, fa_four_columns(w, n), tile + n * 16 * C::LDB, false);
    fa_copy(sums, acc);
}

/* index of row i of head h in lse2 and delta */
__device__ __forceinline__ int64_t fa_bwd_row_at(const fa_sm80_params &p, const fa_seq *s, int64_t h)
{
    return (s->q_batch * p.a.q.size[1] + h) * p.rows + s->q_row;
}

/* Rows of a block's results, times `factor`, over its own rows in shared memory. */
template <class C, class At>
__device__ __forceinline__ void fa_bwd_store(const fa_bwd_tiles<C> &sh, const fa_tensor *t, const typename C::sums &acc,
                                             float factor, int64_t first, int64_t limit, int c0, bool vectors, At at)
{
    const int row0 = threadIdx.x / 32 * 16 * C::MT;
    float factors[2 * C::MT];
#pragma unroll
    for (int x = 0; x < 2 * C::MT; x++)
        factors[x] = factor;
    fa_store_rows<typename C::T, C::LDB>((char *)sh.row(0) + row0 * C::LDB, t, acc, factors, first + row0, limit, c0,
                                         vectors, at);
}

/* A tile of columns, which: 0 or 1; slowly: of any strides. */
template <class C>
__device__ __forceinline__ void fa_bwd_load(const fa_bwd_tiles<C> &sh, int stage, int which,
                                            const typename C::tiles &tiles, const fa_load_rows &rows, int first,
                                            int limit, bool slowly)
{
    using T = typename C::T;
    T *to = sh.column(stage, which);
    if (slowly)
        fa_load_slowly(to, C::LDB / (int)sizeof(T), C::CN, C::THREADS, rows, first, limit, 0, C::DP, true);
    else
        tiles.template load<false>(ptx_shared(to), first, limit);
}

/* The block's own rows, which: 0 or 1, from row `first` of the sequence on. */
template <class C, bool SLOW>
__device__ __forceinline__ void fa_bwd_load_own(const fa_bwd_tiles<C> &sh, int which, const fa_load_rows &rows,
                                                int64_t first, int64_t limit)
{
    using T = typename C::T;
    constexpr int LD = C::LDB / (int)sizeof(T);
    if (SLOW)
        fa_load_slowly(sh.row(which), LD, C::RM, C::THREADS, rows, first, limit, 0, C::DP, false);
    else
        fa_load_tile<T, C::RM, C::THREADS>(sh.row(which), LD, rows, first, limit, 0, C::DP);
}

/* ---- dK and dV --------------------------------------------------------------------------------------------------- */

/* What a block of keys has to do: its tile, and the queries that see some of it, of each head of the group. */
struct fa_bwd_keys_work {
    fa_seq seq;
    int64_t hk, group;
    int first, c0;      /* first key; first column of the results */
    int lo, hi;         /* queries */
    int full_lo, full_hi; /* of these each sees every key of the tile */
    bool exists;
};

template <class C> __device__ __noinline__ static fa_bwd_keys_work fa_bwd_keys_work_of(const fa_sm80_params &p)
{
    const fa_args *a = &p.a;
    fa_bwd_keys_work w;
    const unsigned heads = (unsigned)a->k.size[1];
    w.group = (unsigned)a->q.size[1] / heads;
    w.hk = blockIdx.x % heads;
    w.c0 = blockIdx.y * C::DA;
    const fa_tile tile = fa_tile_of(&a->cu_k, a->k.size[2], C::RM, blockIdx.x / heads);
    const fa_seq seq = fa_seq_at(a, tile.n);
    const fa_span *s = &seq.span;
    w.seq = seq;
    w.first = (int)tile.first;
    w.exists = tile.first < seq.k_rows;
    const int64_t last = fa_min64(tile.first + C::RM, s->k_len) - 1;
    const fa_range queries = tile.first < s->k_len ? fa_queries_of_keys(s, tile.first, last) : fa_range{0, 0};
    w.lo = (int)fa_max64(queries.lo, 0) / C::CN * C::CN;
    w.hi = (int)fa_max64(queries.hi, 0);
    const bool whole = tile.first + C::RM <= s->k_len;
    w.full_lo = s->right < 0 ? 0 : (int)fa_clamp(last - s->offset - s->right, 0, s->q_len);
    w.full_hi = !whole ? 0 : s->left < 0 ? (int)s->q_len
                                         : (int)fa_clamp(tile.first - s->offset + s->left + 1, 0, s->q_len);
    return w;
}

/* Where Q and dO of a head lie, and what belongs to their rows. */
template <class C> struct fa_bwd_query_source {
    typename C::tiles q, dout;
    const float *lse2, *delta;
    int64_t h;

    __device__ __forceinline__ fa_bwd_query_source(const fa_sm80_params &p, const fa_seq *seq, int64_t head)
        : q(&p.a, &p.a.q, fa_q_at(seq, &p.a.q, head, 0), 0, 0),
          dout(&p.a, &p.a.dout, fa_q_at(seq, &p.a.dout, head, 0), 0, 0), lse2(p.lse2 + fa_bwd_row_at(p, seq, head)),
          delta(p.delta + fa_bwd_row_at(p, seq, head)), h(head)
    {
    }
};

/* Queries i0 .. into a stage; slowly: those that see nothing are not read. */
template <class C>
__device__ __forceinline__ void fa_bwd_load_queries(const fa_bwd_tiles<C> &sh, int stage, const fa_sm80_params &p,
                                                    const fa_seq *seq, const fa_bwd_query_source<C> &from, int i0,
                                                    bool slowly)
{
    const int q_len = (int)seq->span.q_len, x = threadIdx.x % C::CN, i = i0 + x;
    fa_load_rows q = fa_rows_q(&p.a, seq, &p.a.q, from.h, p.vectors & FA_VEC_Q);
    fa_load_rows dout = fa_rows_q(&p.a, seq, &p.a.dout, from.h, p.vectors & FA_VEC_DOUT);
    q.skip = dout.skip = from.lse2;
    fa_bwd_load(sh, stage, 0, from.q, q, i0, q_len, slowly);
    fa_bwd_load(sh, stage, 1, from.dout, dout, i0, q_len, slowly);
    if (threadIdx.x < 2 * C::CN) {
        float *to = sh.lse2(stage) + threadIdx.x;
        if (i < q_len)
            ptx_cp_async_few<4>(ptx_shared(to), (threadIdx.x < C::CN ? from.lse2 : from.delta) + i);
        else
            *to = threadIdx.x < C::CN ? INFINITY : 0;
    }
    ptx_cp_async_commit();
}

/* dK and dV of the tile: the time table above. */
template <class C>
__device__ __forceinline__ void fa_bwd_sum_keys(typename C::sums &dk, typename C::sums &dv, const fa_sm80_params &p,
                                                const fa_bwd_keys_work &w, const fa_bwd_tiles<C> &sh)
{
    const fa_args *a = &p.a;
    const fa_seq seq = w.seq;
    constexpr int NEXT = C::STAGES - 1;
    fa_bwd_load_own<C, false>(sh, 0, fa_rows_k(a, &seq, &a->k, &a->k_scale, w.hk, p.vectors & FA_VEC_K), w.first,
                              seq.span.k_len);
    fa_bwd_load_own<C, false>(sh, 1, fa_rows_k(a, &seq, &a->v, &a->v_scale, w.hk, p.vectors & FA_VEC_V), w.first,
                              seq.span.k_len);
    if (w.lo >= w.hi)
        return;
    const int64_t h0 = w.hk * w.group;
    fa_bwd_query_source<C> from(p, &seq, h0);
    int stage = 0;
    if (NEXT)
        fa_bwd_load_queries(sh, 0, p, &seq, from, w.lo, false);
    for (int64_t h = h0; h < h0 + w.group; h++) {
        const fa_bwd_head head = fa_bwd_head_of<C>(p, &seq, h, w.first);
        if (!NEXT)
            from = fa_bwd_query_source<C>(p, &seq, h);
#pragma unroll 1
        for (int i0 = w.lo; i0 < w.hi; i0 += C::CN) {
            const bool more = i0 + C::CN < w.hi, last = !more && h + 1 == h0 + w.group;
            if (NEXT && !more && !last)
                from = fa_bwd_query_source<C>(p, &seq, h + 1);
            if (!NEXT)
                fa_bwd_load_queries(sh, 0, p, &seq, from, i0, false);
            else if (!last)
                fa_bwd_load_queries(sh, stage ^ 1, p, &seq, from, more ? i0 + C::CN : w.lo, false);
            else
                ptx_cp_async_commit();
            ptx_cp_async_wait<NEXT>();
            __syncthreads();
            typename C::product s, ds;
            fa_bwd_weights<C, true, false>(s, ds, sh, stage, head, fa_bwd_rows<C::MT>(), i0,
                                           i0 < w.full_lo || i0 + C::CN > w.full_hi);
            fa_bwd_add<C>(dv, s, sh, stage, 1, w.c0, fa_bwd_is_narrow<C>(a->v.size[3], w.c0));
            fa_bwd_add<C>(dk, ds, sh, stage, 0, w.c0, fa_bwd_is_narrow<C>(a->q.size[3], w.c0));
            __syncthreads();
            stage ^= NEXT;
        }
    }
}

/* The same for any strides, and where hidden pairs may meet NaN. Not inlined, and short rather than fast: a tile is
 * worked on when all of it is there, a slice of the warp's rows at a time; sums of the others lie in the lane's local
 * memory. */
template <class C>
__device__ __noinline__ static void fa_bwd_sum_keys_slowly(typename fa_bwd_slice<C>::sums (&dk)[C::MT],
                                                           typename fa_bwd_slice<C>::sums (&dv)[C::MT],
                                                           const fa_sm80_params &p, char *smem)
{
    using S = fa_bwd_slice<C>;
    const fa_args *a = &p.a;
    const fa_bwd_keys_work w = fa_bwd_keys_work_of<C>(p);
    const fa_bwd_tiles<S> sh{smem};
#pragma unroll 1
    for (int m = 0; m < C::MT; m++) {
        fa_zero(dk[m]);
        fa_zero(dv[m]);
    }
    if (w.lo >= w.hi)
        return;
    fa_bwd_load_own<S, true>(sh, 0, fa_rows_k(a, &w.seq, &a->k, &a->k_scale, w.hk, p.vectors & FA_VEC_K), w.first,
                             w.seq.span.k_len);
    fa_bwd_load_own<S, true>(sh, 1, fa_rows_k(a, &w.seq, &a->v, &a->v_scale, w.hk, p.vectors & FA_VEC_V), w.first,
                             w.seq.span.k_len);
#pragma unroll 1
    for (int64_t h = w.hk * w.group; h < (w.hk + 1) * w.group; h++) {
        const fa_bwd_query_source<S> from(p, &w.seq, h);
        const fa_bwd_head head = fa_bwd_head_of<C>(p, &w.seq, h, w.first);
#pragma unroll 1
        for (int i0 = w.lo; i0 < w.hi; i0 += C::CN) {
            fa_bwd_load_queries(sh, 0, p, &w.seq, from, i0, true);
            ptx_cp_async_wait<0>();
            __syncthreads();
#pragma unroll 1
            for (int m = 0; m < C::MT; m++) {
                typename S::product s, ds;
                fa_bwd_weights_slowly<C>(s, ds, sh, m, head, fa_bwd_rows<1>(), i0,
                                         i0 < w.full_lo || i0 + C::CN > w.full_hi);
                fa_bwd_add_slowly<C>(dv[m], s, sh, 1, w.c0);
                fa_bwd_add_slowly<C>(dk[m], ds, sh, 0, w.c0);
            }
            __syncthreads();
        }
    }
}

template <class C>
__device__ __forceinline__ void fa_bwd_keys_slowly(typename C::sums &dk, typename C::sums &dv, const fa_sm80_params &p,
                                                   char *smem)
{
    typename fa_bwd_slice<C>::sums slices_k[C::MT], slices_v[C::MT];
    fa_bwd_sum_keys_slowly<C>(slices_k, slices_v, p, smem);
#pragma unroll
    for (int m = 0; m < C::MT; m++) {
        fa_copy(dk[m], slices_k[m][0]);
        fa_copy(dv[m], slices_v[m][0]);
    }
}

template <class C>
__device__ __forceinline__ void fa_bwd_store_keys(const typename C::sums &dk, const typename C::sums &dv,
                                                  const fa_sm80_params &p, const fa_bwd_tiles<C> &sh)
{
    const fa_args *a = &p.a;
    const fa_bwd_keys_work w = fa_bwd_keys_work_of<C>(p);
    if (a->dv.data)
        fa_bwd_store<C>(sh, &a->dv, dv, p.keep, w.first, w.seq.k_rows, w.c0, p.vectors & FA_VEC_DV,
                        [&](int64_t j) { return fa_k_at(a, &w.seq, &a->dv, w.hk, j); });
    if (a->dk.data)
        fa_bwd_store<C>(sh, &a->dk, dk, (float)a->scale, w.first, w.seq.k_rows, w.c0, p.vectors & FA_VEC_DK,
                        [&](int64_t j) { return fa_k_at(a, &w.seq, &a->dk, w.hk, j); });
}

template <class C>
__global__ void __launch_bounds__(C::THREADS) fa_bwd_sm80_keys(const __grid_constant__ fa_sm80_params p)
{
    extern __shared__ __align__(16) char smem[];
    const fa_bwd_tiles<C> sh{smem};
    const int vectors = FA_VEC_Q | FA_VEC_DOUT;
    bool good = (p.vectors & vectors) == vectors;
    typename C::sums dk, dv;
    fa_zero(dk);
    fa_zero(dv);
    if (good) {
        const fa_bwd_keys_work w = fa_bwd_keys_work_of<C>(p);
        if (!w.exists)
            return;
        fa_bwd_sum_keys<C>(dk, dv, p, w, sh);
        ptx_cp_async_wait<0>();
        good = !__syncthreads_or(fa_spoilt(dk) || fa_spoilt(dv));
    }
    if (!good)
        fa_bwd_keys_slowly<C>(dk, dv, p, smem);
    fa_bwd_store_keys<C>(dk, dv, p, sh);
}

/* ---- dQ ---------------------------------------------------------------------------------------------------------- */

/* What a block of queries has to do. */
struct fa_bwd_queries_work {
    fa_seq seq;
    int64_t h, hk;
    int first, c0;
    int lo, hi, full_lo, full_hi; /* keys that some query sees, that every one sees */
    bool exists;
};

template <class C> __device__ __noinline__ static fa_bwd_queries_work fa_bwd_queries_work_of(const fa_sm80_params &p)
{
    const fa_args *a = &p.a;
    fa_bwd_queries_work w;
    const unsigned heads = (unsigned)a->q.size[1];
    w.h = blockIdx.x % heads;
    w.hk = (unsigned)w.h / (heads / (unsigned)a->k.size[1]);
    w.c0 = blockIdx.y * C::DA;
    const fa_tile tile = fa_tile_of(&a->cu_q, a->q.size[2], C::RM, p.slots - 1 - blockIdx.x / heads);
    const fa_seq seq = fa_seq_at(a, tile.n);
    const fa_span *s = &seq.span;
    w.seq = seq;
    w.first = (int)tile.first;
    w.exists = tile.first < seq.q_rows;
    const int64_t last = fa_min64(tile.first + C::RM, s->q_len) - 1;
    const fa_range keys = tile.first < s->q_len ? fa_keys_of_queries(s, tile.first, last) : fa_range{0, 0};
    w.lo = (int)fa_max64(keys.lo, 0) / C::CN * C::CN;
    w.hi = (int)fa_max64(keys.hi, 0);
    const bool whole = tile.first + C::RM <= s->q_len;
    w.full_lo = s->left < 0 ? 0 : (int)fa_clamp(last + s->offset - s->left, 0, s->k_len);
    w.full_hi = !whole ? 0 : s->right < 0 ? (int)s->k_len
                                          : (int)fa_clamp(tile.first + s->offset + s->right + 1, 0, s->k_len);
    return w;
}

/* What belongs to a lane's rows, of which `first` is the first. */
template <int MT>
__device__ __forceinline__ fa_bwd_rows<MT> fa_bwd_rows_at(const fa_sm80_params &p, const fa_seq *seq, int64_t h,
                                                          int64_t first)
{
    const int64_t row0 = fa_bwd_row_at(p, seq, h), q_len = seq->span.q_len;
    fa_bwd_rows<MT> r;
#pragma unroll
    for (int x = 0; x < 2 * MT; x++) {
        const int64_t i = first + 8 * x;
        r.lse2[x] = i < q_len ? p.lse2[row0 + i] : INFINITY;
        r.delta[x] = i < q_len ? p.delta[row0 + i] : 0;
    }
    return r;
}

/* Q and dO of the block */
template <class C, bool SLOW>
__device__ __forceinline__ void fa_bwd_load_own_queries(const fa_bwd_tiles<C> &sh, const fa_sm80_params &p,
                                                        const fa_seq *seq, int64_t h, int64_t i0)
{
    const fa_args *a = &p.a;
    fa_bwd_load_own<C, SLOW>(sh, 0, fa_rows_q(a, seq, &a->q, h, p.vectors & FA_VEC_Q), i0, seq->span.q_len);
    fa_bwd_load_own<C, SLOW>(sh, 1, fa_rows_q(a, seq, &a->dout, h, p.vectors & FA_VEC_DOUT), i0, seq->span.q_len);
}

/* Where K and V of a head lie. */
template <class C> struct fa_bwd_key_source {
    typename C::tiles k, v;
    int64_t hk;

    __device__ __forceinline__ fa_bwd_key_source(const fa_args *a, const fa_seq *seq, int64_t head)
        : k(a, &a->k, fa_first_key_at(a, seq, &a->k, head), 0, 0),
          v(a, &a->v, fa_first_key_at(a, seq, &a->v, head), 0, 0), hk(head)
    {
    }
};

/* Keys j0 .. into a stage */
template <class C>
__device__ __forceinline__ void fa_bwd_load_keys(const fa_bwd_tiles<C> &sh, int stage, const fa_sm80_params &p,
                                                 const fa_seq *seq, const fa_bwd_key_source<C> &from, int j0,
                                                 bool slowly)
{
    const fa_args *a = &p.a;
    const int k_len = (int)seq->span.k_len;
    fa_bwd_load(sh, stage, 0, from.k, fa_rows_k(a, seq, &a->k, &a->k_scale, from.hk, p.vectors & FA_VEC_K), j0, k_len,
                slowly);
    fa_bwd_load(sh, stage, 1, from.v, fa_rows_k(a, seq, &a->v, &a->v_scale, from.hk, p.vectors & FA_VEC_V), j0, k_len,
                slowly);
    ptx_cp_async_commit();
}

template <class C>
__device__ __forceinline__ void fa_bwd_sum_queries(typename C::sums &dq, const fa_sm80_params &p,
                                                   const fa_bwd_queries_work &w, const fa_bwd_tiles<C> &sh)
{
    const fa_args *a = &p.a;
    const fa_seq seq = w.seq;
    constexpr int NEXT = C::STAGES - 1;
    if (w.lo >= w.hi)
        return;
    fa_bwd_load_own_queries<C, false>(sh, p, &seq, w.h, w.first);
    const fa_bwd_head head = fa_bwd_head_of<C>(p, &seq, w.h, w.first);
    const fa_bwd_rows<C::MT> rows = fa_bwd_rows_at<C::MT>(p, &seq, w.h, head.f.row);
    const fa_bwd_key_source<C> from(a, &seq, w.hk);
    int stage = 0;
    if (NEXT)
        fa_bwd_load_keys(sh, 0, p, &seq, from, w.lo, false);
#pragma unroll 1
    for (int j0 = w.lo; j0 < w.hi; j0 += C::CN) {
        if (C::MOD && head.f.p.mask)
            fa_fetch_mask<C::MT, C::NT, C::THREADS>(sh.mask(), head.f, p.mask_width, j0);
        ptx_cp_async_commit();
        if (!NEXT)
            fa_bwd_load_keys(sh, 0, p, &seq, from, j0, false);
        else if (j0 + C::CN < w.hi)
            fa_bwd_load_keys(sh, stage ^ 1, p, &seq, from, j0 + C::CN, false);
        else
            ptx_cp_async_commit();
        ptx_cp_async_wait<NEXT>();
        __syncthreads();
        typename C::product s, ds;
        fa_bwd_weights<C, true, false>(s, ds, sh, stage, head, rows, j0,
                                       j0 < w.full_lo || j0 + C::CN > w.full_hi);
        fa_bwd_add<C>(dq, ds, sh, stage, 0, w.c0, fa_bwd_is_narrow<C>(a->q.size[3], w.c0));
        __syncthreads();
        stage ^= NEXT;
    }
}

/* The slow way, as for keys. Keys that hold NaN become 0 once all scores are known: queries that see one have dS of
 * NaN. */
template <class C>
__device__ __noinline__ static void fa_bwd_sum_queries_slowly(typename fa_bwd_slice<C>::sums (&dq)[C::MT],
                                                              const fa_sm80_params &p, char *smem)
{
    using S = fa_bwd_slice<C>;
    using T = typename C::T;
    const fa_bwd_queries_work w = fa_bwd_queries_work_of<C>(p);
    const fa_bwd_tiles<S> sh{smem};
    constexpr int LD = C::LDB / (int)sizeof(T);
    const fa_bwd_head head = fa_bwd_head_of<C>(p, &w.seq, w.h, w.first);
    const fa_bwd_key_source<S> from(&p.a, &w.seq, w.hk);
    typename S::product ds[C::MT];
#pragma unroll 1
    for (int m = 0; m < C::MT; m++)
        fa_zero(dq[m]);
    if (w.lo >= w.hi)
        return;
    fa_bwd_load_own_queries<S, true>(sh, p, &w.seq, w.h, w.first);
#pragma unroll 1
    for (int j0 = w.lo; j0 < w.hi; j0 += C::CN) {
        fa_bwd_load_keys(sh, 0, p, &w.seq, from, j0, true);
        ptx_cp_async_wait<0>();
        __syncthreads();
#pragma unroll 1
        for (int m = 0; m < C::MT; m++) {
            typename S::product s;
            fa_bwd_weights_slowly<C>(s, ds[m], sh, m, head, fa_bwd_rows_at<1>(p, &w.seq, w.h, head.f.row + 16 * m), j0,
                                     j0 < w.full_lo || j0 + C::CN > w.full_hi);
        }
        if (fa_find_wild<T, C::CN, C::THREADS>(sh.column(0, 0), LD, C::DP, sh.wild())) {
            fa_clear_wild<T, C::CN, C::THREADS>(sh.column(0, 0), LD, C::DP, sh.wild());
            __syncthreads();
        }
#pragma unroll 1
        for (int m = 0; m < C::MT; m++)
            fa_bwd_add_slowly<C>(dq[m], ds[m], sh, 0, w.c0);
        __syncthreads();
    }
}

template <class C>
__device__ __forceinline__ void fa_bwd_queries_slowly(typename C::sums &dq, const fa_sm80_params &p, char *smem)
{
    typename fa_bwd_slice<C>::sums slices[C::MT];
    fa_bwd_sum_queries_slowly<C>(slices, p, smem);
#pragma unroll
    for (int m = 0; m < C::MT; m++)
        fa_copy(dq[m], slices[m][0]);
}

template <class C>
__global__ void __launch_bounds__(C::THREADS) fa_bwd_sm80_queries(const __grid_constant__ fa_sm80_params p)
{
    extern __shared__ __align__(16) char smem[];
    const fa_bwd_tiles<C> sh{smem};
    const fa_args *a = &p.a;
    const int vectors = FA_VEC_K | FA_VEC_V;
    bool good = (p.vectors & vectors) == vectors;
    typename C::sums dq;
    fa_zero(dq);
    if (good) {
        const fa_bwd_queries_work w = fa_bwd_queries_work_of<C>(p);
        if (!w.exists)
            return;
        fa_bwd_sum_queries<C>(dq, p, w, sh);
        good = !__syncthreads_or(fa_spoilt(dq));
    }
    if (!good)
        fa_bwd_queries_slowly<C>(dq, p, smem);
    const fa_bwd_queries_work w = fa_bwd_queries_work_of<C>(p);
    fa_bwd_store<C>(sh, &a->dq, dq, (float)a->scale, w.first, w.seq.q_rows, w.c0, p.vectors & FA_VEC_DQ,
                    [&](int64_t i) { return fa_q_at(&w.seq, &a->dq, w.h, i); });
}

#endif
