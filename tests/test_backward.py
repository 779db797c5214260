"""Gradients against the float64 reference, by the rule of compare.py, and by gradcheck."""

import math

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right

import flashattn_ext as fa
import naive
import poison
from cases import ALONE, DTYPES, EDGES, FLOATS, HEAD_DIMS, LAYOUTS, TOGETHER, Case, build, upstream
from compare import check_all, check_case, differentiate, expected, ours, unchanged

SDPA = fa.scaled_dot_product_attention


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ALONE + TOGETHER, ids="+".join)
def test_options(options, dtype, device):
    check_case(Case(dtype=dtype, HQ=4, HK=2, options=options), device)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [(), ("causal",), ("bias_strided", "softcap")], ids="+".join)
def test_layouts(layout, options, dtype, device):
    check_case(Case(dtype=dtype, layout=layout, options=options, SQ=67, SK=101, D=24), device)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (6, 2), (9, 3), (8, 1)], ids=str)
@pytest.mark.parametrize("SQ", [1, 40])
@pytest.mark.parametrize("options", [("causal",), ("bias_key", "kv_lengths")], ids="+".join)
def test_grouped_heads(heads, SQ, options, dtype, device):
    check_case(Case(HQ=heads[0], HK=heads[1], SQ=SQ, SK=71, dtype=dtype, options=options), device)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", [(), ("causal",), ("lower_right",)], ids="+".join)
@pytest.mark.parametrize("edge", range(len(EDGES)))
def test_lengths_at_tile_edges(edge, options, dtype, device):
    SQ = EDGES[edge]
    for SK in {SQ, EDGES[-1 - edge], EDGES[(edge * 7 + 3) % len(EDGES)]}:
        check_case(Case(B=1, SQ=SQ, SK=SK, D=16, dtype=dtype, options=options), device)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_head_dims(D, dtype, device):
    check_case(Case(B=1, SQ=23, SK=29, D=D, dtype=dtype, options=("causal",)), device)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dims", [(64, 32), (32, 64), (192, 128), (1, 7), (65, 33), (16, 512), (512, 16)], ids=str)
def test_value_dim_differs(dims, dtype, device):
    check_case(Case(D=dims[0], DV=dims[1], SQ=17, SK=70, dtype=dtype, layout="packed"), device)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", [(), ("causal", "kv_lengths", "q_lengths"),
                                     ("lower_right", "window_left", "dropout"),
                                     ("bias_head", "sinks")], ids="+".join)
def test_many_blocks(options, dtype, device):
    check_case(Case(B=1, HQ=2, HK=1, SQ=431, SK=389, D=40, dtype=dtype, options=options), device)


# ---- gradcheck: the function against its own finite differences, without the reference -------------------------------

GRADCHECK = [o for o in ALONE + TOGETHER if not {"dropout", "dropout_often"} & set(o)]


def gradcheck_arguments(case):
    inputs = build(case)
    named = inputs.floats()
    leaves = [x.detach().clone().requires_grad_() for x in named.values()]

    def call(*tensors):
        given = dict(zip(named, tensors))
        options = {**inputs.options, **{k: v for k, v in given.items() if k in inputs.options}}
        torch.manual_seed(3)
        out, lse = SDPA(given["query"], given["key"], given["value"], return_lse=True, **options)
        return out, lse.masked_fill(lse == -math.inf, 0)

    return call, leaves


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("options", GRADCHECK + [("dropout", "causal")], ids="+".join)
def test_gradcheck(options):
    options = tuple("bias_batch" if o == "bias_inf" else o for o in options)  # -inf has no finite difference
    call, leaves = gradcheck_arguments(Case(B=2, HQ=2, HK=1, SQ=4, SK=5, D=3, DV=2, dtype="float64", options=options))
    assert torch.autograd.gradcheck(call, leaves, check_batched_grad=False, fast_mode=False)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("options", [(), ("causal", "bias_head", "sinks"), ("mask_key", "softcap")][:2], ids="+".join)
def test_gradcheck_with_batched_gradients(options):
    """vmap over the backward, as torch.autograd.grad(is_grads_batched=True) does."""
    options = ("bias_head", "sinks", "window_left") if options else ()
    call, leaves = gradcheck_arguments(Case(B=1, HQ=2, SQ=3, SK=4, D=2, dtype="float64", options=options))
    assert torch.autograd.gradcheck(call, leaves, check_batched_grad=True, fast_mode=True)


