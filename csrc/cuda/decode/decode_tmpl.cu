/* Decode for one dtype, head dimension and way to store keys: FA_TYPE and FA_T name the dtype, FA_DP is the dimension,
 * FA_QUANTISED is 1 for int8 and float8_e4m3fn. */
#include "decode_kernel.cuh"

#if FA_QUANTISED
#define FA_CAT_(op, type, dp) fa_decode_##op##_##type##_hd##dp##_quantised
#else
#define FA_CAT_(op, type, dp) fa_decode_##op##_##type##_hd##dp
#endif
#define FA_CAT(op, type, dp) FA_CAT_(op, type, dp)

using stored = std::conditional_t<FA_QUANTISED, uint8_t, FA_T>;
using options = fa_decode_config<FA_T, stored, FA_DP, true>;

fa_decode_shape FA_CAT(shape, FA_TYPE, FA_DP)(void)
{
    return {options::SHARED, options::THREADS, options::STAGES};
}

template <class C>
static fa_status launch(const char *name, const fa_decode_params &p, cudaStream_t stream, fa_error *err)
{
    const void *kernel = (const void *)fa_decode_kernel<C>;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)C::SHARED);
    if (error != cudaSuccess)
        return fa_cuda_status(error, name, err);
    const dim3 grid((unsigned)(p.heads * p.tiles), (unsigned)p.runs, (unsigned)p.a.q.size[0]);
    void *args[] = {(void *)&p};
    return fa_cuda_status(cudaLaunchKernel(kernel, grid, dim3(C::THREADS), args, C::SHARED, stream), name, err);
}

fa_status FA_CAT(smxx, FA_TYPE, FA_DP)(const char *name, const fa_decode_params &p, cudaStream_t stream, fa_error *err)
{
    const fa_args *a = &p.a;
    const bool plain = p.k_vectors && !a->mask.data && !a->tree_mask.data && !a->alibi.data && a->softcap == 0 &&
                       !a->q_seqlens.data;
    if constexpr (!FA_QUANTISED && sizeof(FA_T) == 2 && FA_DP <= 128)
        if (plain)
            return launch<fa_decode_config<FA_T, FA_T, FA_DP, false>>(name, p, stream, err);
    return launch<options>(name, p, stream, err);
}
