"""What only a GPU has: families of kernels, streams, graphs, lengths that nobody checks, devices. Values are tested by
the other files, whose tests run on every device."""

import functools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import flashattn_ext as fa
import poison
from cases import FLOATS, OPTIONS, Case, build, upstream
from compare import check_case, differentiate, ours, unchanged
from conftest import devices
from flashattn_ext import _C
from sequences import LSE, QUANTISED, Packed, normal, paginate, quantise
from test_decode import Step

pytestmark = [pytest.mark.skipif("cuda" not in devices(), reason="needs a GPU and a build with CUDA"),
              pytest.mark.usefixtures("on_gpu")]

SDPA = fa.scaled_dot_product_attention
ARCHS = ("plain", "sm80")


@pytest.fixture
def on_gpu():
    with torch.device("cuda"):
        yield


@pytest.fixture
def arch(request, monkeypatch):
    monkeypatch.setenv("FLASHATTN_EXT_CUDA_ARCH", request.param)
    return request.param


# ---- families --------------------------------------------------------------------------------------------------------

COMPACT = [
    Case(B=1, HQ=2, HK=1, SQ=97, SK=129, D=40, options=("causal",)),
    Case(B=1, HQ=1, HK=1, SQ=65, SK=193, D=33, DV=7, layout="strided"),
    Case(B=2, HQ=4, HK=2, SQ=2, SK=1030, D=24, options=("mask_key",)),
    Case(B=2, HQ=4, HK=4, SQ=1, SK=1100, D=64, DV=32, options=("bias_head", "sinks", "kv_lengths")),
    Case(B=2, HQ=3, HK=1, SQ=18, SK=100, D=96, options=("mask_full", "softcap", "window_left")),
    Case(B=3, HQ=2, HK=1, SQ=35, SK=50, D=16, options=("lower_right", "kv_lengths", "q_lengths", "alibi", "dropout")),
    Case(B=2, HQ=4, HK=2, SQ=19, SK=35, D=16, options=("bias_batch", "alibi_batch", "softcap", "sinks", "kv_lengths",
                                                      "q_lengths", "window", "dropout", "scale")),
    Case(B=1, HQ=1, HK=1, SQ=17, SK=31, D=512, DV=257),
    Case(B=1, HQ=2, HK=2, SQ=300, SK=333, D=128, options=("causal",)),
    Case(B=1, HQ=2, HK=2, SQ=140, SK=130, D=200, DV=256),
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", COMPACT, ids=lambda c: c.id)
@pytest.mark.parametrize("arch", ARCHS, indirect=True)
def test_every_family_is_right(arch, case, dtype):
    check_case(case.but(dtype=dtype))


# What the kernels of sm_90 take in bf16 and fp16: rows of whole 16 bytes. Masks of 320 keys are read in pieces of 16
# bytes, those of 331 element by element.
HOPPER = [
    Case(B=2, HQ=2, HK=2, SQ=300, SK=300, D=64),
    Case(B=1, HQ=4, HK=2, SQ=257, SK=390, D=128, options=("causal",)),
    Case(B=2, HQ=6, HK=2, SQ=130, SK=1030, D=64, options=("lower_right",)),
    Case(B=1, HQ=2, HK=1, SQ=500, SK=500, D=96, options=("window",)),
    Case(B=1, HQ=2, HK=2, SQ=1, SK=700, D=128),
    Case(B=1, HQ=2, HK=2, SQ=140, SK=270, D=192, DV=128, options=("causal",)),
    Case(B=1, HQ=2, HK=1, SQ=333, SK=257, D=256, options=("causal",)),
    Case(B=3, HQ=2, HK=1, SQ=300, SK=390, D=64, options=("kv_lengths", "causal")),
    Case(B=3, HQ=2, HK=2, SQ=200, SK=331, D=128, options=("kv_lengths64", "q_lengths", "lower_right", "sinks")),
    Case(B=3, HQ=2, HK=2, SQ=200, SK=331, D=256, options=("kv_lengths", "q_lengths", "window")),
    *(Case(B=2, HQ=4, HK=2, SQ=200, SK=SK, D=D, options=(option,)) for D, SK in ((64, 320), (128, 331), (256, 320))
      for option in ("mask_full", "mask_2d", "mask_key", "mask_query", "bias_full", "bias_head", "bias_key",
                     "bias_query", "bias_f32", "bias_inf", "softcap", "alibi_batch", "sinks", "dropout",
                     "dropout_often", "scale_zero", "scale_negative")),
    *(Case(B=3, HQ=4, HK=2, SQ=200, SK=SK, D=D, DV=DV, options=options)
      for D, DV in ((64, 0), (128, 0), (192, 128), (256, 0))
      for SK, options in ((2560, ("pad_right",)), (2501, ("pad_left", "window_right")), (1300, ("pad_holes", "sinks")),
                          (2560, ("pad_holes", "kv_lengths", "q_lengths")), (1024, ("pad_strided",)))),
    *(Case(B=3, HQ=2, HK=2, SQ=SQ, SK=300, D=D, options=("q_lengths", option)) for SQ, D in ((300, 64), (77, 128))
      for option in ("sinks", "softcap", "alibi_batch")),
    Case(B=2, HQ=2, HK=2, SQ=400, SK=900, D=128, options=("alibi", "lower_right")),
    Case(B=2, HQ=2, HK=2, SQ=140, SK=70, D=128, options=("mask_strided", "sinks_same")),
    Case(B=2, HQ=2, HK=2, SQ=140, SK=70, D=128, options=("bias_strided", "alibi", "window_left")),
    Case(B=2, HQ=4, HK=2, SQ=300, SK=320, D=192, DV=128, options=("mask_key", "dropout", "softcap")),
    Case(B=3, HQ=4, HK=2, SQ=190, SK=352, D=128, options=("bias_batch", "alibi_batch", "softcap", "sinks", "kv_lengths",
                                                          "q_lengths", "window", "dropout", "scale")),
]


on_hopper = pytest.mark.skipif("cuda" in devices() and torch.cuda.get_device_capability()[0] != 9,
                               reason="needs a Hopper GPU")


@on_hopper
@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
@pytest.mark.parametrize("case", HOPPER, ids=lambda c: c.id)
@pytest.mark.parametrize("arch", ("sm90",), indirect=True)
def test_kernels_of_hopper_are_right(arch, case, dtype):
    made = case.but(dtype=dtype)
    plan = _C.plan("forward", dtype, made.B, made.HQ, made.HK, made.SQ, made.SK, made.D, made.DV or made.D, threads=1,
                   device=0)
    assert "_sm90_" in plan["kernel"]
    check_case(made)


@on_hopper
@pytest.mark.parametrize("kind", ("nan", "inf"))
@pytest.mark.parametrize("option", ("pad_right", "pad_left", "pad_holes"))
@pytest.mark.parametrize("D", (64, 128, 256))
@pytest.mark.parametrize("arch", ("sm90",), indirect=True)
def test_what_padding_hides_reaches_no_row(arch, D, option, kind):
    inputs = build(Case(HQ=4, HK=2, SQ=150, SK=1430, D=D, dtype="bfloat16", options=(option,)))
    spoiled = poison.hidden_keys(inputs, inputs.options["attn_mask"], kind)
    clean = SDPA(inputs.query, inputs.key, inputs.value, return_lse=True, **inputs.options)
    got = SDPA(spoiled.query, spoiled.key, spoiled.value, return_lse=True, **inputs.options)
    torch.testing.assert_close(got[0], clean[0], rtol=1e-2, atol=1e-3)
    unchanged("lse", got[1], clean[1], f"{kind} in hidden keys")


# float32 without options.
HOPPER_F32 = [
    Case(B=2, HQ=2, HK=2, SQ=300, SK=300, D=64),
    Case(B=1, HQ=4, HK=2, SQ=257, SK=390, D=128, options=("causal",)),
    Case(B=8, HQ=6, HK=2, SQ=130, SK=1030, D=64, options=("lower_right",)),
    Case(B=1, HQ=2, HK=1, SQ=500, SK=500, D=96, options=("window",)),
    Case(B=1, HQ=64, HK=64, SQ=20, SK=700, D=128, DV=64),
    Case(B=2, HQ=2, HK=2, SQ=333, SK=1, D=36, DV=100),
    Case(B=2, HQ=2, HK=2, SQ=200, SK=100, D=128, options=("lower_right",)),
    Case(B=2, HQ=4, HK=2, SQ=150, SK=200, D=64, layout="bshd", options=("window",)),
    Case(B=2, HQ=4, HK=4, SQ=150, SK=200, D=128, layout="expanded", options=("causal",)),
]


@on_hopper
@pytest.mark.parametrize("case", HOPPER_F32, ids=lambda c: c.id)
@pytest.mark.parametrize("arch", ("sm90",), indirect=True)
def test_float32_kernels_of_hopper_are_right(arch, case):
    plan = _C.plan("forward", "float32", case.B, case.HQ, case.HK, case.SQ, case.SK, case.D, case.DV or case.D,
                   threads=1, device=0)
    assert "_sm90_f32_" in plan["kernel"]
    check_case(case)


# What two parts of fp16 cannot hold beside each other, and what they can if each block has its own power of two.
WILD = {
    "large scores": lambda q, k, v: (q * 200, k * 200, v),
    "small scores": lambda q, k, v: (q * 1e-15, k * 1e-15, v),
    "large and small": lambda q, k, v: (q * 1e-15, k * 1e15, v * 1e-30),
    "large values": lambda q, k, v: (q, k, v * 1e30),
    "subnormal values": lambda q, k, v: (q, k, v * 1e-40),
    "no values": lambda q, k, v: (q, k, v * 0),
    "one large column": lambda q, k, v: (q, k, torch.cat((v[..., :1] * 1e12, v[..., 1:]), -1)),
    "large columns between": lambda q, k, v: (q, k, v * 10.0 ** (12 * (torch.arange(v.shape[-1]) % 4 == 0))),
    "one large key": lambda q, k, v: (q, torch.cat((k[:, :, :1] * 300, k[:, :, 1:]), 2), v),
    "large hidden values": lambda q, k, v: (q, k, torch.cat((v[:, :, :200], v[:, :, 200:] * 1e30), 2)),
    "large hidden keys": lambda q, k, v: (q, torch.cat((k[:, :, :200], k[:, :, 200:] * 1e30), 2), v),
}


@on_hopper
@pytest.mark.parametrize("change", WILD.values(), ids=WILD)
@pytest.mark.parametrize("D", (64, 128))
@pytest.mark.parametrize("arch", ("sm90",), indirect=True)
def test_wild_float32(arch, D, change):
    """Every column is as exact as its own values let it be."""
    q, k, v = change(*torch.randn(3, 1, 2, 300, D))
    out = SDPA(q, k, v, is_causal=True)[:, :, :200].double()
    ref = fa.reference.attention(q.double(), k.double(), v.double(), is_causal=True)[:, :, :200]
    error, size = (out - ref).abs().amax((0, 1, 2)), v[:, :, :200].double().abs().amax((0, 1, 2))
    scores = (q @ k.mT)[:, :, :200, :200].tril().abs().max().item() / math.sqrt(D)
    assert (error <= torch.finfo(torch.float32).eps * (8 + scores) * size + 1e-44).all()


# Every option of Hopper's backward by itself, with several tiles of queries and keys, and some together; masks of every
# shape, also where a row of it starts anywhere, and their gradients.
HOPPER_OPTIONS = [(name,) for name in OPTIONS if name not in ("upper_left", "window_self")] + [
    ("causal", "dropout"),
    ("lower_right", "kv_lengths", "q_lengths", "alibi"),
    ("mask_full", "window", "sinks"),
    ("mask_key", "dropout", "softcap"),
    ("mask_full", "window_right"),
    ("bias_full", "window_right"),
    ("bias_full", "window"),
    ("bias_batch", "lower_right"),
    ("bias_full", "softcap", "sinks", "kv_lengths"),
    ("bias_batch", "alibi_batch", "softcap", "sinks", "kv_lengths", "q_lengths", "window", "dropout", "scale"),
]


@on_hopper
@pytest.mark.parametrize("D", (64, 128, 192, 256))
@pytest.mark.parametrize("options", HOPPER_OPTIONS, ids="+".join)
def test_every_option_of_hopper_s_backward(options, D):
    for dtype, SQ, SK in (("bfloat16", 200, 264), ("float16", 133, 301)):
        made = Case(B=3, HQ=4, HK=2, SQ=SQ, SK=SK, D=D, DV=128 if D == 192 else D, dtype=dtype, options=options)
        check_case(made, least=1.0)


@on_hopper
def test_hopper_s_backward_is_the_default():
    """For all but rows that are not whole 16 bytes and float32."""
    for options in (dict(), dict(window_right=0), dict(softcap=2.0), dict(dropout_p=0.1), dict(has_alibi=True),
                    dict(has_sinks=True), dict(mask_dtype="bool"), dict(mask_dtype="float32")):
        plan = _C.plan("backward", "bfloat16", 2, 4, 2, 300, 300, 64, 64, threads=1, device=0, **options)
        assert "_sm90_" in plan["kernel"], options
    assert "_sm80_" in _C.plan("backward", "bfloat16", 2, 4, 2, 300, 300, 60, 60, threads=1, device=0)["kernel"]
    assert "_sm80_" in _C.plan("backward", "float32", 2, 4, 2, 300, 300, 64, 64, threads=1, device=0)["kernel"]


@pytest.mark.parametrize("allowed", (False, True))
@pytest.mark.parametrize("is_causal", (False, True))
def test_float32_is_rounded_to_tf32_where_torch_allows_it(allowed, is_causal, request):
    """10 bits of mantissa against 23: the errors of both differ by more than a factor of 100."""
    request.addfinalizer(functools.partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()))
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    given = [torch.randn(2, 3, 300, 64, requires_grad=True) for _ in range(3)]
    out = SDPA(*given, is_causal=is_causal)
    grads = torch.autograd.grad(out.square().sum(), given)
    exact = [x.detach().double().requires_grad_() for x in given]
    want = SDPA(*exact, is_causal=is_causal)
    for got, ref in zip((out, *grads), (want, *torch.autograd.grad(want.square().sum(), exact))):
        error = ((got - ref).abs().max() / ref.abs().max()).item()
        assert (1e-5 < error < 3e-3) if allowed else error < 2e-6, error


