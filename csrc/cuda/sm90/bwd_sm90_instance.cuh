/* Compiles one instance of the Hopper backward kernel, for a file that names its sizes. */
#ifndef FA_BWD_SM90_INSTANCE_CUH
#define FA_BWD_SM90_INSTANCE_CUH

#include "bwd_sm90.cuh"
#include "bwd_sm90.h"
#include "bwd_sm90_dmask.cuh"

#define FA_BWD_SM90_INSTANCE(NAME, T, DTYPE, D, DV, BM, BN, OPTIONS)                                                   \
    extern "C" const fa_sm90_instance NAME = {                                                                         \
        #NAME, DTYPE, D, DV, BM, BN, fa_bwd_sm90_config<T, D, DV, BM, BN, OPTIONS>::STAGES,                            \
        fa_bwd_sm90_config<T, D, DV, BM, BN, OPTIONS>::THREADS,                                                        \
        (int)sizeof(fa_bwd_sm90_shared<fa_bwd_sm90_config<T, D, DV, BM, BN, OPTIONS>>),                                \
        (const void *)fa_bwd_sm90_kernel<fa_bwd_sm90_config<T, D, DV, BM, BN, OPTIONS>>,                               \
    };

/* The gradient of the mask, beside the mod instance of these sizes. */
#define FA_DMASK_SM90_INSTANCE(NAME, T, DTYPE, D, DV, BM, BN)                                                          \
    extern "C" const fa_sm90_instance NAME = {                                                                         \
        #NAME, DTYPE, D, DV, 128, BN, 1,                                                                               \
        fa_dmask_config<fa_bwd_sm90_config<T, D, DV, BM, BN, FA_MOD_ANY>>::THREADS,                                    \
        (int)sizeof(fa_dmask_shared<fa_dmask_config<fa_bwd_sm90_config<T, D, DV, BM, BN, FA_MOD_ANY>>>),               \
        (const void *)fa_dmask_sm90_kernel<fa_dmask_config<fa_bwd_sm90_config<T, D, DV, BM, BN, FA_MOD_ANY>>>,         \
    };

#endif
