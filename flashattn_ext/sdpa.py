"""The drop-in for torch.nn.functional.scaled_dot_product_attention: any call becomes one call of the op `forward`.

The op takes 4-D tensors, one mask, one window and a seed; everything a user may leave out, broadcast or abbreviate is
settled here. What tensors may hold and how sizes must fit together is checked, and worded, in csrc/plan/validate.c.
"""

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from . import graph, ops
from .autograd import attention

__all__ = ["scaled_dot_product_attention", "set_deterministic"]

# The bare builtin below the OpOverload: it dispatches the same, and a tiny call is a tenth faster.
_forward_plain = ops.forward_plain._op
_NO_OPTIONS = (None,) * 6
# Beyond any sequence: a side of sys.maxsize, say, is as good as unbounded, and the core adds positions to it in int64.
_FAR = 2**62

_fp32_precision = torch._C._get_fp32_precision_getter
_is_grad_enabled = torch.is_grad_enabled
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_transforms_active = torch._C._are_functorch_transforms_active


def scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None,
                                 enable_gqa=False, window=None, softcap=0.0, sinks=None, alibi_slopes=None,
                                 q_seqlens=None, kv_seqlens=None, return_lse=False):
    """softmax(softcap(scale * Q K^T) + bias) V, as torch.nn.functional.scaled_dot_product_attention defines it, fused.

    No (SQ, SK) array is stored, forward or backward. Rows that see no key give 0 and no gradient. float32, bfloat16,
    float16 and float64 on the CPU; D and DV from 1 to 512. Differentiable once, in query, key, value, a float
    attn_mask and sinks; reproducible bit for bit.

    Args:
        query: (..., HQ, SQ, D), key: (..., HK, SK, D), value: (..., HV, SK, DV); any strides. 2-D tensors have no
            heads. Batch dimensions broadcast. More than one of them are merged: that is a view, except where a tensor
            is broadcast over a part of them, which copies it.
        attn_mask: broadcastable to (..., HQ, SQ, SK), at least 2-D. bool: True = attend. float32 or query's dtype:
            added to the scaled scores, and differentiable. Read through its strides, never expanded, unless several
            batch dimensions are merged and it is broadcast over a part of them. Or a CausalBias of
            torch.nn.attention.bias.
        dropout_p: probability in [0, 1] of dropping a weight, in steps of 2^-16 (what lies between 0 and 1 becomes
            neither of them); the seed comes from torch's default CPU generator.
        is_causal: query i sees keys 0..i, the top-left alignment. Not together with attn_mask.
        scale: factor of Q K^T, finite; None = 1 / sqrt(D).
        enable_gqa: lets HK and HV be divisors of HQ: query head h reads head h // (HQ / HK). Where HK != HV, both are
            copied out to their least common multiple.
        window: (left, right) in keys: query i sees keys i - left .. i + right; None or -1 = unbounded on that side.
            Counted from the diagonal in force: top-left, or bottom-right under a lower-right CausalBias. Joins
            is_causal.
        softcap: s -> softcap * tanh(s / softcap) after the scale and before bias and mask; 0 = off.
        sinks: (HQ,) or (..., HQ), float32 or query's dtype: logits that join the denominator only.
        alibi_slopes: (HQ,) or (..., HQ), float32 or query's dtype: adds -slope * |i + offset - j|; no gradient.
        q_seqlens, kv_seqlens: int32 or int64 of the batch dimensions. Rows at and past q_seqlens give 0, log-sum-exp
            -inf and no gradient; keys at and past kv_seqlens are never read. A lower-right CausalBias aligns the ends
            of the lengths.
        return_lse: also return the log-sum-exp of each row's scores, in nats.

    Returns:
        out (..., HQ, SQ, DV), query's dtype, laid out in memory in the order of query's strides; with return_lse a pair
        (out, lse), lse (..., HQ, SQ) in float32 (float64 for float64 inputs), differentiable too.

    Under autocast, floating query, key and value become the autocast dtype; a float32 mask stays as it is.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together; attn_mask together with is_causal.
        ValueError: dropout_p, scale, softcap or window out of range; a CausalBias together with is_causal.
        TypeError: query, key or value is no tensor.

    Source: Dao et al., "FlashAttention", 2022, and Dao, "FlashAttention-2", 2023.
    """
    # The short way, for calls that need nothing of what normalise settles: its cost is a large part of a tiny call.
    # What the op refuses goes the long way after all, which settles it or refuses it in the words of this function.
    if (attn_mask is None and window is None and sinks is None and alibi_slopes is None and q_seqlens is None
            and kv_seqlens is None and not dropout_p and not softcap and not return_lse
            and not is_dynamo_compiling() and type(query) is type(key) is type(value) is Tensor
            and not _is_any_autocast_enabled() and not _transforms_active() and forward_ad._current_level < 0):
        try:
            tf32 = query.dtype is torch.float32 and allows_tf32(query)  # its own first test: mostly it is not called
            if not (_is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)):
                return _forward_plain(query, key, value, scale, is_causal, enable_gqa, tf32)
            if enable_gqa or query.shape[1] == key.shape[1]:
                return attention(query, key, value, *_NO_OPTIONS, scale, 0.0, -1, 0 if is_causal else -1, False, 0.0,
                                 tf32)[0]
        except (RuntimeError, IndexError):
            pass

    return _the_long_way(return_lse, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window,
                         softcap, sinks, alibi_slopes, q_seqlens, kv_seqlens)


