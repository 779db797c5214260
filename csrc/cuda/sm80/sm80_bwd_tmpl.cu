/* Backward for one dtype and head dimension: FA_TYPE and FA_T name the dtype, FA_DP is the dimension. */
#include "sm80_bwd.cuh"

#define FA_CAT_(op, type, dp) fa_##op##_sm80_##type##_hd##dp
#define FA_CAT(op, type, dp) FA_CAT_(op, type, dp)

template <bool MOD>
static fa_status launch(const char *name, fa_sm80_pass pass, const fa_sm80_params &p, int64_t blocks,
                        cudaStream_t stream, fa_error *err)
{
    using K = fa_bwd_config<FA_T, FA_DP, true, MOD>;
    using Q = fa_bwd_config<FA_T, FA_DP, false, MOD>;
    const int64_t d = p.a.q.size[3], wide = fa_max64(d, p.a.v.size[3]);
    if (pass == FA_PASS_DKV)
        return fa_launch(name, fa_bwd_sm80_keys<K>, blocks, (int)fa_ceil_div(wide, K::DA), K::THREADS, K::SHARED,
                         stream, p, err);
    return fa_launch(name, fa_bwd_sm80_queries<Q>, blocks, (int)fa_ceil_div(d, Q::DA), Q::THREADS,
                     Q::SHARED + p.mask_bytes, stream, p, err);
}

fa_status FA_CAT(bwd, FA_TYPE, FA_DP)(const char *name, fa_sm80_pass pass, const fa_sm80_params &p, int64_t blocks,
                                      cudaStream_t stream, fa_error *err)
{
    using M = fa_bwd_config<FA_T, FA_DP, false, true>;
    if (pass == FA_PASS_DMASK)
        return fa_launch(name, fa_dmask_sm80<M>, blocks, 1, M::THREADS, M::SHARED + p.mask_bytes, stream,
                         p, err);
    if constexpr (fa_has_plain(FA_DP, sizeof(FA_T), true))
        if (!fa_sm80_is_mod(&p.a))
            return launch<false>(name, pass, p, blocks, stream, err);
    return launch<true>(name, pass, p, blocks, stream, err);
}