# ---- only what is asked for ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needs", [("query",), ("key",), ("value",), ("attn_mask",), ("sinks",), ("query", "value"),
                                   ("key", "value"), ("query", "attn_mask"), ("value", "sinks")], ids="+".join)
@pytest.mark.parametrize("dtype", FLOATS)
def test_any_subset_of_gradients(needs, dtype, device):
    check_case(Case(HQ=4, HK=2, dtype=dtype, options=("bias_head", "sinks")), device, needs=needs)


NAMES = ("query", "key", "value", "mask", "sinks")


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("needs", range(32))
def test_the_op_computes_only_what_needs_says(needs):
    """torch.ops.flashattn_ext.backward: a gradient whose bit is not set comes back with no element."""
    inputs = build(Case(options=("bias_full", "sinks")))
    bias, sinks = inputs.options["attn_mask"], inputs.options["sinks"]
    common = (None, None, None, None, None, 0.0, -1, -1, False, 0.0, False)
    q, k, v = inputs.query, inputs.key, inputs.value
    out, lse = torch.ops.flashattn_ext.forward(q, k, v, bias, sinks, *common)
    grad_out = torch.randn_like(out)
    every = torch.ops.flashattn_ext.backward(grad_out, None, q, k, v, out, lse, bias, sinks, *common, 31)
    some = torch.ops.flashattn_ext.backward(grad_out, None, q, k, v, out, lse, bias, sinks, *common, needs)
    for bit, (name, full, got, given) in enumerate(zip(NAMES, every, some, (q, k, v, bias, sinks))):
        assert full.shape == given.shape and full.dtype == given.dtype, name
        if needs >> bit & 1:
            assert torch.equal(got, full), f"{name} differs when only {needs:05b} is asked for"
        else:
            assert got.shape == (0,) and got.dtype == given.dtype, f"{name} was computed: {tuple(got.shape)}"


def test_no_gradient_no_graph(device):
    inputs = build(Case(), device)
    out, lse = SDPA(inputs.query, inputs.key, inputs.value, return_lse=True)
    assert not out.requires_grad and not lse.requires_grad
    with torch.no_grad():
        assert not SDPA(inputs.query.requires_grad_(), inputs.key, inputs.value).requires_grad
    with torch.inference_mode():
        assert not SDPA(inputs.query, inputs.key, inputs.value).requires_grad


# ---- masks -----------------------------------------------------------------------------------------------------------

