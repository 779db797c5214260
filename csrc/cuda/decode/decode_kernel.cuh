/* Few query rows against many keys: K and V are streamed once. A block has the query rows of one key head (up to 16, of
 * all its query heads) and a run of parts of a sequence's keys. Its warps take tiles of 16 keys in turn, each with a
 * ring of them in shared memory of its own, so that they meet only at the end of a part, where their sums are merged.
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

/* T: of the query; S: as keys are stored, T or bytes; DP: head dimensions up to it. MOD: also what is no vectors, masks,
 * softcap, ALiBi, q_seqlens. */
template <typename T_, typename S_, int DP_, bool MOD_> struct fa_decode_config {
    using T = T_;
    using S = S_;
    static constexpr int DP = DP_, NA = DP / 8, LD = fa_tile_ld<T>(DP), LDS = fa_tile_ld<S>(DP), LDO = DP + 4;
    static constexpr bool MOD = MOD_, WIDEN = !std::is_same<T, S>::value;
    static constexpr int WARPS = sizeof(T) * DP > 512 ? 2 : 4, THREADS = 32 * WARPS;
    static constexpr size_t TILE = FA_DECODE_KEYS * LDS * sizeof(S), SCALES = WIDEN ? 2 * FA_DECODE_KEYS * 4 : 0;
    static constexpr size_t STAGE = 2 * TILE + SCALES;
    /* room for widened keys and values; the merge of a part takes that, or a stage */
    static constexpr size_t WIDE = WIDEN ? 2 * FA_DECODE_KEYS * LD * sizeof(T) : 0;
    static constexpr size_t QUERY = FA_DECODE_ROWS * LD * sizeof(T), ENDS = (WARPS + 1) * FA_DECODE_ROWS * 8 + 32;
    /* two blocks to a multiprocessor where that leaves three stages, else one */
    static constexpr size_t HALF = (112 << 10) - QUERY - ENDS - WARPS * WIDE, WHOLE = HALF + (112 << 10);
    static constexpr size_t FIT = HALF / (WARPS * STAGE) >= 3 ? HALF / (WARPS * STAGE) : WHOLE / (WARPS * STAGE);
    static constexpr int STAGES = FIT > 6 ? 6 : (int)FIT;
    static constexpr size_t WARP_BYTES = WIDE + STAGES * STAGE;
    static constexpr size_t SHARED = QUERY + ENDS + WARPS * WARP_BYTES;
    static_assert((WIDEN ? WIDE : STAGE) >= FA_DECODE_ROWS * LDO * 4, "the sums of a warp must have room");
    static_assert(STAGES >= 3, "two tiles under way and one in use");
};

/* What the block has to do. */
struct fa_decode_work {
    fa_decode_sequence seq;
    int n, hk, first_row, rows; /* sequence, key head, first of its query rows, and their number */
    int part, parts;            /* its run */
    int k_lo, k_hi;             /* keys of the run */
    int all_lo, all_hi;         /* keys that every row sees */
};

/* query of row r of the block, and its head */
__device__ __forceinline__ int fa_decode_query(const fa_decode_params &p, const fa_decode_work &w, int r)
{
    return (unsigned)(w.first_row + r) / p.group;
}
__device__ __forceinline__ int fa_decode_head(const fa_decode_params &p, const fa_decode_work &w, int r)
{
    return w.hk * p.group + (unsigned)(w.first_row + r) % p.group;
}

