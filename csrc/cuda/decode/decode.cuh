/* What the decode kernels, the merge of their parts and their launcher share. */
#ifndef FA_DECODE_CUH
#define FA_DECODE_CUH

#include "../cuda.h"
#include "../tile/tile_mma.cuh"
#include "../tile/tile_score.cuh"

enum {
    FA_DECODE_ROWS = 16,             /* query rows of a block: a tile of mma.sync */
    FA_DECODE_KEYS = 16,             /* keys of a warp's step */
    FA_DECODE_STEP = 64,             /* parts are a multiple of it: a step of every warp */
    FA_DECODE_KEYS_MOST = 1 << 29,   /* positions and windows fit 32 bits */
    FA_DECODE_UNBOUNDED = 1 << 30,   /* a side of the window */
};

/* How rows of a tensor lie: bytes to the next sequence or page, head, row. */
struct fa_decode_tensor {
    char *data;
    int64_t batch, head, row;
};

/* The query rows of a key head are numbered query * group + head within the group; a block has 16 of them. What every
 * block reads comes first and close together: constants arrive in lines. */
struct fa_decode_params {
    fa_decode_tensor q, k, v;
    const void *lengths, *table; /* kv_seqlens, block_table; may be NULL */
    int64_t length_step, table_step, table_page_step; /* elements to the next sequence, page */
    bool lengths_wide, table_wide; /* 64 bits, else 32 */
    int page_size, page_shift; /* the shift: of a power of two */
    bool regular;              /* the 16 keys of a tile lie at equal distances, in vectors */
    bool q_vectors, k_vectors;
    bool float8; /* of quantised keys: float8_e4m3fn, else int8 */
    bool once; /* keys are read once in a call that is larger than the cache */
    int pages, room, appended;    /* pages there are; keys a sequence can have; fa_args.kv_appended */
    int queries, heads, group, rows, tiles; /* SQ; HK; query heads of a key head, its rows, tiles of 16 of them */
    int d, dv;
    int left, right; /* FA_DECODE_UNBOUNDED: unbounded */
    bool bottom_right;
    float scale;        /* of Q K^T, into the units of the first step that follows */
    int parts_wanted;   /* a sequence's keys are cut into at most so many parts */
    int least;          /* of at least so many keys */
    int parts;          /* room for parts in the workspace */
    int keys_wanted;    /* a block takes several parts one after the other, of about so many keys */
    int runs;           /* blocks of a sequence at most */
    float *sums;   /* [B HQ SQ][parts][2]: maximum, sum */
    float *values; /* [B HQ SQ][parts][DV rounded up to 4] */
    fa_args a;
};

__device__ __forceinline__ int64_t fa_decode_index(const void *data, bool wide, int64_t at)
{
    return wide ? ((const int64_t *)data)[at] : ((const int32_t *)data)[at];
}

/* One sequence, and how its keys are cut: by its own lengths and the shape of a batch of 1, so that its bits depend on
 * nothing else. Keys lo .. hi - 1, lo a multiple of FA_DECODE_STEP as `part` is; without any, one empty part. */
struct fa_decode_sequence {
    int q_len, k_len, offset; /* as fa_span */
    int lo, hi, part, parts;
};

__device__ __forceinline__ fa_decode_sequence fa_decode_sequence_of(const fa_decode_params &p, int n, bool q_lengths)
{
    fa_decode_sequence s = {p.queries, p.room, 0, 0, 0, FA_DECODE_STEP, 1};
    if (p.lengths) {
        int64_t length = fa_decode_index(p.lengths, p.lengths_wide, n * p.length_step);
        length = fa_clamp(length, 0, p.room) + p.appended;
        s.k_len = (int)min(length, (int64_t)p.room);
    }
    if (q_lengths)
        s.q_len = (int)fa_length(&p.a.q_seqlens, n, p.queries);
    s.offset = p.bottom_right ? s.k_len - s.q_len : 0;
    const int lo = max(s.offset - p.left, 0) / FA_DECODE_STEP * FA_DECODE_STEP;
    const int hi = min(s.q_len - 1 + s.offset + p.right + 1, s.k_len);
    if (lo >= hi || s.q_len == 0)
        return s;
    const unsigned each = max((unsigned)(hi - lo + p.parts_wanted - 1) / p.parts_wanted, p.least);
    s.lo = lo;
    s.hi = hi;
    s.part = (each + FA_DECODE_STEP - 1) / FA_DECODE_STEP * FA_DECODE_STEP;
    s.parts = (unsigned)(hi - lo + s.part - 1) / s.part;
    return s;
}

/* How many of these parts a block takes. */
__host__ __device__ __forceinline__ int fa_decode_run(int keys_wanted, int part)
{
    const int run = (unsigned)(keys_wanted + part / 2) / part;
    return run < 1 ? 1 : run;
}

/* One compiled triple of dtype, head dimension and how keys are stored (decode_tmpl.cu). In the order of these. */
struct fa_decode_shape {
    size_t shared;
    int threads, stages;
};
typedef fa_status fa_decode_launch(const char *name, const fa_decode_params &p, cudaStream_t stream, fa_error *err);
typedef fa_decode_shape fa_decode_shape_of(void);

#define FA_DECODE_DECLARE(name)                                                                                        \
    fa_decode_launch fa_decode_smxx_##name;                                                                            \
    fa_decode_shape_of fa_decode_shape_##name;
#define FA_DECODE_NAMES(DO)                                                                                            \
    DO(f32_hd64) DO(f32_hd128) DO(f32_hd256) DO(f32_hd64_quantised) DO(f32_hd128_quantised) DO(f32_hd256_quantised)    \
    DO(bf16_hd64) DO(bf16_hd128) DO(bf16_hd256) DO(bf16_hd64_quantised) DO(bf16_hd128_quantised)                       \
    DO(bf16_hd256_quantised) DO(f16_hd64) DO(f16_hd128) DO(f16_hd256) DO(f16_hd64_quantised) DO(f16_hd128_quantised)   \
    DO(f16_hd256_quantised)
FA_DECODE_NAMES(FA_DECODE_DECLARE)

/* The parts of every sequence that has several, to out and lse. */
fa_status fa_decode_merge_launch(const fa_decode_params &p, cudaStream_t stream, fa_error *err);

#endif
