"""The tests' own tools: the acceptance rule lets a correct result pass and none of these wrong ones."""

import math

import pytest
import torch

import compare
import naive
import poison
from cases import FLOATS, LAYOUTS, Case, arrange, build, upstream

CASE = Case(SQ=40, SK=65, D=32)


def accepted(results, case):
    inputs, grads = build(case), upstream(case)
    try:
        compare.check_all(results, *compare.expected(inputs, grads, case.torch_dtype), case.torch_dtype)
    except AssertionError:
        return False
    return True


def correct(case, change_inputs=lambda x: x):
    """The reference rounded once to the case's dtype: the best that any kernel can do; of changed inputs, a mistake."""
    inputs = change_inputs(build(case))
    results = compare.differentiate(compare.reference, compare.widen(inputs), upstream(case))
    return {name: x.to(torch.float32 if name == "lse" else case.torch_dtype) for name, x in results.items()}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", [(), ("causal",), ("bias_head", "sinks")], ids="+".join)
def test_the_rounded_reference_passes(options, dtype):
    case = CASE.but(dtype=dtype, options=options)
    assert accepted(correct(case), case)


def drop_last_key(inputs):
    options = dict(inputs.options, kv_seqlens=torch.full((2,), 64, dtype=torch.int32))
    return type(inputs)(inputs.query, inputs.key, inputs.value, options)


def scale_off(inputs):
    return type(inputs)(inputs.query * 1.02, inputs.key, inputs.value, inputs.options)


def swap_keys(inputs):
    value = inputs.value.clone()
    value[..., 7, :], value[..., 8, :] = inputs.value[..., 8, :], inputs.value[..., 7, :]
    return type(inputs)(inputs.query, inputs.key, value, inputs.options)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mistake", [drop_last_key, scale_off, swap_keys], ids=lambda f: f.__name__)
def test_a_mistake_in_the_inputs_is_seen(mistake, dtype):
    case = CASE.but(dtype=dtype)
    assert not accepted(correct(case, mistake), case)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["out", "lse", "grad_query", "grad_key", "grad_value"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_one_bad_element_is_seen(value, name, dtype):
    case = CASE.but(dtype=dtype)
    results = correct(case)
    results[name][torch.unravel_index(results[name].abs().argmax(), results[name].shape)] = value
    assert not accepted(results, case)


def test_an_error_of_three_times_eager_s_is_seen():
    case = CASE.but(dtype="bfloat16")
    ref, (same, _) = compare.expected(build(case), upstream(case), case.torch_dtype)
    for factor, passes in ((1.0, True), (4.0, False)):
        results = {name: (ref[name] + factor * (same[name].double() - ref[name])).to(same[name].dtype) for name in ref}
        results["lse"] = ref["lse"].float()
        assert accepted(results, case) == passes


def test_the_message_says_where_and_how_much():
    ref = torch.zeros(2, 3, dtype=torch.float64)
    got = ref.float()
    got[1, 2] = 0.5
    with pytest.raises(AssertionError, match=r"out: largest error 5.000e-01 > .*worst at \(1, 2\): 0.5, reference 0.0"):
        compare.check("out", got, ref, [ref.float()], torch.float32)
    with pytest.raises(AssertionError, match=r"shape \(2,\), expected \(2, 3\)"):
        compare.check("out", got[:, 0], ref, [ref], torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_hold_the_same_values_and_poison_around_them(layout):
    x = torch.randn(2, 3, 5, 4)
    view = arrange(x, layout)
    assert torch.equal(view, x[:1, :1].expand_as(x) if layout == "expanded" else x)
    whole = torch.empty(0).set_(view.untyped_storage())
    hidden = whole.numel() > view.numel()
    assert hidden == (layout in ("packed", "strided", "offset"))
    assert whole.isnan().any() == hidden


def test_hidden_keys_are_poisoned_and_only_they():
    inputs = build(Case(HQ=4, HK=2, SQ=6, SK=20, options=("causal",)))
    see, _ = naive.visible(2, 6, 20, is_causal=True)
    spoiled = poison.hidden_keys(inputs, see)
    for name in ("key", "value"):
        x = getattr(spoiled, name)
        assert x[:, :, 6:].isnan().all() and torch.equal(x[:, :, :6], getattr(inputs, name)[:, :, :6])
    assert torch.equal(spoiled.query, inputs.query)


def test_fresh_memory_is_poisoned():
    """What conftest.py turned on: memory that torch hands out uninitialised holds no zeros."""
    if not poison.fill_malloc():
        pytest.skip("this C library cannot fill memory")
    fresh = torch.empty(10007)
    assert (fresh.abs() > 1e38).all(), fresh
