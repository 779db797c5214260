"""The acceptance rule: an error against the float64 reference of at most twice that of eager attention in the same
precision, plus a small absolute term. It holds for the output, the log-sum-exp and every gradient.

The error is taken twice: the largest over the tensor, and the root of the mean square, which sees what the largest
hides. The absolute term is a few units in the last place of the largest value of the reference."""

import math

import torch

import flashattn_ext as fa
import naive
from cases import build, upstream

# Units in the last place (eps) of the largest reference value that are forgiven: where eager is exact by luck, as with
# one key, a correct kernel still rounds. Sums of float32 and float64 have more to round than the one rounding of a
# half-precision result.
ULPS = {torch.float64: 256, torch.float32: 16, torch.float16: 1.5, torch.bfloat16: 1.5}
# The log-sum-exp is float32 also for half-precision inputs, whose kernels may use an exp that is good to 2^-12 only.
HALF_LSE_ABS = 2.0**-12


def eager(query, key, value, **options):
    return naive.attention(query, key, value, **{k: v for k, v in options.items() if k != "return_lse"})


def differentiate(function, inputs, grads, needs=None):
    """Calls function(query, key, value, **options) -> (out, lse), and backward with grads (grad_out, grad_lse or None).

    Returns {"out", "lse", "grad_query", ...} for the inputs named in needs (all floats() by default)."""
    named = inputs.floats()
    needs = tuple(named) if needs is None else needs
    leaves = {}

    def leaf(name, x):
        leaves[name] = x.detach().requires_grad_(name in needs)
        return leaves[name]

    made = inputs.map(lambda name, x: leaf(name, x) if name in named else x)
    out, lse = function(made.query, made.key, made.value, **made.options)
    results = {"out": out.detach(), "lse": lse.detach()}
    if needs:
        roots = [(r, g.to(r.dtype)) for r, g in zip((out, lse), grads) if g is not None and r.requires_grad]
        got = torch.autograd.grad([r for r, _ in roots], [leaves[n] for n in needs], [g for _, g in roots],
                                  allow_unused=True)
        for name, grad in zip(needs, got):
            results["grad_" + name] = torch.zeros_like(leaves[name]) if grad is None else grad
    return results


def widen(inputs):
    """The inputs in float64; bool masks stay."""
    return inputs.map(lambda name, x: x.double() if x.is_floating_point() else x)


def reference(query, key, value, **options):
    return fa.reference.attention(query, key, value, return_lse=True, **options)


def ours(query, key, value, **options):
    return fa.scaled_dot_product_attention(query, key, value, return_lse=True, **options)


def error(got, ref):
    """Largest and root-mean-square error; infinite where one is not finite and the other is not the same."""
    got, ref = got.detach().double().cpu(), ref.detach().double().cpu()
    same = got == ref
    difference = torch.where(same, torch.zeros_like(ref), (got - ref).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    if difference.numel() == 0:
        return 0.0, 0.0
    return difference.max().item(), difference.square().mean().sqrt().item()


def where_worst(got, ref):
    difference = (got.double().cpu() - ref.double().cpu()).abs()
    difference = torch.where(got.double().cpu() == ref.double().cpu(), torch.zeros_like(difference), difference)
    at = tuple(int(i) for i in torch.unravel_index(difference.nan_to_num(nan=math.inf).argmax(), ref.shape))
    return at, got[at].item(), ref[at].item()


def size_of(ref):
    finite = ref.double()[torch.isfinite(ref)]
    return finite.abs().max().item() if finite.numel() else 0.0


def check(name, got, ref, peers, dtype, least=0.0):
    """Asserts the rule for one tensor. ref is float64. peers: what eager gives and, of gradients, what float64 gives
    with a rounded output; the worse of them sets the bar. dtype is that of the inputs. least: what the largest value
    counts as at least; for tensors of a few elements, where sums cancel and eager may be exact by luck."""
    assert got.shape == ref.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(ref.shape)}"
    ulps, eps = ULPS[got.dtype], torch.finfo(got.dtype).eps
    small = ulps * eps * max(size_of(ref), least)
    if name == "lse" and dtype in (torch.float16, torch.bfloat16):
        small += HALF_LSE_ABS
    for kind, mine, *others in zip(("largest", "rms"), error(got, ref), *(error(peer, ref) for peer in peers)):
        theirs = max(others)
        bar = 2 * theirs + small
        if not mine <= bar:
            at, a, b = where_worst(got, ref)
            rule = f"2 * eager's {theirs:.3e} + {small:.1e}, {ulps} ulp of {got.dtype}"
            raise AssertionError(f"{name}: {kind} error {mine:.3e} > {bar:.3e} = {rule}; worst at {at}: {a!r}, "
                                 f"reference {b!r}")


