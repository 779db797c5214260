"""The float64 reference itself, against formulas that share nothing with it: loops over Python floats, the matrices of
naive.py, torch's own SDPA on its math path, and the published test vectors of the random numbers."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashattn_ext as fa
import naive
from cases import ALONE, TOGETHER, Case, build, upstream
from compare import differentiate, kept_after, reference, widen

attention = fa.reference.attention
NO_DROPOUT = [o for o in ALONE + TOGETHER if not {"dropout", "dropout_often"} & set(o)]


def by_hand(query, key, value, *, scale, causal=False, softcap=0.0, sink=None, slope=None, bias=None, hidden=()):
    """One head on nested lists: [[float]] (SQ, D), (SK, D), (SK, DV) -> out, lse. Written from the definition."""
    outs, lses = [], []
    for i, q in enumerate(query):
        scores = {}
        for j, k in enumerate(key):
            if (causal and j > i) or (i, j) in hidden:
                continue
            s = scale * sum(a * b for a, b in zip(q, k))
            if softcap:
                s = softcap * math.tanh(s / softcap)
            if bias is not None:
                s += bias[i][j]
            if slope is not None:
                s -= slope * abs(i - j)
            scores[j] = s
        total = math.fsum(math.exp(s) for s in scores.values()) + (math.exp(sink) if sink is not None else 0.0)
        lses.append(math.log(total) if total else -math.inf)
        outs.append([math.fsum(math.exp(s) / total * value[j][c] for j, s in scores.items()) if total else 0.0
                     for c in range(len(value[0]))])
    return outs, lses


@pytest.mark.parametrize("options", [
    dict(), dict(causal=True), dict(softcap=0.8), dict(sink=0.3), dict(slope=0.2), dict(bias=True),
    dict(hidden={(0, 0), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (2, 4)}),
    dict(causal=True, softcap=1.1, sink=-0.5, slope=0.4),
], ids=str)
def test_against_loops(options):
    g = torch.Generator().manual_seed(1)
    query, key, value, bias = (torch.randn(shape, generator=g, dtype=torch.float64)
                               for shape in ((4, 3), (5, 3), (5, 2), (4, 5)))
    given = dict(options, bias=bias.tolist() if options.get("bias") else None)
    want_out, want_lse = by_hand(query.tolist(), key.tolist(), value.tolist(), scale=0.6, **given)
    mask = bias if options.get("bias") else None
    if "hidden" in options:
        mask = torch.tensor([[(i, j) not in options["hidden"] for j in range(5)] for i in range(4)])
    heads = {name: torch.tensor([options[old]], dtype=torch.float64) for old, name in
             (("sink", "sinks"), ("slope", "alibi_slopes")) if old in options}
    out, lse = attention(query[None, None], key[None, None], value[None, None], mask, scale=0.6, return_lse=True,
                         is_causal=options.get("causal", False), softcap=options.get("softcap", 0.0), **heads)
    torch.testing.assert_close(out[0, 0], torch.tensor(want_out, dtype=torch.float64), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(lse[0, 0], torch.tensor(want_lse, dtype=torch.float64), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("options", ALONE + TOGETHER, ids="+".join)
def test_against_the_matrix_formula(options):
    """Output, log-sum-exp and every gradient equal naive.py's in float64."""
    case = Case(HQ=4, HK=2, B=3, dtype="float64", options=options)
    inputs, grads = widen(build(case)), upstream(case)
    p = inputs.options.get("dropout_p")
    keep = kept_after(5, p, 3, 4, case.SQ, case.SK) if p else None
    torch.manual_seed(5)
    got = differentiate(reference, inputs, grads)
    want = differentiate(lambda *a, **o: naive.attention(*a, **o, keep=keep), inputs, grads)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-11, atol=1e-12, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("options", [(), ("causal",), ("upper_left",), ("mask_full",),
                                     ("mask_2d",), ("bias_full",), ("bias_head",),
                                     ("bias_inf",), ("scale",), ("scale_negative",)], ids="+".join)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=str)
def test_against_torch_math(heads, options):
    case = Case(HQ=heads[0], HK=heads[1], dtype="float64", options=options)
    inputs, (grad_out, _) = build(case), upstream(case)

    def torch_sdpa(query, key, value, **kwargs):
        with sdpa_kernel(SDPBackend.MATH):
            out = torch.nn.functional.scaled_dot_product_attention(query, key, value, **kwargs)
        return out, out

    want = differentiate(torch_sdpa, inputs, (grad_out, None))
    got = differentiate(reference, inputs, (grad_out, None))
    for name in want:
        if name != "lse":
            torch.testing.assert_close(got[name], want[name], rtol=1e-11, atol=1e-12, msg=lambda m: f"{name}: {m}")


