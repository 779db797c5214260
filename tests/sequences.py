"""Packed sequences and caches for the tests: inputs, an eager formula of their own, pages with poison around them."""

import math
from types import SimpleNamespace

import torch
from torch import library

import flashattn_ext as fa
from compare import check, from_stored_output

LSE = SimpleNamespace(lse=True)  # what return_aux wants; torch's AuxRequest where torch has one
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = FLOATS + (torch.float64,)
QUANTISED = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def opcheck(op, args):
    """torch's checks of a custom op, but those of gradients: these ops have none of their own."""
    library.opcheck(op, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def offsets(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def turning(positions, half, dtype=torch.float32):
    """cos and sin (positions, half) of rotary embedding."""
    angles = torch.arange(positions)[:, None] * 100.0 ** -(torch.arange(half) / half)
    return angles.cos().to(dtype), angles.sin().to(dtype)


# ---- eager attention of one sequence, in the precision of its inputs -------------------------------------------------


def eager(q, k, v, *, scale=None, causal=False, window=None, softcap=0.0, sinks=None, alibi_slopes=None, keep=None):
    """q (SQ, HQ, D), k (SK, HK, D), v (SK, HK, DV), ends aligned; keep (SQ, SK) bool: further what may be seen.

    Returns out (SQ, HQ, DV) and lse (HQ, SQ)."""
    SQ, HQ, D = q.shape
    SK, HK = k.shape[:2]
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(HQ // HK, 0) for x in (k, v))
    distance = torch.arange(SK) - (torch.arange(SQ)[:, None] + SK - SQ)
    left, right = (None, None) if window is None else window
    see = torch.ones(SQ, SK, dtype=torch.bool) if keep is None else keep.clone()
    if left is not None and left >= 0:
        see &= distance >= -left
    if right is not None and right >= 0:
        see &= distance <= right
    if causal:
        see &= distance <= 0
    scores = q @ k.transpose(1, 2) * (1 / math.sqrt(D) if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores.dtype)[:, None, None] * distance.abs().to(scores.dtype)
    scores = scores.masked_fill(~see, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(HQ, SQ, 1)], -1)
    alive = (scores > -math.inf).any(-1, keepdim=True) if scores.shape[-1] else see.new_zeros(HQ, SQ, 1)
    scores = torch.where(alive, scores, 0.0)
    lse = torch.where(alive[..., 0], torch.logsumexp(scores, -1), -math.inf)
    weights = torch.where(alive, torch.softmax(scores, -1), 0.0)[..., :SK]
    return (weights @ v).transpose(0, 1), lse


def of_sequence(options, n):
    """The options of sequence n: sinks and slopes may have a row for each."""
    return {name: x[n] if torch.is_tensor(x) and x.dim() == 2 else x for name, x in options.items()}


def eager_packed(q, k, v, lens_q, lens_k, **options):
    cu_q, cu_k = offsets(lens_q).tolist(), offsets(lens_k).tolist()
    parts = [eager(q[cu_q[n]:cu_q[n + 1]], k[cu_k[n]:cu_k[n + 1]], v[cu_k[n]:cu_k[n + 1]], **of_sequence(options, n))
             for n in range(len(lens_q))]
    past, heads = q.shape[0] - cu_q[-1], q.shape[1]
    parts.append((q.new_zeros(past, heads, v.shape[-1]), q.new_full((heads, past), -math.inf)))
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], 1)


# ---- packed calls ----------------------------------------------------------------------------------------------------


