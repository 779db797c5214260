"""The same bits for any number of threads, in any run, alone or in a batch; right values on every instruction set."""

import os
import subprocess
import sys

import pytest
import torch

import flashattn_ext as fa
import naive
import poison
from cases import FLOATS, Case, build, upstream
from compare import check_case, differentiate, kept_after, ours
from conftest import ISAS
from flashattn_ext import _C

# Several tasks in each: more than one panel, split keys, groups of heads, ragged lengths.
CASES = [
    Case(B=2, HQ=4, HK=2, SQ=200, SK=211, D=32),
    Case(B=1, HQ=1, HK=1, SQ=300, SK=290, D=64, options=("causal",)),
    Case(B=1, HQ=2, HK=1, SQ=1, SK=4000, D=32),
    Case(B=1, HQ=2, HK=2, SQ=40, SK=2100, D=24, options=("mask_key",)),
    Case(B=3, HQ=2, HK=1, SQ=90, SK=100, D=40, DV=24, options=("q_lengths", "kv_lengths", "lower_right", "dropout")),
    Case(B=2, HQ=4, HK=2, SQ=130, SK=120, D=16, options=("bias_key", "sinks", "softcap", "window")),
    Case(B=2, HQ=2, HK=2, SQ=100, SK=110, D=16, options=("bias_head", "alibi")),
]


def run(case, threads):
    torch.set_num_threads(threads)
    torch.manual_seed(5)
    return differentiate(ours, build(case), upstream(case))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_same_bits_for_any_number_of_threads(case, dtype):
    case = case.but(dtype=dtype)
    one = run(case, 1)
    for threads in (2, 3):
        for name, got in run(case, threads).items():
            assert torch.equal(got, one[name]), f"{name} differs between 1 and {threads} threads"


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_same_bits_in_every_run(case, dtype):
    case = case.but(dtype=dtype)
    first = run(case, 2)
    for _ in range(4):
        for name, got in run(case, 2).items():
            assert torch.equal(got, first[name]), f"{name} differs between two runs"


def test_same_bits_in_another_process():
    """No dependence on addresses, hash seeds or what ran before."""
    code = ("import torch, flashattn_ext as fa\ntorch.set_num_threads(2); torch.manual_seed(4)\n"
            "q, k, v = torch.randn(3, 2, 2, 150, 40).requires_grad_().unbind()\n"
            "out = fa.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.2)\n"
            "g, = torch.autograd.grad(out.square().sum(), k)\n"
            "print(out.detach().double().sum().item().hex(), g.double().square().sum().item().hex())\n")
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    results = {subprocess.run([sys.executable, "-c", code], env=dict(environment, PYTHONHASHSEED=str(seed)), check=True,
                              capture_output=True, text=True).stdout for seed in (1, 2)}
    assert len(results) == 1, results


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", [(), ("causal",), ("alibi", "softcap", "window")], ids="+".join)
@pytest.mark.parametrize("SQ", [1, 70])
def test_a_sequence_does_not_depend_on_its_neighbours(SQ, options, dtype):
    """Batch 1 and batch 3 give the same bits for the sequence they share."""
    case = Case(B=3, HQ=4, HK=2, SQ=SQ, SK=1300, D=24, dtype=dtype, options=options)
    inputs = build(case)
    whole = ours(inputs.query, inputs.key, inputs.value, **inputs.options)
    alone = ours(inputs.query[1:2], inputs.key[1:2], inputs.value[1:2], **inputs.options)
    for name, a, b in zip(("out", "lse"), alone, whole):
        if SQ == 1:  # split keys: how many parts depends on the work in the whole batch
            torch.testing.assert_close(a[0], b[1], rtol=2e-2 if a.element_size() == 2 else 1e-5, atol=1e-3)
        else:
            assert torch.equal(a[0], b[1]), name


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("p", [0.001, 0.3, 0.999])
@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF])
def test_the_op_drops_what_philox_says(seed, p):
    """The op with an explicit seed against Philox4x32-7 on Python integers."""
    SQ, SK = 27, 131
    zeros = torch.zeros(2, 2, SQ, 4), torch.zeros(2, 2, SK, 4), torch.eye(SK).expand(2, 2, SK, SK)
    seed_tensor = torch.tensor([seed], device="cpu")
    out, _ = torch.ops.flashattn_ext.forward(*zeros, None, None, None, None, None, seed_tensor, None, 0.0, -1,
                                             -1, False, p, False)
    assert torch.equal((out != 0).cpu(), naive.dropout_keep(seed, p, 2, 2, SQ, SK).cpu())