def test_lower_right_against_torch():
    from torch.nn.attention.bias import causal_lower_right

    inputs = build(Case(dtype="float64", SQ=9, SK=21))
    bias = causal_lower_right(9, 21)
    want = torch.nn.functional.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, bias)
    torch.testing.assert_close(attention(inputs.query, inputs.key, inputs.value, bias), want)


@pytest.mark.parametrize("options", [(), ("causal", "sinks"), ("bias_full", "softcap", "alibi"),
                                     ("mask_key", "q_lengths")],
                         ids="+".join)
def test_gradcheck_and_gradgradcheck(options):
    inputs = build(Case(B=2, HQ=2, SQ=3, SK=4, D=2, dtype="float64", options=options))
    leaves = [x.double().requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]

    def call(query, key, value):
        return attention(query, key, value, **inputs.options)

    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_results_are_float64_whatever_the_inputs():
    inputs = build(Case(dtype="bfloat16"))
    out, lse = attention(inputs.query, inputs.key, inputs.value, return_lse=True)
    assert out.dtype == lse.dtype == torch.float64


PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)


@pytest.mark.parametrize("rounds, key, counter, words", [
    (7, 0, (0, 0, 0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, 0xFFFFFFFFFFFFFFFF, (0xFFFFFFFF,) * 4, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, 0x299F31D0A4093822, PI, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, 0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, 0xFFFFFFFFFFFFFFFF, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, 0x299F31D0A4093822, PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
])
def test_philox_of_the_tests_gives_the_published_vectors(rounds, key, counter, words):
    """Known answers of philox4x32 from the Random123 distribution."""
    assert naive.philox(key, counter, rounds) == words


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
@pytest.mark.parametrize("p", [0.0001, 0.25, 0.999])
def test_dropout_mask_of_the_reference(seed, p):
    want = naive.dropout_keep(seed, p, 2, 3, 21, 39)
    assert torch.equal(fa.reference.dropout_keep(seed, p, 6, 21, 39).view(2, 3, 21, 39), want)


@pytest.mark.parametrize("p, threshold", [(1e-9, 1), (2.0**-17, 1), (0.1, 6554), (0.5, 32768), (1 - 1e-9, 65535)])
def test_the_probability_in_force(p, threshold):
    """p rounded to 2^-16, but never to none or all; the factor is its own, so that the expectation is the weight."""
    assert fa.reference.dropout_factor(p) == naive.dropout_factor(p) == 65536 / (65536 - threshold)
    bits = fa.reference.dropout_keep(7, p, 16, 512, 512)
    share, n = threshold / 65536, bits.numel()
    assert abs(bits.logical_not().double().mean() - share) < 5 * math.sqrt(share * (1 - share) / n)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_weights_are_dropped_independently(p):
    """No two places that are near, or share a random number, are dropped together more often than chance has it."""
    share = naive.dropout_probability(p) / 65536
    z = (fa.reference.dropout_keep(3, p, 16, 512, 512).logical_not().double() - share) / math.sqrt(share * (1 - share))
    for down in range(17):
        for across in (0, 1, 2, 3, 4, 7, 8, 9, 10, 15, 16, 17):
            if down or across:
                pairs = z[:, down:, across:] * z[:, :512 - down, :512 - across]
                assert abs(pairs.mean()) * math.sqrt(pairs.numel()) < 5, (down, across)
    for a, b in ((z[:-1], z[1:]), (z, fa.reference.dropout_keep(4, p, 16, 512, 512).double())):  # heads; seeds
        assert abs((a * (b - b.mean())).mean() / b.std()) * math.sqrt(a.numel()) < 5
    for size in (16, 32):  # the sums of blocks spread as those of independent numbers do
        sums = z.unflatten(1, (-1, size)).unflatten(3, (-1, size)).sum((2, 4)) / size
        assert abs(sums.var() - 1) < 5 * math.sqrt((2 + (1 / (share * (1 - share)) - 6) / size**2) / sums.numel())


def test_dropout_seed_comes_from_the_generator():
    flat = torch.zeros(1, 2, 40, 1), torch.zeros(1, 2, 40, 1), torch.eye(40).expand(1, 2, 40, 40)
    torch.manual_seed(1)
    first, second = attention(*flat, dropout_p=0.5), attention(*flat, dropout_p=0.5)
    torch.manual_seed(1)
    again = attention(*flat, dropout_p=0.5)
    assert torch.equal(first, again) and not torch.equal(first, second)
