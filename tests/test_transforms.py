"""Under torch.func's transforms, autocast and checkpointing; in workers, threads and copies of a module."""

import concurrent.futures
import copy
import functools
import io
import os
import pickle

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import flashattn_ext as fa
from cases import Case, build, upstream
from compare import differentiate, ours

SDPA = fa.scaled_dot_product_attention
reference = fa.reference.attention


def doubles(*shapes):
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


# ---- vmap ------------------------------------------------------------------------------------------------------------

N, B, H, SQ, SK, D = 3, 2, 2, 5, 7, 4


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 0, 0), (1, 0, 2),
                                    (4, 3, 1), (-1, -2, 0), (None, None, 0)],
                         ids=str)
@pytest.mark.parametrize("options", [dict(), dict(is_causal=True), dict(softcap=1.0, window=(2, 1))], ids=str)
def test_vmap(in_dims, options):
    """Whichever dimension of whichever input is mapped: the same as a loop."""
    whole = doubles((N, B, H, SQ, D), (N, B, H, SK, D), (N, B, H, SK, D))
    given = [x[0] if dim is None else x.movedim(0, dim) for x, dim in zip(whole, in_dims)]
    out, lse = torch.vmap(lambda *a: SDPA(*a, return_lse=True, **options), in_dims)(*given)
    for n in range(N):
        one = [x[0] if dim is None else x[n] for x, dim in zip(whole, in_dims)]
        want, want_lse = reference(*one, return_lse=True, **options)
        close(out[n], want)
        close(lse[n], want_lse)


@pytest.mark.parametrize("mapped", ["option", "inputs", "both"])
@pytest.mark.parametrize("name, shape, batch", [
    ("attn_mask", (SQ, SK), ()), ("attn_mask", (SQ, SK), (B,)),
    ("attn_mask", (H, 1, SK), ()), ("attn_mask", (H, 1, SK), (B,)),
    ("attn_mask", (1, 1, SQ, SK), (B,)), ("attn_mask", (B, 1, 1, SK), (B,)), ("sinks", (H,), ()), ("sinks", (H,), (B,)),
    ("sinks", (B, H), (B,)), ("alibi_slopes", (H,), ()), ("alibi_slopes", (H,), (B,)), ("alibi_slopes", (B, H), (B,)),
    ("kv_seqlens", (B,), (B,)), ("q_seqlens", (B,), (B,)), ("kv_seqlens", (), ()), ("q_seqlens", (), ())])
def test_vmap_over_options(name, shape, batch, mapped):
    q, k, v = doubles((N, *batch, H, SQ, D), (N, *batch, H, SK, D), (N, *batch, H, SK, D))
    option = torch.randint(0, 5, (N, *shape)) if "seqlens" in name else torch.randn(N, *shape, dtype=torch.float64)
    over = None if mapped == "option" else 0, None if mapped == "inputs" else 0
    q, k, v = (x[0] if over[0] is None else x for x in (q, k, v))
    option = option[0] if over[1] is None else option

    def one(q, k, v, x, function=SDPA):
        return function(q, k, v, **{name: x})

    got = torch.vmap(one, (over[0], over[0], over[0], over[1]))(q, k, v, option)
    for n in range(N):
        arguments = [x if over[0] is None else x[n] for x in (q, k, v)]
        close(got[n], one(*arguments, option if over[1] is None else option[n], function=reference))


def test_nested_vmap():
    q, k, v = doubles((N, 2, H, SQ, D), (N, H, SK, D), (2, H, SK, D))
    got = torch.vmap(torch.vmap(SDPA, (0, None, 0)), (0, 0, None))(q, k, v)
    for n in range(N):
        for m in range(2):
            close(got[n, m], reference(q[n, m], k[n], v[m]))


def test_vmap_in_chunks_and_out_dims():
    q, k, v = doubles((5, H, SQ, D), (5, H, SK, D), (5, H, SK, D))
    got = torch.vmap(SDPA, out_dims=2, chunk_size=2)(q, k, v)
    close(got, reference(q, k, v).movedim(0, 2))


