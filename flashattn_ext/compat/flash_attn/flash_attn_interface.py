"""The seven functions of flash_attn.flash_attn_interface, as calls of this package's own.

Arguments that all of them share:

    dropout_p: probability in [0, 1] of dropping a weight; the seed comes from torch's default CPU generator.
    softmax_scale: factor of Q K^T; None = 1 / sqrt(D).
    causal: query i sees keys up to i + SK - SQ (the last query sees the last key); rows that see no key give 0.
    window_size: (left, right) keys around that same diagonal; a negative side is unbounded; causal sets right to 0.
    softcap: s -> softcap * tanh(s / softcap); not above 0 = off.
    alibi_slopes: (HQ,) or (B, HQ), float32 or query's dtype: adds -slope * |i + SK - SQ - j|; no gradient.
    deterministic: accepted; gradients are bit-reproducible either way.
    return_attn_probs: returns (out, softmax_lse, S_dmask). S_dmask is empty without dropout; with it, (B, HQ, SQ, SK):
        the softmax in query's dtype, negative where dropout took a weight. For tests: it is the matrix that attention
        otherwise never stores, from the float64 reference.

HQ must be a multiple of the heads of k and v. Errors are those of the functions that do the work:
scaled_dot_product_attention, varlen_attn and decode_attention.
"""

import torch
from torch import Tensor

from ... import reference
from ...decode import decode_attention
from ...sdpa import scaled_dot_product_attention
from ...varlen import packed_attention

__all__ = ["flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func", "flash_attn_varlen_func",
           "flash_attn_varlen_kvpacked_func", "flash_attn_varlen_qkvpacked_func", "flash_attn_with_kvcache"]


# ---- sequences of one length ----------------------------------------------------------------------------------------


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                    alibi_slopes=None, deterministic=False, return_attn_probs=False):
    """q (B, SQ, HQ, D), k (B, SK, HK, D), v (B, SK, HK, DV) -> out (B, SQ, HQ, DV), or with return_attn_probs also
    softmax_lse (B, HQ, SQ) float32 and S_dmask."""
    _has_dimensions(4, q=q, k=k, v=v)
    options = _Options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    if not return_attn_probs:
        return _aligned(q, k, v, options, False)
    state = torch.get_rng_state()
    out, lse = _aligned(q, k, v, options, True)
    if not dropout_p:
        return out, lse, q.new_empty(0)
    lengths = [(q.shape[1], k.shape[1])] * q.shape[0]
    return out, lse, _dropped_weights(q.unbind(), k.unbind(), lengths, options, state)


def flash_attn_kvpacked_func(q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                             alibi_slopes=None, deterministic=False, return_attn_probs=False):
    """flash_attn_func of q (B, SQ, HQ, D) and kv (B, SK, 2, HK, D)."""
    k, v = _parts("kv", kv, 5, 2)
    return flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
                           return_attn_probs)


def flash_attn_qkvpacked_func(qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                              alibi_slopes=None, deterministic=False, return_attn_probs=False):
    """flash_attn_func of qkv (B, S, 3, H, D)."""
    q, k, v = _parts("qkv", qkv, 5, 3)
    return flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
                           return_attn_probs)


# ---- packed sequences -----------------------------------------------------------------------------------------------


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                           deterministic=False, return_attn_probs=False, block_table=None):
    """B sequences behind one another: sequence b is rows cu_seqlens[b] .. cu_seqlens[b + 1] - 1.

    q (TQ, HQ, D), k (TK, HK, D), v (TK, HK, DV), or with block_table (B, pages of a sequence) int32 k and v as (pages,
    page size, HK, D), where cu_seqlens_k says only the lengths; then there is no gradient. cu_seqlens_q and
    cu_seqlens_k (B + 1,) int32; max_seqlen_q and max_seqlen_k at least the longest lengths.

    Returns out (TQ, HQ, DV), or with return_attn_probs also softmax_lse (HQ, TQ) float32 and S_dmask (B, HQ,
    max_seqlen_q, max_seqlen_k).
    """
    options = _Options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    if dropout_p and block_table is not None:
        raise RuntimeError(f"dropout_p must be 0 with block_table, got {dropout_p}")
    used = None
    if block_table is not None:
        used, cu_seqlens_k = cu_seqlens_k.diff(), None
    state = torch.get_rng_state() if return_attn_probs else None
    out, lse = packed_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k=used,
                                block_table=block_table, **options.packed())
    if not return_attn_probs:
        return out
    if not dropout_p:
        return out, lse, q.new_empty(0)
    lengths = [cu.diff().tolist() for cu in (cu_seqlens_q, cu_seqlens_k)]
    rows = (x[:int(cu[-1])].split(own) for x, cu, own in zip((q, k), (cu_seqlens_q, cu_seqlens_k), lengths))
    sizes = (max_seqlen_q, max_seqlen_k)
    return out, lse, _dropped_weights(*rows, list(zip(*lengths)), options, state, sizes)


def flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                                    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                                    alibi_slopes=None, deterministic=False, return_attn_probs=False):
    """flash_attn_varlen_func of q (TQ, HQ, D) and kv (TK, 2, HK, D)."""
    k, v = _parts("kv", kv, 4, 2)
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
                                  softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
                                  return_attn_probs)


def flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False,
                                     window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
                                     return_attn_probs=False):
    """flash_attn_varlen_func of qkv (T, 3, H, D)."""
    q, k, v = _parts("qkv", qkv, 4, 3)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale,
                                  causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)


# ---- a step of generation -------------------------------------------------------------------------------------------


def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
                            cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None,
                            causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True,
                            alibi_slopes=None, num_splits=0, return_softmax_lse=False):
    """Attention over a cache of keys and values, to which k and v are added first, in place.

    Args:
        q: (B, SQ, HQ, D).
        k_cache, v_cache: (B, S, HK, D), with cache_batch_idx any number of rows of which it names B, or with
            block_table (pages, page size, HK, D), pages of any size.
        k, v: (B, S_new, HK, D), written behind cache_seqlens; both or neither.
        rotary_cos, rotary_sin: (positions, R / 2), R <= D: new keys turn by their position in the cache, queries too
            if the call is causal or has a window; otherwise all of them by cache_seqlens. Only with k.
        cache_seqlens: int or (B,) int32: tokens in the cache before the call, padding included; None, which only a
            call without k may say: the cache is full.
        cache_batch_idx: (B,) int32: the row of the cache for each sequence; not together with block_table.
        cache_leftpad: (B,) int32: where each sequence starts in its row of the cache, what is before is never read;
            not together with block_table. Costs a table of an int32 for each token of the cache, and the cache's
            first two dimensions must be mergeable without a copy.
        block_table: (B, pages of a sequence) int32.
        rotary_interleaved: pairs are (0, 1), (2, 3), ...; otherwise (0, R / 2), (1, R / 2 + 1), ...
        num_splits: parts into which the keys are cut; 0 = chosen by the plan.
        The rest as in all functions of this file.

    Returns out (B, SQ, HQ, DV), with return_softmax_lse also softmax_lse (B, HQ, SQ) float32. There is no gradient.
    """
    _check_cache_arguments(k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad, block_table)
    _has_dimensions(4, q=q, k_cache=k_cache, v_cache=v_cache)
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if not isinstance(cache_seqlens, Tensor):
        tokens = capacity if cache_seqlens is None else cache_seqlens
        cache_seqlens = torch.full((q.shape[0],), tokens, dtype=torch.int32, device=q.device)
    _check_places(cache_batch_idx, cache_leftpad, cache_seqlens, k_cache, q.shape[0], 0 if k is None else k.shape[1])
    # A side that reaches over the whole cache is no window, which matters for how queries turn.
    window_size = tuple(-1 if side >= capacity else side for side in window_size)
    left, right = _window(window_size, causal)

    rope = {}
    if rotary_cos is not None:
        local = causal or left >= 0 or right >= 0
        if cache_leftpad is None and (local or q.shape[1] == 1):
            rope = dict(rope_cos=rotary_cos, rope_sin=rotary_sin, rope_interleaved=rotary_interleaved)
        else:
            at = cache_seqlens.long()[:, None]
            steps = torch.arange(max(q.shape[1], k.shape[1]), device=q.device)
            turn = (rotary_cos, rotary_sin, rotary_interleaved)
            q = _turned(q, at + (steps[:q.shape[1]] if local else 0), *turn)
            k = _turned(k, at + steps[:k.shape[1]], *turn)

    if cache_leftpad is not None:
        k_cache, v_cache, block_table = _token_pages(k_cache, v_cache, cache_batch_idx, cache_leftpad, q.shape[0])
        cache_seqlens = cache_seqlens - cache_leftpad
    elif cache_batch_idx is not None:  # a row of the cache is a page as long as the cache
        block_table = cache_batch_idx[:, None]
    return decode_attention(q, k_cache, v_cache, cache_seqlens, k_new=k, v_new=v, block_table=block_table,
                            scale=softmax_scale, causal=causal, window=(left, right), softcap=max(softcap, 0.0),
                            alibi_slopes=alibi_slopes, num_splits=num_splits or None, return_lse=return_softmax_lse,
                            **rope)