def _the_long_way(return_lse, *call):
    state = None
    if is_dynamo_compiling():
        graph.mark()
    elif call[4] > 0:  # dropout_p
        state = torch.get_rng_state()
    args, batch, has_heads = normalise(*call)
    try:
        out, lse = attention(*args)
    except RuntimeError:
        if state is not None:  # a refused call leaves the generator as it was
            torch.set_rng_state(state)
        raise
    if len(batch) != 1:
        out, lse = out.reshape(*batch, *out.shape[1:]), lse.reshape(*batch, *lse.shape[1:])
    if not has_heads:
        out, lse = out.squeeze(-3), lse.squeeze(-2)
    return (out, lse) if return_lse else out


def set_deterministic(mode=True):
    """Results, gradients included, are bitwise reproducible for any number of threads, whatever `mode` (bool) says.

    There is no faster way that is not, so False is accepted and changes nothing. TypeError for anything but a bool.
    """
    if not isinstance(mode, bool):
        raise TypeError(f"mode must be True or False, got {mode!r}")


def normalise(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, softcap, sinks,
              alibi_slopes, q_seqlens, kv_seqlens, device_type=None):
    """The op's 16 arguments for a call; the batch dimensions that its results have instead of B; do they have heads?

    device_type: whose autocast is in force, where it is not that of query.
    """
    check_tensors(query, key, value)
    check_scalars(dropout_p, scale, softcap)
    attn_mask, is_causal, bottom_right = _diagonal(attn_mask, is_causal, query, key)
    left, right = window_sides(window, is_causal)

    query, key, value, attn_mask, sinks, alibi_slopes = autocast(
        device_type or query.device.type, query, key, value, attn_mask, sinks, alibi_slopes)
    has_heads = max(query.dim(), key.dim(), value.dim()) > 2
    query, key, value = _with_heads(query), _with_heads(key), _with_heads(value)
    key, value = _match_heads(query.shape[-3], key, value, enable_gqa)
    batch = _batch_of(query, key, value)
    query, key, value = _merge(query, batch, 3), _merge(key, batch, 3), _merge(value, batch, 3)

    attn_mask = _mask(attn_mask, batch, has_heads, query, key)
    sinks = _per_head(sinks, "sinks", batch)
    alibi_slopes = _per_head(alibi_slopes, "alibi_slopes", batch)
    q_seqlens = _lengths(q_seqlens, "q_seqlens", batch)
    kv_seqlens = _lengths(kv_seqlens, "kv_seqlens", batch)
    seed = draw_seed() if dropout_p > 0 else None
    args = (query, key, value, attn_mask, sinks, alibi_slopes, q_seqlens, kv_seqlens, seed, scale, float(softcap), left,
            right, bottom_right, float(dropout_p), allows_tf32(query))
    return args, batch, has_heads


