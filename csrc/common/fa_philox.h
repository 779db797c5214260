/* Which attention weights dropout keeps: a counter-based random number, so that it depends on the seed and on
 * (b, h, i, j) only, and is the same for every tiling, thread count and device, forward and backward.
 *
 * Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) with the seed as key; 16 bits for a
 * weight. The weights of a head come in blocks of 16 queries x 16 keys. One evaluation serves the eight of a block that
 * a lane holds where such a block is a tile of a matrix unit: rows r and r + 8, columns 2c, 2c + 1, 2c + 8, 2c + 9. For
 * query i and key j:
 *
 *   counter    {4 (j / 16) + j % 8 / 2, 8 (i / 16) + i % 8, b * HQ + h, 0}
 *   word       2 (i / 8 % 2) + j / 8 % 2; of it the low half for an even j, the high half for an odd
 *
 * A weight is kept when its 16 bits are >= fa_dropout_threshold(p), and is then multiplied by fa_dropout_factor(p). */
#ifndef FA_PHILOX_H
#define FA_PHILOX_H

#include <stdint.h>

#include "fa_host_device.h"

enum { FA_PHILOX_ROUNDS = 7 }; /* the fewest of which the paper found no test to fail */
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

/* p in [0, 1]. The probability in force is this times 2^-16: p rounded to it, but neither 0 nor 1. p = 0: 0. p = 1 drops
 * all by its factor. */
FA_HD static inline uint32_t fa_dropout_threshold(double p)
{
    double t = p * 65536.0 + 0.5;
    return p <= 0 ? 0 : t < 1 ? 1 : t >= 65535.0 ? 65535u : (uint32_t)t;
}

/* What a kept weight is multiplied by, so that its expectation is the weight; 0 where all are dropped. */
FA_HD static inline double fa_dropout_factor(double p)
{
    return p < 1 ? 65536.0 / (65536.0 - fa_dropout_threshold(p)) : 0;
}

/* The counter's first two numbers. */
FA_HD static inline uint32_t fa_dropout_column(uint32_t j)
{
    return j / 16 * 4 + j % 8 / 2;
}

FA_HD static inline uint32_t fa_dropout_row(uint32_t i)
{
    return i / 16 * 8 + i % 8;
}

/* The 16 bits of a weight. */
FA_HD static inline uint32_t fa_dropout_bits(const fa_philox4 *r, uint32_t i, uint32_t j)
{
    uint32_t near = i & 8 ? r->word[2] : r->word[0], far = i & 8 ? r->word[3] : r->word[1];
    return (j & 8 ? far : near) >> j % 2 * 16 & 0xffff;
}

FA_HD static inline int fa_dropout_keep(uint64_t seed, uint32_t threshold, int64_t bh, int64_t i, int64_t j)
{
    fa_philox4 r = fa_philox(seed, fa_dropout_column((uint32_t)j), fa_dropout_row((uint32_t)i), (uint32_t)bh, 0);
    return fa_dropout_bits(&r, (uint32_t)i, (uint32_t)j) >= threshold;
}

#endif
