"""Values of the forward pass against the float64 reference, by the rule of compare.py."""

import math

import pytest
import torch

import flashattn_ext as fa
import poison
from cases import ALONE, DTYPES, EDGES, FLOATS, HEAD_DIMS, LAYOUTS, TOGETHER, Case, build
from compare import check_case, eager, kept_after, unchanged
import naive


def forward(case, device):
    return check_case(case, device, backward=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ALONE + TOGETHER, ids="+".join)
def test_options(options, dtype, device):
    forward(Case(dtype=dtype, HQ=4, HK=2, options=options), device)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [(), ("causal",), ("bias_strided", "softcap")], ids="+".join)
def test_layouts(layout, options, dtype, device):
    case = Case(dtype=dtype, layout=layout, options=options, SQ=67, SK=101, D=24)
    results = forward(case, device)
    assert torch.isfinite(results["out"]).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (4, 2), (6, 2), (9, 3), (8, 1), (5, 5)], ids=str)
@pytest.mark.parametrize("SQ", [1, 3, 40])
@pytest.mark.parametrize("options", [(), ("causal",), ("lower_right", "window_left")], ids="+".join)
def test_grouped_heads(heads, SQ, options, dtype, device):
    forward(Case(HQ=heads[0], HK=heads[1], SQ=SQ, SK=71, dtype=dtype, options=options), device)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", [(), ("causal",), ("lower_right",), ("mask_key",)], ids="+".join)
@pytest.mark.parametrize("edge", range(len(EDGES)))
def test_lengths_at_tile_edges(edge, options, dtype, device):
    SQ = EDGES[edge]
    for SK in {SQ, EDGES[-1 - edge], EDGES[(edge * 7 + 3) % len(EDGES)]}:
        forward(Case(B=1, SQ=SQ, SK=SK, D=32, dtype=dtype, options=options), device)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_head_dims(D, dtype, device):
    forward(Case(B=1, SQ=23, SK=29, D=D, dtype=dtype, options=("causal",)), device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(64, 32), (32, 64), (192, 128), (1, 7), (7, 1), (65, 33), (16, 512), (512, 16),
                                  (3, 257)],
                         ids=str)
def test_value_dim_differs(dims, dtype, device):
    forward(Case(D=dims[0], DV=dims[1], SQ=17, SK=70, dtype=dtype, layout="packed"), device)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("SQ", [1, 3, 4, 5, 63])
@pytest.mark.parametrize("options", [(), ("kv_lengths",), ("mask_key", "sinks"), ("bias_head", "alibi"), ("dropout",)],
                         ids="+".join)
def test_few_queries_against_many_keys(SQ, options, dtype, device):
    """Long enough for the keys to be split and merged again."""
    forward(Case(B=1, HQ=2, HK=1, SQ=SQ, SK=1100, D=24, dtype=dtype, options=options), device)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", [(), ("causal",), ("window_left", "causal"),
                                     ("kv_lengths", "q_lengths", "lower_right")],
                         ids="+".join)
def test_many_blocks(options, dtype, device):
    forward(Case(B=1, HQ=3, HK=1, SQ=451, SK=389, D=64, dtype=dtype, options=options), device)


# ---- the weights themselves, read out through an identity V: sees what averages hide ---------------------------------


def weights(query, key, **options):
    """(B, HQ, SQ, SK): the attention weights, as the output for V = identity."""
    B, HK, SK = key.shape[:3]
    identity = torch.eye(SK, dtype=query.dtype).expand(B, HK, SK, SK)
    return fa.scaled_dot_product_attention(query, key, identity, **options)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", [(), ("causal",), ("lower_right",), ("window",), ("mask_full",), ("kv_lengths",)],
                         ids="+".join)
