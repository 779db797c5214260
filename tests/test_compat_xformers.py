"""flashattn_ext.compat.xformers: memory_efficient_attention and its biases, held to eager attention under the mask that
each bias stands for."""

import math

import pytest
import torch

from flashattn_ext.compat import xformers as xf

B, MQ, MK, H, K, KV = 2, 5, 8, 4, 8, 6


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def eager(q, k, v, bias=None, scale=None):
    """(B, M, H, K) tensors, bias broadcastable to (B, H, MQ, MK); rows without a key give 0."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[-1]**-0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    alive = (scores > -math.inf).any(-1, keepdim=True)
    weights = torch.where(alive, scores, 0.0).softmax(-1) * alive
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def allowed(see):
    return torch.zeros(see.shape, dtype=torch.float64).masked_fill(~see, -math.inf)


def distance(queries, keys, offset=0):
    return torch.arange(keys)[None] - torch.arange(queries)[:, None] - offset


def agree(got, want, leaves):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for mine, exact in zip(torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(want, leaves, upstream)):
        torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-9)


off = MK - MQ
DENSE = {
    "none": (None, torch.ones(MQ, MK, dtype=torch.bool)),
    "lower": (xf.LowerTriangularMask(), distance(MQ, MK) <= 0),
    "bottom-right": (xf.LowerTriangularFromBottomRightMask(), distance(MQ, MK, off) <= 0),
    "bottom-right-local": (xf.LowerTriangularFromBottomRightMask().make_local_attention(3),
                           (distance(MQ, MK, off) <= 0) & (distance(MQ, MK, off) > -3)),
    "local": (xf.LocalAttentionFromBottomRightMask(2, 1),
              (distance(MQ, MK, off) >= -2) & (distance(MQ, MK, off) <= 1)),
}


@pytest.mark.parametrize("bias, see", DENSE.values(), ids=DENSE)
def test_dense(bias, see):
    q, k, v = leaves = draw(B, MQ, H, K), draw(B, MK, H, K), draw(B, MK, H, KV)
    agree(xf.memory_efficient_attention(q, k, v, bias, scale=0.3), eager(q, k, v, allowed(see), 0.3), leaves)


@pytest.mark.parametrize("causal", [False, True])
def test_a_tensor_that_is_added(causal):
    q, k, v, bias = leaves = draw(B, MQ, H, K), draw(B, MK, H, K), draw(B, MK, H, KV), draw(B, H, MQ, MK)
    want = eager(q, k, v, bias + allowed(distance(MQ, MK) <= 0) if causal else bias)
    given = xf.LowerTriangularMask().add_bias(bias) if causal else bias
    agree(xf.memory_efficient_attention(q, k, v, given), want, leaves)


def test_without_heads():
    q, k, v, bias = leaves = draw(B, MQ, K), draw(B, MK, K), draw(B, MK, KV), draw(B, MQ, MK)
    want = eager(*(x.unsqueeze(2) for x in (q, k, v)), bias.unsqueeze(1)).squeeze(2)
    agree(xf.memory_efficient_attention(q, k, v, bias), want, leaves)


@pytest.mark.parametrize("expanded", [True, False])
def test_grouped_heads(expanded):
    G, group = 2, 3
    q, k, v = leaves = draw(B, MQ, G, group, K), draw(B, MK, G, 1, K), draw(B, MK, G, 1, KV)
    given = [x.expand(-1, -1, -1, group, -1) for x in (k, v)]
    given = given if expanded else [x.contiguous() for x in given]
    want = eager(q.flatten(2, 3), k.squeeze(3), v.squeeze(3)).unflatten(2, (G, group))
    agree(xf.memory_efficient_attention(q, *given), want, leaves)


PACKED = [(3, 5), (4, 4), (1, 6)]


def blocks(see):
    """The mask of all tokens from one for each sequence."""
    return allowed(torch.block_diag(*(x.int() for x in see)).bool())


@pytest.mark.parametrize("kind, see", [
    (xf.BlockDiagonalMask, lambda q, k: torch.ones(q, k, dtype=torch.bool)),
    (xf.BlockDiagonalCausalMask, lambda q, k: distance(q, k) <= 0),
    (xf.BlockDiagonalCausalFromBottomRightMask, lambda q, k: distance(q, k, k - q) <= 0),
], ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("same", [False, True])
def test_packed(kind, see, same):
    sizes = [(k, k) for _, k in PACKED] if same else PACKED
    rows, keys = zip(*sizes)
    q, k, v = leaves = draw(1, sum(rows), H, K), draw(1, sum(keys), 2, K), draw(1, sum(keys), 2, KV)
    bias = kind.from_seqlens(rows) if same else kind.from_seqlens(rows, keys)
    agree(xf.memory_efficient_attention(q, k, v, bias), eager(q, k, v, blocks([see(*size) for size in sizes])), leaves)


def test_the_ways_to_causal_blocks():
    bias = xf.BlockDiagonalMask.from_seqlens([2, 3])
    assert type(bias.make_causal()) is xf.BlockDiagonalCausalMask
    assert type(bias.make_causal_from_bottomright()) is xf.BlockDiagonalCausalFromBottomRightMask
    with pytest.raises(ValueError, match="sequence 1 has 3 queries and 2 keys"):
        xf.BlockDiagonalCausalFromBottomRightMask.from_seqlens([2, 3], [4, 2])


def test_packing_a_list_and_back():
    tensors = [torch.randn(2, 3, H, K), torch.randn(1, 6, H, K)]
    bias, x = xf.BlockDiagonalMask.from_tensor_list(tensors)
    assert x.shape == (1, 12, H, K) and bias.q_seqinfo.seqstart_py == [0, 3, 6, 12]
    out = bias.split(xf.memory_efficient_attention(x, x, x, bias))
    for part, own in zip(out, tensors):
        torch.testing.assert_close(part, xf.memory_efficient_attention(own, own, own), rtol=1e-5, atol=1e-5)
    keys = [torch.randn(2, 4, H, K), torch.randn(1, 2, H, K)]
    bias, q, k, v = xf.BlockDiagonalMask.from_tensor_lists_qkv(tensors, keys, keys)
    assert (q.shape[1], k.shape[1], v.shape[1]) == (12, 10, 10)
    assert [x.shape[:2] for x in bias.split_kv(k)] == [(2, 4), (1, 2)]


@pytest.mark.parametrize("causal", [False, True])
def test_padded_keys(causal):
    """What lies behind a sequence's used keys is NaN, and never read."""
    rows, used, padding = [1, 3, 2], [4, 3, 6], 6
    kind = xf.BlockDiagonalCausalWithOffsetPaddedKeysMask if causal else xf.BlockDiagonalPaddedKeysMask
    bias = kind.from_seqlens(rows, padding, used)
    q, k, v = (x.detach() for x in (draw(1, 6, H, K), draw(1, 18, 2, K), draw(1, 18, 2, KV)))
    parts, start = [], 0
    for i, (m, n) in enumerate(zip(rows, used)):
        keys = slice(padding * i, padding * i + n)
        see = distance(m, n, n - m) <= 0 if causal else torch.ones(m, n, dtype=torch.bool)
        parts.append(eager(q[:, start:start + m], k[:, keys], v[:, keys], allowed(see)))
        k[:, keys.stop:padding * (i + 1)] = v[:, keys.stop:padding * (i + 1)] = math.nan
        start += m
    out = xf.memory_efficient_attention(q, k, v, bias)
    torch.testing.assert_close(out, torch.cat(parts, 1), rtol=1e-10, atol=1e-10)


def test_dropout():
    q, k, v = draw(B, MQ, H, K), draw(B, MK, H, K), draw(B, MK, H, KV)
    torch.manual_seed(3)
    out = xf.memory_efficient_attention(q, k, v, p=0.5)
    assert not torch.equal(out, xf.memory_efficient_attention(q, k, v, p=0.5))
    torch.manual_seed(3)
    assert torch.equal(out, xf.memory_efficient_attention(q, k, v, p=0.5))


@pytest.mark.parametrize("options, words", [
    (dict(op=("a", "b")), ["op", "None"]), (dict(output_dtype=torch.float16), ["output_dtype", "float16"]),
    (dict(attn_bias=torch.ones(MQ, MQ, dtype=torch.bool)), ["attn_bias", "bool"]), (dict(p=2.0), ["2.0"]),
    (dict(attn_bias=xf.BlockDiagonalMask.from_seqlens([MQ])), ["batch of 1", f"({B}, "]),
], ids=lambda x: next(iter(x)) if isinstance(x, dict) else None)
def test_refusals(options, words):
    x = torch.randn(B, MQ, H, K)
    with pytest.raises((ValueError, RuntimeError)) as caught:
        xf.memory_efficient_attention(x, x, x, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