@on_hopper
@pytest.mark.parametrize("kind", (math.nan, math.inf))
@pytest.mark.parametrize("D", (64, 128, 192, 256))
def test_a_wild_query_reaches_only_what_it_sees(D, kind):
    """NaN or infinity in a query and its upstream gradient: it reaches the keys it sees and no other."""
    S, at, DV = 300, 133, 128 if D == 192 else D
    query, key, value, grad = (torch.randn(1, 2, S, d).bfloat16() for d in (D, D, DV, DV))

    def gradients():
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        return torch.autograd.grad(SDPA(*leaves, is_causal=True), leaves, grad)

    clean = gradients()
    query[:, :, at, 0] = kind
    grad[:, :, at, 0] = kind
    spoilt = gradients()
    others = torch.arange(S) != at
    unchanged("grad_query", spoilt[0][:, :, others], clean[0][:, :, others], "a wild query")
    assert not spoilt[0][:, :, at].isfinite().all()
    for got, want in zip(spoilt[1:], clean[1:]):
        unchanged("grad_key or grad_value", got[:, :, at + 1:], want[:, :, at + 1:], "a wild query")
        assert not got[:, :, :at + 1].isfinite().all(-1).any()


@on_hopper
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("D", (64, 128, 256))
@pytest.mark.parametrize("arch", ("sm90",), indirect=True)
def test_packed_rows_on_hopper_are_right(arch, D, dtype):
    lens_q, lens_k = [150, 0, 1, 128, 65, 300, 7], [150, 40, 333, 128, 0, 290, 64]
    for options in (dict(), dict(causal=True), dict(window=(70, 9), softcap=4.0),
                    dict(causal=True, sinks=normal(4), alibi_slopes=torch.rand(4))):
        Packed(lens_q, lens_k, dtype, D=D, past=3, **options).check()


