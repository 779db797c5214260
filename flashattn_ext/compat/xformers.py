"""memory_efficient_attention of xformers.ops and its biases that need no matrix: same names, arguments and meaning.

    from flashattn_ext.compat.xformers import BlockDiagonalCausalMask, memory_efficient_attention

Biases of xformers that are not here have no counterpart yet; asking for one is an ImportError.
"""

import dataclasses

import torch
from torch import Tensor

from ..sdpa import scaled_dot_product_attention
from ..varlen import packed_attention
from .flash_attn import flash_attn_func

__all__ = ["AttentionBias", "BlockDiagonalCausalFromBottomRightMask", "BlockDiagonalCausalMask",
           "BlockDiagonalCausalWithOffsetPaddedKeysMask", "BlockDiagonalMask", "BlockDiagonalPaddedKeysMask",
           "LocalAttentionFromBottomRightMask", "LowerTriangularFromBottomRightLocalAttentionMask",
           "LowerTriangularFromBottomRightMask", "LowerTriangularMask", "LowerTriangularMaskWithTensorBias",
           "memory_efficient_attention"]


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    """softmax(scale * Q K^T + attn_bias) V.

    query (B, MQ, H, K), key (B, MK, H, K), value (B, MK, H, KV); or without heads, (B, M, K); or grouped, (B, M, G, H,
    K), where the H query heads of a group share a key and a value that are expanded over H. attn_bias: None, an
    AttentionBias, or a tensor in query's dtype or float32, (B, H, MQ, MK) or broadcastable to it, which is added. p:
    probability of dropping a weight. op and output_dtype must be None (or query's dtype): there is one implementation.

    Returns (B, MQ, H, KV), in query's layout of heads.
    """
    if op is not None:
        raise ValueError(f"op must be None: there is one implementation, got {op!r}")
    if output_dtype not in (None, query.dtype):
        raise ValueError(f"output_dtype must be None or query's dtype, {query.dtype}, got {output_dtype}")
    if not 3 <= query.dim() <= 5 or not query.dim() == key.dim() == value.dim():
        raise ValueError("query, key and value must all be (B, M, K), (B, M, H, K) or (B, M, G, H, K), got "
                         f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}")
    shape = query.shape
    if query.dim() == 3:
        query, key, value = (x.unsqueeze(2) for x in (query, key, value))
        if isinstance(attn_bias, Tensor) and attn_bias.dim() == 3:
            attn_bias = attn_bias.unsqueeze(1)
    elif query.dim() == 5:
        query, key, value = query.flatten(2, 3), _shared(key), _shared(value)
        if isinstance(attn_bias, Tensor) and attn_bias.dim() == 5:
            attn_bias = attn_bias.flatten(1, 2)
    if not isinstance(attn_bias, AttentionBias):
        out = _with_tensor(query, key, value, attn_bias, p, scale)
    else:
        out = attn_bias.attend(query, key, value, p, scale)
    return out.reshape(*shape[:-1], value.shape[-1])


def _shared(x):
    """(B, M, G, H, K) expanded over H -> (B, M, G, K); a tensor that is not -> (B, M, G * H, K)."""
    return x[:, :, :, 0] if x.stride(3) == 0 or x.shape[3] == 1 else x.flatten(2, 3)


def _with_tensor(query, key, value, bias, p, scale, is_causal=False):
    if bias is not None and not bias.is_floating_point():
        raise ValueError(f"attn_bias must be a floating tensor, which is added to the scores, got {bias.dtype}")
    if is_causal and bias is not None:
        hidden = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool, device=query.device).triu(1)
        bias, is_causal = bias.masked_fill(hidden, -torch.inf), False
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(query, key, value, bias, p, is_causal, scale=scale,
                                        enable_gqa=True).transpose(1, 2)


# ---- sequences of one length ----------------------------------------------------------------------------------------


class AttentionBias:
    """What a query sees of the keys, as a rule instead of a matrix."""

    def attend(self, query, key, value, p, scale):
        """query (B, MQ, HQ, K), key (B, MK, HK, K), value (B, MK, HK, KV) -> (B, MQ, HQ, KV)."""
        raise NotImplementedError


class LowerTriangularMask(AttentionBias):
    """Query i sees keys 0..i."""

    def attend(self, query, key, value, p, scale):
        return _with_tensor(query, key, value, None, p, scale, is_causal=True)

    def add_bias(self, bias):
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    """The same, and a tensor that is added, (B, H, MQ, MK) or broadcastable to it."""

    def __init__(self, bias):
        self._bias = bias

    def attend(self, query, key, value, p, scale):
        return _with_tensor(query, key, value, self._bias, p, scale, is_causal=True)


