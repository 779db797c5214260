/* Few query rows against many keys: K and V are streamed once. A block has the query rows of one key head (up to 16, of
 * all its query heads) and a run of parts of a sequence's keys. Each warp takes every fourth tile of 16 keys and has a
 * ring of them in shared memory of its own, so that warps meet only at the end of a part, where their sums are merged.
 *
 *   time ->        tile i                               tile i + 1
 *   copies         [ K, V of tile i + STAGES - 1 ...    [ K, V of tile i + STAGES ...
 *   table of pages   [ rows of the tile after that ]      [ ...
 *   tensor cores     [ S i ]           [ O += P V i ]     [ S i+1 ]
 *   other lanes             [ softmax ]                          [ softmax ]
 *
 * The ring goes on across the parts of a run. Parts are summed apart and merged in their order (decode_merge.cu), so
 * that the length of a run changes no bit. */
#ifndef FA_DECODE_KERNEL_CUH
#define FA_DECODE_KERNEL_CUH

#include <type_traits>

#include "../ptx/grid.cuh"
#include "decode.cuh"
#include "decode_widen.cuh"

constexpr size_t fa_decode_max(size_t a, size_t b)
{
    return a > b ? a : b;
}

/* T: of the query; S: as keys are stored; DP: head dimensions up to it. MOD: also what is no vectors, masks, softcap,
 * ALiBi. */
template <typename T_, typename S_, int DP_, bool MOD_> struct fa_decode_config {
    using T = T_;
    using S = S_;
    static constexpr int DP = DP_, NA = DP / 8, LD = fa_tile_ld<T>(DP), LDS = fa_tile_ld<S>(DP), LDO = DP + 4;
    static constexpr bool MOD = MOD_, WIDEN = !std::is_same<T, S>::value;
    static constexpr int WARPS = sizeof(T) * DP > 512 ? 2 : 4, THREADS = 32 * WARPS;
    static constexpr size_t TILE = FA_DECODE_KEYS * LDS * sizeof(S), SCALES = WIDEN ? 2 * FA_DECODE_KEYS * 4 : 0;
    static constexpr size_t STAGE = 2 * TILE + SCALES;
    /* The merge of a part takes a stage, or where tiles are widened, the room for that. */
    static constexpr size_t SUMS = FA_DECODE_ROWS * LDO * 4;
    static constexpr size_t WIDE = WIDEN ? fa_decode_max(FA_DECODE_KEYS * LD * sizeof(T), SUMS) : 0;
    static constexpr size_t QUERY = FA_DECODE_ROWS * LD * sizeof(T), ENDS = (WARPS + 1) * FA_DECODE_ROWS * 8 + 32;
    /* two blocks to a multiprocessor where that leaves three stages, else one */
    static constexpr size_t HALF = (112 << 10) - QUERY - ENDS - WARPS * WIDE, WHOLE = HALF + (112 << 10);
    static constexpr size_t FIT = HALF / (WARPS * STAGE) >= 3 ? HALF / (WARPS * STAGE) : WHOLE / (WARPS * STAGE);
    static constexpr int STAGES = FIT > 6 ? 6 : (int)FIT;
    static constexpr size_t WARP_BYTES = WIDE + STAGES * STAGE;
    static constexpr size_t SHARED = QUERY + ENDS + WARPS * WARP_BYTES;
    static_assert(WIDEN || STAGE >= SUMS, "a stage must hold the sums of a warp");
    static_assert(STAGES >= 3, "two tiles under way and one in use");
};

/* One query row as a lane sees it. */
struct fa_decode_row {
    int lo, hi;       /* the keys it sees */
    int position;     /* its own place among the keys */
    float slope;      /* ALiBi, in units of log2 */
    const char *mask; /* its first element */
};

/* What the block has to do. */
struct fa_decode_work {
    fa_seq seq;
    fa_decode_cut cut;
    int hk, first_row, rows; /* first of its query rows within the key head, and their number */
    int part, parts;         /* its run */
    int k_lo, k_hi;          /* keys of the run */
    int all_lo, all_hi;      /* keys that every row sees */
    int64_t k_head, v_head, k_scale_head, v_scale_head; /* elements to the head */
};

