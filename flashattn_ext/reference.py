"""The definition of attention in this package: eager float64 torch, slow, and readable from top to bottom.

Every fused kernel is tested against this file. It stores the whole (SQ, SK) matrix of weights, torch's autograd
differentiates it as often as wanted (also forward mode), and it works on any device that has float64.
"""

import math

import torch

__all__ = ["append", "attention", "decode_attention", "merge_attention", "varlen_attn"]


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False,
              window=None, softcap=0.0, sinks=None, alibi_slopes=None, q_seqlens=None, kv_seqlens=None,
              return_lse=False, bottom_right=False, dropout_seed=None, first_batch=0):
    """Attention with every option of `flashattn_ext.scaled_dot_product_attention`, computed in float64.

        S = softcap(scale * Q K^T) + bias + alibi,   O = dropout(softmax(S over the visible keys)) V

    Arguments are those of `scaled_dot_product_attention`, with the same shapes and meaning, and three more:

    bottom_right: align the diagonal of causal, window and ALiBi with the last query and the last key, as a lower-right
        `CausalBias` does (which also switches causal on).
    dropout_seed: int, or int64 tensor of one element. None draws it as the fused call does, so that both drop the same
        weights after the same `torch.manual_seed`.
    first_batch: what dropout calls the first of the batch.

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
        skipped = first_batch * heads
        kept = dropout_keep(seed, dropout_p, skipped + math.prod(batch) * heads, queries, keys)[skipped:]
        kept = kept.to(q.device).view(weights.shape)
        weights = torch.where(kept, weights * dropout_factor(dropout_p), 0.0)
    out = _weighted_sum(weights, v, visible)
    if no_heads:
        out, lse = out.squeeze(-3), lse.squeeze(-2)
    return (out, lse) if return_lse else out


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q=None, max_k=None, *, return_aux=None, scale=None,
                window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None, softcap=0.0,
                sinks=None, alibi_slopes=None, dropout_p=0.0, dropout_seed=None):
    """`flashattn_ext.varlen_attn` as a loop over its sequences; also with dropout, as the op has it.

    max_q, max_k and num_splits change no result. Returns out (T, HQ, DV), and with return_aux.lse also the
    log-sum-exp (HQ, T); both are float64. Differentiable.
    """
    starts = cu_seq_q.tolist()
    if dropout_p > 0.0 and dropout_seed is None:
        dropout_seed = _draw_seed()
    outs, lses = [], []
    for n, (first, last) in enumerate(zip(starts, starts[1:])):
        k, v = _sequence_keys(n, key, value, cu_seq_k, seqused_k, block_table)
        out, lse = attention(
            query[first:last].transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None],
            dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa, window=window_size, softcap=softcap,
            sinks=_of_sequence(sinks, n), alibi_slopes=_of_sequence(alibi_slopes, n), bottom_right=True,
            dropout_seed=dropout_seed, first_batch=n, return_lse=True)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    left, heads = query.shape[0] - starts[-1], query.shape[1]
    outs.append(query.new_zeros((left, heads, value.shape[-1]), dtype=torch.float64))
    lses.append(query.new_full((heads, left), -math.inf, dtype=torch.float64))
    out, lse = torch.cat(outs), torch.cat(lses, dim=1)
    return (out, lse) if return_aux is not None and return_aux.lse else out


def decode_attention(query, k_cache, v_cache, cache_seqlens, *, k_new=None, v_new=None, block_table=None, scale=None,
                     causal=True, window=None, softcap=0.0, sinks=None, alibi_slopes=None, rope_cos=None, rope_sin=None,
                     rope_interleaved=False, k_scale=None, v_scale=None, tree_mask=None, num_splits=None,
                     batch_invariant=False, return_lse=False):
    """`flashattn_ext.decode_attention` as a loop over its sequences, except that no cache is written: new keys and
    values go into copies (`append`), rounded and quantised as the caches are; turned queries are not rounded.

    num_splits and batch_invariant change no result. Returns out (B, SQ, HQ, DV), and with return_lse also the
    log-sum-exp (B, HQ, SQ); both are float64.
    """
    lengths = cache_seqlens.tolist()
    if k_new is not None:
        k_cache, v_cache, k_scale, v_scale = append(
            k_cache, v_cache, cache_seqlens, k_new, v_new, block_table=block_table, k_scale=k_scale, v_scale=v_scale,
            rope_cos=rope_cos, rope_sin=rope_sin, rope_interleaved=rope_interleaved)
        if rope_cos is not None and lengths:
            query = torch.stack([_rotate(q.double(), rope_cos.double(), rope_sin.double(), first, rope_interleaved)
                                 for q, first in zip(query, lengths)])
        lengths = [length + k_new.shape[1] for length in lengths]
    outs, lses, queries = [], [], query.shape[1]
    for b, length in enumerate(lengths):
        k = _cache_rows(b, k_cache, k_scale, block_table)[:length]
        v = _cache_rows(b, v_cache, v_scale, block_table)[:length]
        mask = None
        if tree_mask is not None:
            mask = torch.cat([tree_mask.new_ones(queries, length - queries), tree_mask[b]], dim=1)
        right = 0 if causal and tree_mask is None else None if window is None else window[1]
        out, lse = attention(
            query[b].transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], mask, scale=scale,
            enable_gqa=True, window=(None if window is None else window[0], right), softcap=softcap,
            sinks=_of_sequence(sinks, b), alibi_slopes=_of_sequence(alibi_slopes, b), bottom_right=True,
            return_lse=True)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    if not outs:
        shape = (0, queries, query.shape[2], v_cache.shape[3])
        out, lse = query.new_zeros(shape).double(), query.new_zeros((0, query.shape[2], queries)).double()
    else:
        out, lse = torch.stack(outs), torch.stack(lses)
    return (out, lse) if return_lse else out


def append(k_cache, v_cache, cache_seqlens, k_new, v_new, *, block_table=None, k_scale=None, v_scale=None,
           rope_cos=None, rope_sin=None, rope_interleaved=False):
    """What appending k_new and v_new (B, S_new, HK, D or DV) makes of a cache: (k_cache, v_cache, k_scale, v_scale),
    copies where anything was written.

    Rotary embedding and quantisation are in float32 (float64 for float64 rows), each followed by one rounding:
    stored = round(x / scale), saturated at -128 .. 127 or +-448. Scales per token are max|row| / 127 or / 448, 1 for a
    row of zeros, and written.
    """
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    k_scale, v_scale = (x if x is None or x.dim() < 3 else x.clone() for x in (k_scale, v_scale))
    wide = torch.float64 if k_new.dtype == torch.float64 else torch.float32
    for b, first in enumerate(cache_seqlens.tolist()):
        turned = k_new[b].to(wide)
        if rope_cos is not None:
            turned = _rotate(turned, rope_cos.to(wide), rope_sin.to(wide), first, rope_interleaved)
        for i in range(k_new.shape[1]):
            place = _place(b, first + i, k_cache, block_table)
            _write_row(k_cache, k_scale, place, b, turned[i])
            _write_row(v_cache, v_scale, place, b, v_new[b, i].to(wide))
    return k_cache, v_cache, k_scale, v_scale


def merge_attention(out_a, lse_a, out_b, lse_b):
    """`flashattn_ext.merge_attention` in float64: the mean of two outputs, weighted by exp(lse). Differentiable."""
    out_a, lse_a, out_b, lse_b = (x.double() for x in (out_a, lse_a, out_b, lse_b))
    has_a, has_b = lse_a > -math.inf, lse_b > -math.inf
    lse = torch.logaddexp(torch.where(has_a, lse_a, 0.0), torch.where(has_b, lse_b, 0.0))
    lse = torch.where(has_a & has_b, lse, torch.where(has_a, lse_a, lse_b))
    safe = torch.where(has_a | has_b, lse, 0.0)
    weight_a, weight_b = (torch.where(has, torch.exp(torch.where(has, x - safe, 0.0)), 0.0)
                          for has, x in ((has_a, lse_a), (has_b, lse_b)))
    out = (weight_a[..., None] * torch.where(has_a[..., None], out_a, 0.0)
           + weight_b[..., None] * torch.where(has_b[..., None], out_b, 0.0))
    return out, lse


def _rotate(x, cos, sin, first, interleaved):
    """x (S, H, D) with the first R of D turned (Su et al., "RoFormer", 2021), row i as position first + i says.

    cos, sin (positions, R / 2). Pairs are (i, i + R / 2), or (2i, 2i + 1) where interleaved."""
    half = cos.shape[1]
    c, s = (table[first:first + x.shape[0], None, :] for table in (cos, sin))
    turned, rest = x[..., :2 * half], x[..., 2 * half:]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    a, b = a * c - b * s, a * s + b * c
    turned = torch.stack([a, b], dim=-1).flatten(-2) if interleaved else torch.cat([a, b], dim=-1)
    return torch.cat([turned, rest], dim=-1)


def _of_sequence(x, n):
    """Sinks or slopes of sequence n: (HQ,) of (HQ,) or (N, HQ)."""
    return x if x is None or x.dim() == 1 else x[n]


def _sequence_keys(n, key, value, cu_seq_k, seqused_k, block_table):
    """The keys and values (length, HK, D) of sequence n."""
    if block_table is not None:
        used = cu_seq_k[n + 1] - cu_seq_k[n] if seqused_k is None else seqused_k[n]
        return tuple(_cache_rows(n, x, None, block_table)[:int(used)] for x in (key, value))
    first, last = int(cu_seq_k[n]), int(cu_seq_k[n + 1])
    last = last if seqused_k is None else first + int(seqused_k[n])
    return key[first:last], value[first:last]


def _cache_rows(b, cache, scale, block_table):
    """All rows (capacity, HK, D) of sequence b, in float64; of pages those whose number is valid."""
    if block_table is None:
        rows = cache[b].double()
    else:
        pages = [page if 0 <= page < cache.shape[0] else 0 for page in block_table[b].tolist()]
        rows = cache[pages].double().flatten(0, 1)
    if scale is None:
        return rows
    if scale.dim() < 3:
        return rows * _head_scale(scale, b).double()
    return rows * (scale[b] if block_table is None else scale[pages].flatten(0, 1)).double()[..., None]


def _head_scale(scale, b):
    """() or (HK, 1) of scales that are (), (HK,) or (B, HK)."""
    return scale if scale.dim() == 0 else scale[b if scale.shape[0] > 1 else 0, :, None] if scale.dim() == 2 else (
        scale[:, None])


def _place(b, row, cache, block_table):
    if block_table is None:
        return b, row
    return int(block_table[b, row // cache.shape[1]]), row % cache.shape[1]


def _write_row(cache, scale, place, b, row):
    if scale is None:
        cache[place] = row.to(cache.dtype)
        return
    row = row.float()
    # A tensor, since CUDA's division by a Python number multiplies by its rounded reciprocal.
    largest = row.new_tensor(127.0 if cache.dtype == torch.int8 else 448.0)
    if scale.dim() == 3:
        by = row.abs().amax(-1).clamp(max=torch.finfo(torch.float32).max) / largest
        scale[place] = torch.where(by > 0, by, 1.0)
        by = scale[place][:, None]
    else:
        by = _head_scale(scale, b)
    if cache.dtype == torch.int8:
        cache[place] = (row / by).round().clamp(-128, 127).to(torch.int8)
    else:
        cache[place] = (row / by).clamp(-448, 448).to(cache.dtype)


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
    return int(torch.randint(-2**63, 2**63 - 1, (1,), dtype=torch.int64, device="cpu"))


# ---- dropout: the same random numbers as csrc/common/fa_philox.h ----------------------------------------------------

_ROUNDS = 7
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def dropout_keep(seed, p, batch_heads, queries, keys):
    """Which weights dropout keeps: bool (batch_heads, SQ, SK) on the CPU; a function of (seed, b * HQ + h, i, j) only.

    Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) under the key `seed` gives 16 bits
    to a weight, which is kept when they are at least p * 2^16. Counter (4 (j / 16) + j % 8 / 2, 8 (i / 16) + i % 8,
    b * HQ + h, 0), word 2 (i / 8 % 2) + j / 8 % 2, its low half where j is even: eight weights of 16 x 16 share one.
    """
    columns, rows = -(-keys // 16), -(-queries // 16)
    shape = (batch_heads, 8 * rows, 4 * columns)
    words = _philox(seed, torch.arange(4 * columns).expand(shape), torch.arange(8 * rows).view(-1, 1).expand(shape),
                    (torch.arange(batch_heads) & _LOW).view(-1, 1, 1).expand(shape))
    bits = torch.stack([words & 0xFFFF, words >> 16], dim=-1)
    bits = bits.view(2, 2, batch_heads, rows, 8, columns, 4, 2)  # i / 8 % 2, j / 8 % 2, bh, i / 16, i % 8, j / 16, ...
    bits = bits.permute(2, 3, 0, 4, 5, 1, 6, 7).reshape(batch_heads, 16 * rows, 16 * columns)
    return bits[:, :queries, :keys] >= _threshold(p)


def dropout_factor(p):
    """What dropout multiplies a kept weight by: 1 / (1 - p) with p as it is in force, a multiple of 2^-16; 0 where p is
    1, which keeps none."""
    return 65536 / (65536 - _threshold(p)) if p < 1.0 else 0.0


def _threshold(p):
    return min(max(int(p * 65536.0 + 0.5), 1), 65535) if p > 0.0 else 0


def _philox(seed, c0, c1, c2):
    """The four words of the counters (c0, c1, c2, 0), in the first dimension."""
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_ROUNDS):
        # int64 products wrap around modulo 2^64, which keeps the bits of the unsigned product
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> 32 & _LOW) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32 & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return torch.stack([c0, c1, c2, c3])
