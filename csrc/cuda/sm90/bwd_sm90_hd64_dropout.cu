#include "bwd_sm90_instance.cuh"

FA_BWD_SM90_INSTANCE(fa_bwd_sm90_bf16_hd64_dropout, fa_bf16_t, FA_BF16, 64, 64, 128, 128, FA_MOD_DROPOUT)
FA_BWD_SM90_INSTANCE(fa_bwd_sm90_f16_hd64_dropout, fa_f16_t, FA_F16, 64, 64, 128, 128, FA_MOD_DROPOUT)
