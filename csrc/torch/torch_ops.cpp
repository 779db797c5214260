// The operators as torch ops, on torch's stable ABI: one binary serves torch 2.10 and later, and every Python.
// This file turns tensors into fa_args and back. Refusals about shapes and values are worded in csrc/plan/validate.c;
// refused here is only what fa_args cannot say: devices, foreign dtypes, the number of dimensions.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

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

#include "fa.h"

namespace {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

[[noreturn]] void refuse(const std::string &text)
{
    throw std::runtime_error(text);
}

void check(fa_status status, const fa_error &err)
{
    if (status != FA_OK)
        refuse(err.text);
}

// ---- devices and dtypes ------------------------------------------------------------------------------------------

const int32_t CPU = aoti_torch_device_type_cpu();

int32_t device_type(const Tensor &t)
{
    int32_t type;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
    return type;
}

std::string device_name(const Tensor &t)
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
const Dtype DTYPES[] = {
    {aoti_torch_dtype_float32(), FA_F32, "float32"},
    {aoti_torch_dtype_bfloat16(), FA_BF16, "bfloat16"},
    {aoti_torch_dtype_float16(), FA_F16, "float16"},
    {aoti_torch_dtype_float64(), FA_F64, "float64"},
    {aoti_torch_dtype_bool(), FA_BOOL, "bool"},
    {aoti_torch_dtype_int32(), FA_I32, "int32"},
    {aoti_torch_dtype_int64(), FA_I64, "int64"},
    {aoti_torch_dtype_int8(), FOREIGN, "int8"},
    {aoti_torch_dtype_int16(), FOREIGN, "int16"},
    {aoti_torch_dtype_uint8(), FOREIGN, "uint8"},
    {aoti_torch_dtype_uint16(), FOREIGN, "uint16"},
    {aoti_torch_dtype_uint32(), FOREIGN, "uint32"},
    {aoti_torch_dtype_uint64(), FOREIGN, "uint64"},
    {aoti_torch_dtype_complex32(), FOREIGN, "complex32"},
    {aoti_torch_dtype_complex64(), FOREIGN, "complex64"},
    {aoti_torch_dtype_complex128(), FOREIGN, "complex128"},
    {aoti_torch_dtype_float8_e4m3fn(), FOREIGN, "float8_e4m3fn"},
    {aoti_torch_dtype_float8_e4m3fnuz(), FOREIGN, "float8_e4m3fnuz"},
    {aoti_torch_dtype_float8_e5m2(), FOREIGN, "float8_e5m2"},
    {aoti_torch_dtype_float8_e5m2fnuz(), FOREIGN, "float8_e5m2fnuz"},
};
const Dtype UNKNOWN_DTYPE = {-1, FOREIGN, "another dtype"};

const Dtype &dtype_of(const Tensor &t)
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
alignas(8) char no_elements[8];

// The dimensions of t go to the places `at` of the four of fa_tensor. `shape` words the refusal of any other number.
fa_tensor view(const Tensor &t, const char *name, std::initializer_list<int> at, const char *shape)
{
    const auto sizes = t.sizes(), strides = t.strides();
    if (sizes.size() != at.size())
        refuse(std::string(name) + " must be " + shape + ", got " + std::to_string(sizes.size()) + " dimensions");
    const Dtype &dtype = dtype_of(t);
    if (dtype.fa == FOREIGN)
        refuse(std::string(name) + " must be float32, bfloat16, float16, float64, bool, int32 or int64, got " +
               dtype.name);
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

fa_tensor full_view(const Tensor &t, const char *name, const char *shape)
{
    return view(t, name, {0, 1, 2, 3}, shape);
}

// Sizes of 1 stand for every index, so their stride is 0.
fa_tensor broadcast(fa_tensor v)
{
    for (int i = 0; i < 4; i++)
        if (v.size[i] == 1)
            v.stride[i] = 0;
    return v;
}

fa_tensor mask_view(const MaybeTensor &t)
{
    return t ? broadcast(full_view(*t, "attn_mask", "4-D, each size full or 1 against (B, HQ, SQ, SK)")) : fa_tensor{};
}

fa_tensor heads_view(const MaybeTensor &t, const char *name)
{
    if (!t)
        return {};
    const char *shape = "(HQ,) or (B, HQ)";
    return broadcast(t->dim() == 1 ? view(*t, name, {1}, shape) : view(*t, name, {0, 1}, shape));
}

fa_tensor lengths_view(const MaybeTensor &t, const char *name)
{
    return t ? view(*t, name, {0}, "(B,)") : fa_tensor{};
}

// ---- arguments ---------------------------------------------------------------------------------------------------

// What both ops take, as torch hands it over.
struct Inputs {
    const Tensor &query, &key, &value;
    const MaybeTensor &attn_mask, &sinks, &alibi_slopes, &q_seqlens, &kv_seqlens, &dropout_seed;
    std::optional<double> scale;
    double softcap;
    int64_t window_left, window_right;
    bool bottom_right;
    double dropout_p;
};

void require_cpu(const Tensor &t, const char *name)
{
    if (device_type(t) != CPU)
        refuse(std::string(name) + " is on " + device_name(t) +
               ", but this build of flashattn_ext computes on the CPU only: every tensor must be on cpu");
}

void require_cpu(const MaybeTensor &t, const char *name)
{
    if (t)
        require_cpu(*t, name);
}

void require_cpu(const Inputs &in)
{
    const int32_t q = device_type(in.query);
    if (q != device_type(in.key) || q != device_type(in.value))
        refuse("query, key and value must be on the same device, got query on " + device_name(in.query) + ", key on " +
               device_name(in.key) + " and value on " + device_name(in.value));
    require_cpu(in.query, "query");
    require_cpu(in.attn_mask, "attn_mask");
    require_cpu(in.sinks, "sinks");
    require_cpu(in.alibi_slopes, "alibi_slopes");
    require_cpu(in.q_seqlens, "q_seqlens");
    require_cpu(in.kv_seqlens, "kv_seqlens");
    require_cpu(in.dropout_seed, "dropout_seed");
}

void require_known_dtypes(const Inputs &in)
{
    const Dtype &q = dtype_of(in.query), &k = dtype_of(in.key), &v = dtype_of(in.value);
    if (q.fa == FOREIGN || k.fa == FOREIGN || v.fa == FOREIGN)
        refuse(std::string("query, key and value have dtypes ") + q.name + ", " + k.name + " and " + v.name +
               ": they must be the same, one of float32, bfloat16, float16 and float64");
}

uint64_t seed_of(const Inputs &in)
{
    if (!in.dropout_seed) {
        if (in.dropout_p > 0)
            refuse("dropout_p is " + std::to_string(in.dropout_p) + ", so dropout_seed must be given, got None");
        return 0;
    }
    const Tensor &seed = *in.dropout_seed;
    if (dtype_of(seed).fa != FA_I64 || seed.numel() != 1)
        refuse("dropout_seed must be one int64, got " + std::to_string(seed.numel()) + " elements of " +
               dtype_of(seed).name);
    return static_cast<uint64_t>(*static_cast<const int64_t *>(seed.const_data_ptr()));
}

fa_args args_of(const Inputs &in)
{
    require_cpu(in);
    require_known_dtypes(in);
    fa_args a = {};
    a.q = full_view(in.query, "query", "4-D (B, HQ, SQ, D)");
    a.k = full_view(in.key, "key", "4-D (B, HK, SK, D)");
    a.v = full_view(in.value, "value", "4-D (B, HK, SK, DV)");
    a.mask = mask_view(in.attn_mask);
    a.sinks = heads_view(in.sinks, "sinks");
    a.alibi = heads_view(in.alibi_slopes, "alibi_slopes");
    a.q_seqlens = lengths_view(in.q_seqlens, "q_seqlens");
    a.kv_seqlens = lengths_view(in.kv_seqlens, "kv_seqlens");
    a.scale = in.scale ? *in.scale : 1.0 / std::sqrt(static_cast<double>(std::max<int64_t>(a.q.size[3], 1)));
    a.softcap = in.softcap;
    a.window_left = in.window_left;
    a.window_right = in.window_right;
    a.bottom_right = in.bottom_right;
    a.dropout_p = in.dropout_p;
    a.dropout_seed = seed_of(in);
    return a;
}

// ---- results -----------------------------------------------------------------------------------------------------

// Dense strides for `size`, with the dimensions in the order of like's strides: what torch.empty_like does. A stride of
// 0 says nothing about the order, so such a dimension stays where it is, unless others move past it.
void dense_strides(const fa_tensor &like, fa_tensor *t)
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
fa_tensor planned(const int64_t (&size)[4], fa_dtype dtype, const fa_tensor &like)
{
    fa_tensor t = {.data = no_elements, .size = {size[0], size[1], size[2], size[3]}, .stride = {}, .dtype = dtype};
    dense_strides(like, &t);
    return t;
}

// Gives a planned result its memory; the tensor has `dim` of its dimensions, from `first` on.
Tensor allocate(fa_tensor *t, int first = 0, int dim = 4)
{
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, t->size + first, t->stride + first,
                                                           DTYPES[t->dtype].torch, CPU, 0, &handle));
    Tensor result(handle);
    void *data = result.mutable_data_ptr();
    t->data = data ? data : no_elements;
    return result;
}

