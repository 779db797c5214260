/* What the decode kernels, the merge of their parts and their launcher share. */
#ifndef FA_DECODE_CUH
#define FA_DECODE_CUH

#include "../cuda.h"
#include "../tile/tile_mma.cuh"
#include "../tile/tile_score.cuh"

enum {
    FA_DECODE_ROWS = 16, /* query rows of a block: a tile of mma.sync */
    FA_DECODE_KEYS = 16, /* keys of a warp's step */
    FA_DECODE_STEP = 64, /* parts are a multiple of it: a step of every warp */
};

/* The query rows of a key head are numbered query * group + head within the group; a block has 16 of them. */
struct fa_decode_params {
    fa_args a;
    int group, rows, tiles; /* query heads of a key head, its query rows, tiles of 16 of them */
    int parts_wanted;       /* a sequence's keys are cut into at most so many parts */
    int least;              /* of at least so many keys */
    int parts;              /* room for parts in the workspace */
    int run;                /* parts that a block takes one after the other */
    bool q_vectors, k_vectors;
    float *sums;   /* [B HQ SQ][parts][2]: maximum, sum */
    float *values; /* [B HQ SQ][parts][DV] */
};

/* How the keys of one sequence are cut, by its own length and the shape of a batch of 1: its bits depend on nothing
 * else. Keys lo .. hi - 1, lo a multiple of FA_DECODE_STEP, as `part` is; one part, which is empty, where there are
 * none. */
struct fa_decode_cut {
    int lo, hi, part, parts;
};

__device__ static fa_decode_cut fa_decode_cut_of(const fa_decode_params &p, const fa_span &span)
{
    fa_range keys = {0, 0};
    if (span.q_len > 0)
        keys = fa_keys_of_queries(&span, 0, span.q_len - 1);
    const int lo = (int)fa_max64(keys.lo, 0) / FA_DECODE_STEP * FA_DECODE_STEP, hi = (int)fa_max64(keys.hi, 0);
    if (lo >= hi)
        return {0, 0, FA_DECODE_STEP, 1};
    const int keys_each = max((hi - lo + p.parts_wanted - 1) / p.parts_wanted, p.least);
    const int part = (keys_each + FA_DECODE_STEP - 1) / FA_DECODE_STEP * FA_DECODE_STEP;
    return {lo, hi, part, (hi - lo + part - 1) / part};
}

/* One compiled pair of dtype and head dimension (decode_tmpl.cu); blocks = 0: only the bytes of shared memory. */
struct fa_decode_shape {
    size_t shared;
    int threads;
};
typedef fa_status fa_decode_launch(const char *name, const fa_decode_params &p, int64_t blocks, cudaStream_t stream,
                                   fa_error *err);
typedef fa_decode_shape fa_decode_shape_of(const fa_args *a);

#define FA_DECODE_DECLARE(type)                                                                                        \
    fa_decode_launch fa_decode_smxx_##type##_hd64, fa_decode_smxx_##type##_hd128, fa_decode_smxx_##type##_hd256;       \
    fa_decode_shape_of fa_decode_shape_##type##_hd64, fa_decode_shape_##type##_hd128, fa_decode_shape_##type##_hd256;
FA_DECODE_DECLARE(f32)
FA_DECODE_DECLARE(bf16)
FA_DECODE_DECLARE(f16)

/* The parts of every sequence that has several, to out and lse. */
fa_status fa_decode_merge_launch(const fa_decode_params &p, cudaStream_t stream, fa_error *err);

#endif
