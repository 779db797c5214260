/* Backward attention on Hopper (compute capability 9.0): bf16 and fp16; the same bits in every run. */
#ifndef FA_BWD_SM90_H
#define FA_BWD_SM90_H

#include "bwd_sm90_params.h"
#include "sm90_host.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Can this kernel run the call? A pure function of the arguments; whether the device is a Hopper is the caller's to
 * know. It takes q, k, v of bf16 or f16 with
 *   - D and DV multiples of 8 up to 256; q, k, v, out, dout, dq, dk, dv with last strides 1, other strides of sizes
 *     above 1 multiples of 8 and positive (on inputs also 0, a broadcast, of heads and batch), data
 *     aligned to 16 bytes;
 *   - every option but packed sequences, pages, and dropout of everything.
 * What lies past SQ or SK, or past a length, is never read. */
bool fa_bwd_sm90_can(const fa_args *a);

/* Bytes of workspace: dQ in fp32 and two rows of fp32 per query, both with SQ rounded up to the block and D to the
 * kernel's, and one flag per block of queries; with lengths four tensor maps per batch; a bool mask as bits, not
 * broadcast. */
size_t fa_bwd_sm90_workspace(const fa_args *a);

/* Starts the kernels on the stream. workspace is aligned to 256 bytes and needs no initial value. */
fa_status fa_bwd_sm90_launch(const fa_args *a, void *workspace, cudaStream_t stream, fa_error *err);

/* The instance that runs the call, NULL where none can; the i-th of all, NULL behind the last. */
const fa_sm90_instance *fa_bwd_sm90_choose(const fa_args *a);
const fa_sm90_instance *fa_bwd_sm90_instance_at(int i);

/* row_lse, row_delta and turn from lse, out, dout and dlse; with their options, maps and bits. */
cudaError_t fa_bwd_pre_launch(const fa_bwd_sm90_params *p, fa_dtype dtype, cudaStream_t stream);
/* dq from dq_sum, whose rows have D columns. */
cudaError_t fa_bwd_post_launch(const fa_bwd_sm90_params *p, fa_dtype dtype, int D, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
