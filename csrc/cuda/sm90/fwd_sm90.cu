/* Host side of the Hopper forward kernel: which calls it takes, which instance runs them, tensor maps, launch. */
#include "fwd_sm90.h"

#include <cuda_runtime.h>
#include <math.h>
#include <stdio.h>

#include "fwd_sm90_instances.h"
#include "fwd_sm90_params.h"

#define FA_POSITION_BOUND ((int64_t)1 << 30) /* = FA_MAX_SEQ: no two positions are further apart */

extern "C" {
#define FA_DECLARE(name, ...) extern const fa_fwd_sm90_instance fa_fwd_sm90_bf16_##name, fa_fwd_sm90_f16_##name;
FA_FWD_SM90_INSTANCES(FA_DECLARE)
#undef FA_DECLARE
}

/* ---- what it can do -------------------------------------------------------------------------------------------- */

static bool readable(const fa_tensor *t)
{
    bool ok = t->stride[3] == 1 && (uintptr_t)t->data % 16 == 0 && t->size[3] % 8 == 0;
    ok = ok && (t->size[2] == 1 || t->stride[2] != 0); /* a map has no broadcast along the rows of its boxes */
    for (int i = 0; i < 3; i++)
        ok = ok && (t->size[i] == 1 || (t->stride[i] >= 0 && t->stride[i] % 8 == 0 && t->stride[i] < (int64_t)1 << 38));
    return ok;
}

static bool plain(const fa_args *a)
{
    return !a->mask.data && !a->sinks.data && !a->alibi.data && !a->q_seqlens.data && !a->kv_seqlens.data &&
           a->softcap == 0 && a->dropout_p == 0 && !a->by_sequence && !a->cu_q.data && !a->cu_k.data &&
           !a->block_table.data && !a->tree_mask.data && !a->k_scale.data && !a->v_scale.data;
}

extern "C" bool fa_fwd_sm90_can(const fa_args *a)
{
    bool type = a->q.dtype == FA_BF16 || a->q.dtype == FA_F16;
    bool sizes = a->q.size[3] <= 256 && a->v.size[3] <= 256 &&
                 a->q.size[0] * a->q.size[1] <= FA_POSITION_BOUND / (a->q.size[2] / 128 + 1); /* tiles count in int32 */
    return type && sizes && plain(a) && a->scale > 0 && readable(&a->q) && readable(&a->k) && readable(&a->v) &&
           readable(&a->out);
}

/* ---- tensor maps ----------------------------------------------------------------------------------------------- */

typedef CUresult encode_fn(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                           const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                           CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

static encode_fn *find_encode(void)
{
    void *f = NULL;
    cudaDriverEntryPointQueryResult found;
    cudaError_t e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found);
    return e == cudaSuccess && found == cudaDriverEntryPointSuccess ? (encode_fn *)f : NULL;
}

/* Boxes of `rows` rows and 64 columns of (B, H, S, D), swizzled. A dimension with stride 0 has size 1 in the map and
 * its coordinate never moves; steps: of head and batch. */
