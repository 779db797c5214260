#include "bwd_sm90_instance.cuh"

FA_BWD_SM90_INSTANCE(fa_bwd_sm90_bf16_hd256, fa_bf16_t, FA_BF16, 256, 256, 64, 64, 0)
FA_BWD_SM90_INSTANCE(fa_bwd_sm90_f16_hd256, fa_f16_t, FA_F16, 256, 256, 64, 64, 0)