def test_vmap_and_dropout_follow_randomness():
    """different: each call drops its own weights; same: all drop the same; error: refused, as torch does."""
    q, k = torch.zeros(N, H, 20, D), torch.zeros(N, H, 30, D)
    v = torch.eye(30).expand(N, H, 30, 30)
    attend = functools.partial(SDPA, dropout_p=0.5)
    different = torch.vmap(attend, randomness="different")(q, k, v) != 0
    assert not torch.equal(different[0], different[1])
    torch.manual_seed(3)
    same = torch.vmap(attend, randomness="same")(q, k, v) != 0
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    torch.manual_seed(3)
    assert torch.equal(same[0], attend(q[0], k[0], v[0]) != 0)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(attend)(q, k, v)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_gradient_through_vmap_with_dropout(randomness):
    """Forward and backward of the mapped calls drop the same weights: grad_value = weights^T grad_out."""
    q, k = doubles((N, H, SQ, D), (N, H, SK, D))
    v = torch.eye(SK, dtype=torch.float64).expand(N, H, SK, SK).clone().requires_grad_()
    weights = torch.vmap(functools.partial(SDPA, dropout_p=0.4), randomness=randomness)(q, k, v)
    upstream_grad = torch.randn_like(weights)
    (grad,) = torch.autograd.grad(weights, v, upstream_grad)
    close(grad, weights.detach().transpose(-1, -2) @ upstream_grad)


