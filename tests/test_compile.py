"""Under torch.compile, torch.export and AOT autograd: one graph, no break, the same values."""

import pytest
import torch
from torch import library
from torch._dynamo.utils import counters
from torch.nn.attention.bias import causal_lower_right

import flashattn_ext as fa
from cases import Case, build, upstream
from compare import differentiate, ours

SDPA = fa.scaled_dot_product_attention
FORWARD, BACKWARD = "flashattn_ext::forward", "flashattn_ext::backward"

OPTIONS = [
    (), ("causal",), ("mask_key",), ("bias_head", "softcap"), ("sinks", "window_left"), ("alibi", "scale"),
    ("kv_lengths", "q_lengths"), ("lower_right",),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function=None, backend="aot_eager", **options):
    return torch.compile(function or (lambda q, k, v, **o: SDPA(q, k, v, return_lse=True, **o)), fullgraph=True,
                         backend=backend, **options)


def assert_same(got, want):
    for name in want:
        assert torch.equal(got[name], want[name]), f"{name} differs by {(got[name] - want[name]).abs().max():.2e}"
        assert got[name].stride() == want[name].stride(), name


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids="+".join)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_graph_forward_and_backward(options, dtype):
    case = Case(HQ=4, HK=2, dtype=dtype, layout="bshd", options=options)
    inputs, grads = build(case), upstream(case)
    assert_same(differentiate(compiled(), inputs, grads), differentiate(ours, inputs, grads))


@pytest.mark.parametrize("options", OPTIONS, ids="+".join)
def test_one_graph_without_gradients(options):
    inputs = build(Case(HQ=4, HK=2, options=options))
    function = compiled()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            got = function(inputs.query, inputs.key, inputs.value, **inputs.options)
            want = ours(inputs.query, inputs.key, inputs.value, **inputs.options)
        assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.slow
def test_inductor():
    """The whole way to machine code, in a small model with views, a norm and a residual around the attention."""
    torch.manual_seed(0)
    parts = dict(qkv=torch.nn.Linear(32, 96), norm=torch.nn.LayerNorm(32), out=torch.nn.Linear(32, 32))
    model = torch.nn.ModuleDict(parts)

    def block(x):
        q, k, v = model["qkv"](model["norm"](x)).view(2, 24, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind()
        return x + model["out"](SDPA(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def run(function):
        x = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(1))
        out = function(x)
        return [out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))]

    for got, want in zip(run(torch.compile(block, fullgraph=True)), run(block)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_dynamic_shapes_compile_once():
    function, graphs = compiled(dynamic=True), []
    for B, SQ, SK in ((3, 17, 33), (5, 40, 21), (7, 9, 100), (3, 64, 65)):  # sizes equal at first are held equal
        case = Case(B=B, HQ=4, HK=2, SQ=SQ, SK=SK, options=("causal",))
        inputs, grads = build(case), upstream(case)
        assert_same(differentiate(function, inputs, grads), differentiate(ours, inputs, grads))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [graphs[0]] * 4, f"compiled again: {graphs}"


def test_marked_dynamic_length_with_a_mask():
    function, graphs = compiled(lambda q, k, v, m: SDPA(q, k, v, m)), []
    for S in (11, 50, 97):
        q, k, v = torch.randn(3, 2, 2, S, 8).unbind()
        mask = torch.rand(2, 1, 1, S) > 0.2
        for x, dim in ((q, 2), (k, 2), (v, 2), (mask, 3)):
            torch._dynamo.mark_dynamic(x, dim)
        assert torch.equal(function(q, k, v, mask), SDPA(q, k, v, mask))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [graphs[0]] * 3, f"compiled again: {graphs}"


def test_generation_compiles_twice():
    """A prompt, then single tokens: SQ = 1 is a second graph, the growing keys are none."""
    function, graphs = compiled(lambda q, k, v: SDPA(q, k, v, enable_gqa=True), dynamic=True), []
    k, v = torch.randn(2, 1, 2, 40, 8).unbind()
    for SQ, SK in ((19, 20), (1, 21), (1, 22), (1, 30), (1, 40)):
        given = torch.randn(1, 4, SQ, 8), k[:, :, :SK].contiguous(), v[:, :, :SK].contiguous()
        assert torch.equal(function(*given), SDPA(*given, enable_gqa=True))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [graphs[0]] + [graphs[1]] * 4, f"compiled again: {graphs}"


def test_dropout_draws_anew_in_each_run():
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, 2, 20, 8).unbind())
    function = compiled(lambda q, k, v: SDPA(q, k, v, dropout_p=0.5))
    torch.manual_seed(1)
    first, second = function(q, k, v), function(q, k, v)
    torch.manual_seed(1)
    again = function(q, k, v)
    assert torch.equal(first, again) and not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(first, SDPA(q, k, v, dropout_p=0.5))
    got = torch.autograd.grad(first.square().sum(), (q, k, v))
    torch.manual_seed(1)
    want = torch.autograd.grad(SDPA(q, k, v, dropout_p=0.5).square().sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_causal_bias_inside_a_graph():
    """Made outside of it: torch's compiler cannot trace the making of one."""
    q, k, v = torch.randn(1, 2, 5, 8), *torch.randn(2, 1, 2, 9, 8).unbind()
    bias = causal_lower_right(5, 9)
    assert torch.equal(compiled(lambda q, k, v: SDPA(q, k, v, bias))(q, k, v), SDPA(q, k, v, bias))


@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8), (2, 3, 2, 5, 8)], ids=str)
def test_other_numbers_of_dimensions(shape):
    q, k, v = (x.requires_grad_() for x in torch.randn(3, *shape).unbind())
    got, want = compiled(lambda q, k, v: SDPA(q, k, v))(q, k, v), SDPA(q, k, v)
    assert torch.equal(got, want)
    for a, b in zip(torch.autograd.grad(got.sum(), (q, k, v)), torch.autograd.grad(want.sum(), (q, k, v))):
        assert torch.equal(a, b)


