/* What the kernels of sm_80 share: their parameters and how a tile is cut. Launchers are in sm80_*.cu. */
#ifndef FA_SM80_CUH
#define FA_SM80_CUH

#include "../cuda.h"
#include "../tile/tile_product.cuh"
#include "../tile/tile_score.cuh"

/* Which tensors can be read, or written, in vectors; in the order of fa_sm80_vectors. */
enum { FA_VEC_Q = 1, FA_VEC_K = 2, FA_VEC_V = 4, FA_VEC_DOUT = 8, FA_VEC_OUT = 16, FA_VEC_DQ = 32,
       FA_VEC_DK = 64, FA_VEC_DV = 128 };

struct fa_sm80_params {
    fa_args a;
    int vectors;                /* FA_VEC_* */
    int64_t slots;              /* tiles of rows: fa_tile_slots */
    int mask_width;             /* columns of the mask that is read in vectors; 0: it is not */
    size_t mask_bytes;          /* of shared memory for it where rows are queries */
    int64_t splits, split_keys; /* forward: parts of the keys, a multiple of the tile's */
    float *partial;             /* [splits][B HQ SQ][2 + DV] where the keys are split */
    const float *lse2, *delta;  /* backward: [B HQ][rows], smxx_rows.cu */
    int64_t rows;
    float keep;                 /* fa_dropout_factor */
};

/* Tiles of columns of a mask's gradient that a block sums. */
enum { FA_DMASK_TILES = 4 };

/* Tiles for head dimensions up to dp. Forward: warps of 16 mt query rows, `cols` keys. Backward: warps of 16 mt rows,
 * `cols` columns; da: the columns of a result that one block sums. */
struct fa_sm80_tile {
    int dp, warps, mt, cols, da;
};

/* mod: not the plain kernel; masks need shared memory beside the tiles */
constexpr fa_sm80_tile fa_fwd_tile(int dp, bool f32, bool mod)
{
    return dp <= 64    ? fa_sm80_tile{64, 4, 2, 64, 64}
           : dp == 128 ? fa_sm80_tile{128, 4, 2, f32 ? 32 : 64, 128}
           : dp == 256 ? fa_sm80_tile{256, 4, 1, f32 ? 16 : mod ? 32 : 64, 256}
                       : fa_sm80_tile{512, 2, 1, f32 ? 16 : 32, 256};
}

/* keys: the rows are keys, and results dK and dV; else queries, and dQ */
constexpr fa_sm80_tile fa_bwd_tile(int dp, bool f32, bool keys)
{
    return dp <= 64    ? fa_sm80_tile{64, 4, f32 ? 1 : 2, 32, 64}
           : dp == 128 ? fa_sm80_tile{128, 4, f32 || keys ? 1 : 2, 32, 128}
           : dp == 256 ? fa_sm80_tile{256, f32 ? 2 : 4, 1, f32 ? 16 : 32, 128}
                       : fa_sm80_tile{512, f32 ? 1 : 2, 1, 16, 128};
}

constexpr int fa_tile_rows(fa_sm80_tile t)
{
    return 16 * t.mt * t.warps;
}

/* bytes of shared memory of a forward and of a backward block; esize: bytes of an element */
constexpr size_t fa_fwd_bytes(fa_sm80_tile t, size_t esize)
{
    return (size_t)(fa_tile_rows(t) + t.cols) * (t.dp * esize + 16) + (size_t)t.cols * (t.da * esize + 16);
}

/* and what a mask needs beside the tiles where rows are queries; its elements have esize bytes */
constexpr size_t fa_mask_bytes(fa_sm80_tile t, size_t esize)
{
    return (size_t)fa_tile_rows(t) * t.cols * esize;
}

/* Tiles of columns that backward has in shared memory: the next is copied beside the work on one. */
constexpr int fa_bwd_stages(int dp, size_t esize)
{
    return dp <= 128 && esize == 2 ? 2 : 1;
}

constexpr size_t fa_bwd_bytes(fa_sm80_tile t, size_t esize)
{
    const size_t stage = (size_t)t.cols * (2 * (t.dp * esize + 16) + 8);
    return (size_t)(2 * fa_tile_rows(t)) * (t.dp * esize + 16) + fa_bwd_stages(t.dp, esize) * stage + 16;
}

/* One compiled pass for a pair of head dimension and dtype (sm80_fwd_tmpl.cu, sm80_bwd_tmpl.cu): with all options, or,
 * plain, for calls that need no more than ranges of keys. */
typedef fa_status fa_sm80_launch(const char *name, const fa_sm80_params &p, int64_t blocks, cudaStream_t stream,
                                 fa_error *err);

#define FA_SM80_DECLARE(pass, type)                                                                                    \
    fa_sm80_launch fa_##pass##_sm80_##type##_hd64, fa_##pass##_sm80_##type##_hd128, fa_##pass##_sm80_##type##_hd256,   \
        fa_##pass##_sm80_##type##_hd512, fa_##pass##_sm80_##type##_hd64_plain, fa_##pass##_sm80_##type##_hd128_plain,  \
        fa_##pass##_sm80_##type##_hd256_plain;
#define FA_SM80_DECLARE_TYPES(pass)                                                                                    \
    FA_SM80_DECLARE(pass, f32)                                                                                         \
    FA_SM80_DECLARE(pass, bf16)                                                                                        \
    FA_SM80_DECLARE(pass, f16)                                                                                         \
    FA_SM80_DECLARE(pass, tf32)
