"""One step of generation: values, append, rotary embedding, pages, quantised caches, refusals, batch invariance."""

import math

import pytest
import torch

import flashattn_ext as fa
from compare import check
from sequences import (DTYPES, FLOATS, QUANTISED, dequantise, eager, name_of, normal, of_sequence, opcheck, paginate,
                       quantise, same_bits, turning)

pytestmark = pytest.mark.usefixtures("device")

KINDS = ("tensor", "head", "sequence", "token")
LENGTHS = [0, 5, 64, 66, 1]
OPTIONS = {
    "causal": {},
    "full": dict(causal=False),
    "window": dict(window=(9, None)),
    "window_both": dict(window=(9, 2), causal=False),
    "softcap": dict(softcap=1.5),
    "scale": dict(scale=-0.4),
    "sinks": dict(sinks=True),
    "alibi": dict(alibi=True),
    "everything": dict(window=(30, None), softcap=4.0, scale=0.3, sinks=True, alibi=True),
}


class Step:
    """Random inputs of one step: B sequences of these lengths in a cache of `room` rows, and SQ new tokens."""

    def __init__(self, dtype=torch.float32, SQ=1, lengths=LENGTHS, room=70, HQ=4, HK=2, D=16, DV=None, **options):
        B, DV = len(lengths), DV or D
        self.dtype, self.lengths, self.seqlens = dtype, lengths, torch.tensor(lengths, dtype=torch.int32)
        self.q = normal(B, SQ, HQ, D, dtype=dtype)
        self.k, self.v = normal(B, room, HK, D, dtype=dtype), normal(B, room, HK, DV, dtype=dtype)
        self.k_new, self.v_new = normal(B, SQ, HK, D, dtype=dtype), normal(B, SQ, HK, DV, dtype=dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        if options.pop("sinks", False):
            options["sinks"] = normal(HQ, dtype=wide)
        if options.pop("alibi", False):
            options["alibi_slopes"] = torch.rand(HQ).to(wide) * 0.3
        self.options = options

    def new(self):
        return dict(k_new=self.k_new, v_new=self.v_new)

    def call(self, function=fa.decode_attention, **changes):
        """(out, lse) of these inputs, or of others that are named; the caches themselves are written."""
        given = dict(query=self.q, k_cache=self.k, v_cache=self.v, cache_seqlens=self.seqlens)
        given.update({name: changes.pop(name) for name in list(changes) if name in given})
        return function(**given, return_lse=True, **{**self.options, **changes})

    def eager(self, q, k, v, lengths, **options):
        """Eager attention in the precision of q, k and v: dense caches (B, S, HK, D), each to its length."""
        options = {"causal": True, **self.options, **options}
        parts = [eager(q[b], k[b, :n], v[b, :n], **of_sequence(options, b)) for b, n in enumerate(lengths)]
        return torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])

    def check(self, got, ref, lengths, k=None, v=None, q=None, least=1.0, **options):
        """The acceptance rule: got and ref are (out, lse)."""
        q, k, v = self.q if q is None else q, self.k if k is None else k, self.v if v is None else v
        k, v = k.to(self.dtype), v.to(self.dtype)
        out = self.eager(q, k, v, lengths, **options)[0]
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        lse = self.eager(q.to(wide), k.to(wide), v.to(wide), lengths, **options)[1]
        check("out", got[0], ref[0], [out], self.dtype, least)
        check("lse", got[1], ref[1], [lse], self.dtype, least)


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("SQ", [1, 2, 5, 16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values(options, SQ, dtype):
    step = Step(dtype, SQ, **OPTIONS[options])
    step.check(step.call(), step.call(fa.reference.decode_attention), LENGTHS)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("HQ,HK,D,DV",
                         [(1, 1, 1, 1), (8, 1, 64, 64), (6, 2, 40, 24), (3, 3, 129, 65), (16, 2, 128, 128)])
def test_heads_and_dimensions(HQ, HK, D, DV, dtype):
    step = Step(dtype, 1, HQ=HQ, HK=HK, D=D, DV=DV)
    step.check(step.call(), step.call(fa.reference.decode_attention), LENGTHS)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("SQ", [1, 4, 64])
def test_long_caches(dtype, SQ):
    lengths = [3000, 1, 1777]
    step = Step(dtype, SQ, lengths, 3000, HQ=8, HK=2, D=64)
    step.check(step.call(), step.call(fa.reference.decode_attention), lengths)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_results(dtype):
    step = Step(dtype, 3, DV=24)
    out, lse = step.call()
    assert out.shape == (5, 3, 4, 24) and out.dtype == dtype and out.is_contiguous()
    assert lse.shape == (5, 4, 3) and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert out[0].eq(0).all() and lse[0].eq(-math.inf).all()
    plain = fa.decode_attention(step.q, step.k, step.v, step.seqlens)
    assert same_bits(plain, out)


def test_nothing_to_do():
    for lengths, SQ in (([], 1), ([0, 3], 0), ([0, 0], 2)):
        step = Step(SQ=SQ, lengths=lengths)
        out, lse = step.call()
        assert out.shape == (len(lengths), SQ, 4, 16) and lse.shape == (len(lengths), 4, SQ)
        assert out[lse.transpose(1, 2) == -math.inf].eq(0).all()
    step, (cos, sin) = Step(SQ=2, lengths=[]), turning(80, 8)
    for call in (fa.decode_attention, fa.reference.decode_attention):
        assert step.call(call, **step.new(), rope_cos=cos, rope_sin=sin)[0].shape == (0, 2, 4, 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_out_is_written(dtype):
    step = Step(dtype, 2, DV=24)
    want, want_lse = step.call()
    room = torch.full((5, 2, 4, 30), math.nan, dtype=dtype)
    out = room[..., 3:27]
    got, lse = step.call(out=out)
    assert got is out and torch.equal(out, want) and torch.equal(lse, want_lse)
    assert room[..., :3].isnan().all() and room[..., 27:].isnan().all()
    assert fa.decode_attention(step.q, step.k, step.v, step.seqlens, out=out) is out


def test_layouts_give_the_same_bits():
    step = Step(SQ=2)
    want, want_lse = step.call()
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (step.q, step.k, step.v)]
    lengths = torch.stack([step.seqlens.long(), step.seqlens.long() * 0 - 1], 1)[:, 0]
    for q, k, v in (heads_first, (step.q, heads_first[1], step.v)):
        out, lse = step.call(query=q, k_cache=k, v_cache=v, cache_seqlens=lengths)
        assert torch.equal(out, want) and torch.equal(lse, want_lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_keys_past_the_length_are_never_read(dtype):
    step = Step(dtype, 2)
    want = step.call()
    for b, length in enumerate(LENGTHS):
        step.k[b, length:] = step.v[b, length:] = math.nan
    assert all(torch.equal(a, b) for a, b in zip(step.call(), want))


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512bf16"], indirect=True)
@pytest.mark.parametrize("SQ", [1, 3, 20])
def test_every_instruction_set(isa, SQ):
    for dtype in FLOATS:
        step = Step(dtype, SQ, D=64, window=(50, None), softcap=3.0)
        step.check(step.call(), step.call(fa.reference.decode_attention), LENGTHS)
        test_pages(dtype, 16, SQ)
        for stored in QUANTISED:
            test_quantised(dtype, stored, "token", SQ)
            test_quantised(dtype, stored, "head", SQ)


# ---- append ----------------------------------------------------------------------------------------------------------


def after(lengths, SQ):
    return [length + SQ for length in lengths]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("SQ", [1, 4])
def test_append(dtype, SQ):
    """New keys are written where they belong, and nowhere else, and are seen."""
    step = Step(dtype, SQ, DV=24)
    k, v, _, _ = fa.reference.append(step.k, step.v, step.seqlens, step.k_new, step.v_new)
    ref = step.call(fa.reference.decode_attention, **step.new())
    lengths = step.seqlens.clone()
    got = step.call(**step.new())
    assert same_bits(step.k, k) and same_bits(step.v, v) and torch.equal(step.seqlens, lengths)
    step.check(got, ref, after(LENGTHS, SQ))
    again = step.call(cache_seqlens=step.seqlens + SQ)
    assert all(torch.equal(a, b) for a, b in zip(got, again))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("half", [1, 5, 8])
def test_rotary_embedding(half, interleaved, dtype):
    step = Step(dtype, 3)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cos, sin = turning(80, half, wide)
    rope = dict(rope_cos=cos, rope_sin=sin, rope_interleaved=interleaved)
    ref = step.call(fa.reference.decode_attention, **step.new(), **rope)
    k, v, _, _ = fa.reference.append(step.k, step.v, step.seqlens, step.k_new, step.v_new, **rope)
    got = step.call(**step.new(), **rope)
    assert same_bits(step.k, k) and same_bits(step.v, v)
    turned = torch.stack([fa.reference._rotate(step.q[b].to(wide), cos, sin, n, interleaved)
                          for b, n in enumerate(LENGTHS)]).to(dtype)
    step.check(got, ref, after(LENGTHS, 3), q=turned)


def test_rotary_embedding_by_hand():
    """Pairs turn by their angle: (1, 0) by 90 degrees becomes (0, 1)."""
    q = torch.zeros(1, 1, 1, 6)
    q[..., 0] = 1
    k_new = torch.arange(1.0, 7).view(1, 1, 1, 6)
    cos, sin = torch.ones(4, 2), torch.zeros(4, 2)
    cos[3], sin[3] = torch.tensor([0.0, -1.0]), torch.tensor([1.0, 0.0])  # 90 and 180 degrees, at position 3
    for interleaved, want in ((False, [-3.0, -2, 1, -4, 5, 6]), (True, [-2.0, 1, -3, -4, 5, 6])):
        k, v = torch.zeros(1, 5, 1, 6), torch.zeros(1, 5, 1, 6)
        fa.decode_attention(q, k, v, torch.tensor([3]), k_new=k_new, v_new=k_new, rope_cos=cos, rope_sin=sin,
                            rope_interleaved=interleaved)
        assert k[0, 3, 0].tolist() == want and v[0, 3, 0].tolist() == k_new.flatten().tolist()


def test_rotary_tables_in_the_dtype_of_query():
    step = Step(torch.bfloat16, 2)
    cos, sin = turning(80, 8, torch.bfloat16)
    k = fa.reference.append(step.k, step.v, step.seqlens, step.k_new, step.v_new, rope_cos=cos, rope_sin=sin)[0]
    step.call(**step.new(), rope_cos=cos.t().contiguous().t(), rope_sin=sin)
    assert same_bits(step.k, k)


def test_append_to_views():
    """Caches and new rows with any strides; what lies around them stays."""
    step = Step(SQ=2)
    want = step.call(k_cache=step.k.clone(), v_cache=step.v.clone(), **step.new())
    around = torch.full((5, 2, 75, 40), math.nan)
    k, v = around[:, :, 2:72, 3:19].transpose(1, 2), around[:, :, 2:72, 20:36].transpose(1, 2)
    k.copy_(step.k), v.copy_(step.v)
    k_new = torch.stack([step.k_new, step.k_new * math.nan], -1)[..., 0]
    got = step.call(k_cache=k, v_cache=v, k_new=k_new, v_new=step.v_new)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    for b, n in enumerate(LENGTHS):
        assert torch.equal(k[b, n:n + 2], step.k_new[b]) and torch.equal(v[b, n:n + 2], step.v_new[b])
    k.fill_(math.nan), v.fill_(math.nan)
    assert around.isnan().all()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_large_append(threads):
    """Enough rows for several workers."""
    torch.set_num_threads(threads)
    step = Step(SQ=200, lengths=[0, 17], room=300, HQ=8, HK=4, D=64)
    cos, sin = turning(300, 32)
    k, v, _, _ = fa.reference.append(step.k, step.v, step.seqlens, step.k_new, step.v_new, rope_cos=cos, rope_sin=sin)
    step.call(**step.new(), rope_cos=cos, rope_sin=sin)
    assert same_bits(step.k, k) and same_bits(step.v, v)


def test_the_version_counter_moves():
    step = Step()
    weight = torch.ones_like(step.k, requires_grad=True)
    product = weight * step.k
    step.call(**step.new())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


# ---- pages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("SQ", [1, 3])
@pytest.mark.parametrize("page_size", [1, 5, 16, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_pages(dtype, page_size, SQ):
    step = Step(dtype, SQ, DV=24)
    k_pages, v_pages, table = paginate((step.k, step.v), page_size, LENGTHS)
    got = step.call(k_cache=k_pages, v_cache=v_pages, block_table=table)
    step.check(got, step.call(fa.reference.decode_attention), LENGTHS)
    plain = fa.decode_attention(step.q, k_pages, v_pages, step.seqlens, block_table=table.long())
    assert same_bits(plain, got[0])


@pytest.mark.parametrize("page_size", [1, 4, 64])
def test_append_to_pages(page_size):
    """Nothing but the new rows changes in the pool."""
    step, SQ = Step(SQ=3), 3
    ref = step.call(fa.reference.decode_attention, **step.new())
    k_pages, v_pages, table = paginate((step.k, step.v), page_size, after(LENGTHS, SQ))
    want_k, want_v, _, _ = fa.reference.append(k_pages, v_pages, step.seqlens, step.k_new, step.v_new,
                                               block_table=table)
    got = step.call(k_cache=k_pages, v_cache=v_pages, block_table=table, **step.new())
    assert same_bits(k_pages, want_k) and same_bits(v_pages, want_v)
    k, v, _, _ = fa.reference.append(step.k, step.v, step.seqlens, step.k_new, step.v_new)
    step.check(got, ref, after(LENGTHS, SQ), k, v)


def test_sequences_may_share_pages():
    step = Step(lengths=[8, 6], room=8)
    table = torch.tensor([[0, 1], [0, 1]])
    pages = [x[:1].reshape(2, 4, 2, 16) for x in (step.k, step.v)]
    got = step.call(k_cache=pages[0], v_cache=pages[1], block_table=table)
    shared = [x[:1].expand(2, -1, -1, -1) for x in (step.k, step.v)]
    torch.testing.assert_close(got, step.call(k_cache=shared[0], v_cache=shared[1]), rtol=1e-5, atol=1e-5)


# ---- quantised caches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("SQ", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", QUANTISED, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_quantised(dtype, stored, kind, SQ):
    """What is stored is read exactly: the error against float64 on the stored values is that of a plain cache."""
    step = Step(dtype, SQ, DV=24)
    (k, k_scale), (v, v_scale) = (quantise(x, stored, kind) for x in (step.k, step.v))
    scales = dict(k_scale=k_scale, v_scale=v_scale)
    ref = step.call(fa.reference.decode_attention, k_cache=k, v_cache=v, **scales)
    got = step.call(k_cache=k, v_cache=v, **scales)
    step.check(got, ref, LENGTHS, dequantise(k, k_scale), dequantise(v, v_scale))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", QUANTISED, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("page_size", [None, 4])
def test_append_quantises(page_size, dtype, stored, kind):
    step, SQ = Step(dtype, 3, DV=24), 3
    step.k_new[1, 0], step.v_new[1, 1, 0] = 0, 0
    step.k_new[2, 1] *= 1000  # beyond a given scale: saturates
    cos, sin = turning(80, 4, torch.float64 if dtype == torch.float64 else torch.float32)
    options = dict(rope_cos=cos, rope_sin=sin)
    (k, k_scale), (v, v_scale) = (quantise(x, stored, kind) for x in (step.k, step.v))
    if page_size:
        parts = (k, v, k_scale, v_scale) if kind == "token" else (k, v)
        *pools, options["block_table"] = paginate(parts, page_size, after(LENGTHS, SQ))
        k, v = pools[:2]
        k_scale, v_scale = pools[2:] or (k_scale, v_scale)
    want = fa.reference.append(k, v, step.seqlens, step.k_new, step.v_new, k_scale=k_scale, v_scale=v_scale, **options)
    ref = step.call(fa.reference.decode_attention, k_cache=k, v_cache=v, k_scale=k_scale, v_scale=v_scale,
                    **step.new(), **options)
    got = step.call(k_cache=k, v_cache=v, k_scale=k_scale, v_scale=v_scale, **step.new(), **options)
    for x, y, name in zip((k, v, k_scale, v_scale), want, ("k", "v", "k_scale", "v_scale")):
        assert same_bits(x, y), name
    torch.testing.assert_close(got[0].double(), ref[0], rtol=0, atol=8 * torch.finfo(dtype).eps * ref[0].abs().max())


@pytest.mark.parametrize("stored", QUANTISED, ids=name_of)
def test_rounding_and_saturation(stored):
    """Nearest, ties to even; beyond the range the end of it; per token the largest becomes the largest."""
    row = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.6, 127.6, 1e30, -1e30, 17.0, 19.0, 2**-10])
    k, v = (torch.zeros(1, 2, 1, 12, dtype=stored) for _ in range(2))
    one = torch.ones(())
    new = row.view(1, 1, 1, 12)
    fa.decode_attention(new, k, v, torch.tensor([0]), k_new=new, v_new=new, k_scale=one, v_scale=one)
    if stored == torch.int8:
        want = [0, 2, 2, 0, -2, 127, 127, 127, -128, 17, 19, 0]
    else:
        want = [0.5, 1.5, 2.5, -0.5, -1.5, 128, 128, 448, -448, 16, 20, 0]
    assert k[0, 0, 0].float().tolist() == want
    tokens = [torch.zeros(1, 2, 1) for _ in range(2)]
    new = torch.stack([row * 1e-3, torch.zeros(12)]).view(1, 2, 1, 12)
    fa.decode_attention(new, k, v, torch.tensor([0]), k_new=new, v_new=new, k_scale=tokens[0], v_scale=tokens[1])
    assert k[0, 0, 0].float().abs().max() == QUANTISED[stored] and k[0, 1].float().eq(0).all()
    assert tokens[0][0, 0, 0].item() == row.max().mul(1e-3).cpu().div(QUANTISED[stored]).item()
    assert tokens[0][0, 1, 0] == 1


def test_bytes_of_every_float8():
    """All 256 patterns, NaN among them, come back as the values that torch says they have."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    v = values.view(1, 1, 1, 256)
    k, one = torch.zeros_like(v), torch.ones(())
    out = fa.decode_attention(torch.zeros(1, 1, 1, 256), k, v, torch.tensor([1]), k_scale=one, v_scale=one)
    torch.testing.assert_close(out.flatten(), values.float(), rtol=0, atol=0, equal_nan=True)


# Root mean square of the error over that of the output, 1024 and 700 normal keys, D 128, against float64 on the tokens
# as they were before quantising: the limit is a little above what docs/numerics.md reports.
ERRORS = {torch.int8: dict(tensor=0.018, head=0.018, sequence=0.018, token=0.011),
          torch.float8_e4m3fn: dict(tensor=0.044, head=0.044, sequence=0.044, token=0.042)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", QUANTISED, ids=name_of)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_error_of_quantised_caches(dtype, stored, kind):
    step = Step(dtype, 1, [1024, 700], 1024, HQ=8, HK=2, D=128)
    ref, _ = step.call(fa.reference.decode_attention)
    (k, k_scale), (v, v_scale) = (quantise(x, stored, kind) for x in (step.k, step.v))
    out, _ = step.call(k_cache=k, v_cache=v, k_scale=k_scale, v_scale=v_scale)
    error = ((out.double() - ref).square().mean() / ref.square().mean()).sqrt().item()
    assert 0.003 < error < ERRORS[stored][kind], error


# ---- speculative decoding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("options", ["causal", "window", "alibi", "everything"])
def test_tree_mask(options, dtype):
    step, SQ = Step(dtype, 6, room=80, **OPTIONS[options]), 6
    tree = torch.rand(5, SQ, SQ) > 0.4
    tree[0, 2] = False
    ref = step.call(fa.reference.decode_attention, **step.new(), tree_mask=tree)
    got = step.call(**step.new(), tree_mask=tree)
    for b, n in enumerate(after(LENGTHS, SQ)):
        keep = torch.cat([torch.ones(SQ, n - SQ, dtype=torch.bool), tree[b]], 1)
        own = {**of_sequence(step.options, b), "causal": False}
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        rows = step.q[b], step.k[b, :n], step.v[b, :n]
        peers = [eager(*(x.to(t) for x in rows), keep=keep, **own) for t in (dtype, wide)]
        check("out", got[0][b], ref[0][b], [peers[0][0]], dtype, 1.0)
        check("lse", got[1][b], ref[1][b], [peers[1][1]], dtype, 1.0)
    lower = torch.ones(5, SQ, SQ, dtype=torch.bool).tril()
    now = dict(cache_seqlens=step.seqlens + SQ)
    torch.testing.assert_close(step.call(**now, tree_mask=lower), step.call(**now), rtol=1e-2, atol=1e-2)


# ---- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [None, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("SQ", [1, 5])
def test_batch_invariance(SQ, dtype, stored):
    """A sequence's bits do not depend on its neighbours, its place, the room around it, or the number of threads."""
    lengths = [900, 3, 0, 2048, 411]
    step = Step(dtype, SQ, lengths, 2048, HQ=8, HK=2, D=64)
    k, v, scales = step.k, step.v, {}
    if stored:
        (k, scales["k_scale"]), (v, scales["v_scale"]) = (quantise(x, stored, "token") for x in (k, v))
    want = step.call(k_cache=k, v_cache=v, **scales, batch_invariant=True)
    for order, threads in (([4, 0, 3, 2, 1], 2), ([3], 1), ([0, 0, 4], 5), ([1, 3], 3)):
        torch.set_num_threads(threads)
        part = dict(query=step.q[order], k_cache=k[order], v_cache=v[order], cache_seqlens=step.seqlens[order],
                    **{name: x[order] for name, x in scales.items()})
        out, lse = step.call(**part, batch_invariant=True)
        for place, b in enumerate(order):
            assert torch.equal(out[place], want[0][b]) and torch.equal(lse[place], want[1][b]), (b, order, threads)
    cut = dict(query=step.q[4:], k_cache=k[4:, :411], v_cache=v[4:, :411], cache_seqlens=step.seqlens[4:],
               **{name: x[4:, :411] for name, x in scales.items()})
    assert torch.equal(step.call(**cut)[0][0], want[0][4])


@pytest.mark.parametrize("num_splits", [1, 2, 9, 1000, 2**63 - 1])
def test_num_splits(num_splits):
    lengths = [900, 3, 0, 1500]
    step = Step(torch.float32, 1, lengths, 1500, HQ=8, HK=2, D=64)
    got = step.call(num_splits=num_splits)
    step.check(got, step.call(fa.reference.decode_attention), lengths)
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(step.call(num_splits=num_splits), got))


def test_num_splits_changes_the_order_of_sums():
    step = Step(torch.float32, 1, [3000], 3000, D=64)
    results = [step.call(num_splits=n)[0] for n in (1, 2, 8)]
    assert not (torch.equal(results[0], results[1]) and torch.equal(results[1], results[2]))


# ---- what else a user meets ------------------------------------------------------------------------------------------


def test_autocast():
    step = Step(torch.bfloat16)
    want = step.call()[0]
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert torch.equal(step.call(query=step.q.float())[0], want)
        (k, k_scale), (v, v_scale) = (quantise(x, torch.int8, "head") for x in (step.k, step.v))
        assert step.call(query=step.q.float(), k_cache=k, v_cache=v, k_scale=k_scale,
                         v_scale=v_scale)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["alibi_slopes", "sinks", "rope_cos", "rope_sin", "out"])
def test_inference_only_whatever_requires_grad(name):
    step = Step(SQ=2)
    cos, sin = turning(80, 8)
    options = dict(step.new(), alibi_slopes=torch.rand(4), sinks=torch.rand(4), rope_cos=cos, rope_sin=sin,
                   out=torch.empty(5, 2, 4, 16))
    options[name] = options[name].requires_grad_()
    before = step.k.clone()
    with pytest.raises(RuntimeError, match="inference-only"):
        fa.decode_attention(step.q, step.k, step.v, step.seqlens, **options)
    assert same_bits(step.k, before)


def test_inference_only():
    step = Step()
    step.q.requires_grad_()
    for options in ({}, step.new()):
        with pytest.raises(RuntimeError, match="inference-only"):
            step.call(**options)
        with torch.no_grad():
            step.call(**options)
    with torch.inference_mode():
        step.call(**step.new())


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(step, text, error=RuntimeError, **changes):
    """Refused in words that hold `text`, and nothing is written, though append alone would have been accepted."""
    given = {"k_cache": step.k, "v_cache": step.v, **step.new(), **changes}
    given = {name: x for name, x in given.items() if x is not None}
    written = [given.get(name) for name in ("k_cache", "v_cache", "k_scale", "v_scale", "out")]
    before = [x.clone() if torch.is_tensor(x) else None for x in written]
    with pytest.raises(error, match=text):
        step.call(**given)
    assert all(same_bits(x, y) for x, y in zip(written, before) if y is not None)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


REFUSED = [
    (dict(cache_seqlens=torch.tensor([0, 5, 69, 3, 1])), r"cache_seqlens\[2\] is 69 and k_new adds 2.*capacity of 70"),
    (dict(cache_seqlens=torch.tensor([0, 2**31 - 1, 6, 3, 1], dtype=torch.int32)), r"cache_seqlens\[1\].*capacity"),
    (dict(cache_seqlens=torch.tensor([0, 5, 2**63 - 1, 3, 1])), r"cache_seqlens\[2\].*capacity"),
    (dict(cache_seqlens=torch.tensor([0, -1, 6, 3, 1])), r"cache_seqlens\[1\] is -1"),
    (dict(cache_seqlens=torch.tensor([0, 5])), "cache_seqlens has shape"),
    (dict(cache_seqlens=torch.tensor([0.0, 5, 6, 3, 1])), "cache_seqlens has dtype float32"),
    (dict(k_new=None), "v_new is given and k_new is not"),
    (dict(v_new=None), "k_new is given and v_new is not"),
    (dict(k_new=zeros(5, 2, 2, 17)), r"k_new has shape \(5, 2, 2, 17\): it must be \(5, 2, 2, 16\)"),
    (dict(k_new=zeros(5, 3, 2, 16)), r"v_new has shape \(5, 2, 2, 16\): it must be \(5, 3, 2, 16\)"),
    (dict(k_new=zeros(4, 2, 2, 16)), "k_new has batch size 4 and query 5"),
    (dict(k_new=zeros(5, 2, 2, 16, dtype=torch.float16)), "k_new and v_new have dtypes float16 and float32"),
    (dict(v_cache=zeros(5, 70, 2, 16, dtype=torch.float16)), "k_cache and v_cache have dtypes float32 and float16"),
    (dict(v_cache=zeros(5, 71, 2, 16)), "v_cache has shape"),
    (dict(k_cache=zeros(1, 70, 2, 16).expand(5, -1, -1, -1)), "k_cache has shape .* must not share memory"),
    (dict(k_cache=zeros(5, 70, 32)), "k_cache must be 4-D"),
    (dict(query=zeros(5, 2, 3, 16)), "query has 3 heads, key and value 2"),
    (dict(query=zeros(5, 2, 4, 16, dtype=torch.float64)), "dtypes float64, float32 and float32"),
    (dict(rope_cos=zeros(80, 8)), "rope_cos is given and rope_sin is not"),
    (dict(rope_cos=zeros(80, 9), rope_sin=zeros(80, 9)), r"rope_cos has shape \(80, 9\)"),
    (dict(rope_cos=zeros(80, 8), rope_sin=zeros(80, 7)), "rope_sin has shape"),
    (dict(rope_cos=zeros(67, 8), rope_sin=zeros(67, 8)),
     r"cache_seqlens\[3\] is 66 and 2 tokens are turned.* 67 positions"),
    (dict(rope_cos=zeros(80, 8, dtype=torch.float16), rope_sin=zeros(80, 8)), "rope_cos has dtype float16"),
    (dict(rope_cos=zeros(80, 8), rope_sin=zeros(80, 8), k_new=None, v_new=None), "rope.*k_new is None"),
    (dict(k_scale=zeros()), "k_scale is given and the cache has dtype float32"),
    (dict(tree_mask=zeros(5, 2, 2)), "tree_mask has dtype float32"),
    (dict(tree_mask=zeros(5, 2, 3, dtype=torch.bool)), "tree_mask has shape"),
    (dict(tree_mask=zeros(5, 3, 3, dtype=torch.bool), query=zeros(5, 3, 4, 16)), "k_new has 2 tokens and query 3"),
    (dict(sinks=zeros(3)), "sinks has shape"),
    (dict(alibi_slopes=zeros(4, dtype=torch.int32)), "alibi_slopes has dtype int32"),
    (dict(out=zeros(5, 2, 4, 17)), "out has shape"),
    (dict(out=zeros(5, 2, 4, 16, dtype=torch.float16)), "out has dtype float16"),
]


@pytest.mark.parametrize("changes,text", REFUSED, ids=[text for _, text in REFUSED])
def test_refusals(changes, text):
    refused(Step(SQ=2), text, **changes)


SCALES_REFUSED = [
    (dict(k_scale=None), "k_scale is None"),
    (dict(v_scale=None), "v_scale is None"),
    (dict(k_scale=zeros(2, dtype=torch.float16)), "k_scale has dtype float16"),
    (dict(k_scale=zeros(3)), r"k_scale has shape"),
    (dict(v_scale=zeros(4, 2)), r"v_scale has shape"),
    (dict(v_scale=zeros(5, 1)), r"v_scale has shape"),
    (dict(v_scale=zeros(5, 70, 2)), "either both are per token"),
    (dict(k_scale=zeros(5, 69, 2), v_scale=zeros(5, 70, 2)), r"k_scale has shape"),
    (dict(k_scale=zeros(1, 1, 1, 1)), "k_scale must be"),
]


@pytest.mark.parametrize("changes,text", SCALES_REFUSED, ids=[text for _, text in SCALES_REFUSED])
@pytest.mark.parametrize("with_new", [False, True])
def test_refusals_of_scales(changes, text, with_new):
    step = Step(SQ=2)
    given = dict(k_cache=step.k.to(torch.int8), v_cache=step.v.to(torch.int8), k_scale=zeros(2), v_scale=zeros(2))
    if not with_new:
        given.update(k_new=None, v_new=None)
        text = text.replace("k_scale is None", "it needs k_scale").replace("v_scale is None", "it needs v_scale")
    refused(step, text, **{**given, **changes})


PAGES_REFUSED = [
    (dict(block_table=torch.tensor([[0, 1], [2, 3], [4, 5], [6, 9]])),
     r"block_table\[3\]\[1\] is 9 and k_new is written"),
    (dict(block_table=torch.tensor([[0, 1], [2, 3], [-1, 5], [6, 7]])), r"block_table\[2\]\[0\] is -1"),
    (dict(block_table=torch.tensor([[0, 1], [2, 3], [4, 5]])), "block_table has shape"),
    (dict(block_table=torch.tensor([[0], [2], [4], [6]])),
     r"cache_seqlens\[2\] is 5 and k_new adds 2.*block_table has room"),
    (dict(block_table=zeros(4, 2)), "block_table has dtype float32"),
    (dict(block_table=torch.tensor([0, 1])), "block_table must be 2-D"),
    (dict(block_table=torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]]), cache_seqlens=torch.tensor([0, 1, 7, 4])),
     r"cache_seqlens\[2\] is 7 and k_new adds 2.*2 pages of 4"),
]


