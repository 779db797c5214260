/* Dropout's random numbers on Hopper (common/fa_philox.h): what the host prepares, and an evaluation.
 *
 * Two weights are compared at a time. x, 16 bits, is at least t, which is at most 2^15, where the sign of x + 2^15 - t
 * is set, or, if that exceeds 16 bits, that of x, which is the larger then: one instruction says it of both halves of a
 * word. For a threshold above 2^15 all bits are the other way round: x is below t where ~x is at least 2^16 - t. */
#ifndef FA_SM90_DROPOUT_CUH
#define FA_SM90_DROPOUT_CUH

#include "../../common/fa_philox.h"

typedef struct fa_sm90_dropout {
    uint32_t keys[FA_PHILOX_ROUNDS][2]; /* of the rounds; those of the last with flip */
    uint32_t flip;                      /* all ones where the threshold is above 2^15, else 0 */
    uint32_t lift;                      /* 2^15 - t in both halves */
    float factor;
    uint32_t zero; /* which the assembler does not know */
} fa_sm90_dropout;

/* Is the threshold above 2^15? */
static inline bool fa_sm90_drops_often(double p)
{
    return fa_dropout_threshold(p) > 0x8000u;
}

static inline fa_sm90_dropout fa_sm90_dropout_of(double p, uint64_t seed)
{
    const uint32_t threshold = fa_dropout_threshold(p);
    const bool often = fa_sm90_drops_often(p);
    fa_sm90_dropout d = {};
    d.flip = often ? ~0u : 0u;
    d.lift = (0x8000u - (often ? 0x10000u - threshold : threshold)) * 0x10001u;
    d.factor = (float)fa_dropout_factor(p);
    for (uint32_t i = 0; i < FA_PHILOX_ROUNDS; i++) {
        const uint32_t flip = i == FA_PHILOX_ROUNDS - 1 ? d.flip : 0;
        d.keys[i][0] = (uint32_t)seed + i * FA_PHILOX_W0 ^ flip;
        d.keys[i][1] = (uint32_t)(seed >> 32) + i * FA_PHILOX_W1 ^ flip;
    }
    return d;
}

__device__ __forceinline__ uint32_t fa_high(uint64_t x)
{
    return (uint32_t)(x >> 32);
}

/* What the first three rounds make of the column alone: 9 of 14 products are left to an evaluation. */
__device__ __forceinline__ uint4 fa_draw_column(const fa_sm90_dropout &d, uint32_t column, uint32_t bh)
{
    uint64_t head = (uint64_t)FA_PHILOX_M1 * bh, first = (uint64_t)FA_PHILOX_M0 * column;
    uint64_t second = (uint64_t)FA_PHILOX_M1 * (fa_high(first) ^ d.keys[0][1]);
    uint64_t third = (uint64_t)FA_PHILOX_M0 * (fa_high(second) ^ (uint32_t)head ^ d.keys[1][0]);
    return make_uint4((uint32_t)first, (uint32_t)second ^ d.keys[2][0], fa_high(third) ^ d.keys[2][1], (uint32_t)third);
}

/* The same of the row. */
__device__ __forceinline__ uint2 fa_draw_row(const fa_sm90_dropout &d, uint32_t row, uint32_t bh)
{
    uint64_t head = (uint64_t)FA_PHILOX_M1 * bh;
    uint64_t second = (uint64_t)FA_PHILOX_M0 * (fa_high(head) ^ row ^ d.keys[0][0]);
    return make_uint2(fa_high(second) ^ d.keys[1][1], (uint32_t)second);
}

/* fa_philox from these, as signs: that of each half, with flip, says whether its weight is kept. OFTEN: flip may be
 * other than 0. */
template <bool OFTEN>
__device__ __forceinline__ fa_philox4 fa_draw_signs(const fa_sm90_dropout &d, uint4 column, uint2 row)
{
    uint64_t third = (uint64_t)FA_PHILOX_M1 * (row.x ^ column.x);
    uint32_t c0 = fa_high(third) ^ column.y, c1 = (uint32_t)third, c2 = row.y ^ column.z, c3 = column.w;
#pragma unroll
    for (int round = 3; round < FA_PHILOX_ROUNDS; round++) {
        uint64_t p0 = (uint64_t)FA_PHILOX_M0 * c0, p1 = (uint64_t)FA_PHILOX_M1 * c2;
        c0 = fa_high(p1) ^ c1 ^ d.keys[round][0];
        c2 = fa_high(p0) ^ c3 ^ d.keys[round][1];
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
    }
    const uint32_t flip = OFTEN ? d.flip : 0;
    fa_philox4 r = {{c0, c1 ^ flip, c2, c3 ^ flip}};
#pragma unroll
    for (int i = 0; i < 4; i++)
        r.word[i] = __viaddmax_u16x2(r.word[i], d.lift, r.word[i]);
    return r;
}

/* The signs of the halves of two words as bytes of 0 or 255: of the first's low and high half, of the second's. */
__device__ __forceinline__ uint32_t fa_bytes_of_signs(uint32_t first, uint32_t second)
{
    uint32_t bytes;
    asm("prmt.b32 %0, %1, %2, 0xfdb9;" : "=r"(bytes) : "r"(first), "r"(second));
    return bytes;
}

/* A mask of two packed weights from the signs of two bytes of x: which says them, as prmt does. */
__device__ __forceinline__ uint32_t fa_mask_of_signs(uint32_t x, int which)
{
    uint32_t mask;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(mask) : "r"(x), "r"(which));
    return mask;
}

#endif
