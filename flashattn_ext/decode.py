"""One step of generation against a key/value cache: append, rotary embedding and attention in one call.

What tensors may hold and how sizes must fit together is checked, and worded, in csrc/plan, before anything is written.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from . import ops, sdpa
from .autograd import is_differentiated
from .varlen import check_splits

__all__ = ["decode_attention"]

# The bare builtins below the OpOverloads: they dispatch the same, and a tiny call is a tenth faster.
_decode_plain, _decode, _decode_append = ops.decode_plain._op, ops.decode._op, ops.decode_append_._op

_is_grad_enabled = torch.is_grad_enabled
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled


def decode_attention(query, k_cache, v_cache, cache_seqlens, *, k_new=None, v_new=None, block_table=None, scale=None,
                     causal=True, window=None, softcap=0.0, sinks=None, alibi_slopes=None, rope_cos=None, rope_sin=None,
                     rope_interleaved=False, k_scale=None, v_scale=None, tree_mask=None, num_splits=None,
                     batch_invariant=False, return_lse=False, out=None):
    """Attention of a few new tokens of each of B sequences against what a cache holds of them; inference only.

    With k_new, the new keys and values are first written behind the cache_seqlens[b] tokens of each sequence, and then
    seen too. The last query stands at the last key: causal, windows and ALiBi count from there. Keys past a sequence's
    length, and pages past it, are never read, whatever the block table holds there. A refused call writes nothing.

    Args:
        query: (B, SQ, HQ, D); any strides. HQ is a multiple of HK: query head h reads head h // (HQ / HK).
        k_cache, v_cache: (B, S_max, HK, D) and (B, S_max, HK, DV), or with block_table pages (pages, page_size, HK, D)
            and (pages, page_size, HK, DV): query's dtype, or int8 or float8_e4m3fn with k_scale and v_scale. Written
            where k_new is given.
        cache_seqlens: (B,) int32 or int64: tokens in the cache before this call; never changed by it.
        k_new, v_new: (B, S_new, HK, D) and (B, S_new, HK, DV), query's dtype. Two sequences whose new tokens fall on
            the same row of the same page leave either's there.
        block_table: (B, max_pages) int32 or int64: token j of sequence b is row j % page_size of page
            block_table[b, j // page_size].
        scale: factor of Q K^T, finite; None = 1 / sqrt(D).
        causal: query i sees no key behind its own.
        window: (left, right) in keys, None or -1 = unbounded on that side; joins causal.
        softcap: s -> softcap * tanh(s / softcap) after the scale; 0 = off.
        sinks: (HQ,) or (B, HQ), float32 or query's dtype: logits that join the denominator only.
        alibi_slopes: (HQ,) or (B, HQ), float32 or query's dtype: adds -slope * |i + offset - j|.
        rope_cos, rope_sin: (positions, R / 2), R <= D, float32 or query's dtype: query i and new key i of sequence b
            are turned by position cache_seqlens[b] + i in their first R elements, in pairs (i, i + R / 2), or where
            rope_interleaved (2i, 2i + 1). Cached keys are turned already; so this needs k_new.
        k_scale, v_scale: float32, of int8 and float8_e4m3fn caches: (), (HK,), (B, HK), or per token (B, S_max, HK) /
            (pages, page_size, HK). value = stored * scale. New values are divided by it and rounded to nearest, ties to
            even, saturating at the ends of the range; per token the scale is max|row| / 127 or max|row| / 448 (1 for a
            row of zeros), and is written too.
        tree_mask: (B, SQ, SQ) bool: which of the last SQ tokens each query sees (True = attend), instead of causal;
            with k_new, SQ = S_new. Windows and ALiBi still count from the tokens' places.
        num_splits: into how many parts the keys are cut; None or 0 = as the plan says.
        batch_invariant: a sequence's bits must depend on nothing else in the batch. On the CPU they never do: each
            sequence is planned as though it were alone.
        return_lse: also return the log-sum-exp.
        out: (B, SQ, HQ, DV), query's dtype: the result is written there, and returned.

    Returns:
        out (B, SQ, HQ, DV), query's dtype, contiguous; with return_lse a pair (out, lse), lse (B, HQ, SQ) in float32
        (float64 for float64 inputs).

    Under autocast, floating query, k_new and v_new become the cache's dtype (the autocast dtype for a quantised cache);
    the cache itself is never cast.

    Raises:
        RuntimeError: shapes, dtypes, devices, lengths or pages that do not fit, naming the sequence; no room in the
            cache for k_new; inputs that require grad.
        ValueError: scale, softcap, window or num_splits out of range.

    Source: Dao et al., "Flash-Decoding", 2023; Kwon et al., "PagedAttention", 2023; Su et al., "RoFormer", 2021.
    """
    # The short way, for calls without options: their cost is a large part of a tiny call. What the op refuses goes the
    # long way after all, which settles it or refuses it in the words of this function.
    if (k_new is None and v_new is None and window is None and not softcap and sinks is None and alibi_slopes is None
            and rope_cos is None and rope_sin is None and k_scale is None and v_scale is None and tree_mask is None
            and not num_splits and not return_lse and out is None and not is_dynamo_compiling()
            and type(query) is type(k_cache) is type(v_cache) is Tensor
            and not (_is_grad_enabled() and (query.requires_grad or k_cache.requires_grad or v_cache.requires_grad))
            and not _is_any_autocast_enabled() and forward_ad._current_level < 0):
        try:
            return _decode_plain(query, k_cache, v_cache, cache_seqlens, block_table, scale, causal)
        except (RuntimeError, TypeError):
            pass

    _check(query, k_cache, v_cache, cache_seqlens, scale, softcap)
    if (_is_grad_enabled() or forward_ad._current_level >= 0) and is_differentiated(
            (query, k_cache, v_cache, k_new, v_new, sinks, alibi_slopes, rope_cos, rope_sin, k_scale, v_scale, out)):
        raise RuntimeError("decode_attention is inference-only, but an input requires grad: call it under "
                           "torch.no_grad(), or use scaled_dot_product_attention or varlen_attn, which have gradients")
    splits = 0 if num_splits is None else check_splits(num_splits)
    bounded = causal and tree_mask is None
    left, right = (-1, 0 if bounded else -1) if window is None else sdpa.window_sides(window, bounded)
    if _is_any_autocast_enabled():
        query, k_new, v_new, sinks, alibi_slopes = _autocast(k_cache, query, k_new, v_new, sinks, alibi_slopes)
    compiling = is_dynamo_compiling()
    if k_new is None and v_new is None and rope_cos is None and rope_sin is None and out is None:
        result, lse = (ops.decode if compiling else _decode)(
            query, k_cache, v_cache, cache_seqlens, block_table, k_scale, v_scale, tree_mask, sinks, alibi_slopes,
            scale, softcap, left, right, splits)
    else:
        result, lse = (ops.decode_append_ if compiling else _decode_append)(
            query, k_cache, v_cache, cache_seqlens, k_new, v_new, block_table, k_scale, v_scale, rope_cos, rope_sin,
            rope_interleaved, tree_mask, sinks, alibi_slopes, out, scale, softcap, left, right, splits)
        if out is not None:
            result = out
        if not compiling:
            mark_written(k_cache, v_cache, k_scale, v_scale, out)
    return (result, lse) if return_lse else result


def mark_written(*tensors):
    """Tells autograd that these have changed: an op outside of torch does not."""
    torch.autograd.graph.increment_version([x for x in tensors if x is not None])


def _check(query, k_cache, v_cache, cache_seqlens, scale, softcap):
    if not (isinstance(query, Tensor) and isinstance(k_cache, Tensor) and isinstance(v_cache, Tensor)
            and isinstance(cache_seqlens, Tensor)):
        for name, x in (("query", query), ("k_cache", k_cache), ("v_cache", v_cache), ("cache_seqlens", cache_seqlens)):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    sdpa.check_scalars(0.0, scale, softcap)


def _autocast(cache, query, k_new, v_new, sinks, alibi_slopes):
    if not torch.is_autocast_enabled(query.device.type):
        return query, k_new, v_new, sinks, alibi_slopes
    quantised = cache.dtype in (torch.int8, torch.float8_e4m3fn)
    dtype = torch.get_autocast_dtype(query.device.type) if quantised else cache.dtype

    def cast(x, *exempt):
        return x if x is None or not x.is_floating_point() or x.dtype in exempt else x.to(dtype)

    query, k_new, v_new = cast(query), cast(k_new), cast(v_new)
    return query, k_new, v_new, cast(sinks, torch.float32), cast(alibi_slopes, torch.float32)