template <class C> __device__ __forceinline__ bool fa_decode_work_of(fa_decode_work *w, const fa_decode_params &p)
{
    w->n = blockIdx.z;
    w->hk = p.tiles == 1 ? blockIdx.x : blockIdx.x / p.tiles;
    w->first_row = (blockIdx.x - w->hk * p.tiles) * FA_DECODE_ROWS;
    w->rows = min(FA_DECODE_ROWS, p.rows - w->first_row);
    const fa_decode_sequence s = fa_decode_sequence_of(p, w->n, C::MOD);
    const int run = fa_decode_run(p.keys_wanted, s.part);
    w->seq = s;
    w->part = blockIdx.y * run;
    w->parts = min(run, s.parts - w->part);
    w->k_lo = s.lo + w->part * s.part;
    w->k_hi = min(s.hi, w->k_lo + w->parts * s.part);
    const int first = fa_decode_query(p, *w, 0), last = fa_decode_query(p, *w, w->rows - 1);
    w->all_lo = last + s.offset - p.left;
    w->all_hi = last < s.q_len ? min(s.k_len, first + s.offset + p.right + 1) : 0;
    return w->parts > 0;
}

/* sQ <- the block's query rows, padded with zeros */
template <class C>
__device__ __forceinline__ void fa_decode_load_q(typename C::T *sQ, const fa_decode_params &p, const fa_decode_work &w)
{
    using T = typename C::T;
    constexpr int VEC = 16 / (int)sizeof(T), CHUNKS = C::DP / VEC;
#pragma unroll 1
    for (int x = threadIdx.x; x < FA_DECODE_ROWS * CHUNKS; x += C::THREADS) {
        const int r = x / CHUNKS, c = x % CHUNKS * VEC;
        T *to = sQ + r * C::LD + c;
        if (r >= w.rows || c >= p.d) {
            *(uint4 *)to = make_uint4(0, 0, 0, 0);
            continue;
        }
        const T *from = (const T *)(p.q.data + w.n * p.q.batch + fa_decode_head(p, w, r) * p.q.head +
                                    fa_decode_query(p, w, r) * p.q.row);
        if (p.q_vectors)
            *(uint4 *)to = *(const uint4 *)(from + c);
        else
            for (int i = 0; i < VEC; i++)
                to[i] = c + i < p.d ? from[(c + i) * p.a.q.stride[3]] : fa_from<T>(0);
    }
}

/* elements to the scale of a head where it is not given per token */
__device__ __forceinline__ int64_t fa_decode_scale_at(const fa_tensor *t, const fa_decode_work &w)
{
    return (t->size[0] > 1 ? w.n * t->stride[0] : 0) + (t->size[1] > 1 ? w.hk * t->stride[1] : 0);
}

/* ---- tiles of keys into a stage ---------------------------------------------------------------------------------- */

/* What a lane keeps to copy tiles: its own row and columns of the head, of the first tile of keys that there are. */
template <class C> struct fa_decode_source {
    static constexpr int SIZE = (int)sizeof(typename C::S), CHUNKS = C::DP * SIZE / 16;
    static constexpr int LANES = CHUNKS < 32 ? CHUNKS : 32, ROWS = 32 / LANES; /* ROWS rows at a time */
    const char *k, *v;
    int64_t entry; /* the table's for key lane % 16 of the tile that is copied next */
    uint64_t policy;
};

template <class C>
__device__ __forceinline__ void fa_decode_look_up(fa_decode_source<C> &from, const fa_decode_params &p,
                                                  const fa_decode_work &w, int k0)
{
    const int j = k0 + threadIdx.x % FA_DECODE_KEYS;
    if (!p.table || j >= w.k_hi)
        return;
    const int page = p.regular ? j >> p.page_shift : (unsigned)j / p.page_size;
    from.entry = fa_decode_index(p.table, p.table_wide, w.n * p.table_step + page * p.table_page_step);
}