@dataclasses.dataclass
class LocalAttentionFromBottomRightMask(AttentionBias):
    """Query i sees keys i + MK - MQ - window_left .. i + MK - MQ + window_right."""

    window_left: int
    window_right: int

    def __post_init__(self):
        if self.window_left < 0 or self.window_right < 0:
            raise ValueError(f"window_left and window_right must be at least 0, got {self.window_left} and "
                             f"{self.window_right}")

    def attend(self, query, key, value, p, scale):
        return flash_attn_func(query, key, value, p, scale, window_size=(self.window_left, self.window_right))


class LowerTriangularFromBottomRightMask(AttentionBias):
    """Query i sees keys up to i + MK - MQ: the last query sees the last key."""

    def attend(self, query, key, value, p, scale):
        return flash_attn_func(query, key, value, p, scale, causal=True)

    def make_local_attention(self, window_size):
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


@dataclasses.dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    """The same, and no further back than window_size keys, its own included."""

    _window_size: int

    def __post_init__(self):
        if self._window_size <= 0:
            raise ValueError(f"window_size must be at least 1, got {self._window_size}")

    def attend(self, query, key, value, p, scale):
        return flash_attn_func(query, key, value, p, scale, causal=True, window_size=(self._window_size - 1, 0))


# ---- packed sequences: B is 1, and M counts all of their tokens -----------------------------------------------------


@dataclasses.dataclass
class _SeqLenInfo:
    """Where packed sequences begin: seqstart (sequences + 1,) int32, the same as a list, the longest and shortest."""

    seqstart: Tensor
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list

    @classmethod
    def from_seqlens(cls, seqlens, device=None):
        lengths = list(seqlens)
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        return cls(torch.tensor(starts, dtype=torch.int32, device=device), max(lengths, default=0),
                   min(lengths, default=0), starts)

    def intervals(self):
        return zip(self.seqstart_py, self.seqstart_py[1:])

    def split(self, x, batch_sizes=None):
        """(1, tokens, ...) -> a list of (batch size, length, ...)."""
        if x.shape[0] != 1 or x.shape[1] != self.seqstart_py[-1]:
            raise ValueError(f"the tensor must be (1, {self.seqstart_py[-1]}, ...), got {tuple(x.shape)}")
        sizes, parts, first = batch_sizes or [1] * (len(self.seqstart_py) - 1), [], 0
        for size in sizes:
            part = x[0, self.seqstart_py[first]:self.seqstart_py[first + size]]
            parts.append(part.unflatten(0, (size, -1)))
            first += size
        return parts