@pytest.mark.parametrize("changes,text", PAGES_REFUSED, ids=[text for _, text in PAGES_REFUSED])
def test_refusals_of_pages(changes, text):
    step = Step(SQ=2, lengths=[0, 1, 5, 4])
    refused(step, text, k_cache=zeros(9, 4, 2, 16), v_cache=zeros(9, 4, 2, 16), **changes)


def test_refusals_without_new_tokens():
    step = Step()
    for lengths, text in (([0, 5, 71, 1, 1], r"cache_seqlens\[2\] is 71.*70"),
                          ([0, -3, 1, 1, 1], r"cache_seqlens\[1\] is -3")):
        with pytest.raises(RuntimeError, match=text):
            step.call(cache_seqlens=torch.tensor(lengths))
        with pytest.raises(RuntimeError, match=text):
            fa.decode_attention(step.q, step.k, step.v, torch.tensor(lengths))


def test_wrong_values_are_value_errors():
    step = Step()
    for options, text in ((dict(scale=math.nan), "scale"), (dict(softcap=-1.0), "softcap"),
                          (dict(window=(-2, 0)), "window"), (dict(num_splits=-1), "num_splits"),
                          (dict(num_splits=1.5), "num_splits")):
        refused(step, text, ValueError, **options)
    with pytest.raises(TypeError, match="cache_seqlens"):
        fa.decode_attention(step.q, step.k, step.v, [0, 5, 64, 66, 1])