def test_refusals_come_out_of_a_graph():
    """Through the compiler's own wrapping, the text still says what was wrong."""
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(Exception, match="dropout_p"):
        compiled(lambda q: SDPA(q, q, q, dropout_p=2.0))(q)
    with pytest.raises(Exception, match="enable_gqa"):
        compiled(lambda q, k: SDPA(q, k, k))(torch.randn(1, 4, 5, 8), q)


def test_use_as_sdpa_inside_a_graph():
    def model(q, k, v):
        with fa.use_as_sdpa():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    q, k, v = torch.randn(3, 1, 2, 9, 8).unbind()
    assert torch.equal(compiled(model)(q, k, v), SDPA(q, k, v, is_causal=True))


def test_gradient_inside_a_graph():
    q, k, v = torch.randn(3, 1, 2, 9, 8).unbind()

    def loss(q):
        return SDPA(q, k, v, is_causal=True).square().sum()

    assert torch.equal(compiled(torch.func.grad(loss))(q), torch.func.grad(loss)(q))


# ---- torch.export ----------------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(16, 48)
        self.sinks = torch.nn.Parameter(torch.zeros(2))

    def forward(self, x, padding):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind()
        return SDPA(q, k, v, padding[:, None, None], sinks=self.sinks).transpose(1, 2).flatten(2)


def test_export_with_a_dynamic_length():
    model = Model().eval()
    length = torch.export.Dim("length", min=2, max=512)
    x, padding = torch.randn(2, 10, 16), torch.rand(2, 10) > 0.2
    program = torch.export.export(model, (x, padding), dynamic_shapes=({1: length}, {1: length}))
    targets = [str(node.target) for node in program.graph.nodes]
    assert any("flashattn_ext.forward" in target for target in targets), targets
    assert not any("scaled_dot_product" in target for target in targets)
    for S in (10, 33, 200):
        x, padding = torch.randn(2, S, 16), torch.rand(2, S) > 0.2
        assert torch.equal(program.module()(x, padding), model(x, padding))


def test_exported_program_survives_saving(tmp_path):
    model = Model().eval()
    x, padding = torch.randn(2, 10, 16), torch.rand(2, 10) > 0.2
    torch.export.save(torch.export.export(model, (x, padding)), tmp_path / "model.pt2")
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(x, padding), model(x, padding))


