"""From padded batches to packed sequences and back: the functions of flash_attn.bert_padding. All are differentiable.

B sequences of S rows are padded; T rows are those that a mask selects, in order, packed without gaps.
"""

import torch

__all__ = ["index_first_axis", "index_first_axis_residual", "index_put_first_axis", "pad_input", "unpad_input",
           "unpad_input_for_concatenated_sequences"]


def index_first_axis(input, indices):
    """input (N, ...), indices (T,) integers in 0..N-1 -> those rows, (T, ...)."""
    return input.index_select(0, indices)


def index_put_first_axis(values, indices, first_axis_dim):
    """values (T, ...) -> (first_axis_dim, ...) that holds them in the rows `indices` (T,), and 0 elsewhere."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices, values)


def index_first_axis_residual(input, indices):
    """As index_first_axis, and input itself beside it, cut off from the graph: (rows (T, ...), input (N, ...))."""
    return index_first_axis(input, indices), input.detach()


def unpad_input(hidden_states, attention_mask, unused_mask=None):
    """The rows that a mask selects, packed.

    hidden_states (B, S, ...); attention_mask (B, S), bool or 0/1: the rows in use; unused_mask (B, S), the same: rows
    that are kept though not in use.

    Returns (hidden_states (T, ...), indices (T,) int64 of the B * S rows, cu_seqlens (B + 1,) int32, the longest
    sequence's length as an int, seqused (B,) int32: how many rows of each sequence attention_mask selects).
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=torch.int32)
    used = attention_mask.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    rows = index_first_axis(hidden_states.flatten(0, 1), indices)
    return rows, indices, _cumulative(lengths), _longest(lengths), used


def unpad_input_for_concatenated_sequences(hidden_states, attention_mask_in_length):
    """As unpad_input, where a row of the batch holds several sequences one behind the other.

    attention_mask_in_length (B, S) integers: row b lists the lengths of its sequences, then zeros. The sequences start
    at its first position and leave no gaps.

    Returns (hidden_states (T, ...), indices (T,) int64, cu_seqlens (sequences + 1,) int32, the longest's length).
    """
    filled = attention_mask_in_length.sum(-1, keepdim=True)
    kept = torch.arange(attention_mask_in_length.shape[-1], device=filled.device) < filled
    indices = kept.flatten().nonzero().flatten()
    lengths = attention_mask_in_length.flatten()
    lengths = lengths[lengths != 0].to(torch.int32)
    return (index_first_axis(hidden_states.flatten(0, 1), indices), indices, _cumulative(lengths), _longest(lengths))


def pad_input(hidden_states, indices, batch, seqlen):
    """hidden_states (T, ...) back into the rows `indices` (T,) of (batch, seqlen, ...), 0 in the others."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def _cumulative(lengths):
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _longest(lengths):
    return int(lengths.max()) if lengths.numel() else 0