# ---- compiler --------------------------------------------------------------------------------------------------------


def test_one_graph():
    step = Step(torch.bfloat16, sinks=True)
    got = torch.compile(step.call, fullgraph=True, backend="aot_eager")()
    assert all(torch.equal(a, b) for a, b in zip(got, step.call()))
    plain = torch.compile(fa.decode_attention, fullgraph=True, backend="aot_eager")
    given = step.q, step.k, step.v, step.seqlens
    assert torch.equal(plain(*given), fa.decode_attention(*given))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_append_is_seen_after_the_call(backend):
    """The caches, the scales and out are changed in place, in the order of the program."""
    step = Step(SQ=2)
    (k, k_scale), (v, v_scale) = (quantise(x, torch.int8, "token") for x in (step.k, step.v))
    cos, sin = turning(80, 8)

    def program(q, k, v, k_scale, v_scale, out):
        first = fa.decode_attention(q, k, v, step.seqlens, **step.new(), rope_cos=cos, rope_sin=sin, k_scale=k_scale,
                                    v_scale=v_scale)
        fa.decode_attention(first, k, v, step.seqlens2, k_scale=k_scale, v_scale=v_scale, out=out)
        return first

    step.seqlens2, results = step.seqlens + 2, []
    for function in (program, torch.compile(program, fullgraph=True, backend=backend)):
        state = [x.clone() for x in (k, v, k_scale, v_scale)] + [torch.full_like(step.q, math.nan)]
        results.append([function(step.q, *state), *state])
    assert all(same_bits(a, b) for a, b in zip(*results)) and not torch.equal(results[1][1], k)


