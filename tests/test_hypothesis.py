"""Random shapes, strides, masks and options, forward and backward, against the float64 reference.

FLASHATTN_EXT_TEST_EXAMPLES sets how many (100); FLASHATTN_EXT_TEST_RANDOM=1 draws others in each run."""

import torch
from hypothesis import given
from hypothesis import strategies as st

import flashattn_ext as fa
from cases import EDGES, FLOATS, LAYOUTS, OPTIONS, Case
from compare import check_case

lengths = st.one_of(st.sampled_from(EDGES), st.integers(1, 140))
dims = st.one_of(st.sampled_from([1, 8, 16, 32, 64, 65, 128]), st.integers(1, 100))
MASKS = [name for name in OPTIONS if name.startswith(("mask_", "bias_"))] + ["causal", "lower_right", "upper_left"]
# At most one of each group in a case.
GROUPS = [MASKS, ["window", "window_left", "window_right", "window_self"], ["alibi", "alibi_batch"], ["softcap"],
          ["sinks", "sinks_same"], ["kv_lengths", "kv_lengths64"], ["q_lengths"], ["dropout", "dropout_often"],
          ["scale", "scale_zero", "scale_negative"]]


def size_of_sums(case):
    """Random cases are often of a few elements, whose sums of terms of about this size cancel: the error stays."""
    return 4.0 if case.dtype in ("float32", "float64") else 1.0


@st.composite
def cases(draw, dtypes=FLOATS + ("float64",)):
    group = draw(st.sampled_from([1, 1, 2, 3, 4, 8]))
    HK = draw(st.integers(1, 3 if group < 4 else 1))
    options = tuple(name for names in GROUPS for name in draw(st.lists(st.sampled_from(names), max_size=1)))
    D = draw(dims)
    return Case(B=draw(st.integers(1, 3)), HQ=HK * group, HK=HK, SQ=draw(lengths), SK=draw(lengths), D=D,
                DV=draw(st.one_of(st.just(D), dims)), dtype=draw(st.sampled_from(dtypes)),
                layout=draw(st.sampled_from(LAYOUTS)), options=options)


@given(cases())
def test_forward_and_backward(case):
    check_case(case, least=size_of_sums(case))


@given(cases())
def test_forward_of_one_query(case):
    """A single query row against many keys: the kernels of decoding, through the drop-in."""
    check_case(case.but(SQ=1, SK=case.SK * 7), backward=False, least=size_of_sums(case))


@given(st.lists(st.integers(0, 5), max_size=4), st.integers(0, 4), st.integers(0, 9), st.integers(0, 9),
       st.integers(1, 9),
       st.integers(1, 9), st.booleans())
def test_any_shape_with_zeros(batch, H, SQ, SK, D, DV, causal):
    """Sizes of 0 anywhere but in the head dimensions, any number of batch dimensions: the shapes of the definition."""
    q, k, v = (torch.randn(*batch, H, n, d, requires_grad=True) for n, d in ((SQ, D), (SK, D), (SK, DV)))
    out, lse = fa.scaled_dot_product_attention(q, k, v, is_causal=causal, return_lse=True)
    want, want_lse = fa.reference.attention(q, k, v, is_causal=causal, return_lse=True)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=1e-5)
    for got, should in zip(torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(want.sum(), (q, k, v))):
        torch.testing.assert_close(got, should, rtol=0, atol=1e-5)


@given(cases(), st.tuples(*[st.permutations(range(4))] * 3))
def test_any_order_of_strides(case, orders):
    """Query, key and value each with their dimensions in another order in memory."""
    case = case.but(layout="bhsd", SQ=min(case.SQ, 70), SK=min(case.SK, 70))
    names = ("query", "key", "value")

    def permute(name, x):
        if name not in names:
            return x
        order = orders[names.index(name)]
        return x.permute(order).contiguous().permute([order.index(d) for d in range(4)])

    check_case(case, change=permute, least=size_of_sums(case))