@dataclasses.dataclass
class BlockDiagonalMask(AttentionBias):
    """Each sequence sees its own keys, all of them."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _SeqLenInfo
    _batch_sizes: list | None = None

    _causal = False

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        """Lengths of the sequences in query, and in key and value (None: the same)."""
        if kv_seqlen is not None and len(q_seqlen) != len(kv_seqlen):
            raise ValueError(f"q_seqlen and kv_seqlen must be equally many, got {len(q_seqlen)} and {len(kv_seqlen)}")
        q_info = _SeqLenInfo.from_seqlens(q_seqlen, device)
        same = kv_seqlen is None or list(kv_seqlen) == list(q_seqlen)
        return cls(q_info, q_info if same else _SeqLenInfo.from_seqlens(kv_seqlen, device))

    @classmethod
    def from_tensor_list(cls, tensors):
        """Tensors (b, length, ...) -> (the bias, all of them packed (1, tokens, ...))."""
        bias = cls.from_seqlens([x.shape[1] for x in tensors for _ in range(x.shape[0])])
        bias._batch_sizes = [x.shape[0] for x in tensors]
        return bias, _joined(tensors)

    @classmethod
    def from_tensor_lists_qkv(cls, tensors_q, tensors_k, tensors_v=None):
        """The same for queries, keys and values: (the bias, q, k, v or None)."""
        bias = cls.from_seqlens(*([x.shape[1] for x in tensors for _ in range(x.shape[0])]
                                  for tensors in (tensors_q, tensors_k)))
        bias._batch_sizes = [x.shape[0] for x in tensors_q]
        return bias, _joined(tensors_q), _joined(tensors_k), None if tensors_v is None else _joined(tensors_v)

    def split_queries(self, tensor):
        return self.q_seqinfo.split(tensor, self._batch_sizes)

    def split_kv(self, tensor):
        return self.k_seqinfo.split(tensor, self._batch_sizes)

    def split(self, tensor):
        """What from_tensor_list packed, as a list again."""
        if self.q_seqinfo is not self.k_seqinfo:
            raise ValueError("queries and keys have different lengths: use split_queries or split_kv")
        return self.split_queries(tensor)

    def make_causal(self):
        return BlockDiagonalCausalMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)

    def make_causal_from_bottomright(self):
        return BlockDiagonalCausalFromBottomRightMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)

    def attend(self, query, key, value, p, scale):
        q, k = self.q_seqinfo, self.k_seqinfo
        return self._packed(query, key, value, p, scale, k.seqstart, k.max_seqlen, max_q=q.max_seqlen)

    def _packed(self, query, key, value, p, scale, k_starts, max_k, max_q, used=None):
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.shape[0] != 1:
                raise ValueError(f"packed sequences have a batch of 1, got {name} {tuple(x.shape)}")
        device = query.device
        out, _ = packed_attention(query[0], key[0], value[0], self.q_seqinfo.seqstart.to(device), k_starts.to(device),
                                  max_q, max_k, scale=scale, window_size=(-1, 0 if self._causal else -1),
                                  enable_gqa=True, dropout_p=p, seqused_k=None if used is None else used.to(device))
        return out[None]


@dataclasses.dataclass
class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """Each sequence is causal, its last query sees its last key; no sequence has more queries than keys."""

    _causal = True

    def __post_init__(self):
        for index, ((q0, q1), (k0, k1)) in enumerate(zip(self.q_seqinfo.intervals(), self.k_seqinfo.intervals())):
            if q1 - q0 > k1 - k0:
                raise ValueError(f"sequence {index} has {q1 - q0} queries and {k1 - k0} keys: it must have at least as "
                                 "many keys as queries")


class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Each sequence is causal, its query i sees its keys 0..i."""

    _causal = True

    def attend(self, query, key, value, p, scale):
        if self.q_seqinfo.seqstart_py == self.k_seqinfo.seqstart_py:
            return super().attend(query, key, value, p, scale)
        # Sequences that begin together but end apart, which packed attention has not got.
        parts = [_with_tensor(query[:, q0:q1], key[:, k0:k1], value[:, k0:k1], None, p, scale, is_causal=True)
                 for (q0, q1), (k0, k1) in zip(self.q_seqinfo.intervals(), self.k_seqinfo.intervals())]
        return torch.cat(parts, 1)


@dataclasses.dataclass
class _PaddedSeqLenInfo(_SeqLenInfo):
    """Sequences in slots of `padding` tokens, of which the first seqlen (sequences,) int32 are used."""

    seqlen: Tensor = None
    seqlen_py: list = None
    padding: int = 0

    @classmethod
    def from_seqlens_padded(cls, seqlens, padding, device=None):
        lengths = list(seqlens)
        if any(not 0 <= length <= padding for length in lengths):
            raise ValueError(f"kv_seqlen must lie between 0 and kv_padding, {padding}, got {lengths}")
        starts = [padding * i for i in range(len(lengths) + 1)]
        used = torch.tensor(lengths, dtype=torch.int32, device=device)
        return cls(torch.tensor(starts, dtype=torch.int32, device=device), max(lengths, default=0),
                   min(lengths, default=0), starts, used, lengths, padding)


class BlockDiagonalPaddedKeysMask(BlockDiagonalMask):
    """Each sequence sees the used part of its slot of keys; inference only."""

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_padding, kv_seqlen, causal_diagonal=None, *, device=None):
        """kv_padding: tokens of a slot; kv_seqlen: how many of them are used. causal_diagonal is not looked at."""
        if len(q_seqlen) != len(kv_seqlen):
            raise ValueError(f"q_seqlen and kv_seqlen must be equally many, got {len(q_seqlen)} and {len(kv_seqlen)}")
        return cls(_SeqLenInfo.from_seqlens(q_seqlen, device),
                   _PaddedSeqLenInfo.from_seqlens_padded(kv_seqlen, kv_padding, device))

    def attend(self, query, key, value, p, scale):
        k = self.k_seqinfo
        return self._packed(query, key, value, p, scale, k.seqstart, k.padding, self.q_seqinfo.max_seqlen, k.seqlen)


class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """The same, causal: the last query of a sequence sees its last used key."""

    _causal = True


def _joined(tensors):
    return torch.cat([x.reshape(1, -1, *x.shape[2:]) for x in tensors], 1)
