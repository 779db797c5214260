"""The public names, what importing costs, and the small functions: use_as_sdpa, explain, kernels, build_info, info."""

import contextlib
import inspect
import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F

import flashattn_ext as fa

SDPA = fa.scaled_dot_product_attention


def python(code, **environment):
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p), **environment)
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


# ---- names -----------------------------------------------------------------------------------------------------------


def test_public_names():
    expected = {"scaled_dot_product_attention", "varlen_attn", "decode_attention", "merge_attention", "PagedKVCache",
                "CacheFull", "use_as_sdpa", "explain", "set_deterministic", "kernels", "build_info", "__version__",
                "reference"}
    assert expected <= set(dir(fa))
    assert set(fa.__all__) == expected
    assert callable(fa.reference.attention)


def test_signature_of_the_drop_in():
    assert str(inspect.signature(SDPA)) == (
        "(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False, "
        "window=None, "
        "softcap=0.0, sinks=None, alibi_slopes=None, q_seqlens=None, kv_seqlens=None, return_lse=False)")


def test_explain_and_reference_take_what_the_drop_in_takes():
    taken = list(inspect.signature(SDPA).parameters)
    for function in (fa.explain, fa.reference.attention):
        names = list(inspect.signature(function).parameters)
        assert names[:len(taken)] == taken or set(taken) <= set(names)


def test_public_functions_have_docstrings():
    for name in fa.__all__:
        if callable(getattr(fa, name)):
            assert len(inspect.getdoc(getattr(fa, name)) or "") > 60, name


def test_version_is_the_build_s():
    assert fa.__version__ == fa.build_info()["version"]


# ---- import ----------------------------------------------------------------------------------------------------------

IMPORT = """
import sys, torch
OPTIONAL = {"transformers", "rich", "matplotlib", "numpy", "pandas", "vllm", "xformers", "triton", "gguf", "accelerate",
            "hypothesis", "pytest", "openvino", "onnxruntime"}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in OPTIONAL:
            raise ImportError(f"optional package {name} was imported")

loaded = set(sys.modules)
sys.meta_path.insert(0, Refuse())
state = torch.get_rng_state()
before = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed(),
          torch.nn.functional.scaled_dot_product_attention, torch.are_deterministic_algorithms_enabled(),
          torch.backends.cuda.flash_sdp_enabled(), torch.get_num_interop_threads())
import flashattn_ext
after = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed(),
         torch.nn.functional.scaled_dot_product_attention, torch.are_deterministic_algorithms_enabled(),
         torch.backends.cuda.flash_sdp_enabled(), torch.get_num_interop_threads())
assert before == after and torch.equal(state, torch.get_rng_state()), (before, after)
new = {m.split(".")[0] for m in set(sys.modules) - loaded}
assert not new & OPTIONAL, new & OPTIONAL
heavy = [m for m in set(sys.modules) - loaded if m.startswith(("torch._dynamo", "torch._inductor", "sympy"))]
assert not heavy, f"the import loads the compiler: {heavy[:5]}"
q = torch.randn(1, 2, 5, 8, requires_grad=True)
flashattn_ext.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
print("fine")
"""


def test_import_needs_no_optional_package_and_touches_no_global_state():
    done = python(IMPORT)
    assert done.stdout.strip() == "fine", done.stderr


def test_a_missing_library_is_told_in_one_sentence(tmp_path):
    """The package without its compiled part, as after a clone."""
    folder = tmp_path / "flashattn_ext"
    folder.mkdir()
    home = os.path.dirname(fa.__file__)
    for name in os.listdir(home):
        if name.endswith(".py"):
            (folder / name).write_text(open(os.path.join(home, name), encoding="utf-8").read(), encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", "import flashattn_ext"], cwd=tmp_path, capture_output=True, text=True,
                          env=dict(os.environ, PYTHONPATH=str(tmp_path)))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("ImportError: ")
    assert "flashattn_ext" in last and "pip install" in last


