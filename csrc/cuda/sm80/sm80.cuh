/* What the kernels of sm_80 share: their parameters and how a tile is cut. Launchers are in sm80_*.cu. */
#ifndef FA_SM80_CUH
#define FA_SM80_CUH

#include "../cuda.h"
#include "../tile/tile_product.cuh"
#include "../tile/tile_score.cuh"

/* Which tensors can be read, or written, in vectors. */
enum { FA_VEC_Q = 1, FA_VEC_K = 2, FA_VEC_V = 4, FA_VEC_DOUT = 8, FA_VEC_OUT = 16 };

struct fa_sm80_params {
    fa_args a;
    int vectors;                /* FA_VEC_* */
    int64_t slots;              /* tiles of rows: fa_tile_slots */
    int mask_width;             /* forward: columns of the mask that is read in vectors; 0: it is not */
    size_t shared;              /* forward: bytes of shared memory of a block */
    int64_t splits, split_keys; /* forward: parts of the keys, a multiple of the tile's */
    float *partial;             /* [splits][B HQ SQ][2 + DV] where the keys are split */
    const float *lse2, *delta;  /* backward: [B HQ SQ], smxx_rows.cu */
};

/* Tiles for head dimensions up to dp. Forward: warps of 16 mt query rows, `cols` keys. Backward: warps of 16 mt rows,
 * `cols` columns; da: the columns of a result that one block sums. */
struct fa_sm80_tile {
    int dp, warps, mt, cols, da;
};

constexpr fa_sm80_tile fa_fwd_tile(int dp, bool f32, bool mod)
{
    return dp <= 64    ? fa_sm80_tile{64, 4, 2, 64, 64}
           : dp == 128 ? fa_sm80_tile{128, 4, 2, f32 ? 32 : 64, 128}
           : dp == 256 ? fa_sm80_tile{256, 4, 1, f32 ? 16 : mod ? 32 : 64, 256}
                       : fa_sm80_tile{512, 2, 1, f32 ? 16 : 32, 256};
}

constexpr fa_sm80_tile fa_bwd_tile(int dp, bool f32)
{
    return dp <= 128   ? fa_sm80_tile{dp, 4, 1, 32, dp}
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

/* and what a mask needs beside them, whose elements have esize bytes */
constexpr size_t fa_fwd_mask_bytes(fa_sm80_tile t, size_t esize)
{
    return (size_t)fa_tile_rows(t) * t.cols * esize;
}

constexpr size_t fa_bwd_bytes(fa_sm80_tile t, size_t esize)
{
    return (size_t)(2 * (fa_tile_rows(t) + t.cols)) * (t.dp * esize + 16) + 8 * (size_t)t.cols + 16;
}

/* One compiled pair of head dimension and dtype (sm80_fwd_tmpl.cu, sm80_bwd_tmpl.cu). */
enum fa_sm80_pass { FA_PASS_FWD, FA_PASS_DKV, FA_PASS_DQ, FA_PASS_DMASK };
typedef fa_status fa_sm80_launch(const char *name, fa_sm80_pass pass, const fa_sm80_params &p, int64_t blocks,
                                 cudaStream_t stream, fa_error *err);

#define FA_SM80_DECLARE(op, type)                                                                                      \
    fa_sm80_launch fa_##op##_sm80_##type##_hd64, fa_##op##_sm80_##type##_hd128, fa_##op##_sm80_##type##_hd256,         \
        fa_##op##_sm80_##type##_hd512;
FA_SM80_DECLARE(fwd, f32)
FA_SM80_DECLARE(fwd, bf16)
FA_SM80_DECLARE(fwd, f16)
FA_SM80_DECLARE(bwd, f32)
FA_SM80_DECLARE(bwd, bf16)
FA_SM80_DECLARE(bwd, f16)

/* Is there a second kernel for calls that need no more than ranges of keys? */
constexpr bool fa_has_plain(int dp, size_t esize, bool backward)
{
    return dp <= (backward ? 128 : 256) && esize == 2;
}

/* place of a call's head dimensions among these: 64, 128, 256, 512 */
static inline int fa_sm80_dim(const fa_args *a)
{
    int64_t d = fa_max64(a->q.size[3], a->v.size[3]);
    return d <= 64 ? 0 : d <= 128 ? 1 : d <= 256 ? 2 : 3;
}

/* rows: keys of a tile of forward; 0 in backward */
static inline int fa_sm80_vectors(const fa_args *a, int rows)
{
    const bool like_q = a->k.dtype == a->q.dtype;
    const bool k = like_q && (rows ? fa_keys_are_vectors(a, &a->k, rows) : fa_rows_are_vectors(&a->k));
    const bool v = like_q && (rows ? fa_keys_are_vectors(a, &a->v, rows) : fa_rows_are_vectors(&a->v));
    return (fa_rows_are_vectors(&a->q) ? FA_VEC_Q : 0) | (k ? FA_VEC_K : 0) | (v ? FA_VEC_V : 0) |
           (a->dout.data && fa_rows_are_vectors(&a->dout) ? FA_VEC_DOUT : 0) |
           (fa_rows_are_vectors(&a->out) ? FA_VEC_OUT : 0);
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

/* elements of a row in steps of the products */
__device__ __forceinline__ int fa_steps(int64_t d)
{
    return (int)((d + 15) / 16 * 16);
}

/* value (row r, columns c, c + 1) of a result whose rows have d elements; at: its first element */
template <typename T>
__device__ __forceinline__ void fa_store_pair(const fa_tensor *t, int64_t at, int c, float x, float y)
{
    T *data = (T *)t->data + at;
    const int d = (int)t->size[3];
    if (c < d)
        data[c * t->stride[3]] = fa_from<T>(x);
    if (c + 1 < d)
        data[(c + 1) * t->stride[3]] = fa_from<T>(y);
}

#endif
