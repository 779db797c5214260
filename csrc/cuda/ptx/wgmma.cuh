/* wgmma: products of 16-bit matrices by a warpgroup, accumulated in registers in fp32 (PTX ISA, "wgmma").
 *
 *   D (64, N) += A (64, 16) B (16, N)
 *
 * A lies in shared memory or in registers, B in shared memory. One thread holds d[8 c + 0 .. 8 c + 7]: with
 * row = 16 * warp + lane / 4 and column = 16 c + 2 (lane % 4),
 *   d[8 c + 0, 1]: (row, column), (row, column + 1)     d[8 c + 2, 3]: the same of row + 8
 *   d[8 c + 4 .. 7]: the same of column + 8
 * so that 16 columns of D, packed in pairs, are the A operand of a product over those columns.
 *
 * A batch is: fa_wgmma_fence, products, fa_wgmma_commit; its operands are left alone until fa_wgmma_wait. */
#ifndef FA_PTX_WGMMA_CUH
#define FA_PTX_WGMMA_CUH

#include <stdint.h>

#include "mbarrier.cuh"

struct fa_bf16_t {
    uint16_t bits;
};
struct fa_f16_t {
    uint16_t bits;
};

/* Orders earlier accesses of the warpgroup to registers before the products that follow. */
__device__ __forceinline__ void fa_wgmma_fence(void)
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void fa_wgmma_commit(void)
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* Waits until at most `Pending` batches are in flight. */
template <int Pending> __device__ __forceinline__ void fa_wgmma_wait(void)
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

/* Keeps the compiler from moving uses of registers over this point. */
template <int R> __device__ __forceinline__ void fa_wgmma_hold(float (&d)[R])
{
#pragma unroll
    for (int i = 0; i < R; i++)
        asm volatile("" : "+f"(d[i])::"memory");
}

template <int R> __device__ __forceinline__ void fa_wgmma_hold(uint32_t (&d)[R])
{
#pragma unroll
    for (int i = 0; i < R; i++)
        asm volatile("" : "+r"(d[i])::"memory");
}

/* An operand in rows of 128 bytes with the 128-byte swizzle, as a tensor map of that swizzle writes them, is described
 * by 64 bits of which only the lower 32 differ: the address, and for operands contiguous along N (V) the bytes from 64
 * columns to the next 64, `panel`. Operands contiguous along the summed dimension (Q, K) do not use panel. The upper
 * half says 128-byte swizzle and that eight rows end after 1024 bytes. To move by n bytes, add n / 16. */
#define FA_DESCRIPTOR_HIGH "0x40000040"

__device__ __forceinline__ uint32_t fa_wgmma_descriptor(const void *p, uint32_t panel)
{
    return fa_shared_address(p) >> 4 | panel >> 4 << 16;
}

/* All 64 bits: for kernels that have registers for them, fewer instructions than putting the halves together. */
__device__ __forceinline__ uint64_t fa_wgmma_descriptor_64(const void *p, uint32_t panel)
{
    return (uint64_t)0x40000040 << 32 | fa_wgmma_descriptor(p, panel);
}

/* The registers of D in the text of an instruction, and as operands. */
#define FA_REGS_0 "%0,%1,%2,%3,%4,%5,%6,%7"
#define FA_REGS_1 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define FA_REGS_2 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define FA_REGS_3 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define FA_REGS_4 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define FA_REGS_5 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define FA_REGS_6 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define FA_REGS_7 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define FA_REGS_8 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define FA_REGS_9 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define FA_REGS_10 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define FA_REGS_11 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define FA_REGS_12 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define FA_REGS_13 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define FA_REGS_14 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define FA_REGS_15 ",%120,%121,%122,%123,%124,%125,%126,%127"