__device__ __forceinline__ int64_t fa_scale_head(const fa_tensor *scale, int hk)
{
    return scale->size[1] > 1 ? hk * scale->stride[1] : 0;
}

__device__ static bool fa_decode_work_of(fa_decode_work *w, const fa_decode_params &p)
{
    const fa_args *a = &p.a;
    const int heads = (int)a->k.size[1], runs = (p.parts + p.run - 1) / p.run;
    unsigned id = blockIdx.x;
    const int tile = id % p.tiles;
    id /= p.tiles;
    w->hk = id % heads;
    id /= heads;
    w->part = id % runs * p.run;
    w->seq = fa_seq_at(a, id / runs);
    w->cut = fa_decode_cut_of(p, w->seq.span);
    if (w->part >= w->cut.parts)
        return false;
    w->parts = min(p.run, w->cut.parts - w->part);
    w->k_lo = w->cut.lo + w->part * w->cut.part;
    w->k_hi = min(w->cut.hi, w->k_lo + w->parts * w->cut.part);
    w->first_row = tile * FA_DECODE_ROWS;
    w->rows = min(FA_DECODE_ROWS, p.rows - w->first_row);
    const int first = w->first_row / p.group, last = (w->first_row + w->rows - 1) / p.group;
    w->all_lo = (int)fa_max64(fa_keys_of_queries(&w->seq.span, last, last).lo, 0);
    w->all_hi = last < w->seq.span.q_len ? (int)fa_max64(fa_keys_of_queries(&w->seq.span, first, first).hi, 0) : 0;
    w->k_head = w->hk * a->k.stride[1];
    w->v_head = w->hk * a->v.stride[1];
    w->k_scale_head = fa_scale_head(&a->k_scale, w->hk);
    w->v_scale_head = fa_scale_head(&a->v_scale, w->hk);
    return true;
}

/* query and head of row r of the block */
__device__ __forceinline__ int fa_decode_query(const fa_decode_params &p, const fa_decode_work &w, int r)
{
    return (w.first_row + r) / p.group;
}
__device__ __forceinline__ int fa_decode_head(const fa_decode_params &p, const fa_decode_work &w, int r)
{
    return w.hk * p.group + (w.first_row + r) % p.group;
}

template <class C>
__device__ static void fa_decode_rows_of(fa_decode_row (&rows)[2], fa_scores *scores, const fa_decode_params &p,
                                         const fa_decode_work &w)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int r = min((int)(threadIdx.x % 32 / 4 + 8 * i), w.rows - 1); /* rows behind the last are as it is */
        const int query = fa_decode_query(p, w, r), head = fa_decode_head(p, w, r);
        fa_range keys = {0, 0};
        if (query < w.seq.span.q_len)
            keys = fa_keys_of_queries(&w.seq.span, query, query);
        rows[i] = {(int)fa_max64(keys.lo, 0), (int)fa_max64(keys.hi, 0), (int)(query + w.seq.span.offset), 0, NULL};
        if (C::MOD || i == 0)
            *scores = fa_scores_of(&p.a, &w.seq, head);
        if (C::MOD) {
            rows[i].slope = scores->slope;
            rows[i].mask = scores->mask;
            if (scores->mask)
                rows[i].mask += query * scores->mask_q * fa_dtype_width(scores->mask_dtype);
        }
    }
}

/* sQ <- the block's query rows, padded with zeros */
template <class C>
__device__ static void fa_decode_load_q(typename C::T *sQ, const fa_decode_params &p, const fa_decode_work &w)
{
    using T = typename C::T;
    constexpr int VEC = 16 / (int)sizeof(T), CHUNKS = C::DP / VEC;
    const fa_tensor *q = &p.a.q;
    const int d = (int)q->size[3];
    for (int x = threadIdx.x; x < FA_DECODE_ROWS * CHUNKS; x += C::THREADS) {
        const int r = x / CHUNKS, c = x % CHUNKS * VEC;
        T *to = sQ + r * C::LD + c;
        *(uint4 *)to = make_uint4(0, 0, 0, 0);
        if (r >= w.rows || c >= d)
            continue;
        const T *from = (const T *)q->data + fa_q_at(&w.seq, q, fa_decode_head(p, w, r), fa_decode_query(p, w, r));
        if (p.q_vectors) {
            *(uint4 *)to = *(const uint4 *)(from + c);
            continue;
        }
        for (int i = 0; i < VEC && c + i < d; i++)
            to[i] = from[(c + i) * q->stride[3]];
    }
}

