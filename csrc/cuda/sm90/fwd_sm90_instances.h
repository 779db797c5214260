/* Every instance of the Hopper forward kernel, by short name: for kernels as their configuration, for the host as a
 * list. What each costs and how fast it is: docs/kernels/fwd_sm90.md. */
#ifndef FA_FWD_SM90_INSTANCES_H
#define FA_FWD_SM90_INSTANCES_H

/* X(name, D, DV, warpgroups, BN, stages, early, beside, options) */
#define FA_FWD_SM90_INSTANCES(X)                                                                                       \
    X(hd64, 64, 64, 3, 128, 2, 0, false, FA_PLAIN)                                                                     \
    X(hd64_bm128, 64, 64, 2, 128, 3, 1, true, FA_PLAIN)                                                                \
    X(hd128, 128, 128, 2, 128, 2, 0, true, FA_PLAIN)                                                                   \
    X(hd128_bn176, 128, 128, 2, 176, 2, 0, false, FA_PLAIN)                                                            \
    X(hd192_dv128, 192, 128, 2, 128, 2, 0, true, FA_PLAIN)                                                             \
    X(hd256, 256, 256, 2, 64, 2, 0, true, FA_PLAIN)                                                                    \
    X(hd64_len, 64, 64, 3, 128, 2, 0, false, FA_LENGTHS)                                                               \
    X(hd128_len, 128, 128, 2, 128, 2, 0, true, FA_LENGTHS)                                                             \
    X(hd192_dv128_len, 192, 128, 2, 128, 2, 0, true, FA_LENGTHS)                                                       \
    X(hd256_len, 256, 256, 2, 64, 2, 0, true, FA_LENGTHS)                                                              \
    X(hd64_bits, 64, 64, 2, 128, 3, 1, true, FA_BITS)                                                                  \
    X(hd128_bits, 128, 128, 2, 128, 2, 0, true, FA_BITS)                                                               \
    X(hd64_bias, 64, 64, 2, 128, 3, 1, true, FA_BIAS)                                                                  \
    X(hd128_bias, 128, 128, 2, 128, 2, 0, true, FA_BIAS)                                                               \
    X(hd64_cap, 64, 64, 2, 128, 3, 1, true, FA_CAP)                                                                    \
    X(hd128_cap, 128, 128, 2, 128, 2, 0, true, FA_CAP)                                                                 \
    X(hd64_alibi, 64, 64, 2, 128, 3, 1, true, FA_ALIBI)                                                                \
    X(hd128_alibi, 128, 128, 2, 128, 2, 0, true, FA_ALIBI)                                                             \
    X(hd64_dropout, 64, 64, 2, 128, 3, 1, true, FA_DROPOUT)                                                            \
    X(hd128_dropout, 128, 128, 2, 128, 2, 0, true, FA_DROPOUT)                                                         \
    X(hd64_mod, 64, 64, 2, 128, 3, 1, true, FA_ALL)                                                                    \
    X(hd128_mod, 128, 128, 2, 128, 2, 0, true, FA_ALL)                                                                 \
    X(hd192_dv128_mod, 192, 128, 2, 64, 3, 0, true, FA_ALL)                                                            \
    X(hd256_mod, 256, 256, 2, 64, 2, 0, true, FA_ALL)

#ifdef FA_FWD_SM90_CUH
#define FA_CONFIG(name, D, DV, WGS, BN, STAGES, EARLY, BESIDE, OPTIONS)                                                \
    template <typename T>                                                                                              \
    using fa_fwd_sm90_config_##name = fa_fwd_sm90_config<T, D, DV, WGS, BN, STAGES, EARLY, BESIDE, OPTIONS>;
FA_FWD_SM90_INSTANCES(FA_CONFIG)
#undef FA_CONFIG
#endif

#endif
