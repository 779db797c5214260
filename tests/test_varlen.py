"""Packed sequences: values, gradients, pages, refusals, and bits that depend on nothing else in the call."""

import inspect
import math

import pytest
import torch

import flashattn_ext as fa
from compare import unchanged
from sequences import DTYPES, FLOATS, LSE, Packed, name_of, normal, offsets, opcheck, paginate

pytestmark = pytest.mark.usefixtures("device")

RAGGED = ([7, 0, 33, 1, 20], [7, 5, 40, 64, 0])  # an empty one, and one without keys
MORE_QUERIES = ([40, 9, 70], [12, 9, 3])
LONG = ([130, 3, 250], [130, 410, 97])
OPTIONS = {
    "plain": {},
    "causal": dict(causal=True),
    "window": dict(window=(6, 3)),
    "window_causal": dict(window=(9, 0)),
    "softcap": dict(softcap=1.5, causal=True),
    "scale": dict(scale=-0.3),
}


def slopes(*shape):
    return torch.rand(shape) * 0.3


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", [RAGGED, MORE_QUERIES], ids=["ragged", "more_queries"])
def test_values_and_gradients(lengths, options, dtype):
    Packed(*lengths, dtype, past=3, **OPTIONS[options]).check()


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_long_sequences(dtype):
    Packed(*LONG, dtype, D=64, causal=True).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("causal", [False, True])
def test_sinks_and_slopes(dtype, causal):
    sinks = normal(4, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    Packed(*RAGGED, dtype, sinks=sinks, alibi_slopes=slopes(4), causal=causal).check()


@pytest.mark.parametrize("HQ,HK,D,DV", [(1, 1, 1, 1), (6, 2, 40, 24), (8, 1, 64, 64), (3, 3, 129, 65)])
def test_heads_and_dimensions(HQ, HK, D, DV):
    Packed(*RAGGED, torch.float32, HQ=HQ, HK=HK, D=D, DV=DV, causal=True).check(least=1.0)


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512bf16"], indirect=True)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_every_instruction_set(isa, dtype):
    Packed(*RAGGED, dtype, D=64, window=(20, 0), softcap=3.0, past=2).check()


def test_sinks_and_slopes_of_each_sequence():
    made = Packed(*RAGGED, sinks=normal(5, 4), alibi_slopes=slopes(5, 4))
    out, lse = made.call()
    ref, ref_lse = made.call(fa.reference.varlen_attn)
    torch.testing.assert_close(out.double(), ref, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), ref_lse, rtol=1e-5, atol=1e-5)


def test_a_lone_sequence_is_a_dense_call():
    made = Packed([19], [35], causal=True)
    dense = fa.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (made.q, made.k, made.v)), enable_gqa=True,
        attn_mask=torch.nn.attention.bias.causal_lower_right(19, 35))
    unchanged("out", made.call()[0], dense[0].transpose(0, 1), "packing")


def test_gradcheck():
    made = Packed([3, 0, 5, 2], [4, 2, 3, 0], torch.float64, D=3, past=1)
    leaves = [x.requires_grad_() for x in (made.q, made.k, made.v)] + [normal(4, dtype=torch.float64).requires_grad_()]

    def call(q, k, v, sinks):
        out, lse = made.call(q=q, k=k, v=v, sinks=sinks, window=(3, 0), softcap=2.0, alibi_slopes=slopes(4) * 0 + 0.1)
        return out, torch.where(torch.isfinite(lse), lse, 0.0)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("wanted", [("q",), ("k",), ("v",), ("k", "v"), ("sinks",)], ids="+".join)
def test_only_the_gradients_that_are_wanted(wanted):
    made = Packed(*RAGGED, sinks=normal(4), causal=True)
    grads = made.upstream()
    want = made.gradients(lambda q, k, v, o: made.call(q=q, k=k, v=v, **o), grads)
    leaves = dict(q=made.q, k=made.k, v=made.v, sinks=made.options["sinks"])
    for name in wanted:
        leaves[name].requires_grad_()
    out, lse = made.call(**leaves)
    got = torch.autograd.grad([out, torch.where(torch.isfinite(lse), lse, 0.0)], [leaves[n] for n in wanted], grads)
    assert all(torch.equal(grad, want["grad_" + name]) for name, grad in zip(wanted, got))


