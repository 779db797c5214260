/* Which attention weights dropout keeps: a counter-based random number, so that it depends on the seed and on
 * (b, h, i, j) only, and is the same for every tiling, thread count and device, forward and backward.
 *
 * Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). One evaluation serves the four
 * keys 4c .. 4c+3 of one query: word j % 4 of philox(counter = {j / 4, i, b * HQ + h, 0}, key = seed).
 * A weight is kept when its word >= fa_dropout_threshold(p), and is then multiplied by 1 / (1 - p). */
#ifndef FA_PHILOX_H
#define FA_PHILOX_H

#include <stdint.h>

#include "fa_host_device.h"

enum { FA_PHILOX_ROUNDS = 10 };
#define FA_PHILOX_M0 0xD2511F53u /* multipliers and key increments of the paper */
#define FA_PHILOX_M1 0xCD9E8D57u
#define FA_PHILOX_W0 0x9E3779B9u
#define FA_PHILOX_W1 0xBB67AE85u

typedef struct fa_philox4 {
    uint32_t word[4];
} fa_philox4;

FA_HD static inline fa_philox4 fa_philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3)
{
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < FA_PHILOX_ROUNDS; round++) {
        uint64_t p0 = (uint64_t)FA_PHILOX_M0 * c0, p1 = (uint64_t)FA_PHILOX_M1 * c2;
        uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        c0 = n0;
        c2 = n2;
        k0 += FA_PHILOX_W0;
        k1 += FA_PHILOX_W1;
    }
    fa_philox4 r = {{c0, c1, c2, c3}};
    return r;
}

/* p in [0, 1). The probability in force is p rounded to a multiple of 2^-32. */
FA_HD static inline uint32_t fa_dropout_threshold(double p)
{
    double t = p * 4294967296.0 + 0.5;
    return t >= 4294967295.0 ? 4294967295u : (uint32_t)t;
}

FA_HD static inline int fa_dropout_keep(uint64_t seed, uint32_t threshold, int64_t bh, int64_t i, int64_t j)
{
    fa_philox4 r = fa_philox(seed, (uint32_t)(j >> 2), (uint32_t)i, (uint32_t)bh, 0);
    return r.word[j & 3] >= threshold;
}

#endif
