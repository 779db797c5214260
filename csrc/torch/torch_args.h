// What the files of ops share: torch tensors to fa_tensor and back, allocation, torch's thread pool.
#ifndef FA_TORCH_ARGS_H
#define FA_TORCH_ARGS_H

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "fa.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK // its name in the headers of torch 2.10 and 2.11
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace fa_torch {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

[[noreturn]] inline void refuse(const std::string &text)
{
    throw std::runtime_error(text);
}

inline void check(fa_status status, const fa_error &err)
{
    if (status != FA_OK)
        refuse(err.text);
}

// ---- devices and dtypes ------------------------------------------------------------------------------------------

inline const int32_t CPU = aoti_torch_device_type_cpu();

inline int32_t device_type(const Tensor &t)
{
    int32_t type;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
    return type;
}

inline std::string device_name(const Tensor &t)
{
    const std::pair<int32_t, const char *> names[] = {
        {CPU, "cpu"},                            {aoti_torch_device_type_cuda(), "cuda"},
        {aoti_torch_device_type_meta(), "meta"}, {aoti_torch_device_type_xpu(), "xpu"},
        {aoti_torch_device_type_mps(), "mps"},   {aoti_torch_device_type_privateuse1(), "privateuseone"},
    };
    const int32_t type = device_type(t), index = t.get_device_index();
    std::string name = "device type " + std::to_string(type);
    for (const auto &[known, text] : names)
        if (known == type)
            name = text;
    return index >= 0 ? name + ":" + std::to_string(index) : name;
}

constexpr int FOREIGN = -1; // a dtype of torch that fa.h has no name for

struct Dtype {
    int32_t torch;
    int fa; // fa_dtype or FOREIGN
    const char *name;
};

// torch does not promise the numbers of its dtypes, only these functions. Those of fa.h come first, in its order.
inline const Dtype DTYPES[] = {
    {aoti_torch_dtype_float32(), FA_F32, "float32"},
    {aoti_torch_dtype_bfloat16(), FA_BF16, "bfloat16"},
    {aoti_torch_dtype_float16(), FA_F16, "float16"},
    {aoti_torch_dtype_float64(), FA_F64, "float64"},
    {aoti_torch_dtype_bool(), FA_BOOL, "bool"},
    {aoti_torch_dtype_int32(), FA_I32, "int32"},
    {aoti_torch_dtype_int64(), FA_I64, "int64"},
    {aoti_torch_dtype_int8(), FA_I8, "int8"},
    {aoti_torch_dtype_float8_e4m3fn(), FA_F8E4M3, "float8_e4m3fn"},
    {aoti_torch_dtype_int16(), FOREIGN, "int16"},
    {aoti_torch_dtype_uint8(), FOREIGN, "uint8"},
    {aoti_torch_dtype_uint16(), FOREIGN, "uint16"},
    {aoti_torch_dtype_uint32(), FOREIGN, "uint32"},
    {aoti_torch_dtype_uint64(), FOREIGN, "uint64"},
    {aoti_torch_dtype_complex32(), FOREIGN, "complex32"},
    {aoti_torch_dtype_complex64(), FOREIGN, "complex64"},
    {aoti_torch_dtype_complex128(), FOREIGN, "complex128"},
    {aoti_torch_dtype_float8_e4m3fnuz(), FOREIGN, "float8_e4m3fnuz"},
    {aoti_torch_dtype_float8_e5m2(), FOREIGN, "float8_e5m2"},
    {aoti_torch_dtype_float8_e5m2fnuz(), FOREIGN, "float8_e5m2fnuz"},
};
inline const Dtype UNKNOWN_DTYPE = {-1, FOREIGN, "another dtype"};

inline const Dtype &dtype_of(const Tensor &t)
{
    int32_t dtype;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
    for (const Dtype &d : DTYPES)
        if (d.torch == dtype)
            return d;
    return UNKNOWN_DTYPE;
}

// ---- tensors to fa_tensor ----------------------------------------------------------------------------------------

// An empty tensor of torch has no address, and to fa.h no address means an absent tensor.
alignas(8) inline char no_elements[8];

// The dimensions of t go to the places `at` of the four of fa_tensor. `shape` words the refusal of any other number.
inline fa_tensor view(const Tensor &t, const char *name, std::initializer_list<int> at, const char *shape)
{
    const auto sizes = t.sizes(), strides = t.strides();
    if (sizes.size() != at.size())
        refuse(std::string(name) + " must be " + shape + ", got " + std::to_string(sizes.size()) + " dimensions");
    const Dtype &dtype = dtype_of(t);
    if (dtype.fa == FOREIGN)
        refuse(std::string(name) + " must be float32, bfloat16, float16, float64, bool, int32, int64, int8 or "
               "float8_e4m3fn, got " + dtype.name);
    // Unlike the mutable address, this one does not make torch carry out a lazy copy.
    const void *data = t.const_data_ptr();
    fa_tensor v = {.data = data ? const_cast<void *>(data) : no_elements,
                   .size = {1, 1, 1, 1},
                   .stride = {0, 0, 0, 0},
                   .dtype = static_cast<fa_dtype>(dtype.fa)};
    size_t i = 0;
    for (int to : at) {
        v.size[to] = sizes[i];
        v.stride[to] = strides[i++];
    }
    return v;
}

inline fa_tensor full_view(const Tensor &t, const char *name, const char *shape)
{
    return view(t, name, {0, 1, 2, 3}, shape);
}

// Sizes of 1 stand for every index, so their stride is 0.
inline fa_tensor broadcast(fa_tensor v)
{
    for (int i = 0; i < 4; i++)
        if (v.size[i] == 1)
            v.stride[i] = 0;
    return v;
}

inline fa_tensor heads_view(const MaybeTensor &t, const char *name)
{
    if (!t)
        return {};
    const char *shape = "(HQ,) or (B, HQ)";
    return broadcast(t->dim() == 1 ? view(*t, name, {1}, shape) : view(*t, name, {0, 1}, shape));
}

inline fa_tensor lengths_view(const MaybeTensor &t, const char *name)
{
    return t ? view(*t, name, {0}, "(B,)") : fa_tensor{};
}

// Rows of packed sequences (T, H, D): a batch of 1.
inline fa_tensor packed_view(const Tensor &t, const char *name, const char *shape)
{
    return view(t, name, {2, 1, 3}, shape);
}

// Tokens before heads: (B, S, H, D), or pages of a cache.
inline fa_tensor cache_view(const Tensor &t, const char *name, const char *shape)
{
    return view(t, name, {0, 2, 1, 3}, shape);
}

constexpr const char *CACHE_SHAPE = "4-D (B, S_max, HK, D), or (pages, page_size, HK, D) with block_table";

inline fa_tensor table_view(const MaybeTensor &t)
{
    return t ? view(*t, "block_table", {0, 1}, "2-D (B, max_pages)") : fa_tensor{};
}

// Element i of lengths, offsets: (n, 1, 1, 1) of int32 or int64.
inline int64_t index_at(const fa_tensor &t, int64_t i)
{
    const int64_t at = i * t.stride[0];
    return t.dtype == FA_I64 ? static_cast<const int64_t *>(t.data)[at] : static_cast<const int32_t *>(t.data)[at];
}

inline int64_t bytes_of(const fa_tensor &t)
{
    return t.size[0] * t.size[1] * t.size[2] * t.size[3] * static_cast<int64_t>(fa_dtype_size(t.dtype));
}

// ---- where a call runs -------------------------------------------------------------------------------------------

inline void require_cpu(const Tensor &t, const char *name)
{
    if (device_type(t) != CPU)
        refuse(std::string(name) + " is on " + device_name(t) +
               ", but this build of flashattn_ext computes on the CPU only: every tensor must be on cpu");
}

// The device of all tensors of a call but the dropout seed.
struct Place {
    int32_t type = CPU, index = 0;

    bool on_cpu() const { return type == CPU; }
};

// That of the call's first tensor: the CPU, or a GPU where this build and this machine can use one.
inline Place place_of(const Tensor &t, const char *name)
{
    if (device_type(t) == aoti_torch_device_type_cuda() && fa_cuda_devices() > t.get_device_index())
        return {device_type(t), t.get_device_index()};
    require_cpu(t, name);
    return {};
}

inline void require_at(const Place &place, const Tensor &t, const char *name)
{
    if (place.on_cpu())
        return require_cpu(t, name);
    if (device_type(t) != place.type || t.get_device_index() != place.index)
        refuse(std::string(name) + " is on " + device_name(t) + " and query on cuda:" + std::to_string(place.index) +
               ": every tensor must be on one device");
}

inline void require_at(const Place &place, const MaybeTensor &t, const char *name)
{
    if (t)
        require_at(place, *t, name);
}

inline void put_at(const Place &place, fa_args *a)
{
    a->device_memory = !place.on_cpu();
    a->device = place.index;
}

inline Place place_of(const fa_args &a)
{
    return a.device_memory ? Place{aoti_torch_device_type_cuda(), a.device} : Place{};
}

inline uint64_t seed_of(const MaybeTensor &seed, double dropout_p)
{
    if (!seed) {
        if (dropout_p > 0)
            refuse("dropout_p is " + std::to_string(dropout_p) + ", so dropout_seed must be given, got None");
        return 0;
    }
    if (dtype_of(*seed).fa != FA_I64 || seed->numel() != 1)
        refuse("dropout_seed must be one int64, got " + std::to_string(seed->numel()) + " elements of " +
               dtype_of(*seed).name);
    if (device_type(*seed) != CPU)
        refuse("dropout_seed is on " + device_name(*seed) + ": it must be on cpu, whatever the device of the others");
    return static_cast<uint64_t>(*static_cast<const int64_t *>(seed->const_data_ptr()));
}

inline double scale_of(std::optional<double> scale, int64_t head_dim)
{
    return scale ? *scale : 1.0 / std::sqrt(static_cast<double>(std::max<int64_t>(head_dim, 1)));
}

// ---- results -----------------------------------------------------------------------------------------------------

// Dense strides for `size`, with the dimensions in the order of like's strides: what torch.empty_like does. A stride of
// 0 says nothing about the order, so such a dimension stays where it is, unless others move past it.
inline void dense_strides(const fa_tensor &like, fa_tensor *t)
{
    int order[4] = {3, 2, 1, 0}; // innermost first
    const auto inner_is_larger = [&](int inner, int outer) {
        const int64_t si = like.stride[inner], so = like.stride[outer];
        if (si == 0 || so == 0)
            return 0;
        if (si != so)
            return si > so ? 1 : -1;
        return like.size[inner] > like.size[outer] ? 1 : 0;
    };
    for (int i = 1; i < 4; i++)
        for (int outer = i, inner = i - 1; inner >= 0; inner--) {
            const int larger = inner_is_larger(order[inner], order[outer]);
            if (larger < 0)
                break;
            if (larger > 0) {
                std::swap(order[inner], order[outer]);
                outer = inner;
            }
        }
    int64_t step = 1;
    for (int d : order) {
        t->stride[d] = step;
        step *= t->size[d] > 1 ? t->size[d] : 1;
    }
}

// A result that fa_validate can look at before it has memory.
inline fa_tensor planned(const int64_t (&size)[4], fa_dtype dtype, const fa_tensor &like)
{
    fa_tensor t = {.data = no_elements, .size = {size[0], size[1], size[2], size[3]}, .stride = {}, .dtype = dtype};
    dense_strides(like, &t);
    return t;
}

inline fa_tensor planned_like(const fa_tensor &like)
{
    return planned({like.size[0], like.size[1], like.size[2], like.size[3]}, like.dtype, like);
}

// Gives a planned result its memory; the tensor has `dim` of its dimensions, from `first` on.
inline Tensor allocate(fa_tensor *t, int first = 0, int dim = 4, const Place &place = {})
{
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, t->size + first, t->stride + first,
                                                           DTYPES[t->dtype].torch, place.type, place.index, &handle));
    Tensor result(handle);
    void *data = result.mutable_data_ptr();
    t->data = data ? data : no_elements;
    return result;
}