/* ---- tiles of keys into a stage ---------------------------------------------------------------------------------- */

/* Where key lane % 16 of a tile lies: elements to its row of k and of v; -1: nowhere. scale: to that of k in the lower,
 * of v in the upper half of the warp. */
struct fa_decode_place {
    int64_t k, v, scale;
};

template <class C>
__device__ __forceinline__ fa_decode_place fa_decode_find(const fa_decode_params &p, const fa_decode_work &w, int k0)
{
    const fa_args *a = &p.a;
    const int j = k0 + threadIdx.x % FA_DECODE_KEYS;
    int64_t batch = w.seq.k_batch, row = j;
    if (j >= w.k_hi)
        return {-1, -1, -1};
    if (a->page_size) {
        const fa_tensor *t = &a->block_table;
        const unsigned size = (unsigned)a->page_size, page = (unsigned)j / size;
        batch = fa_index(t, w.seq.n * t->stride[0] + page * t->stride[1]);
        row = j - page * size;
        if (batch < 0 || batch >= a->k.size[0])
            return {-1, -1, -1};
    }
    fa_decode_place at = {w.k_head + batch * a->k.stride[0] + row * a->k.stride[2],
                          w.v_head + batch * a->v.stride[0] + row * a->v.stride[2], 0};
    if (C::WIDEN && a->scale_per_token) {
        const bool of_k = threadIdx.x % 32 < FA_DECODE_KEYS;
        const fa_tensor *t = of_k ? &a->k_scale : &a->v_scale;
        at.scale = (of_k ? w.k_scale_head : w.v_scale_head) + batch * t->stride[0] + row * t->stride[2];
    }
    return at;
}

/* fa_decode_copy of one tensor, element by element */
template <typename S, int LDS, int DP>
__device__ __noinline__ void fa_decode_gather(S *to, const fa_tensor *t, int64_t at)
{
    const int d = (int)t->size[3], lane = threadIdx.x % 32;
    for (int r = 0; r < FA_DECODE_KEYS; r++) {
        const int64_t row = __shfl_sync(0xffffffffu, at, r);
        const S *from = (const S *)t->data + row;
        for (int c = lane; c < DP; c += 32) {
            uint8_t *bytes = (uint8_t *)(to + r * LDS + c);
            if (row >= 0 && c < d)
                to[r * LDS + c] = from[c * t->stride[3]];
            else
                for (int i = 0; i < (int)sizeof(S); i++)
                    bytes[i] = 0;
        }
    }
}

/* A stage <- the keys, values and scales at `at`; what is nowhere and columns past the end of a row become 0. */
template <class C>
__device__ __forceinline__ void fa_decode_copy(char *stage, const fa_decode_params &p, const fa_decode_place &at)
{
    using S = typename C::S;
    constexpr int VEC = 16 / (int)sizeof(S), CHUNKS = C::DP / VEC, LANES = CHUNKS < 32 ? CHUNKS : 32;
    const fa_args *a = &p.a;
    S *sK = (S *)stage, *sV = (S *)(stage + C::TILE);
    const int lane = threadIdx.x % 32;
    if (C::WIDEN && a->scale_per_token) {
        const float *from = (const float *)(lane < FA_DECODE_KEYS ? a->k_scale.data : a->v_scale.data);
        ptx_cp_async_4(stage + 2 * C::TILE + lane * 4, at.k < 0 ? from : from + at.scale, at.k < 0 ? 0 : 4);
    }
    if (C::MOD && !p.k_vectors) {
        fa_decode_gather<S, C::LDS, C::DP>(sK, &a->k, at.k);
        fa_decode_gather<S, C::LDS, C::DP>(sV, &a->v, at.v);
        return;
    }
    const S *k = (const S *)a->k.data, *v = (const S *)a->v.data;
    const int d = (int)a->q.size[3], dv = (int)a->v.size[3];
#pragma unroll
    for (int r = 0; r < FA_DECODE_KEYS; r += 32 / LANES) {
        const int row = r + lane / LANES;
        const int64_t k_at = __shfl_sync(0xffffffffu, at.k, row), v_at = __shfl_sync(0xffffffffu, at.v, row);
#pragma unroll
        for (int c = lane % LANES * VEC; c < C::DP; c += LANES * VEC) {
            const bool has_k = k_at >= 0 && c < d, has_v = v_at >= 0 && c < dv;
            ptx_cp_async(sK + row * C::LDS + c, has_k ? k + k_at + c : k, has_k ? 16 : 0);
            ptx_cp_async(sV + row * C::LDS + c, has_v ? v + v_at + c : v, has_v ? 16 : 0);
        }
    }
}