/* Rows that lie at equal distances, all of them keys of the run. */
template <class C>
__device__ __forceinline__ void fa_decode_copy_rows(char *stage, const fa_decode_source<C> &from,
                                                    const fa_decode_params &p, int k0)
{
    using F = fa_decode_source<C>;
    const int lane = threadIdx.x % 32, row0 = p.table ? k0 & ((1 << p.page_shift) - 1) : k0;
    const int64_t page = p.table ? from.entry : 0;
    const char *k = from.k + page * p.k.batch + row0 * p.k.row, *v = from.v + page * p.v.batch + row0 * p.v.row;
    char *to = stage + lane / F::LANES * C::LDS * F::SIZE + lane % F::LANES * 16;
#pragma unroll
    for (int r = 0; r < FA_DECODE_KEYS; r += F::ROWS) {
#pragma unroll
        for (int c = 0; c < F::CHUNKS; c += F::LANES) {
            const int first = (lane % F::LANES + c) * 16;
            char *at = to + r * C::LDS * F::SIZE + c * 16;
            ptx_cp_async_policy(at, k + c * 16, first < p.d * F::SIZE ? 16 : 0, from.policy);
            ptx_cp_async_policy(at + C::TILE, v + c * 16, first < p.dv * F::SIZE ? 16 : 0, from.policy);
        }
        k += F::ROWS * p.k.row;
        v += F::ROWS * p.v.row;
    }
}

/* 16 rows, of which this lane knows number lane % 16: offset `at`, negative where it counts as zeros. */
template <class C>
__device__ __forceinline__ void fa_decode_copy_each(char *to, const char *head, int64_t at, int d, int64_t stride,
                                                    bool vectors)
{
    using S = typename C::S;
    using F = fa_decode_source<C>;
    const int lane = threadIdx.x % 32;
    if (vectors) {
#pragma unroll
        for (int r = 0; r < FA_DECODE_KEYS; r += F::ROWS) {
            const int64_t row = __shfl_sync(0xffffffffu, at, r + lane / F::LANES);
            char *own = to + (r + lane / F::LANES) * C::LDS * F::SIZE;
            for (int c = lane % F::LANES * 16; c < C::DP * F::SIZE; c += F::LANES * 16)
                ptx_cp_async(own + c, head + (row < 0 ? 0 : row + c), row >= 0 && c < d * F::SIZE ? 16 : 0);
        }
        return;
    }
    for (int r = 0; r < FA_DECODE_KEYS; r++) {
        const int64_t row = __shfl_sync(0xffffffffu, at, r);
        S *own = (S *)to + r * C::LDS;
        for (int c = lane; c < C::DP; c += 32) {
            if (row >= 0 && c < d)
                own[c] = ((const S *)(head + row))[c * stride];
            else
                memset(own + c, 0, sizeof(S));
        }
    }
}

/* Rows anywhere: pages of any size, the end of the keys, elements that lie apart. */
template <class C>
__device__ __noinline__ void fa_decode_copy_any(char *stage, const fa_decode_params &p, int n, int hk, int64_t entry,
                                                int k0, int k_hi)
{
    const fa_args *a = &p.a;
    const int lane = threadIdx.x % 32, j = k0 + lane % FA_DECODE_KEYS;
    const int64_t batch = p.table ? entry : n, row = p.table ? (unsigned)j % p.page_size : j;
    const bool inside = j < k_hi && (!p.table || (batch >= 0 && batch < p.pages));
    const char *k = p.k.data + hk * p.k.head, *v = p.v.data + hk * p.v.head;
    fa_decode_copy_each<C>(stage, k, inside ? batch * p.k.batch + row * p.k.row : -1, p.d, a->k.stride[3],
                           p.k_vectors);
    fa_decode_copy_each<C>(stage + C::TILE, v, inside ? batch * p.v.batch + row * p.v.row : -1, p.dv, a->v.stride[3],
                           p.k_vectors);
}

/* The scales of the tile's keys, then of its values. */
template <class C>
__device__ __forceinline__ void fa_decode_copy_scales(char *to, const fa_decode_source<C> &from,
                                                      const fa_decode_params &p, const fa_decode_work &w, int k0)
{
    const int lane = threadIdx.x % 32, j = k0 + lane % FA_DECODE_KEYS;
    const fa_tensor *t = lane < FA_DECODE_KEYS ? &p.a.k_scale : &p.a.v_scale;
    const int64_t batch = p.table ? from.entry : w.n, row = p.table ? (unsigned)j % p.page_size : j;
    const bool inside = j < w.k_hi && (!p.table || (batch >= 0 && batch < p.pages));
    const float *scale = (const float *)t->data;
    if (inside)
        scale += batch * t->stride[0] + (t->size[1] > 1 ? w.hk * t->stride[1] : 0) + row * t->stride[2];
    ptx_cp_async_4(to + lane * 4, scale, inside ? 4 : 0);
}