// What stands for a gradient that is not needed.
Tensor nothing(fa_dtype dtype)
{
    fa_tensor t = {.data = nullptr, .size = {0}, .stride = {1}, .dtype = dtype};
    return allocate(&t, 0, 1);
}

fa_dtype lse_dtype(fa_dtype q)
{
    return q == FA_F64 ? FA_F64 : FA_F32;
}

// ---- running -----------------------------------------------------------------------------------------------------

using Memory = std::unique_ptr<void, decltype(&std::free)>;

// Not a tensor: malloc keeps the cost of a small call low, and hands the same warm pages to the next one.
Memory host_memory(size_t bytes)
{
    Memory memory(std::malloc(std::max<size_t>(bytes, 1)), std::free);
    if (!memory)
        refuse("no memory for a workspace of " + std::to_string(bytes) + " bytes");
    return memory;
}

// torch may hand several workers to one of its threads.
void on_torch_threads(void *, int workers, void (*body)(void *ctx, int worker), void *ctx)
{
    torch::stable::parallel_for(0, workers, 1, [=](int64_t begin, int64_t end) {
        for (int64_t worker = begin; worker < end; worker++)
            body(ctx, static_cast<int>(worker));
    });
}

using PlanFn = void(const fa_args *, int, fa_plan *);
using RunFn = fa_status(const fa_args *, const fa_plan *, const fa_exec *, fa_error *);

