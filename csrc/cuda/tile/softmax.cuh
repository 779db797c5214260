/* Online softmax over blocks of scores in the accumulator layout of wgmma (ptx/wgmma.cuh): each thread holds two rows,
 * and the four threads of a quad share them.
 *
 * A row keeps a reference m and the sum l of 2^(c (s - m)) over its keys, c = scale * log2 e. Any m gives the same
 * quotient; m must only be near enough to the maximum for the terms not to overflow. So a block's weights are computed
 * with the m at hand, and its maximum is looked for only if it is the first, or if a sum of weights shows that m is too
 * small: then the block, whose scores are still there, is done again. */
#ifndef FA_TILE_SOFTMAX_CUH
#define FA_TILE_SOFTMAX_CUH

#include <math_constants.h>

#include "../ptx/math.cuh"

/* Largest sum of the weights that one thread holds of a row in a block. Weights reach fp16 and, times V, fp32. */
#define FA_WEIGHTS_LIMIT 256.f

struct fa_rows {
    float m[2];      /* -inf: the row has seen no key */
    float l[2];      /* of this thread's columns only */
    float factor[2]; /* what the last block multiplied the sums by */
    bool grown;      /* whether a factor of the warp may differ from 1 */
    bool blind;      /* whether an m of the warp is -inf */
};

__device__ __forceinline__ void fa_rows_start(fa_rows &r)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        r.m[i] = -CUDART_INF_F;
        r.l[i] = 0.f;
    }
    r.blind = true;
}

__device__ __forceinline__ float fa_quad_max(float x)
{
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ __forceinline__ float fa_quad_sum(float x)
{
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

/* Scores of keys that a row does not see become -inf. Row i sees i + lo_shift <= j < i + hi_shift and j < keys. */
template <int BN>
__device__ __forceinline__ void fa_hide_keys(float (&s)[BN / 2], int row, int key, int keys, int lo_shift, int hi_shift)
{
    int lane = threadIdx.x % FA_WARP, warp = threadIdx.x / FA_WARP % 4;
    int first = row + 16 * warp + lane / 4, column = key + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int lo = first + 8 * i + lo_shift - column, hi = min(keys, first + 8 * i + hi_shift) - column;
#pragma unroll
        for (int c = 0; c < BN / 8; c++) {
#pragma unroll
            for (int x = 0; x < 2; x++) {
                int j = 8 * c + x;
                float &at = s[4 * c + 2 * i + x];
                at = j >= lo && j < hi ? at : -CUDART_INF_F;
            }
        }
    }
}

/* Where the softmax finds its scores, which are in units of 1 / c of log2: in registers. */
template <int BN> struct fa_scores_at_hand {
    const float (&s)[BN / 2];
    float c;
    /* Keeps the compiler from holding what it makes of scores for later. */
    __device__ __forceinline__ void renew(void) const
    {
    }
    /* Are all that were asked for since what they should be? */
    __device__ __forceinline__ bool good(void) const
    {
        return true;
    }
    /* Scores 2 j and 2 j + 1, and both times c plus base. */
    __device__ __forceinline__ float2 pair(int j) const
    {
        return make_float2(s[2 * j], s[2 * j + 1]);
    }
    __device__ __forceinline__ float2 powers(int j, float base) const
    {
        return make_float2(fmaf(s[2 * j], c, base), fmaf(s[2 * j + 1], c, base));
    }
};

/* m of both rows follows the block's maximum; the sums so far are multiplied by factor. false: scores are not good, and
 * nothing is done. */
template <int BN, class Scores> __device__ __forceinline__ bool fa_raise_maximum(const Scores &s, fa_rows &r)
{
    float tops[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        tops[i] = s.pair(i).x;
#pragma unroll
        for (int j = 0; j < BN / 8; j++) {
            float2 x = s.pair(2 * j + i);
            tops[i] = fmaxf(fmaxf(tops[i], x.x), x.y);
        }
    }
    if (!s.good())
        return false;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float top = fmaxf(r.m[i], fa_quad_max(tops[i]));
        r.factor[i] = top == r.m[i] ? 1.f : fa_exp2((r.m[i] - top) * s.c);
        r.l[i] *= r.factor[i];
        r.m[i] = top;
    }
    r.blind = __any_sync(0xffffffff, r.m[0] == -CUDART_INF_F || r.m[1] == -CUDART_INF_F);
    return true;
}

/* No weight is dropped. tie(x, kept) leaves x as it is; the assembler is to believe that it depends on kept. */
struct fa_keeping {
    __device__ __forceinline__ void operator()(uint32_t (&kept)[4], int) const
    {
        kept[0] = kept[1] = kept[2] = kept[3] = ~0u;
    }
    __device__ __forceinline__ void tie(float &, uint32_t) const
    {
    }
};

/* w becomes the weights of the block's keys, rounded to T, as the A operand of the product with V; r is brought up to
 * date. drop(kept, a) makes masks of w[4 a] .. w[4 a + 3], of 16 keys: the sums are of all weights. false: scores are not
 * good, r is as it was, and w is nothing. */
template <typename T, int BN, class Scores, class Drop = fa_keeping>
__device__ __forceinline__ bool fa_softmax_block(const Scores &s, uint32_t (&w)[BN / 4], fa_rows &r,
                                                 const Drop &drop = fa_keeping())
{
    float sum[2];
    r.grown = false;
    bool raise = r.blind;
    do {
        float base[2];
        uint32_t kept[4];
        if (raise) {
            s.renew();
            if (!fa_raise_maximum<BN>(s, r))
                return false;
            r.grown = true;
        }
        s.renew();
#pragma unroll
        for (int i = 0; i < 2; i++) {
            base[i] = r.m[i] == -CUDART_INF_F ? 0.f : -r.m[i] * s.c;
            sum[i] = 0.f;
        }
#pragma unroll
        for (int j = 0; j < BN / 4; j++) {
            if (j % 4 == 0) {
                if (j > 0)
                    drop.tie(base[j / 4 % 2], kept[3]);
                drop(kept, j / 4);
            }
            float2 e = s.powers(j, base[j % 2]);
            float x = fa_exp2(e.x), y = fa_exp2(e.y);
            sum[j % 2] += x;
            sum[j % 2] += y;
            w[j] = fa_pack<T>(x, y) & kept[j % 4];
        }
        if (!s.good())
            return false;
        raise = !raise && __any_sync(0xffffffff, fmaxf(sum[0], sum[1]) > FA_WEIGHTS_LIMIT);
    } while (raise);
    r.l[0] += sum[0];
    r.l[1] += sum[1];
    return true;
}

template <int DV> __device__ __forceinline__ void fa_rescale_rows(float (&o)[DV / 2], const fa_rows &r)
{
    if (r.grown) {
#pragma unroll
        for (int i = 0; i < DV / 2; i++)
            o[i] *= r.factor[i / 2 % 2];
    }
}

struct fa_rows_out {
    float factor[2]; /* of the accumulator: 1 / sum */
    float lse[2];    /* in nats */
    bool empty[2];   /* sees nothing: output 0, lse -inf */
};

__device__ __forceinline__ fa_rows_out fa_finish_rows(const fa_rows &r, float c)
{
    fa_rows_out f;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float sum = fa_quad_sum(r.l[i]);
        f.empty[i] = r.m[i] == -CUDART_INF_F && sum == 0.f;
        f.factor[i] = fa_reciprocal(sum);
        f.lse[i] = f.empty[i] ? -CUDART_INF_F : (r.m[i] * c + fa_log2(sum)) * 0.693147180559945f;
    }
    return f;
}

#endif