// Results with tokens before heads, as (B, S, H, D) in memory: size is that of fa_tensor, (B, H, S, D).
inline fa_tensor planned_rows(const int64_t (&size)[4], fa_dtype dtype)
{
    const int64_t H = size[1], S = size[2], D = size[3];
    return {.data = no_elements, .size = {size[0], H, S, D}, .stride = {S * H * D, D, H * D, 1}, .dtype = dtype};
}

// Gives it its memory; packed: without the batch of 1.
inline Tensor allocate_rows(fa_tensor *t, bool packed, const Place &place = {})
{
    fa_tensor rows = *t;
    std::swap(rows.size[1], rows.size[2]);
    std::swap(rows.stride[1], rows.stride[2]);
    Tensor result = packed ? allocate(&rows, 1, 3, place) : allocate(&rows, 0, 4, place);
    t->data = rows.data;
    return result;
}

// The gradient of a result, for the fast kernels of a GPU: their copies read rows that lie side by side, and that of a
// sum is one number, expanded.
inline Tensor in_rows(const Tensor &grad, const Place &place)
{
    if (place.on_cpu())
        return grad;
    const auto sizes = grad.sizes(), strides = grad.strides();
    bool rows = sizes.empty() || sizes.back() <= 1 || strides.back() == 1;
    for (size_t i = 0; i < sizes.size(); i++)
        rows = rows && (sizes[i] <= 1 || strides[i] != 0);
    return rows ? grad : torch::stable::contiguous(grad);
}