FA_SM80_DECLARE_TYPES(fwd)
FA_SM80_DECLARE_TYPES(dkv)
FA_SM80_DECLARE_TYPES(dq)
FA_SM80_DECLARE_TYPES(dmask)

/* place of a call's head dimensions among these: 64, 128, 256, 512 */
static inline int fa_sm80_dim(const fa_args *a)
{
    int64_t d = fa_max64(a->q.size[3], a->v.size[3]);
    return d <= 64 ? 0 : d <= 128 ? 1 : d <= 256 ? 2 : 3;
}

/* rows: of the tiles that a block streams */
static inline int fa_sm80_vectors(const fa_args *a, int rows)
{
    const fa_tensor *const t[] = {&a->q, &a->k, &a->v, &a->dout, &a->out, &a->dq, &a->dk, &a->dv};
    int vectors = 0;
    for (int i = 0; i < 8; i++)
        if (t[i]->data && t[i]->dtype == a->q.dtype && fa_tiles_are_vectors(a, t[i], rows))
            vectors |= 1 << i;
    return vectors;
}

/* Does a call need more than ranges of keys? */
static inline bool fa_sm80_is_mod(const fa_args *a)
{
    return a->mask.data || a->tree_mask.data || a->softcap > 0 || a->alibi.data || a->dropout_p > 0;
}

__device__ __forceinline__ fa_load_rows fa_rows_q(const fa_args *a, const fa_seq *s, const fa_tensor *t, int64_t head,
                                                  bool vectors)
{
    return {a, s, t, NULL, head, false, vectors, NULL};
}

__device__ __forceinline__ fa_load_rows fa_rows_k(const fa_args *a, const fa_seq *s, const fa_tensor *t,
                                                  const fa_tensor *scale, int64_t head, bool vectors)
{
    return {a, s, t, scale->data ? scale : NULL, head, true, vectors, NULL};
}

/* element of row 0 of head h of k or v, or of page 0 */
__device__ __forceinline__ int64_t fa_first_key_at(const fa_args *a, const fa_seq *s, const fa_tensor *t, int64_t h)
{
    return h * t->stride[1] + (a->page_size ? 0 : s->k_batch * t->stride[0] + s->k_row * t->stride[2]);
}

/* Results of a warp, each row times its factor, to rows first .. below limit of t, from column c0 on; row i lies at
 * at(i). They go through `stage`, shared memory of the warp, of LDB bytes a row, so that they are written in vectors
 * where t allows. */
template <typename T, int LDB, int MT, int NA, class At>
__device__ __forceinline__ void fa_store_rows(char *stage, const fa_tensor *t, const float (&acc)[MT][NA][4],
                                              const float (&factor)[2 * MT], int64_t first, int64_t limit, int c0,
                                              bool vectors, At at)
{
    constexpr int WORD = 16 / (int)sizeof(T), LANES = 8 * NA / WORD < 16 ? 8 * NA / WORD : 16;
    const int lane = threadIdx.x % 32, d = (int)t->size[3] - c0;
    __syncwarp();
#pragma unroll
    for (int x = 0; x < 2 * MT; x++)
#pragma unroll
        for (int n = 0; n < NA; n++) {
            T *row = (T *)(stage + (lane / 4 + 8 * x) * LDB);
            const float lo = acc[x / 2][n][x % 2 * 2] * factor[x], hi = acc[x / 2][n][x % 2 * 2 + 1] * factor[x];
            if constexpr (sizeof(T) == 2)
                *(uint32_t *)(row + fa_column<T>(n, 0)) = fa_pack(lo, hi, T());
            else
                row[fa_column<T>(n, 0)] = lo, row[fa_column<T>(n, 1)] = hi;
        }
    __syncwarp();
#pragma unroll 1
    for (int i = lane / LANES; i < 16 * MT && first + i < limit; i += 32 / LANES) {
        const T *from = (const T *)(stage + i * LDB);
        T *to = (T *)t->data + at(first + i) + c0 * t->stride[3];
#pragma unroll 1
        for (int c = lane % LANES * WORD; c < 8 * NA && c < d; c += LANES * WORD) {
            if (vectors)
                *(uint4 *)(to + c) = *(const uint4 *)(from + c);
            else
                for (int e = c; e < c + WORD && e < d; e++)
                    to[e * t->stride[3]] = from[e];
        }
    }
}

template <int MT, int NA> __device__ __forceinline__ void fa_zero(float (&x)[MT][NA][4])
{
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NA; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                x[m][n][e] = 0;
}

template <typename X> __device__ __forceinline__ void fa_copy(X &to, const X &from)
{
    constexpr int N = sizeof(X) / sizeof(float);
#pragma unroll
    for (int n = 0; n < N; n++)
        ((float *)&to)[n] = ((const float *)&from)[n];
}

/* the n-th four of a lane's columns */
template <int NT>
__device__ __forceinline__ float (&fa_four_columns(float (&x)[1][NT][4], int n))[1][2][4]
{
    return *(float(*)[1][2][4])x[0][2 * n];
}

template <int MT, int NA> __device__ __forceinline__ void fa_add(float (&x)[MT][NA][4], const float (&y)[MT][NA][4])
{
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NA; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                x[m][n][e] += y[m][n][e];
}

/* Does a sum hold NaN or infinity? */
template <int MT, int NA> __device__ __forceinline__ bool fa_spoilt(const float (&x)[MT][NA][4])
{
    float zero = 0;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NA; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                zero = fmaf(x[m][n][e], 0, zero);
    return zero != 0;
}

#endif
