/* Forward for one dtype and head dimension: FA_TYPE and FA_T name the dtype, as products take it, FA_DP is the
 * dimension; FA_VARIANT is _plain, or nothing for the kernels with all options, and FA_MOD says so. */
#include "sm80_fwd.cuh"

#define FA_CAT_(op, type, dp, variant) fa_##op##_sm80_##type##_hd##dp##variant
#define FA_CAT(op, type, dp, variant) FA_CAT_(op, type, dp, variant)

fa_status FA_CAT(fwd, FA_TYPE, FA_DP, FA_VARIANT)(const char *name, const fa_sm80_params &p, int64_t blocks,
                                                  cudaStream_t stream, fa_error *err)
{
    using C = fa_fwd_config<FA_T, FA_DP, FA_MOD>;
    return fa_launch(name, fa_fwd_sm80_kernel<C>, blocks, (int)fa_ceil_div(p.a.v.size[3], C::DA), C::THREADS,
                     C::SHARED + p.mask_bytes, stream, p, err);
}