static bool encode_map(encode_fn *encode, CUtensorMap *map, int32_t steps[2], const fa_tensor *t, int rows)
{
    cuuint64_t size[4]; /* from columns outwards */
    for (int i = 0; i < 4; i++)
        size[i] = (cuuint64_t)t->size[3 - i];
    cuuint64_t stride[3]; /* in bytes, from rows outwards */
    for (int i = 0; i < 3; i++) {
        bool still = t->size[2 - i] == 1 || t->stride[2 - i] == 0;
        stride[i] = still ? 16 : (cuuint64_t)t->stride[2 - i] * 2;
        if (still)
            size[i + 1] = 1;
        if (i > 0)
            steps[i - 1] = still ? 0 : 1;
    }
    cuuint32_t box[4] = {64, (cuuint32_t)rows, 1, 1}, one[4] = {1, 1, 1, 1};
    CUtensorMapDataType type = t->dtype == FA_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    return encode(map, type, 4, t->data, size, stride, box, one, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

/* ---- launch ---------------------------------------------------------------------------------------------------- */

static int64_t clamp(int64_t x, int64_t lo, int64_t hi)
{
    return x < lo ? lo : x > hi ? hi : x;
}

static fa_fwd_sm90_view view_of(const fa_tensor *t)
{
    fa_fwd_sm90_view v = {t->data, t->stride[0], t->stride[1], t->stride[2]};
    return v;
}

static void fill_sizes(fa_fwd_sm90_params *p, const fa_args *a, const fa_fwd_sm90_instance *f, int processors)
{
    int64_t offset = a->bottom_right ? a->k.size[2] - a->q.size[2] : 0;
    p->q = view_of(&a->q);
    p->k = view_of(&a->k);
    p->v = view_of(&a->v);
    p->out = view_of(&a->out);
    p->lse = (float *)a->lse.data;
    p->B = (int32_t)a->q.size[0];
    p->HQ = (int32_t)a->q.size[1];
    p->group = (int32_t)(a->q.size[1] / a->k.size[1]);
    p->SQ = (int32_t)a->q.size[2];
    p->SK = (int32_t)a->k.size[2];
    p->D = (int32_t)a->q.size[3];
    p->DV = (int32_t)a->v.size[3];
    bool left = a->window_left >= 0, right = a->window_right >= 0;
    int64_t bound = FA_POSITION_BOUND;
    p->lo_shift = (int32_t)(left ? clamp(offset - clamp(a->window_left, 0, bound), -bound, bound) : -bound);
    p->hi_shift = (int32_t)(right ? clamp(offset + clamp(a->window_right, 0, bound) + 1, -bound, bound) : bound);
    p->scale_log2 = (float)(a->scale * 1.4426950408889634);
    p->tiles = (p->SQ + f->BM - 1) / f->BM;
    int64_t heads = a->q.size[0] * a->q.size[1], pairs = heads * ((p->tiles + 1) / 2);
    p->parts = right && !left && pairs >= processors ? 2 : 1;
    p->units = (int32_t)(p->parts == 2 ? pairs : heads * p->tiles);
}

static fa_status refuse(fa_error *err, const char *what, const char *why)
{
    snprintf(err->text, sizeof err->text, "%s: %s", what, why);
    return FA_ERR_UNSUPPORTED;
}

static fa_status fill_maps(fa_fwd_sm90_params *p, const fa_args *a, const fa_fwd_sm90_instance *f, fa_error *err)
{
    encode_fn *encode = find_encode();
    if (!encode)
        return refuse(err, f->name, "the driver has no cuTensorMapEncodeTiled; it must be of CUDA 12.0 or later");
    bool ok = encode_map(encode, &p->q_map, p->q_steps, &a->q, 64);
    if (p->SK > 0)
        ok = ok && encode_map(encode, &p->k_map, p->k_steps, &a->k, f->BN) &&
             encode_map(encode, &p->v_map, p->v_steps, &a->v, f->BN);
    else /* no keys: what is loaded for the one hidden block does not matter */
        ok = ok && encode_map(encode, &p->k_map, p->k_steps, &a->q, f->BN) &&
             encode_map(encode, &p->v_map, p->v_steps, &a->q, f->BN);
    return ok ? FA_OK : refuse(err, f->name, "cuTensorMapEncodeTiled refused the strides of q, k or v");
}

extern "C" fa_status fa_fwd_sm90_launch_instance(const fa_args *a, const fa_fwd_sm90_instance *f, cudaStream_t stream,
                                                 fa_error *err)
{
    fa_fwd_sm90_params p = {};
    int device, processors;
    cudaError_t e = cudaGetDevice(&device);
    if (e == cudaSuccess)
        e = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (e == cudaSuccess)
        e = cudaFuncSetAttribute(f->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, f->shared_bytes);
    if (e != cudaSuccess)
        return refuse(err, f->name, cudaGetErrorString(e));
    if (a->q.size[0] * a->q.size[1] * a->q.size[2] == 0)
        return FA_OK;
    fill_sizes(&p, a, f, processors);
    fa_status status = fill_maps(&p, a, f, err);
    if (status != FA_OK)
        return status;
    void *arguments[] = {&p};
    dim3 grid((unsigned)(p.units < processors ? p.units : processors)), block((unsigned)f->threads);
    e = cudaLaunchKernel(f->kernel, grid, block, arguments, (size_t)f->shared_bytes, stream);
    return e == cudaSuccess ? FA_OK : refuse(err, f->name, cudaGetErrorString(e));
}

/* The narrowest head dimensions that hold the call's, then the tile: 192 queries waste much of short causal heads, and
 * blocks of 176 keys pay only over many of them. */
static const fa_fwd_sm90_instance *choose(const fa_args *a)
{
#define FA_PICK(name) (a->q.dtype == FA_BF16 ? &fa_fwd_sm90_bf16_##name : &fa_fwd_sm90_f16_##name)
    int64_t D = a->q.size[3], DV = a->v.size[3];
    bool band = a->window_left >= 0 || a->window_right >= 0;
    if (D <= 64 && DV <= 64)
        return band && a->q.size[2] <= 2048 ? FA_PICK(hd64_bm128) : FA_PICK(hd64);
    if (D <= 128 && DV <= 128)
        return !band && a->k.size[2] >= 8192 ? FA_PICK(hd128_bn176) : FA_PICK(hd128);
    return D <= 192 && DV <= 128 ? FA_PICK(hd192_dv128) : FA_PICK(hd256);
#undef FA_PICK
}

extern "C" fa_status fa_fwd_sm90_launch(const fa_args *a, void *workspace, cudaStream_t stream, fa_error *err)
{
    (void)workspace;
    return fa_fwd_sm90_launch_instance(a, choose(a), stream, err);
}