// What stands for a gradient that is not needed.
inline Tensor nothing(fa_dtype dtype, const Place &place = {})
{
    fa_tensor t = {.data = nullptr, .size = {0}, .stride = {1}, .dtype = dtype};
    return allocate(&t, 0, 1, place);
}

inline fa_dtype lse_dtype(fa_dtype q)
{
    return q == FA_F64 ? FA_F64 : FA_F32;
}

// ---- running -----------------------------------------------------------------------------------------------------

// A function of torch's CUDA part. Looked up by name: the same library also serves a torch without CUDA.
template <class Function> inline Function *in_torch_cuda(const char *name)
{
    void *library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD), *f = library ? dlsym(library, name) : nullptr;
    if (!f)
        refuse(std::string("this torch has no ") + name + ": query must be on cpu");
    return reinterpret_cast<Function *>(f);
}

using Memory = std::unique_ptr<void, void (*)(void *)>;

// Not a tensor: malloc keeps the cost of a small call low, and hands the same warm pages to the next one.
inline Memory host_memory(size_t bytes)
{
    Memory memory(std::malloc(std::max<size_t>(bytes, 1)), std::free);
    if (!memory)
        refuse("no memory for a workspace of " + std::to_string(bytes) + " bytes");
    return memory;
}

inline auto *raw_delete()
{
    static auto *const release =
        in_torch_cuda<AOTITorchError(void *)>("aoti_torch_cuda_caching_allocator_raw_delete");
    return release;
}

