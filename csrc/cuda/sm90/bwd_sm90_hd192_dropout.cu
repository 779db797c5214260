#include "bwd_sm90_instance.cuh"

FA_BWD_SM90_INSTANCE(fa_bwd_sm90_bf16_hd192_dv128_dropout, fa_bf16_t, FA_BF16, 192, 128, 64, 64, FA_MOD_DROPOUT)
FA_BWD_SM90_INSTANCE(fa_bwd_sm90_f16_hd192_dv128_dropout, fa_f16_t, FA_F16, 192, 128, 64, 64, FA_MOD_DROPOUT)
