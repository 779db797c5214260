"""What every call returns and what it refuses, case by case; docs/numerics.md has the promises in words."""

import contextlib
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import flashattn_ext as fa
import naive
from cases import DTYPES, FLOATS

SDPA = fa.scaled_dot_product_attention

pytestmark = pytest.mark.usefixtures("device")


def tensors(*shape_q, keys=None, dtype=torch.float32, dv=None, heads=None):
    """query of that shape, and key and value with other numbers of keys, heads and value dimensions where given."""
    shape = list(shape_q)
    if keys is not None:
        shape[-2] = keys
    if heads is not None:
        shape[-3] = heads
    query, key = torch.randn(*shape_q).to(dtype), torch.randn(*shape).to(dtype)
    shape[-1] = dv or shape[-1]
    return query, key, torch.randn(*shape).to(dtype)


def math_sdpa(*args, **kwargs):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


@contextlib.contextmanager
def refused(error, *words):
    """The refusal is of exactly that type, and its message names every word."""
    with pytest.raises(error) as info:
        yield
    message = str(info.value)
    assert info.type is error, f"{info.type.__name__} instead of {error.__name__}: {message}"
    missing = [str(word) for word in words if str(word) not in message]
    assert not missing, f"the message does not name {missing}: {message}"


def close(got, want, dtype=torch.float32):
    bars = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=bars[dtype])


# ---- signature -------------------------------------------------------------------------------------------------------


def test_signature_extends_torch_s():
    parameters = list(inspect.signature(SDPA).parameters.values())
    names = [p.name for p in parameters]
    assert names[:8] == ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]
    assert [p.default for p in parameters[3:8]] == [None, 0.0, False, None, False]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters[:6])
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[6:])


def test_extras_default_to_off():
    query, key, value = tensors(2, 2, 5, 8)
    off = dict(window=None, softcap=0.0, sinks=None, alibi_slopes=None,
               q_seqlens=None, kv_seqlens=None, return_lse=False)
    assert torch.equal(SDPA(query, key, value), SDPA(query, key, value, **off))


def test_positional_arguments_are_those_of_torch():
    query, key, value = tensors(2, 2, 5, 8)
    close(SDPA(query, key, value, None, 0.0, True), math_sdpa(query, key, value, None, 0.0, True))
    with pytest.raises(TypeError):
        SDPA(query, key, value, None, 0.0, False, 1.0)


# ---- causal ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("SQ, SK", [(5, 5), (3, 9), (9, 3), (1, 7), (7, 1), (70, 130), (130, 70)])
def test_causal_is_top_left(SQ, SK):
    query, key, value = tensors(2, 2, SQ, 8, keys=SK)
    want = math_sdpa(query, key, value, torch.ones(SQ, SK, dtype=torch.bool).tril())
    close(SDPA(query, key, value, is_causal=True), want)
    close(SDPA(query, key, value, causal_upper_left(SQ, SK)), want)


@pytest.mark.filterwarnings("ignore:Lower right causal bias")
@pytest.mark.parametrize("SQ, SK", [(5, 5), (3, 9), (9, 3), (1, 7), (70, 130), (130, 70)])
def test_lower_right_aligns_the_last_query_with_the_last_key(SQ, SK):
    query, key, value = tensors(2, 2, SQ, 8, keys=SK)
    want = math_sdpa(query, key, value, torch.ones(SQ, SK, dtype=torch.bool).tril(SK - SQ))
    close(SDPA(query, key, value, causal_lower_right(SQ, SK)), want.nan_to_num(0.0))


def test_causal_bias_of_other_lengths_is_refused():
    query, key, value = tensors(1, 1, 4, 8, keys=6)
    for bias in (causal_lower_right(4, 7), causal_upper_left(5, 6)):
        with refused(RuntimeError, bias.seq_len_q, bias.seq_len_kv, 4, 6):
            SDPA(query, key, value, bias)


# ---- masks -----------------------------------------------------------------------------------------------------------


def test_bool_mask_true_means_attend():
    query, key, value = tensors(1, 2, 3, 8)
    mask = torch.tensor([[True, False, False], [False, True, False], [False, False, True]])
    close(SDPA(query, key, value, mask), value)


