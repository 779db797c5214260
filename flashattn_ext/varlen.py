"""Attention of packed sequences: the signature and meaning of torch.nn.attention.varlen.varlen_attn, and more options.

Sequences of any lengths lie one behind the other in one tensor, without padding. What tensors may hold and how sizes
must fit together is checked, and worded, in csrc/plan.
"""

import torch
from torch.compiler import is_dynamo_compiling

from . import graph, sdpa
from .autograd import packed

__all__ = ["varlen_attn"]


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None, softcap=0.0,
                sinks=None, alibi_slopes=None):
    """softmax(softcap(scale * Q K^T) + alibi) V of each of N sequences that are packed one behind the other.

    Sequence n has the rows cu_seq_q[n] .. cu_seq_q[n + 1] - 1 of query and the rows of cu_seq_k likewise of key and
    value; either may be none, and there may be more queries than keys. Its last query stands at its last key: causal,
    windows and ALiBi count from there. Rows that see no key, and rows past cu_seq_q[-1], give 0 and no gradient. Each
    sequence is computed as though it were alone: its bits depend on nothing else in the call.

    Args:
        query: (T_q, HQ, D), key: (T_k, HK, D), value: (T_k, HK, DV); any strides.
        cu_seq_q, cu_seq_k: (N + 1,) int32 or int64, from 0 up. cu_seq_k may be None with block_table.
        max_q, max_k: at least the longest length; checked on the CPU.
        return_aux: an AuxRequest of torch.nn.attention.varlen (anything with a field lse); None = no log-sum-exp.
        scale: factor of Q K^T, finite; None = 1 / sqrt(D).
        window_size: (left, right) in keys, None or -1 = unbounded on that side; causal is (-1, 0).
        enable_gqa: lets HK be a divisor of HQ: query head h reads head h // (HQ / HK).
        seqused_k: (N,) int32 or int64: only so many keys of each sequence are read. Inference only.
        block_table: (N, max_pages) int32 or int64: key and value are pages (pages, page_size, HK, D or DV), and key j
            of sequence n is row j % page_size of page block_table[n, j // page_size]. Lengths come from seqused_k, else
            from cu_seq_k; entries past them are never read. Inference only.
        num_splits: into how many parts the keys are cut; None or 0 = as the plan says.
        softcap: s -> softcap * tanh(s / softcap) after the scale; 0 = off.
        sinks: (HQ,) or (N, HQ), float32 or query's dtype: logits that join the denominator only. Of (N, HQ) there is no
            gradient.
        alibi_slopes: (HQ,) or (N, HQ), float32 or query's dtype: adds -slope * |i + offset - j|; no gradient.

    Returns:
        out (T_q, HQ, DV), query's dtype, contiguous; where return_aux.lse a pair (out, lse), lse (HQ, T_q) in float32
        (float64 for float64 inputs). Both are differentiable once in query, key, value and sinks.

    Under autocast, floating query, key and value become the autocast dtype.

    Raises:
        RuntimeError: shapes, dtypes, devices, offsets, lengths or pages that do not fit, naming the sequence; inputs
            that require grad together with seqused_k or block_table.
        ValueError: scale, softcap, window_size or num_splits out of range; heads that do not fit enable_gqa.

    Source: Dao et al., "FlashAttention", 2022; Kwon et al., "PagedAttention", 2023.
    """
    out, lse = packed_attention(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale,
                                window_size=window_size, enable_gqa=enable_gqa, seqused_k=seqused_k,
                                block_table=block_table, num_splits=num_splits, softcap=softcap, sinks=sinks,
                                alibi_slopes=alibi_slopes)
    return (out, lse) if return_aux is not None and return_aux.lse else out


def packed_attention(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1),
                     enable_gqa=False, seqused_k=None, block_table=None, num_splits=None, softcap=0.0, sinks=None,
                     alibi_slopes=None, dropout_p=0.0):
    """`varlen_attn` with dropout: (out, lse). The seed comes from torch's default CPU generator."""
    for name, x in (("query", query), ("key", key), ("value", value), ("cu_seq_q", cu_seq_q)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    sdpa.check_scalars(dropout_p, scale, softcap)
    left, right = sdpa.window_sides(window_size, False, "window_size")
    splits = check_splits(num_splits)
    _check_heads(query, key, enable_gqa)
    if block_table is not None:
        if seqused_k is None and cu_seq_k is not None:
            seqused_k = cu_seq_k.diff()
        cu_seq_k = None
    query, key, value, _, sinks, alibi_slopes = sdpa.autocast(query.device.type, query, key, value, None, sinks,
                                                              alibi_slopes)
    state = None
    if is_dynamo_compiling():
        graph.mark()
    elif dropout_p > 0:
        state = torch.get_rng_state()
    seed = sdpa.draw_seed() if dropout_p > 0 else None
    try:
        return packed(query, key, value, cu_seq_q, cu_seq_k, seqused_k, block_table, sinks, alibi_slopes, seed, max_q,
                      max_k, scale, float(softcap), left, right, float(dropout_p), sdpa.allows_tf32(query), splits)
    except RuntimeError:
        if state is not None:  # a refused call leaves the generator as it was
            torch.set_rng_state(state)
        raise


def check_splits(num_splits):
    """The op's number for num_splits: 0 = the planner's choice."""
    if num_splits is None:
        return 0
    if isinstance(num_splits, bool) or not isinstance(num_splits, int) or num_splits < 0:
        raise ValueError(f"num_splits must be None (the plan decides) or an integer of at least 0, got {num_splits!r}")
    return num_splits


def _check_heads(query, key, enable_gqa):
    if query.dim() != 3 or key.dim() < 3:
        return  # refused by the op, in words of its own
    heads, own = query.shape[1], key.shape[-2]
    if heads != own and not enable_gqa:
        raise ValueError(f"query has {heads} heads, key and value {own}: they must be equal, or with enable_gqa=True "
                         "the second number must divide the first")
    if heads != own and (own == 0 or heads % own):
        raise ValueError(f"query has {heads} heads, key and value {own}: with enable_gqa=True the second number must "
                         "divide the first")
