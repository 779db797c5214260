/* The parts of a row into one: weights 2^(maximum of the part - maximum of all). A block has a row; its warps take the
 * parts in turn, so that loads of several are under way at a time. */
#include "../ptx/grid.cuh"
#include "decode.cuh"

enum { WARPS = 4, COLUMNS = 128, AHEAD = 8 };

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

/* columns c0 + 4 lane .. + 3 of the next AHEAD parts of this warp, from part `first` on */
__device__ __forceinline__ void load_parts(float4 (&x)[AHEAD], const float *values, int first, int parts, int dv,
                                           int c0)
{
    const int c = c0 + threadIdx.x % 32 * 4;
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
        const int s = first + WARPS * i;
        x[i] = s < parts && c < dv ? *(const float4 *)(values + (int64_t)s * dv + c) : make_float4(0, 0, 0, 0);
    }
}

__device__ __forceinline__ void add_parts(float4 &acc, const float4 (&x)[AHEAD], const float2 *sums, float top,
                                          int first, int parts)
{
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
        const int s = first + WARPS * i;
        if (s >= parts)
            return;
        const float weight = exp2f(sums[s].x - top);
        acc.x = fmaf(weight, x[i].x, acc.x), acc.y = fmaf(weight, x[i].y, acc.y);
        acc.z = fmaf(weight, x[i].z, acc.z), acc.w = fmaf(weight, x[i].w, acc.w);
    }
}

__device__ __forceinline__ int64_t place(const fa_tensor *t, int n, int h, int query)
{
    return n * t->stride[0] + h * t->stride[1] + query * t->stride[2];
}

__device__ __forceinline__ void store(void *data, fa_dtype dtype, int64_t at, float x)
{
    switch (dtype) {
    case FA_BF16: ((__nv_bfloat16 *)data)[at] = __float2bfloat16_rn(x); return;
    case FA_F16: ((__half *)data)[at] = __float2half_rn(x); return;
    default: ((float *)data)[at] = x; return;
    }
}

__global__ void __launch_bounds__(32 * WARPS) fa_decode_merge_kernel(const __grid_constant__ fa_decode_params p)
{
    __shared__ float sAcc[WARPS][COLUMNS];
    const fa_args *a = &p.a;
    const int query = blockIdx.x, h = blockIdx.y, n = blockIdx.z, dv = (p.dv + 3) / 4 * 4;
    const int64_t index = ((int64_t)n * gridDim.y + h) * gridDim.x + query;
    const fa_decode_sequence seq = fa_decode_sequence_of(p, n, a->q_seqlens.data != NULL);
    ptx_grid_wait(); /* all of it waits: what comes behind this launch relies on both */
    if (seq.parts == 1) /* the decode kernel has written it */
        return;
    const float2 *sums = (const float2 *)p.sums + index * p.parts;
    const float *values = p.values + index * p.parts * dv;
    const int warp = threadIdx.x / 32;
    float4 x[AHEAD];
    load_parts(x, values, warp, seq.parts, dv, 0);
    const float2 whole = whole_of(sums, seq.parts);
    fa_row_end end = {0, -INFINITY};
    if (query < seq.q_len)
        end = fa_finish_row(a, n, h, whole.x, whole.y);
    if (threadIdx.x == 0)
        ((float *)a->lse.data)[place(&a->lse, n, h, query)] = (float)end.lse;
    const int64_t out = place(&a->out, n, h, query);
    for (int c0 = 0; c0 < dv; c0 += COLUMNS) {
        float4 acc = make_float4(0, 0, 0, 0);
        for (int s = warp; s < seq.parts; s += WARPS * AHEAD) {
            if (s > warp || c0 > 0)
                load_parts(x, values, s, seq.parts, dv, c0);
            add_parts(acc, x, sums, whole.x, s, seq.parts);
        }
        ((float4 *)sAcc[warp])[threadIdx.x % 32] = acc;
        __syncthreads();
        const int c = c0 + threadIdx.x;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < WARPS; i++)
            sum += sAcc[i][threadIdx.x];
        sum = end.scale == 0 ? 0 : sum * end.scale;
        if (c < p.dv)
            store(a->out.data, a->out.dtype, out + c * a->out.stride[3], sum);
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
    config.gridDim = dim3((unsigned)p.queries, (unsigned)(p.heads * p.group), (unsigned)p.a.q.size[0]);
    config.blockDim = dim3(32 * WARPS);
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = major >= 9;
    return fa_cuda_status(cudaLaunchKernelEx(&config, fa_decode_merge_kernel, p), "fa_decode_merge", err);
}
