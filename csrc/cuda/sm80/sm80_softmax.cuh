/* The online softmax of forward, on scores as sm80_score.cuh leaves them. */
#ifndef FA_SM80_SOFTMAX_CUH
#define FA_SM80_SOFTMAX_CUH

#include "sm80_score.cuh"

/* The running softmax of a lane's rows: sums of 2^(c (s - max)), and of these times values. max is not always the
 * maximum: it follows when it falls behind by more than a factor of 2^FA_BEHIND. */
#define FA_BEHIND 8.0f
template <int MT, int NA> struct fa_fwd_rows {
    float acc[MT][NA][4];
    float max[MT][2]; /* -inf: nothing seen yet */
    float sum[MT][2]; /* of this lane's keys only */
};

/* Rows that have fallen behind follow, and their sums shrink. */
template <int MT, int NA>
__device__ __forceinline__ void fa_fwd_follow(fa_fwd_rows<MT, NA> &r, const float (&top)[MT][2], float c)
{
#pragma unroll
    for (int x = 0; x < 2 * MT; x++) {
        float &max = r.max[x / 2][x % 2], factor = 1;
        if ((top[x / 2][x % 2] - max) * c > FA_BEHIND) {
            factor = max == -INFINITY ? 0 : ptx_exp2((max - top[x / 2][x % 2]) * c);
            max = top[x / 2][x % 2];
        }
        r.sum[x / 2][x % 2] *= factor;
#pragma unroll
        for (int n = 0; n < NA; n++) {
            r.acc[x / 2][n][x % 2 * 2] *= factor;
            r.acc[x / 2][n][x % 2 * 2 + 1] *= factor;
        }
    }
}

/* Brings the rows up to what the tile holds; base <- what weights 2^(c s + base) of each row need. */
template <int MT, int NT, int NA>
__device__ __forceinline__ void fa_fwd_maxima(float (&s)[MT][NT][4], fa_fwd_rows<MT, NA> &r, float (&base)[2 * MT],
                                              float c)
{
    float top[MT][2];
    bool behind = false, lost = false;
#pragma unroll
    for (int x = 0; x < 2 * MT; x++) {
        float most = -INFINITY;
#pragma unroll
        for (int n = 0; n < NT; n++)
            most = fmaxf(most, fmaxf(s[x / 2][n][x % 2 * 2], s[x / 2][n][x % 2 * 2 + 1]));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
        top[x / 2][x % 2] = most;
        behind |= (most - r.max[x / 2][x % 2]) * c > FA_BEHIND;
    }
    if (__any_sync(0xffffffffu, behind))
        fa_fwd_follow(r, top, c);
#pragma unroll
    for (int x = 0; x < 2 * MT; x++) {
        const float max = r.max[x / 2][x % 2];
        base[x] = max == -INFINITY ? 0 : -max * c; /* nothing seen yet: every weight is 2^-inf = 0 */
        lost |= base[x] == INFINITY;
    }
    if (!lost)
        return;
#pragma unroll
    for (int x = 0; x < 2 * MT; x++) /* only keys that a float mask all but hides */
        if (base[x] == INFINITY) {
            base[x] = 0;
#pragma unroll
            for (int n = 0; n < NT; n++) {
                s[x / 2][n][x % 2 * 2] -= r.max[x / 2][x % 2];
                s[x / 2][n][x % 2 * 2 + 1] -= r.max[x / 2][x % 2];
            }
        }
}

/* s <- weights */
template <int MT, int NT, int NA>
__device__ __forceinline__ void fa_fwd_softmax(float (&s)[MT][NT][4], fa_fwd_rows<MT, NA> &r, float c)
{
    float base[2 * MT];
    fa_fwd_maxima(s, r, base, c);
#pragma unroll
    for (int x = 0; x < 2 * MT; x++)
#pragma unroll
        for (int y = 0; y < 2 * NT; y++) {
            float &at = s[x / 2][y / 2][x % 2 * 2 + y % 2];
            at = ptx_exp2(fmaf(at, c, base[x]));
            r.sum[x / 2][x % 2] += at;
        }
}

/* The exponent of 2 that a row's sums are in units of; a finite maximum stays finite. */
__device__ __forceinline__ float fa_fwd_base(float max, float c)
{
    return max == -INFINITY ? max : fmaxf(max * c, -FLT_MAX);
}

template <int MT, int NA> __device__ __forceinline__ void fa_fwd_start(fa_fwd_rows<MT, NA> &r)
{
    fa_zero(r.acc);
#pragma unroll
    for (int x = 0; x < 2 * MT; x++) {
        r.max[x / 2][x % 2] = -INFINITY;
        r.sum[x / 2][x % 2] = 0;
    }
}

template <int MT, int NA> __device__ __forceinline__ void fa_fwd_end(fa_fwd_rows<MT, NA> &r, float c)
{
#pragma unroll
    for (int x = 0; x < 2 * MT; x++)
        r.max[x / 2][x % 2] = fa_fwd_base(r.max[x / 2][x % 2], c);
}

#endif
