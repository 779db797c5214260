/* The instances of the Hopper forward kernel for fp32. */
#include "fwd_sm90_f32.cuh"
#include "fwd_sm90.h"

using hd64 = fa_f32_config<64, 64, 64, 4, true>;
using hd128 = fa_f32_config<128, 128, 64, 2, false>;

template <class C> constexpr fa_sm90_instance fa_f32_instance(const char *name)
{
    return {
        .name = name,
        .dtype = FA_F32,
        .D = C::D,
        .DV = C::DV,
        .BM = C::BM,
        .BN = C::BN,
        .stages = C::STAGES,
        .threads = C::THREADS,
        .shared_bytes = (int)sizeof(fa_f32_shared<C>),
        .kernel = (const void *)fa_fwd_sm90_f32_kernel<C>,
        .options = FA_PLAIN,
    };
}

extern "C" {
extern const fa_sm90_instance fa_fwd_sm90_f32_hd64, fa_fwd_sm90_f32_hd128;
const fa_sm90_instance fa_fwd_sm90_f32_hd64 = fa_f32_instance<hd64>("fa_fwd_sm90_f32_hd64");
const fa_sm90_instance fa_fwd_sm90_f32_hd128 = fa_f32_instance<hd128>("fa_fwd_sm90_f32_hd128");
}