// Says nothing where it fails: whatever broke the device is told by the call that met it.
inline void release_on_gpu(void *memory) noexcept
{
    raw_delete()(memory);
}

// From torch's allocator, for the current stream; without a tensor around it, which costs as much again.
inline Memory gpu_memory(size_t bytes, int32_t device)
{
    static auto *const allocate =
        in_torch_cuda<AOTITorchError(uint64_t, void **)>("aoti_torch_cuda_caching_allocator_raw_alloc");
    std::optional<torch::stable::accelerator::DeviceGuard> guard;
    if (torch::stable::accelerator::getCurrentDeviceIndex() != device)
        guard.emplace(device);
    void *memory = nullptr;
    raw_delete(); // refused here, where that is possible
    STABLE_TORCH_ERROR_CODE_CHECK(allocate(bytes, &memory));
    return Memory(memory, release_on_gpu);
}

inline Memory memory_at(const Place &place, size_t bytes)
{
    return place.on_cpu() ? host_memory(bytes) : gpu_memory(std::max<size_t>(bytes, 1), place.index);
}

// Memory for a planned tensor that is not returned, such as a log-sum-exp that nobody asked for.
inline Memory scratch(fa_tensor *t, const Place &place)
{
    Memory memory = memory_at(place, static_cast<size_t>(bytes_of(*t)));
    t->data = memory.get();
    return memory;
}

// torch may hand several workers to one of its threads.
inline void on_torch_threads(void *, int workers, void (*body)(void *ctx, int worker), void *ctx)
{
    torch::stable::parallel_for(0, workers, 1, [=](int64_t begin, int64_t end) {
        for (int64_t worker = begin; worker < end; worker++)
            body(ctx, static_cast<int>(worker));
    });
}

