// The ops on key/value caches, and the merge of partial results. Tensors are (B, S, H, D) here: one step of generation
// has its tokens before its heads, and so has a cache, dense (B, S_max, HK, D) or in pages (pages, page_size, HK, D).

#include "torch_args.h"

namespace {

using namespace fa_torch;

// ---- arguments ---------------------------------------------------------------------------------------------------

// What the ops on caches take, as torch hands it over; each leaves out what it has not got.
struct Cache {
    const Tensor &k_cache, &v_cache, &seqlens;
    const MaybeTensor &block_table, &k_scale, &v_scale;
};

struct New {
    const MaybeTensor &k, &v, &cu_seqlens, &rope_cos, &rope_sin;
    bool rope_interleaved;
};

struct Step {
    const Tensor &query;
    const MaybeTensor &tree_mask, &sinks, &alibi_slopes;
    std::optional<double> scale;
    double softcap;
    int64_t window_left, window_right, num_splits;
};

void check_devices(const Place &place, const Cache &in)
{
    require_at(place, in.k_cache, "k_cache");
    require_at(place, in.v_cache, "v_cache");
    require_at(place, in.seqlens, "cache_seqlens");
    require_at(place, in.block_table, "block_table");
    require_at(place, in.k_scale, "k_scale");
    require_at(place, in.v_scale, "v_scale");
}

void check_devices(const Place &place, const New &in)
{
    require_at(place, in.k, "k_new");
    require_at(place, in.v, "v_new");
    require_at(place, in.cu_seqlens, "cu_seqlens");
    require_at(place, in.rope_cos, "rope_cos");
    require_at(place, in.rope_sin, "rope_sin");
}

void check_devices(const Place &place, const Step &in)
{
    require_at(place, in.query, "query");
    require_at(place, in.tree_mask, "tree_mask");
    require_at(place, in.sinks, "sinks");
    require_at(place, in.alibi_slopes, "alibi_slopes");
}

bool is_per_token(const MaybeTensor &scale)
{
    return scale && scale->dim() == 3;
}

bool scales_per_token(const Cache &in)
{
    if (in.k_scale && in.v_scale && is_per_token(in.k_scale) != is_per_token(in.v_scale))
        refuse("k_scale has " + std::to_string(in.k_scale->dim()) + " dimensions and v_scale " +
               std::to_string(in.v_scale->dim()) + ": either both are per token (3-D) or none is");
    return is_per_token(in.k_scale) || is_per_token(in.v_scale);
}

fa_tensor scale_view(const MaybeTensor &t, const char *name)
{
    const char *shape = "(), (HK,), (B, HK), or per token (B, S_max, HK) / (pages, page_size, HK)";
    if (!t)
        return {};
    switch (t->dim()) {
    case 0: return broadcast(view(*t, name, {}, shape));
    case 1: return broadcast(view(*t, name, {1}, shape));
    case 2: return broadcast(view(*t, name, {0, 1}, shape));
    default: return view(*t, name, {0, 2, 1}, shape);
    }
}

fa_tensor rows_view(const MaybeTensor &t, const char *name, bool packed)
{
    if (!t)
        return {};
    return packed ? packed_view(*t, name, "3-D (T, HK, D) with cu_seqlens") : cache_view(*t, name, "4-D (B, S, HK, D)");
}

fa_tensor rope_view(const MaybeTensor &t, const char *name)
{
    return t ? view(*t, name, {0, 1}, "2-D (positions, R / 2)") : fa_tensor{};
}

// The address to write through: it makes torch carry out a lazy copy first.
fa_tensor written(fa_tensor v, const Tensor &t)
{
    if (void *data = t.mutable_data_ptr())
        v.data = data;
    return v;
}

fa_append_args append_args_of(const Cache &cache, const New &in)
{
    const bool per_token = scales_per_token(cache);
    fa_append_args a = {};
    a.k_new = rows_view(in.k, "k_new", in.cu_seqlens.has_value());
    a.v_new = rows_view(in.v, "v_new", in.cu_seqlens.has_value());
    a.cu_new = in.cu_seqlens ? view(*in.cu_seqlens, "cu_seqlens", {0}, "(B + 1,)") : fa_tensor{};
    a.k_cache = written(cache_view(cache.k_cache, "k_cache", CACHE_SHAPE), cache.k_cache);
    a.v_cache = written(cache_view(cache.v_cache, "v_cache", CACHE_SHAPE), cache.v_cache);
    a.block_table = table_view(cache.block_table);
    a.seqlens = view(cache.seqlens, "cache_seqlens", {0}, "(B,)");
    a.k_scale = scale_view(cache.k_scale, "k_scale");
    a.v_scale = scale_view(cache.v_scale, "v_scale");
    if (per_token && cache.k_scale)
        a.k_scale = written(a.k_scale, *cache.k_scale);
    if (per_token && cache.v_scale)
        a.v_scale = written(a.v_scale, *cache.v_scale);
    a.scale_per_token = per_token;
    a.rope_cos = rope_view(in.rope_cos, "rope_cos");
    a.rope_sin = rope_view(in.rope_sin, "rope_sin");
    a.rope_interleaved = in.rope_interleaved;
    return a;
}

fa_args args_of(const Cache &cache, const Step &in)
{
    fa_args a = {};
    a.by_sequence = true;
    a.bottom_right = true;
    a.q = cache_view(in.query, "query", "4-D (B, SQ, HQ, D)");
    a.k = cache_view(cache.k_cache, "k_cache", CACHE_SHAPE);
    a.v = cache_view(cache.v_cache, "v_cache", CACHE_SHAPE);
    a.kv_seqlens = view(cache.seqlens, "cache_seqlens", {0}, "(B,)");
    a.block_table = table_view(cache.block_table);
    a.page_size = cache.block_table ? a.k.size[2] : 0;
    a.k_scale = scale_view(cache.k_scale, "k_scale");
    a.v_scale = scale_view(cache.v_scale, "v_scale");
    a.scale_per_token = scales_per_token(cache);
    a.tree_mask = in.tree_mask ? view(*in.tree_mask, "tree_mask", {0, 2, 3}, "3-D (B, SQ, SQ)") : fa_tensor{};
    a.sinks = heads_view(in.sinks, "sinks");
    a.alibi = heads_view(in.alibi_slopes, "alibi_slopes");
    a.scale = scale_of(in.scale, a.q.size[3]);
    a.softcap = in.softcap;
    a.window_left = in.window_left;
    a.window_right = in.window_right;
    a.splits_wanted = in.num_splits;
    return a;
}

// ---- results -----------------------------------------------------------------------------------------------------

void plan_results(fa_args *a)
{
    const int64_t B = a->q.size[0], HQ = a->q.size[1], SQ = a->q.size[2];
    if (!a->out.data)
        a->out = planned_rows({B, HQ, SQ, a->v.size[3]}, a->q.dtype);
    a->lse = planned({B, HQ, SQ, 1}, lse_dtype(a->q.dtype), fa_tensor{});
    validate(*a, fa_validate_forward);
}

fa_exec exec_at(const Place &place)
{
    return {.parallel = on_torch_threads,
            .pool = nullptr,
            .workspace = nullptr,
            .workspace_size = 0,
            .stream = place.on_cpu() ? nullptr : current_stream(place.index)};
}

void validate(const fa_append_args &a)
{
    fa_error err;
    check(fa_validate_append(&a, &err), err);
    if (!a.device_memory || !checks_device_memory())
        return;
    fa_append_args copy = a;
    copy.device_memory = false;
    std::vector<char> memory[3];
    size_t used = 0;
    for (fa_tensor *t : {&copy.cu_new, &copy.block_table, &copy.seqlens})
        if (t->data)
            copy_to_host(t, &memory[used++]);
    check(fa_validate_append(&copy, &err), err);
}

void append(const fa_append_args &a, const Place &place)
{
    const fa_exec exec = exec_at(place);
    fa_error err;
    if (a.device_memory)
        check(fa_cuda_run_append(&a, &exec, &err), err);
    else
        check(fa_run_append(&a, static_cast<int>(torch::stable::get_num_threads()), &exec, &err), err);
}

// ---- decode ------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> decode(const Tensor &query, const Tensor &k_cache, const Tensor &v_cache,
                                  const Tensor &cache_seqlens, const MaybeTensor &block_table,
                                  const MaybeTensor &k_scale, const MaybeTensor &v_scale, const MaybeTensor &tree_mask,
                                  const MaybeTensor &sinks, const MaybeTensor &alibi_slopes,
                                  std::optional<double> scale, double softcap, int64_t window_left,
                                  int64_t window_right, int64_t num_splits)
{
    const Cache cache = {k_cache, v_cache, cache_seqlens, block_table, k_scale, v_scale};
    const Step step = {query, tree_mask, sinks, alibi_slopes, scale, softcap, window_left, window_right, num_splits};
    const Place place = place_of(query, "query");
    check_devices(place, step);
    check_devices(place, cache);
    fa_args a = args_of(cache, step);
    put_at(place, &a);
    plan_results(&a);
    Tensor out = allocate_rows(&a.out, false, place), lse = allocate(&a.lse, 0, 3, place);
    plan_and_run(a, FORWARD);
    return {out, lse};
}