/* Begins the copy of the tile at k0, and looks up where the warp's next one lies. */
template <class C>
__device__ __forceinline__ void fa_decode_copy(char *stage, fa_decode_source<C> &from, const fa_decode_params &p,
                                               const fa_decode_work &w, int k0)
{
    if (k0 < w.k_hi) {
        if (C::WIDEN && p.a.scale_per_token)
            fa_decode_copy_scales<C>(stage + 2 * C::TILE, from, p, w, k0);
        if (p.regular && k0 + FA_DECODE_KEYS <= w.k_hi && (!p.table || (uint64_t)from.entry < (uint64_t)p.pages))
            fa_decode_copy_rows<C>(stage, from, p, k0);
        else
            fa_decode_copy_any<C>(stage, p, w.n, w.hk, from.entry, k0, w.k_hi);
        fa_decode_look_up<C>(from, p, w, k0 + FA_DECODE_KEYS * C::WARPS);
    }
    ptx_cp_async_commit();
}

template <class C>
__device__ __forceinline__ fa_decode_source<C> fa_decode_source_of(const fa_decode_params &p, const fa_decode_work &w)
{
    using F = fa_decode_source<C>;
    const int lane = threadIdx.x % 32, row = lane / F::LANES, column = lane % F::LANES * 16;
    const int n = p.table ? 0 : w.n;
    return {p.k.data + n * p.k.batch + w.hk * p.k.head + row * p.k.row + column,
            p.v.data + n * p.v.batch + w.hk * p.v.head + row * p.v.row + column, 0, ptx_cache_policy(p.once)};
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

/* What a lane's two query rows are. */
template <class C> struct fa_decode_rows {
    int position[2]; /* their own places among the keys */
    int end[2];      /* they see no key from it on */
    float scale;
    /* with options */
    bool bare; /* none of these */
    fa_scores scores;
    float slope[2];
    const char *mask[2]; /* the row's first element */
};

template <class C>
__device__ __forceinline__ void fa_decode_rows_of(fa_decode_rows<C> *rows, const fa_decode_params &p,
                                                  const fa_decode_work &w)
{
    rows->scale = p.scale;
    rows->bare = !C::MOD || (p.a.softcap == 0 && !p.a.mask.data && !p.a.tree_mask.data && !p.a.alibi.data);
    if (C::WIDEN && !p.a.scale_per_token)
        rows->scale *= ((const float *)p.a.k_scale.data)[fa_decode_scale_at(&p.a.k_scale, w)];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int r = min((int)(threadIdx.x % 32 / 4 + 8 * i), w.rows - 1); /* rows behind the last are as it is */
        const int query = fa_decode_query(p, w, r);
        rows->position[i] = query + w.seq.offset;
        rows->end[i] = query < w.seq.q_len ? w.seq.k_len : 0;
        if (C::MOD) {
            const fa_seq seq = fa_seq_at(&p.a, w.n);
            rows->scores = fa_scores_of(&p.a, &seq, fa_decode_head(p, w, r));
            rows->slope[i] = rows->scores.slope;
            rows->mask[i] = rows->scores.mask;
            if (rows->scores.mask)
                rows->mask[i] += query * rows->scores.mask_q * fa_dtype_width(rows->scores.mask_dtype);
        }
    }
}

