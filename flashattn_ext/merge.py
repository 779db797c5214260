"""Merging partial results: attention over two disjoint sets of keys becomes attention over both."""

import torch

from . import graph, ops
from .autograd import is_differentiated

__all__ = ["merge_attention"]


def merge_attention(out_a, lse_a, out_b, lse_b):
    """The result over the keys of a and b together, from the results over each: (out, lse).

        out = (e^lse_a out_a + e^lse_b out_b) / (e^lse_a + e^lse_b),   lse = log(e^lse_a + e^lse_b)

    computed without overflow. A row whose log-sum-exp is -inf (it saw no key) takes no part, whatever its output
    holds; of two such rows the result is 0 and -inf. A sink must be given to one part only.

    Args:
        out_a, out_b: (..., DV) of one shape and dtype, float32, bfloat16, float16 or float64; any strides; DV 1 to 512.
        lse_a, lse_b: out_a.shape[:-1] of one dtype, float32 or float64, in nats.

    Returns:
        out, of out_a's shape and dtype, and lse, of lse_a's. Both are differentiable in all four inputs.

    Raises RuntimeError for shapes, dtypes or devices that do not fit, TypeError for what is no tensor.
    """
    for name, x in (("out_a", out_a), ("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    shape = out_a.shape
    if out_a.dim() < 1 or out_b.shape != shape or lse_a.shape != shape[:-1] or lse_b.shape != shape[:-1]:
        raise RuntimeError("out_a and out_b must have one shape, and lse_a and lse_b that shape without its last size; "
                           f"got {tuple(out_a.shape)}, {tuple(out_b.shape)}, {tuple(lse_a.shape)} and "
                           f"{tuple(lse_b.shape)}")
    if torch.compiler.is_dynamo_compiling():
        graph.mark()
    out, lse = _merged(_as_rows(out_a, 4), _as_rows(lse_a, 3), _as_rows(out_b, 4), _as_rows(lse_b, 3))
    return out.reshape(shape), lse.reshape(shape[:-1])


def _as_rows(x, dim):
    """x with `dim` dimensions: leading sizes of 1, or the leading dimensions merged."""
    if x.dim() > dim:
        return x.flatten(0, x.dim() - dim)
    return x[(None,) * (dim - x.dim())]


@graph.whole
def _merged(*args):
    if torch._C._are_functorch_transforms_active() or is_differentiated(args):
        return Merge.apply(*args)
    return ops.merge(*args)


class Merge(torch.autograd.Function):
    """The op `merge`. Its gradient is made of torch's own operations, and so can be differentiated again."""

    generate_vmap_rule = False

    @staticmethod
    def forward(*args):
        return ops.merge(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        out_a, lse_a, out_b, lse_b = ctx.saved_tensors
        wide = torch.promote_types(torch.float32, out_a.dtype)
        has_a, has_b = lse_a > -torch.inf, lse_b > -torch.inf
        ahead = torch.where(has_a & has_b, lse_a - lse_b, 0.0).to(wide)
        weight_a = torch.where(has_b, torch.where(has_a, torch.sigmoid(ahead), 0.0), has_a.to(wide))
        weight_b = torch.where(has_a, torch.where(has_b, torch.sigmoid(-ahead), 0.0), has_b.to(wide))
        grad, towards = grad_out.to(wide), grad_lse.to(wide)
        part_a = torch.where(has_a[..., None], out_a.to(wide), 0.0)
        part_b = torch.where(has_b[..., None], out_b.to(wide), 0.0)
        moved = weight_a * weight_b * (grad * (part_a - part_b)).sum(-1)
        return ((weight_a[..., None] * grad).to(out_a.dtype), (moved + weight_a * towards).to(lse_a.dtype),
                (weight_b[..., None] * grad).to(out_b.dtype), (weight_b * towards - moved).to(lse_b.dtype))

    @staticmethod
    def vmap(info, in_dims, *args):
        spread = [x.unsqueeze(0).expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
                  for x, dim in zip(args, in_dims)]
        return merge_attention(*spread), (0, 0)

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError("merge_attention has no forward-mode derivative (jvp); "
                           "flashattn_ext.reference.merge_attention has one")