def test_rows_past_the_end():
    """They give 0 and no gradient, whatever they hold."""
    made = Packed([5, 3], [6, 2], past=4)
    for x in (made.q, made.k, made.v):
        x[-4:] = math.nan
        x.requires_grad_()
    out, lse = made.call()
    assert out[8:].eq(0).all() and lse[:, 8:].eq(-math.inf).all() and out[:8].isfinite().all()
    grads = torch.autograd.grad(out, (made.q, made.k, made.v), torch.randn_like(out).index_fill_(
        0, torch.arange(8, 12), math.nan))
    for grad, end in zip(grads, (8, 8, 8)):
        assert grad[end:].eq(0).all() and grad[:end].isfinite().all() and grad[:end].ne(0).any()


def test_nan_stays_in_its_sequence():
    made = Packed([6, 4, 5], [6, 9, 5], causal=True)
    before = made.call()[0]
    made.q[6:10] = made.k[6:15] = made.v[6:15] = math.nan
    for x in (made.q, made.k, made.v):
        x.requires_grad_()
    out = made.call()[0]
    assert torch.equal(out[:6], before[:6]) and torch.equal(out[10:], before[10:]) and out[6:10].isnan().all()
    for grad, rows in zip(torch.autograd.grad(out.sum(), (made.q, made.k, made.v)), (slice(6, 10), slice(6, 15),
                                                                                     slice(6, 15))):
        keep = torch.ones(grad.shape[0], dtype=torch.bool)
        keep[rows] = False
        assert grad[keep].isfinite().all()


# ---- shapes, layouts, devices ----------------------------------------------------------------------------------------


def test_the_signature_is_torchs():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    theirs = inspect.signature(varlen.varlen_attn).parameters
    mine = inspect.signature(fa.varlen_attn).parameters
    assert [name for name in mine if name in theirs] == list(theirs)
    for name, parameter in theirs.items():
        assert mine[name].default == parameter.default and mine[name].kind == parameter.kind, name
    made = Packed(*RAGGED)
    args = made.q, made.k, made.v, made.cu_q, made.cu_k, made.max_q, made.max_k
    out, lse = fa.varlen_attn(*args, enable_gqa=True, return_aux=varlen.AuxRequest(lse=True))
    assert lse.shape == (4, 61) and lse.dtype == torch.float32
    assert torch.equal(out, fa.varlen_attn(*args, enable_gqa=True, return_aux=varlen.AuxRequest()))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_results(dtype):
    made = Packed([4, 3], [4, 5], dtype, DV=24)
    out, lse = made.call()
    assert out.shape == (7, 4, 24) and out.dtype == dtype and out.is_contiguous()
    assert lse.shape == (4, 7) and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("lens_q,lens_k", [([], []), ([0], [0]), ([0, 0], [3, 4]), ([4], [0])], ids=str)
def test_nothing_to_do(lens_q, lens_k):
    made = Packed(lens_q, lens_k)
    for x in (made.q, made.k, made.v):
        x.requires_grad_()
    out, lse = made.call()
    assert out.eq(0).all() and lse.eq(-math.inf).all()
    grads = torch.autograd.grad(out.sum(), (made.q, made.k, made.v))
    assert all(g.eq(0).all() and g.shape == x.shape for g, x in zip(grads, (made.q, made.k, made.v)))


def test_layouts_give_the_same_bits():
    made = Packed(RAGGED[0], RAGGED[0], HQ=2, HK=2, causal=True)
    want, want_lse = made.call()
    fused = torch.full((made.q.shape[0], 3, 2, 19), math.nan)
    for place, x in enumerate((made.q, made.k, made.v)):
        fused[:, place, :, 2:18] = x
    q, k, v = (fused[:, place, :, 2:18] for place in range(3))
    cu = torch.stack([made.cu_q.long(), made.cu_q.long() * 0 - 1], 1)[:, 0]
    for cu_q, cu_k in ((made.cu_q, made.cu_k), (cu, cu)):
        out, lse = made.call(q=q, k=k, v=v, cu_q=cu_q, cu_k=cu_k)
        assert torch.equal(out, want) and torch.equal(lse, want_lse)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (made.q, made.k, made.v)]
    assert torch.equal(made.call(q=heads_first[0], k=heads_first[1], v=heads_first[2])[0], want)


def test_autocast():
    made = Packed(*RAGGED, causal=True)
    want = made.call(q=made.q.bfloat16(), k=made.k.bfloat16(), v=made.v.bfloat16())[0]
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert torch.equal(made.call()[0], want)


