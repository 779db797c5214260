/* The parts of a row into one: weights 2^(maximum of the part - maximum of all). A block has a row; its warps take the
 * parts in turn, so that loads of several are under way at a time. */
#include "../ptx/grid.cuh"
#include "decode.cuh"

enum { WARPS = 4, COLUMNS = 128 };

/* maximum of a row's parts, and the sum of their weighted sums: in an order that the number of parts decides */
__device__ static float2 whole_of(const float2 *sums, int parts)
{
    float top = -INFINITY, sum = 0;
    for (int s = threadIdx.x % 32; s < parts; s += 32)
        top = fmaxf(top, sums[s].x);
    for (int step = 16; step > 0; step /= 2)
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
    for (int s = threadIdx.x % 32; s < parts; s += 32)
        sum += top == -INFINITY ? sums[s].y : exp2f(sums[s].x - top) * sums[s].y; /* nothing seen is 0; NaN stays */
    for (int step = 16; step > 0; step /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, step);
    return make_float2(top, sum);
}

/* columns c0 + lane + 32 x of this warp's parts */
__device__ __forceinline__ void sum_parts(float (&acc)[COLUMNS / 32], const float *values, const float2 *sums,
                                          float top, int parts, int dv, int c0)
{
#pragma unroll
    for (int x = 0; x < COLUMNS / 32; x++)
        acc[x] = 0;
#pragma unroll 4
    for (int s = threadIdx.x / 32; s < parts; s += WARPS) {
        const float weight = exp2f(sums[s].x - top);
#pragma unroll
        for (int x = 0; x < COLUMNS / 32; x++) {
            const int c = c0 + threadIdx.x % 32 + 32 * x;
            acc[x] = fmaf(weight, c < dv ? values[(int64_t)s * dv + c] : 0, acc[x]);
        }
    }
}

__global__ void __launch_bounds__(32 * WARPS) fa_decode_merge_kernel(const __grid_constant__ fa_decode_params p)
{
    __shared__ float sAcc[WARPS][COLUMNS];
    const fa_args *a = &p.a;
    const int64_t SQ = a->q.size[2], HQ = a->q.size[1], index = blockIdx.x;
    const int64_t query = index % SQ, h = index / SQ % HQ;
    const int dv = (int)a->v.size[3];
    const fa_seq seq = fa_seq_at(a, index / SQ / HQ);
    const fa_decode_cut cut = fa_decode_cut_of(p, seq.span);
    if (cut.parts == 1) /* the decode kernel has written it */
        return;
    ptx_grid_wait();
    const float2 *sums = (const float2 *)p.sums + index * p.parts;
    const float *values = p.values + index * p.parts * dv;
    const float2 whole = whole_of(sums, cut.parts);
    fa_row_end end = {0, -INFINITY};
    if (query < seq.span.q_len)
        end = fa_finish_row(a, seq.n, h, whole.x, whole.y);
    if (threadIdx.x == 0)
        ((float *)a->lse.data)[fa_q_at(&seq, &a->lse, h, query)] = (float)end.lse;
    const int64_t out = fa_q_at(&seq, &a->out, h, query);
    for (int c0 = 0; c0 < dv; c0 += COLUMNS) {
        float acc[COLUMNS / 32];
        sum_parts(acc, values, sums, whole.x, end.scale == 0 ? 0 : cut.parts, dv, c0);
#pragma unroll
        for (int x = 0; x < COLUMNS / 32; x++)
            sAcc[threadIdx.x / 32][threadIdx.x % 32 + 32 * x] = acc[x];
        __syncthreads();
        const int c = c0 + threadIdx.x;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < WARPS; i++)
            sum += sAcc[i][threadIdx.x];
        if (c < dv)
            fa_store(a->out.data, a->out.dtype, out + c * a->out.stride[3], end.scale == 0 ? 0 : sum * end.scale);
        __syncthreads();
    }
}

fa_status fa_decode_merge_launch(const fa_decode_params &p, cudaStream_t stream, fa_error *err)
{
    int major = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, p.a.device);
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)(p.a.q.size[0] * p.a.q.size[1] * p.a.q.size[2]));
    config.blockDim = dim3(32 * WARPS);
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = major >= 9;
    return fa_cuda_status(cudaLaunchKernelEx(&config, fa_decode_merge_kernel, p), "fa_decode_merge", err);
}
