// The ops on dense tensors, on torch's stable ABI: one binary serves torch 2.10 and later, and every Python.
// These files turn tensors into the arguments of csrc/fa.h and back. Refusals about shapes and values are worded in
// csrc/plan; refused here is only what those arguments cannot say: devices, foreign dtypes, the number of dimensions.

#include "torch_args.h"

namespace {

using namespace fa_torch;

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
    bool allow_tf32;
};

fa_tensor mask_view(const MaybeTensor &t)
{
    return t ? broadcast(full_view(*t, "attn_mask", "4-D, each size full or 1 against (B, HQ, SQ, SK)")) : fa_tensor{};
}

Place check_devices(const Inputs &in)
{
    const auto same = [&](const Tensor &t) {
        return device_type(t) == device_type(in.query) && t.get_device_index() == in.query.get_device_index();
    };
    if (!same(in.key) || !same(in.value))
        refuse("query, key and value must be on the same device, got query on " + device_name(in.query) + ", key on " +
               device_name(in.key) + " and value on " + device_name(in.value));
    const Place place = place_of(in.query, "query");
    require_at(place, in.attn_mask, "attn_mask");
    require_at(place, in.sinks, "sinks");
    require_at(place, in.alibi_slopes, "alibi_slopes");
    require_at(place, in.q_seqlens, "q_seqlens");
    require_at(place, in.kv_seqlens, "kv_seqlens");
    return place;
}

void require_known_dtypes(const Inputs &in)
{
    const Dtype &q = dtype_of(in.query), &k = dtype_of(in.key), &v = dtype_of(in.value);
    if (q.fa == FOREIGN || k.fa == FOREIGN || v.fa == FOREIGN)
        refuse(std::string("query, key and value have dtypes ") + q.name + ", " + k.name + " and " + v.name +
               ": they must be the same, one of float32, bfloat16, float16 and float64");
}

fa_args args_of(const Inputs &in)
{
    const Place place = check_devices(in);
    require_known_dtypes(in);
    fa_args a = {};
    put_at(place, &a);
    a.q = full_view(in.query, "query", "4-D (B, HQ, SQ, D)");
    a.k = full_view(in.key, "key", "4-D (B, HK, SK, D)");
    a.v = full_view(in.value, "value", "4-D (B, HK, SK, DV)");
    a.mask = mask_view(in.attn_mask);
    a.sinks = heads_view(in.sinks, "sinks");
    a.alibi = heads_view(in.alibi_slopes, "alibi_slopes");
    a.q_seqlens = lengths_view(in.q_seqlens, "q_seqlens");
    a.kv_seqlens = lengths_view(in.kv_seqlens, "kv_seqlens");
    a.scale = scale_of(in.scale, a.q.size[3]);
    a.softcap = in.softcap;
    a.window_left = in.window_left;
    a.window_right = in.window_right;
    a.bottom_right = in.bottom_right;
    a.dropout_p = in.dropout_p;
    a.allow_tf32 = in.allow_tf32;
    a.dropout_seed = seed_of(in.dropout_seed, in.dropout_p);
    return a;
}

// ---- the ops -----------------------------------------------------------------------------------------------------

void plan_results(fa_args *a)
{
    const int64_t B = a->q.size[0], HQ = a->q.size[1], SQ = a->q.size[2], DV = a->v.size[3];
    a->out = planned({B, HQ, SQ, DV}, a->q.dtype, a->q);
    a->lse = planned({B, HQ, SQ, 1}, lse_dtype(a->q.dtype), fa_tensor{});
    validate(*a, fa_validate_forward);
}

std::tuple<Tensor, Tensor> forward(const Tensor &query, const Tensor &key, const Tensor &value,
                                   const MaybeTensor &attn_mask, const MaybeTensor &sinks,
                                   const MaybeTensor &alibi_slopes, const MaybeTensor &q_seqlens,
                                   const MaybeTensor &kv_seqlens, const MaybeTensor &dropout_seed,
                                   std::optional<double> scale, double softcap, int64_t window_left,
                                   int64_t window_right, bool bottom_right, double dropout_p, bool allow_tf32)
{
    fa_args a = args_of({query, key, value, attn_mask, sinks, alibi_slopes, q_seqlens, kv_seqlens, dropout_seed, scale,
                         softcap, window_left, window_right, bottom_right, dropout_p, allow_tf32});
    plan_results(&a);
    const Place place = place_of(a);
    Tensor out = allocate(&a.out, 0, 4, place), lse = allocate(&a.lse, 0, 3, place);
    plan_and_run(a, FORWARD);
    return {out, lse};
}