/* ---- one tile ---------------------------------------------------------------------------------------------------- */

/* The running softmax of a lane's two rows: rows g and g + 8 of the block, over the warp's keys. */
template <int NA> struct fa_decode_sums {
    float acc[NA][4], max[2], sum[2]; /* sum: of this lane's columns only */
    float unit;                       /* acc is in units of it: scales of single values may be far from 1 */
};

template <int NA> __device__ __forceinline__ void fa_decode_start(fa_decode_sums<NA> &r)
{
#pragma unroll
    for (int n = 0; n < NA; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            r.acc[n][e] = 0;
    r.max[0] = r.max[1] = -INFINITY;
    r.sum[0] = r.sum[1] = 0;
    r.unit = FLT_MIN;
}

/* From products to scores in units of log2. Roundings are named, so that they are the same in every instance. */
template <class C>
__device__ __forceinline__ void fa_decode_score(float (&s)[2][4], const fa_decode_row (&rows)[2],
                                                const fa_scores &common, int k0, bool edges, const float *sScale)
{
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const fa_decode_row &row = rows[e / 2];
            const int at = n * 8 + t * 2 + e % 2, j = k0 + at;
            float x = __fmul_rn(s[n][e], common.scale);
            if (C::WIDEN && sScale)
                x = __fmul_rn(x, sScale[at]);
            if (C::MOD && common.cap > 0)
                x = __fmul_rn(common.cap, tanhf(x));
            bool hidden = edges && (j < row.lo || j >= row.hi);
            if (C::MOD && common.mask && !hidden) {
                fa_scores own = common;
                own.mask = row.mask;
                const float y = fa_mask_value(own, 0, j);
                hidden = y == -INFINITY;
                x = __fadd_rn(x, y);
            }
            if (C::MOD && common.alibi)
                x = fmaf(-row.slope, fabsf((float)(row.position - j)), x);
            s[n][e] = hidden ? -INFINITY : x;
        }
}

