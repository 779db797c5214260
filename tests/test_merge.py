"""Two results over disjoint keys become that over all of them."""

import math

import pytest
import torch

import flashattn_ext as fa
from sequences import DTYPES, name_of, normal, opcheck

pytestmark = pytest.mark.usefixtures("device")

INF = math.inf


def parts(*shape, dtype=torch.float32, DV=16):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [normal(*shape, DV, dtype=dtype), normal(*shape, dtype=wide) * 3,
            normal(*shape, DV, dtype=dtype), normal(*shape, dtype=wide) * 3]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(), (5,), (3, 5), (2, 3, 5), (2, 2, 3, 5), (2, 1, 2, 3, 5)], ids=str)
def test_values(shape, dtype):
    given = parts(*shape, dtype=dtype)
    out, lse = fa.merge_attention(*given)
    ref, ref_lse = fa.reference.merge_attention(*given)
    eps = torch.finfo(dtype).eps
    assert out.dtype == dtype and lse.dtype == given[1].dtype and out.shape == given[0].shape and lse.shape == shape
    torch.testing.assert_close(out.double(), ref, rtol=0, atol=2 * eps * given[0].abs().max().item())
    torch.testing.assert_close(lse.double(), ref_lse, rtol=4 * torch.finfo(lse.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_it_is_attention_over_both(dtype):
    q, k, v = normal(2, 4, 7, 16, dtype=dtype), normal(2, 2, 50, 16, dtype=dtype), normal(2, 2, 50, 24, dtype=dtype)

    def over(first, last):
        return fa.scaled_dot_product_attention(q, k[:, :, first:last], v[:, :, first:last], enable_gqa=True,
                                               return_lse=True)

    got, want = fa.merge_attention(*over(0, 13), *over(13, 50)), over(0, 50)
    tolerance = dict(rtol=0, atol=4 * torch.finfo(dtype).eps + 1e-6)
    torch.testing.assert_close(got, want, **tolerance)
    folded = fa.merge_attention(*fa.merge_attention(*over(0, 5), *over(5, 13)), *over(13, 50))
    torch.testing.assert_close(folded, want, **tolerance)


def test_of_a_decode_step():
    """(B, SQ, HQ, DV) with its log-sum-exp (B, HQ, SQ) turned the same way: a shared prefix and the rest."""
    q, k, v = normal(3, 2, 4, 16), normal(3, 40, 2, 16), normal(3, 40, 2, 16)
    k[:, :24], v[:, :24] = k[:1, :24].clone(), v[:1, :24].clone()
    lengths = torch.tensor([16, 9, 2])
    whole = fa.decode_attention(q, k, v, lengths + 24, return_lse=True)
    prefix = fa.decode_attention(q, k[:, :24], v[:, :24], torch.tensor([24] * 3), causal=False, return_lse=True)
    own = fa.decode_attention(q, k[:, 24:], v[:, 24:], lengths, return_lse=True)
    out, lse = fa.merge_attention(prefix[0], prefix[1].transpose(1, 2), own[0], own[1].transpose(1, 2))
    torch.testing.assert_close((out, lse.transpose(1, 2)), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_parts_that_saw_nothing(dtype):
    out_a, lse_a, out_b, lse_b = parts(4, dtype=dtype)
    lse_a[0], lse_b[1], lse_a[2], lse_b[2] = -INF, -INF, -INF, -INF
    out_a[0], out_b[1], out_a[2], out_b[2] = math.nan, INF, math.nan, -INF
    leaves = [x.requires_grad_() for x in (out_a, lse_a, out_b, lse_b)]
    out, lse = fa.merge_attention(*leaves)
    assert torch.equal(out[0], out_b[0]) and lse[0] == lse_b[0] and torch.equal(out[1], out_a[1]) and lse[1] == lse_a[1]
    assert out[2].eq(0).all() and lse[2] == -INF and out[3].isfinite().all()
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    da, dla, db, dlb = torch.autograd.grad([out, lse], leaves, [grad_out, grad_lse])
    assert all(g.isfinite().all() for g in (da, dla, db, dlb))
    assert da[[0, 2]].eq(0).all() and db[[1, 2]].eq(0).all() and dla[[0, 2]].eq(0).all() and dlb[[1, 2]].eq(0).all()
    assert torch.equal(da[1], grad_out[1]) and torch.equal(db[0], grad_out[0]) and dlb[0] == grad_lse[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_far_apart(dtype):
    """Nothing overflows, and the lesser part vanishes smoothly."""
    ones, zeros = torch.ones(6, 8, dtype=dtype), torch.zeros(6, 8, dtype=dtype)
    high = torch.tensor([1e30, 700.0, 90.0, 0.0, -1e30, 20.0], dtype=dtype)
    low = torch.tensor([-1e30, -700.0, -90.0, 0.0, -1e30, 0.0], dtype=dtype)
    want = torch.tensor([1.0, 1, 1, 0.5, 0.5, 1 / (1 + math.exp(-20))], dtype=dtype)
    for a, b, expected in ((ones, zeros, want), (zeros, ones, 1 - want)):
        out, lse = fa.merge_attention(a, high, b, low)
        torch.testing.assert_close(out, expected[:, None].expand(6, 8), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(lse, torch.logaddexp(high, low))


def test_layouts():
    given = parts(2, 3, 5)
    want = fa.merge_attention(*given)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in given]
    out, lse = fa.merge_attention(*turned)
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1]) and out.stride() == turned[0].stride()
    wide = torch.full((2, 3, 5, 40), math.nan)
    wide[..., 4:36:2] = given[0]
    assert torch.equal(fa.merge_attention(wide[..., 4:36:2], *given[1:])[0], want[0])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads):
    given = parts(3, 8, 300, DV=64)
    want = fa.merge_attention(*given)
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(fa.merge_attention(*given), want))