MASK_SHAPES = [(2, 4, 19, 35), (1, 4, 19, 35), (2, 1, 19, 35), (2, 4, 1, 35), (2, 4, 19, 1), (1, 1, 19, 35),
               (2, 1, 1, 35),
               (1, 4, 1, 1), (2, 1, 1, 1), (1, 1, 1, 1), (4, 19, 35), (1, 19, 35), (4, 1, 35), (19, 35), (1, 35),
               (19, 1), (1, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_gradient_of_a_broadcast_mask(shape, dtype, device):
    """The gradient has the mask's own shape: it is summed over what was broadcast."""
    case = Case(HQ=4, HK=2, dtype=dtype)
    inputs, grads = build(case, device), upstream(case, device)
    inputs.options["attn_mask"] = torch.randn(shape, dtype=case.torch_dtype)
    got = differentiate(ours, inputs, grads)
    assert got["grad_attn_mask"].shape == shape
    check_all(got, *expected(inputs, grads, case.torch_dtype), case.torch_dtype)


def test_gradient_of_a_mask_that_is_expanded_and_strided(device):
    case = Case(HQ=4, HK=2)
    inputs, grads = build(case, device), upstream(case, device)
    inputs.options["attn_mask"] = torch.randn(19, 2, 35)[:, 1].expand(2, 1, 19, 35)
    check_all(differentiate(ours, inputs, grads), *expected(inputs, grads, torch.float32), torch.float32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradient_of_a_float32_mask_keeps_its_dtype(dtype, device):
    got = check_case(Case(dtype=dtype, options=("bias_f32",)), device)
    assert got["grad_attn_mask"].dtype == torch.float32


# ---- log-sum-exp -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [(), ("causal",), ("bias_full", "sinks"), ("mask_full", "softcap"), ("q_lengths",)],
                         ids="+".join)
def test_gradient_through_the_lse_alone(options, dtype, device):
    """out takes no part in the loss: its gradient is zero, only grad_lse comes down."""
    case = Case(HQ=4, HK=2, dtype=dtype, options=options)
    inputs, (grad_out, grad_lse) = build(case, device), upstream(case, device)
    grads = (torch.zeros_like(grad_out), grad_lse)
    check_all(differentiate(ours, inputs, grads), *expected(inputs, grads, case.torch_dtype), case.torch_dtype)
    query = inputs.query.detach().requires_grad_()
    _, lse = SDPA(query, inputs.key, inputs.value, return_lse=True, **inputs.options)
    (alone,) = torch.autograd.grad(lse, query, grad_lse)
    unchanged("grad_query", alone, differentiate(ours, inputs, grads, ("query",))["grad_query"],
              "the layout of a gradient of zeros")


def test_gradient_through_out_alone_with_lse_returned(device):
    case = Case()
    inputs, (grad_out, _) = build(case, device), upstream(case, device)
    got = differentiate(ours, inputs, (grad_out, None))
    check_all(got, *expected(inputs, (grad_out, None), torch.float32), torch.float32)


# ---- rows and keys that see nothing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("SQ", [1, 20])
def test_everything_hidden(SQ, dtype, device):
    """No row sees a key: output 0, log-sum-exp -inf, every gradient 0."""
    case = Case(SQ=SQ, dtype=dtype)
    inputs, grads = build(case, device), upstream(case, device)
    for options in ({"attn_mask": torch.zeros(SQ, 35, dtype=torch.bool)},
                    {"kv_seqlens": torch.zeros(2, dtype=torch.int32)},
                    {"attn_mask": torch.full((SQ, 35), -math.inf, dtype=case.torch_dtype)}):
        inputs.options = options
        got = differentiate(ours, inputs, grads)
        assert (got["lse"] == -math.inf).all()
        assert all((got[name] == 0).all() for name in got if name != "lse")


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_past_the_length_send_nothing_down(dtype, device):
    """NaN in the query rows and output gradients past q_seqlens changes no gradient."""
    case = Case(B=3, SQ=33, SK=40, dtype=dtype, options=("q_lengths", "sinks"))
    inputs, (grad_out, _) = build(case, device), upstream(case, device)
    past = torch.arange(33)[None] >= inputs.options["q_seqlens"][:, None]
    clean = differentiate(ours, inputs, (grad_out, None))
    grad_out = grad_out.clone()
    grad_out.transpose(1, 2)[past] = math.nan
    spoiled = poison.hidden_rows(inputs, inputs.options["q_seqlens"])
    got = differentiate(ours, spoiled, (grad_out, None))
    for name in got:
        unchanged(name, got[name], clean[name], "NaN past the length")
    assert (got["out"].transpose(1, 2)[past] == 0).all()
    assert (got["grad_query"].transpose(1, 2)[past] == 0).all()


@pytest.mark.parametrize("kind", sorted(poison.VALUES))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [("mask_key",), ("kv_lengths",), ("causal",), ("mask_2d", "sinks")], ids="+".join)
def test_hidden_keys_never_reach_a_gradient(options, dtype, kind, device):
    """Every gradient is the same whatever hidden keys and values hold; their own is 0."""
    case = Case(HQ=4, HK=2, SQ=30, SK=110, dtype=dtype, options=options)
    inputs, grads = build(case, device), upstream(case, device)
    see, _ = naive.visible(2, 30, 110, is_causal="causal" in options, kv_seqlens=inputs.options.get("kv_seqlens"))
    if "attn_mask" in inputs.options:
        see = see & inputs.options["attn_mask"]
    spoiled = poison.hidden_keys(inputs, see, kind)
    clean, got = differentiate(ours, inputs, grads), differentiate(ours, spoiled, grads)
    for name in got:
        unchanged(name, got[name], clean[name], f"{kind} in hidden keys", case.torch_dtype)
    hidden = ~see.expand(2, 4, 30, 110).any(2).any(1)
    for name in ("grad_key", "grad_value"):
        assert (got[name].transpose(1, 2)[hidden] == 0).all(), name


def test_zero_upstream_gradient_gives_exact_zeros(device):
    inputs = build(Case(options=("bias_full", "sinks")), device)
    got = differentiate(ours, inputs, (torch.zeros(2, 2, 19, 16), None))
    assert all((got[name] == 0).all() for name in got if name.startswith("grad_"))


# ---- upstream gradients in any layout --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_upstream_gradient_in_any_layout(dtype, device):
    """Expanded (as sum() gives it), transposed and strided grad_out and grad_lse give what contiguous ones give."""
    case = Case(dtype=dtype, SQ=33)
    inputs, (grad_out, grad_lse) = build(case, device), upstream(case, device)
    one = (torch.ones((), dtype=case.torch_dtype).expand(2, 2, 33, 16), torch.ones(()).expand(2, 2, 33))
    swapped = (grad_out.transpose(2, 3).contiguous().transpose(2, 3),
               grad_lse.transpose(0, 2).contiguous().transpose(0, 2))
    wide = (torch.full((2, 2, 66, 33), math.nan, dtype=case.torch_dtype)[:, :, ::2, 1::2].copy_(grad_out), grad_lse)
    for strided in (one, swapped, wide):
        plain = differentiate(ours, inputs, tuple(g.contiguous() for g in strided))
        got = differentiate(ours, inputs, strided)
        for name in got:
            unchanged(name, got[name], plain[name], "the layout of the upstream gradient", case.torch_dtype)


def test_sum_backward(device):
    query, key, value = (x.requires_grad_() for x in torch.randn(3, 2, 2, 9, 8).unbind())
    SDPA(query, key, value).sum().backward()
    assert torch.isfinite(query.grad).all() and value.grad.sum().item() == pytest.approx(2 * 2 * 9 * 8, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_have_their_input_s_shape_dtype_and_stride_order(layout, device):
    inputs = build(Case(layout=layout, dtype="bfloat16"), device)
    got = differentiate(ours, inputs, upstream(Case(layout=layout, dtype="bfloat16"), device))
    for name in ("query", "key", "value"):
        given, grad = getattr(inputs, name), got["grad_" + name]
        assert grad.shape == given.shape and grad.dtype == given.dtype
        if layout != "expanded":
            assert grad.stride() == torch.empty_like(given).stride(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_gradient_is_written(dtype, device):
    """Freed memory of the gradients' sizes is full of NaN just before the backward."""
    case = Case(B=3, SQ=37, SK=21, HQ=4, HK=2, dtype=dtype, options=("lower_right", "q_lengths", "kv_lengths"))
    shapes = ((3, 4, 37, 16), (3, 2, 21, 16))
    with poison.free_memory(*shapes, dtype=case.torch_dtype), poison.free_memory(*shapes):
        got = check_case(case, device)
    assert not any(got[name].isnan().any() for name in got)


def test_accumulates_into_grad(device):
    """backward() twice adds: .grad is twice one gradient."""
    query, key, value = (x.requires_grad_() for x in torch.randn(3, 1, 2, 9, 8).unbind())
    for _ in range(2):
        SDPA(query, key, value, is_causal=True).square().sum().backward()
    (once,) = torch.autograd.grad(SDPA(query, key, value, is_causal=True).square().sum(), query)
    torch.testing.assert_close(query.grad, 2 * once)


def test_graph_can_be_kept_and_used_twice(device):
    query, key, value = (x.requires_grad_() for x in torch.randn(3, 1, 2, 9, 8).unbind())
    out = SDPA(query, key, value, dropout_p=0.5)
    first = torch.autograd.grad(out.sum(), (query, key, value), retain_graph=True)
    second = torch.autograd.grad(out.sum(), (query, key, value))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_changing_an_input_before_backward_is_noticed(device):
    query, key, value = (x.requires_grad_() for x in torch.randn(3, 1, 2, 9, 8).unbind())
    out = SDPA(query, key, value)
    with torch.no_grad():
        key.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_lower_right_bias_aligns_the_ends_of_the_lengths(device):
    """Sequence by sequence the same as cutting query, key and value to their lengths."""
    case = Case(B=3, SQ=12, SK=20, dtype="float64")
    inputs = build(case, device)
    q_len, k_len = torch.tensor([12, 5, 1]), torch.tensor([20, 9, 13])
    query = inputs.query.detach().requires_grad_()
    out = SDPA(query, inputs.key, inputs.value, causal_lower_right(12, 20), q_seqlens=q_len, kv_seqlens=k_len)
    (grad,) = torch.autograd.grad(out.square().sum(), query)
    for b in range(3):
        nq, nk = int(q_len[b]), int(k_len[b])
        q = inputs.query[b:b + 1, :, :nq].detach().requires_grad_()
        k, v = inputs.key[b:b + 1, :, :nk], inputs.value[b:b + 1, :, :nk]
        want = naive.attention(q, k, v, causal_lower_right(nq, nk))[0]
        torch.testing.assert_close(out[b:b + 1, :, :nq], want)
        torch.testing.assert_close(grad[b:b + 1, :, :nq], torch.autograd.grad(want.square().sum(), q)[0])
        assert (out[b, :, nq:] == 0).all() and (grad[b, :, nq:] == 0).all()