def _check_cache_arguments(k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad, block_table):
    def given(**arguments):
        return [name for name, x in arguments.items() if x is not None]

    if len(given(k=k, v=v)) == 1:
        raise RuntimeError(f"k and v must be given together, got only {given(k=k, v=v)[0]}")
    if len(given(cos=rotary_cos, sin=rotary_sin)) == 1:
        raise RuntimeError("rotary_cos and rotary_sin must be given together, got only "
                           f"rotary_{given(cos=rotary_cos, sin=rotary_sin)[0]}")
    if k is None and rotary_cos is not None:
        raise RuntimeError("rotary_cos and rotary_sin turn new keys: they need k and v, got k=None")
    if k is not None and cache_seqlens is None:
        raise RuntimeError("k and v are written behind cache_seqlens: it must be an int or (B,) int32, got None")
    if block_table is not None and given(cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad):
        names = " and ".join(given(cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad))
        raise RuntimeError(f"block_table says where a sequence lies in the cache: it must be None with {names}")


def _check_places(rows, leftpad, lengths, k_cache, batch, new):
    """Refuses what decode_attention would refuse in terms of the block table that stands for rows and leftpad. Their
    values are looked at on the CPU only: elsewhere that would wait for the device."""
    if rows is None and leftpad is None:
        return
    for name, x in (("cache_batch_idx", rows), ("cache_leftpad", leftpad), ("cache_seqlens", lengths)):
        if x is not None and x.shape != (batch,):
            raise RuntimeError(f"{name} must be ({batch},), one number for each sequence, got {tuple(x.shape)}")
    if k_cache.device.type != "cpu":
        return
    number, capacity = k_cache.shape[:2]
    for b, length in enumerate(lengths.tolist()):
        if rows is not None and not 0 <= rows[b] < number:
            raise RuntimeError(f"cache_batch_idx[{b}] must be between 0 and {number - 1}, the last row of the cache, "
                               f"got {int(rows[b])}")
        if not 0 <= length <= capacity - new:
            raise RuntimeError(f"cache_seqlens[{b}] must be between 0 and {capacity - new}, the capacity of the cache "
                               f"({capacity}) less the tokens of k ({new}), got {length}")
        if leftpad is not None and not 0 <= leftpad[b] <= length:
            raise RuntimeError(f"cache_leftpad[{b}] must be between 0 and {length}, cache_seqlens[{b}], got "
                               f"{int(leftpad[b])}")


def _token_pages(k_cache, v_cache, rows, leftpad, batch):
    """The caches as pages of one token, and the table (B, S) of those from leftpad on; -1, which no call may use, for
    what would lie behind the end of a row."""
    number, capacity = k_cache.shape[:2]
    try:
        pages = [x.view(number * capacity, 1, *x.shape[2:]) for x in (k_cache, v_cache)]
    except RuntimeError:
        raise RuntimeError("with cache_leftpad the first two dimensions of k_cache and v_cache must be mergeable "
                           f"without a copy, got strides {k_cache.stride()} and {v_cache.stride()}") from None
    device = k_cache.device
    rows = torch.arange(batch, device=device) if rows is None else rows.long()
    at = leftpad.long()[:, None] + torch.arange(capacity, device=device)
    inside = (at >= 0) & (at < capacity) & (rows >= 0)[:, None] & (rows < number)[:, None]
    return (*pages, torch.where(inside, rows[:, None] * capacity + at, -1).to(torch.int32))


def _turned(x, positions, cos, sin, interleaved):
    """Rotary embedding of x (B, S, H, D) at positions (B, S or 1), in float32 or better; R = 2 * cos.shape[1]."""
    half = cos.shape[1]
    if 2 * half > x.shape[-1] or cos.shape != sin.shape:
        raise RuntimeError("rotary_cos and rotary_sin must be (positions, R / 2) with R at most the head dimension "
                           f"{x.shape[-1]}, got {tuple(cos.shape)} and {tuple(sin.shape)}")
    if x.device.type == "cpu" and positions.numel() and not 0 <= positions.min() <= positions.max() < len(cos):
        raise RuntimeError(f"rotary_cos has {len(cos)} positions: tokens must be turned by 0 to {len(cos) - 1}, got "
                           f"{int(positions.min())} to {int(positions.max())}")
    exact = torch.promote_types(x.dtype, torch.float32)
    c, s = (table[positions].to(exact).unsqueeze(2) for table in (cos, sin))
    turning = x[..., :2 * half].to(exact)
    pairs = turning.unflatten(-1, (half, 2)) if interleaved else turning.unflatten(-1, (2, half)).transpose(-1, -2)
    a, b = pairs.unbind(-1)
    pairs = torch.stack([a * c - b * s, b * c + a * s], -1 if interleaved else -2)
    return torch.cat([pairs.flatten(-2).to(x.dtype), x[..., 2 * half:]], -1)