#define FA_OUT_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FA_OUT_8(i) FA_OUT_4(i), FA_OUT_4(i + 4)
#define FA_OUTS_0 FA_OUT_8(0)
#define FA_OUTS_1 FA_OUTS_0, FA_OUT_8(8)
#define FA_OUTS_2 FA_OUTS_1, FA_OUT_8(16)
#define FA_OUTS_3 FA_OUTS_2, FA_OUT_8(24)
#define FA_OUTS_4 FA_OUTS_3, FA_OUT_8(32)
#define FA_OUTS_5 FA_OUTS_4, FA_OUT_8(40)
#define FA_OUTS_6 FA_OUTS_5, FA_OUT_8(48)
#define FA_OUTS_7 FA_OUTS_6, FA_OUT_8(56)
#define FA_OUTS_8 FA_OUTS_7, FA_OUT_8(64)
#define FA_OUTS_9 FA_OUTS_8, FA_OUT_8(72)
#define FA_OUTS_10 FA_OUTS_9, FA_OUT_8(80)
#define FA_OUTS_11 FA_OUTS_10, FA_OUT_8(88)
#define FA_OUTS_12 FA_OUTS_11, FA_OUT_8(96)
#define FA_OUTS_13 FA_OUTS_12, FA_OUT_8(104)
#define FA_OUTS_14 FA_OUTS_13, FA_OUT_8(112)
#define FA_OUTS_15 FA_OUTS_14, FA_OUT_8(120)

#define FA_TEXT_0 FA_REGS_0
#define FA_TEXT_1 FA_TEXT_0 FA_REGS_1
#define FA_TEXT_2 FA_TEXT_1 FA_REGS_2
#define FA_TEXT_3 FA_TEXT_2 FA_REGS_3
#define FA_TEXT_4 FA_TEXT_3 FA_REGS_4
#define FA_TEXT_5 FA_TEXT_4 FA_REGS_5
#define FA_TEXT_6 FA_TEXT_5 FA_REGS_6
#define FA_TEXT_7 FA_TEXT_6 FA_REGS_7
#define FA_TEXT_8 FA_TEXT_7 FA_REGS_8
#define FA_TEXT_9 FA_TEXT_8 FA_REGS_9
#define FA_TEXT_10 FA_TEXT_9 FA_REGS_10
#define FA_TEXT_11 FA_TEXT_10 FA_REGS_11
#define FA_TEXT_12 FA_TEXT_11 FA_REGS_12
#define FA_TEXT_13 FA_TEXT_12 FA_REGS_13
#define FA_TEXT_14 FA_TEXT_13 FA_REGS_14
#define FA_TEXT_15 FA_TEXT_14 FA_REGS_15

template <typename T, int N> struct fa_wgmma;

/* N columns, R = N / 2 registers of which the last group of eight is LAST; R1 .. R6 are the numbers R + 1 .. R + 6.
 * ss: A and B by descriptors; rs: A in registers. TransB: B is contiguous along N. add = 0 starts from zero. */