/* Brings the sums to the maximum that the tile makes; s <- weights */
template <int NA> __device__ __forceinline__ void fa_decode_softmax(float (&s)[2][4], fa_decode_sums<NA> &r)
{
    float shrink[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float top = fmaxf(fmaxf(s[0][2 * i], s[0][2 * i + 1]), fmaxf(s[1][2 * i], s[1][2 * i + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(r.max[i], fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2)));
        const float base = top == -INFINITY ? 0 : top; /* nothing seen yet: every weight is 2^-inf = 0 */
        shrink[i] = ptx_exp2(r.max[i] - base);
        r.max[i] = top;
        float sum = 0;
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int e = 2 * i; e < 2 * i + 2; e++) {
                s[n][e] = ptx_exp2(s[n][e] - base);
                sum += s[n][e];
            }
        r.sum[i] = fmaf(r.sum[i], shrink[i], sum);
    }
    if (__any_sync(0xffffffffu, shrink[0] != 1 || shrink[1] != 1)) {
#pragma unroll
        for (int n = 0; n < NA; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                r.acc[n][e] *= shrink[e / 2];
    }
}

/* Weights times the scales of their values, brought near to 1 by a power of two: fp16 has few exponents. */
template <int NA>
__device__ __forceinline__ void fa_decode_scale_weights(float (&s)[2][4], fa_decode_sums<NA> &r, const float *sScale)
{
    const int t = threadIdx.x % 4;
    float most = 0;
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float scale = sScale[n * 8 + t * 2 + e % 2];
            if (s[n][e] != 0) { /* what a hidden key is scaled by may be anything */
                most = fmaxf(most, fabsf(scale));
                s[n][e] *= scale;
            }
        }
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
    const float power = __uint_as_float(__float_as_uint(fminf(most, FLT_MAX)) & 0x7f800000);
    if (power > r.unit) {
        const float shrink = r.unit / power;
        r.unit = power;
#pragma unroll
        for (int n = 0; n < NA; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                r.acc[n][e] *= shrink;
    }
    const float by = 1 / r.unit;
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            s[n][e] *= by;
}

/* bit r: row r of a tile of V holds NaN or infinity */
template <typename T, int LD, int DP> __device__ __noinline__ uint32_t fa_decode_find_wild(const T *sV)
{
    const int lane = threadIdx.x % 32;
    bool found = false;
    for (int c = lane / 16; c < DP; c += 2)
        found |= fa_is_wild(sV[lane % 16 * LD + c]);
    const uint32_t rows = __ballot_sync(0xffffffffu, found);
    return (rows | rows >> 16) & 0xffff;
}

/* Rows of V that hold NaN or infinity go one by one to the queries that give them a weight, and then become 0. */
template <class C>
__device__ static void fa_decode_wild(const float (&w)[2][4], fa_decode_sums<C::NA> &r, typename C::T *sV)
{
    using T = typename C::T;
    const int lane = threadIdx.x % 32, t = lane % 4;
    for (uint32_t left = fa_decode_find_wild<T, C::LD, C::DP>(sV); left; left &= left - 1) {
        const int j = __ffs(left) - 1;
        T *row = sV + j * C::LD;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float weight = j < 8 ? (j % 2 ? w[0][2 * i + 1] : w[0][2 * i]) : (j % 2 ? w[1][2 * i + 1] : w[1][2 * i]);
            weight = __shfl_sync(0xffffffffu, weight, lane / 4 * 4 + j % 8 / 2);
            if (weight == 0)
                continue;
#pragma unroll
            for (int n = 0; n < C::NA; n++) {
                r.acc[n][2 * i] += weight * fa_to_f32(row[n * 8 + 2 * t]);
                r.acc[n][2 * i + 1] += weight * fa_to_f32(row[n * 8 + 2 * t + 1]);
            }
        }
        __syncwarp();
        for (int c = lane; c < C::DP; c += 32)
            row[c] = fa_from<T>(0);
        __syncwarp();
    }
}

/* A tile as the products read it. */
template <class C> __device__ __forceinline__ typename C::T *fa_decode_operand(char *tile, char *wide)
{
    if constexpr (C::WIDEN) {
        typename C::T *to = (typename C::T *)wide;
        fa_widen_tile<typename C::T, typename C::S, FA_DECODE_KEYS, C::DP>(to, C::LD, (const typename C::S *)tile,
                                                                           C::LDS);
        return to;
    } else {
        return (typename C::T *)tile;
    }
}

template <class C>
__device__ __forceinline__ void fa_decode_tile(fa_decode_sums<C::NA> &r, const fa_decode_params &p,
                                               const fa_decode_work &w, const fa_decode_row (&rows)[2],
                                               const fa_scores &scores, const typename C::T *sQ, char *stage,
                                               char *wide, int k0)
{
    using T = typename C::T;
    const bool edges = k0 < w.all_lo || k0 + FA_DECODE_KEYS > w.all_hi;
    const float *sScale = C::WIDEN && p.a.scale_per_token ? (const float *)(stage + 2 * C::TILE) : NULL;
    float s[2][4];
    const T *sK = fa_decode_operand<C>(stage, wide);
    fa_product_nk<T, 2>(s, sQ, C::LD, 0, sK, C::LD, C::MOD ? (int)((p.a.q.size[3] + 15) / 16 * 16) : C::DP);
    fa_decode_score<C>(s, rows, scores, k0, edges, sScale);
    fa_decode_softmax(s, r);
    if (C::WIDEN && sScale)
        fa_decode_scale_weights(s, r, sScale + FA_DECODE_KEYS);
    T *sV = fa_decode_operand<C>(stage + C::TILE, wide);
    if (edges || (C::MOD && scores.mask))
        fa_decode_wild<C>(s, r, sV);
    fa_product_kn<T>(r.acc, s, sV, C::LD);
}

