/* Between cuda_run.cu and the kernels: for each family, can it run a call, its plan, and its launch. C, so that a
 * kernel's file needs nothing else. */
#ifndef FA_CUDA_H
#define FA_CUDA_H

#include <cuda_runtime_api.h>

#include "../fa.h"
#include "../plan/plan.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What a family of kernels offers for one direction. All tensors of `a` are memory of the current device. */
typedef struct fa_cuda_family {
    const char *target; /* "decode", "sm90", "sm80", "plain" */
    bool (*runs_on)(int major); /* its code runs on this compute capability; 0: no GPU */
    bool (*kernel)(int i, fa_kernel_info *info); /* name and dtype of its i-th kernel; false behind the last */
    bool (*can)(const fa_args *a, int device);
    void (*plan)(const fa_args *a, int device, fa_plan *plan); /* kernel, tiles, splits, workspace */
    fa_status (*launch)(const fa_args *a, const fa_plan *plan, void *workspace, cudaStream_t stream, fa_error *err);
} fa_cuda_family;

extern const fa_cuda_family fa_fwd_decode, fa_fwd_sm90, fa_bwd_sm90, fa_fwd_sm80, fa_bwd_sm80, fa_fwd_plain,
    fa_bwd_plain;

/* Compute capability 8.0 and everything newer. */
bool fa_runs_on_sm80(int major);

/* What backward keeps for each row of q: the log-sum-exp in units of log2 (+inf for a row that sees nothing), and
 * rowsum(dO * O) - dLSE. fp32, fp64 for float64. */
typedef struct fa_bwd_row_numbers {
    const void *lse2, *delta; /* (B, HQ, rows) */
    int64_t rows;             /* at least SQ */
} fa_bwd_row_numbers;

size_t fa_bwd_rows_bytes(const fa_args *a);
fa_status fa_bwd_rows_launch(const fa_args *a, void *workspace, cudaStream_t stream, fa_error *err);
/* Where they lie in that workspace. */
fa_bwd_row_numbers fa_bwd_rows_in(const fa_args *a, const void *workspace);
/* Gradient of the sinks, from these rows. */
fa_status fa_dsinks_launch(const fa_args *a, const fa_bwd_row_numbers *r, cudaStream_t stream, fa_error *err);
/* The gradient of the mask by the kernels of sm_80, which take every form of it. */
fa_status fa_dmask_sm80_launch(const fa_args *a, const fa_bwd_row_numbers *r, cudaStream_t stream, fa_error *err);
/* Parts of split keys, [splits][B HQ SQ][2 + DV] (maximum, sum, weighted values), to out and lse. */
fa_status fa_combine_launch(const fa_args *a, const fa_plan *plan, const float *parts, cudaStream_t stream,
                            fa_error *err);

fa_status fa_append_launch(const fa_append_args *a, cudaStream_t stream, fa_error *err);
fa_status fa_merge_launch(const fa_merge_args *a, cudaStream_t stream, fa_error *err);

/* FA_OK, or the text of the error. */
fa_status fa_cuda_status(cudaError_t error, const char *what, fa_error *err);
/* shared memory that a block may have on the device */
size_t fa_cuda_shared_limit(int device);

#ifdef __cplusplus
}

/* Starts `kernel` with `shared` bytes of shared memory; the kernel's one argument is p. */
template <typename P>
static fa_status fa_launch(const char *name, void (*kernel)(P), int64_t blocks, int chunks, int threads, size_t shared,
                           cudaStream_t stream, P p, fa_error *err)
{
    if (blocks == 0)
        return FA_OK;
    if (blocks > INT32_MAX)
        return fa_cuda_status(cudaErrorInvalidConfiguration, name, err);
    if (shared > (48 << 10)) {
        cudaError_t error = cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 (int)shared);
        if (error != cudaSuccess)
            return fa_cuda_status(error, name, err);
    }
    void *args[] = {&p};
    dim3 grid((unsigned)blocks, (unsigned)chunks);
    return fa_cuda_status(cudaLaunchKernel((const void *)kernel, grid, dim3((unsigned)threads), args, shared, stream),
                          name, err);
}
#endif

#endif
