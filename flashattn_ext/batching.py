"""vmap: the mapped dimension joins the batch, so that n mapped calls are one call of n times the batch.

The rules serve the ops themselves and, in autograd.py, the autograd Functions over them; `call` is which of the two is
folded. Arguments are in the order of the schemas (docs/ops.md).
"""

import torch
from torch import library

# Places of the arguments that both ops share, counted from query, key, value.
_MASK, _SINKS, _ALIBI, _Q_SEQLENS, _KV_SEQLENS, _SEED, _DROPOUT_P = 3, 4, 5, 6, 7, 8, 14
_NEED_MASK, _NEED_SINKS = 8, 16


def fold_forward(call, info, in_dims, *args):
    """The batching rule of `forward`: in_dims has None or the mapped dimension of each argument."""
    if _same_dropout(args, in_dims):
        return _one_by_one(call, info, in_dims, args)
    n, batch = info.batch_size, _logical_size(args[0], in_dims[0])
    out, lse = call(*_fold_inputs(n, batch, args, in_dims))
    return (out.unflatten(0, (n, batch)), lse.unflatten(0, (n, batch))), (0, 0)


def fold_backward(call, info, in_dims, *args):
    """The batching rule of `backward`, whose arguments are grad_out, grad_lse, query, key, value, out, lse, attn_mask,
    ..., needs."""
    grads, qkv, saved, rest, needs = args[:2], args[2:5], args[5:7], args[7:-1], args[-1]
    inputs, input_dims = qkv + rest, in_dims[2:5] + in_dims[7:-1]
    if _same_dropout(inputs, input_dims):
        return _one_by_one(call, info, in_dims, args)
    n, batch = info.batch_size, _logical_size(qkv[0], in_dims[2])
    folded = _fold_inputs(n, batch, inputs, input_dims, needs)
    grads = [_fold(n, batch, x, dim) for x, dim in zip(grads, in_dims[:2])]
    saved = [_fold(n, batch, x, dim) for x, dim in zip(saved, in_dims[5:7])]
    results = list(call(*grads, *folded[:3], *saved, *folded[3:], needs))
    for place in range(5):
        if needs >> place & 1:
            results[place] = results[place].unflatten(0, (n, batch))
    # What one call broadcast over its batch, it also sums over: the mask of size 1, the sinks without a batch.
    if needs & _NEED_MASK and batch != 1 and _logical_size(inputs[_MASK], input_dims[_MASK]) == 1:
        results[_MASK] = results[_MASK].sum(1, keepdim=True)
    if needs & _NEED_SINKS and _logical_dim(inputs[_SINKS], input_dims[_SINKS]) == 1:
        results[_SINKS] = results[_SINKS].sum(1)
    return tuple(results), tuple(0 if needs >> place & 1 else None for place in range(5))


def _fold_inputs(n, batch, args, in_dims, needs=0):
    args = list(args)
    for place in (0, 1, 2, _Q_SEQLENS, _KV_SEQLENS):
        args[place] = _fold(n, batch, args[place], in_dims[place])
    # An unmapped mask of batch size 1 and unmapped sinks without a batch broadcast as they are; but where gradients are
    # wanted, each mapped call has its own, so then they are spread out.
    mask, dim = args[_MASK], in_dims[_MASK]
    if mask is not None and (dim is not None or mask.shape[0] != 1 or needs & _NEED_MASK):
        args[_MASK] = _fold(n, batch, mask, dim)
    for place, need in ((_SINKS, _NEED_SINKS), (_ALIBI, 0)):
        x, dim = args[place], in_dims[place]
        if x is None or (dim is None and x.dim() == 1 and not needs & need):
            continue
        if _logical_dim(x, dim) == 1:
            x, dim = (x.unsqueeze(0), None) if dim is None else (x.movedim(dim, 0).unsqueeze(1), 0)
        args[place] = _fold(n, batch, x, dim)
    if in_dims[_SEED] is not None:
        # randomness="different": the folded batch draws different numbers for each of its members from one seed.
        args[_SEED] = args[_SEED].select(in_dims[_SEED], 0)
    return args


def _fold(n, batch, x, dim):
    """(n, batch or 1, ...) or, unmapped, (batch or 1, ...) -> (n * batch, ...); a view where the strides allow it."""
    if x is None:
        return None
    x = x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
    return x.expand(n, batch, *x.shape[2:]).flatten(0, 1)


def _same_dropout(args, in_dims):
    """Do all mapped calls drop the same weights? In one call, members of a batch never do."""
    return args[_DROPOUT_P] > 0 and args[_SEED] is not None and in_dims[_SEED] is None


def _one_by_one(call, info, in_dims, args):
    results = [call(*(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims)))
               for i in range(info.batch_size)]
    stacked = tuple(torch.stack(parts) for parts in zip(*results))
    return stacked, (0,) * len(stacked)


def _logical_size(x, dim):
    return x.shape[0] if dim is None or dim > 0 else x.shape[1]


def _logical_dim(x, dim):
    return x.dim() - (dim is not None)


def register(forward, backward):
    """Teaches vmap the two ops (OpOverloads)."""
    library.register_vmap(forward, lambda info, in_dims, *args: fold_forward(forward, info, in_dims, *args))
    library.register_vmap(backward, lambda info, in_dims, *args: fold_backward(backward, info, in_dims, *args))