// decode without options and without the log-sum-exp: the cost of a tiny call is that of its arguments and results.
Tensor decode_plain(const Tensor &query, const Tensor &k_cache, const Tensor &v_cache, const Tensor &cache_seqlens,
                    const MaybeTensor &block_table, std::optional<double> scale, bool causal)
{
    const MaybeTensor none;
    const Cache cache = {k_cache, v_cache, cache_seqlens, block_table, none, none};
    const Step step = {query, none, none, none, scale, 0.0, -1, causal ? 0 : -1, 0};
    const Place place = place_of(query, "query");
    check_devices(place, step);
    check_devices(place, cache);
    fa_args a = args_of(cache, step);
    put_at(place, &a);
    plan_results(&a);
    Tensor out = allocate_rows(&a.out, false, place);
    const Memory lse = scratch(&a.lse, place);
    plan_and_run(a, FORWARD);
    return out;
}

void check_new_tokens(const fa_append_args &a, const Step &step, const New &in)
{
    if (!in.k && !in.v && (in.rope_cos || in.rope_sin))
        refuse("rope_cos or rope_sin is given and k_new is None: cached keys are turned already, so they need k_new");
    if (in.k && a.k_new.size[0] != step.query.size(0))
        refuse("k_new has batch size " + std::to_string(a.k_new.size[0]) + " and query " +
               std::to_string(step.query.size(0)) + ": they must be equal");
    if (in.k && step.tree_mask && a.k_new.size[2] != step.query.size(1))
        refuse("tree_mask is given, k_new has " + std::to_string(a.k_new.size[2]) + " tokens and query " +
               std::to_string(step.query.size(1)) + ": they must be equal");
}