/* From products to scores in units of log2. Roundings are named, so that they are the same in every instance. */
template <class C>
__device__ __forceinline__ void fa_decode_score(float (&s)[2][4], const fa_decode_rows<C> &rows,
                                                const fa_decode_params &p, int k0, bool edges, const float *sScale)
{
    const int t = threadIdx.x % 4;
    if (rows.bare && !edges) {
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                s[n][e] = __fmul_rn(s[n][e], rows.scale);
                if (C::WIDEN && sScale)
                    s[n][e] = __fmul_rn(s[n][e], sScale[n * 8 + t * 2 + e % 2]);
            }
        return;
    }
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int i = e / 2, at = n * 8 + t * 2 + e % 2, j = k0 + at, ahead = j - rows.position[i];
            float x = __fmul_rn(s[n][e], rows.scale);
            if (C::WIDEN && sScale)
                x = __fmul_rn(x, sScale[at]);
            if (C::MOD && rows.scores.cap > 0)
                x = __fmul_rn(rows.scores.cap, tanhf(x));
            bool hidden = edges && (j >= rows.end[i] || ahead > p.right || -ahead > p.left);
            if (C::MOD && rows.scores.mask && !hidden) {
                fa_scores own = rows.scores;
                own.mask = rows.mask[i];
                const float y = fa_mask_value(own, 0, j);
                hidden = y == -INFINITY;
                x = __fadd_rn(x, y);
            }
            if (C::MOD && rows.scores.alibi)
                x = fmaf(-rows.slope[i], fabsf((float)ahead), x);
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

/* Keys and values of a stage in the dtype of the query, one behind the other. */
template <class C> __device__ __forceinline__ typename C::T *fa_decode_widened(char *stage, char *wide, bool float8)
{
    using T = typename C::T;
    if constexpr (C::WIDEN) {
        __syncwarp();
        fa_widen_tile<2 * FA_DECODE_KEYS, C::DP>((T *)wide, C::LD, (const uint8_t *)stage, C::LDS, float8);
        __syncwarp();
        return (T *)wide;
    } else {
        return (T *)stage;
    }
}

/* The query rows as an operand: in registers where they have room. */
template <class C> struct fa_decode_operand_q {
    static constexpr bool HELD = sizeof(typename C::T) == 2 && C::DP <= 128;
    fa_frag_a<typename C::T> a[HELD ? C::DP / 16 : 1];
    const typename C::T *sQ;

    __device__ __forceinline__ void load(const typename C::T *tile)
    {
        sQ = tile;
        if (HELD)
#pragma unroll
            for (int k = 0; k < C::DP; k += 16)
                fa_load_a(a[HELD ? k / 16 : 0], tile, C::LD, 0, k);
    }
};

template <class C>
__device__ __forceinline__ void fa_decode_dot(float (&s)[2][4], const fa_decode_operand_q<C> &q,
                                              const typename C::T *sK)
{
    using T = typename C::T;
    constexpr bool HELD = fa_decode_operand_q<C>::HELD;
#pragma unroll
    for (int x = 0; x < 8; x++)
        s[x / 4][x % 4] = 0;
#pragma unroll HELD ? C::DP / 16 : 4
    for (int k = 0; k < C::DP; k += 16) {
        fa_frag_b<T> b;
        fa_load_b_nk(b, sK, C::LD, 0, k);
        if (HELD) {
            fa_mma(s[0], s[1], q.a[HELD ? k / 16 : 0], b);
        } else {
            fa_frag_a<T> a;
            fa_load_a(a, q.sQ, C::LD, 0, k);
            fa_mma(s[0], s[1], a, b);
        }
    }
}

