"""What the ops return, without computing it: shapes, dtypes and strides for the compiler and for meta tensors."""

import torch
from torch import library


@library.register_fake("flashattn_ext::forward")
def forward(query, key, value, attn_mask, sinks, alibi_slopes, q_seqlens, kv_seqlens, dropout_seed, scale, softcap,
            window_left, window_right, bottom_right, dropout_p, allow_tf32):
    _require_one_device(query, key, value, attn_mask, sinks, alibi_slopes)
    out = _empty((*query.shape[:3], value.shape[3]), query)
    return out, _new_lse(query, query.shape[:3])


@library.register_fake("flashattn_ext::forward_plain")
def forward_plain(query, key, value, scale, is_causal, enable_gqa, allow_tf32):
    _require_one_device(query, key, value)
    return _empty((*query.shape[:3], value.shape[3]), query)


@library.register_fake("flashattn_ext::backward")
def backward(grad_out, grad_lse, query, key, value, out, lse, attn_mask, sinks, alibi_slopes, q_seqlens, kv_seqlens,
             dropout_seed, scale, softcap, window_left, window_right, bottom_right, dropout_p, allow_tf32, needs):
    def gradient(place, x):
        if not needs >> place & 1:
            return query.new_empty(0, dtype=query.dtype if x is None else x.dtype)
        return _empty(x.shape, x) if x is not sinks else x.new_empty(x.shape)

    return tuple(gradient(place, x) for place, x in enumerate((query, key, value, attn_mask, sinks)))


@library.register_fake("flashattn_ext::varlen_forward")
def varlen_forward(query, key, value, cu_seq_q, cu_seq_k, seqused_k, block_table, sinks, alibi_slopes, dropout_seed,
                   max_q, max_k, scale, softcap, window_left, window_right, dropout_p, allow_tf32, num_splits):
    _require_one_device(query, key, value)
    tokens, heads = query.shape[:2]
    return query.new_empty((tokens, heads, value.shape[-1])), _new_lse(query, (heads, tokens))


@library.register_fake("flashattn_ext::varlen_backward")
def varlen_backward(grad_out, grad_lse, query, key, value, out, lse, cu_seq_q, cu_seq_k, sinks, alibi_slopes,
                    dropout_seed, max_q, max_k, scale, softcap, window_left, window_right, dropout_p, allow_tf32,
                    needs):
    def gradient(place, x):
        if not needs >> place & 1:
            return query.new_empty(0, dtype=query.dtype if x is None else x.dtype)
        return x.new_empty(x.shape)

    return tuple(gradient(place, x) for place, x in enumerate((query, key, value, sinks)))


@library.register_fake("flashattn_ext::decode")
def decode(query, k_cache, v_cache, cache_seqlens, block_table, k_scale, v_scale, tree_mask, sinks, alibi_slopes, scale,
           softcap, window_left, window_right, num_splits):
    return _decoded(query, v_cache), _new_lse(query, _rows_of_heads(query))


@library.register_fake("flashattn_ext::decode_plain")
def decode_plain(query, k_cache, v_cache, cache_seqlens, block_table, scale, causal):
    return _decoded(query, v_cache)


@library.register_fake("flashattn_ext::decode_append_")
def decode_append_(query, k_cache, v_cache, cache_seqlens, k_new, v_new, block_table, k_scale, v_scale, rope_cos,
                   rope_sin, rope_interleaved, tree_mask, sinks, alibi_slopes, out, scale, softcap, window_left,
                   window_right, num_splits):
    result = _decoded(query, v_cache) if out is None else query.new_empty(0)
    return result, _new_lse(query, _rows_of_heads(query))


@library.register_fake("flashattn_ext::cache_append_")
def cache_append_(k_cache, v_cache, cache_seqlens, k_new, v_new, cu_seqlens, block_table, k_scale, v_scale):
    pass


@library.register_fake("flashattn_ext::merge")
def merge(out_a, lse_a, out_b, lse_b):
    return _empty(out_a.shape, out_a), lse_a.new_empty(out_a.shape[:3])


def _decoded(query, v_cache):
    return query.new_empty((*query.shape[:3], v_cache.shape[3]))


def _rows_of_heads(query):
    batch, tokens, heads = query.shape[:3]
    return batch, heads, tokens


def _new_lse(query, shape):
    return query.new_empty(shape, dtype=torch.float64 if query.dtype == torch.float64 else torch.float32)


def _require_one_device(query, key, value, *others):
    """Tensors of several devices come here where one of them is on "meta"; else the kernels refuse them."""
    if not query.device == key.device == value.device:
        raise RuntimeError(f"query, key and value must be on the same device, got query on {query.device}, key on "
                           f"{key.device} and value on {value.device}")
    for name, x in zip(("attn_mask", "sinks", "alibi_slopes"), others):
        if x is not None and x.device != query.device:
            raise RuntimeError(f"{name} must be on the device of query, {query.device}, got {x.device}")


def _empty(shape, like):
    """A dense tensor whose dimensions lie in memory in the order of like's, as torch.empty_like lays them out.

    csrc/torch/torch_args.h allocates by the same rule: an insertion sort of the strides from the innermost dimension
    outwards. A stride of 0 says nothing about the order, and of equal strides the larger size lies further out.
    """
    order = list(reversed(range(len(shape))))  # innermost first
    for start in range(1, len(order)):
        outer = start
        for inner in reversed(range(start)):
            larger = _inner_is_larger(like, order[inner], order[outer])
            if larger < 0:
                break
            if larger > 0:
                order[inner], order[outer] = order[outer], order[inner]
                outer = inner
    strides, step = [0] * len(shape), 1
    for dim in order:
        strides[dim] = step
        step = step * torch.sym_max(shape[dim], 1)
    return like.new_empty_strided(tuple(shape), strides)


def _inner_is_larger(like, inner, outer):
    """1: dimension `inner` belongs outside of `outer`; -1: it does not; 0: the strides do not say."""
    inner_stride, outer_stride = like.stride(inner), like.stride(outer)
    if inner_stride == 0 or outer_stride == 0:
        return 0
    if inner_stride != outer_stride:
        return 1 if inner_stride > outer_stride else -1
    return 1 if like.shape[inner] > like.shape[outer] else 0
