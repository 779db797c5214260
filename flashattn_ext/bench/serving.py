"""This package's calls in the cases of serving: new tokens against a cache, and packed sequences.

Every function takes a case's Inputs and returns run, which is timed; `collect` brings what run() returned into the
shape of the benchmark. What a server has lying ready (a cache laid out by tokens, pages and their table, packed
tokens) is made before, untimed.
"""

import torch
import torch.nn.functional as F

from .cases import CACHE_OPS, Case, Inputs


def concerns(case: Case) -> bool:
    return case.op in CACHE_OPS or case.op in ("varlen", "decode_tiny")


def ours(case: Case, inputs: Inputs):
    """The call that the case is about."""
    if case.op == "varlen":
        return _packed(inputs)
    if case.stored:
        return _quantised(inputs)
    return _decode(inputs, inputs.query, case.page)


def has_other(case: Case) -> bool:
    return case.op in ("paged", "quant", "multi", "varlen")


def other(case: Case, inputs: Inputs):
    """What it is compared with in the column "x own"."""
    if case.op == "varlen":
        return _one_by_one(inputs)
    newest = inputs.query[:, :, -1:] if case.op == "multi" else inputs.query
    return _decode(inputs, newest, page=0)


def collect(case: Case, value) -> list[torch.Tensor]:
    """[out], out (B, HQ, SQ, DV), of what a run returned; of several new tokens it may have been the last alone."""
    if case.op != "varlen":
        return [value.transpose(1, 2)]
    if isinstance(value, torch.Tensor):
        value = [part.transpose(0, 1)[None] for part in value.split(case.lengths)]
    return [torch.cat([F.pad(part, (0, 0, 0, case.shape.SQ - part.shape[2])) for part in value])]


# ---- a cache --------------------------------------------------------------------------------------------------------


def by_tokens(x: torch.Tensor) -> torch.Tensor:
    """(B, H, S, ...) -> (B, S, H, ...), laid out in memory like that."""
    return x.transpose(1, 2).contiguous()


def _decode(inputs: Inputs, query: torch.Tensor, page: int):
    from flashattn_ext import decode_attention

    query, key, value = (by_tokens(x) for x in (query, inputs.key, inputs.value))
    batch, tokens = key.shape[:2]
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device=key.device)
    causal = inputs.mask is not None
    table = None
    if page:
        (key, table), (value, _) = (_pages(x, page) for x in (key, value))

    def run():
        return decode_attention(query, key, value, lengths, block_table=table, causal=causal)

    return run


def _pages(x: torch.Tensor, page: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, S, H, D) -> pages (B * n, page, H, D) in a random order that the shape decides, and their table (B, n)."""
    batch, tokens = x.shape[:2]
    count = -(-tokens // page)
    x = F.pad(x, (0, 0, 0, 0, 0, count * page - tokens)).view(batch * count, page, *x.shape[2:])
    place = torch.randperm(len(x), generator=torch.Generator().manual_seed(len(x)))
    place = place.to(x.device)
    pages = torch.empty_like(x)
    pages[place] = x
    return pages, place.view(batch, count).to(torch.int32)


def _quantised(inputs: Inputs):
    from flashattn_ext import decode_attention

    query, key, value = (by_tokens(x) for x in (inputs.query, *inputs.stored))
    k_scale, v_scale = (by_tokens(x) for x in inputs.scales)
    lengths = torch.full((len(key),), key.shape[1], dtype=torch.int32, device=key.device)

    def run():
        return decode_attention(query, key, value, lengths, causal=False, k_scale=k_scale, v_scale=v_scale)

    return run


# ---- packed sequences -----------------------------------------------------------------------------------------------


def pack(x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The first so many rows of each sequence of x (B, H, S, D), one behind the other: (T, H, D)."""
    return torch.cat([row[:, :n].transpose(0, 1) for row, n in zip(x, lengths)])


def starts(lengths: list[int], device) -> torch.Tensor:
    """Where each of packed sequences begins, and the end: (B + 1,) int32."""
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device)


def _packed(inputs: Inputs):
    from flashattn_ext import varlen_attn

    query, key, value = (pack(x, inputs.lengths) for x in (inputs.query, inputs.key, inputs.value))
    bounds = starts(inputs.lengths, query.device)
    longest = max(inputs.lengths)
    window = (-1, 0 if inputs.causal else -1)

    def run():
        return varlen_attn(query, key, value, bounds, bounds, longest, longest, window_size=window,
                           enable_gqa=inputs.gqa)

    return run


def _one_by_one(inputs: Inputs):
    from flashattn_ext import scaled_dot_product_attention

    sequences = [tuple(x[b:b + 1, :, :n] for x in (inputs.query, inputs.key, inputs.value))
                 for b, n in enumerate(inputs.lengths)]

    def run():
        return [scaled_dot_product_attention(*sequence, is_causal=inputs.causal, enable_gqa=inputs.gqa)
                for sequence in sequences]

    return run
