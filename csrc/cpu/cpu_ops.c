/* The table of CPU kernels, filled from the reference upwards, and its listing. */
#include "cpu_ops.h"

void fa_cpu_ops_init(fa_cpu_ops *ops, unsigned flags)
{
    *ops = (fa_cpu_ops){0};
    fa_cpu_ops_scalar(ops);
#ifdef FA_HAVE_X86
    if (flags & FA_CPU_AVX2)
        fa_cpu_ops_avx2(ops);
    if (flags & FA_CPU_AVX512)
        fa_cpu_ops_avx512(ops);
    if (flags & FA_CPU_AVX512BF16)
        fa_cpu_ops_avx512bf16(ops);
#endif
    (void)flags;
}

int64_t fa_dmask_tiles(const fa_args *a, int64_t panel_rows)
{
    const int64_t *size = a->mask.size;
    return size[0] * size[1] * (size[2] == 1 ? 1 : fa_ceil_div(size[2], panel_rows)) *
           (size[3] == 1 ? 1 : fa_ceil_div(size[3], FA_KEY_BLOCK));
}

static int list_op(const fa_cpu_kernel *kernels, int dtypes, const char *op, const char *target, bool usable,
                   fa_kernel_info *list, int n, int count)
{
    for (int t = 0; t < dtypes; t++) {
        if (!kernels[t].run)
            continue;
        if (count < n)
            list[count] = (fa_kernel_info){
                .name = kernels[t].name, .op = op, .target = target, .dtype = (fa_dtype)t, .usable = usable};
        count++;
    }
    return count;
}

int fa_kernels(fa_kernel_info *list, int n)
{
    static const struct {
        void (*init)(fa_cpu_ops *);
        unsigned needs;
    } targets[] = {
        {fa_cpu_ops_scalar, 0},
#ifdef FA_HAVE_X86
        {fa_cpu_ops_avx2, FA_CPU_AVX2},
        {fa_cpu_ops_avx512, FA_CPU_AVX512},
        {fa_cpu_ops_avx512bf16, FA_CPU_AVX512BF16},
#endif
    };
    unsigned enabled = fa_cpu_enabled();
    int count = 0;
    for (size_t i = 0; i < sizeof targets / sizeof targets[0]; i++) {
        fa_cpu_ops ops = {0};
        targets[i].init(&ops);
        bool usable = (enabled & targets[i].needs) == targets[i].needs;
        count = list_op(ops.fwd, 4, "fwd", ops.target, usable, list, n, count);
        count = list_op(ops.decode, FA_F8E4M3 + 1, "decode", ops.target, usable, list, n, count);
        count = list_op(ops.bwd, 4, "bwd", ops.target, usable, list, n, count);
        count = list_op(ops.dmask, 4, "dmask", ops.target, usable, list, n, count);
    }
    return count;
}

static fa_cpu_probes probes(void)
{
    fa_cpu_ops ops;
    fa_cpu_ops_init(&ops, fa_cpu_enabled());
    return ops.probes;
}

double fa_probe_fma(int64_t steps)
{
    fa_cpu_probes p = probes();
    if (p.fma)
        return p.fma(steps);
    volatile float x = 1;
    for (int64_t s = 0; s < steps; s++)
        x = x * 0.999f + 1e-3f;
    return (double)steps * 2;
}

double fa_probe_dot_bf16(int64_t steps)
{
    fa_cpu_probes p = probes();
    return p.dot_bf16 ? p.dot_bf16(steps) : 0;
}

double fa_probe_read(const float *data, int64_t floats)
{
    fa_cpu_probes p = probes();
    if (p.read)
        return p.read(data, floats);
    float sum = 0;
    for (int64_t i = 0; i < floats; i++)
        sum += data[i];
    volatile float sink = sum;
    (void)sink;
    return (double)floats * 4;
}