# ---- use_as_sdpa -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def counted():
    """Counts the calls of the forward ops in this process."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Count.calls += func in (torch.ops.flashattn_ext.forward.default,
                                    torch.ops.flashattn_ext.forward_plain.default)
            return func(*args, **(kwargs or {}))

    with Count():
        yield Count


def test_use_as_sdpa_replaces_torch_s_function_inside_the_block():
    q, k, v = torch.randn(3, 1, 2, 9, 8).unbind()
    original = F.scaled_dot_product_attention
    with counted() as count:
        F.scaled_dot_product_attention(q, k, v)
        assert count.calls == 0
        with fa.use_as_sdpa():
            got = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            assert original(q, k, v).shape == got.shape  # through a name taken before
        assert count.calls == 2
        torch.nn.functional.scaled_dot_product_attention(q, k, v)
        assert count.calls == 2
    assert torch.equal(got, SDPA(q, k, v, is_causal=True))
    assert F.scaled_dot_product_attention is original


def test_use_as_sdpa_ends_with_an_exception_and_nests():
    q = torch.randn(1, 2, 9, 8)
    with pytest.raises(KeyError):
        with fa.use_as_sdpa(), fa.use_as_sdpa():
            raise KeyError("x")
    with counted() as count:
        F.scaled_dot_product_attention(q, q, q)
        assert count.calls == 0


def test_use_as_sdpa_is_a_decorator_and_local_to_its_thread():
    q, seen = torch.randn(1, 2, 9, 8), []

    @fa.use_as_sdpa()
    def ours():
        other = threading.Thread(target=lambda: seen.append(calls()))
        other.start()
        other.join()
        seen.append(calls())

    def calls():
        with counted() as count:
            F.scaled_dot_product_attention(q, q, q)
        return count.calls

    ours()
    assert seen == [0, 1]


def multihead(batch_first=True, **options):
    torch.manual_seed(0)
    return torch.nn.MultiheadAttention(32, 4, batch_first=batch_first, **options)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [None, "padding", "causal"])
def test_use_as_sdpa_in_an_unchanged_multihead_attention(masked, training):
    model = multihead().train(training)
    x = torch.randn(2, 9, 32, requires_grad=True)
    options = {}
    if masked == "padding":
        options["key_padding_mask"] = torch.arange(9)[None].expand(2, 9) >= torch.tensor([[6], [9]])
    if masked == "causal":
        options["attn_mask"] = torch.nn.Transformer.generate_square_subsequent_mask(9)
    want = model(x, x, x, need_weights=False, **options)[0]
    with counted() as count, fa.use_as_sdpa():
        got = model(x, x, x, need_weights=False, **options)[0]
    assert count.calls == 1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    (grad,), (want_grad,) = (torch.autograd.grad(y.square().sum(), x) for y in (got, want))
    torch.testing.assert_close(grad, want_grad, rtol=1e-4, atol=1e-5)


def test_use_as_sdpa_in_transformer_layers():
    torch.manual_seed(0)
    model = torch.nn.Transformer(32, 4, 2, 2, 64, dropout=0.0, batch_first=True)
    source, target = torch.randn(2, 11, 32), torch.randn(2, 7, 32)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(7)
    want = model(source, target, tgt_mask=mask, tgt_is_causal=True)
    with counted() as count, fa.use_as_sdpa():
        got = model(source, target, tgt_mask=mask, tgt_is_causal=True)
        got.square().sum().backward()
    assert count.calls == 6  # two encoder layers, two decoder layers with two attentions each
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# ---- explain, kernels, build_info, info ------------------------------------------------------------------------------


def test_explain_prints_the_plan_and_computes_nothing(capsys):
    q, k = torch.randn(2, 8, 512, 64), torch.randn(2, 2, 512, 64)
    with counted() as count:
        plan = fa.explain(q, k, k, is_causal=True, enable_gqa=True)
    assert count.calls == 0
    printed = capsys.readouterr().out
    assert str(plan).strip() == printed.strip()
    for word in (plan.kernel, "512", "64", "workspace", "tasks", plan.why.split(";")[0]):
        assert word in printed
    assert plan.kernel in {k["name"] for k in fa.kernels()}
    full = fa.explain(q, k, k, enable_gqa=True)
    assert full.flops == pytest.approx(4 * 2 * 8 * 512 * 512 * 64)
    assert 0.5 * full.flops <= plan.flops <= 0.7 * full.flops
    assert full.bytes == pytest.approx(4 * (2 * q.numel() + 2 * k.numel()), rel=0.02)


def test_explain_of_the_backward_of_decoding_and_of_meta_tensors(capsys):
    q, k = torch.empty(1, 8, 1, 64, device="meta"), torch.empty(1, 2, 1 << 20, 64, device="meta")
    plan = fa.explain(q, k, k, enable_gqa=True)
    assert plan.splits > 1 and plan.kind in ("rows", "panel", "scalar")
    assert "bwd" in fa.explain(q, k, k, enable_gqa=True, backward=True).kernel


def test_explain_draws_no_random_number(capsys):
    q = torch.randn(1, 2, 9, 8)
    state = torch.get_rng_state()
    fa.explain(q, q, q, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bad, error", [(dict(dropout_p=2.0), ValueError), (dict(softcap=-1.0), ValueError),
                                        (dict(attn_mask=torch.zeros(9)), RuntimeError),
                                        (dict(window=(-3, 0)), ValueError)],
                         ids=lambda x: "+".join(x) if isinstance(x, dict) else "")
def test_explain_refuses_what_the_call_refuses(bad, error):
    q = torch.randn(1, 2, 9, 8)
    for function in (fa.explain, SDPA):
        with pytest.raises(error):
            function(q, q, q, **bad)


def test_kernels_are_named_by_the_grammar():
    listed = fa.kernels()
    assert listed and len({k["name"] for k in listed}) == len(listed)
    floats = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "float64": "f64"}
    short = {**floats, "int8": "i8", "float8_e4m3fn": "f8e4m3"}
    for kernel in listed:
        assert set(kernel) == {"name", "op", "target", "dtype", "usable"}
        assert kernel["name"] == f"fa_{kernel['op']}_{kernel['target']}_{short[kernel['dtype']]}"
    usable = {(k["op"], k["dtype"]) for k in listed if k["usable"]}
    assert {(op, dtype) for op in ("fwd", "bwd") for dtype in floats} <= usable


def test_build_info():
    info = fa.build_info()
    assert {"version", "torch", "torch_abi", "c_compiler", "build_type", "isas", "cuda"} <= set(info)
    assert isinstance(info["cuda"], bool) and isinstance(info["isas"], list)


def test_info_module():
    done = subprocess.run([sys.executable, "-m", "flashattn_ext.info"], capture_output=True, text=True, timeout=120,
                          env=dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p)))
    assert done.returncode == 0, done.stderr
    for word in (fa.__version__, torch.__version__, "fa_fwd_scalar_f32", "FLASHATTN_EXT_ISA",
                 fa.build_info()["c_compiler"]):
        assert word in done.stdout


def test_set_deterministic():
    q = torch.randn(1, 2, 9, 8)
    want = SDPA(q, q, q)
    for mode in (True, False, True):
        fa.set_deterministic(mode)
        assert torch.equal(SDPA(q, q, q), want)
    with pytest.raises(TypeError, match="mode"):
        fa.set_deterministic("yes")
