/* The one place that plans and runs a call on a GPU: chooses the family of kernels and starts the passes. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

/* ---- the families, best first ------------------------------------------------------------------------------------ */

/* To add one: its fa_cuda_family in cuda.h, an entry here, its sources in CMakeLists.txt. The last of a list takes
 * every call. */
static const fa_cuda_family *const FORWARD[] = {&fa_fwd_decode, &fa_fwd_sm90, &fa_fwd_sm80, &fa_fwd_plain};
static const fa_cuda_family *const BACKWARD[] = {&fa_bwd_sm90, &fa_bwd_sm80, &fa_bwd_plain};

struct families {
    const fa_cuda_family *const *list;
    int n;
};

static families families_of(bool backward)
{
    if (backward)
        return {BACKWARD, sizeof BACKWARD / sizeof BACKWARD[0]};
    return {FORWARD, sizeof FORWARD / sizeof FORWARD[0]};
}

static const fa_cuda_family *family_of(const fa_args *a, bool backward)
{
    const families f = families_of(backward);
    const char *asked = getenv("FLASHATTN_EXT_CUDA_ARCH"); /* the first family that may be used */
    int first = -1, major = 0;
    for (int i = 0; asked && i < f.n; i++)
        if (!strcmp(f.list[i]->target, asked))
            first = i;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, a->device);
    for (int i = first < 0 ? 0 : first; i < f.n - 1; i++)
        if (f.list[i]->runs_on(major) && f.list[i]->can(a, a->device))
            return f.list[i];
    return f.list[f.n - 1];
}

/* ---- devices and errors ------------------------------------------------------------------------------------------ */

int fa_cuda_devices(void)
{
    int n = 0;
    return cudaGetDeviceCount(&n) == cudaSuccess ? n : 0; /* also without a driver */
}

size_t fa_cuda_shared_limit(int device)
{
    int bytes = 0;
    cudaError_t error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return error == cudaSuccess ? (size_t)bytes : 48 << 10;
}

fa_status fa_cuda_status(cudaError_t error, const char *what, fa_error *err)
{
    if (error == cudaSuccess)
        return FA_OK;
    snprintf(err->text, sizeof err->text, "%s: %s", what, cudaGetErrorString(error));
    return FA_ERR_UNSUPPORTED;
}

/* ---- plans ------------------------------------------------------------------------------------------------------- */

static void plan(const fa_args *a, bool backward, fa_plan *p)
{
    memset(p, 0, sizeof *p);
    p->kind = FA_KERNEL_CUDA;
    p->chunk_panels = 1;
    const fa_cuda_family *f = family_of(a, backward);
    f->plan(a, a->device, p);
    p->family = f;
    p->workspace = p->shared_bytes;
    fa_plan_work(a, backward, p);
    p->bytes += 2.0 * (double)p->workspace;
}

void fa_cuda_plan_forward(const fa_args *a, fa_plan *p)
{
    plan(a, false, p);
}

void fa_cuda_plan_backward(const fa_args *a, fa_plan *p)
{
    plan(a, true, p);
}

/* ---- runs -------------------------------------------------------------------------------------------------------- */

static fa_status check_workspace(const fa_plan *p, const fa_exec *exec, fa_error *err)
{
    if (p->workspace == 0 || (exec->workspace && exec->workspace_size >= p->workspace))
        return FA_OK;
    snprintf(err->text, sizeof err->text, "workspace of %zu bytes; the plan needs %zu",
             exec->workspace ? exec->workspace_size : (size_t)0, p->workspace);
    return FA_ERR_WORKSPACE;
}

/* Runs body on the device of the tensors, and leaves the thread's device as it was. */
template <class Body> static fa_status on_device(int device, fa_error *err, const Body &body)
{
    int before = device;
    fa_status status = fa_cuda_status(cudaGetDevice(&before), "cudaGetDevice", err);
    if (!status && before != device)
        status = fa_cuda_status(cudaSetDevice(device), "cudaSetDevice", err);
    if (!status)
        status = body();
    if (before != device)
        cudaSetDevice(before);
    return status;
}

fa_status fa_cuda_run(const fa_args *a, const fa_plan *p, const fa_exec *exec, fa_error *err)
{
    fa_status status = check_workspace(p, exec, err);
    if (status)
        return status;
    return on_device(a->device, err, [&] {
        return ((const fa_cuda_family *)p->family)->launch(a, p, exec->workspace, (cudaStream_t)exec->stream, err);
    });
}

