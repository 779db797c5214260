/* Forward for one dtype and head dimension: FA_TYPE and FA_T name the dtype, FA_DP is the dimension. */
#include "sm80_fwd.cuh"

#define FA_CAT_(op, type, dp) fa_##op##_sm80_##type##_hd##dp
#define FA_CAT(op, type, dp) FA_CAT_(op, type, dp)

template <bool MOD>
static fa_status launch(const char *name, const fa_sm80_params &p, int64_t blocks, cudaStream_t stream, fa_error *err)
{
    using C = fa_fwd_config<FA_T, FA_DP, MOD>;
    return fa_launch(name, fa_fwd_sm80_kernel<C>, blocks, (int)fa_ceil_div(p.a.v.size[3], C::DA), C::THREADS,
                     C::SHARED + p.mask_bytes, stream, p, err);
}

fa_status FA_CAT(fwd, FA_TYPE, FA_DP)(const char *name, fa_sm80_pass, const fa_sm80_params &p, int64_t blocks,
                                      cudaStream_t stream, fa_error *err)
{
    if constexpr (fa_has_plain(FA_DP, sizeof(FA_T), false))
        if (!fa_sm80_is_mod(&p.a))
            return launch<false>(name, p, blocks, stream, err);
    return launch<true>(name, p, blocks, stream, err);
}
