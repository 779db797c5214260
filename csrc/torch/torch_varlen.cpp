// The ops on packed sequences: rows (T, H, D) of N sequences, one behind the other, as csrc/fa.h has them with cu_q.

#include "torch_args.h"

namespace {

using namespace fa_torch;

// ---- arguments ---------------------------------------------------------------------------------------------------

// What both ops take, as torch hands it over.
struct Packed {
    const Tensor &query, &key, &value, &cu_seq_q;
    const MaybeTensor &cu_seq_k, &seqused_k, &block_table, &sinks, &alibi_slopes, &dropout_seed;
    int64_t max_q, max_k;
    std::optional<double> scale;
    double softcap;
    int64_t window_left, window_right;
    double dropout_p;
    bool allow_tf32;
    int64_t num_splits;
};

Place check_devices(const Packed &in)
{
    const Place place = place_of(in.query, "query");
    require_at(place, in.key, "key");
    require_at(place, in.value, "value");
    require_at(place, in.cu_seq_q, "cu_seq_q");
    require_at(place, in.cu_seq_k, "cu_seq_k");
    require_at(place, in.seqused_k, "seqused_k");
    require_at(place, in.block_table, "block_table");
    require_at(place, in.sinks, "sinks");
    require_at(place, in.alibi_slopes, "alibi_slopes");
    return place;
}

fa_tensor offsets_view(const MaybeTensor &t, const char *name)
{
    return t ? view(*t, name, {0}, "(N + 1,)") : fa_tensor{};
}

fa_args args_of(const Packed &in)
{
    const Place place = check_devices(in);
    fa_args a = {};
    put_at(place, &a);
    a.by_sequence = true;
    a.bottom_right = true;
    a.q = packed_view(in.query, "query", "3-D (T, HQ, D)");
    if (in.block_table) {
        a.k = cache_view(in.key, "key", "4-D (pages, page_size, HK, D) with block_table");
        a.v = cache_view(in.value, "value", "4-D (pages, page_size, HK, DV) with block_table");
        a.page_size = a.k.size[2];
    } else {
        a.k = packed_view(in.key, "key", "3-D (T, HK, D) without block_table");
        a.v = packed_view(in.value, "value", "3-D (T, HK, DV) without block_table");
        if (!in.cu_seq_k)
            refuse("cu_seq_k is None: it must be given where block_table is not");
    }
    a.cu_q = offsets_view(in.cu_seq_q, "cu_seq_q");
    a.cu_k = offsets_view(in.cu_seq_k, "cu_seq_k");
    a.kv_seqlens = lengths_view(in.seqused_k, "seqused_k");
    a.block_table = table_view(in.block_table);
    a.sinks = heads_view(in.sinks, "sinks");
    a.alibi = heads_view(in.alibi_slopes, "alibi_slopes");
    a.scale = scale_of(in.scale, a.q.size[3]);
    a.softcap = in.softcap;
    a.window_left = in.window_left;
    a.window_right = in.window_right;
    a.dropout_p = in.dropout_p;
    a.allow_tf32 = in.allow_tf32;
    a.dropout_seed = seed_of(in.dropout_seed, in.dropout_p);
    a.splits_wanted = in.num_splits;
    return a;
}

// The longest sequence that the caller announced; the lengths themselves have been validated.
void check_longest(const fa_args &a, const Packed &in)
{
    if (a.device_memory) {
        if (const auto copy = host_copy(a))
            check_longest(copy->a, in);
        return;
    }
    const auto between = [](const fa_tensor &cu, int64_t n) {
        return index_at(cu, n + 1) - index_at(cu, n);
    };
    for (int64_t n = 0; n + 1 < a.cu_q.size[0]; n++) {
        const int64_t q = between(a.cu_q, n);
        const int64_t k = a.kv_seqlens.data ? index_at(a.kv_seqlens, n) : between(a.cu_k, n);
        if (q > in.max_q || k > in.max_k)
            refuse(std::string(q > in.max_q ? "max_q" : "max_k") + " is " +
                   std::to_string(q > in.max_q ? in.max_q : in.max_k) + " and sequence " + std::to_string(n) +
                   " has " + std::to_string(q > in.max_q ? q : k) + (q > in.max_q ? " queries" : " keys") +
                   ": it must be at least the longest length");
    }
}

// ---- the ops -----------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> varlen_forward(const Tensor &query, const Tensor &key, const Tensor &value,
                                          const Tensor &cu_seq_q, const MaybeTensor &cu_seq_k,
                                          const MaybeTensor &seqused_k, const MaybeTensor &block_table,
                                          const MaybeTensor &sinks, const MaybeTensor &alibi_slopes,
                                          const MaybeTensor &dropout_seed, int64_t max_q, int64_t max_k,
                                          std::optional<double> scale, double softcap, int64_t window_left,
                                          int64_t window_right, double dropout_p, bool allow_tf32,
                                          int64_t num_splits)
{
    const Packed in = {query, key, value, cu_seq_q, cu_seq_k, seqused_k, block_table, sinks, alibi_slopes,
                       dropout_seed, max_q, max_k, scale, softcap, window_left, window_right, dropout_p, allow_tf32,
                       num_splits};
    fa_args a = args_of(in);
    const int64_t HQ = a.q.size[1], T = a.q.size[2];
    a.out = planned_rows({1, HQ, T, a.v.size[3]}, a.q.dtype);
    a.lse = planned({1, HQ, T, 1}, lse_dtype(a.q.dtype), fa_tensor{});
    validate(a, fa_validate_forward);
    check_longest(a, in);
    const Place place = place_of(a);
    Tensor out = allocate_rows(&a.out, true, place), lse = allocate(&a.lse, 1, 2, place);
    plan_and_run(a, FORWARD);
    return {out, lse};
}