fa_status fa_cuda_run_append(const fa_append_args *a, const fa_exec *exec, fa_error *err)
{
    return on_device(a->device, err, [&] { return fa_append_launch(a, (cudaStream_t)exec->stream, err); });
}

fa_status fa_cuda_run_merge(const fa_merge_args *a, int device, const fa_exec *exec, fa_error *err)
{
    return on_device(device, err, [&] { return fa_merge_launch(a, (cudaStream_t)exec->stream, err); });
}

fa_status fa_cuda_read(void *to, const void *from, size_t bytes, fa_error *err)
{
    fa_status status = fa_cuda_status(cudaDeviceSynchronize(), "cudaDeviceSynchronize", err);
    return status ? status : fa_cuda_status(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy", err);
}

/* ---- the launches of a plan -------------------------------------------------------------------------------------- */

static cudaError_t describe(cudaGraphNode_t node, fa_cuda_launch *l)
{
    cudaKernelNodeParams k;
    cudaFuncAttributes f;
    const char *name;
    cudaError_t e = cudaGraphKernelNodeGetParams(node, &k);
    if (e == cudaSuccess)
        e = cudaFuncGetAttributes(&f, k.func);
    if (e == cudaSuccess)
        e = cudaFuncGetName(&name, k.func);
    if (e == cudaSuccess)
        e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&l->resident_blocks, k.func, (int)k.blockDim.x,
                                                          k.sharedMemBytes);
    if (e != cudaSuccess)
        return e;
    snprintf(l->name, sizeof l->name, "%s", name);
    l->blocks = (int64_t)k.gridDim.x * k.gridDim.y * k.gridDim.z;
    l->threads = (int)k.blockDim.x;
    l->shared_bytes = (int)(k.sharedMemBytes + f.sharedSizeBytes);
    l->registers = f.numRegs;
    l->local_bytes = (int)f.localSizeBytes;
    return cudaSuccess;
}

/* Kernels among the nodes of a graph that was captured from one stream: those of a chain, in its order. */
static cudaError_t describe_all(cudaGraph_t graph, fa_cuda_launch *list, int n, int *count)
{
    cudaGraphNode_t nodes[16];
    size_t found = sizeof nodes / sizeof nodes[0];
    cudaError_t e = cudaGraphGetNodes(graph, nodes, &found);
    for (size_t i = 0; e == cudaSuccess && i < found; i++) {
        cudaGraphNodeType type;
        e = cudaGraphNodeGetType(nodes[i], &type);
        if (e == cudaSuccess && type == cudaGraphNodeTypeKernel) {
            if (*count < n)
                e = describe(nodes[i], &list[*count]);
            ++*count;
        }
    }
    return e;
}

/* What a plan starts is found by capturing it: nothing runs, so that no address is ever followed. */
int fa_cuda_launches(const fa_args *a, const fa_plan *plan, fa_cuda_launch *list, int n, fa_error *err)
{
    int count = 0;
    const fa_status status = on_device(a->device, err, [&] {
        cudaStream_t stream;
        cudaGraph_t graph = NULL;
        cudaError_t e = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
        if (e != cudaSuccess)
            return fa_cuda_status(e, "cudaStreamCreate", err);
        e = cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed);
        const fa_exec exec = {.workspace = (void *)256, .workspace_size = plan->workspace, .stream = stream};
        fa_status launched = e == cudaSuccess ? fa_cuda_run(a, plan, &exec, err) : FA_OK;
        if (e == cudaSuccess)
            e = cudaStreamEndCapture(stream, &graph);
        if (e == cudaSuccess)
            e = describe_all(graph, list, n, &count);
        if (graph)
            cudaGraphDestroy(graph);
        cudaStreamDestroy(stream);
        return launched ? launched : fa_cuda_status(e, "the capture of a plan's launches", err);
    });
    return status ? -1 : count;
}

/* ---- the list of kernels ----------------------------------------------------------------------------------------- */

int fa_cuda_kernels(fa_kernel_info *list, int n)
{
    int count = 0, major = 0;
    if (fa_cuda_devices() > 0)
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
    for (int backward = 0; backward < 2; backward++) {
        const families f = families_of(backward);
        for (int i = 0; i < f.n; i++) {
            fa_kernel_info info = {};
            info.op = backward ? "bwd" : "fwd";
            for (int k = 0; f.list[i]->kernel(k, &info); k++, count++) {
                info.target = f.list[i]->target;
                info.usable = f.list[i]->runs_on(major);
                if (count < n)
                    list[count] = info;
            }
        }
    }
    return count;
}
