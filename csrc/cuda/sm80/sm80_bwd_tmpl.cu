/* A pass of backward for one dtype and head dimension: FA_PASS is dkv, dq or dmask, FA_TYPE and FA_T name the dtype, as
 * products take it, FA_DP is the dimension; FA_VARIANT is _plain, or nothing for the kernels with all options, and
 * FA_MOD says so. */
#include "sm80_dmask.cuh"

#define FA_CAT_(pass, type, dp, variant) fa_##pass##_sm80_##type##_hd##dp##variant
#define FA_CAT(pass, type, dp, variant) FA_CAT_(pass, type, dp, variant)

enum pass { dkv, dq, dmask };

template <pass PASS>
static fa_status start(const char *name, const fa_sm80_params &p, int64_t blocks, cudaStream_t stream, fa_error *err)
{
    using C = fa_bwd_config<FA_T, FA_DP, PASS == dkv, FA_MOD>;
    const int64_t d = p.a.q.size[3], wide = fa_max64(d, p.a.v.size[3]);
    const size_t shared = C::SHARED + p.mask_bytes;
    if constexpr (PASS == dkv)
        return fa_launch(name, fa_bwd_sm80_keys<C>, blocks, (int)fa_ceil_div(wide, C::DA), C::THREADS, shared, stream,
                         p, err);
    else if constexpr (PASS == dq)
        return fa_launch(name, fa_bwd_sm80_queries<C>, blocks, (int)fa_ceil_div(d, C::DA), C::THREADS, shared, stream,
                         p, err);
    else
        return fa_launch(name, fa_dmask_sm80<C>, blocks, 1, C::THREADS, shared, stream, p, err);
}

fa_status FA_CAT(FA_PASS, FA_TYPE, FA_DP, FA_VARIANT)(const char *name, const fa_sm80_params &p, int64_t blocks,
                                                      cudaStream_t stream, fa_error *err)
{
    return start<FA_PASS>(name, p, blocks, stream, err);
}