# ---- lengths and pages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_seqused_k(dtype):
    """Keys past it are never read."""
    made = Packed([5, 3, 8], [20, 9, 30], dtype, causal=True)
    used = torch.tensor([11, 0, 30])
    clean = made.call(seqused_k=used)
    for first, length, end in zip(made.cu_k.tolist(), used.tolist(), made.cu_k[1:].tolist()):
        made.k[first + length:end] = made.v[first + length:end] = math.nan
    out, lse = made.call(seqused_k=used.int())
    ref, ref_lse = made.call(fa.reference.varlen_attn, seqused_k=used)
    assert torch.equal(out, clean[0]) and torch.equal(lse, clean[1])
    torch.testing.assert_close(out.double(), ref, rtol=2e-2, atol=2e-2)
    assert out[5:8].eq(0).all() and lse[:, 5:8].eq(-math.inf).all()


@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_pages(dtype, page_size):
    """A mixed batch over pages: prefill, decode, nothing; wild entries and poisoned pages past the lengths."""
    used = [70, 33, 0, 64, 1]
    made = Packed([70, 1, 0, 4, 1], [80] * 5, dtype, DV=24, causal=True, softcap=4.0)
    k, v = (x.view(5, 80, *x.shape[1:]) for x in (made.k, made.v))
    k_pages, v_pages, table = paginate((k, v), page_size, used)
    lengths = torch.tensor(used)
    out, lse = made.call(k=k_pages, v=v_pages, cu_k=None, seqused_k=lengths, block_table=table)
    ref, ref_lse = made.call(fa.reference.varlen_attn, seqused_k=lengths)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), ref, rtol=8 * eps, atol=8 * eps)
    torch.testing.assert_close(lse.double(), ref_lse, rtol=1e-3, atol=1e-3)
    # lengths from cu_seq_k; an int64 table of another layout
    again, _ = made.call(k=k_pages, v=v_pages, cu_k=offsets(used), block_table=table.long().t().contiguous().t())
    assert torch.equal(again, out)


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512bf16"], indirect=True)
def test_pages_on_every_instruction_set(isa):
    test_pages(torch.bfloat16, 16)
    test_pages(torch.float32, 3)


def test_inference_only():
    made = Packed([5, 3], [6, 4])
    made.q.requires_grad_()
    used = torch.tensor([6, 2])
    for options in (dict(seqused_k=used), dict(k=made.k.view(5, 2, 2, 16), v=made.v.view(5, 2, 2, 16), cu_k=None,
                                               seqused_k=used, block_table=torch.tensor([[0, 1, 2], [3, 4, 0]]))):
        with pytest.raises(RuntimeError, match="inference-only"):
            made.call(**options)
        with torch.no_grad():
            made.call(**options)


# ---- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_sequence_depends_on_nothing_else(dtype):
    """Its results and gradients have the same bits alone, in another order, and with any number of threads."""
    made = Packed([150, 1, 33, 5], [150, 600, 20, 5], dtype, D=64, causal=True)
    grad_out, grad_lse = made.upstream()

    def run(order, threads):
        torch.set_num_threads(threads)
        rows = [torch.arange(made.cu_q[n], made.cu_q[n + 1]) for n in order]
        keys = [torch.arange(made.cu_k[n], made.cu_k[n + 1]) for n in order]
        part = Packed([made.lens_q[n] for n in order], [made.lens_k[n] for n in order], dtype, D=64, causal=True)
        at, there = torch.cat(rows), torch.cat(keys)
        q, k, v = (x[i].requires_grad_() for x, i in ((made.q, at), (made.k, there), (made.v, there)))
        out, lse = part.call(q=q, k=k, v=v)
        grads = torch.autograd.grad([out, lse], (q, k, v), [grad_out[at], grad_lse[:, at].to(lse.dtype).masked_fill(
            lse.isinf(), 0)])
        split_q, split_k = [len(i) for i in rows], [len(i) for i in keys]
        parts = zip(out.split(split_q), lse.split(split_q, 1), grads[0].split(split_q), grads[1].split(split_k),
                    grads[2].split(split_k))
        return dict(zip(order, parts))

    want = run([0, 1, 2, 3], 2)
    for order, threads in (([3, 1, 0, 2], 2), ([1], 1), ([0], 3), ([2, 1], 5)):
        for n, tensors in run(order, threads).items():
            assert all(torch.equal(a, b) for a, b in zip(tensors, want[n])), (n, order, threads)


@pytest.mark.parametrize("num_splits", [1, 2, 7, 100])
def test_num_splits(num_splits):
    made = Packed([1, 3], [700, 90])
    out, lse = made.call(num_splits=num_splits)
    ref, ref_lse = made.call(fa.reference.varlen_attn)
    torch.testing.assert_close(out.double(), ref, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), ref_lse, rtol=1e-5, atol=1e-5)
    alone = made.call(q=made.q[1:], k=made.k[700:], v=made.v[700:], cu_q=offsets([3]), cu_k=offsets([90]),
                      num_splits=num_splits)[0]
    assert torch.equal(alone, out[1:])