def allows_tf32(query):
    """May float32 be rounded to TF32 in products? On a GPU, torch.set_float32_matmul_precision says so."""
    return query.dtype is torch.float32 and query.is_cuda and _gpu_rounds_to_tf32()


def _gpu_rounds_to_tf32():
    # torch.backends.cuda.matmul.fp32_precision, in a sixth of its time
    return _fp32_precision("cuda", "matmul") == "tf32"


# In a compiled graph: what was set when it was compiled.
_gpu_rounds_to_tf32._dynamo_marked_constant = True


def draw_seed():
    """A tensor, not a number, so that a compiled graph draws anew in each run and checkpointing replays it."""
    return torch.randint(-2**63, 2**63 - 1, (1,), dtype=torch.int64, device="cpu")


# ---- arguments that are no tensors ----------------------------------------------------------------------------------


def check_scalars(dropout_p, scale, softcap):
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be in [0, 1], got {dropout_p}")
    if scale is not None and not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be a finite number or None, got {scale}")
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"softcap must be finite and not negative (0 = off), got {softcap}")


def _diagonal(attn_mask, is_causal, query, key):
    """(attn_mask, is_causal, bottom_right) with a CausalBias resolved into the latter two."""
    if attn_mask is None:
        return None, is_causal, False
    if type(attn_mask) is not Tensor:
        # Not at the top: this import loads torch's compiler. A CausalBias must not meet a torch function before this.
        from torch.nn.attention.bias import CausalBias, CausalVariant
        if isinstance(attn_mask, CausalBias):
            if is_causal:
                raise ValueError("is_causal must be False when attn_mask is a CausalBias, got is_causal=True")
            own, full = (attn_mask.seq_len_q, attn_mask.seq_len_kv), (query.shape[-2], key.shape[-2])
            if own != full:
                raise RuntimeError(f"attn_mask is a CausalBias for {own[0]} queries and {own[1]} keys, but query and "
                                   f"key have {full[0]} and {full[1]}")
            return None, True, attn_mask.variant == CausalVariant.LOWER_RIGHT
    if is_causal:
        raise RuntimeError("attn_mask and is_causal=True exclude each other: pass one of them, or a CausalBias as "
                           "attn_mask")
    return attn_mask, False, False


def window_sides(window, is_causal, name="window"):
    """(left, right) with -1 = unbounded; causal is a right side of 0."""
    left = right = -1
    if window is not None:
        try:
            left, right = (-1 if side is None else side for side in window)
        except (TypeError, ValueError):
            left = None
        if not all(isinstance(side, (int, torch.SymInt)) and side >= -1 for side in (left, right)):
            raise ValueError(f"{name} must be None or (left, right), each None or an integer of at least -1, "
                             f"got {window}")
    return min(left, _FAR), 0 if is_causal else min(right, _FAR)


# ---- tensors --------------------------------------------------------------------------------------------------------


def check_tensors(query, key, value):
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise RuntimeError("query, key and value must have at least 2 dimensions, "
                           f"got {query.dim()}, {key.dim()} and {value.dim()}")


