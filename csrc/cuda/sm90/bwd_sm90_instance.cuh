/* Compiles one instance of the Hopper backward kernel, for a file that names its sizes. */
#ifndef FA_BWD_SM90_INSTANCE_CUH
#define FA_BWD_SM90_INSTANCE_CUH

#include "bwd_sm90.cuh"
#include "bwd_sm90.h"

#define FA_BWD_SM90_INSTANCE(NAME, T, DTYPE, D, DV, BM, BN)                                                            \
    extern "C" const fa_sm90_instance NAME = {                                                                     \
        #NAME, DTYPE, D, DV, BM, BN, fa_bwd_sm90_config<T, D, DV, BM, BN>::THREADS,                                    \
        (int)sizeof(fa_bwd_sm90_shared<fa_bwd_sm90_config<T, D, DV, BM, BN>>),                                         \
        (const void *)fa_bwd_sm90_kernel<fa_bwd_sm90_config<T, D, DV, BM, BN>>,                                        \
    };

#endif