# ---- dropout ---------------------------------------------------------------------------------------------------------


def test_the_packed_op_has_dropout():
    from flashattn_ext.varlen import packed_attention

    made = Packed(*RAGGED, torch.float64, causal=True)
    given = made.q, made.k, made.v, made.cu_q, made.cu_k, made.max_q, made.max_k
    leaves = [x.requires_grad_() for x in given[:3]]
    options = dict(dropout_p=0.4, window_size=(-1, 0), enable_gqa=True)
    torch.manual_seed(5)
    out, lse = packed_attention(*given, **options)
    torch.manual_seed(5)
    ref, ref_lse = fa.reference.varlen_attn(*given, **options, return_aux=LSE)
    torch.testing.assert_close(out, ref)
    torch.testing.assert_close(lse, ref_lse)
    g = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, leaves, g), torch.autograd.grad(ref, leaves, g)):
        torch.testing.assert_close(a, b)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        packed_attention(*given[:5], 1, 64, **options)
    assert torch.equal(torch.get_rng_state(), state)


# ---- transforms ------------------------------------------------------------------------------------------------------


def test_func_grad_and_what_has_no_rule():
    made = Packed([4, 3], [5, 3], torch.float64)

    def loss(q):
        return made.call(q=q)[0].square().sum()

    leaf = made.q.clone().requires_grad_()
    want, = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(made.q), want)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(loss)(torch.stack([made.q, made.q]))
    grad, = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once, not twice"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="alibi_slopes has no gradient"):
        made.call(alibi_slopes=slopes(4).requires_grad_())[0].sum().backward()


# ---- refusals --------------------------------------------------------------------------------------------------------

REFUSED = [
    (dict(cu_q=torch.tensor([0, 6, 5])), r"cu_seq_q\[2\] is 5"),
    (dict(cu_q=torch.tensor([0, 5, 9])), r"cu_seq_q\[2\] is 9"),
    (dict(cu_q=torch.tensor([1, 5, 8])), r"cu_seq_q\[0\] is 1"),
    (dict(cu_k=torch.tensor([0, -1, 10])), r"cu_seq_k\[1\] is -1"),
    (dict(cu_k=torch.tensor([0, 10])), "cu_seq_k has 2 elements"),
    (dict(cu_q=torch.tensor([0.0, 5.0, 8.0])), "cu_seq_q has dtype float32"),
    (dict(cu_k=None), "cu_seq_k is None"),
    (dict(max_q=4), "max_q is 4 and sequence 0 has 5"),
    (dict(max_k=5), "max_k is 5 and sequence 0 has 6"),
    (dict(seqused_k=torch.tensor([6, 5])), r"seqused_k\[1\] is 5"),
    (dict(seqused_k=torch.tensor([-1, 4])), r"seqused_k\[0\] is -1"),
    (dict(seqused_k=torch.tensor([6])), "seqused_k has shape"),
    (dict(q=torch.zeros(8, 4, 16, dtype=torch.float16)), "dtypes float16, float32 and float32"),
    (dict(q=torch.zeros(8, 4, 17)), "head dimension 17"),
    (dict(q=torch.zeros(8, 64)), "query must be 3-D"),
    (dict(v=torch.zeros(9, 2, 16)), "key has length 10 and value 9"),
    (dict(sinks=torch.zeros(3)), "sinks has shape"),
    (dict(block_table=torch.zeros(2, 1, dtype=torch.int32)), "4-D"),
]


@pytest.mark.parametrize("changes,text", REFUSED, ids=[text for _, text in REFUSED])
def test_refusals(changes, text):
    with pytest.raises(RuntimeError, match=text):
        Packed([5, 3], [6, 4]).call(**changes)


PAGED_REFUSED = [
    (dict(seqused_k=torch.tensor([6, 4]), block_table=torch.tensor([[0, 1, 5], [3, 4, 0]])),
     r"block_table\[0\]\[2\] is 5"),
    (dict(seqused_k=torch.tensor([6, 4]), block_table=torch.tensor([[0, 1, 2], [-1, 4, 0]])),
     r"block_table\[1\]\[0\] is -1"),
    (dict(seqused_k=torch.tensor([6, 7]), block_table=torch.tensor([[0, 1, 2], [3, 4, 0]])),
     r"seqused_k\[1\] is 7.*block_table"),
    (dict(seqused_k=None, block_table=torch.tensor([[0, 1, 2], [3, 4, 0]])), "seqused_k"),
    (dict(seqused_k=torch.tensor([6, 4]), block_table=torch.tensor([[0, 1, 2]])), "block_table has shape"),
    (dict(seqused_k=torch.tensor([6, 4]), block_table=torch.tensor([[0.0, 1, 2], [3, 4, 0]])), "block_table has dtype"),
]


