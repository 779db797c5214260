"""Is a result right? Each peer's is compared once with float64 before it is timed.

Attention treats each batch and each group of heads on its own, so a problem is checked on its first and last (batch,
key/value head), a large one on its last, instead of whole.
"""

import math

import torch

from .cases import DTYPES, Case, Inputs

LARGE = 1 << 22    # scores of a head from which one head is checked
BLOCK = 64         # rows that share a bar, or a few more
# Units in the last place of the largest value that are forgiven: sums in float32 have more to round than the one
# rounding of a half-precision result.
UNITS = {torch.float32: 16, torch.bfloat16: 4, torch.float16: 4}
PEER_SLACK = 8.0   # a peer's error may be so many times the bar of ours before its times are left out


def eager(query, key, value, mask=None, causal: bool = False, dropout: float = 0.0):
    """Attention by its definition, in the dtype of its inputs; the scores are an array of (B, HQ, SQ, SK)."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-2, -1) * (1.0 / math.sqrt(query.shape[-1]))
    if causal:
        hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    weights = scores.softmax(-1)
    if dropout:
        weights = torch.nn.functional.dropout(weights, dropout)
    return weights @ value


def _corner(inputs: Inputs, batch: slice, head: int) -> Inputs:
    """The part of the inputs that some of the batch and one key/value head decide, as leaves of their own."""
    group = inputs.query.shape[1] // inputs.key.shape[1]
    heads = slice(head * group, (head + 1) * group)

    rows = slice(inputs.lengths[batch.start] if inputs.lengths else None)

    def part(tensor, which):
        return None if tensor is None else tensor.detach()[batch, which, rows]

    mask = inputs.mask
    if mask is not None and mask.dim() == 4:
        mask = mask[batch if mask.shape[0] > 1 else slice(None), heads if mask.shape[1] > 1 else slice(None)]
        mask = mask.detach().requires_grad_(mask.requires_grad)
    own = {"sinks": heads, "alibi_slopes": heads, "kv_seqlens": batch}
    options = {name: x[own[name]] if name in own else x for name, x in inputs.options.items()}
    one = slice(head, head + 1)
    return Inputs(part(inputs.query, heads), part(inputs.key, one), part(inputs.value, one), mask,
                  part(inputs.gradient, heads), inputs.causal, inputs.dropout, options=options)


def _results(inputs: Inputs, dtype: torch.dtype, options: bool = False) -> list[torch.Tensor]:
    """[out] or [out, dq, dk, dv] and the gradient of a mask that has one, computed in dtype; with options in float64,
    by the package's own definition of them."""
    leaves = [x.detach().to(dtype) for x in (inputs.query, inputs.key, inputs.value)]
    mask = inputs.mask
    if mask is not None and mask.requires_grad:
        mask = mask.detach().to(dtype)
        leaves.append(mask)
    if inputs.gradient is not None:
        leaves = [leaf.requires_grad_() for leaf in leaves]
    if options and inputs.options:
        from flashattn_ext import reference

        out = reference.attention(*leaves[:3], mask, is_causal=inputs.causal, enable_gqa=True, **inputs.options)
    else:
        out = eager(*leaves[:3], mask, inputs.causal)
    if inputs.gradient is None:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs.gradient.to(dtype))]


def _by_block(x: torch.Tensor) -> torch.Tensor:
    """(rows, 1): the largest of x (..., rows, n) in the block of each row."""
    rows = x.movedim(-2, 0).flatten(1).amax(1)
    blocks = rows.tensor_split(max(1, len(rows) // BLOCK))
    return torch.cat([block.amax().expand(len(block)) for block in blocks])[:, None]


class Reference:
    """What a case's inputs must give, and how far from it a result may be.

    The bar of a block of rows: at most twice the largest error there of eager attention in the same precision (without
    options), plus a few units in the last place of the largest value there. One bar for all rows would be that of the
    largest: of causal attention those of the first row, which is a value, while later ones are means of many.
    """

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.case = case
        s = case.shape
        corners = sorted({(0, 0), (s.B - 1, s.HK - 1)})[-1 if s.SQ * s.SK >= LARGE else -2:]
        shared = case.mask_gradient and inputs.mask.shape[0] == 1  # the whole batch adds to such a gradient
        self.corners = []
        for b, h in corners:
            batch = slice(0, s.B) if shared else slice(b, b + 1)
            self.corners.append((batch, h, _corner(inputs, batch, h)))
        if case.dropout:
            return
        dtype = DTYPES[case.dtype]
        self.exact = [_results(corner, torch.float64, options=True) for _, _, corner in self.corners]
        plain = [_results(corner, torch.float64) for _, _, corner in self.corners] if inputs.options else self.exact
        rounded = [_results(corner, dtype) for _, _, corner in self.corners]
        units, least = UNITS[dtype] * torch.finfo(dtype).eps, torch.finfo(dtype).tiny
        self.bars = []  # of each corner, of each result: (rows, 1)
        for results in zip(self.exact, plain, rounded, strict=True):
            self.bars.append([(2 * _by_block((own.double() - same).abs()) + units * _by_block(exact.abs())).clamp(least)
                              for exact, same, own in zip(*results, strict=True)])

    def error(self, results: list[torch.Tensor]) -> float:
        """The largest error of results, in the order of _results, as a multiple of the bar: at most 1 is right."""
        if self.case.dropout:
            return self._dropout_error(results[0])
        group = self.case.shape.HQ // self.case.shape.HK
        worst = 0.0
        for (b, h, _), exact, bars in zip(self.corners, self.exact, self.bars):
            heads, one = slice(h * group, (h + 1) * group), slice(h, h + 1)
            for i, (result, bar) in enumerate(zip(results, bars, strict=True)):
                part = result.detach()[b, one if i in (2, 3) else heads].double()
                if self.case.lengths:
                    part = part[:, :, :exact[i].shape[2]]
                wanted = exact[i]
                if self.case.op == "multi" and part.shape[2] == 1:  # the last new token alone
                    wanted, bar = wanted[:, :, -1:], bar[-1:]
                if part.shape != wanted.shape:
                    return math.inf
                error = float(((part - wanted).abs() / bar).max())
                worst = max(worst, error if math.isfinite(error) else math.inf)
        return worst

    def _dropout_error(self, out: torch.Tensor) -> float:
        """Which weights are dropped is each peer's own affair; that the right share is, shows in the moments.

        For weights w and keep probability 1 - p, out - exact has mean 0 and variance p / (1 - p) * sum w^2 v^2. The
        bar: the standardised difference has a mean of at most 0.05 and a variance within 0.1 of 1.
        """
        group = self.case.shape.HQ // self.case.shape.HK
        p = self.case.dropout
        worst = 0.0
        for b, h, corner in self.corners:
            query, key, value = (t.double() for t in (corner.query, corner.key, corner.value))
            identity = torch.eye(key.shape[2], dtype=torch.float64, device=key.device)[None, None]
            weights = eager(query, key, identity, corner.mask, corner.causal)
            spread = (weights.square() @ value.square() * (p / (1 - p))).sqrt()
            part = out.detach()[b, h * group:(h + 1) * group].double()
            z = (part - weights @ value) / spread
            worst = max(worst, float(z.mean().abs()) / 0.05, abs(float(z.var()) - 1) / 0.1)
        return worst if math.isfinite(worst) else math.inf