def test_float_mask_is_added_to_the_scaled_scores_and_has_a_gradient():
    query, key, value = tensors(1, 2, 3, 8)
    bias = torch.randn(1, 2, 3, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(SDPA(query, key, value, bias).square().sum(), bias)
    want = math_sdpa(query, key, value, bias)
    close(SDPA(query, key, value, bias), want)
    close(grad, torch.autograd.grad(want.square().sum(), bias)[0])


B, H, SQ, SK = 2, 3, 5, 7
MASK_SHAPES = [(SQ, SK), (1, SK), (SQ, 1), (1, 1), (H, SQ, SK), (1, SQ, SK), (H, 1, SK), (H, SQ, 1), (B, H, SQ, SK),
               (B, 1, SQ, SK), (B, 1, 1, SK), (B, H, 1, 1), (1, H, SQ, 1), (1, 1, 1, 1)]


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_every_broadcastable_mask_shape(shape, kind):
    query, key, value = tensors(B, H, SQ, 8, keys=SK)
    mask = torch.rand(shape) > 0.4 if kind == "bool" else torch.randn(shape)
    want = naive.attention(query.double(), key.double(), value.double(), mask.expand(B, H, SQ, SK))[0]
    close(SDPA(query, key, value, mask), want)


@pytest.mark.parametrize("shape", [(SK,), (1,), ()], ids=str)
def test_mask_below_two_dimensions_is_refused(shape):
    query, key, value = tensors(B, H, SQ, 8, keys=SK)
    with refused(RuntimeError, shape, (B, H, SQ, SK), "attn_mask"):
        SDPA(query, key, value, torch.zeros(shape))


@pytest.mark.parametrize("shape", [(SQ, SK - 1), (SQ + 1, SK), (H, SK, SQ), (H + 1, SQ, SK),
                                   (B + 1, 1, SQ, SK), (4, B, H, SQ, SK),
                                   (B, B, 1, SQ, SK), (2, SK), (0, SK)], ids=str)
def test_mask_that_does_not_broadcast_is_refused(shape):
    query, key, value = tensors(B, H, SQ, 8, keys=SK)
    sizes = ", ".join(map(str, shape)) + ")"  # in front of them may stand the 1s of a 4-D mask
    with refused(RuntimeError, sizes, (B, H, SQ, SK), "attn_mask"):
        SDPA(query, key, value, torch.zeros(shape))


@pytest.mark.parametrize("dtype", FLOATS)
def test_mask_dtypes_allowed(dtype):
    query, key, value = tensors(B, H, SQ, 8, keys=SK, dtype=getattr(torch, dtype))
    bias = torch.randn(SQ, SK).to(query.dtype)
    want = naive.attention(query.double(), key.double(), value.double(), bias.double())[0]
    for mask_dtype in (torch.float32, query.dtype):
        close(SDPA(query, key, value, bias.to(mask_dtype)), want, query.dtype)


@pytest.mark.parametrize("query_dtype, mask_dtype", [
    ("float32", "bfloat16"), ("float32", "float16"), ("float32", "float64"), ("bfloat16", "float16"),
    ("float16", "bfloat16"),
    ("bfloat16", "float64"), ("float64", "float16"), ("float32", "int64"),
    ("float32", "uint8"), ("float32", "complex64")])
def test_mask_dtypes_refused(query_dtype, mask_dtype):
    query, key, value = tensors(B, H, SQ, 8, keys=SK, dtype=getattr(torch, query_dtype))
    with refused(RuntimeError, query_dtype, mask_dtype, "attn_mask"):
        SDPA(query, key, value, torch.ones(SQ, SK).to(getattr(torch, mask_dtype)))


def test_float64_with_a_float32_mask_is_never_wrong():
    query, key, value = tensors(B, H, SQ, 8, keys=SK, dtype=torch.float64)
    mask = torch.randn(SQ, SK)
    want = naive.attention(query, key, value, mask.double())[0]
    close(SDPA(query, key, value, mask), want, torch.float64)


def test_mask_and_is_causal_exclude_each_other():
    query, key, value = tensors(B, H, SQ, 8)
    with refused(RuntimeError, "attn_mask", "is_causal"):
        SDPA(query, key, value, torch.ones(SQ, SQ, dtype=torch.bool), is_causal=True)
    for bias in (causal_upper_left(SQ, SQ), causal_lower_right(SQ, SQ)):
        with refused(ValueError, "CausalBias", "is_causal"):
            SDPA(query, key, value, bias, is_causal=True)


# ---- sinks and the log-sum-exp ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sink_is_a_key_whose_value_is_zero(dtype):
    dtype = getattr(torch, dtype)
    query, key, value = tensors(B, H, SQ, 8, keys=SK, dtype=dtype)
    sinks = torch.randn(H).to(dtype)
    out, lse = SDPA(query, key, value, sinks=sinks, return_lse=True)
    plain, plain_lse = SDPA(query, key, value, return_lse=True)
    both = torch.logaddexp(plain_lse.double(), sinks.double()[:, None])
    torch.testing.assert_close(lse.double(), both, rtol=1e-6 if dtype is not torch.float64 else 1e-14, atol=3e-4)
    close(out, plain.double() * torch.exp(plain_lse.double() - both)[..., None], dtype)


def test_a_row_with_only_a_sink():
    query, key, value = tensors(B, H, SQ, 8, keys=SK)
    sinks = torch.randn(H)
    out, lse = SDPA(query, key, value, torch.zeros(SQ, SK, dtype=torch.bool), sinks=sinks, return_lse=True)
    assert (out == 0).all()
    torch.testing.assert_close(lse, sinks[:, None].expand(B, H, SQ), rtol=1e-6, atol=1e-6)


def test_a_sink_given_to_one_part_merges():
    """Two halves of the keys, the sink with one: combined by their log-sum-exps they give the whole."""
    query, key, value = tensors(B, H, SQ, 8, keys=10, dtype=torch.float64)
    sinks = torch.randn(H, dtype=torch.float64)
    whole, whole_lse = SDPA(query, key, value, sinks=sinks, return_lse=True)
    a, a_lse = SDPA(query, key[:, :, :4], value[:, :, :4], sinks=sinks, return_lse=True)
    b, b_lse = SDPA(query, key[:, :, 4:], value[:, :, 4:], return_lse=True)
    lse = torch.logaddexp(a_lse, b_lse)
    out = a * torch.exp(a_lse - lse)[..., None] + b * torch.exp(b_lse - lse)[..., None]
    close(whole, out, torch.float64)
    close(whole_lse, lse, torch.float64)


def test_minus_infinity_in_a_bias_hides_finite_keys():
    """What a bias of -inf does over NaN is not promised; over finite keys it is a bool mask's False."""
    query, key, value = tensors(B, H, SQ, 8, keys=SK)
    mask = torch.rand(SQ, SK) > 0.5
    mask[2] = False
    bias = torch.zeros(SQ, SK).masked_fill(~mask, -math.inf)
    hidden, want = (SDPA(query, key, value, x, return_lse=True) for x in (bias, mask))
    for got, should in zip(hidden, want):
        torch.testing.assert_close(got, should)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lse_is_natural_and_of_the_promised_shape_and_dtype(dtype):
    query, key, value = tensors(B, H, SQ, 8, keys=SK, dtype=getattr(torch, dtype))
    out, lse = SDPA(query, key, value, return_lse=True)
    assert lse.shape == (B, H, SQ) and lse.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    want = torch.logsumexp(query.double() @ key.double().transpose(-1, -2) / math.sqrt(8), -1)
    torch.testing.assert_close(lse.double(), want, rtol=0, atol=1e-12 if dtype == "float64" else 3e-4)


def test_lse_is_differentiable():
    query, key, value = (x.requires_grad_() for x in tensors(B, H, SQ, 8, keys=SK, dtype=torch.float64))
    _, lse = SDPA(query, key, value, return_lse=True)
    grads = torch.autograd.grad(lse.square().sum(), (query, key))
    want = torch.logsumexp(query @ key.transpose(-1, -2) / math.sqrt(8), -1)
    for got, should in zip(grads, torch.autograd.grad(want.square().sum(), (query, key))):
        close(got, should, torch.float64)


# ---- rows that see nothing, and what is behind masks -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("SQ", [1, 3, 66])
def test_fully_masked_rows(SQ, dtype):
    query, key, value = (x.requires_grad_() for x in tensors(B, H, SQ, 8, keys=70, dtype=getattr(torch, dtype)))
    mask = torch.ones(B, 1, SQ, 70, dtype=torch.bool)
    mask[1, 0, SQ // 2] = False
    out, lse = SDPA(query, key, value, mask, return_lse=True)
    assert (out[1, :, SQ // 2] == 0).all() and (lse[1, :, SQ // 2] == -math.inf).all()
    assert torch.isfinite(lse[0]).all()
    (out.sum() + lse[lse > -math.inf].sum()).backward()
    assert (query.grad[1, :, SQ // 2] == 0).all()
    assert all(torch.isfinite(x.grad).all() for x in (query, key, value))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("SQ", [1, 3, 66])
@pytest.mark.parametrize("how", ["mask", "causal", "window", "lengths"])
def test_nan_and_infinity_behind_a_mask_do_not_reach_the_output(how, SQ, bad):
    query, key, value = tensors(B, H, SQ, 8, keys=80)
    key[:, :, 70:], value[:, :, 70:] = bad, bad
    options = {"mask": dict(attn_mask=(torch.arange(80) < 70)[None]), "causal": dict(is_causal=True),
               "window": dict(window=(None, 3)),
               "lengths": dict(kv_seqlens=torch.tensor([70, 70]))}[how]
    out, lse = SDPA(query, key, value, return_lse=True, **options)
    cut = {"mask": {}, "lengths": {}}.get(how, options)
    want, want_lse = SDPA(query, key[:, :, :70], value[:, :, :70], return_lse=True, **cut)
    close(out, want)
    close(lse, want_lse)


# ---- dimensions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 3), (2, 3, 1, 2)], ids=str)
def test_any_number_of_batch_dimensions(batch):
    query, key, value = tensors(*batch, 2, 5, 8, keys=7)
    out, lse = SDPA(query, key, value, return_lse=True)
    assert out.shape == (*batch, 2, 5, 8) and lse.shape == (*batch, 2, 5)
    close(out, math_sdpa(query, key, value))


def test_two_dimensional_inputs_have_no_heads():
    query, key, value = tensors(5, 8, keys=7, dv=3)
    out, lse = SDPA(query, key, value, torch.rand(5, 7) > 0.3, return_lse=True)
    assert out.shape == (5, 3) and lse.shape == (5,)
    close(SDPA(query, key, value, is_causal=True), math_sdpa(query, key, value, is_causal=True))


@pytest.mark.parametrize("shapes", [((2, 3), (2, 1), (1, 3)), ((2, 3), (3,), (2, 3)), ((1, 1), (2, 3), (2, 1)),
                                    ((3,), (2, 3), (1,)),
                                    ((), (4,), (4,)), ((1,), (4,), (4,))], ids=str)
def test_batch_dimensions_broadcast(shapes):
    query, key, value = (torch.randn(*batch, 2, n, 8, requires_grad=True) for batch, n in zip(shapes, (5, 7, 7)))
    batch = torch.broadcast_shapes(*shapes)
    out = SDPA(query, key, value)
    assert out.shape == (*batch, 2, 5, 8)
    wide = [x.expand(*batch, *x.shape[-3:]) for x in (query, key, value)]
    want = math_sdpa(*wide)
    close(out, want)
    grads = torch.autograd.grad(out.square().sum(), (query, key, value))
    for got, should in zip(grads, torch.autograd.grad(want.square().sum(), (query, key, value))):
        torch.testing.assert_close(got, should, rtol=1e-4, atol=1e-5)


def test_masks_and_lengths_with_several_batch_dimensions():
    query, key, value = tensors(2, 3, 4, 5, 8, keys=7, dtype=torch.float64)
    flat = [x.flatten(0, 1) for x in (query, key, value)]
    masks = (torch.rand(2, 1, 1, 5, 7), torch.rand(3, 1, 1, 7), torch.rand(2, 3, 4, 1, 7) > 0.3, torch.rand(4, 5, 7),
             torch.rand(5, 1))
    for mask in masks:
        want = naive.attention(*flat, mask.expand(2, 3, 4, 5, 7).flatten(0, 1))[0]
        close(SDPA(query, key, value, mask).flatten(0, 1), want, torch.float64)
    k_len, q_len = torch.tensor([[0, 3, 7], [1, 2, 5]]), torch.tensor([[5, 3, 0], [1, 2, 5]])
    out = SDPA(query, key, value, kv_seqlens=k_len, q_seqlens=q_len)
    want = naive.attention(*flat, kv_seqlens=k_len.flatten(), q_seqlens=q_len.flatten())[0]
    close(out.flatten(0, 1), want, torch.float64)


@pytest.mark.parametrize("which", range(3))
def test_one_dimensional_input_is_refused(which):
    given = list(tensors(4, 8))
    given[which] = torch.randn(8)
    with refused(RuntimeError, "at least 2 dimensions", 1):
        SDPA(*given)


def test_batch_dimensions_that_do_not_broadcast_are_refused():
    query, key, value = tensors(2, 3, 5, 8)
    with refused(RuntimeError, (2, 3, 5, 8), (4, 3, 5, 8)):
        SDPA(query, torch.randn(4, 3, 5, 8), torch.randn(4, 3, 5, 8))


# ---- empty -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_no_keys(causal, dtype):
    query, key, value = (x.requires_grad_() for x in tensors(B, H, 5, 8, keys=0, dv=6, dtype=getattr(torch, dtype)))
    out, lse = SDPA(query, key, value, is_causal=causal, return_lse=True)
    assert out.shape == (B, H, 5, 6) and out.dtype == query.dtype and (out == 0).all()
    assert (lse == -math.inf).all()
    out.sum().backward()
    assert (query.grad == 0).all() and key.grad.shape == (B, H, 0, 8) and value.grad.shape == (B, H, 0, 6)


@pytest.mark.parametrize("shape", [(B, H, 0, 8), (0, H, 5, 8), (B, 0, 5, 8), (0, 0, 0, 8)], ids=str)
def test_no_queries_no_batch_no_heads(shape):
    query, key, value = (x.requires_grad_() for x in tensors(*shape, keys=4, dv=6))
    out, lse = SDPA(query, key, value, return_lse=True)
    assert isinstance(out, torch.Tensor) and out.shape == (*shape[:-1], 6) and out.dtype == query.dtype
    assert lse.shape == shape[:-1] and lse.dtype == torch.float32
    out.sum().backward()
    assert all(x.grad.shape == x.shape and (x.grad == 0).all() for x in (query, key, value))


# ---- heads -----------------------------------------------------------------------------------------------------------


def test_other_heads_without_enable_gqa_are_refused():
    query, key, value = tensors(B, 4, 5, 8, heads=2)
    with refused(RuntimeError, "enable_gqa", 4, 2):
        SDPA(query, key, value)


@pytest.mark.parametrize("key_heads, value_heads", [(2, 2), (1, 1), (6, 6), (2, 3), (3, 2), (1, 6), (6, 1), (3, 6)])
def test_enable_gqa_key_and_value_heads_each_divide(key_heads, value_heads):
    query = torch.randn(B, 6, 5, 8, requires_grad=True)
    key = torch.randn(B, key_heads, 7, 8, requires_grad=True)
    value = torch.randn(B, value_heads, 7, 8, requires_grad=True)
    out = SDPA(query, key, value, enable_gqa=True)
    want = math_sdpa(query, key.repeat_interleave(6 // key_heads, 1), value.repeat_interleave(6 // value_heads, 1))
    close(out, want)
    grads = torch.autograd.grad(out.square().sum(), (query, key, value))
    for got, should in zip(grads, torch.autograd.grad(want.square().sum(), (query, key, value))):
        torch.testing.assert_close(got, should, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key_heads, value_heads", [(4, 4), (5, 5), (12, 12), (2, 4), (4, 2), (0, 0)])
def test_enable_gqa_heads_that_do_not_divide_are_refused(key_heads, value_heads):
    query, key, value = torch.randn(B, 6, 5, 8), torch.randn(B, key_heads, 5, 8), torch.randn(B, value_heads, 5, 8)
    with refused(RuntimeError, 6, key_heads, value_heads):
        SDPA(query, key, value, enable_gqa=True)


# ---- sizes that do not fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [(8, 5), (5, 8), (64, 1), (1, 64)], ids=str)
def test_value_dimension_may_differ(dims):
    query, key, value = tensors(B, H, SQ, dims[0], keys=SK, dv=dims[1])
    out = SDPA(query, key, value)
    assert out.shape == (B, H, SQ, dims[1])
    close(out, math_sdpa(query, key, value))


def test_key_and_value_of_different_lengths_are_refused():
    query, key, value = tensors(B, H, SQ, 8, keys=7)
    with refused(RuntimeError, "key", "value", 7, 6):
        SDPA(query, key, value[:, :, :6])


def test_query_and_key_of_different_dimensions_are_refused():
    query, key, value = tensors(B, H, SQ, 8)
    with refused(RuntimeError, "query", "key", 8, 6):
        SDPA(query, key[..., :6], value)


@pytest.mark.parametrize("dims", [(0, 8), (8, 0), (513, 8), (8, 513)], ids=str)
def test_head_dimensions_out_of_range_are_refused(dims):
    query, key, value = torch.randn(1, 1, 3, dims[0]), torch.randn(1, 1, 3, dims[0]), torch.randn(1, 1, 3, dims[1])
    with refused(RuntimeError, dims[0] if dims[0] != 8 else dims[1], 1, 512):
        SDPA(query, key, value)


# ---- dtypes and devices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16", "float32"), ("float32", "float32", "float16"),
                                    ("float64", "float32", "float32"),
                                    ("bfloat16", "float16", "float32")], ids="+".join)
def test_different_dtypes_are_refused(dtypes):
    given = [x.to(getattr(torch, d)) for x, d in zip(tensors(B, H, SQ, 8), dtypes)]
    with refused(RuntimeError, "query", "key", "value", *dtypes):
        SDPA(*given)


def test_different_devices_are_refused():
    query, key, value = tensors(B, H, SQ, 8)
    with refused(RuntimeError, "query", "key", "value", query.device.type, "meta"):
        SDPA(query, key.to("meta"), value)
    with refused(RuntimeError, "query", "key", "value", query.device.type, "meta"):
        SDPA(query.to("meta"), key, value)


def test_mask_on_another_device_is_refused():
    query, key, value = tensors(B, H, SQ, 8)
    with refused(RuntimeError, "attn_mask", query.device.type, "meta"):
        SDPA(query, key, value, torch.zeros(SQ, SQ, device="meta"))


@pytest.mark.parametrize("dtype", ["int64", "int32", "int8", "uint8", "bool", "complex64", "complex128",
                                   "float8_e4m3fn", "float8_e5m2"])
def test_other_dtypes_are_refused(dtype):
    given = [torch.ones(B, H, SQ, 8).to(getattr(torch, dtype)) for _ in range(3)]
    with refused(RuntimeError, dtype, "float32", "bfloat16", "float16", "float64"):
        SDPA(*given)


def test_float64_is_computed_in_float64():
    query, key, value = tensors(B, H, 30, 8, keys=200, dtype=torch.float64)
    close(SDPA(query, key, value), math_sdpa(query, key, value), torch.float64)


@pytest.mark.parametrize("given", [None, 3.0, [[1.0]], "x"], ids=str)
def test_what_is_no_tensor_is_a_type_error(given):
    query, key, value = tensors(B, H, SQ, 8)
    with refused(TypeError, "key", type(given).__name__):
        SDPA(query, given, value)


# ---- numbers out of range --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan, math.inf, -math.inf])
def test_dropout_probability_out_of_range(p):
    with refused(ValueError, "dropout_p", p, "[0, 1]"):
        SDPA(*tensors(B, H, SQ, 8), dropout_p=p)


@pytest.mark.parametrize("softcap", [-1.0, math.nan, math.inf])
def test_softcap_out_of_range(softcap):
    with refused(ValueError, "softcap", softcap):
        SDPA(*tensors(B, H, SQ, 8), softcap=softcap)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_scale_that_is_not_finite(scale):
    with refused(ValueError, "scale", scale):
        SDPA(*tensors(B, H, SQ, 8), scale=scale)


@pytest.mark.parametrize("window", [(-2, 0), (0, -2), (1,), (1, 2, 3), 4, (1.5, 0), ("a", 0)], ids=str)
def test_window_out_of_range(window):
    with refused(ValueError, "window", window):
        SDPA(*tensors(B, H, SQ, 8), window=window)


# ---- lengths, sinks, slopes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q_seqlens", "kv_seqlens"])
def test_lengths_out_of_range_are_refused(name):
    query, key, value = tensors(B, H, 5, 8, keys=5)
    for bad in ([5, 6], [-1, 3]):
        with refused(RuntimeError, name, *(x for x in bad if not 0 <= x <= 5), 5):
            SDPA(query, key, value, **{name: torch.tensor(bad, dtype=torch.int32)})


@pytest.mark.parametrize("name", ["q_seqlens", "kv_seqlens"])
def test_lengths_of_another_shape_or_dtype_are_refused(name):
    query, key, value = tensors(B, H, 5, 8)
    with refused(RuntimeError, name, (3,), (B,)):
        SDPA(query, key, value, **{name: torch.ones(3, dtype=torch.int32)})
    with refused(RuntimeError, name, "int32", "int64", "float32"):
        SDPA(query, key, value, **{name: torch.ones(B)})


@pytest.mark.parametrize("name", ["sinks", "alibi_slopes"])
def test_per_head_tensors_that_do_not_fit_are_refused(name):
    query, key, value = tensors(B, H, 5, 8)
    with refused(RuntimeError, name, 4, H):
        SDPA(query, key, value, **{name: torch.ones(4)})
    with refused(RuntimeError, name, "float64", "float32"):
        SDPA(query, key, value, **{name: torch.ones(H, dtype=torch.float64)})


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_in_either_integer_and_any_stride(dtype):
    query, key, value = tensors(B, H, 5, 8)
    lengths = torch.tensor([3, 9, 5, 9], dtype=dtype)[::2]
    close(SDPA(query, key, value, kv_seqlens=lengths)[0], SDPA(query[:1], key[:1, :, :3], value[:1, :, :3])[0])


def test_lengths_without_a_batch():
    """(H, S, D) and (S, D): one length, a tensor of no dimensions."""
    query, key, value = tensors(H, 5, 8, keys=7)
    out = SDPA(query, key, value, kv_seqlens=torch.tensor(3), q_seqlens=torch.tensor(4))
    close(out[:, :4], math_sdpa(query[:, :4], key[:, :3], value[:, :3]))
    assert (out[:, 4:] == 0).all()
    close(SDPA(query[0], key[0], value[0], kv_seqlens=torch.tensor(3)), math_sdpa(query[0], key[0, :3], value[0, :3]))


def test_alibi_slopes_have_no_gradient_and_say_so():
    query, key, value = tensors(B, H, 5, 8)
    slopes = torch.rand(H, requires_grad=True)
    with pytest.raises(RuntimeError, match="alibi_slopes"):
        SDPA(query, key, value, alibi_slopes=slopes).sum().backward()


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("SQ", [1, 20])
def test_dropout_of_everything(SQ, dtype):
    query, key, value = (x.requires_grad_() for x in tensors(B, H, SQ, 8, keys=30, dtype=getattr(torch, dtype)))
    out = SDPA(query, key, value, dropout_p=1.0)
    assert (out == 0).all()
    out.sum().backward()
    assert all((x.grad == 0).all() for x in (query, key, value))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_of_everything_drops_what_is_infinite(dtype):
    """So many weights that 16 random bits alone would keep some of them, times 0."""
    query, key, value = tensors(1, 2, 300, 8, keys=300, dtype=getattr(torch, dtype))
    value[:, :, ::3] = math.inf
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out = SDPA(*leaves, dropout_p=1.0)
    assert (out == 0).all()
    assert all((grad == 0).all() for grad in torch.autograd.grad(out, leaves, torch.ones_like(out)))


def test_dropout_follows_torch_s_generator():
    query, key, value = tensors(B, H, 20, 8, keys=30)
    torch.manual_seed(3)
    first, second = SDPA(query, key, value, dropout_p=0.5), SDPA(query, key, value, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(SDPA(query, key, value, dropout_p=0.5), first) and not torch.equal(first, second)
    state = torch.get_rng_state()
    SDPA(query, key, value)
    assert torch.equal(torch.get_rng_state(), state), "a call without dropout drew a random number"


def test_dropout_mask_is_a_function_of_batch_head_query_and_key_only():
    """Other options, dtypes, dimensions and lengths drop the same weights under the same seed."""
    def kept(SQ, SK, **options):
        torch.manual_seed(9)
        dtype = options.pop("dtype", torch.float32)
        values = torch.eye(SK, dtype=dtype).expand(B, options.pop("HK", 4), SK, SK)
        query, key = torch.zeros(B, 4, SQ, 8, dtype=dtype), torch.zeros(B, values.shape[1], SK, 8, dtype=dtype)
        return SDPA(query, key, values, dropout_p=0.4, enable_gqa=True, **options) != 0

    whole = kept(130, 200)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(kept(130, 200, dtype=dtype), whole)
    assert torch.equal(kept(130, 200, HK=1), whole)
    assert torch.equal(kept(1, 200), whole[:, :, :1])
    assert torch.equal(kept(17, 97), whole[:, :, :17, :97])
    assert torch.equal(kept(130, 200, is_causal=True), whole.tril())
    assert torch.equal(kept(130, 200, window=(3, 3)), whole.tril(3).triu(-3))


def test_forward_and_backward_drop_the_same_weights():
    """grad_value = (dropped weights)^T grad_out."""
    query, key = torch.randn(2, B, H, 20, 8).unbind()
    value = torch.eye(20).expand(B, H, 20, 20).clone().requires_grad_()
    weights = SDPA(query, key, value, dropout_p=0.4)
    upstream = torch.randn_like(weights)
    (grad,) = torch.autograd.grad(weights, value, upstream)
    torch.testing.assert_close(grad, weights.detach().transpose(-1, -2) @ upstream)


# ---- scale -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("SQ", [1, 20])
def test_scale_zero_is_the_mean(SQ, dtype):
    query, key, value = tensors(B, H, SQ, 8, keys=30, dtype=getattr(torch, dtype))
    out, lse = SDPA(query, key, value, scale=0.0, return_lse=True)
    close(out, value.double().mean(-2, keepdim=True).expand(B, H, SQ, 8), query.dtype)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(30)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_negative_scale(dtype):
    query, key, value = tensors(B, H, 20, 8, keys=30, dtype=getattr(torch, dtype))
    close(SDPA(query, key, value, scale=-0.5), SDPA(-query, key, value, scale=0.5), query.dtype)


# ---- layout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3),
                                  (0, 1, 3, 2), (3, 2, 1, 0)], ids=str)
@pytest.mark.parametrize("dv", [8, 6])
def test_output_follows_the_order_of_query_s_strides(order, dv):
    """A BSHD query viewed as BHSD gives an output that is BSHD in memory."""
    inverse = [order.index(d) for d in range(4)]
    sizes = (2, 3, 5, 8)
    query = torch.randn([sizes[d] for d in order]).permute(inverse)
    out = SDPA(query, torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, dv))
    assert out.shape == (2, 3, 5, dv)
    assert out.permute(order).is_contiguous(), f"strides {out.stride()} for a query with {query.stride()}"


def test_bshd_output_views_back_without_a_copy():
    packed = torch.randn(2, 5, 3, 4, 8)
    query, key, value = (x.transpose(1, 2) for x in packed.unbind(2))
    out = SDPA(query, key, value)
    out.transpose(1, 2).view(2, 5, 32)
    close(out, math_sdpa(query, key, value))


def test_stride_zero_and_reversed_like_views():
    query = torch.randn(1, 1, 1, 8).expand(B, H, SQ, 8)
    key = torch.randn(1, 1, SK, 1).expand(B, H, SK, 8)
    value = torch.randn(B, 1, SK, 8).expand(B, H, SK, 8)
    want = math_sdpa(query.contiguous(), key.contiguous(), value.contiguous())
    close(SDPA(query, key, value), want)


# ---- autograd --------------------------------------------------------------------------------------------------------


def test_gradient_only_for_the_mask():
    query, key, value = tensors(B, H, SQ, 8, keys=SK)
    bias = torch.randn(H, SQ, SK, requires_grad=True)
    (grad,) = torch.autograd.grad(SDPA(query, key, value, bias).square().sum(), bias)
    want = math_sdpa(query, key, value, bias.expand(B, H, SQ, SK))
    close(grad, torch.autograd.grad(want.square().sum(), bias)[0])


@pytest.mark.parametrize("needs", range(1, 8))
def test_any_subset_of_inputs_may_require_grad(needs):
    given = [x.requires_grad_(bool(needs >> i & 1)) for i, x in enumerate(tensors(B, H, SQ, 8, keys=SK))]
    wanted = [x for x in given if x.requires_grad]
    got = torch.autograd.grad(SDPA(*given).square().sum(), wanted)
    for a, b in zip(got, torch.autograd.grad(math_sdpa(*given).square().sum(), wanted)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- refusals change nothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [dict(dropout_p=2.0), dict(attn_mask=torch.zeros(3)),
                                 dict(attn_mask=torch.ones(4, 4), is_causal=True),
                                 dict(kv_seqlens=torch.tensor([9, 9]), dropout_p=0.5),
                                 dict(sinks=torch.ones(7), dropout_p=0.5)],
                         ids=lambda d: "+".join(d))
def test_a_refused_call_changes_nothing(bad):
    query, key, value = tensors(B, H, 4, 8)
    before, state = [x.clone() for x in (query, key, value)], torch.get_rng_state()
    with pytest.raises((RuntimeError, ValueError)):
        SDPA(query, key, value, **bad)
    assert all(torch.equal(a, b) for a, b in zip(before, (query, key, value)))
    assert torch.equal(torch.get_rng_state(), state), "the refused call drew a random number"
    close(SDPA(query, key, value), math_sdpa(query, key, value))
