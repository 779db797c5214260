/* What the processor has, what the system enables, and what the environment allows. */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "../fa.h"

#if defined(__x86_64__)
#include <cpuid.h>

/* AMD's cores do a dot product of bf16 pairs as fast as an fp32 multiply-add, so at twice its rate. Intel's do not: on
 * a Sapphire Rapids core whole forward kernels reach 76 GFLOP/s with it and 139 through fp32. */
static bool dot_bf16_is_fast(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(0, &a, &b, &c, &d) && b != signature_INTEL_ebx;
}

static uint64_t enabled_state(void) /* register files the system saves: xgetbv(0) */
{
    uint32_t lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return (uint64_t)hi << 32 | lo;
}

unsigned fa_cpu_detected(void)
{
    enum { YMM = 0x6, ZMM = 0xe6, TILES = 0x60000 };
    unsigned a, b, c, d, flags = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE))
        return 0;
    uint64_t state = enabled_state();
    unsigned fma_f16c = bit_FMA | bit_F16C, c1 = c;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return 0;
    if ((state & YMM) == YMM && (c1 & fma_f16c) == fma_f16c && (b & bit_AVX2))
        flags |= FA_CPU_AVX2;
    unsigned avx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    if ((flags & FA_CPU_AVX2) && (state & ZMM) == ZMM && (b & avx512) == avx512)
        flags |= FA_CPU_AVX512;
    const unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24, avx512_bf16 = 1u << 5;
    if ((state & TILES) == TILES && (d & amx_bf16) && (d & amx_tile))
        flags |= FA_CPU_AMX;
    if ((flags & FA_CPU_AVX512) && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & avx512_bf16))
        flags |= FA_CPU_AVX512BF16;
    return flags;
}
#elif defined(__aarch64__)
static bool dot_bf16_is_fast(void)
{
    return false;
}

unsigned fa_cpu_detected(void)
{
    return FA_CPU_NEON;
}
#else
static bool dot_bf16_is_fast(void)
{
    return false;
}

unsigned fa_cpu_detected(void)
{
    return 0;
}
#endif

static unsigned allowed(void)
{
    static const struct {
        const char *name;
        unsigned flags;
    } levels[] = {
        {"scalar", 0},
        {"avx2", FA_CPU_AVX2},
        {"avx512", FA_CPU_AVX2 | FA_CPU_AVX512},
        {"avx512bf16", FA_CPU_AVX2 | FA_CPU_AVX512 | FA_CPU_AVX512BF16},
    };
    const char *value = getenv("FLASHATTN_EXT_ISA");
    for (size_t i = 0; value && i < sizeof levels / sizeof levels[0]; i++)
        if (!strcmp(value, levels[i].name))
            return levels[i].flags;
    return dot_bf16_is_fast() ? ~0u : ~(unsigned)FA_CPU_AVX512BF16;
}

/* -1: not looked yet. Racing first calls compute the same value. */
static _Atomic int64_t cached = -1;

void fa_cpu_refresh(void)
{
    atomic_store(&cached, (int64_t)(fa_cpu_detected() & allowed()));
}

unsigned fa_cpu_enabled(void)
{
    int64_t flags = atomic_load(&cached);
    if (flags < 0) {
        fa_cpu_refresh();
        flags = atomic_load(&cached);
    }
    return (unsigned)flags;
}
