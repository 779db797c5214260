"""The definition of attention in this package: eager float64 torch, slow, and readable from top to bottom.

Every fused kernel is tested against this file. It stores the whole (SQ, SK) matrix of weights, torch's autograd
differentiates it as often as wanted (also forward mode), and it works on any device that has float64.
"""

import math

import torch

__all__ = ["attention"]


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False,
              window=None, softcap=0.0, sinks=None, alibi_slopes=None, q_seqlens=None, kv_seqlens=None,
              return_lse=False, bottom_right=False, dropout_seed=None):
    """Attention with every option of `flashattn_ext.scaled_dot_product_attention`, computed in float64.

        S = softcap(scale * Q K^T) + bias + alibi,   O = dropout(softmax(S over the visible keys)) V

    Arguments are those of `scaled_dot_product_attention`, with the same shapes and meaning, and two more:

    bottom_right: align the diagonal of causal, window and ALiBi with the last query and the last key, as a lower-right
        `CausalBias` does (which also switches causal on).
    dropout_seed: int, or int64 tensor of one element. None draws it as the fused call does, so that both drop the same
        weights after the same `torch.manual_seed`.

    Returns out (..., HQ, SQ, DV), and with return_lse also the log-sum-exp (..., HQ, SQ) in nats; both are float64,
    whatever the inputs. Gradients arrive in the dtypes of the inputs.

    A row that sees no key gives 0, log-sum-exp -inf (or the sink) and no gradient. What a hidden key holds, NaN
    included, reaches neither the other keys' results nor their gradients.

    Raises RuntimeError for attn_mask together with is_causal and for head counts that do not fit, ValueError for
    dropout_p outside [0, 1] and a CausalBias together with is_causal. Sizes that do not fit raise as torch words it.
    """
    attn_mask, is_causal, bottom_right = _diagonal(attn_mask, is_causal, bottom_right)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be in [0, 1], got {dropout_p}")

    no_heads = max(query.dim(), key.dim(), value.dim()) == 2
    q, k, v = (x.double().unsqueeze(0) if x.dim() == 2 else x.double() for x in (query, key, value))
    heads, queries, keys = q.shape[-3], q.shape[-2], k.shape[-2]
    k, v = (_repeat_heads(x, heads, enable_gqa) for x in (k, v))
    batch = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    q, k, v = (x.expand(*batch, *x.shape[-3:]) for x in (q, k, v))

    visible, is_row, distance = _positions(queries, keys, is_causal, window, q_seqlens, kv_seqlens, bottom_right,
                                           q.device)
    visible = visible.expand(*batch, heads, queries, keys)

    scores = _products(q, k) * (1.0 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = visible & attn_mask
    elif attn_mask is not None:
        scores = scores + attn_mask.double()
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.double()[..., None, None] * distance
    scores = torch.where(visible, scores, -math.inf)

    # A sink is one more key whose value is 0: it adds to the denominator only.
    sink = torch.full((), -math.inf, dtype=q.dtype, device=q.device)
    if sinks is not None:
        sink = torch.where(is_row, sinks.double()[..., None, None], sink)
    weights, lse = _softmax(scores, sink.expand(*batch, heads, queries, 1))

    if dropout_p > 0.0:
        seed = _draw_seed() if dropout_seed is None else int(dropout_seed)
        kept = dropout_keep(seed, dropout_p, math.prod(batch) * heads, queries, keys).to(q.device).view(weights.shape)
        weights = torch.where(kept, weights / (1.0 - dropout_p), 0.0) if dropout_p < 1.0 else weights * 0.0
    out = _weighted_sum(weights, v, visible)
    if no_heads:
        out, lse = out.squeeze(-3), lse.squeeze(-2)
    return (out, lse) if return_lse else out


def _diagonal(attn_mask, is_causal, bottom_right):
    """(attn_mask, is_causal, bottom_right) with a CausalBias resolved into the latter two."""
    if attn_mask is None:
        return None, is_causal, bottom_right
    if type(attn_mask) is not torch.Tensor:
        from torch.nn.attention.bias import CausalBias, CausalVariant  # not at the top: it loads torch's compiler
        if isinstance(attn_mask, CausalBias):
            if is_causal:
                raise ValueError("is_causal must be False when attn_mask is a CausalBias, got is_causal=True")
            return None, True, bottom_right or attn_mask.variant == CausalVariant.LOWER_RIGHT
    if is_causal:
        raise RuntimeError("attn_mask and is_causal=True exclude each other: pass one of them, or a CausalBias as "
                           "attn_mask")
    return attn_mask, False, bottom_right


def _positions(queries, keys, is_causal, window, q_seqlens, kv_seqlens, bottom_right, device):
    """What follows from positions alone, each broadcastable to (*batch, H, SQ, SK): does query i see key j (bool), is
    i a row of its sequence (bool), and the distance |i + offset - j|."""
    i = torch.arange(queries, device=device).unsqueeze(-1)
    j = torch.arange(keys, device=device)
    q_len = queries if q_seqlens is None else q_seqlens.long()[..., None, None, None]
    k_len = keys if kv_seqlens is None else kv_seqlens.long()[..., None, None, None]
    ahead = j - i - (k_len - q_len if bottom_right else 0)
    left, right = (-1, -1) if window is None else (-1 if side is None else side for side in window)

    is_row = i < q_len
    visible = is_row & (j < k_len)
    if left >= 0:
        visible = visible & (ahead >= -left)
    if right >= 0:
        visible = visible & (ahead <= right)
    if is_causal:
        visible = visible & (ahead <= 0)
    return visible, is_row, ahead.abs()


def _repeat_heads(x, heads, enable_gqa):
    """(..., H, S, D) -> (..., heads, S, D): query head h reads head h // (heads / H)."""
    own = x.shape[-3]
    if own == heads:
        return x
    if not enable_gqa or own == 0 or heads % own:
        raise RuntimeError(f"key and value must have as many heads as query ({heads}), or with enable_gqa=True a "
                           f"divisor of it; got {own} with enable_gqa={enable_gqa}")
    return x.repeat_interleave(heads // own, dim=-3)


def _products(q, k):
    """Q K^T where a row of Q or K that is not finite touches its own products only, in the gradients too.

    The gradient of a matrix product multiplies every row of K, also those whose products are hidden, and 0 * NaN is
    NaN. So rows that are not finite are left out of the product, and their own products are set from outside.
    """
    q_finite, k_finite = (x.isfinite().all(-1, keepdim=True) for x in (q, k))
    finite = torch.where(q_finite, q, 0.0) @ torch.where(k_finite, k, 0.0).transpose(-1, -2)
    with torch.no_grad():
        plain = q @ k.transpose(-1, -2)
    return torch.where(q_finite & k_finite.transpose(-1, -2), finite, plain)


def _softmax(scores, sink):
    """Softmax over the last dimension of (scores, sink), without the sink's column, and the log-sum-exp of both."""
    joined = torch.cat([scores, sink], dim=-1)
    top = joined.amax(-1, keepdim=True).detach()
    top = torch.where(top == -math.inf, 0.0, top)
    powers = torch.exp(joined - top)
    total = powers.sum(-1, keepdim=True)
    empty = total == 0
    total = torch.where(empty, 1.0, total)  # keeps log and the division away from 0, in the gradients too
    lse = torch.where(empty, -math.inf, top + torch.log(total))
    return (powers / total)[..., :-1], lse.squeeze(-1)


def _weighted_sum(weights, v, visible):
    """weights @ v where an element of v that is not finite reaches the rows that see its key, and no other."""
    out = weights @ torch.where(v.isfinite(), v, 0.0)
    for wild, found in ((math.inf, v == math.inf), (-math.inf, v == -math.inf), (math.nan, v.isnan())):
        reached = visible.double() @ found.double() > 0
        out = out + torch.where(reached, wild, 0.0)
    return out


def _draw_seed():
    """The seed of one dropout call: every device takes it from torch's default CPU generator."""
    return int(torch.randint(-2**63, 2**63 - 1, (1,), dtype=torch.int64))


# ---- dropout: the same random numbers as csrc/common/fa_philox.h ----------------------------------------------------

_ROUNDS = 10
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def dropout_keep(seed, p, batch_heads, queries, keys):
    """Which weights dropout keeps: bool (batch_heads, SQ, SK) on the CPU; a function of (seed, b * HQ + h, i, j) only.

    Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): word j % 4 of the counter
    (j / 4, i, b * HQ + h, 0) under the key `seed`, kept when at least p * 2^32.
    """
    groups = (keys + 3) // 4
    shape = (batch_heads, queries, groups)
    c0 = torch.arange(groups).expand(shape)
    c1 = torch.arange(queries).view(-1, 1).expand(shape)
    c2 = (torch.arange(batch_heads) & _LOW).view(-1, 1, 1).expand(shape)
    c3 = torch.zeros(shape, dtype=torch.int64)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_ROUNDS):
        # int64 products wrap around modulo 2^64, which keeps the bits of the unsigned product
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> 32 & _LOW) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32 & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    words = torch.stack([c0, c1, c2, c3], dim=-1).view(batch_heads, queries, 4 * groups)[..., :keys]
    return words >= min(int(p * 2.0**32 + 0.5), _LOW)
