/* What the host sides of the Hopper kernels share. */
#include "sm90_host.h"

#include <cuda_runtime.h>
#include <stdio.h>

bool fa_sm90_is_plain(const fa_args *a)
{
    return !a->mask.data && !a->sinks.data && !a->alibi.data && !a->q_seqlens.data && !a->kv_seqlens.data &&
           a->softcap == 0 && a->dropout_p == 0 && !a->by_sequence;
}

static int64_t clamp(int64_t x, int64_t lo, int64_t hi)
{
    return x < lo ? lo : x > hi ? hi : x;
}

void fa_sm90_band(const fa_args *a, int32_t *lo_shift, int32_t *hi_shift)
{
    const int64_t offset = a->bottom_right ? a->k.size[2] - a->q.size[2] : 0, bound = FA_POSITION_BOUND;
    const bool left = a->window_left >= 0, right = a->window_right >= 0;
    *lo_shift = (int32_t)(left ? clamp(offset - clamp(a->window_left, 0, bound), -bound, bound) : -bound);
    *hi_shift = (int32_t)(right ? clamp(offset + clamp(a->window_right, 0, bound) + 1, -bound, bound) : bound);
}

fa_status fa_sm90_refuse(fa_error *err, const char *what, const char *why)
{
    snprintf(err->text, sizeof err->text, "%s: %s", what, why);
    return FA_ERR_UNSUPPORTED;
}

/* The runtime keeps an instance's shared memory for each device, so that only the first of a thread's calls asks for
 * it; or a later one, where two instances share an entry. */
fa_status fa_sm90_prepare(const fa_sm90_instance *f, int *processors, fa_error *err)
{
    static thread_local struct {
        const fa_sm90_instance *f;
        int device, processors;
    } table[16];
    auto &known = table[(uintptr_t)f / sizeof *f % 16];
    int device;
    cudaError_t e = cudaGetDevice(&device);
    if (e == cudaSuccess && (known.f != f || known.device != device)) {
        known = {NULL, device, 0};
        e = cudaDeviceGetAttribute(&known.processors, cudaDevAttrMultiProcessorCount, device);
        if (e == cudaSuccess)
            e = cudaFuncSetAttribute(f->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, f->shared_bytes);
        if (e == cudaSuccess)
            known.f = f;
    }
    *processors = known.processors;
    return e == cudaSuccess ? FA_OK : fa_sm90_refuse(err, f->name, cudaGetErrorString(e));
}

/* ---- tensor maps ------------------------------------------------------------------------------------------------- */

typedef CUresult encode_fn(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                           const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                           CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/* By name: the library then loads without a driver. */
static encode_fn *find_encode(void)
{
    void *f = NULL;
    cudaDriverEntryPointQueryResult found;
    cudaError_t e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found);
    return e == cudaSuccess && found == cudaDriverEntryPointSuccess ? (encode_fn *)f : NULL;
}

static bool encode_map(encode_fn *encode, const fa_sm90_map *m)
{
    const fa_tensor *t = m->t;
    int width = t->dtype == FA_F32 ? 4 : 2;
    cuuint64_t size[4]; /* from columns outwards */
    for (int i = 0; i < 4; i++)
        size[i] = (cuuint64_t)t->size[3 - i];
    cuuint64_t stride[3]; /* in bytes, from rows outwards */
    for (int i = 0; i < 3; i++) {
        bool still = t->size[2 - i] == 1 || t->stride[2 - i] == 0;
        stride[i] = still ? 16 : (cuuint64_t)t->stride[2 - i] * width;
        if (still)
            size[i + 1] = 1;
        if (i > 0)
            m->steps[i - 1] = still ? 0 : 1;
    }
    cuuint32_t box[4] = {(cuuint32_t)(128 / width), (cuuint32_t)m->rows, 1, 1}, one[4] = {1, 1, 1, 1};
    CUtensorMapDataType type = t->dtype == FA_F32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                               : t->dtype == FA_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                     : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    return encode(m->map, type, 4, t->data, size, stride, box, one, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

fa_status fa_sm90_encode(const char *kernel, const fa_sm90_map *maps, int n, fa_error *err)
{
    static encode_fn *const encode = find_encode();
    if (!encode)
        return fa_sm90_refuse(err, kernel, "the driver has no cuTensorMapEncodeTiled; it must be of CUDA 12.0 or later");
    for (int i = 0; i < n; i++)
        if (!encode_map(encode, &maps[i]))
            return fa_sm90_refuse(err, kernel, "cuTensorMapEncodeTiled refused the strides of an input");
    return FA_OK;
}
