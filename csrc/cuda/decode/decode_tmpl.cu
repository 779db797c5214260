/* Decode for one dtype and head dimension: FA_TYPE and FA_T name the dtype, FA_DP is the dimension. */
#include "decode_kernel.cuh"

#define FA_CAT_(op, type, dp) fa_decode_##op##_##type##_hd##dp
#define FA_CAT(op, type, dp) FA_CAT_(op, type, dp)

/* body(config) for the instance that a call needs */
template <class Body> static auto with_instance(const fa_args *a, bool plain, const Body &body)
{
    if (a->k.dtype == FA_I8)
        return body(fa_decode_config<FA_T, int8_t, FA_DP, true>());
    if (a->k.dtype == FA_F8E4M3)
        return body(fa_decode_config<FA_T, __nv_fp8_e4m3, FA_DP, true>());
    if constexpr (sizeof(FA_T) == 2 && FA_DP <= 128)
        if (plain)
            return body(fa_decode_config<FA_T, FA_T, FA_DP, false>());
    return body(fa_decode_config<FA_T, FA_T, FA_DP, true>());
}

fa_decode_shape FA_CAT(shape, FA_TYPE, FA_DP)(const fa_args *a)
{
    return with_instance(a, false, [](auto c) { return fa_decode_shape{decltype(c)::SHARED, decltype(c)::THREADS}; });
}

fa_status FA_CAT(smxx, FA_TYPE, FA_DP)(const char *name, const fa_decode_params &p, int64_t blocks,
                                       cudaStream_t stream, fa_error *err)
{
    const fa_args *a = &p.a;
    const bool plain = p.k_vectors && !a->mask.data && !a->tree_mask.data && !a->alibi.data && a->softcap == 0;
    return with_instance(a, plain, [&](auto c) {
        using C = decltype(c);
        return fa_launch(name, fa_decode_kernel<C>, blocks, 1, C::THREADS, C::SHARED, stream, p, err);
    });
}