@pytest.mark.parametrize("S", EDGES)
def test_each_weight(S, options, dtype, device):
    """Every weight is right to a few roundings, each hidden one exactly 0, for one query row and for many."""
    for SQ in (1, S):
        case = Case(B=2, HQ=2, HK=1, SQ=SQ, SK=S, D=8, dtype=dtype, options=options)
        inputs = build(case, device)
        got = weights(inputs.query, inputs.key, **inputs.options).double()
        wide = inputs.map(lambda name, x: x.double() if x.is_floating_point() else x)
        identity = torch.eye(S, dtype=torch.float64).expand(2, 1, S, S)
        want = naive.attention(wide.query, wide.key, identity, **wide.options)[0]
        assert torch.equal(got == 0, want == 0), "a weight is 0 where it should not be, or the other way round"
        # Weights and their sum are rounded once each; float32 also carries the rounding of scores of size about 10.
        # The absolute part is the spacing of float16 below 6e-5.
        relative = {"float32": 2e-5, "bfloat16": 2.0**-6, "float16": 2.0**-9}[dtype]
        excess = ((got - want).abs() - relative * want - 1.2e-7).max().item()
        assert excess <= 0, f"SQ {SQ}: a weight is {excess:.2e} further off than {relative:.2e} of itself"


# ---- extreme values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [1e-3, 30.0, 300.0])
def test_scores_from_tiny_to_huge(size, dtype, device):
    """Scores up to 3e6 (3e5 in half precision): the softmax is one-hot, never NaN."""
    inputs = build(Case(SQ=33, SK=130, D=32, dtype=dtype), device)
    query = inputs.query * size
    out, lse = fa.scaled_dot_product_attention(query, inputs.key, inputs.value, return_lse=True)
    want, want_lse = naive.attention(query.double(), inputs.key.double(), inputs.value.double())
    same, _ = eager(query, inputs.key, inputs.value)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()
    error, theirs = ((x.double() - want).abs().max() for x in (out, same))
    assert error <= 2 * theirs + 16 * torch.finfo(out.dtype).eps
    assert ((lse.double() - want_lse).abs() <= 2e-5 * want_lse.abs().clamp_min(1) + 2.0**-12).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_bias_of_the_lowest_finite_number(dtype, device):
    """Many models hide keys with finfo.min instead of -inf; rows with nothing else then average all keys."""
    inputs = build(Case(SQ=9, SK=40, dtype=dtype), device)
    lowest = torch.finfo(inputs.query.dtype).min
    bias = torch.zeros(9, 40, dtype=inputs.query.dtype)
    bias[:, 20:] = lowest
    bias[3] = lowest
    out = fa.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, bias)
    want = naive.attention(inputs.query.double(), inputs.key.double(), inputs.value.double(), bias.double())[0]
    assert torch.isfinite(out).all()
    rows = [i for i in range(9) if i != 3]  # row 3 depends on how a score of -3e38 rounds
    atol = {"float32": 2e-6, "bfloat16": 2e-2, "float16": 2e-3}[dtype]
    torch.testing.assert_close(out[:, :, rows].double(), want[:, :, rows], rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", FLOATS)
def test_values_near_the_largest_finite_number(dtype, device):
    """A weighted mean of finite values is finite. float16 accumulates in the wider float32 and takes any; the range of
    float32 and bfloat16 is that of their sums, so there the values leave room for 64 of them."""
    inputs = build(Case(SQ=5, SK=64, dtype=dtype), device)
    size = torch.finfo(inputs.value.dtype).max / (2 if dtype == "float16" else 128)
    value = torch.full_like(inputs.value, size)
    out = fa.scaled_dot_product_attention(inputs.query, inputs.key, value)
    torch.testing.assert_close(out, value[:, :, :5], rtol=1e-2, atol=0)


# ---- unwritten and out-of-bounds memory ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [(), ("q_lengths",), ("mask_full",), ("lower_right",), ("kv_lengths", "window")],
                         ids="+".join)
def test_every_output_is_written(options, dtype, device):
    """Freed memory of the outputs' sizes is full of NaN just before the call."""
    case = Case(B=3, SQ=37, SK=21, dtype=dtype, options=options)
    shapes = ((3, 2, 37, 16), (3, 2, 37))
    with poison.free_memory(*shapes, dtype=case.torch_dtype), poison.free_memory(shapes[1]):
        results = forward(case, device)
    assert not results["out"].isnan().any() and not results["lse"].isnan().any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["packed", "strided", "offset"])
