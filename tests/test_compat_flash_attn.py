"""flashattn_ext.compat.flash_attn: the names, order, defaults and meaning of the flash-attn package, held to loops."""

import inspect
import math

import pytest
import torch

import naive
from flashattn_ext.compat import flash_attn
from flashattn_ext.compat.flash_attn import bert_padding

SHARED = dict(dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
              deterministic=False, return_attn_probs=False)
LENGTHS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
# The signatures of flash-attn 2.8: names of the required arguments, then those with a default.
SIGNATURES = {
    "flash_attn_func": (["q", "k", "v"], SHARED),
    "flash_attn_kvpacked_func": (["q", "kv"], SHARED),
    "flash_attn_qkvpacked_func": (["qkv"], SHARED),
    "flash_attn_varlen_func": (["q", "k", "v", *LENGTHS], {**SHARED, "block_table": None}),
    "flash_attn_varlen_kvpacked_func": (["q", "kv", *LENGTHS], SHARED),
    "flash_attn_varlen_qkvpacked_func": (["qkv", "cu_seqlens", "max_seqlen"], SHARED),
    "flash_attn_with_kvcache": (["q", "k_cache", "v_cache"], dict(
        k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None,
        block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True,
        alibi_slopes=None, num_splits=0, return_softmax_lse=False)),
}
OPTIONS = {
    "full": {}, "causal": dict(causal=True), "window": dict(window_size=(3, 1)), "left": dict(window_size=(2, -1)),
    "causal-window": dict(causal=True, window_size=(2, 5)), "softcap": dict(softcap=1.5, causal=True),
    "no-softcap": dict(softcap=-1.0), "scale": dict(softmax_scale=0.4),
    "alibi": dict(alibi=1), "alibi-causal": dict(alibi=2, causal=True),
    "everything": dict(alibi=2, softcap=2.0, softmax_scale=0.7, window_size=(4, 2)),
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def made(options, batch, heads):
    """A call's options, and those of the loops for each sequence of the batch."""
    options = dict(options)
    alibi = options.pop("alibi", 0)
    if not alibi:
        return options, [options] * batch
    slopes = torch.rand(heads) if alibi == 1 else torch.rand(batch, heads)
    rows = slopes.expand(batch, heads)
    return {**options, "alibi_slopes": slopes}, [{**options, "alibi_slopes": row} for row in rows]


def looped(q, k, v, causal=False, window_size=(-1, -1), softcap=0.0, softmax_scale=None, alibi_slopes=None):
    """One sequence, row by row: q (SQ, HQ, D), k, v (SK, HK, D) -> out (SQ, HQ, DV) and lse (HQ, SQ), differentiable."""
    (SQ, HQ, D), SK = q.shape, k.shape[0]
    group = HQ // k.shape[1]
    left, right = window_size[0], 0 if causal else window_size[1]
    out, lse = [], []
    for i in range(SQ):
        at = i + SK - SQ
        low = 0 if left < 0 else max(0, at - left)
        high = SK if right < 0 else min(SK, at + right + 1)
        for h in range(HQ):
            if low >= high:
                out.append(v.new_zeros(v.shape[-1]) + 0 * q[i, h].sum())
                lse.append(v.new_tensor(-math.inf))
                continue
            scores = k[low:high, h // group] @ q[i, h] * (D**-0.5 if softmax_scale is None else softmax_scale)
            if softcap > 0:
                scores = softcap * (scores / softcap).tanh()
            if alibi_slopes is not None:
                scores = scores - alibi_slopes[h].to(q.dtype) * (torch.arange(low, high) - at).abs()
            out.append(scores.softmax(0) @ v[low:high, h // group])
            lse.append(scores.logsumexp(0))
    shape = (SQ, HQ)
    return (torch.stack(out).unflatten(0, shape) if out else q.new_zeros(*shape, v.shape[-1]),
            torch.stack(lse).unflatten(0, shape).T if lse else q.new_zeros(HQ, SQ))


def close(got, want, dtype=torch.float64):
    bound = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(got.double(), want.double(), rtol=bound, atol=bound)


def gradients(out, leaves, seed=3):
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad(out, leaves, upstream.to(out.dtype))


def packed_lengths(lengths):
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    required, defaults = SIGNATURES[name]
    parameters = inspect.signature(getattr(flash_attn, name)).parameters
    assert list(parameters) == [*required, *defaults]
    assert {n: p.default for n, p in parameters.items() if p.default is not p.empty} == defaults
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())


def test_it_stands_in_for_the_package(monkeypatch):
    """What programs write: both import paths, under the package's own name."""
    import sys

    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", bert_padding)
    from flash_attn import flash_attn_func
    from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input  # noqa: F401

    assert flash_attn_func is flash_attn.flash_attn_func
    assert flash_attn.bert_padding is bert_padding


# ---- sequences of one length ----------------------------------------------------------------------------------------


@every_option
@pytest.mark.parametrize("queries, keys", [(6, 6), (4, 9), (7, 3), (1, 8)])
def test_dense(options, queries, keys):
    B, HQ, HK, D, DV = 2, 4, 2, 8, 6
    q, k, v = draw(B, queries, HQ, D), draw(B, keys, HK, D), draw(B, keys, HK, DV)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    call, loops = made(options, B, HQ)
    want, want_lse = (torch.stack(part) for part in zip(*(looped(*row, **own) for *row, own in zip(q, k, v, loops))))
    out, lse, probabilities = flash_attn.flash_attn_func(q, k, v, **call, return_attn_probs=True)
    assert out.shape == (B, queries, HQ, DV) and lse.shape == (B, HQ, queries) and probabilities.numel() == 0
    close(out, want)
    close(lse, want_lse)
    for got, exact in zip(gradients(out, leaves), gradients(want, leaves)):
        close(got, exact)
    alone = flash_attn.flash_attn_func(q.detach(), k.detach(), v.detach(), **call)
    close(alone, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_in_short_precisions(dtype):
    q, k, v = draw(2, 70, 4, 32, dtype=dtype), draw(2, 90, 2, 32, dtype=dtype), draw(2, 90, 2, 32, dtype=dtype)
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(40, 0), return_attn_probs=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    for b in range(2):
        want, want_lse = looped(q[b].double(), k[b].double(), v[b].double(), causal=True, window_size=(40, 0))
        close(out[b], want, dtype)
        close(lse[b], want_lse, torch.float32)


@every_option
def test_packed_arguments_are_views(options):
    B, S, H, D = 2, 5, 3, 8
    call, _ = made(options, B, H)
    qkv = draw(B, S, 3, H, D).requires_grad_()
    q, k, v = (x.detach().requires_grad_() for x in qkv.unbind(2))
    want = flash_attn.flash_attn_func(q, k, v, **call)
    exact = torch.stack(gradients(want, (q, k, v)), 2)
    out = flash_attn.flash_attn_qkvpacked_func(qkv, **call)
    close(out, want)
    close(gradients(out, qkv)[0], exact)
    out = flash_attn.flash_attn_kvpacked_func(q, qkv[:, :, 1:], **call)
    close(out, want)
    close(gradients(out, qkv)[0][:, :, 1:], exact[:, :, 1:])


# ---- packed sequences -----------------------------------------------------------------------------------------------

RAGGED = [(3, 5), (0, 4), (6, 2), (4, 0), (1, 7), (5, 5)]  # queries and keys of each sequence


@every_option
def test_varlen(options):
    HQ, HK, D, B = 4, 2, 8, len(RAGGED)
    rows, keys = zip(*RAGGED)
    q, k, v = draw(sum(rows) + 2, HQ, D), draw(sum(keys) + 1, HK, D), draw(sum(keys) + 1, HK, D)
    for x, used in ((q, sum(rows)), (k, sum(keys)), (v, sum(keys))):
        x[used:] = math.nan  # rows that belong to no sequence
    leaves = [x.requires_grad_() for x in (q, k, v)]
    call, loops = made(options, B, HQ)
    parts = zip(q[:sum(rows)].split(rows), k[:sum(keys)].split(keys), v[:sum(keys)].split(keys), loops)
    want, want_lse = (torch.cat(part, axis) for part, axis in
                      zip(zip(*(looped(*tensors, **own) for *tensors, own in parts)), (0, 1)))
    lengths = (packed_lengths(rows), packed_lengths(keys), max(rows), max(keys))
    out, lse, probabilities = flash_attn.flash_attn_varlen_func(q, k, v, *lengths, **call, return_attn_probs=True)
    assert lse.shape == (HQ, len(q)) and probabilities.numel() == 0
    close(out[:sum(rows)], want)
    close(lse[:, :sum(rows)], want_lse)
    assert not out[sum(rows):].any()
    got = gradients(out[:sum(rows)], leaves)
    for mine, exact in zip(got, gradients(want, leaves)):
        close(mine, exact)


def test_varlen_packed_arguments():
    qkv = draw(9, 3, 2, 8).requires_grad_()
    cu = packed_lengths([4, 0, 5])
    q, k, v = qkv.unbind(1)
    want = flash_attn.flash_attn_varlen_func(q, k, v, cu, cu, 5, 5, causal=True)
    exact = gradients(want, qkv)[0]
    for out in (flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu, 5, causal=True),
                flash_attn.flash_attn_varlen_kvpacked_func(q, qkv[:, 1:], cu, cu, 5, 5, causal=True)):
        close(out, want)
        close(gradients(out, qkv)[0], exact)


@every_option
def test_varlen_paged(options):
    """Pages in any order; what is behind a sequence's end holds NaN, and the table wild numbers."""
    HQ, HK, D, page = 4, 2, 8, 3
    rows, keys = zip(*RAGGED)
    q = draw(sum(rows), HQ, D)
    tokens = [(draw(n, HK, D), draw(n, HK, D)) for n in keys]
    k_pages, v_pages = (torch.full((20, page, HK, D), math.nan, dtype=torch.float64) for _ in range(2))
    free = torch.randperm(20).tolist()
    table = torch.full((len(keys), 4), 10**9, dtype=torch.int32)
    for b, (k, v) in enumerate(tokens):
        for j in range(0, len(k), page):
            table[b, j // page] = at = free.pop()
            for pages, x in ((k_pages, k), (v_pages, v)):
                pages[at, :len(x[j:j + page])] = x[j:j + page]
    call, loops = made(options, len(keys), HQ)
    want = torch.cat([looped(own_q, *kv, **own)[0] for own_q, kv, own in zip(q.split(rows), tokens, loops)])
    out = flash_attn.flash_attn_varlen_func(q, k_pages, v_pages, packed_lengths(rows), packed_lengths(keys), max(rows),
                                            max(keys), **call, block_table=table)
    close(out, want)


# ---- dropout --------------------------------------------------------------------------------------------------------


def dropped(weights, p):
    return weights.clamp(min=0) * naive.dropout_factor(p)


@every_option
@pytest.mark.parametrize("queries, keys", [(6, 6), (4, 9)])
def test_dropout_is_the_one_that_the_third_result_shows(options, queries, keys):
    B, HQ, HK, D, p = 2, 4, 2, 8, 0.4
    q, k, v = draw(B, queries, HQ, D), draw(B, keys, HK, D), draw(B, keys, HK, D).requires_grad_()
    call, loops = made(options, B, HQ)
    torch.manual_seed(5)
    out, lse, weights = flash_attn.flash_attn_func(q, k, v, p, **call, return_attn_probs=True)
    assert weights.shape == (B, HQ, queries, keys)
    identity = torch.eye(keys, dtype=torch.float64)[:, None].expand(-1, HK, -1)
    full = torch.stack([looped(q[b], k[b], identity, **loops[b])[0] for b in range(B)]).transpose(1, 2)
    close(weights.abs(), full)
    assert (weights < 0).any() and (weights > 0).any()
    values = v.repeat_interleave(HQ // HK, 2)
    want = torch.einsum("bhij,bjhd->bihd", dropped(weights, p), values)
    close(out, want)
    close(gradients(out, v)[0], gradients(want, v)[0])
    torch.manual_seed(5)
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, p, **call), out)
    assert not torch.equal(flash_attn.flash_attn_func(q, k, v, p, **call), out)


def test_dropout_of_packed_sequences():
    HQ, HK, D, p = 4, 2, 8, 0.3
    rows, keys = zip(*RAGGED)
    q, k, v = draw(sum(rows), HQ, D), draw(sum(keys), HK, D), draw(sum(keys), HK, D).requires_grad_()
    lengths = (packed_lengths(rows), packed_lengths(keys), max(rows), max(keys))
    torch.manual_seed(7)
    out, _, weights = flash_attn.flash_attn_varlen_func(q, k, v, *lengths, p, causal=True, return_attn_probs=True)
    assert weights.shape == (len(rows), HQ, max(rows), max(keys))
    want = []
    for b, (own_q, own_v) in enumerate(zip(q.split(rows), v.split(keys))):
        seen = dropped(weights[b, :, :len(own_q), :len(own_v)], p)
        want.append(torch.einsum("hij,jhd->ihd", seen, own_v.repeat_interleave(HQ // HK, 1)))
    want = torch.cat(want)
    close(out, want)
    close(gradients(out, v)[0], gradients(want, v)[0])
    torch.manual_seed(7)
    assert torch.equal(flash_attn.flash_attn_varlen_func(q, k, v, *lengths, p, causal=True), out)


def test_dropping_everything():
    q, k, v = draw(2, 5, 2, 8).requires_grad_(), draw(2, 5, 2, 8), draw(2, 5, 2, 8)
    out = flash_attn.flash_attn_func(q, k, v, 1.0)
    assert not out.any() and not gradients(out, q)[0].any()


# ---- a step of generation -------------------------------------------------------------------------------------------


class Cache:
    """Three sequences in a cache of five rows, each behind some padding; what holds no token is NaN."""

    B, HQ, HK, D, room = 3, 4, 2, 16, 12
    rows, pads, lengths = [3, 0, 4], [2, 0, 5], [6, 0, 9]  # lengths count the padding

    def __init__(self, new, padded):
        self.pads = Cache.pads if padded else [0, 0, 0]
        self.k, self.v = (torch.full((5, self.room, self.HK, self.D), math.nan, dtype=torch.float64) for _ in "kv")
        for row, pad, n in zip(self.rows, self.pads, self.lengths):
            for x in (self.k, self.v):
                x[row, pad:n] = draw(n - pad, self.HK, self.D)
        self.k_new, self.v_new = (draw(self.B, new, self.HK, self.D) if new else None for _ in "kv")
        self.seqlens = torch.tensor(self.lengths, dtype=torch.int32)
        self.batch_idx = torch.tensor(self.rows, dtype=torch.int32)
        self.leftpad = torch.tensor(self.pads, dtype=torch.int32) if padded else None

    def after(self, k_new):
        """What each sequence holds once k_new and v_new are appended."""
        held = []
        for b, (row, pad, n) in enumerate(zip(self.rows, self.pads, self.lengths)):
            k, v = self.k[row, pad:n], self.v[row, pad:n]
            if k_new is not None:
                k, v = torch.cat([k, k_new[b]]), torch.cat([v, self.v_new[b]])
            held.append((k, v))
        return held


def turned(x, cos, sin, positions, interleaved):
    """Rotary embedding of x (S, H, D), pair by pair."""
    out, half = x.clone(), cos.shape[1]
    for s, at in enumerate(positions):
        for r in range(half):
            i, j = (2 * r, 2 * r + 1) if interleaved else (r, r + half)
            out[s, :, i] = x[s, :, i] * cos[at, r] - x[s, :, j] * sin[at, r]
            out[s, :, j] = x[s, :, j] * cos[at, r] + x[s, :, i] * sin[at, r]
    return out


def rotation(positions, R):
    angles = torch.rand(positions, R // 2, dtype=torch.float64) * 6
    return angles.cos(), angles.sin()


@every_option
@pytest.mark.parametrize("new", [0, 1, 3])
@pytest.mark.parametrize("padded", [False, True], ids=["", "left-padded"])
def test_kvcache(options, new, padded):
    cache = Cache(new, padded)
    q = draw(cache.B, max(new, 1), cache.HQ, cache.D)
    call, loops = made(options, cache.B, cache.HQ)
    held = cache.after(cache.k_new)
    before = cache.k.clone()
    out, lse = flash_attn.flash_attn_with_kvcache(
        q, cache.k, cache.v, cache.k_new, cache.v_new, cache_seqlens=cache.seqlens, cache_batch_idx=cache.batch_idx,
        cache_leftpad=cache.leftpad, return_softmax_lse=True, num_splits=2, **call)
    for b, (k, v) in enumerate(held):
        want, want_lse = looped(q[b], k, v, **loops[b])
        close(out[b], want)
        close(lse[b], want_lse)
    for b, (row, n) in enumerate(zip(cache.rows, cache.lengths)):
        if new:
            assert torch.equal(cache.k[row, n:n + new], cache.k_new[b])
            before[row, n:n + new] = cache.k_new[b]
    assert torch.equal(cache.k.nan_to_num(99.0), before.nan_to_num(99.0)), "wrote beside the new keys"
    assert cache.seqlens.tolist() == cache.lengths


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("options", [{}, dict(causal=True), dict(window_size=(4, 0)), dict(window_size=(50, 50))], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["", "left-padded"])
@pytest.mark.parametrize("new, queries", [(1, 1), (3, 3)])
def test_kvcache_turns_new_keys_and_queries(options, interleaved, padded, new, queries):
    """By their position in the cache, padding included; without causal or a window all queries turn alike."""
    cache = Cache(new, padded)
    cos, sin = rotation(20, 8)
    q = draw(cache.B, queries, cache.HQ, cache.D)
    k_new = torch.stack([turned(cache.k_new[b], cos, sin, range(n, n + new), interleaved)
                         for b, n in enumerate(cache.lengths)])
    held = cache.after(k_new)
    given = {} if interleaved else dict(rotary_interleaved=False)
    out = flash_attn.flash_attn_with_kvcache(
        q, cache.k, cache.v, cache.k_new, cache.v_new, cos, sin, cache_seqlens=cache.seqlens,
        cache_batch_idx=cache.batch_idx, cache_leftpad=cache.leftpad, **given, **options)
    local = options.get("causal") or options.get("window_size") == (4, 0)
    for b, n in enumerate(cache.lengths):
        positions = [n + i if local else n for i in range(queries)]
        want, _ = looped(turned(q[b], cos, sin, positions, interleaved), *held[b], **options)
        close(out[b], want)
        close(cache.k[cache.rows[b], n:n + new], k_new[b])


@pytest.mark.parametrize("seqlens", [None, 5], ids=["full cache", "int"])
def test_kvcache_lengths_for_all(seqlens):
    q, k, v = draw(2, 1, 4, 8), draw(2, 7, 2, 8), draw(2, 7, 2, 8)
    out = flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=seqlens)
    for b in range(2):
        close(out[b], looped(q[b], k[b, :seqlens], v[b, :seqlens])[0])


def test_kvcache_paged():
    """Three tokens a page, pages in any order; new keys cross from one page into the next."""
    B, HQ, HK, D, page, lengths = 3, 4, 2, 8, 3, [5, 0, 8]
    table = torch.randperm(20)[:B * 4].view(B, 4).to(torch.int32)
    tokens = [(draw(n, HK, D), draw(n, HK, D)) for n in lengths]
    k_pages, v_pages = (torch.full((20, page, HK, D), math.nan, dtype=torch.float64) for _ in "kv")
    for b, kv in enumerate(tokens):
        for pages, x in zip((k_pages, v_pages), kv):
            for t, token in enumerate(x):
                pages[table[b, t // page], t % page] = token
    q, k_new, v_new = draw(B, 2, HQ, D), draw(B, 2, HK, D), draw(B, 2, HK, D)
    out = flash_attn.flash_attn_with_kvcache(q, k_pages, v_pages, k_new, v_new, block_table=table, causal=True,
                                             cache_seqlens=torch.tensor(lengths, dtype=torch.int32))
    for b, (k, v) in enumerate(tokens):
        close(out[b], looped(q[b], torch.cat([k, k_new[b]]), torch.cat([v, v_new[b]]), causal=True)[0])


# ---- refusals -------------------------------------------------------------------------------------------------------


def ones(*shape):
    return torch.ones(*shape)


CACHE = dict(q=ones(1, 1, 2, 8), k_cache=ones(1, 4, 2, 8), v_cache=ones(1, 4, 2, 8))
ONE = torch.zeros(1, dtype=torch.int32)


@pytest.mark.parametrize("name, arguments, words", [
    ("flash_attn_func", dict(q=ones(3, 2, 8), k=ones(1, 3, 2, 8), v=ones(1, 3, 2, 8)), ["q", "4", "(3, 2, 8)"]),
    ("flash_attn_func", dict(q=ones(1, 3, 3, 8), k=ones(1, 3, 2, 8), v=ones(1, 3, 2, 8)), ["3", "2"]),
    ("flash_attn_func", dict(q=ones(1, 3, 2, 8), k=ones(1, 3, 2, 8), v=ones(1, 3, 2, 8), dropout_p=1.5), ["1.5"]),
    ("flash_attn_kvpacked_func", dict(q=ones(1, 3, 2, 8), kv=ones(1, 3, 3, 2, 8)), ["kv", "2", "(1, 3, 3, 2, 8)"]),
    ("flash_attn_qkvpacked_func", dict(qkv=ones(1, 3, 2, 2, 8)), ["qkv", "3", "(1, 3, 2, 2, 8)"]),
    ("flash_attn_varlen_qkvpacked_func", dict(qkv=ones(3, 2, 2, 8), cu_seqlens=ONE, max_seqlen=3), ["qkv", "T, 3"]),
    ("flash_attn_with_kvcache", dict(CACHE, k=ones(1, 1, 2, 8)), ["k and v", "together"]),
    ("flash_attn_with_kvcache", dict(CACHE, k=ones(1, 1, 2, 8), v=ones(1, 1, 2, 8)), ["cache_seqlens", "None"]),
    ("flash_attn_with_kvcache", dict(CACHE, rotary_cos=ones(4, 4), rotary_sin=ones(4, 4)), ["rotary_cos", "k=None"]),
    ("flash_attn_with_kvcache", dict(CACHE, rotary_cos=ones(4, 4)), ["rotary_sin", "together"]),
    ("flash_attn_with_kvcache", dict(CACHE, block_table=ONE[None], cache_batch_idx=ONE), ["block_table", "batch_idx"]),
    ("flash_attn_with_kvcache", dict(CACHE, block_table=ONE[None], cache_leftpad=ONE), ["block_table", "leftpad"]),
    ("flash_attn_with_kvcache", dict(CACHE, k=ones(1, 2, 2, 8), v=ones(1, 2, 2, 8), cache_seqlens=3), ["3"]),
    ("flash_attn_with_kvcache", dict(CACHE, cache_seqlens=3, cache_batch_idx=ONE + 1), ["batch_idx[0]", "1", "0"]),
    ("flash_attn_with_kvcache", dict(CACHE, cache_batch_idx=ONE[None]), ["cache_batch_idx", "(1,)", "(1, 1)"]),
    ("flash_attn_with_kvcache", dict(CACHE, cache_seqlens=3, cache_leftpad=ONE + 4), ["cache_leftpad[0]", "3", "4"]),
    ("flash_attn_with_kvcache", dict(CACHE, cache_leftpad=ONE - 1), ["cache_leftpad[0]", "-1"]),
    ("flash_attn_with_kvcache", dict(CACHE, k=ones(1, 1, 2, 8), v=ones(1, 1, 2, 8), cache_seqlens=4,
                                     cache_leftpad=ONE + 1), ["cache_seqlens[0]", "3", "4"]),
    ("flash_attn_with_kvcache", dict(CACHE, q=ones(1, 2, 2, 8), k=ones(1, 1, 2, 8), v=ones(1, 1, 2, 8), cache_seqlens=2,
                                     rotary_cos=ones(2, 4), rotary_sin=ones(2, 4)), ["rotary_cos", "2 positions"]),
    ("flash_attn_with_kvcache", dict(CACHE, q=ones(1, 2, 2, 8), k=ones(1, 1, 2, 8), v=ones(1, 1, 2, 8), cache_seqlens=2,
                                     rotary_cos=ones(9, 5), rotary_sin=ones(9, 5)), ["rotary_cos", "8", "(9, 5)"]),
], ids=lambda x: x if isinstance(x, str) else None)
def test_refusals_name_what_was_seen_and_what_is_allowed(name, arguments, words):
    before = {key: x.clone() for key, x in arguments.items() if isinstance(x, torch.Tensor)}
    with pytest.raises((RuntimeError, ValueError)) as caught:
        getattr(flash_attn, name)(**arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert all(torch.equal(arguments[key], x) for key, x in before.items()), "a refused call wrote"


def test_padding_in_front_of_a_cache_that_cannot_be_cut_into_tokens():
    k = torch.ones(2, 8, 2, 8)[:, :4]  # a gap behind each row
    with pytest.raises(RuntimeError, match="cache_leftpad.*strides"):
        flash_attn.flash_attn_with_kvcache(ones(2, 1, 2, 8), k, k, cache_seqlens=3,
                                           cache_leftpad=torch.tensor([1, 0], dtype=torch.int32))


# ---- bert_padding ---------------------------------------------------------------------------------------------------


def test_unpad_and_pad():
    x = draw(3, 5, 2, 4).requires_grad_()
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    rows, indices, cu, longest, used = bert_padding.unpad_input(x, mask)
    assert rows.shape == (8, 2, 4) and indices.tolist() == [0, 1, 3, 10, 11, 12, 13, 14]
    assert cu.dtype == used.dtype == torch.int32 and cu.tolist() == [0, 3, 3, 8] and used.tolist() == [3, 0, 5]
    assert longest == 5 and isinstance(longest, int)
    assert torch.equal(rows, x[mask.bool()])
    back = bert_padding.pad_input(rows, indices, 3, 5)
    assert torch.equal(back, x * mask[..., None, None])
    close(gradients(back, x)[0], gradients(x * mask[..., None, None], x)[0])


def test_unpad_keeps_unused_rows():
    mask, unused = torch.tensor([[1, 0, 0], [1, 1, 0]]), torch.tensor([[0, 1, 0], [0, 0, 0]])
    rows, indices, cu, longest, used = bert_padding.unpad_input(draw(2, 3, 4), mask, unused)
    assert indices.tolist() == [0, 1, 3, 4] and cu.tolist() == [0, 2, 4] and longest == 2 and used.tolist() == [1, 2]


def test_unpad_concatenated_sequences():
    x = draw(3, 6, 4)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    rows, indices, cu, longest = bert_padding.unpad_input_for_concatenated_sequences(x, lengths)
    assert cu.tolist() == [0, 2, 5, 8, 10, 16] and longest == 6 and cu.dtype == torch.int32
    assert torch.equal(rows, torch.cat([x[0, :5], x[1, :5], x[2]]))
    assert torch.equal(rows, x.flatten(0, 1)[indices])


def test_rows_by_index():
    x, at = draw(6, 2, 3).requires_grad_(), torch.tensor([4, 0, 5])
    rows, same = bert_padding.index_first_axis_residual(x, at)
    assert torch.equal(rows, x[at]) and torch.equal(same, x) and not same.requires_grad
    close(gradients(bert_padding.index_first_axis(x, at), x)[0], gradients(x[at], x)[0])
    put = bert_padding.index_put_first_axis(rows, at, 7)
    assert torch.equal(put[at], rows) and not put[[1, 2, 3, 6]].any() and put.shape == (7, 2, 3)


def test_padded_attention_by_way_of_packing():
    """What BERT-like programs do: unpad, attend, pad."""
    B, S, H, D = 3, 7, 2, 8
    qkv = draw(B, S, 3, H, D)
    lengths = [7, 3, 1]
    mask = torch.arange(S)[None] < torch.tensor(lengths)[:, None]
    rows, indices, cu, longest, _ = bert_padding.unpad_input(qkv, mask)
    out = bert_padding.pad_input(flash_attn.flash_attn_varlen_qkvpacked_func(rows, cu, longest), indices, B, S)
    for b, n in enumerate(lengths):
        close(out[b, :n], looped(*qkv[b, :n].unbind(1))[0])
        assert not out[b, n:].any()
