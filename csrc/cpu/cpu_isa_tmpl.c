/* This instruction set's entries of the table of kernels. Compiled once for each. */
#include "cpu_ops.h"
#include "cpu_tile.h"

_Static_assert(sizeof(fa_lanes) <= FA_LANES_BYTES, "the planner reserves FA_LANES_BYTES for a panel's lanes");

#define DECLARE(op)                                                                                                    \
    extern fa_task_fn FA_KERNEL(op, f32), FA_KERNEL(op, bf16), FA_KERNEL(op, f16);
#define DECLARE_ROWS(op)                                                                                               \
    extern fa_rows_fn FA_KERNEL(op, f32), FA_KERNEL(op, bf16), FA_KERNEL(op, f16);
DECLARE(fwd)
DECLARE(decode)
DECLARE(bwd)
DECLARE(dmask)
DECLARE_ROWS(bwd_pre)
DECLARE_ROWS(bwd_post)
extern fa_task_fn FA_KERNEL(decode, i8), FA_KERNEL(decode, f8e4m3);

extern void FA_LOCAL(cpu_probes)(fa_cpu_probes *probes);

#define ENTRY(op, dtype) {FA_KERNEL_NAME(op, dtype), FA_KERNEL(op, dtype)}
#define FILL(op)                                                                                                       \
    do {                                                                                                               \
        ops->op[FA_F32] = (fa_cpu_kernel)ENTRY(op, f32);                                                               \
        ops->op[FA_BF16] = (fa_cpu_kernel)ENTRY(op, bf16);                                                             \
        ops->op[FA_F16] = (fa_cpu_kernel)ENTRY(op, f16);                                                               \
    } while (0)
#define FILL_ROWS(op)                                                                                                  \
    do {                                                                                                               \
        ops->op[FA_F32] = FA_KERNEL(op, f32);                                                                          \
        ops->op[FA_BF16] = FA_KERNEL(op, bf16);                                                                        \
        ops->op[FA_F16] = FA_KERNEL(op, f16);                                                                          \
    } while (0)

void FA_LOCAL(cpu_ops)(fa_cpu_ops *ops)
{
    FILL(fwd);
    FILL(decode);
    ops->decode[FA_I8] = (fa_cpu_kernel)ENTRY(decode, i8);
    ops->decode[FA_F8E4M3] = (fa_cpu_kernel)ENTRY(decode, f8e4m3);
    FILL(bwd);
    FILL(dmask);
    FILL_ROWS(bwd_pre);
    FILL_ROWS(bwd_post);
    FA_LOCAL(cpu_probes)(&ops->probes);
    ops->panel_rows = BM;
    ops->lanes = VL;
    ops->target = FA_STR(FA_ISA);
#ifdef FA_ISA_AVX512BF16
    ops->pair_units[FA_BF16] = true;
#endif
}