# ---- what they share ------------------------------------------------------------------------------------------------


class _Options:
    """The options of a call in this package's terms."""

    def __init__(self, dropout_p, scale, causal, window_size, softcap, alibi_slopes):
        self.dropout_p, self.scale, self.causal, self.alibi_slopes = dropout_p, scale, causal, alibi_slopes
        self.window = _window(window_size, causal)
        self.softcap = max(softcap, 0.0)

    def packed(self):
        return dict(window_size=self.window, scale=self.scale, enable_gqa=True, softcap=self.softcap,
                    alibi_slopes=self.alibi_slopes, dropout_p=self.dropout_p)


def _window(window_size, causal):
    """(left, right) with -1 = unbounded."""
    left, right = (max(side, -1) for side in window_size)
    return left, 0 if causal else right


def _aligned(q, k, v, options, return_lse):
    """out (B, SQ, HQ, DV), or with return_lse also lse (B, HQ, SQ); the diagonal ends at the last query and key."""
    queries, keys = q.shape[1], k.shape[1]
    left, right = options.window
    mask = None
    if queries != keys and (options.window != (-1, -1) or options.alibi_slopes is not None):
        if right != 0 or queries > keys:  # where making a CausalBias warns
            return _as_packed(q, k, v, options, return_lse)
        from torch.nn.attention.bias import CausalBias, CausalVariant  # not at the top: it loads torch's compiler
        mask = CausalBias(CausalVariant.LOWER_RIGHT, queries, keys)
    result = scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), mask, options.dropout_p, mask is None and right == 0,
        scale=options.scale, enable_gqa=True, window=None if left < 0 and right <= 0 else options.window,
        softcap=options.softcap, alibi_slopes=options.alibi_slopes, return_lse=return_lse)
    return (result[0].transpose(1, 2), result[1]) if return_lse else result.transpose(1, 2)


def _as_packed(q, k, v, options, return_lse):
    """The same where neither causal nor the sizes settle the alignment, which packed sequences have by definition."""
    batch, queries, keys = *q.shape[:2], k.shape[1]
    cu_q, cu_k = (torch.arange(batch + 1, dtype=torch.int32, device=q.device) * size for size in (queries, keys))
    out, lse = packed_attention(*(x.flatten(0, 1) for x in (q, k, v)), cu_q, cu_k, queries, keys, **options.packed())
    out = out.unflatten(0, (batch, queries))
    return (out, lse.unflatten(1, (batch, queries)).transpose(0, 1)) if return_lse else out


def _dropped_weights(queries, keys, lengths, options, state, sizes=None):
    """S_dmask (B, HQ, SQ, SK) of sequences (length, H, D); state: of the generator before the call drew its seed."""
    rows, columns = sizes or lengths[0]
    heads, dtype = queries[0].shape[1], queries[0].dtype
    seed = torch.randint(-2**63, 2**63 - 1, (1,), dtype=torch.int64, generator=torch.Generator().set_state(state))
    kept = reference.dropout_keep(int(seed), options.dropout_p, len(lengths) * heads, rows, columns)
    kept = kept.view(len(lengths), heads, rows, columns).to(queries[0].device)
    found = torch.zeros(kept.shape, dtype=dtype, device=kept.device)
    for b, ((own_rows, own_columns), q, k) in enumerate(zip(lengths, queries, keys)):
        slopes = options.alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b]
        identity = torch.eye(own_columns, device=kept.device).expand(k.shape[1], -1, -1)
        found[b, :, :own_rows, :own_columns] = reference.attention(
            q.detach().transpose(0, 1), k.detach().transpose(0, 1), identity, scale=options.scale, enable_gqa=True,
            window=options.window, softcap=options.softcap, alibi_slopes=slopes, bottom_right=True)
    return torch.where(kept, found, -found)


def _parts(name, packed, dimensions, count):
    """The tensors that lie behind one another in the third dimension from the end."""
    _has_dimensions(dimensions, **{name: packed})
    if packed.shape[-3] != count:
        shape = ("B, S" if dimensions == 5 else "T") + f", {count}, H, D"
        raise RuntimeError(f"{name} must be ({shape}), got {tuple(packed.shape)}")
    return packed.unbind(-3)


def _has_dimensions(count, **tensors):
    for name, x in tensors.items():
        if x.dim() != count:
            raise RuntimeError(f"{name} must have {count} dimensions, got {x.dim()}: {tuple(x.shape)}")