@pytest.mark.parametrize("S", [1, 7, 16, 65, 97])
def test_nothing_beside_a_view_is_used(S, layout, dtype, device):
    """NaN between and around the rows of strided views reaches no result."""
    for D in (5, 16, 33):
        results = forward(Case(B=1, SQ=S, SK=S, D=D, dtype=dtype, layout=layout, options=("causal",)), device)
        assert not results["out"].isnan().any()


@pytest.mark.parametrize("kind", sorted(poison.VALUES))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("SQ", [1, 50])
@pytest.mark.parametrize("options", [("mask_key",), ("kv_lengths",), ("causal",), ("window_left", "lower_right"),
                                     ("mask_2d", "sinks"), ("kv_lengths", "dropout"), ("pad_left",), ("pad_holes",)],
                         ids="+".join)
def test_hidden_keys_never_reach_the_output(options, SQ, dtype, kind, device):
    """The same output whatever the keys and values hold that no query sees."""
    case = Case(HQ=4, HK=2, SQ=SQ, SK=120, dtype=dtype, options=options)
    inputs = build(case, device)
    see, _ = naive.visible(case.B, SQ, case.SK, **{k: v for k, v in inputs.options.items() if k in
                           ("attn_mask", "is_causal", "window", "q_seqlens", "kv_seqlens")})
    mask = inputs.options.get("attn_mask")
    if type(mask) is torch.Tensor:
        see = see & mask
    if see.expand(case.B, -1, SQ, case.SK).any(2).all():
        pytest.skip("this window hides no key from the last queries")
    spoiled = poison.hidden_keys(inputs, see, kind)
    torch.manual_seed(7)
    clean = fa.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, return_lse=True, **inputs.options)
    torch.manual_seed(7)
    got = fa.scaled_dot_product_attention(spoiled.query, spoiled.key, spoiled.value, return_lse=True, **inputs.options)
    for name, a, b in zip(("out", "lse"), got, clean):
        unchanged(name, a, b, f"{kind} in hidden keys")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("S", [6, 64, 97, 193])
def test_causal_rows_do_not_see_a_later_nan(S, dtype, device):
    """A NaN key reaches the rows that see it and no other."""
    inputs = build(Case(SQ=S, SK=S, dtype=dtype), device)
    clean = fa.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, is_causal=True)
    at = S // 2
    key, value = inputs.key.clone(), inputs.value.clone()
    key[:, :, at] = value[:, :, at] = math.nan
    out = fa.scaled_dot_product_attention(inputs.query, key, value, is_causal=True)
    unchanged("out", out[:, :, :at], clean[:, :, :at])
    assert out[:, :, at:].isnan().all()


def test_nan_query_spoils_its_own_row_only(device):
    inputs = build(Case(SQ=70, SK=70), device)
    clean = fa.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value)
    query = inputs.query.clone()
    query[1, 0, 13, 3] = math.nan
    out = fa.scaled_dot_product_attention(query, inputs.key, inputs.value)
    spoiled = torch.zeros(2, 2, 70, dtype=torch.bool)
    spoiled[1, 0, 13] = True
    assert out[spoiled].isnan().all()
    unchanged("out", out[~spoiled], clean[~spoiled], "NaN in another query")


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("S", [5, 64, 97, 193])
@pytest.mark.parametrize("SQ", [1, 66])
def test_dropout_keeps_exactly_the_weights_of_philox(S, SQ, dtype, device):
    p = 0.4
    inputs = build(Case(SQ=SQ, SK=S, D=8, dtype=dtype), device)
    keep = kept_after(11, p, 2, 2, SQ, S)
    torch.manual_seed(11)
    got = weights(inputs.query, inputs.key, dropout_p=p)
    assert torch.equal(got != 0, keep)


def test_dropout_rate(device):
    """The share of kept weights is 1 - p within 5 standard deviations, and their mean stays."""
    for p in (0.1, 0.5, 0.9):
        got = weights(torch.zeros(2, 8, 128, 4), torch.zeros(2, 8, 128, 4), dropout_p=p)
        n = got.numel()
        assert abs((got != 0).double().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
        kept = got[got != 0]
        torch.testing.assert_close(kept, torch.full_like(kept, naive.dropout_factor(p) / 128))
