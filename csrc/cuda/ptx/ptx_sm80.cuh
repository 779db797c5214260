/* Instructions of sm_80, one wrapper each. Lane numbers and fragments are those of the PTX manual: in a fragment of
 * 16 x 8 results lane 4g + t holds row g, columns 2t and 2t + 1, then row g + 8, the same columns. */
#ifndef FA_PTX_SM80_CUH
#define FA_PTX_SM80_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

/* c (16 x 8) += a (16 x 16) b (16 x 8) */
__device__ __forceinline__ void ptx_mma(float c[4], const uint32_t a[4], const uint32_t b[2], __nv_bfloat16)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void ptx_mma(float c[4], const uint32_t a[4], const uint32_t b[2], __half)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* c (16 x 8) += a (16 x 8) b (8 x 8), operands in tf32: fp32 whose last 13 bits do not count */
__device__ __forceinline__ void ptx_mma_tf32(float c[4], const uint32_t a[4], const uint32_t b[2])
{
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ uint32_t ptx_to_tf32(float x)
{
    uint32_t r;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
    return r;
}

__device__ __forceinline__ uint32_t ptx_shared(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* Four 8 x 8 matrices of 16-bit elements; lane 8m + r gives the address, in shared memory, of row r of matrix m. */
__device__ __forceinline__ void ptx_ldmatrix(uint32_t r[4], uint32_t row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

__device__ __forceinline__ void ptx_ldmatrix_trans(uint32_t r[4], uint32_t row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

__device__ __forceinline__ void ptx_ldmatrix(uint32_t r[4], const void *row)
{
    ptx_ldmatrix(r, ptx_shared(row));
}

__device__ __forceinline__ void ptx_ldmatrix_trans(uint32_t r[4], const void *row)
{
    ptx_ldmatrix_trans(r, ptx_shared(row));
}

/* 16 bytes at an address in shared memory */
__device__ __forceinline__ void ptx_load_shared(uint32_t r[4], uint32_t at)
{
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

/* 16 bytes from global to shared memory, of which the first `bytes` (16 or 0) are read and the rest become 0 */
__device__ __forceinline__ void ptx_cp_async(uint32_t to, const void *from, int bytes)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void ptx_cp_async(void *to, const void *from, int bytes)
{
    ptx_cp_async(ptx_shared(to), from, bytes);
}

/* 4, 8 or 16 bytes, as many as `bytes` says, all of them read */
template <int bytes> __device__ __forceinline__ void ptx_cp_async_few(uint32_t to, const void *from)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(bytes) : "memory");
}

/* how the second-level cache treats what is read: kept like all else, or the first to go */
__device__ __forceinline__ uint64_t ptx_cache_policy(bool once)
{
    uint64_t policy;
    if (once)
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    else
        asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

/* ptx_cp_async with a policy */
__device__ __forceinline__ void ptx_cp_async_policy(void *to, const void *from, int bytes, uint64_t policy)
{
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(ptx_shared(to)), "l"(from),
                 "r"(bytes), "l"(policy)
                 : "memory");
}

/* the same of 4 bytes, or 0 */
__device__ __forceinline__ void ptx_cp_async_4(void *to, const void *from, int bytes)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(ptx_shared(to)), "l"(from), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void ptx_cp_async_commit(void)
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* until at most `groups` of the newest groups are under way */
template <int groups> __device__ __forceinline__ void ptx_cp_async_wait(void)
{
    asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

__device__ __forceinline__ float ptx_reciprocal(float x)
{
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float ptx_exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#endif
