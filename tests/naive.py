"""Attention written out with its S x S matrix in plain torch: the tests' own formula, in any dtype.

It serves twice: in the precision of the inputs it is the eager attention whose error sets the bar (compare.py), and in
float64 it cross-checks flashattn_ext.reference (test_reference.py). It shares no line with the package.
"""

import math

import torch
from torch.nn.attention.bias import CausalBias, CausalVariant


def lengths(given, batch, full, device):
    """Per-sequence lengths as (B,) int64, the full length where none are given."""
    if given is None:
        return torch.full((batch,), full, dtype=torch.int64, device=device)
    return given.reshape(batch).to(device=device, dtype=torch.int64)


def visible(B, SQ, SK, *, attn_mask=None, is_causal=False, window=None, q_seqlens=None, kv_seqlens=None, device=None):
    """Which keys a query may see by position: bool (B, 1, SQ, SK), and j - (i + offset) as int64 of the same shape."""
    device = device or torch.get_default_device()
    lower_right = isinstance(attn_mask, CausalBias) and attn_mask.variant == CausalVariant.LOWER_RIGHT
    causal = is_causal or isinstance(attn_mask, CausalBias)
    q_len = lengths(q_seqlens, B, SQ, device)
    k_len = lengths(kv_seqlens, B, SK, device)
    offset = k_len - q_len if lower_right else torch.zeros_like(k_len)
    i = torch.arange(SQ, device=device)[None, :, None]
    j = torch.arange(SK, device=device)[None, None, :]
    distance = (j - (i + offset[:, None, None]))[:, None]
    see = ((i < q_len[:, None, None]) & (j < k_len[:, None, None]))[:, None].clone()
    left, right = (None, None) if window is None else window
    if causal:
        see &= distance <= 0
    if left is not None and left >= 0:
        see &= distance >= -left
    if right is not None and right >= 0:
        see &= distance <= right
    return see, distance


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False,
              window=None, softcap=0.0, sinks=None, alibi_slopes=None, q_seqlens=None, kv_seqlens=None, keep=None):
    """The drop-in's arguments on 4-D tensors; keep (B, HQ, SQ, SK) bool says which weights dropout keeps.

    Returns out (B, HQ, SQ, DV) in query's dtype and lse (B, HQ, SQ) in the precision of the scores."""
    B, HQ, SQ, D = query.shape
    SK = key.shape[2]
    key = key.repeat_interleave(HQ // key.shape[1], 1) if key.shape[1] != HQ else key
    value = value.repeat_interleave(HQ // value.shape[1], 1) if value.shape[1] != HQ else value
    see, distance = visible(B, SQ, SK, attn_mask=attn_mask, is_causal=is_causal, window=window, q_seqlens=q_seqlens,
                            kv_seqlens=kv_seqlens, device=query.device)
    scores = query @ key.transpose(-1, -2) * (1 / math.sqrt(D) if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        slopes = alibi_slopes.expand(B, HQ)[:, :, None, None].to(scores.dtype)
        scores = scores - slopes * distance.abs().to(scores.dtype)
    if attn_mask is not None and not isinstance(attn_mask, CausalBias):
        if attn_mask.dtype == torch.bool:
            see = see & attn_mask
        else:
            scores = scores + attn_mask
    scores = scores.masked_fill(~see, -math.inf)
    row_exists = (torch.arange(SQ, device=query.device)[None] < lengths(q_seqlens, B, SQ, query.device)[:, None])
    row_exists = row_exists[:, None, :, None]
    if sinks is not None:
        column = sinks.expand(B, HQ)[:, :, None, None].expand(B, HQ, SQ, 1).to(scores.dtype)
        scores = torch.cat([scores, column.masked_fill(~row_exists, -math.inf)], -1)
    elif SK == 0:
        return value.new_zeros(B, HQ, SQ, value.shape[-1]), scores.new_full((B, HQ, SQ), -math.inf)
    alive = (scores > -math.inf).any(-1, keepdim=True)
    scores = torch.where(alive, scores, torch.zeros_like(scores))
    lse = torch.where(alive[..., 0], torch.logsumexp(scores, -1), torch.full_like(scores[..., 0], -math.inf))
    weights = torch.softmax(scores, -1)[..., :SK].to(query.dtype)
    weights = torch.where(alive, weights, torch.zeros_like(weights))
    if dropout_p >= 1.0:
        weights = weights * 0
    elif dropout_p > 0.0:
        weights = torch.where(keep, weights * dropout_factor(dropout_p), torch.zeros_like(weights))
    return weights @ value, lse


PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85


def philox(seed, counter, rounds=7):
    """Philox4x32 of Salmon et al. 2011 on Python integers: four 32-bit words."""
    low = (1 << 32) - 1
    k0, k1 = seed & low, (seed >> 32) & low
    c0, c1, c2, c3 = counter
    for _ in range(rounds):
        p0, p1 = PHILOX_M0 * c0, PHILOX_M1 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & low, (p0 >> 32) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + PHILOX_W0) & low, (k1 + PHILOX_W1) & low
    return c0, c1, c2, c3


def dropout_probability(p):
    """The probability in force, in 65536ths: the nearest to p, but dropout of some is never of none nor of all."""
    return 0 if p == 0 else min(max(math.floor(p * 65536 + 0.5), 1), 65535)


def dropout_factor(p):
    return 1 / (1 - dropout_probability(p) / 65536)


def dropout_keep(seed, p, B, HQ, SQ, SK):
    """Bool (B, HQ, SQ, SK): the weights that dropout keeps under this seed, one by one."""
    threshold = dropout_probability(p)
    seed &= (1 << 64) - 1
    drawn = {}

    def kept(bh, i, j):
        counter = (j // 16 * 4 + j % 8 // 2, i // 16 * 8 + i % 8, bh, 0)
        if counter not in drawn:
            drawn[counter] = philox(seed, counter)
        word = drawn[counter][(2 if i % 16 >= 8 else 0) + (1 if j % 16 >= 8 else 0)]
        return (word >> 16 if j % 2 else word & 0xFFFF) >= threshold

    keep = [[[kept(bh, i, j) for j in range(SK)] for i in range(SQ)] for bh in range(B * HQ)]
    return torch.tensor(keep, dtype=torch.bool).view(B, HQ, SQ, SK)