class Packed:
    """Random packed inputs: rows of q and k for each sequence, and `past` rows behind the last."""

    def __init__(self, lens_q, lens_k, dtype=torch.float32, HQ=4, HK=2, D=16, DV=None, past=0, **options):
        self.lens_q, self.lens_k, self.dtype, self.options = lens_q, lens_k, dtype, options
        self.cu_q, self.cu_k = offsets(lens_q), offsets(lens_k)
        self.max_q, self.max_k = max(lens_q, default=0), max(lens_k, default=0)
        self.q = normal(sum(lens_q) + past, HQ, D, dtype=dtype)
        self.k = normal(sum(lens_k) + past, HK, D, dtype=dtype)
        self.v = normal(sum(lens_k) + past, HK, DV or D, dtype=dtype)

    def call(self, function=fa.varlen_attn, **changes):
        """function of these inputs, or of others that are named: (out, lse)."""
        given = dict(q=self.q, k=self.k, v=self.v, cu_q=self.cu_q, cu_k=self.cu_k, max_q=self.max_q, max_k=self.max_k)
        given.update({name: changes.pop(name) for name in list(changes) if name in given})
        options = {**self.options, **changes}
        if "causal" in options:
            options["window_size"] = (-1, 0) if options.pop("causal") else (-1, -1)
        if "window" in options:
            options["window_size"] = options.pop("window")
        return function(*given.values(), enable_gqa=True, return_aux=LSE, **options)

    def upstream(self):
        out = normal(self.q.shape[0], self.q.shape[1], self.v.shape[-1], dtype=self.dtype)
        lse = normal(self.q.shape[1], self.q.shape[0], dtype=self.dtype)
        return out, lse

    def gradients(self, function, grads, wide=False):
        """{"out", "lse", "grad_..."} of function(q, k, v, options) -> (out, lse), in float64 where wide."""
        leaves = {name: (x.double() if wide else x.detach().clone()).requires_grad_()
                  for name, x in dict(q=self.q, k=self.k, v=self.v, sinks=self.options.get("sinks")).items()
                  if x is not None}
        options = dict(self.options)
        if "sinks" in leaves:
            options["sinks"] = leaves["sinks"]
        out, lse = function(leaves["q"], leaves["k"], leaves["v"], options)
        finite = torch.isfinite(lse.detach())
        roots = [out, torch.where(finite, lse, 0.0)]
        got = torch.autograd.grad(roots, list(leaves.values()), [g.to(r.dtype) for g, r in zip(grads, roots)],
                                  allow_unused=True)
        named = {"grad_" + name: torch.zeros_like(leaf) if grad is None else grad
                 for (name, leaf), grad in zip(leaves.items(), got)}
        return {"out": out.detach(), "lse": lse.detach(), **named}

    def check(self, **least):
        """Holds ours, forward and backward, to the acceptance rule; returns ours."""
        grads = self.upstream()

        def mine(q, k, v, options):
            return self.call(q=q, k=k, v=v, **options)

        def definition(q, k, v, options):
            return self.call(fa.reference.varlen_attn, q=q, k=k, v=v, **options)

        def same_precision(q, k, v, options):
            out, lse = eager_packed(q, k, v, self.lens_q, self.lens_k, **options)
            return out, lse

        got = self.gradients(mine, grads)
        ref = self.gradients(definition, grads, wide=True)
        peer = self.gradients(same_precision, grads)
        if self.dtype in (torch.bfloat16, torch.float16):  # the log-sum-exp comes in float32: so does eager's
            full = {name: x.float() if torch.is_tensor(x) else x for name, x in self.options.items()}
            wide = (x.float() for x in (self.q, self.k, self.v))
            peer["lse"] = eager_packed(*wide, self.lens_q, self.lens_k, **full)[1]
        off_out, off_lse = from_stored_output(ref["out"], (grads[0], grads[1].transpose(0, 1)), self.dtype)
        stored = self.gradients(definition, (off_out, off_lse.transpose(0, 1)), wide=True)
        failures = []
        for name, x in got.items():
            peers = [peer[name]] + ([stored[name]] if name.startswith("grad_") else [])
            try:
                check(name, x, ref[name], peers, self.dtype, **least)
            except AssertionError as e:
                failures.append(str(e))
        assert not failures, "\n".join(failures)
        return got


# ---- caches ----------------------------------------------------------------------------------------------------------


def into_pages(x, page_size, lengths, spare=3, poison=math.nan):
    """Rows (B, S, ...) of a dense cache in pages (pages, page_size, ...) in random order, and the table (B, n) int32.

    Rows past a sequence's length, and whole pages that none uses, hold poison; table entries past it are wild."""
    B, S = x.shape[:2]
    n = -(-S // page_size)
    order = torch.randperm(B * n + spare)[:B * n].view(B, n)
    rows = torch.full((B, n * page_size, *x.shape[2:]), poison, dtype=torch.float64)
    rows = rows.to(x.dtype) if x.is_floating_point() else torch.full(rows.shape, 77, dtype=x.dtype)
    for b, length in enumerate(lengths):
        rows[b, :length] = x[b, :length]
    pool = torch.empty((B * n + spare, page_size, *x.shape[2:]), dtype=x.dtype)
    pool.view(torch.uint8).fill_(0x7f)  # NaN of float8_e4m3fn and of float16, huge in the others
    if x.dtype in DTYPES:
        pool.fill_(poison)
    pool[order.view(-1)] = rows.view(B * n, page_size, *x.shape[2:])
    return pool, order


def wild_table(order, page_size, lengths):
    """The table as int32, its entries past each length out of every range."""
    table = order.to(torch.int32).clone()
    for b, length in enumerate(lengths):
        table[b, -(-length // page_size):] = 2**31 - 1 if b % 2 else -5
    return table


def paginate(caches, page_size, lengths, **kinds):
    """Each of the dense caches in pages at the same places, and one table."""
    seed = int(torch.randint(0, 2**31, ()))
    pools = []
    for x in caches:
        torch.manual_seed(seed)
        pool, order = into_pages(x, page_size, lengths, **kinds)
        pools.append(pool)
    return *pools, wild_table(order, page_size, lengths)


def quantise(x, stored, kind):
    """x (B, S, HK, D) as int8 or float8_e4m3fn, and its scales: kind "tensor", "head", "sequence" or "token"."""
    wide = x.float()
    dims = {"tensor": None, "head": (0, 1, 3), "sequence": (1, 3), "token": 3}[kind]
    most = wide.abs().amax() if dims is None else wide.abs().amax(dims)
    scale = (most / QUANTISED[stored]).clamp(min=1e-6)
    shaped = {"tensor": lambda s: s, "head": lambda s: s[:, None], "sequence": lambda s: s[:, None, :, None],
              "token": lambda s: s[..., None]}[kind](scale)
    value = wide / shaped
    if stored == torch.int8:
        return value.round().clamp(-128, 127).to(stored), scale
    return value.clamp(-448, 448).to(stored), scale


def dequantise(stored, scale):
    shaped = scale if scale.dim() == 0 else scale[..., None] if scale.dim() == 3 else (
        scale[:, None] if scale.dim() == 1 else scale[:, None, :, None])
    return stored.double() * shaped.double()


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(
        a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