template <class C>
__device__ __forceinline__ void fa_decode_tile(fa_decode_sums<C::NA> &r, const fa_decode_params &p,
                                               const fa_decode_work &w, const fa_decode_rows<C> &rows,
                                               const fa_decode_operand_q<C> &q, char *stage, char *wide, int k0)
{
    using T = typename C::T;
    const bool edges = k0 < w.all_lo || k0 + FA_DECODE_KEYS > w.all_hi;
    const float *sScale = C::WIDEN && p.a.scale_per_token ? (const float *)(stage + 2 * C::TILE) : NULL;
    T *sK = fa_decode_widened<C>(stage, wide, p.float8), *sV = sK + FA_DECODE_KEYS * C::LD;
    float s[2][4];
    fa_decode_dot<C>(s, q, sK);
    fa_decode_score<C>(s, rows, p, k0, edges, sScale);
    fa_decode_softmax(s, r);
    if (C::WIDEN && sScale)
        fa_decode_scale_weights(s, r, sScale + FA_DECODE_KEYS);
    if (edges || (C::MOD && rows.scores.mask))
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

/* place of a query row in the workspace */
__device__ __forceinline__ int64_t fa_decode_row_at(const fa_decode_params &p, const fa_decode_work &w, int row)
{
    const int64_t heads = p.heads * p.group;
    return (w.n * heads + fa_decode_head(p, w, row)) * p.queries + fa_decode_query(p, w, row);
}

/* Of a row without further parts: lse; returns what its sums are multiplied by. */
__device__ __noinline__ static float fa_decode_finish(const fa_decode_params &p, int n, int h, int query, bool exists,
                                               float top, float sum)
{
    const fa_tensor *t = &p.a.lse;
    fa_row_end end = {0, -INFINITY};
    if (exists)
        end = fa_finish_row(&p.a, n, h, top, sum);
    ((float *)t->data)[n * t->stride[0] + h * t->stride[1] + query * t->stride[2]] = (float)end.lse;
    return end.scale;
}

template <class C> __device__ __forceinline__ float fa_decode_top(const fa_decode_ends<C> &ends, int row)
{
    float top = ends.max[0][row];
#pragma unroll
    for (int i = 1; i < C::WARPS; i++)
        top = fmaxf(top, ends.max[i][row]);
    return top;
}

/* Maximum and sum of all warps, by one thread for each row: to the workspace, or to lse. */
template <class C>
__device__ __forceinline__ void fa_decode_end_rows(const fa_decode_params &p, const fa_decode_work &w,
                                                   fa_decode_ends<C> &ends, int part)
{
    const int row = threadIdx.x;
    if (row >= w.rows)
        return;
    const float top = fa_decode_top<C>(ends, row), base = top == -INFINITY ? 0 : top;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < C::WARPS; i++)
        sum = fmaf(ptx_exp2(ends.max[i][row] - base), ends.sum[i][row], sum);
    if (w.seq.parts > 1) {
        ((float2 *)p.sums)[fa_decode_row_at(p, w, row) * p.parts + part] = make_float2(top, sum);
        return;
    }
    const int query = fa_decode_query(p, w, row);
    ends.scale[row] = fa_decode_finish(p, w.n, fa_decode_head(p, w, row), query, query < w.seq.q_len, top, sum);
}

