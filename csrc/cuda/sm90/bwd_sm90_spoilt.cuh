/* Rows of the gradients that rows they do not meet have spoilt.
 *
 * A hidden pair has weight 0, but in the products of its tile 0 times a NaN or an infinity is NaN. Tiles are not searched
 * for such values: whoever holds a finished sum notes whether it is finite, and only then the plain kernels compute the
 * rows in question again, from the pairs that meet (fa_bwd_repair_launch). */
#ifndef FA_BWD_SM90_SPOILT_CUH
#define FA_BWD_SM90_SPOILT_CUH

#include <stdint.h>

template <int R> __device__ __forceinline__ void fa_note_spoilt(uint32_t *spoilt, const float (&sum)[R])
{
    float probe = 0.f;
#pragma unroll
    for (int i = 0; i < R; i++)
        probe = fmaf(sum[i], 0.f, probe); /* NaN from then on */
    if (spoilt && probe != 0.f)
        *spoilt = 1;
}

#endif