def unchanged(name, got, clean, why="NaN in what is hidden", dtype=None):
    """Asserts that got is clean, bit for bit. On a GPU kernels compute rows that a hidden NaN has spoilt, and in
    float32 also rows beside one, once more in another order, and other strides can choose another kernel: there a few
    units in the last place of the largest value are forgiven. dtype: of the inputs, where it is not got's."""
    dtype = dtype or got.dtype
    if got.is_cuda and dtype in (torch.float16, torch.bfloat16, torch.float32):
        units = (16 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps
        torch.testing.assert_close(got, clean, rtol=units, atol=units * size_of(clean),
                                   msg=lambda text: f"{name} changed with {why}: {text}")
    else:
        assert torch.equal(got, clean), f"{name} changed with {why}"


def check_all(results, ref, peers, dtype, least=0.0):
    """The rule for every tensor of differentiate(); all failures are told at once."""
    failures = []
    for name in results:
        try:
            check(name, results[name], ref[name], [peer[name] for peer in peers if name in peer], dtype, least)
        except AssertionError as e:
            failures.append(str(e))
    assert not failures, "\n".join(failures)


def expected(inputs, grads, dtype, needs=None, keep=None, seed=None):
    """What the reference gives, a dict as differentiate() makes it, and a list of such dicts to compare its error with.

    keep: the weights that dropout keeps, for eager; seed: the generator's seed, for the reference."""
    options = dict(keep=keep) if keep is not None else {}

    def exactly(grads):
        if seed is not None:
            torch.manual_seed(seed)
        return differentiate(reference, widen(inputs), grads, needs)

    ref = exactly(grads)
    same = differentiate(lambda *a, **o: eager(*a, **o, **options), inputs, grads, needs)
    if dtype in (torch.float16, torch.bfloat16):  # the log-sum-exp comes in float32: so does eager's
        full = inputs.map(lambda name, x: x.float() if x.is_floating_point() else x)
        same["lse"] = eager(full.query, full.key, full.value, **full.options, **options)[1]
    stored = exactly(from_stored_output(ref["out"], grads, dtype)) if needs != () else {}
    return ref, [same, {name: x for name, x in stored.items() if name.startswith("grad_")}]


def from_stored_output(out, grads, dtype):
    """Upstream gradients under which the float64 gradients are those of a kernel that stores O and not the weights.

    dS = P (dP - sum(dO O) + dlse) cancels: to nothing for a row with one key. Eager cancels dP with itself. Without the
    S x S matrix, the sum is over O as it was rounded, in the precision of the kernel's sums: dlse is off by that."""
    grad_out, grad_lse = grads
    grad_out = grad_out.double()
    off = (grad_out * (out - out.to(dtype).double())).sum(-1)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    off = off + torch.finfo(sums).eps * (grad_out * out).abs().sum(-1)
    return grad_out, off if grad_lse is None else grad_lse.double() + off


def kept_after(seed, p, B, HQ, SQ, SK):
    """Which weights dropout keeps in the next call after torch.manual_seed(seed): bool (B, HQ, SQ, SK)."""
    torch.manual_seed(seed)
    flat = torch.zeros(B, HQ, SQ, 1), torch.zeros(B, HQ, SK, 1), torch.eye(SK).expand(B, HQ, SK, SK)
    return fa.reference.attention(*flat, dropout_p=p) != 0


def check_case(case, device=None, backward=True, needs=None, seed=1234, least=0.0,
               change=lambda name, x: x):
    """Builds a case, runs ours forward and backward, and holds every result to the rule. Returns ours.

    change(name, tensor) may put the tensors elsewhere in memory, not change their values."""
    inputs, grads = build(case, device).map(change), upstream(case, device)
    needs = needs if backward else ()
    p, keep = inputs.options.get("dropout_p", 0.0), None
    if p:
        keep = kept_after(seed, p, case.B, case.HQ, case.SQ, case.SK).to(inputs.query.device)
    torch.manual_seed(seed)
    got = differentiate(ours, inputs, grads, needs)
    check_all(got, *expected(inputs, grads, case.torch_dtype, needs, keep, seed), case.torch_dtype, least)
    return got