void plan_and_run(const fa_args &a, PlanFn *make_plan, RunFn *run)
{
    fa_plan plan;
    make_plan(&a, static_cast<int>(torch::stable::get_num_threads()), &plan);
    const Memory workspace = host_memory(plan.workspace);
    const fa_exec exec = {
        .parallel = plan.threads > 1 ? on_torch_threads : nullptr,
        .pool = nullptr,
        .workspace = workspace.get(),
        .workspace_size = plan.workspace,
    };
    fa_error err;
    check(run(&a, &plan, &exec, &err), err);
}

// ---- the ops -----------------------------------------------------------------------------------------------------

void plan_results(fa_args *a)
{
    const int64_t B = a->q.size[0], HQ = a->q.size[1], SQ = a->q.size[2], DV = a->v.size[3];
    a->out = planned({B, HQ, SQ, DV}, a->q.dtype, a->q);
    a->lse = planned({B, HQ, SQ, 1}, lse_dtype(a->q.dtype), fa_tensor{});
    fa_error err;
    check(fa_validate_forward(a, &err), err);
}

std::tuple<Tensor, Tensor> forward(const Tensor &query, const Tensor &key, const Tensor &value,
                                   const MaybeTensor &attn_mask, const MaybeTensor &sinks,
                                   const MaybeTensor &alibi_slopes, const MaybeTensor &q_seqlens,
                                   const MaybeTensor &kv_seqlens, const MaybeTensor &dropout_seed,
                                   std::optional<double> scale, double softcap, int64_t window_left,
                                   int64_t window_right, bool bottom_right, double dropout_p)
{
    fa_args a = args_of({query, key, value, attn_mask, sinks, alibi_slopes, q_seqlens, kv_seqlens, dropout_seed, scale,
                         softcap, window_left, window_right, bottom_right, dropout_p});
    plan_results(&a);
    Tensor out = allocate(&a.out), lse = allocate(&a.lse, 0, 3);
    plan_and_run(a, fa_plan_forward, fa_run_forward);
    return {out, lse};
}