// forward without options and without the log-sum-exp: the cost of a tiny call is that of its arguments and results.
Tensor forward_plain(const Tensor &query, const Tensor &key, const Tensor &value, std::optional<double> scale,
                     bool is_causal, bool enable_gqa, bool allow_tf32)
{
    const MaybeTensor none;
    fa_args a = args_of({query, key, value, none, none, none, none, none, none, scale, 0.0, -1, is_causal ? 0 : -1,
                         false, 0.0, allow_tf32});
    if (!enable_gqa && a.q.size[1] != a.k.size[1])
        refuse("query has " + std::to_string(a.q.size[1]) + " heads and key " + std::to_string(a.k.size[1]) +
               ": without enable_gqa they must be the same");
    plan_results(&a);
    Tensor out = allocate(&a.out, 0, 4, place_of(a));
    const Memory lse = scratch(&a.lse, place_of(a));
    plan_and_run(a, FORWARD);
    return out;
}

enum Needs : int64_t { NEED_QUERY = 1, NEED_KEY = 2, NEED_VALUE = 4, NEED_MASK = 8, NEED_SINKS = 16, NEED_ALL = 31 };

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
         int64_t window_left, int64_t window_right, bool bottom_right, double dropout_p, bool allow_tf32,
         int64_t needs)
{
    const Inputs in = {query,      key,           value,        attn_mask, sinks,   alibi_slopes, q_seqlens,
                       kv_seqlens, dropout_seed,  scale,        softcap,   window_left, window_right,
                       bottom_right, dropout_p, allow_tf32};
    fa_args a = args_of(in);
    const Place place = place_of(a);
    require_at(place, grad_out, "grad_out");
    require_at(place, grad_lse, "grad_lse");
    require_at(place, out, "out");
    require_at(place, lse, "lse");
    a.out = full_view(out, "out", "4-D (B, HQ, SQ, DV)");
    a.lse = rows_view(lse, "lse");
    const Tensor dout = in_rows(grad_out, place);
    a.dout = full_view(dout, "grad_out", "4-D (B, HQ, SQ, DV)");
    a.dlse = grad_lse ? rows_view(*grad_lse, "grad_lse") : fa_tensor{};
    plan_gradients(&a, in, needs);
    validate(a, fa_validate_backward);

    Tensor dq = a.dq.data ? allocate(&a.dq, 0, 4, place) : nothing(a.q.dtype, place);
    Tensor dk = a.dk.data ? allocate(&a.dk, 0, 4, place) : nothing(a.k.dtype, place);
    Tensor dv = a.dv.data ? allocate(&a.dv, 0, 4, place) : nothing(a.v.dtype, place);
    Tensor dmask = a.dmask.data ? allocate(&a.dmask, 0, 4, place)
                                : nothing(attn_mask ? a.mask.dtype : a.q.dtype, place);
    const int sinks_dim = sinks ? static_cast<int>(sinks->dim()) : 0;
    Tensor dsinks = a.dsinks.data ? allocate(&a.dsinks, 2 - sinks_dim, sinks_dim, place)
                                  : nothing(sinks ? a.sinks.dtype : a.q.dtype, place);
    if (needs)
        plan_and_run(a, BACKWARD);
    if (a.dsinks.data && a.dsinks.dtype != a.sinks.dtype)
        dsinks = torch::stable::to(dsinks, sinks->scalar_type());
    return {dq, dk, dv, dmask, dsinks};
}

} // namespace

STABLE_TORCH_LIBRARY(flashattn_ext, m)
{
    m.def("forward(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? sinks, Tensor? alibi_slopes, "
          "Tensor? q_seqlens, Tensor? kv_seqlens, Tensor? dropout_seed, float? scale, float softcap, "
          "int window_left, int window_right, bool bottom_right, float dropout_p, bool allow_tf32) -> "
          "(Tensor out, Tensor lse)");
    m.def("forward_plain(Tensor query, Tensor key, Tensor value, float? scale, bool is_causal, bool enable_gqa, "
          "bool allow_tf32) -> Tensor");
    m.def("backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
          "Tensor? attn_mask, Tensor? sinks, Tensor? alibi_slopes, Tensor? q_seqlens, Tensor? kv_seqlens, "
          "Tensor? dropout_seed, float? scale, float softcap, int window_left, int window_right, bool bottom_right, "
          "float dropout_p, bool allow_tf32, int needs) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, "
          "Tensor grad_mask, Tensor grad_sinks)");
}

STABLE_TORCH_LIBRARY_IMPL(flashattn_ext, CPU, m)
{
    m.impl("forward", TORCH_BOX(&forward));
    m.impl("forward_plain", TORCH_BOX(&forward_plain));
    m.impl("backward", TORCH_BOX(&backward));
}

// Also where only some tensor is on a GPU; a refusal then names the tensor and its device.
STABLE_TORCH_LIBRARY_IMPL(flashattn_ext, CUDA, m)
{
    m.impl("forward", TORCH_BOX(&forward));
    m.impl("forward_plain", TORCH_BOX(&forward_plain));
    m.impl("backward", TORCH_BOX(&backward));
}