#define FA_WGMMA(T, NAME, N, R, LAST, R1, R2, R3, R4, R5, R6)                                                          \
    template <> struct fa_wgmma<T, N> {                                                                                \
        template <int TransA, int TransB>                                                                              \
        static __device__ __forceinline__ void ss(float (&d)[N / 2], uint32_t a, uint32_t b, int add)                  \
        {                                                                                                              \
            asm volatile("{\n\t.reg .pred p;\n\t.reg .b64 da, db;\n\tsetp.ne.b32 p, %" #R2 ", 0;\n\t"                  \
                         "mov.b64 da, {%" #R ", " FA_DESCRIPTOR_HIGH "};\n\t"                                          \
                         "mov.b64 db, {%" #R1 ", " FA_DESCRIPTOR_HIGH "};\n\t"                                         \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" FA_TEXT_##LAST "}, "     \
                         "da, db, p, 1, 1, %" #R3 ", %" #R4 ";\n\t}"                                                   \
                         : FA_OUTS_##LAST                                                                              \
                         : "r"(a), "r"(b), "r"(add), "n"(TransA), "n"(TransB));                                        \
        }                                                                                                              \
        template <int TransB>                                                                                          \
        static __device__ __forceinline__ void rs(float (&d)[N / 2], const uint32_t *a, uint32_t b, int add)           \
        {                                                                                                              \
            asm volatile("{\n\t.reg .pred p;\n\t.reg .b64 db;\n\tsetp.ne.b32 p, %" #R5 ", 0;\n\t"                      \
                         "mov.b64 db, {%" #R4 ", " FA_DESCRIPTOR_HIGH "};\n\t"                                         \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" FA_TEXT_##LAST "}, "     \
                         "{%" #R ", %" #R1 ", %" #R2 ", %" #R3 "}, db, p, 1, 1, %" #R6 ";\n\t}"                        \
                         : FA_OUTS_##LAST                                                                              \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(add), "n"(TransB));                 \
        }                                                                                                              \
        template <int TransA, int TransB>                                                                              \
        static __device__ __forceinline__ void ss(float (&d)[N / 2], uint64_t a, uint64_t b, int add)                  \
        {                                                                                                              \
            asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #R2 ", 0;\n\t"                                       \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" FA_TEXT_##LAST "}, "     \
                         "%" #R ", %" #R1 ", p, 1, 1, %" #R3 ", %" #R4 ";\n\t}"                                        \
                         : FA_OUTS_##LAST                                                                              \
                         : "l"(a), "l"(b), "r"(add), "n"(TransA), "n"(TransB));                                        \
        }                                                                                                              \
        template <int TransB>                                                                                          \
        static __device__ __forceinline__ void rs(float (&d)[N / 2], const uint32_t *a, uint64_t b, int add)           \
        {                                                                                                              \
            asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #R5 ", 0;\n\t"                                       \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" FA_TEXT_##LAST "}, "     \
                         "{%" #R ", %" #R1 ", %" #R2 ", %" #R3 "}, %" #R4 ", p, 1, 1, %" #R6 ";\n\t}"                  \
                         : FA_OUTS_##LAST                                                                              \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TransB));                 \
        }                                                                                                              \
    };

#define FA_WGMMA_SIZES(T, NAME)                                                                                        \
    FA_WGMMA(T, NAME, 16, 8, 0, 9, 10, 11, 12, 13, 14)                                                                 \
    FA_WGMMA(T, NAME, 32, 16, 1, 17, 18, 19, 20, 21, 22)                                                               \
    FA_WGMMA(T, NAME, 48, 24, 2, 25, 26, 27, 28, 29, 30)                                                               \
    FA_WGMMA(T, NAME, 64, 32, 3, 33, 34, 35, 36, 37, 38)                                                               \
    FA_WGMMA(T, NAME, 80, 40, 4, 41, 42, 43, 44, 45, 46)                                                               \
    FA_WGMMA(T, NAME, 96, 48, 5, 49, 50, 51, 52, 53, 54)                                                               \
    FA_WGMMA(T, NAME, 112, 56, 6, 57, 58, 59, 60, 61, 62)                                                              \
    FA_WGMMA(T, NAME, 128, 64, 7, 65, 66, 67, 68, 69, 70)                                                              \
    FA_WGMMA(T, NAME, 144, 72, 8, 73, 74, 75, 76, 77, 78)                                                              \
    FA_WGMMA(T, NAME, 160, 80, 9, 81, 82, 83, 84, 85, 86)                                                              \
    FA_WGMMA(T, NAME, 176, 88, 10, 89, 90, 91, 92, 93, 94)                                                             \
    FA_WGMMA(T, NAME, 192, 96, 11, 97, 98, 99, 100, 101, 102)                                                          \
    FA_WGMMA(T, NAME, 208, 104, 12, 105, 106, 107, 108, 109, 110)                                                      \
    FA_WGMMA(T, NAME, 224, 112, 13, 113, 114, 115, 116, 117, 118)                                                      \
    FA_WGMMA(T, NAME, 240, 120, 14, 121, 122, 123, 124, 125, 126)                                                      \
    FA_WGMMA(T, NAME, 256, 128, 15, 129, 130, 131, 132, 133, 134)

FA_WGMMA_SIZES(fa_bf16_t, "bf16")
FA_WGMMA_SIZES(fa_f16_t, "f16")

#endif