def test_export():
    class Model(torch.nn.Module):
        def __init__(self, step):
            super().__init__()
            self.register_buffer("k", step.k.clone())
            self.register_buffer("v", step.v.clone())

        def forward(self, q, k_new, v_new, seqlens):
            return fa.decode_attention(q, self.k, self.v, seqlens, k_new=k_new, v_new=v_new)

    step = Step()
    args = step.q, step.k_new, step.v_new, step.seqlens
    model, exported = Model(step), torch.export.export(Model(step), args).module()
    assert torch.equal(exported(*args), model(*args))
    assert torch.equal(dict(exported.named_buffers())["k"], model.k) and not torch.equal(model.k, step.k)


def test_opcheck():
    dtype = torch.float32
    ops = torch.ops.flashattn_ext
    step = Step(dtype, 2, [0, 5], 9, DV=24)
    options = (0.3, 1.5, 4, 0, 2)
    tree = torch.ones(2, 2, 2, dtype=torch.bool).tril()
    opcheck(ops.decode, (step.q, step.k, step.v, step.seqlens + 2, None, None, None, tree, normal(4), torch.rand(4),
                         *options))
    opcheck(ops.decode_plain, (step.q, step.k, step.v, step.seqlens, None, None, True))
    (k, k_scale), (v, v_scale) = (quantise(x, torch.int8, "token") for x in (step.k, step.v))
    cos, sin = turning(20, 4)
    for out in (None, torch.empty(2, 2, 4, 24, dtype=dtype)):
        opcheck(ops.decode_append_, (step.q, step.k, step.v, step.seqlens, step.k_new, step.v_new, None, None, None,
                                     cos, sin, True, None, None, None, out, *options))
        opcheck(ops.decode_append_, (step.q, k, v, step.seqlens, step.k_new, step.v_new, None, k_scale, v_scale, None,
                                     None, False, tree, None, None, out, *options))
    opcheck(ops.cache_append_, (k, v, step.seqlens, step.k_new, step.v_new, None, None, k_scale, v_scale))
    opcheck(ops.cache_append_, (step.k, step.v, step.seqlens, step.k_new.flatten(0, 1), step.v_new.flatten(0, 1),
                                torch.tensor([0, 1, 4]), None, None, None))