// forward without options and without the log-sum-exp: the cost of a tiny call is that of its arguments and results.
Tensor forward_plain(const Tensor &query, const Tensor &key, const Tensor &value, std::optional<double> scale,
                     bool is_causal)
{
    const MaybeTensor none;
    fa_args a = args_of({query, key, value, none, none, none, none, none, none, scale, 0.0, -1, is_causal ? 0 : -1,
                         false, 0.0});
    plan_results(&a);
    Tensor out = allocate(&a.out);
    const int64_t rows = a.lse.size[0] * a.lse.size[1] * a.lse.size[2];
    const Memory lse = host_memory(static_cast<size_t>(rows) * fa_dtype_size(a.lse.dtype));
    a.lse.data = lse.get();
    plan_and_run(a, fa_plan_forward, fa_run_forward);
    return out;
}

enum Needs : int64_t { NEED_QUERY = 1, NEED_KEY = 2, NEED_VALUE = 4, NEED_MASK = 8, NEED_SINKS = 16, NEED_ALL = 31 };

fa_tensor planned_like(const fa_tensor &like)
{
    return planned({like.size[0], like.size[1], like.size[2], like.size[3]}, like.dtype, like);
}

fa_tensor rows_view(const Tensor &t, const char *name)
{
    return view(t, name, {0, 1, 2}, "3-D (B, HQ, SQ)");
}