// ---- validating --------------------------------------------------------------------------------------------------

using ValidateFn = fa_status(const fa_args *, fa_error *);

// The environment variable FLASHATTN_EXT_CHECK=1 has lengths and tables in a GPU's memory checked too, on a copy: the
// call then waits for the GPU.
inline bool checks_device_memory()
{
    const char *asked = std::getenv("FLASHATTN_EXT_CHECK");
    return asked && *asked && *asked != '0';
}

inline void copy_to_host(fa_tensor *t, std::vector<char> *memory)
{
    size_t elements = 1;
    for (int d = 0; d < 4; d++) {
        if (t->size[d] == 0)
            return;
        elements += static_cast<size_t>((t->size[d] - 1) * t->stride[d]);
    }
    fa_error err;
    memory->resize(elements * fa_dtype_size(t->dtype));
    check(fa_cuda_read(memory->data(), t->data, memory->size(), &err), err);
    t->data = memory->data();
}

// The call with its lengths, offsets and tables in host memory, where they are to be checked; else nothing.
struct HostCopy {
    fa_args a;
    std::vector<char> memory[5];
    std::vector<int64_t> lengths; // with what was appended
};

inline std::unique_ptr<HostCopy> host_copy(const fa_args &a)
{
    if (!a.device_memory || !checks_device_memory())
        return nullptr;
    auto copy = std::make_unique<HostCopy>(HostCopy{.a = a, .memory = {}, .lengths = {}});
    fa_args &h = copy->a;
    size_t used = 0;
    for (fa_tensor *t : {&h.q_seqlens, &h.kv_seqlens, &h.cu_q, &h.cu_k, &h.block_table})
        if (t->data)
            copy_to_host(t, &copy->memory[used++]);
    for (int64_t n = 0; a.kv_appended && n < h.kv_seqlens.size[0]; n++)
        copy->lengths.push_back(index_at(h.kv_seqlens, n) + a.kv_appended);
    if (!copy->lengths.empty())
        h.kv_seqlens = {.data = copy->lengths.data(), .size = {h.kv_seqlens.size[0], 1, 1, 1}, .stride = {1, 0, 0, 0},
                        .dtype = FA_I64};
    h.device_memory = false;
    return copy;
}

inline void validate(const fa_args &a, ValidateFn *function)
{
    fa_error err;
    check(function(&a, &err), err);
    if (const auto copy = host_copy(a))
        check(function(&copy->a, &err), err);
}

// ---- planning and running ----------------------------------------------------------------------------------------

enum Direction { FORWARD, BACKWARD };

inline void *current_stream(int32_t device)
{
    static auto *const find = in_torch_cuda<AOTITorchError(int32_t, void **)>("aoti_torch_get_current_cuda_stream");
    void *stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(find(device, &stream));
    return stream;
}

inline void plan_and_run_on_gpu(const fa_args &a, Direction direction)
{
    fa_plan plan;
    (direction == FORWARD ? fa_cuda_plan_forward : fa_cuda_plan_backward)(&a, &plan);
    Memory workspace(nullptr, std::free);
    if (plan.workspace)
        workspace = gpu_memory(plan.workspace, a.device);
    const fa_exec exec = {.parallel = nullptr,
                          .pool = nullptr,
                          .workspace = workspace.get(),
                          .workspace_size = plan.workspace,
                          .stream = current_stream(a.device)};
    fa_error err;
    check(fa_cuda_run(&a, &plan, &exec, &err), err);
}

inline void plan_and_run(const fa_args &a, Direction direction)
{
    if (a.device_memory)
        return plan_and_run_on_gpu(a, direction);
    fa_plan plan;
    (direction == FORWARD ? fa_plan_forward : fa_plan_backward)(
        &a, static_cast<int>(torch::stable::get_num_threads()), &plan);
    const Memory workspace = host_memory(plan.workspace);
    const fa_exec exec = {
        .parallel = plan.threads > 1 ? on_torch_threads : nullptr,
        .pool = nullptr,
        .workspace = workspace.get(),
        .workspace_size = plan.workspace,
        .stream = nullptr,
    };
    fa_error err;
    check((direction == FORWARD ? fa_run_forward : fa_run_backward)(&a, &plan, &exec, &err), err);
}

} // namespace fa_torch

#endif