@pytest.mark.parametrize("changes,text", PAGED_REFUSED, ids=[text for _, text in PAGED_REFUSED])
def test_refusals_of_pages(changes, text):
    made = Packed([5, 3], [6, 4])
    pages = dict(k=made.k.view(5, 2, 2, 16), v=made.v.view(5, 2, 2, 16), cu_k=None)
    with pytest.raises(RuntimeError, match=text):
        made.call(**pages, **changes)


def test_wrong_values_are_value_errors():
    made = Packed([5, 3], [6, 4])
    for options, text in ((dict(scale=math.inf), "scale"), (dict(softcap=-1.0), "softcap"),
                          (dict(window=(-2, 0)), "window_size"), (dict(num_splits=-1), "num_splits")):
        with pytest.raises(ValueError, match=text):
            made.call(**options)
    with pytest.raises(ValueError, match="enable_gqa"):
        fa.varlen_attn(made.q, made.k, made.v, made.cu_q, made.cu_k, 5, 6)
    with pytest.raises(TypeError, match="key"):
        fa.varlen_attn(made.q, [1], made.v, made.cu_q, made.cu_k, 5, 6)


# ---- compiler --------------------------------------------------------------------------------------------------------


def test_one_graph_with_gradients():
    made = Packed(*RAGGED, sinks=normal(4), causal=True, past=2)
    function = torch.compile(made.call, fullgraph=True, backend="aot_eager")
    grads = made.upstream()
    want = made.gradients(lambda q, k, v, o: made.call(q=q, k=k, v=v, **o), grads)
    got = made.gradients(lambda q, k, v, o: function(q=q, k=k, v=v, **o), grads)
    for name in want:
        assert torch.equal(got[name], want[name]) and got[name].stride() == want[name].stride(), name


def test_one_graph_over_pages():
    made = Packed([3, 2], [8, 8])
    k_pages, v_pages, table = paginate([x.view(2, 8, 2, 16) for x in (made.k, made.v)], 4, [8, 5])
    given = dict(k=k_pages, v=v_pages, cu_k=None, seqused_k=torch.tensor([8, 5]), block_table=table)
    got, want = torch.compile(made.call, fullgraph=True, backend="aot_eager")(**given), made.call(**given)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_export():
    class Model(torch.nn.Module):
        def forward(self, q, k, v, cu):
            return fa.varlen_attn(q, k, v, cu, cu, 8, 8, window_size=(-1, 0))

    made = Packed([5, 3], [5, 3], HQ=2)
    args = made.q, made.k, made.v, made.cu_q
    rows = torch.export.Dim("rows", min=2, max=100)
    exported = torch.export.export(Model(), args, dynamic_shapes=({0: rows}, {0: rows}, {0: rows}, None))
    longer = Packed([7, 4], [7, 4], HQ=2)
    args = longer.q, longer.k, longer.v, longer.cu_q
    assert torch.equal(exported.module()(*args), Model()(*args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_opcheck(dtype):
    made = Packed([5, 3], [6, 4], dtype, DV=24, past=1)
    sinks, seed = normal(4, dtype=dtype), torch.tensor([7], device="cpu")
    options = (5, 6, None, 1.5, 4, 0, 0.25, False)
    opcheck(torch.ops.flashattn_ext.varlen_forward, (made.q, made.k, made.v, made.cu_q, made.cu_k, None, None, sinks,
                                                     slopes(4), seed, *options, 0))
    out, lse = torch.ops.flashattn_ext.varlen_forward(made.q, made.k, made.v, made.cu_q, made.cu_k, None, None, sinks,
                                                      slopes(4), seed, *options, 0)
    for needs in (15, 0, 5):
        opcheck(torch.ops.flashattn_ext.varlen_backward, (
            torch.randn_like(out), torch.randn_like(lse), made.q, made.k, made.v, out, lse, made.cu_q, made.cu_k, sinks,
            slopes(4), seed, *options, needs))
    k_pages, v_pages, table = paginate([x[:10].view(2, 5, *x.shape[1:]) for x in (made.k, made.v)], 2, [5, 3])
    opcheck(torch.ops.flashattn_ext.varlen_forward, (made.q, k_pages, v_pages, made.cu_q, None, torch.tensor([5, 3]),
                                                     table, None, None, None, *options[:-2], 0.0, False, 2))
