"""Gradients: thin autograd Functions over the ops `forward` and `backward`, and their packed counterparts.

A call that no transform differentiates goes to the op itself; `attention` and `packed` decide. backward is an op called
through a Function of its own, so that differentiating twice is an error and never a silent zero.
"""

import torch
from torch.autograd import forward_ad

from . import batching, graph, ops

_forward, _backward = ops.forward, ops.backward
_varlen_forward, _varlen_backward = ops.varlen_forward, ops.varlen_backward
_transforms_active = torch._C._are_functorch_transforms_active

_WAY_OUT = ("flashattn_ext.reference.attention differentiates any number of times and in both modes, and so does "
            "torch's scaled_dot_product_attention under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)")


@graph.whole
def attention(*args):
    """The op `forward` with gradients: (out, lse) of its 16 arguments, in the order of the schema.

    out (B, HQ, SQ, DV) and lse (B, HQ, SQ) are both differentiable with respect to query, key, value, attn_mask and
    sinks.
    """
    if _transforms_active():
        return Attention.apply(*args)
    if is_differentiated(args[:6]):
        return _apply(Attention, args)
    return _forward(*args)


@graph.whole
def packed(*args):
    """The op `varlen_forward` with gradients: (out, lse) of its 19 arguments, in the order of the schema.

    out (T, HQ, DV) and lse (HQ, T) are both differentiable with respect to query, key, value and sinks.
    """
    if not _transforms_active() and not is_differentiated((*args[:3], *args[7:9])):
        return _varlen_forward(*args)
    if args[5] is not None or args[6] is not None:
        given = "block_table" if args[5] is None or args[6] is not None else "seqused_k"
        raise RuntimeError(f"{given} is inference-only, but an input requires grad: call under torch.no_grad()")
    return PackedAttention.apply(*args) if _transforms_active() else _apply(PackedAttention, args)


def is_differentiated(tensors):
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def _apply(function, args):
    """function.apply(*args) outside of torch.func: there, apply binds the arguments to the signature of forward, which
    takes three times as long as a tiny call."""
    return super(torch.autograd.Function, function).apply(*args)


class Attention(torch.autograd.Function):
    """The op `forward`; its gradient is the op `backward`."""

    @staticmethod
    def forward(*args):
        return _forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3], *output, *inputs[3:9])
        ctx.options = inputs[9:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        if grad_out is None and grad_lse is None:
            return (None,) * 16
        if ctx.needs_input_grad[5]:
            raise RuntimeError("alibi_slopes has no gradient, but requires_grad is True; pass alibi_slopes.detach()")
        needs = sum(1 << place for place in range(5) if ctx.needs_input_grad[place])
        query, key, value, out, lse, *others = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape)
        args = (grad_out, grad_lse, query, key, value, out, lse, *others, *ctx.options, needs)
        if _transforms_active():
            grads = Backward.apply(*args)
        elif is_differentiated(args[:13]):
            grads = _apply(Backward, args)
        else:
            grads = _backward(*args)
        return *(grad if ctx.needs_input_grad[place] else None for place, grad in enumerate(grads)), *(None,) * 11

    @staticmethod
    def vmap(info, in_dims, *args):
        return batching.fold_forward(Attention.apply, info, in_dims, *args)

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(f"the fused attention has no forward-mode derivative (jvp); {_WAY_OUT}")


class Once(torch.autograd.Function):
    """A step of autograd that has no derivative of its own."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(f"the fused attention can be differentiated once, not twice; {_WAY_OUT}")

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(f"the fused attention can be differentiated once, not twice; {_WAY_OUT}")


class Backward(Once):
    """The op `backward`."""

    @staticmethod
    def forward(*args):
        return _backward(*args)

    @staticmethod
    def vmap(info, in_dims, *args):
        return batching.fold_backward(Backward.apply, info, in_dims, *args)


class PackedAttention(torch.autograd.Function):
    """The op `varlen_forward` without seqused_k and block_table; its gradient is the op `varlen_backward`."""

    @staticmethod
    def forward(*args):
        return _varlen_forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3], *output, *inputs[3:5], *inputs[7:10])
        ctx.options = inputs[10:18]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        if grad_out is None and grad_lse is None:
            return (None,) * 19
        if ctx.needs_input_grad[8]:
            raise RuntimeError("alibi_slopes has no gradient, but requires_grad is True; pass alibi_slopes.detach()")
        places = (0, 1, 2, 7)
        needs = sum(1 << bit for bit, place in enumerate(places) if ctx.needs_input_grad[place])
        query, key, value, out, lse, *others = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape)
        args = (grad_out, grad_lse, query, key, value, out, lse, *others, *ctx.options, needs)
        if _transforms_active():
            found = PackedBackward.apply(*args)
        elif is_differentiated(args[:10]):
            found = _apply(PackedBackward, args)
        else:
            found = _varlen_backward(*args)
        grads = [None] * 19
        for place, grad in zip(places, found):
            if ctx.needs_input_grad[place]:
                grads[place] = grad
        return tuple(grads)

    @staticmethod
    def vmap(info, in_dims, *args):
        raise RuntimeError("varlen_attn has no rule for vmap: pack the mapped sequences behind one another instead")

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(f"the fused attention has no forward-mode derivative (jvp); {_WAY_OUT}")


class PackedBackward(Once):
    """The op `varlen_backward`."""

    @staticmethod
    def forward(*args):
        return _varlen_backward(*args)

    @staticmethod
    def vmap(info, in_dims, *args):
        raise RuntimeError("varlen_attn has no rule for vmap: pack the mapped sequences behind one another instead")