def test_ahead_of_time_autograd():
    from functorch.compile import aot_function, nop

    graphs = []

    def keep(graph, example):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return nop(graph, example)

    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, 9, 8).unbind())
    function = aot_function(lambda q, k, v: SDPA(q, k, v, is_causal=True), fw_compiler=keep, bw_compiler=keep)
    out = function(q, k, v)
    got = torch.autograd.grad(out.square().sum(), (q, k, v))
    want = torch.autograd.grad(SDPA(q, k, v, is_causal=True).square().sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    for targets, op in zip(graphs, ("flashattn_ext.forward", "flashattn_ext.backward")):
        assert any(op in target for target in targets), targets


# ---- opcheck and fake tensors ----------------------------------------------------------------------------------------


def op_arguments(case, seed=None):
    """The 16 arguments of the op `forward` for a case (only options that need no normalisation)."""
    inputs = build(case)
    options = inputs.options
    left, right = options.get("window", (-1, -1))
    right = 0 if options.get("is_causal") else right
    return (inputs.query, inputs.key, inputs.value, options.get("attn_mask"), options.get("sinks"),
            options.get("alibi_slopes"), options.get("q_seqlens"), options.get("kv_seqlens"), seed,
            options.get("scale"), options.get("softcap", 0.0), left, -1 if right is None else right, False,
            options.get("dropout_p", 0.0), False)


OPCHECK = [
    (Case(HQ=4, HK=2), None),
    (Case(layout="bshd", options=("causal",)), None),
    (Case(layout="transposed", DV=7, dtype="bfloat16", options=("bias_full", "sinks")), None),
    (Case(layout="strided", dtype="float16", options=("mask_key", "alibi_batch", "softcap", "window")), None),
    (Case(dtype="float64", options=("q_lengths", "kv_lengths64", "scale")), None),
    (Case(layout="expanded", options=("dropout", "bias_batch")), torch.tensor([12345])),
    (Case(SQ=1, SK=70, HQ=4, HK=1), None),
    (Case(B=1, HQ=1, HK=1, SQ=1, SK=1, D=1), None),
]


@pytest.mark.parametrize("case, seed", OPCHECK, ids=lambda x: x.id if isinstance(x, Case) else "")
def test_opcheck_forward(case, seed):
    library.opcheck(torch.ops.flashattn_ext.forward.default, op_arguments(case, seed))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("layout", ["bhsd", "bshd", "strided"])
def test_opcheck_forward_plain(layout, is_causal):
    case = Case(layout=layout, SQ=70, SK=70, HQ=4, HK=2)
    query, key, value = op_arguments(case)[:3]
    plain = torch.ops.flashattn_ext.forward_plain.default
    library.opcheck(plain, (query, key, value, 0.3, is_causal, True, False))
    right = 0 if is_causal else -1
    out, _ = torch.ops.flashattn_ext.forward(query, key, value, *[None] * 6, 0.3, 0.0, -1, right, False, 0.0, False)
    assert torch.equal(plain(query, key, value, 0.3, is_causal, True, False), out)
    with pytest.raises(RuntimeError, match="4 heads and key 2"):
        plain(query, key, value, 0.3, is_causal, False, False)


@pytest.mark.parametrize("case, seed", OPCHECK, ids=lambda x: x.id if isinstance(x, Case) else "")
def test_opcheck_backward(case, seed):
    arguments = op_arguments(case, seed)
    out, lse = torch.ops.flashattn_ext.forward(*arguments)
    grad_out, grad_lse = upstream(case)
    needs = 7 | 8 * (arguments[3] is not None and arguments[3].is_floating_point()) | 16 * (arguments[4] is not None)
    for grad, bits in ((grad_lse.to(lse.dtype), needs), (None, 1), (None, 6)):
        library.opcheck(torch.ops.flashattn_ext.backward.default,
                              (grad_out, grad, *arguments[:3], out, lse, *arguments[3:], bits))


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "transposed", "strided", "expanded", "packed"])
@pytest.mark.parametrize("sizes", [(2, 3, 5, 8), (1, 3, 1, 8), (2, 1, 5, 1), (1, 1, 1, 1), (2, 3, 0, 8)], ids=str)
def test_fake_results_have_the_real_strides(sizes, layout):
    """Also where sizes of 1 make the order of strides a matter of taste."""
    B, H, S, D = sizes
    case = Case(B=B, HQ=H, HK=H, SQ=S, SK=4, D=D, DV=3, layout=layout)
    arguments = op_arguments(case)
    meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments]
    # .to("meta") makes dense strides of some views: lay them out as the real ones are.
    meta[:3] = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in arguments[:3]]
    real, fake = (torch.ops.flashattn_ext.forward(*a) for a in (arguments, meta))
    for a, b in zip(real, fake):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    grads = torch.ops.flashattn_ext.backward(torch.ones_like(real[0]), None, *arguments[:3], *real, *arguments[3:], 7)
    shadows = torch.ops.flashattn_ext.backward(fake[0], None, *meta[:3], *fake, *meta[3:], 7)
    for a, b in zip(grads, shadows):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_ops_are_functional():
    for name in (FORWARD, BACKWARD):
        schema = torch._C._get_schema(name, "")
        assert not schema.is_mutable and not any(r.alias_info for r in schema.returns)


@pytest.mark.slow
def test_ahead_of_time_inductor(tmp_path):
    """A compiled package that calls the op through torch's dispatcher."""
    model = Model().eval()
    x, padding = torch.randn(2, 10, 16), torch.rand(2, 10) > 0.2
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(torch.export.export(model, (x, padding)),
                                                           package_path=str(tmp_path / "model.pt2"))
        got = torch._inductor.aoti_load_package(package)(x, padding)
        torch.testing.assert_close(got, model(x, padding))