/* ---- the end of a part ------------------------------------------------------------------------------------------- */

/* What the block shares besides tiles. */
template <class C> struct fa_decode_ends {
    float max[C::WARPS][FA_DECODE_ROWS], sum[C::WARPS][FA_DECODE_ROWS];
    float scale[FA_DECODE_ROWS]; /* of the rows' sums; 0: the row is 0 */
    float *sums[C::WARPS];       /* each warp's: [16][LDO] */
};

/* Maximum and sum of all warps: to the workspace, or to lse. Returns what this warp's sums are multiplied by. */
template <class C>
__device__ __forceinline__ float fa_decode_end_row(const fa_decode_params &p, const fa_decode_work &w,
                                                   fa_decode_ends<C> &ends, int row, int part)
{
    const fa_args *a = &p.a;
    float top = -INFINITY, sum = 0;
#pragma unroll
    for (int i = 0; i < C::WARPS; i++)
        top = fmaxf(top, ends.max[i][row]);
    const float base = top == -INFINITY ? 0 : top;
#pragma unroll
    for (int i = 0; i < C::WARPS; i++)
        sum = fmaf(ptx_exp2(ends.max[i][row] - base), ends.sum[i][row], sum);
    if (threadIdx.x < 32 && threadIdx.x % 4 == 0) {
        const int query = fa_decode_query(p, w, row), h = fa_decode_head(p, w, row);
        if (w.cut.parts > 1) {
            const int64_t at = (w.seq.n * a->q.size[1] + h) * a->q.size[2] + query;
            ((float2 *)p.sums)[at * p.parts + part] = make_float2(top, sum);
        } else {
            fa_row_end end = {0, -INFINITY};
            if (query < w.seq.span.q_len)
                end = fa_finish_row(a, w.seq.n, h, top, sum);
            ((float *)a->lse.data)[fa_q_at(&w.seq, &a->lse, h, query)] = (float)end.lse;
            ends.scale[row] = end.scale;
        }
    }
    return ptx_exp2(ends.max[threadIdx.x / 32][row] - base);
}

/* The warps' sums in their order: to out, or to the workspace. */
template <class C>
__device__ __forceinline__ void fa_decode_store(const fa_decode_params &p, const fa_decode_work &w,
                                                const fa_decode_ends<C> &ends, int part)
{
    const fa_args *a = &p.a;
    const int dv = (int)a->v.size[3];
    const float by = C::WIDEN && !a->scale_per_token ? fa_scale_at(a, &w.seq, &a->v_scale, w.hk, 0) : 1;
    for (int row = 0; row < w.rows; row++) {
        const int query = fa_decode_query(p, w, row), h = fa_decode_head(p, w, row);
        const int64_t at = (w.seq.n * a->q.size[1] + h) * a->q.size[2] + query;
        const float scale = ends.scale[row];
        for (int c = threadIdx.x; c < dv; c += C::THREADS) {
            float x = 0;
#pragma unroll
            for (int i = 0; i < C::WARPS; i++)
                x += ends.sums[i][row * C::LDO + c];
            x = __fmul_rn(x, by);
            if (w.cut.parts > 1)
                p.values[(at * p.parts + part) * dv + c] = x;
            else
                ((typename C::T *)a->out.data)[fa_q_at(&w.seq, &a->out, h, query) + c * a->out.stride[3]] =
                    fa_from<typename C::T>(scale == 0 ? 0 : x * scale);
        }
    }
}

