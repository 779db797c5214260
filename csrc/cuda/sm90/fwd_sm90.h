/* Forward attention on Hopper (compute capability 9.0): bf16 and fp16, causal, windows, grouped heads. */
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
 *   - scale > 0;
 *   - none of mask, softcap, sinks, alibi, lengths, dropout, packed sequences, pages.
 * NaN and infinities: those of a hidden key's K never reach a row; those of its V reach the rows of the same tile of 128
 * or 192 queries if the block of BN keys that holds it is visible to some of them (0 times NaN). Nothing on the host can
 * know of them. V past the last key is never read. */
bool fa_fwd_sm90_can(const fa_args *a);

/* Starts the kernel on the stream; needs no workspace. a->lse is contiguous (B, HQ, SQ, 1). */
fa_status fa_fwd_sm90_launch(const fa_args *a, void *workspace, cudaStream_t stream, fa_error *err);

/* The instance that runs the call; the i-th of all, NULL behind the last. */
const fa_sm90_instance *fa_fwd_sm90_choose(const fa_args *a);
const fa_sm90_instance *fa_fwd_sm90_instance_at(int i);

fa_status fa_fwd_sm90_launch_instance(const fa_args *a, const fa_sm90_instance *f, cudaStream_t stream,
                                      fa_error *err);

#ifdef __cplusplus
}
#endif
#endif