@on_hopper
def test_options_have_kernels_of_their_own_on_hopper():
    for name, keys, options in (("cap", 300, dict(softcap=2.0)), ("dropout", 300, dict(dropout_p=0.1)),
                                ("alibi", 300, dict(has_alibi=True)), ("bits", 320, dict(mask_dtype="bool")),
                                ("len", 300, dict(mask_dtype="bool", mask_shape=(2, 1, 1, 300))),
                                ("mod", 300, dict(mask_dtype="bool")), ("mod", 300, dict(softcap=2.0, dropout_p=0.1)),
                                ("mod", 300, dict(dropout_p=0.7))):
        plan = _C.plan("forward", "bfloat16", 2, 4, 2, 300, keys, 128, 128, threads=1, device=0, **options)
        assert plan["kernel"] == f"fa_fwd_sm90_bf16_hd128_{name}"
    for name, options in (("dropout", dict(dropout_p=0.1)), ("mod", dict(dropout_p=0.7))):
        plan = _C.plan("backward", "bfloat16", 2, 4, 2, 300, 300, 128, 128, threads=1, device=0, **options)
        assert plan["kernel"] == f"fa_bwd_sm90_bf16_hd128_{name}"


@pytest.mark.parametrize("arch", ARCHS, indirect=True)
def test_the_family_asked_for_is_used(arch):
    for dtype in FLOATS:
        for op in ("forward", "backward"):
            plan = _C.plan(op, dtype, 1, 2, 1, 64, 64, 16, 16, threads=1, device=0)
            assert f"_{arch}_" in plan["kernel"] and plan["kind"] == "cuda"
    assert "_plain_f64" in _C.plan("forward", "float64", 1, 2, 1, 64, 64, 16, 16, threads=1, device=0)["kernel"]