@pytest.mark.usefixtures("device")
def test_manual_seed_gives_the_same_call_again_forward_and_backward():
    case = Case(B=2, HQ=2, HK=1, SQ=70, SK=100, options=("dropout",))
    first, again = run(case, 2), run(case, 2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    torch.manual_seed(6)
    other = differentiate(ours, build(case), upstream(case))
    assert not torch.equal(other["out"], first["out"])


@pytest.mark.usefixtures("device")
def test_reference_draws_the_same_mask():
    keep = kept_after(12, 0.5, 2, 2, 30, 50)
    torch.manual_seed(12)
    values = torch.eye(50).expand(2, 2, 50, 50)
    got = fa.scaled_dot_product_attention(torch.zeros(2, 2, 30, 4), torch.zeros(2, 2, 50, 4), values, dropout_p=0.5)
    assert torch.equal(got != 0, keep)


# ---- instruction sets ------------------------------------------------------------------------------------------------

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
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", COMPACT, ids=lambda c: c.id)
@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_every_instruction_set_is_right(isa, case, dtype):
    check_case(case.but(dtype=dtype))


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_the_instruction_set_asked_for_is_used(isa):
    below = list(ISAS[1:ISAS.index(isa) + 1])
    assert _C.cpu_flags()["enabled"] == [name for name in _C.cpu_flags()["detected"] if name in below]
    for dtype in FLOATS:
        for op, sq in (("forward", 64), ("forward", 1), ("backward", 64)):
            kernel = _C.plan(op, dtype, 1, 2, 1, sq, 64, 16, 16, threads=2)["kernel"]
            assert f"_{isa}_" in kernel, f"{op} of {dtype} with {sq} queries runs {kernel}"
    assert "_scalar_f64" in _C.plan("forward", "float64", 1, 2, 1, 64, 64, 16, 16, threads=2)["kernel"]
    usable = {k["target"] for k in _C.kernels() if k["usable"]} & set(ISAS)
    assert usable == {"scalar", *below}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_nothing_hidden_is_used_on_any_instruction_set(isa, dtype):
    """NaN behind a mask, past the lengths and above the diagonal: the panel kernel, the row kernel and the backward."""
    for SQ in (1, 33):
        for options in (("mask_key",), ("kv_lengths",), ("causal",)):
            case = Case(HQ=4, HK=2, SQ=SQ, SK=110, dtype=dtype, options=options)
            inputs, grads = build(case), upstream(case)
            lengths = inputs.options.get("kv_seqlens")
            see, _ = naive.visible(2, SQ, 110, is_causal="causal" in options, kv_seqlens=lengths)
            see = see & inputs.options.get("attn_mask", torch.ones((), dtype=torch.bool))
            got = differentiate(ours, poison.hidden_keys(inputs, see), grads)
            want = differentiate(ours, inputs, grads)
            for name in got:
                torch.testing.assert_close(got[name], want[name], msg=lambda m: f"SQ {SQ} {options} {name}: {m}")


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("FLASHATTN_EXT_ISA", "avx9")
    try:
        with pytest.raises(ValueError, match="avx9.*scalar.*avx2.*avx512.*avx512bf16"):
            _C.refresh_cpu()
    finally:
        monkeypatch.undo()
        _C.refresh_cpu()


def test_the_environment_is_read_at_import():
    code = "import flashattn_ext; from flashattn_ext import _C; print(_C.cpu_flags()['enabled'])"
    environment = dict(os.environ, FLASHATTN_EXT_ISA="scalar", PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
