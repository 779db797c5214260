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

/* ---- the driver's functions, by name: the library then loads without a driver ------------------------------------ */

static void *driver_function(const char *name)
{
    void *f = NULL;
    cudaDriverEntryPointQueryResult found;
    cudaError_t e = cudaGetDriverEntryPointByVersion(name, &f, 12000, cudaEnableDefault, &found);
    return e == cudaSuccess && found == cudaDriverEntryPointSuccess ? f : NULL;
}

static fa_status refuse_driver(fa_error *err, const char *what, const char *name)
{
    snprintf(err->text, sizeof err->text, "%s: the driver has no %s; it must be of CUDA 12.0 or later", what, name);
    return FA_ERR_UNSUPPORTED;
}

/* ---- launches ---------------------------------------------------------------------------------------------------- */

/* An instance on a device, in the context that the runtime uses there. */
typedef struct prepared {
    const fa_sm90_instance *f;
    int device, processors;
    cudaFunction_t function;
} prepared;

/* The runtime keeps an instance's shared memory for each device, so that only the first of a thread's calls asks for
 * it; or a later one, where two instances share an entry. */
static fa_status prepare(const fa_sm90_instance *f, const prepared **result, fa_error *err)
{
    static thread_local prepared table[16];
    prepared &known = table[(uintptr_t)f / sizeof *f % 16];
    int device;
    cudaError_t e = cudaGetDevice(&device);
    if (e == cudaSuccess && (known.f != f || known.device != device)) {
        known = {NULL, device, 0, NULL};
        e = cudaDeviceGetAttribute(&known.processors, cudaDevAttrMultiProcessorCount, device);
        if (e == cudaSuccess)
            e = cudaFuncSetAttribute(f->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, f->shared_bytes);
        if (e == cudaSuccess)
            e = cudaGetFuncBySymbol(&known.function, f->kernel);
        if (e == cudaSuccess)
            known.f = f;
    }
    *result = &known;
    return e == cudaSuccess ? FA_OK : fa_sm90_refuse(err, f->name, cudaGetErrorString(e));
}

fa_status fa_sm90_prepare(const fa_sm90_instance *f, int *processors, fa_error *err)
{
    const prepared *known;
    fa_status status = prepare(f, &known, err);
    *processors = known->processors;
    return status;
}

typedef CUresult launch_fn(const CUlaunchConfig *, CUfunction, void **, void **);

/* Without the runtime between: alone that takes 0.1 to 0.5 us of 3 to 4 from a launch. */
fa_status fa_sm90_start(const fa_sm90_instance *f, int64_t blocks, const void *params, cudaStream_t stream,
                        fa_error *err)
{
    static launch_fn *const launch = (launch_fn *)driver_function("cuLaunchKernelEx");
    const prepared *known;
    fa_status status = launch ? prepare(f, &known, err) : refuse_driver(err, f->name, "cuLaunchKernelEx");
    if (status != FA_OK || blocks == 0)
        return status;
    void *arguments[] = {(void *)params};
    CUlaunchConfig config = {};
    config.gridDimX = (unsigned)blocks;
    config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1;
    config.blockDimX = (unsigned)f->threads;
    config.sharedMemBytes = (unsigned)f->shared_bytes;
    config.hStream = stream;
    CUresult e = launch(&config, known->function, arguments, NULL);
    if (e == CUDA_SUCCESS)
        return FA_OK;
    return fa_sm90_refuse(err, f->name, cudaGetErrorString((cudaError_t)e)); /* the numbers are the same */
}

/* ---- tensor maps ------------------------------------------------------------------------------------------------- */

typedef CUresult encode_fn(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                           const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                           CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

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
    static encode_fn *const encode = (encode_fn *)driver_function("cuTensorMapEncodeTiled");
    if (!encode)
        return refuse_driver(err, kernel, "cuTensorMapEncodeTiled");
    for (int i = 0; i < n; i++)
        if (!encode_map(encode, &maps[i]))
            return fa_sm90_refuse(err, kernel, "cuTensorMapEncodeTiled refused the strides of an input");
    return FA_OK;
}
