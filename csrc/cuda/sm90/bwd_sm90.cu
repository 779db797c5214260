/* Host side of the Hopper backward kernel: which calls it takes, which instance runs them, tensor maps, launches. */
#include "bwd_sm90.h"

#include <cuda_runtime.h>
#include <stdio.h>

#define FA_POSITION_BOUND ((int64_t)1 << 30) /* = FA_MAX_SEQ: no two positions are further apart */

extern "C" {
extern const fa_bwd_sm90_instance fa_bwd_sm90_bf16_hd64, fa_bwd_sm90_bf16_hd128, fa_bwd_sm90_bf16_hd192_dv128,
    fa_bwd_sm90_bf16_hd256, fa_bwd_sm90_f16_hd64, fa_bwd_sm90_f16_hd128, fa_bwd_sm90_f16_hd192_dv128,
    fa_bwd_sm90_f16_hd256;
}

/* The narrowest instance that holds the head dimensions. */
static const fa_bwd_sm90_instance *choose(const fa_args *a)
{
    static const fa_bwd_sm90_instance *const all[] = {
        &fa_bwd_sm90_bf16_hd64, &fa_bwd_sm90_bf16_hd128, &fa_bwd_sm90_bf16_hd192_dv128, &fa_bwd_sm90_bf16_hd256,
        &fa_bwd_sm90_f16_hd64,  &fa_bwd_sm90_f16_hd128,  &fa_bwd_sm90_f16_hd192_dv128,  &fa_bwd_sm90_f16_hd256,
    };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        if (all[i]->dtype == a->q.dtype && a->q.size[3] <= all[i]->D && a->v.size[3] <= all[i]->DV)
            return all[i];
    return NULL;
}

/* ---- what it can do ---------------------------------------------------------------------------------------------- */

static bool rows_of_16_bytes(const fa_tensor *t, int64_t least_stride)
{
    bool ok = t->stride[3] == 1 && (uintptr_t)t->data % 16 == 0 && t->size[3] % 8 == 0;
    for (int i = 0; i < 3; i++)
        ok = ok && (t->size[i] <= 1 || (t->stride[i] >= least_stride && t->stride[i] % 8 == 0 &&
                                        t->stride[i] < (int64_t)1 << 38));
    return ok;
}

static bool readable(const fa_tensor *t)
{
    return rows_of_16_bytes(t, 0) && (t->size[2] <= 1 || t->stride[2] > 0);
}

static bool writable(const fa_tensor *t)
{
    return !t->data || rows_of_16_bytes(t, 1);
}

static bool plain(const fa_args *a)
{
    return !a->mask.data && !a->sinks.data && !a->alibi.data && !a->q_seqlens.data && !a->kv_seqlens.data &&
           a->softcap == 0 && a->dropout_p == 0 && !a->by_sequence && !a->cu_q.data && !a->cu_k.data &&
           !a->block_table.data && !a->tree_mask.data && !a->k_scale.data && !a->v_scale.data;
}

/* Every block of 64 rows of every head has a number below 2^31. */
static bool countable(const fa_args *a)
{
    int64_t rows = a->q.size[2] > a->k.size[2] ? a->q.size[2] : a->k.size[2], heads = a->q.size[0] * a->q.size[1];
    return heads <= INT32_MAX && heads * (rows / 64 + 2) <= INT32_MAX;
}

extern "C" bool fa_bwd_sm90_can(const fa_args *a)
{
    bool inputs = readable(&a->q) && readable(&a->k) && readable(&a->v) && readable(&a->out) && readable(&a->dout);
    return choose(a) && plain(a) && countable(a) && inputs && writable(&a->dq) && writable(&a->dk) && writable(&a->dv);
}

/* ---- workspace --------------------------------------------------------------------------------------------------- */

typedef struct workspace_parts {
    size_t dq_sum, row_lse, row_delta, turn, end; /* offsets in bytes */
} workspace_parts;

static size_t align_256(size_t bytes)
{
    return (bytes + 255) / 256 * 256;
}