// Where k_new is given: the lengths behind it, which the attention then sees.
std::unique_ptr<int64_t[]> lengths_after(const fa_append_args &a, fa_tensor *kv_seqlens)
{
    const int64_t B = a.seqlens.size[0];
    std::unique_ptr<int64_t[]> lengths(new int64_t[B > 0 ? B : 1]);
    for (int64_t b = 0; b < B; b++)
        lengths[b] = index_at(a.seqlens, b) + a.k_new.size[2];
    *kv_seqlens = {.data = lengths.get(), .size = {B, 1, 1, 1}, .stride = {1, 0, 0, 0}, .dtype = FA_I64};
    return lengths;
}

// Everything is validated before the first byte is written: that of append, then that of the attention behind it.
std::tuple<Tensor, Tensor>
decode_append_(const Tensor &query, const Tensor &k_cache, const Tensor &v_cache, const Tensor &cache_seqlens,
               const MaybeTensor &k_new, const MaybeTensor &v_new, const MaybeTensor &block_table,
               const MaybeTensor &k_scale, const MaybeTensor &v_scale, const MaybeTensor &rope_cos,
               const MaybeTensor &rope_sin, bool rope_interleaved, const MaybeTensor &tree_mask,
               const MaybeTensor &sinks, const MaybeTensor &alibi_slopes, const MaybeTensor &out,
               std::optional<double> scale, double softcap, int64_t window_left, int64_t window_right,
               int64_t num_splits)
{
    const MaybeTensor none;
    const Cache cache = {k_cache, v_cache, cache_seqlens, block_table, k_scale, v_scale};
    const Step step = {query, tree_mask, sinks, alibi_slopes, scale, softcap, window_left, window_right, num_splits};
    const New fresh = {k_new, v_new, none, rope_cos, rope_sin, rope_interleaved};
    const Place place = place_of(query, "query");
    check_devices(place, step);
    check_devices(place, cache);
    check_devices(place, fresh);
    require_at(place, out, "out");
    fa_args a = args_of(cache, step);
    fa_append_args b = append_args_of(cache, fresh);
    put_at(place, &a);
    b.device_memory = a.device_memory;
    b.device = a.device;
    check_new_tokens(b, step, fresh);
    const bool appends = k_new || v_new, turns = rope_cos || rope_sin;
    if (turns) {
        b.q = a.q;
        b.q_out = planned_rows({a.q.size[0], a.q.size[1], a.q.size[2], a.q.size[3]}, a.q.dtype);
    }
    std::unique_ptr<int64_t[]> lengths;
    if (appends)
        validate(b);
    if (appends && a.device_memory)
        a.kv_appended = b.k_new.size[2];
    else if (appends)
        lengths = lengths_after(b, &a.kv_seqlens);
    if (out)
        a.out = written(cache_view(*out, "out", "4-D (B, SQ, HQ, DV)"), *out);
    plan_results(&a);

    Tensor result = out ? nothing(a.q.dtype, place) : allocate_rows(&a.out, false, place);
    Tensor lse = allocate(&a.lse, 0, 3, place);
    Memory turned(nullptr, std::free);
    if (turns)
        turned = scratch(&b.q_out, place);
    if (appends)
        append(b, place);
    if (turns)
        a.q = b.q_out;
    plan_and_run(a, FORWARD);
    return {result, lse};
}