def test_nothing_to_merge():
    out, lse = fa.merge_attention(*parts(0, 3))
    assert out.shape == (0, 3, 16) and lse.shape == (0, 3)


# ---- gradients -------------------------------------------------------------------------------------------------------


def test_gradcheck():
    given = [x.requires_grad_() for x in parts(2, 3, dtype=torch.float64, DV=4)]
    assert torch.autograd.gradcheck(fa.merge_attention, given)
    assert torch.autograd.gradgradcheck(fa.merge_attention, given)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_gradients(dtype):
    given = [x.requires_grad_() for x in parts(2, 3, 5, dtype=dtype)]
    wide = [x.detach().double().requires_grad_() for x in given]
    results, ref = fa.merge_attention(*given), fa.reference.merge_attention(*wide)
    grads = [torch.randn_like(x) for x in results]
    got = torch.autograd.grad(results, given, grads)
    want = torch.autograd.grad(ref, wide, [g.double() for g in grads])
    for a, b, x in zip(got, want, given):
        assert a.dtype == x.dtype
        torch.testing.assert_close(a.double(), b, rtol=0, atol=4 * torch.finfo(dtype).eps * b.abs().max().item() + 1e-7)


def test_gradient_of_one_result_alone():
    given = [x.requires_grad_() for x in parts(4, dtype=torch.float64)]
    wide = [x.detach().requires_grad_() for x in given]
    for place in (0, 1):
        got = torch.autograd.grad(fa.merge_attention(*given)[place].sum(), given)
        want = torch.autograd.grad(fa.reference.merge_attention(*wide)[place].sum(), wide, materialize_grads=True)
        torch.testing.assert_close(got, want)


def test_through_attention():
    """The whole way: the gradient of a merge of two calls is that of one call."""
    q, k, v = (x.requires_grad_() for x in normal(3, 1, 2, 30, 8, dtype=torch.float64).unbind())

    def over(first, last):
        return fa.scaled_dot_product_attention(q, k[:, :, first:last], v[:, :, first:last], return_lse=True)

    g = torch.randn(1, 2, 30, 8, dtype=torch.float64)
    merged = fa.merge_attention(*over(0, 11), *over(11, 30))
    want = torch.autograd.grad(over(0, 30)[0], (q, k, v), g)
    torch.testing.assert_close(torch.autograd.grad(merged[0], (q, k, v), g), want)


def test_transforms_and_compiler():
    given = parts(3, 5, dtype=torch.float64)
    loss = lambda *x: fa.merge_attention(*x)[0].square().sum()  # noqa: E731
    leaves = [x.clone().requires_grad_() for x in given]
    want = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1, 2, 3))(*given), want)
    torch.testing.assert_close(torch.vmap(fa.merge_attention)(*given), fa.merge_attention(*given))
    mapped = torch.vmap(fa.merge_attention, in_dims=(0, 0, None, None))(given[0], given[1], given[2][0], given[3][0])
    torch.testing.assert_close(mapped[0][1], fa.merge_attention(given[0][1], given[1][1], given[2][0], given[3][0])[0])
    compiled = torch.compile(fa.merge_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given)[0], fa.merge_attention(*given)[0])
    got = torch.autograd.grad(compiled(*leaves)[0].square().sum(), leaves)
    torch.testing.assert_close(got, want)


def test_opcheck():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        opcheck(torch.ops.flashattn_ext.merge, parts(2, 3, 5, dtype=dtype))


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes,text", [
    ({0: torch.zeros(3, 5, 17)}, r"\(3, 5, 17\), \(3, 5, 16\)"),
    ({1: torch.zeros(3, 6)}, r"\(3, 6\)"),
    ({3: torch.zeros(5)}, r"\(5,\)"),
    ({2: torch.zeros(3, 5, 16, dtype=torch.float16)}, "out_b has dtype float16: it must be float32"),
    ({3: torch.zeros(3, 5, dtype=torch.float64)}, "lse_b has dtype float64: it must be float32"),
    ({1: torch.zeros(3, 5, dtype=torch.float16), 3: torch.zeros(3, 5, dtype=torch.float16)}, "lse_a has dtype float16"),
    ({0: torch.zeros(3, 5, 16, dtype=torch.int32), 2: torch.zeros(3, 5, 16, dtype=torch.int32)},
     "out_a has dtype int32"),
    ({0: torch.zeros(3, 5, 513), 2: torch.zeros(3, 5, 513)}, "head dimension 513"),
], ids=str)
def test_refusals(changes, text):
    given = parts(3, 5)
    for place, x in changes.items():
        given[place] = x
    with pytest.raises(RuntimeError, match=text):
        fa.merge_attention(*given)


def test_what_is_no_tensor():
    with pytest.raises(TypeError, match="lse_b"):
        fa.merge_attention(*parts(3)[:3], 1.0)