def autocast(device_type, query, key, value, attn_mask, sinks, alibi_slopes):
    """The tensors in the dtypes that autocast gives them; it leaves float64 as it is."""
    if device_type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device_type):
        return query, key, value, attn_mask, sinks, alibi_slopes

    def cast(x, dtype, *exempt):
        return x if x is None or not x.is_floating_point() or x.dtype in exempt else x.to(dtype)

    dtype = torch.get_autocast_dtype(device_type)
    query, key, value = (cast(x, dtype, torch.float64) for x in (query, key, value))
    # The kernels read these in float32 beside any query, so casting them would only lose digits.
    others = (cast(x, query.dtype, torch.float64, torch.float32) for x in (attn_mask, sinks, alibi_slopes))
    return query, key, value, *others


def _with_heads(x):
    return x.unsqueeze(0) if x.dim() == 2 else x


def _match_heads(heads, key, value, enable_gqa):
    """key and value with the same number of heads, a divisor of the query's."""
    key_heads, value_heads = key.shape[-3], value.shape[-3]
    if key_heads == value_heads == heads:
        return key, value
    if not enable_gqa:
        raise RuntimeError(f"query, key and value must have the same number of heads, got {heads}, {key_heads} and "
                           f"{value_heads}; enable_gqa=True allows key and value a divisor of the query's")
    if any(own == 0 or heads % own for own in (key_heads, value_heads)):
        raise RuntimeError("with enable_gqa=True the heads of key and value must each divide the query's, got "
                           f"{heads} of query, {key_heads} of key and {value_heads} of value")
    if key_heads != value_heads:
        common = math.lcm(key_heads, value_heads)
        key, value = (x.repeat_interleave(common // x.shape[-3], dim=-3) for x in (key, value))
    return key, value


def _batch_of(query, key, value):
    q, k, v = query.shape[:-3], key.shape[:-3], value.shape[:-3]
    if q == k == v:
        return q
    try:
        return torch.broadcast_shapes(q, k, v)
    except RuntimeError:
        raise RuntimeError("the batch dimensions of query, key and value must broadcast, got shapes "
                           f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}") from None


def _merge(x, batch, inner):
    """(*batch or broadcastable to it, ...) -> (B, ...) where the dimensions behind the batch are `inner` many."""
    if len(batch) == 1 and x.dim() == inner + 1 and x.shape[0] == batch[0]:
        return x
    rest = x.shape[x.dim() - inner:]
    return x.expand((*batch, *rest)).reshape(math.prod(batch), *rest)


def _mask(mask, batch, has_heads, query, key):
    """The mask as 4-D, each size full or 1 against (B, HQ, SQ, SK)."""
    if mask is None or len(batch) == 1 and mask.dim() == 4:  # whose sizes the core checks
        return mask
    full = (*batch, query.shape[1], query.shape[2], key.shape[2]) if has_heads else (query.shape[2], key.shape[2])
    if not 2 <= mask.dim() <= len(full) or any(
            own != 1 and own != size for own, size in zip(reversed(mask.shape), reversed(full))):
        raise RuntimeError("attn_mask must have at least 2 dimensions and broadcast to (..., HQ, SQ, SK) = "
                           f"{full}, got {tuple(mask.shape)}")
    if math.prod(mask.shape[:-3]) == 1:
        return mask.reshape((1, 1, *mask.shape)[-4:])
    return _merge(mask, batch, 3)


def _per_head(x, name, batch):
    """(HQ,) as it is, (..., HQ) as (B, HQ)."""
    if x is None or x.dim() == 1:
        return x
    if not _broadcasts(x.shape[:-1], batch):
        raise RuntimeError(f"{name} must have the shape (HQ,) or (..., HQ) with the batch dimensions {tuple(batch)}, "
                           f"got {tuple(x.shape)}")
    return _merge(x, batch, 1)


def _lengths(x, name, batch):
    if x is None:
        return None
    if not _broadcasts(x.shape, batch):
        raise RuntimeError(f"{name} must have the shape of the batch dimensions, {tuple(batch)}, got {tuple(x.shape)}")
    return _merge(x, batch, 0)


def _broadcasts(own, batch):
    return len(own) == len(batch) and all(a == 1 or a == b for a, b in zip(own, batch))
