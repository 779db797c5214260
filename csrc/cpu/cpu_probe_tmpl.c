/* Work whose time gives the machine's ceilings: multiply-adds from registers, and reading memory. Compiled once for
 * each instruction set; timed by whoever calls. */
#include "cpu_ops.h"
#include "cpu_simd.h"

#define CHAINS 12 /* independent sums: more than latency times issue rate, and few enough for 16 registers */

FA_INLINE double multiply_add(int64_t steps, int bf16)
{
    vf sum[CHAINS], x = v_set1(0.999f), y = v_set1(1e-3f);
    FA_UNROLL
    for (int i = 0; i < CHAINS; i++)
        sum[i] = v_set1((float)i);
    for (int64_t s = 0; s < steps; s++) {
        FA_UNROLL
        for (int i = 0; i < CHAINS; i++) {
#ifdef FA_ISA_AVX512BF16
            if (bf16) {
                sum[i] = v_dot_bf16(sum[i], x, y);
                continue;
            }
#endif
            (void)bf16;
            sum[i] = v_fma(sum[i], x, y);
        }
    }
    vf all = v_zero();
    FA_UNROLL
    for (int i = 0; i < CHAINS; i++)
        all = v_add(all, sum[i]);
    volatile float sink = v_hsum(all); /* the compiler must not drop the loop */
    (void)sink;
    return (double)steps * CHAINS * VL * (bf16 ? 4 : 2);
}

static double fma_probe(int64_t steps)
{
    return multiply_add(steps, 0);
}

#ifdef FA_ISA_AVX512BF16
static double dot_probe(int64_t steps)
{
    return multiply_add(steps, 1);
}
#endif

static double read_probe(const float *data, int64_t floats)
{
    vf a = v_zero(), b = a, c = a, d = a;
    for (int64_t i = 0; i + 4 * VL <= floats; i += 4 * VL) {
        a = v_add(a, v_load(data + i));
        b = v_add(b, v_load(data + i + VL));
        c = v_add(c, v_load(data + i + 2 * VL));
        d = v_add(d, v_load(data + i + 3 * VL));
    }
    volatile float sink = v_hsum(v_add(v_add(a, b), v_add(c, d)));
    (void)sink;
    return (double)floats * 4;
}

void FA_LOCAL(cpu_probes)(fa_cpu_probes *probes)
{
    probes->fma = fma_probe;
    probes->read = read_probe;
#ifdef FA_ISA_AVX512BF16
    probes->dot_bf16 = dot_probe;
#endif
}
