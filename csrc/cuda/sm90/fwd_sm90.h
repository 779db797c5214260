/* Forward attention on Hopper (compute capability 9.0): bf16, fp16, and fp32 without options. */
#ifndef FA_FWD_SM90_H
#define FA_FWD_SM90_H

#include "sm90_host.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Can this kernel run the call? A pure function of the arguments; whether the device is a Hopper is the caller's to
 * know. It takes q, k, v of bf16 or f16 with
 *   - D and DV multiples of 8 up to 256; last strides 1, other strides of sizes above 1 multiples of 8 and not negative
 *     (0, a broadcast, for heads and batches of q, k and v), data aligned to 16 bytes;
 *   - all options, lengths and packed sequences; no pages, quantised keys and tree masks.
 * and of f32 where it is not to be rounded to TF32, with
 *   - D and DV multiples of 4 up to 128; last strides 1, other strides multiples of 4, those of rows of k and v below
 *     2^29, data aligned to 16 bytes;
 *   - nothing but causal and windows, at least one key, a scale above 0; not few tiles with many keys, which kernels
 *     that split keys do better.
 * NaN and infinities of a hidden key reach no row; those of V cost time. V past the last key is never used. */
bool fa_fwd_sm90_can(const fa_args *a);

/* Is it a call with nothing but causal and windows, for the instances without options? */
bool fa_fwd_sm90_is_plain(const fa_args *a);

/* Bytes of workspace. */
size_t fa_fwd_sm90_workspace(const fa_args *a);

/* Starts the kernel on the stream. a->lse is contiguous (B, HQ, SQ, 1). */
fa_status fa_fwd_sm90_launch(const fa_args *a, void *workspace, cudaStream_t stream, fa_error *err);

/* The instance that runs the call; the i-th of all, NULL behind the last. */
const fa_sm90_instance *fa_fwd_sm90_choose(const fa_args *a);
const fa_sm90_instance *fa_fwd_sm90_instance_at(int i);

fa_status fa_fwd_sm90_launch_instance(const fa_args *a, const fa_sm90_instance *f, void *workspace,
                                      cudaStream_t stream, fa_error *err);

#ifdef __cplusplus
}
#endif
#endif