enum Needs : int64_t { NEED_QUERY = 1, NEED_KEY = 2, NEED_VALUE = 4, NEED_SINKS = 8, NEED_ALL = 15 };

fa_tensor planned_rows_like(const fa_tensor &like)
{
    return planned_rows({like.size[0], like.size[1], like.size[2], like.size[3]}, like.dtype);
}

void plan_gradients(fa_args *a, const MaybeTensor &sinks, int64_t needs)
{
    if (needs < 0 || needs > NEED_ALL)
        refuse("needs must be in [0, 15], got " + std::to_string(needs));
    if ((needs & NEED_SINKS) && !sinks)
        refuse("needs asks for the gradient of sinks, which is None");
    if (needs & NEED_QUERY)
        a->dq = planned_rows_like(a->q);
    if (needs & NEED_KEY)
        a->dk = planned_rows_like(a->k);
    if (needs & NEED_VALUE)
        a->dv = planned_rows_like(a->v);
    if (needs & NEED_SINKS)
        a->dsinks = planned({a->sinks.size[0], a->sinks.size[1], 1, 1}, lse_dtype(a->q.dtype), fa_tensor{});
}

fa_tensor packed_lse_view(const Tensor &t, const char *name)
{
    return view(t, name, {1, 2}, "2-D (HQ, T)");
}

std::tuple<Tensor, Tensor, Tensor, Tensor>
varlen_backward(const Tensor &grad_out, const MaybeTensor &grad_lse, const Tensor &query, const Tensor &key,
                const Tensor &value, const Tensor &out, const Tensor &lse, const Tensor &cu_seq_q,
                const Tensor &cu_seq_k, const MaybeTensor &sinks, const MaybeTensor &alibi_slopes,
                const MaybeTensor &dropout_seed, int64_t max_q, int64_t max_k, std::optional<double> scale,
                double softcap, int64_t window_left, int64_t window_right, double dropout_p, bool allow_tf32,
                int64_t needs)
{
    const MaybeTensor none, offsets_k = cu_seq_k;
    const Packed in = {query, key, value, cu_seq_q, offsets_k, none, none, sinks, alibi_slopes,
                       dropout_seed, max_q, max_k, scale, softcap, window_left, window_right, dropout_p, allow_tf32, 0};
    fa_args a = args_of(in);
    const Place place = place_of(a);
    require_at(place, grad_out, "grad_out");
    require_at(place, grad_lse, "grad_lse");
    require_at(place, out, "out");
    require_at(place, lse, "lse");
    a.out = packed_view(out, "out", "3-D (T, HQ, DV)");
    a.lse = packed_lse_view(lse, "lse");
    const Tensor dout = in_rows(grad_out, place);
    a.dout = packed_view(dout, "grad_out", "3-D (T, HQ, DV)");
    a.dlse = grad_lse ? packed_lse_view(*grad_lse, "grad_lse") : fa_tensor{};
    plan_gradients(&a, sinks, needs);
    validate(a, fa_validate_backward);
    check_longest(a, in);

    Tensor dq = a.dq.data ? allocate_rows(&a.dq, true, place) : nothing(a.q.dtype, place);
    Tensor dk = a.dk.data ? allocate_rows(&a.dk, true, place) : nothing(a.k.dtype, place);
    Tensor dv = a.dv.data ? allocate_rows(&a.dv, true, place) : nothing(a.v.dtype, place);
    const int sinks_dim = sinks ? static_cast<int>(sinks->dim()) : 0;
    Tensor dsinks = a.dsinks.data ? allocate(&a.dsinks, 2 - sinks_dim, sinks_dim, place)
                                  : nothing(sinks ? a.sinks.dtype : a.q.dtype, place);
    if (needs)
        plan_and_run(a, BACKWARD);
    if (a.dsinks.data && a.dsinks.dtype != a.sinks.dtype)
        dsinks = torch::stable::to(dsinks, sinks->scalar_type());
    return {dq, dk, dv, dsinks};
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(flashattn_ext, m)
{
    m.def("varlen_forward(Tensor query, Tensor key, Tensor value, Tensor cu_seq_q, Tensor? cu_seq_k, "
          "Tensor? seqused_k, Tensor? block_table, Tensor? sinks, Tensor? alibi_slopes, Tensor? dropout_seed, "
          "SymInt max_q, SymInt max_k, float? scale, float softcap, int window_left, int window_right, "
          "float dropout_p, bool allow_tf32, int num_splits) -> (Tensor out, Tensor lse)");
    m.def("varlen_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
          "Tensor lse, Tensor cu_seq_q, Tensor cu_seq_k, Tensor? sinks, Tensor? alibi_slopes, Tensor? dropout_seed, "
          "SymInt max_q, SymInt max_k, float? scale, float softcap, int window_left, int window_right, "
          "float dropout_p, bool allow_tf32, int needs) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, "
          "Tensor grad_sinks)");
}

STABLE_TORCH_LIBRARY_IMPL(flashattn_ext, CPU, m)
{
    m.impl("varlen_forward", TORCH_BOX(&varlen_forward));
    m.impl("varlen_backward", TORCH_BOX(&varlen_backward));
}

// Also where only some tensor is on a GPU; a refusal then names the tensor and its device.
STABLE_TORCH_LIBRARY_IMPL(flashattn_ext, CUDA, m)
{
    m.impl("varlen_forward", TORCH_BOX(&varlen_forward));
    m.impl("varlen_backward", TORCH_BOX(&varlen_backward));
}