// ---- append and merge --------------------------------------------------------------------------------------------

void cache_append_(const Tensor &k_cache, const Tensor &v_cache, const Tensor &cache_seqlens, const Tensor &k_new,
                   const Tensor &v_new, const MaybeTensor &cu_seqlens, const MaybeTensor &block_table,
                   const MaybeTensor &k_scale, const MaybeTensor &v_scale)
{
    const MaybeTensor none, k = k_new, v = v_new;
    const Cache cache = {k_cache, v_cache, cache_seqlens, block_table, k_scale, v_scale};
    const New fresh = {k, v, cu_seqlens, none, none, false};
    const Place place = place_of(k_cache, "k_cache");
    check_devices(place, cache);
    check_devices(place, fresh);
    fa_append_args a = append_args_of(cache, fresh);
    a.device_memory = !place.on_cpu();
    a.device = place.index;
    validate(a);
    append(a, place);
}

std::tuple<Tensor, Tensor> merge(const Tensor &out_a, const Tensor &lse_a, const Tensor &out_b, const Tensor &lse_b)
{
    const char *out_shape = "4-D (B, H, S, DV)", *lse_shape = "3-D (B, H, S)";
    const Place place = place_of(out_a, "out_a");
    require_at(place, lse_a, "lse_a");
    require_at(place, out_b, "out_b");
    require_at(place, lse_b, "lse_b");
    fa_merge_args a = {};
    a.out_a = full_view(out_a, "out_a", out_shape);
    a.lse_a = view(lse_a, "lse_a", {0, 1, 2}, lse_shape);
    a.out_b = full_view(out_b, "out_b", out_shape);
    a.lse_b = view(lse_b, "lse_b", {0, 1, 2}, lse_shape);
    a.out = planned_like(a.out_a);
    a.lse = planned({a.out.size[0], a.out.size[1], a.out.size[2], 1}, a.lse_a.dtype, fa_tensor{});
    fa_error err;
    check(fa_validate_merge(&a, &err), err);
    Tensor out = allocate(&a.out, 0, 4, place), lse = allocate(&a.lse, 0, 3, place);
    const fa_exec exec = exec_at(place);
    if (place.on_cpu())
        check(fa_run_merge(&a, static_cast<int>(torch::stable::get_num_threads()), &exec, &err), err);
    else
        check(fa_cuda_run_merge(&a, place.index, &exec, &err), err);
    return {out, lse};
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(flashattn_ext, m)
{
    m.def("decode(Tensor query, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? block_table, "
          "Tensor? k_scale, Tensor? v_scale, Tensor? tree_mask, Tensor? sinks, Tensor? alibi_slopes, float? scale, "
          "float softcap, int window_left, int window_right, int num_splits) -> (Tensor out, Tensor lse)");
    m.def("decode_plain(Tensor query, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? block_table, "
          "float? scale, bool causal) -> Tensor");
    m.def("decode_append_(Tensor query, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, "
          "Tensor? k_new, Tensor? v_new, Tensor? block_table, Tensor(c!)? k_scale, Tensor(d!)? v_scale, "
          "Tensor? rope_cos, Tensor? rope_sin, bool rope_interleaved, Tensor? tree_mask, Tensor? sinks, "
          "Tensor? alibi_slopes, Tensor(e!)? out, float? scale, float softcap, int window_left, int window_right, "
          "int num_splits) -> (Tensor result, Tensor lse)");
    m.def("cache_append_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, Tensor k_new, Tensor v_new, "
          "Tensor? cu_seqlens, Tensor? block_table, Tensor(c!)? k_scale, Tensor(d!)? v_scale) -> ()");
    m.def("merge(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)");
}

STABLE_TORCH_LIBRARY_IMPL(flashattn_ext, CPU, m)
{
    m.impl("decode", TORCH_BOX(&decode));
    m.impl("decode_plain", TORCH_BOX(&decode_plain));
    m.impl("decode_append_", TORCH_BOX(&decode_append_));
    m.impl("cache_append_", TORCH_BOX(&cache_append_));
    m.impl("merge", TORCH_BOX(&merge));
}

// Also where only some tensor is on a GPU; a refusal then names the tensor and its device.
STABLE_TORCH_LIBRARY_IMPL(flashattn_ext, CUDA, m)
{
    m.impl("decode", TORCH_BOX(&decode));
    m.impl("decode_plain", TORCH_BOX(&decode_plain));
    m.impl("decode_append_", TORCH_BOX(&decode_append_));
    m.impl("cache_append_", TORCH_BOX(&cache_append_));
    m.impl("merge", TORCH_BOX(&merge));
}