/* The warps' sums in their order: to out, or to the workspace. A warp takes every fourth row. */
template <class C>
__device__ __forceinline__ void fa_decode_store(const fa_decode_params &p, const fa_decode_work &w,
                                                const fa_decode_ends<C> &ends, int part)
{
    using T = typename C::T;
    const fa_tensor *t = &p.a.out;
    const int lane = threadIdx.x % 32;
    float by = 1;
    if (C::WIDEN && !p.a.scale_per_token)
        by = ((const float *)p.a.v_scale.data)[fa_decode_scale_at(&p.a.v_scale, w)];
    for (int row = threadIdx.x / 32; row < w.rows; row += C::WARPS)
        for (int c = lane * 4; c < p.dv; c += 128) {
            float x[4] = {0, 0, 0, 0};
#pragma unroll
            for (int i = 0; i < C::WARPS; i++) {
                const float4 one = *(const float4 *)(ends.sums[i] + row * C::LDO + c);
                x[0] += one.x, x[1] += one.y, x[2] += one.z, x[3] += one.w;
            }
            if (C::WIDEN)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    x[i] = __fmul_rn(x[i], by);
            if (w.seq.parts > 1) {
                const int64_t at = fa_decode_row_at(p, w, row) * p.parts + part;
                *(float4 *)(p.values + at * ((p.dv + 3) / 4 * 4) + c) = make_float4(x[0], x[1], x[2], x[3]);
                continue;
            }
            const float scale = ends.scale[row];
            T *to = (T *)t->data + w.n * t->stride[0] + fa_decode_head(p, w, row) * t->stride[1] +
                    fa_decode_query(p, w, row) * t->stride[2];
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (c + i < p.dv)
                    to[(c + i) * t->stride[3]] = fa_from<T>(scale == 0 ? 0 : x[i] * scale);
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
        const float top = fa_decode_top<C>(ends, row);
        const float by = ptx_exp2(r.max[i] - (top == -INFINITY ? 0 : top)) * unit;
#pragma unroll
        for (int n = 0; n < C::NA; n++)
            *(float2 *)(own + row * C::LDO + n * 8 + 2 * t) =
                make_float2(r.acc[n][2 * i] * by, r.acc[n][2 * i + 1] * by);
    }
    fa_decode_end_rows<C>(p, w, ends, part);
    __syncthreads();
    fa_decode_store<C>(p, w, ends, part);
    __syncthreads();
}

/* ---- the block --------------------------------------------------------------------------------------------------- */

template <class C> __device__ __forceinline__ char *fa_decode_next(char *stage, char *first)
{
    stage += C::STAGE;
    return stage == first + C::STAGES * C::STAGE ? first : stage;
}

template <class C>
__global__ void __launch_bounds__(C::THREADS, 2) fa_decode_kernel(const __grid_constant__ fa_decode_params p)
{
    extern __shared__ __align__(16) char smem[];
    ptx_grid_launch_dependents();
    fa_decode_work w;
    if (!fa_decode_work_of<C>(&w, p))
        return;
    constexpr int ALL = FA_DECODE_KEYS * C::WARPS; /* keys of a step of all warps */
    typename C::T *sQ = (typename C::T *)smem;
    fa_decode_ends<C> &ends = *(fa_decode_ends<C> *)(smem + C::QUERY);
    char *wide = smem + C::QUERY + C::ENDS + threadIdx.x / 32 * C::WARP_BYTES, *stages = wide + C::WIDE;
    fa_decode_source<C> from = fa_decode_source_of<C>(p, w);
    int k0 = w.k_lo + threadIdx.x / 32 * FA_DECODE_KEYS;
    fa_decode_look_up<C>(from, p, w, k0);
#pragma unroll 1
    for (int i = 0; i < C::STAGES - 1; i++)
        fa_decode_copy<C>(stages + i * C::STAGE, from, p, w, k0 + i * ALL);
    fa_decode_load_q<C>(sQ, p, w);
    fa_decode_rows<C> rows;
    fa_decode_rows_of<C>(&rows, p, w);
    __syncthreads();
    fa_decode_operand_q<C> q;
    q.load(sQ);

    char *now = stages, *ahead = stages + (C::STAGES - 1) * C::STAGE;
#pragma unroll 1
    for (int part = 0; part < w.parts; part++) {
        fa_decode_sums<C::NA> r;
        fa_decode_start(r);
        const int end = min(w.k_hi, w.k_lo + (part + 1) * w.seq.part);
#pragma unroll 1
        for (; k0 < end; k0 += ALL) {
            ptx_cp_async_wait<C::STAGES - 2>();
            __syncwarp();
            fa_decode_copy<C>(ahead, from, p, w, k0 + (C::STAGES - 1) * ALL);
            ahead = fa_decode_next<C>(ahead, stages);
            fa_decode_tile<C>(r, p, w, rows, q, now, wide, k0);
            now = fa_decode_next<C>(now, stages);
        }
        /* the stage that is filled next is free */
        fa_decode_end<C>(r, p, w, ends, (float *)(C::WIDEN ? wide : ahead), w.part + part);
    }
}

#endif