def test_gradients_through_vmap():
    q, k, v = (x.requires_grad_() for x in doubles((N, H, SQ, D), (H, SK, D), (N, H, SK, D)))
    mask = torch.randn(N, SQ, SK, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(H, dtype=torch.float64, requires_grad=True)
    got = torch.vmap(lambda q, v, m: SDPA(q, k, v, m, sinks=sinks))(q, v, mask)
    want = torch.stack([reference(q[n], k, v[n], mask[n], sinks=sinks) for n in range(N)])
    leaves = (q, k, v, mask, sinks)
    for a, b in zip(torch.autograd.grad(got.square().sum(), leaves), torch.autograd.grad(want.square().sum(), leaves)):
        close(a, b)


# ---- grad, vjp, jacrev -----------------------------------------------------------------------------------------------


def loss_of(function, **options):
    def loss(q, k, v):
        out, lse = function(q, k, v, return_lse=True, **options)
        return out.square().sum() + lse.sin().sum()

    return loss


@pytest.mark.parametrize("options", [dict(), dict(is_causal=True), dict(softcap=0.7, window=(2, 2))], ids=str)
def test_func_grad_and_vjp(options):
    given = doubles((B, H, SQ, D), (B, H, SK, D), (B, H, SK, D))
    got = torch.func.grad(loss_of(SDPA, **options), argnums=(0, 1, 2))(*given)
    want = torch.func.grad(loss_of(reference, **options), argnums=(0, 1, 2))(*given)
    value, pull = torch.func.vjp(loss_of(SDPA, **options), *given)
    for a, b, c in zip(got, want, pull(torch.tensor(2.0, dtype=torch.float64))):
        close(a, b)
        close(c, 2 * b)


def test_func_grad_of_mask_and_sinks():
    q, k, v = doubles((B, H, SQ, D), (B, H, SK, D), (B, H, SK, D))
    mask, sinks = doubles((H, 1, SK), (H,))

    def loss(mask, sinks, function):
        return function(q, k, v, mask, sinks=sinks).square().sum()

    got = torch.func.grad(loss, argnums=(0, 1))(mask, sinks, SDPA)
    for a, b in zip(got, torch.func.grad(loss, argnums=(0, 1))(mask, sinks, reference)):
        close(a, b)


def test_per_sample_gradients():
    """vmap over grad, the recipe of differential privacy."""
    w, x = doubles((D, D), (N, H, SQ, D))

    def loss(w, x, function):
        return function(x @ w, x, x, is_causal=True).square().sum()

    got = torch.vmap(torch.func.grad(loss), (None, 0, None))(w, x, SDPA)
    close(got, torch.stack([torch.func.grad(loss)(w, x[n], reference) for n in range(N)]))


@pytest.mark.parametrize("argument", range(3))
def test_jacrev(argument):
    given = doubles((1, SQ, D), (1, SK, D), (1, SK, D))
    close(torch.func.jacrev(SDPA, argument)(*given), torch.func.jacrev(reference, argument)(*given))


def test_gradients_in_a_batch():
    q, k, v = (x.requires_grad_() for x in doubles((H, SQ, D), (H, SK, D), (H, SK, D)))
    upstream_grads = torch.randn(4, H, SQ, D, dtype=torch.float64)
    got = torch.autograd.grad(SDPA(q, k, v), (q, k, v), upstream_grads, is_grads_batched=True)
    for n in range(4):
        for a, b in zip(got, torch.autograd.grad(SDPA(q, k, v), (q, k, v), upstream_grads[n])):
            close(a[n], b)


# ---- what is not differentiable says so ------------------------------------------------------------------------------


def test_forward_mode_is_refused_clearly():
    q, k, v = torch.randn(3, H, SQ, D).unbind()
    for call in (lambda: torch.func.jvp(lambda q: SDPA(q, k, v), (q,), (q,)),
                 lambda: torch.func.jacfwd(lambda q: SDPA(q, k, v))(q),
                 lambda: torch.func.hessian(lambda q: SDPA(q, k, v).sum())(q)):
        with pytest.raises(RuntimeError, match="(?s)(jvp|forward-mode|once).*flashattn_ext.reference.attention"):
            call()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(RuntimeError, match="(?s)(jvp|forward-mode).*flashattn_ext.reference.attention"):
            SDPA(dual, k, v)
        assert torch.equal(SDPA(q, k, v), SDPA(q, k, v, softcap=0.0))  # a call without duals works in the level


def test_double_backward_is_refused_clearly():
    q, k, v = (x.requires_grad_() for x in torch.randn(3, H, SQ, D).unbind())
    (grad,) = torch.autograd.grad(SDPA(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="(?s)once.*flashattn_ext.reference.attention"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="(?s)once.*flashattn_ext.reference.attention"):
        torch.func.grad(lambda q: torch.func.grad(lambda q: SDPA(q, k, v).square().sum())(q).sum())(q.detach())


def test_the_ways_out_work():
    """What the refusals name: the reference, and torch's math path."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = doubles((H, SQ, D), (H, SK, D), (H, SK, D))
    out, tangent = torch.func.jvp(lambda q: reference(q, k, v), (q,), (q,))
    with sdpa_kernel(SDPBackend.MATH):
        attend = torch.nn.functional.scaled_dot_product_attention
        close(tangent, torch.func.jvp(lambda q: attend(q, k, v), (q,), (q,))[1])
    close(out, SDPA(q, k, v))


# ---- autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_float32_inputs(dtype):
    q, k, v = (x.requires_grad_() for x in torch.randn(3, B, H, SQ, D).unbind())
    with torch.autocast("cpu", dtype):
        out = SDPA(q, k, v, is_causal=True)
        assert torch.nn.functional.scaled_dot_product_attention(q, k, v).dtype == dtype
    assert out.dtype == dtype
    assert torch.equal(out, SDPA(q.to(dtype), k.to(dtype), v.to(dtype), is_causal=True))
    grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    assert all(g.dtype == torch.float32 for g in grads)


def test_autocast_takes_mixed_inputs_and_keeps_a_float32_mask():
    q, k, v = torch.randn(3, B, H, SQ, D).unbind()
    mask = torch.randn(SQ, SQ)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = SDPA(q.bfloat16(), k, v, mask)
        with torch.autocast("cpu", enabled=False):
            assert SDPA(q, k, v).dtype == torch.float32
        assert SDPA(q.double(), k.double(), v.double()).dtype == torch.float64
    assert torch.equal(mixed, SDPA(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask))


def test_autocast_in_a_training_step():
    model = torch.nn.Linear(16, 48)
    x = torch.randn(2, 9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        q, k, v = model(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind()
        loss = SDPA(q, k, v, is_causal=True).float().square().mean()
    loss.backward()
    assert model.weight.grad.dtype == torch.float32 and torch.isfinite(model.weight.grad).all()


# ---- checkpointing and saved tensors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_replays_dropout(reentrant):
    """The recomputed forward drops the same weights: the gradients are those without checkpointing, bit for bit."""
    q, k, v = (x.requires_grad_() for x in torch.randn(3, B, H, 30, 8).unbind())

    def block(q, k, v):
        return SDPA(q, k, v, dropout_p=0.4, is_causal=True)

    def gradients(function):
        torch.manual_seed(11)
        for x in (q, k, v):
            x.grad = None
        function(q, k, v).square().sum().backward()
        return [x.grad.clone() for x in (q, k, v)]

    want = gradients(block)
    got = gradients(lambda *a: checkpoint(block, *a, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_saved_tensors_hooks_see_every_saved_tensor():
    q, k, v = (x.requires_grad_() for x in torch.randn(3, B, H, 30, 8).unbind())
    want = torch.autograd.grad(SDPA(q, k, v).square().sum(), (q, k, v))
    packed = []

    def pack(x):
        packed.append(x.shape)
        return x.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = SDPA(q, k, v)
    assert len(packed) >= 5  # query, key, value, out, lse
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), want))


# ---- threads, workers, copies ----------------------------------------------------------------------------------------


def test_concurrent_calls_from_python_threads():
    """Forward and backward of different problems at once give the bits they give alone."""
    cases = [Case(HQ=4, HK=2, SQ=70 + 11 * i, SK=90 + 7 * i, D=16 + 8 * i,
                  options=("causal",) if i % 2 else ("bias_head",))
             for i in range(4)] + [Case(SQ=1, SK=2000, D=32)]
    work = [(build(case), upstream(case)) for case in cases]
    want = [differentiate(ours, *w) for w in work]
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        jobs = [(i % len(work), pool.submit(differentiate, ours, *work[i % len(work)])) for i in range(60)]
        for i, job in jobs:
            for name, got in job.result(timeout=120).items():
                assert torch.equal(got, want[i][name]), f"{cases[i].id} {name}"


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        q = torch.randn(2, 60, 16, generator=torch.Generator().manual_seed(i)).requires_grad_()
        out = SDPA(q, q, q, is_causal=True)
        (grad,) = torch.autograd.grad(out.square().sum(), q)
        return out.detach(), grad


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_in_a_forked_data_loader_worker():
    """After the parent has used its threads."""
    data = Samples()
    want = [data[i] for i in range(4)]
    loader = torch.utils.data.DataLoader(data, batch_size=1, num_workers=1, multiprocessing_context="fork", timeout=120)
    for (out, grad), (want_out, want_grad) in zip(loader, want):
        assert torch.equal(out[0], want_out) and torch.equal(grad[0], want_grad)


class Attention(torch.nn.Module):
    def __init__(self, attend=SDPA):
        super().__init__()
        self.qkv, self.attend = torch.nn.Linear(16, 48), attend

    def forward(self, x):
        return self.attend(*self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind())


def test_modules_can_be_copied_pickled_and_saved():
    model, x = Attention(functools.partial(SDPA, is_causal=True)), torch.randn(2, 9, 16)
    want = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), want)
    assert pickle.loads(pickle.dumps(SDPA)) is SDPA


def test_meta_tensors_give_shapes():
    q, k = torch.empty(2, 4, 5, 8, device="meta"), torch.empty(2, 2, 7, 8, device="meta")
    v = torch.empty(2, 2, 7, 6, device="meta", dtype=torch.float32)
    out, lse = SDPA(q, k, v, enable_gqa=True, return_lse=True)
    assert out.device.type == "meta" and out.shape == (2, 4, 5, 6) and lse.shape == (2, 4, 5)


def test_deterministic_algorithms_are_accepted():
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, 9, 8).unbind())
    torch.use_deterministic_algorithms(True)
    try:
        SDPA(q, k, v, dropout_p=0.1).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
