/* Backward for one dtype and head dimension: FA_TYPE and FA_T name the dtype, as products take it, FA_DP is the
 * dimension; FA_VARIANT is _plain, or nothing for the kernels with all options, and FA_MOD says so. */
#include "sm80_bwd.cuh"

#define FA_CAT_(op, type, dp, variant) fa_##op##_sm80_##type##_hd##dp##variant
#define FA_CAT(op, type, dp, variant) FA_CAT_(op, type, dp, variant)

fa_status FA_CAT(bwd, FA_TYPE, FA_DP, FA_VARIANT)(const char *name, fa_sm80_pass pass, const fa_sm80_params &p,
                                                  int64_t blocks, cudaStream_t stream, fa_error *err)
{
    using K = fa_bwd_config<FA_T, FA_DP, true, FA_MOD>;
    using Q = fa_bwd_config<FA_T, FA_DP, false, FA_MOD>;
    const int64_t d = p.a.q.size[3], wide = fa_max64(d, p.a.v.size[3]);
    const size_t shared = Q::SHARED + p.mask_bytes;
    if (pass == FA_PASS_DKV)
        return fa_launch(name, fa_bwd_sm80_keys<K>, blocks, (int)fa_ceil_div(wide, K::DA), K::THREADS, K::SHARED,
                         stream, p, err);
    if constexpr (FA_MOD)
        if (pass == FA_PASS_DMASK)
            return fa_launch(name, fa_dmask_sm80<Q>, blocks, 1, Q::THREADS, shared, stream, p, err);
    return fa_launch(name, fa_bwd_sm80_queries<Q>, blocks, (int)fa_ceil_div(d, Q::DA), Q::THREADS, shared, stream, p,
                     err);
}