void plan_gradients(fa_args *a, const Inputs &in, int64_t needs)
{
    if (needs < 0 || needs > NEED_ALL)
        refuse("needs must be in [0, 31], got " + std::to_string(needs));
    if ((needs & NEED_MASK) && !in.attn_mask)
        refuse("needs asks for the gradient of attn_mask, which is None");
    if ((needs & NEED_SINKS) && !in.sinks)
        refuse("needs asks for the gradient of sinks, which is None");
    if (needs & NEED_QUERY)
        a->dq = planned_like(a->q);
    if (needs & NEED_KEY)
        a->dk = planned_like(a->k);
    if (needs & NEED_VALUE)
        a->dv = planned_like(a->v);
    if (needs & NEED_MASK) // by the mask's own strides: those in a->mask are 0 where it is broadcast
        a->dmask = planned_like(full_view(*in.attn_mask, "attn_mask", "4-D"));
    if (needs & NEED_SINKS)
        a->dsinks = planned({a->sinks.size[0], a->sinks.size[1], 1, 1}, lse_dtype(a->q.dtype), fa_tensor{});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>
backward(const Tensor &grad_out, const MaybeTensor &grad_lse, const Tensor &query, const Tensor &key,
         const Tensor &value, const Tensor &out, const Tensor &lse, const MaybeTensor &attn_mask,
         const MaybeTensor &sinks, const MaybeTensor &alibi_slopes, const MaybeTensor &q_seqlens,
         const MaybeTensor &kv_seqlens, const MaybeTensor &dropout_seed, std::optional<double> scale, double softcap,
         int64_t window_left, int64_t window_right, bool bottom_right, double dropout_p, int64_t needs)
{
    const Inputs in = {query,      key,           value,        attn_mask, sinks,   alibi_slopes, q_seqlens,
                       kv_seqlens, dropout_seed,  scale,        softcap,   window_left, window_right,
                       bottom_right, dropout_p};
    fa_args a = args_of(in);
    require_cpu(grad_out, "grad_out");
    require_cpu(grad_lse, "grad_lse");
    require_cpu(out, "out");
    require_cpu(lse, "lse");
    a.out = full_view(out, "out", "4-D (B, HQ, SQ, DV)");
    a.lse = rows_view(lse, "lse");
    a.dout = full_view(grad_out, "grad_out", "4-D (B, HQ, SQ, DV)");
    a.dlse = grad_lse ? rows_view(*grad_lse, "grad_lse") : fa_tensor{};
    plan_gradients(&a, in, needs);
    fa_error err;
    check(fa_validate_backward(&a, &err), err);

    Tensor dq = a.dq.data ? allocate(&a.dq) : nothing(a.q.dtype);
    Tensor dk = a.dk.data ? allocate(&a.dk) : nothing(a.k.dtype);
    Tensor dv = a.dv.data ? allocate(&a.dv) : nothing(a.v.dtype);
    Tensor dmask = a.dmask.data ? allocate(&a.dmask) : nothing(attn_mask ? a.mask.dtype : a.q.dtype);
    const int sinks_dim = sinks ? static_cast<int>(sinks->dim()) : 0;
    Tensor dsinks = a.dsinks.data ? allocate(&a.dsinks, 2 - sinks_dim, sinks_dim)
                                  : nothing(sinks ? a.sinks.dtype : a.q.dtype);
    if (needs)
        plan_and_run(a, fa_plan_backward, fa_run_backward);
    if (a.dsinks.data && a.dsinks.dtype != a.sinks.dtype)
        dsinks = torch::stable::to(dsinks, sinks->scalar_type());
    return {dq, dk, dv, dmask, dsinks};
}

} // namespace

STABLE_TORCH_LIBRARY(flashattn_ext, m)
{
    m.def("forward(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? sinks, Tensor? alibi_slopes, "
          "Tensor? q_seqlens, Tensor? kv_seqlens, Tensor? dropout_seed, float? scale, float softcap, "
          "int window_left, int window_right, bool bottom_right, float dropout_p) -> (Tensor out, Tensor lse)");
    m.def("forward_plain(Tensor query, Tensor key, Tensor value, float? scale, bool is_causal) -> Tensor");
    m.def("backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
          "Tensor? attn_mask, Tensor? sinks, Tensor? alibi_slopes, Tensor? q_seqlens, Tensor? kv_seqlens, "
          "Tensor? dropout_seed, float? scale, float softcap, int window_left, int window_right, bool bottom_right, "
          "float dropout_p, int needs) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask, "
          "Tensor grad_sinks)");
}

STABLE_TORCH_LIBRARY_IMPL(flashattn_ext, CPU, m)
{
    m.impl("forward", TORCH_BOX(&forward));
    m.impl("forward_plain", TORCH_BOX(&forward_plain));
    m.impl("backward", TORCH_BOX(&backward));
}

// Where some tensor is on a GPU torch calls this key; the refusal then names the tensor and its device.
STABLE_TORCH_LIBRARY_IMPL(flashattn_ext, CUDA, m)
{
    m.impl("forward", TORCH_BOX(&forward));
    m.impl("forward_plain", TORCH_BOX(&forward_plain));
    m.impl("backward", TORCH_BOX(&backward));
}