/* own: room for this warp's sums */
template <class C>
__device__ __forceinline__ void fa_decode_end(fa_decode_sums<C::NA> &r, const fa_decode_params &p,
                                              const fa_decode_work &w, fa_decode_ends<C> &ends, float *own, int part)
{
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        r.sum[i] += __shfl_xor_sync(0xffffffffu, r.sum[i], 1);
        r.sum[i] += __shfl_xor_sync(0xffffffffu, r.sum[i], 2);
        if (t == 0) {
            ends.max[warp][g + 8 * i] = r.max[i];
            ends.sum[warp][g + 8 * i] = r.sum[i];
        }
    }
    if (threadIdx.x % 32 == 0)
        ends.sums[warp] = own;
    __syncthreads();
    const float unit = C::WIDEN && p.a.scale_per_token ? r.unit : 1;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = g + 8 * i;
        if (row >= w.rows)
            continue;
        const float by = fa_decode_end_row<C>(p, w, ends, row, part) * unit;
#pragma unroll
        for (int n = 0; n < C::NA; n++)
            *(float2 *)(own + row * C::LDO + n * 8 + 2 * t) =
                make_float2(r.acc[n][2 * i] * by, r.acc[n][2 * i + 1] * by);
    }
    __syncthreads();
    fa_decode_store<C>(p, w, ends, part);
    __syncthreads();
}

/* ---- the block --------------------------------------------------------------------------------------------------- */

/* A warp's ring: tile i holds the keys from key(i) on. */
template <class C> struct fa_decode_ring {
    char *wide, *stages;
    fa_decode_place next; /* of the tile that is copied next */

    __device__ __forceinline__ char *stage(int i) const
    {
        return stages + i % C::STAGES * C::STAGE;
    }

    __device__ __forceinline__ int key(const fa_decode_work &w, int i) const
    {
        return w.k_lo + FA_DECODE_KEYS * (int)(threadIdx.x / 32 + C::WARPS * i);
    }

    /* Begins the copy of tile i, and looks up where tile i + 1 lies. */
    __device__ __forceinline__ void copy(const fa_decode_params &p, const fa_decode_work &w, int i)
    {
        if (key(w, i) < w.k_hi) {
            fa_decode_copy<C>(stage(i), p, next);
            next = fa_decode_find<C>(p, w, key(w, i + 1));
        }
        ptx_cp_async_commit();
    }
};

template <class C>
__global__ void __launch_bounds__(C::THREADS, 2) fa_decode_kernel(const __grid_constant__ fa_decode_params p)
{
    extern __shared__ __align__(16) char smem[];
    ptx_grid_launch_dependents();
    fa_decode_work w;
    if (!fa_decode_work_of(&w, p))
        return;
    typename C::T *sQ = (typename C::T *)smem;
    fa_decode_ends<C> &ends = *(fa_decode_ends<C> *)(smem + C::QUERY);
    fa_decode_ring<C> ring;
    ring.wide = smem + C::QUERY + C::ENDS + threadIdx.x / 32 * C::WARP_BYTES;
    ring.stages = ring.wide + C::WIDE;
    ring.next = fa_decode_find<C>(p, w, ring.key(w, 0));
    for (int i = 0; i < C::STAGES - 1; i++)
        ring.copy(p, w, i);
    fa_decode_load_q<C>(sQ, p, w);
    fa_decode_row rows[2];
    fa_scores scores;
    fa_decode_rows_of<C>(rows, &scores, p, w);
    if (C::WIDEN && !p.a.scale_per_token)
        scores.scale *= fa_scale_at(&p.a, &w.seq, &p.a.k_scale, w.hk, 0);
    __syncthreads();

    int i = 0;
    for (int part = 0; part < w.parts; part++) {
        fa_decode_sums<C::NA> r;
        fa_decode_start(r);
        const int end = min(w.k_hi, w.k_lo + (part + 1) * w.cut.part);
        for (; ring.key(w, i) < end; i++) {
            ptx_cp_async_wait<C::STAGES - 2>();
            __syncwarp();
            ring.copy(p, w, i + C::STAGES - 1);
            fa_decode_tile<C>(r, p, w, rows, scores, sQ, ring.stage(i), ring.wide, ring.key(w, i));
        }
        /* the stage behind the tiles under way is free */
        float *own = (float *)(C::WIDEN ? ring.wide : ring.stage(i + C::STAGES - 1));
        fa_decode_end<C>(r, p, w, ends, own, w.part + part);
    }
}

#endif