def test_explain_on_a_gpu():
    plan = fa.explain(torch.empty(2, 4, 300, 64, dtype=torch.bfloat16), *torch.empty(2, 2, 2, 300, 64).bfloat16(),
                      enable_gqa=True)
    assert plan.kernel in {k["name"] for k in fa.kernels() if k["usable"]} and "blocks of" in str(plan)
    assert plan.launches and all(0 < x["registers"] <= 255 and x["blocks"] and x["resident_blocks"] and x["name"] in
                                 str(plan) for x in plan.launches)


@pytest.mark.parametrize("arch", ("plain", "sm80"), indirect=True)
def test_explain_lists_every_kernel_of_a_backward(arch):
    query, bias, sinks = torch.empty(2, 4, 300, 64).bfloat16(), torch.empty(2, 1, 300, 300), torch.empty(4)
    given = [x.requires_grad_() for x in (query, query.clone(), query.clone(), bias, sinks)]
    plan = fa.explain(*given[:4], sinks=sinks, backward=True)
    names = [x["name"] for x in plan.launches]
    assert len(names) == 5 and len(set(names)) == 5 and "fa_dsinks_kernel" in names


# ---- few query rows --------------------------------------------------------------------------------------------------

# What goes to the decode kernels of its own accord: every option, a few rows, more keys than a part has.
FEW_ROWS = [
    Case(B=2, HQ=8, HK=2, SQ=1, SK=1030, D=64),
    Case(B=2, HQ=4, HK=4, SQ=16, SK=700, D=128, options=("lower_right",)),
    Case(B=1, HQ=40, HK=1, SQ=1, SK=300, D=256, DV=72),
    Case(B=3, HQ=6, HK=2, SQ=3, SK=900, D=80, DV=128, options=("kv_lengths", "q_lengths", "lower_right")),
    Case(B=2, HQ=4, HK=2, SQ=2, SK=1030, D=24, options=("mask_key", "sinks")),
    Case(B=2, HQ=4, HK=2, SQ=5, SK=520, D=64, options=("mask_full", "softcap", "window_left")),
    Case(B=2, HQ=8, HK=2, SQ=4, SK=400, D=128, options=("bias_head", "alibi", "kv_lengths")),
    Case(B=2, HQ=2, HK=1, SQ=7, SK=150, D=40, DV=33, layout="strided", options=("causal",)),
    Case(B=2, HQ=2, HK=1, SQ=2, SK=0, D=64),
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", FEW_ROWS, ids=lambda c: c.id)
def test_few_rows_are_right(case, dtype):
    made = case.but(dtype=dtype)
    plan = _C.plan("forward", dtype, made.B, made.HQ, made.HK, made.SQ, made.SK, made.D, made.DV or made.D, threads=1,
                   device=0)
    assert "_decode_" in plan["kernel"]
    check_case(made)


def test_many_rows_go_elsewhere():
    for SQ, HQ, D in ((17, 2, 64), (16, 10, 64), (1, 2, 257)):
        assert "_decode_" not in _C.plan("forward", "bfloat16", 1, HQ, 2, SQ, 500, D, D, threads=1, device=0)["kernel"]


CACHES = {
    "dense": {},
    "softcap": dict(softcap=3.0, alibi=True, sinks=True),
    "window": dict(window=(300, None)),
}


@pytest.mark.parametrize("stored", [None, *QUANTISED], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("page_size", [None, 1, 48])
@pytest.mark.parametrize("options", CACHES, ids=str)
def test_long_caches_are_right(options, page_size, D, dtype, stored):
    lengths = [900, 3, 0, 2048, 411]
    step = Step(dtype, 2, lengths, 2048, HQ=8, HK=2, D=D, **CACHES[options])
    k, v, scales = step.k, step.v, {}
    if stored:
        (k, scales["k_scale"]), (v, scales["v_scale"]) = (quantise(x, stored, "token") for x in (k, v))
    dense = {"k_cache": k, "v_cache": v, **scales}
    given = dict(dense)
    if page_size:
        *pools, given["block_table"] = paginate(dense.values(), page_size, lengths)
        given.update(zip(dense, pools))
    got = step.call(**given)
    wide = [x.double() * (scales[name][..., None].double() if scales else 1)
            for name, x in (("k_scale", k), ("v_scale", v))]
    ref = step.eager(step.q.double(), *wide, lengths)
    step.check(got, ref, lengths, *wide, least=4.0 if stored else 1.0)
    for length, out, lse in zip((3, 2048), *(x[[1, 3]] for x in got)):
        one = {name: x[[lengths.index(length)]] for name, x in given.items() if name == "block_table" or not page_size
               or x.shape[0] == len(lengths)}
        b = lengths.index(length)
        alone = step.call(**{**given, **one}, query=step.q[[b]], cache_seqlens=step.seqlens[[b]])
        assert torch.equal(alone[0][0], out) and torch.equal(alone[1][0], lse)


def test_values_that_are_no_numbers():
    """NaN in hidden rows of V reaches nobody, in visible rows everybody who sees them; of float8 too."""
    for stored in (torch.bfloat16, torch.float8_e4m3fn):
        q, k, v = torch.randn(1, 5, 4, 64).bfloat16(), torch.randn(1, 300, 2, 64), torch.randn(1, 300, 2, 64)
        v[:, 297] = math.nan
        scales = dict(k_scale=torch.ones(()), v_scale=torch.ones(())) if stored != torch.bfloat16 else {}
        out = fa.decode_attention(q, k.to(stored), v.to(stored), torch.tensor([300]), **scales)
        assert torch.isfinite(out[:, :2]).all() and torch.isnan(out[:, 2:]).all()


def test_rows_in_any_layout_have_the_same_bits():
    """The kernel without options and the one with them, which also reads single elements, round alike."""
    step = Step(torch.bfloat16, 1, [700, 0, 1500], 1500, HQ=8, HK=2, D=128)
    want = step.call()
    odd = [torch.zeros(*x.shape[:3], 2 * 128 + 1, dtype=x.dtype)[..., 1::2].copy_(x) for x in (step.k, step.v)]
    for got, x in zip(step.call(k_cache=odd[0], v_cache=odd[1]), want):
        assert torch.equal(got, x)


def test_replays_follow_the_lengths():
    step = Step(torch.bfloat16, 1, [2000, 2000], 2000, HQ=8, HK=2, D=128)
    lengths = step.seqlens.clone()
    fa.decode_attention(step.q, step.k, step.v, lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fa.decode_attention(step.q, step.k, step.v, lengths)
    for now in ([1, 1999], [300, 0], [2000, 64]):
        lengths.copy_(torch.tensor(now))
        graph.replay()
        assert torch.equal(captured, fa.decode_attention(step.q, step.k, step.v, lengths))


# ---- streams and graphs ----------------------------------------------------------------------------------------------

GRAPHED = [
    Case(B=2, HQ=4, HK=2, SQ=130, SK=150, D=64, dtype="bfloat16", options=("causal",)),
    Case(B=2, HQ=2, HK=2, SQ=1, SK=3000, D=64, dtype="float16"),
    Case(B=3, HQ=2, HK=1, SQ=90, SK=100, D=40, DV=24, options=("q_lengths", "kv_lengths", "lower_right")),
    Case(B=2, HQ=4, HK=2, SQ=70, SK=120, D=16, options=("bias_key", "sinks", "softcap", "window")),
    Case(B=2, HQ=2, HK=2, SQ=33, SK=40, D=16, dtype="float64", options=("mask_full",)),
]


@pytest.mark.parametrize("case", GRAPHED, ids=lambda c: c.id)
def test_capture_and_replay(case):
    """Forward and backward in one graph; replays follow what the inputs then hold."""
    inputs, grads = build(case), upstream(case)
    differentiate(ours, inputs, grads)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = differentiate(ours, inputs, grads)
    for _ in range(2):
        with torch.no_grad():
            for x in (inputs.query, inputs.key, inputs.value):
                x.copy_(torch.randn(x.shape, dtype=torch.float64))
        graph.replay()
        for name, want in differentiate(ours, inputs, grads).items():
            assert torch.equal(captured[name], want), name


@pytest.mark.parametrize("case", GRAPHED, ids=lambda c: c.id)
def test_nothing_waits_for_the_gpu(case):
    inputs, grads = build(case), upstream(case)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        differentiate(ours, inputs, grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_current_stream_is_used():
    query, key, value = torch.randn(3, 1, 8, 2000, 64).bfloat16()
    want = SDPA(query, key, value)
    stream = torch.cuda.Stream()
    late = torch.zeros_like(query)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(query)
        got = SDPA(late, key, value)
    stream.synchronize()
    assert torch.equal(got, want)


# ---- lengths and tables that nobody checks ---------------------------------------------------------------------------


def test_lengths_out_of_range_count_as_the_end_of_it():
    query, key, value = torch.randn(3, 3, 2, 40, 16)
    given = torch.tensor([-7, 1000, 13], dtype=torch.int32)
    ends = given.clamp(0, 40)
    for name in ("q_seqlens", "kv_seqlens"):
        for got, want in zip(SDPA(query, key, value, return_lse=True, **{name: given}),
                             SDPA(query, key, value, return_lse=True, **{name: ends})):
            assert torch.equal(got, want)


def test_offsets_and_pages_out_of_range_stay_inside_the_tensors():
    packed = Packed([5, 30, 7], [9, 40, 3])
    for wild in ([0, 50, 20, 10**6], [0, -5, 3, 9], [7, 7, 7, 7]):
        out, _ = fa.varlen_attn(packed.q, packed.k, packed.v, torch.tensor(wild), torch.tensor(wild), 50, 50,
                                enable_gqa=True, return_aux=LSE)
        assert torch.isfinite(out).all()
    step = [torch.randn(2, 1, 4, 16), torch.randn(5, 8, 2, 16), torch.randn(5, 8, 2, 16)]
    table = torch.tensor([[0, 10**6, 2], [-9, 4, 1]])
    out = fa.decode_attention(*step, torch.tensor([24, 10**6]), block_table=table)
    assert torch.isfinite(out).all()


def test_a_cache_without_room_drops_the_surplus():
    k, v, new = torch.zeros(2, 6, 1, 8), torch.zeros(2, 6, 1, 8), torch.ones(2, 4, 1, 8)
    fa.decode_attention(torch.randn(2, 4, 1, 8), k, v, torch.tensor([1, 4]), k_new=new, v_new=new)
    assert k.sum((2, 3)).tolist() == [[0, 8, 8, 8, 8, 0], [0, 0, 0, 0, 8, 8]] and torch.equal(k, v)


# ---- devices ---------------------------------------------------------------------------------------------------------


def test_tensors_on_several_devices_are_refused():
    query, key, value = torch.randn(3, 1, 2, 9, 8)
    with pytest.raises(RuntimeError, match="query on cuda:0, key on cpu"):
        SDPA(query, key.cpu(), value)
    with pytest.raises(RuntimeError, match="kv_seqlens is on cpu"):
        SDPA(query, key, value, kv_seqlens=torch.tensor([3], device="cpu"))


def trained(dtype, D, S=190, **options):
    """A call and its gradients, of tensors that are the same on every device."""
    def run(device):
        draw = torch.Generator("cpu").manual_seed(5)
        given = [torch.randn(2, 4, S, D, generator=draw, device="cpu").to(device, dtype).requires_grad_()
                 for _ in range(3)]
        on = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        out = SDPA(*given, **on)
        return out.detach(), *torch.autograd.grad(out.float().square().sum(), given)
    return run


def decoded(device):
    draw = torch.Generator("cpu").manual_seed(6)
    shapes = (3, 1, 4, 64), (3, 700, 2, 64), (3, 700, 2, 64), (3, 1, 2, 64), (3, 1, 2, 64)
    query, k, v, new_k, new_v = (torch.randn(*shape, generator=draw, device="cpu").to(device, torch.bfloat16)
                                 for shape in shapes)
    lengths = torch.tensor([600, 1, 650], device=device)
    return fa.decode_attention(query, k, v, lengths, k_new=new_k, v_new=new_v), k, v


def packed(device):
    draw = torch.Generator("cpu").manual_seed(7)
    given = [torch.randn(150, 2, 64, generator=draw, device="cpu").to(device, torch.bfloat16).requires_grad_()
             for _ in range(3)]
    cu = torch.tensor([0, 40, 150], dtype=torch.int32, device=device)
    out = fa.varlen_attn(*given, cu, cu, 110, 110)
    return out.detach(), *torch.autograd.grad(out.float().square().sum(), given)


def merged(device):
    draw = torch.Generator("cpu").manual_seed(8)
    halves = [torch.randn(2, 30, 4, *d, generator=draw, device="cpu").to(device) for d in ((64,), (), (64,), ())]
    return fa.merge_attention(*halves)


ON_DEVICES = {
    "plain": trained(torch.bfloat16, 64, is_causal=True),
    "mask": trained(torch.bfloat16, 128, attn_mask=torch.rand(190, 190, device="cpu") > 0.3),
    "mask in pieces": trained(torch.bfloat16, 128, S=192, attn_mask=torch.rand(192, 192, device="cpu") > 0.3),
    "bias": trained(torch.bfloat16, 64, S=192, attn_mask=torch.randn(192, 192, device="cpu").bfloat16()),
    "lengths": trained(torch.float16, 256, kv_seqlens=torch.tensor([30, 190], device="cpu")),
    "float32": trained(torch.float32, 64),
    "float32 with options": trained(torch.float32, 64, softcap=3.0),
    "float64": trained(torch.float64, 16),
    "decode": decoded, "packed": packed, "merge": merged,
}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("call", ON_DEVICES.values(), ids=ON_DEVICES)
def test_another_device_than_the_current_one(call):
    """First there, where nothing has been prepared yet; then here; then at once from two threads."""
    there = call("cuda:1")
    assert all(x.device == torch.device("cuda:1") for x in there) and torch.cuda.current_device() == 0
    here = call("cuda:0")
    with ThreadPoolExecutor(2) as threads:
        again = [*threads.map(call, ("cuda:1", "cuda:0") * 4)]
    for found in (here, *again):
        assert all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(there, found))


# ---- memory ----------------------------------------------------------------------------------------------------------


def attention_of_rows(rows, query, key, value, grad, bias=None, see=None):
    """out, the gradient of query and dS of these rows of one head, without scale, in float64."""
    q, g, k, v = query[rows].double(), grad[rows].double(), key.double(), value.double()
    scores = q @ k.T / math.sqrt(query.shape[-1])
    if bias is not None:
        scores = scores + bias[rows].double()
    if see is not None:
        scores = scores.masked_fill(~see(rows), -math.inf)
    weights = scores.softmax(-1)
    out = weights @ v
    dscores = weights * (g @ v.T - (g * out).sum(-1, keepdim=True))
    return out, dscores @ k / math.sqrt(query.shape[-1]), dscores


def off(got, want):
    """The largest error as a part of the largest value."""
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def test_training_on_131072_tokens_takes_the_memory_of_its_tensors():
    """Beside tensors of rows: the log-sum-exp; in backward fp32 dQ, two numbers a row; 2 MiB that are rounded."""
    S, D = 131072, 64
    query, key, value, grad = (torch.randn(1, 1, S, D, dtype=torch.bfloat16) for _ in range(4))
    given = [x.requires_grad_() for x in (query, key, value)]
    SDPA(query[:, :, :300], key[:, :, :300], value[:, :, :300], is_causal=True).sum().backward()
    rows, rounding = 2 * S * D, 2 << 20

    def extra(call):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        return result, torch.cuda.max_memory_allocated() - before

    out, forward = extra(lambda: SDPA(*given, is_causal=True))
    assert forward < rows + 4 * S + rounding, f"forward took {forward} bytes"
    (dq, _, _), backward = extra(lambda: torch.autograd.grad(out, given, grad))
    assert backward < 3 * rows + 4 * S * D + 8 * S + rounding, f"backward took {backward} bytes"
    some = torch.tensor([0, 1, 63, 64, 4097, S // 2, S - 2, S - 1])
    want, dwant, _ = attention_of_rows(some, *(x.detach()[0, 0] for x in (query, key, value, grad)),
                                       see=lambda rows: torch.arange(S) <= rows[:, None])
    for row in range(len(some)):  # one by one: the first see few keys, and their values are the largest
        assert off(out[0, 0, some[row]], want[row]) < 2e-2
        assert row == 0 or off(dq[0, 0, some[row]], dwant[row]) < 3e-2


@pytest.mark.big
def test_offsets_past_2_to_the_31():
    """Elements of query, key, value and their gradients more than 2^31 apart."""
    B, S, D = 2, 70, 64
    far = 2**31 // D + 5
    memory = torch.zeros(B, far, D, dtype=torch.bfloat16)
    views = [memory[:, at:at + S][:, None] for at in (0, 100, far - S)]
    for x in views:
        x.copy_(torch.randn(x.shape))
    near = [x.clone().requires_grad_() for x in views]
    views = [x.detach().requires_grad_() for x in views]
    outs = [SDPA(*given, is_causal=True) for given in (views, near)]
    assert torch.equal(*outs) and math.isfinite(outs[0].sum().item())
    grads = [torch.autograd.grad(out.sum(), given) for out, given in zip(outs, (views, near))]
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.big
@pytest.mark.parametrize("dtype", (torch.bool, torch.bfloat16), ids=str)
def test_masks_of_more_than_2_to_the_31_elements(dtype):
    """The last rows of a mask, and of its gradient, lie behind 2^31 elements."""
    S, D = 46400, 64
    query, key, value, grad = (torch.randn(1, 1, S, D, dtype=torch.bfloat16) for _ in range(4))
    given = [x.requires_grad_() for x in (query, key, value)]
    if dtype == torch.bool:
        mask = torch.empty(S, S, dtype=torch.uint8).random_(0, 2).view(torch.bool)
    else:
        mask = torch.empty(S, S, dtype=dtype).normal_().requires_grad_()
        given.append(mask)
    out = SDPA(query, key, value, mask)
    grads = torch.autograd.grad(out, given, grad)
    rows = torch.arange(S - 70, S)
    see, bias = (lambda rows: mask[rows], None) if dtype == torch.bool else (None, mask.detach())
    want, dq, dscores = attention_of_rows(rows, *(x.detach()[0, 0] for x in (query, key, value, grad)), bias, see)
    assert off(out[0, 0, rows], want) < 2e-2 and off(grads[0][0, 0, rows], dq) < 3e-2
    assert dtype == torch.bool or off(grads[3][rows], dscores) < 2e-2


@pytest.mark.big
def test_pages_past_2_to_the_31():
    """A pool of more than 2^31 elements whose last pages are read and appended to."""
    size, HK, D, B = 64, 2, 128, 3
    pages = 2**31 // (size * HK * D) + 9
    pool = [torch.empty(pages, size, HK, D, dtype=torch.bfloat16) for _ in range(2)]
    near = [torch.randn(9, size, HK, D).bfloat16() for _ in range(2)]
    for far, x in zip(pool, near):
        far[-9:] = x
    table, lengths = torch.arange(9, dtype=torch.int32).view(B, 3), torch.tensor([150, 64, 191], dtype=torch.int32)
    query, new_k, new_v = torch.randn(B, 1, 4, D).bfloat16(), *torch.randn(2, B, 1, HK, D).bfloat16()
    outs = [fa.decode_attention(query, *cache, lengths, block_table=table + first, k_new=new_k, v_new=new_v)
            for cache, first in ((pool, pages - 9), (near, 0))]
    assert torch.equal(*outs) and torch.isfinite(outs[0]).all()
    assert all(torch.equal(far[-9:], x) for far, x in zip(pool, near))