static workspace_parts parts_of(const fa_args *a, const fa_bwd_sm90_instance *f)
{
    size_t blocks = (size_t)(a->q.size[0] * a->q.size[1] * ((a->q.size[2] + f->BM - 1) / f->BM)), rows = blocks * f->BM;
    workspace_parts w = {};
    w.row_lse = w.dq_sum + align_256(rows * f->D * sizeof(float));
    w.row_delta = w.row_lse + align_256(rows * sizeof(float));
    w.turn = w.row_delta + align_256(rows * sizeof(float));
    w.end = w.turn + align_256(blocks * sizeof(uint32_t));
    return w;
}

extern "C" size_t fa_bwd_sm90_workspace(const fa_args *a)
{
    return parts_of(a, choose(a)).end;
}

/* ---- tensor maps ------------------------------------------------------------------------------------------------- */

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

/* Boxes of `rows` rows and 64 columns of (B, H, S, D), swizzled. A head or batch with stride 0 has size 1 in the map
 * and its coordinate never moves; steps: of head and batch. */
static bool encode_map(encode_fn *encode, CUtensorMap *map, int32_t steps[2], const fa_tensor *t, int rows)
{
    cuuint64_t size[4] = {(cuuint64_t)t->size[3], (cuuint64_t)t->size[2], (cuuint64_t)t->size[1],
                          (cuuint64_t)t->size[0]};
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

/* ---- launch ------------------------------------------------------------------------------------------------------ */

static fa_status refuse(fa_error *err, const char *what, const char *why)
{
    snprintf(err->text, sizeof err->text, "%s: %s", what, why);
    return FA_ERR_UNSUPPORTED;
}

static int64_t clamp(int64_t x, int64_t lo, int64_t hi)
{
    return x < lo ? lo : x > hi ? hi : x;
}

static fa_bwd_sm90_view view_of(const fa_tensor *t)
{
    fa_bwd_sm90_view v = {t->data, t->stride[0], t->stride[1], t->stride[2]};
    return v;
}

static void fill_sizes(fa_bwd_sm90_params *p, const fa_args *a, const fa_bwd_sm90_instance *f)
{
    p->B = (int32_t)a->q.size[0];
    p->HQ = (int32_t)a->q.size[1];
    p->HK = (int32_t)a->k.size[1];
    p->group = p->HQ / p->HK;
    p->SQ = (int32_t)a->q.size[2];
    p->SK = (int32_t)a->k.size[2];
    p->D = (int32_t)a->q.size[3];
    p->DV = (int32_t)a->v.size[3];
    p->BM = f->BM;
    p->BN = f->BN;
    p->q_blocks = (p->SQ + f->BM - 1) / f->BM;
    p->k_blocks = (p->SK + f->BN - 1) / f->BN;
    p->scale = (float)a->scale;
    p->scale_log2 = (float)(a->scale * 1.4426950408889634);
}

static int32_t clamp_count(int32_t x, int32_t lo, int32_t hi)
{
    return x < lo ? lo : x > hi ? hi : x;
}

/* Heads whose thread blocks start in turn: with more, key blocks of a head follow each other in a greater distance, and
 * wait less; with fewer, what is at work stays in the second-level cache. Measured (docs/kernels/bwd_sm90.md). */
static int32_t heads_in_turn(const fa_bwd_sm90_params *p, const fa_bwd_sm90_instance *f)
{
    return f->D <= 64 ? 32 : f->D <= 128 ? 16 : p->SK < 8192 ? 8 : 4;
}

/* See bwd_sm90_params.h. resident: thread blocks that the device runs at the same time. */
static void fill_order(fa_bwd_sm90_params *p, const fa_bwd_sm90_instance *f, bool left, bool right, int32_t resident)
{
    bool up = right && !left && p->SK <= 1024 && p->k_blocks <= resident;
    p->order = up ? FA_BWD_UP : left || right ? FA_BWD_DOWN : FA_BWD_ROTATE;
    p->ring = p->order == FA_BWD_DOWN ? 1 : clamp_count(p->k_blocks, 1, resident);
    p->heads_together = p->order == FA_BWD_DOWN ? heads_in_turn(p, f) : 1;
    if (p->order == FA_BWD_ROTATE) {
        p->ring = clamp_count(p->q_blocks / 2, 1, p->ring); /* key blocks that follow each other are two steps apart */
        p->heads_together = resident / p->ring;
    }
    p->heads_together = clamp_count(p->heads_together, 1, p->B * p->HK);
}

/* resident: thread blocks that the device runs at the same time. */
static void fill_band(fa_bwd_sm90_params *p, const fa_args *a, const fa_bwd_sm90_instance *f, int resident)
{
    int64_t offset = a->bottom_right ? a->k.size[2] - a->q.size[2] : 0, bound = FA_POSITION_BOUND;
    bool left = a->window_left >= 0, right = a->window_right >= 0;
    p->lo_shift = (int32_t)(left ? clamp(offset - clamp(a->window_left, 0, bound), -bound, bound) : -bound);
    p->hi_shift = (int32_t)(right ? clamp(offset + clamp(a->window_right, 0, bound) + 1, -bound, bound) : bound);
    fill_order(p, f, left, right, resident);
}

static void fill_memory(fa_bwd_sm90_params *p, const fa_args *a, const fa_bwd_sm90_instance *f, char *workspace)
{
    workspace_parts w = parts_of(a, f);
    p->dq_sum = (float *)(workspace + w.dq_sum);
    p->row_lse = (float *)(workspace + w.row_lse);
    p->row_delta = (float *)(workspace + w.row_delta);
    p->turn = (uint32_t *)(workspace + w.turn);
    p->out = view_of(&a->out);
    p->dout = view_of(&a->dout);
    p->lse = view_of(&a->lse);
    p->dlse = view_of(&a->dlse);
    p->dq = view_of(&a->dq);
    p->dk = view_of(&a->dk);
    p->dv = view_of(&a->dv);
}

/* Without queries or without keys nothing is loaded. */
static fa_status fill_maps(fa_bwd_sm90_params *p, const fa_args *a, const fa_bwd_sm90_instance *f, fa_error *err)
{
    encode_fn *encode = find_encode();
    if (!encode)
        return refuse(err, f->name, "the driver has no cuTensorMapEncodeTiled; it must be of CUDA 12.0 or later");
    if (p->SQ == 0 || p->SK == 0)
        return FA_OK;
    bool ok = encode_map(encode, &p->q_map, p->q_steps, &a->q, f->BM) &&
              encode_map(encode, &p->dout_map, p->dout_steps, &a->dout, f->BM) &&
              encode_map(encode, &p->k_map, p->k_steps, &a->k, f->BN) &&
              encode_map(encode, &p->v_map, p->v_steps, &a->v, f->BN);
    return ok ? FA_OK : refuse(err, f->name, "cuTensorMapEncodeTiled refused the strides of q, k, v or dout");
}

static cudaError_t launch_main(fa_bwd_sm90_params *p, const fa_bwd_sm90_instance *f, cudaStream_t stream)
{
    if (p->k_blocks == 0)
        return cudaSuccess;
    void *arguments[] = {p};
    dim3 grid((unsigned)((int64_t)p->B * p->HK * p->k_blocks)), block((unsigned)f->threads);
    return cudaLaunchKernel(f->kernel, grid, block, arguments, (size_t)f->shared_bytes, stream);
}

extern "C" fa_status fa_bwd_sm90_launch(const fa_args *a, void *workspace, cudaStream_t stream, fa_error *err)
{
    const fa_bwd_sm90_instance *f = choose(a);
    if (!f)
        return refuse(err, "fa_bwd_sm90", "no instance for these head dimensions and dtype");
    if (a->q.size[0] * a->k.size[1] == 0)
        return FA_OK;
    fa_bwd_sm90_params p = {};
    int device, processors;
    cudaError_t e = cudaGetDevice(&device);
    if (e == cudaSuccess)
        e = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (e == cudaSuccess)
        e = cudaFuncSetAttribute(f->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, f->shared_bytes);
    if (e != cudaSuccess)
        return refuse(err, f->name, cudaGetErrorString(e));
    fill_sizes(&p, a, f);
    fill_band(&p, a, f, processors);
    fill_memory(&p, a, f, (char *)workspace);
    fa_status status = fill_maps(&p, a, f, err);
    if (status != FA_OK)
        return status;
    e = fa_bwd_pre_launch(&p, f->dtype, stream);
    if (e == cudaSuccess)
        e = launch_main(&p, f, stream);
    if (e == cudaSuccess && p.dq.data)
        e = fa_bwd_post_launch(&p, f->dtype, f->D, stream);
    return e == cudaSuccess ? FA_OK : refuse(err, f->name, cudaGetErrorString(e));
}
