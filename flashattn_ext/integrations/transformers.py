"""Attention of Hugging Face transformers (5 and later) under the name "fused_ext".

    import flashattn_ext.integrations.transformers as fused
    fused.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fused_ext")

    fused.enable_continuous_batching(model)       # and then model.generate_batch(prompts, ...) too

The first name does not contain "flash": transformers takes such a name for a kernel to download. Continuous batching
lets through hardly any other, so the second, which the model gets from enable_continuous_batching, does.
"""

import threading
import weakref

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ..sdpa import scaled_dot_product_attention
from ..varlen import packed_attention

__all__ = ["BATCHING_NAME", "NAME", "attention_forward", "calls", "enable_continuous_batching", "register"]

NAME = "fused_ext"
# No digits: transformers looks for a version in a name with "flash".
BATCHING_NAME = "fused_ext_flash_continuous"

_lock = threading.Lock()
_calls = 0
_hooked = weakref.WeakSet()
_state = threading.local()


def register():
    """Makes attn_implementation="fused_ext" work, with the boolean masks that transformers builds for SDPA.

    May be called again. Without the mask function a padded batch would silently be attended without its mask.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def enable_continuous_batching(model):
    """Makes model.generate_batch, and the other ways into transformers' continuous batching, use packed sequences and
    the paged cache in place: no mask over all tokens of the batch, and no copy of the keys and values it reads.

    Everything else that the model does goes on as under "fused_ext"; model.set_attn_implementation takes it back. May
    be called again. The cache takes its size from the machine's memory unless ContinuousBatchingConfig(num_blocks=,
    max_batch_tokens=) says otherwise. Models with sliding layers have their keys copied out: their cache is a ring.
    """
    register()
    AttentionInterface.register(BATCHING_NAME, attention_forward)
    AttentionMaskInterface.register(BATCHING_NAME, _mask)
    # Not by set_attn_implementation, which would look for a kernel of that name.
    model.config._attn_implementation = BATCHING_NAME
    if model not in _hooked:
        _hooked.add(model)
        model.register_forward_pre_hook(_before_forward, with_kwargs=True)
        model.register_forward_hook(_after_forward, always_call=True)


def calls():
    """How many times attention_forward has run in this process; runs of a compiled graph are not counted."""
    return _calls


def attention_forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None,
                      sliding_window=None, softcap=None, s_aux=None, position_bias=None, cu_seq_lens_q=None, **kwargs):
    """One attention layer, as transformers calls it.

    query (B, HQ, SQ, D), key (B, HK, SK, D), value (B, HK, SK, DV); K and V are not repeated. attention_mask: bool
    (True = attend) or float, broadcastable to (B, HQ, SQ, SK), or None. Then it is causal if is_causal, or
    module.is_causal, says so and SQ > 1, in the top-left alignment that a static cache's prefill (SK > SQ) needs.
    sliding_window: tokens a query sees, itself included; used where there is no mask, which would say it already.
    s_aux: sinks (HQ,). position_bias: float, broadcastable to (B, HQ, SQ, SK), added to the scaled scores.

    cu_seq_lens_q (sequences + 1,): the B * SQ tokens are packed sequences, causal ones aligned at their ends. With it
    may come cu_seq_lens_k, max_length_q, max_length_k and, from continuous batching, a cache of pages.

    Returns (out (B, SQ, HQ, DV), None). Raises RuntimeError for what it would otherwise have to ignore: weights asked
    for by output_attentions, and position_bias for packed sequences.
    """
    _refuse(position_bias, cu_seq_lens_q, kwargs)
    _count()
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if s_aux is not None and s_aux.dtype != query.dtype:
        s_aux = s_aux.float()
    if cu_seq_lens_q is not None:
        if kwargs.get("cache") is not None:  # up to transformers 5.23; from then on the model does it
            key, value = kwargs["cache"].update(key_states=key, value_states=value, layer_idx=module.layer_idx,
                                                kwargs=kwargs)
        packed = _Packed(cu_seq_lens_q, kwargs, is_causal, sliding_window)
        if attention_mask is None or packed.explains(attention_mask):
            return packed.attend(query, key, value, dropout, scaling, softcap or 0.0, s_aux), None
        attention_mask = packed.within_sequences(attention_mask)
    window = None
    if is_causal and attention_mask is None and query.shape[2] > 1:
        window = (None if sliding_window is None else sliding_window - 1, 0)
    if position_bias is not None:
        attention_mask = _with_bias(attention_mask, position_bias, query.dtype)
    out = scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=True,
                                       window=window, softcap=softcap or 0.0, sinks=s_aux)
    return out.transpose(1, 2).contiguous(), None


def _refuse(position_bias, cu_seq_lens_q, kwargs):
    if kwargs.get("output_attentions"):
        raise RuntimeError(f'attention "{NAME}" stores no weights: output_attentions=True needs '
                           'attn_implementation="eager"')
    if cu_seq_lens_q is not None and position_bias is not None:
        raise RuntimeError(f'attention "{NAME}" takes no position_bias for packed sequences (cu_seq_lens_q): it must '
                           f"be None, got {tuple(position_bias.shape)}")


def _count():
    global _calls
    if torch.compiler.is_compiling():  # a compiled graph would be guarded by the count, and compiled anew for each
        return
    with _lock:
        _calls += 1


def _with_bias(mask, bias, dtype):
    """One float mask of the two; the kernels take a single one."""
    if bias.dtype not in (dtype, torch.float32):
        bias = bias.to(dtype)
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, -torch.inf)
    return bias + mask


# ---- packed sequences -----------------------------------------------------------------------------------------------


class _Packed:
    """The sequences that one call packs: where they lie, and what of them a query sees."""

    def __init__(self, cu_q, kwargs, is_causal, sliding_window):
        cu_k = kwargs.get("cu_seq_lens_k")
        self.cu_q, self.cu_k = cu_q, cu_q if cu_k is None else cu_k
        self.max_q, self.max_k = (
            int(cu.diff().max() if longest is None else longest)
            for cu, longest in ((self.cu_q, kwargs.get("max_length_q")), (self.cu_k, kwargs.get("max_length_k"))))
        side = -1 if sliding_window is None else sliding_window - 1
        self.window = (side, 0 if is_causal else side)
        self.pages = None
        if kwargs.get("block_table") is not None:
            self.pages = kwargs["k_cache"], kwargs["v_cache"], kwargs["block_table"], kwargs["write_index"][0]

    def attend(self, query, key, value, dropout, scale, softcap, sinks):
        """query (B, HQ, SQ, D) and key, value (B, HK, SK, D) of the packed tokens, or of the new ones of a paged cache
        -> (B, SQ, HQ, DV)."""
        batch = query.shape[0]
        query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        cu_k, used, table = self.cu_k, None, None
        if self.pages is not None:
            new = key, value
            key, value, table, rows = self.pages
            for cache, x in zip((key, value), new):
                cache.flatten(0, 1).index_copy_(0, rows, x)
            cu_k, used = None, self.cu_k.diff()
        out, _ = packed_attention(query, key, value, self.cu_q, cu_k, self.max_q, self.max_k, scale=scale,
                                  window_size=self.window, enable_gqa=True, seqused_k=used, block_table=table,
                                  softcap=softcap, sinks=sinks, dropout_p=dropout)
        return out.unflatten(0, (batch, -1))

    def explains(self, mask):
        """Does a mask (1, 1, T, T), within each sequence, hide just what a query would not see anyway? transformers
        makes such masks of position_ids."""
        if torch.compiler.is_compiling() or mask.dtype != torch.bool or not torch.equal(self.cu_q, self.cu_k):
            return False
        ends = self.cu_q.tolist()
        if mask.shape != (1, 1, ends[-1], ends[-1]):
            return False
        left, right = self.window
        for start, end in zip(ends, ends[1:]):
            own = torch.ones(end - start, end - start, dtype=torch.bool, device=mask.device)
            own = own if right < 0 else own.tril(right)
            own = own if left < 0 else own.triu(-left)
            if not torch.equal(mask[0, 0, start:end, start:end], own):
                return False
        return True

    def within_sequences(self, mask):
        """The mask, less what leads from one sequence into another."""
        rows, columns = (torch.bucketize(torch.arange(size, device=mask.device), cu, right=True)
                         for size, cu in ((mask.shape[-2], self.cu_q), (mask.shape[-1], self.cu_k)))
        same = rows[:, None] == columns
        return mask & same if mask.dtype == torch.bool else mask.masked_fill(~same, -torch.inf)


# ---- continuous batching --------------------------------------------------------------------------------------------


def _mask(*args, **kwargs):
    """The mask of a layer: none in continuous batching, where cu_seq_lens say who sees whom."""
    return None if getattr(_state, "batching", False) else sdpa_mask(*args, **kwargs)


def _before_forward(model, args, kwargs):
    """Turns the list of cached tokens that a batch reads into the table of their pages."""
    cu_k = kwargs.get("cu_seq_lens_k")
    _state.batching = isinstance(cu_k, dict) and kwargs.get("cache") is not None
    if not _state.batching or model.config._attn_implementation != BATCHING_NAME:
        return None
    read = kwargs["read_index"]
    allocators = list(kwargs["cache"].cache_allocators.values())
    if kwargs.get("block_table") is None and len(allocators) == 1 and allocators[0].supports_block_table and len(
            read[0]):
        own = allocators[0]
        table = _pages_of(read[0], cu_k[own.layer_type], kwargs["max_length_k"][own.layer_type], own.tokens_per_page)
        return args, {**kwargs, "block_table": table[None]}
    return None


def _after_forward(model, args, output):
    _state.batching = False


def _pages_of(tokens, cu_k, longest, page_size):
    """(sequences, pages) int32: the page of every page_size-th token of each sequence. tokens (T,): where each token
    lies in the cache. Past a sequence's end the table holds whatever comes next; nobody reads it."""
    starts = torch.arange(0, longest, page_size, device=tokens.device) + cu_k[:-1, None]
    return (tokens[starts.clamp(max=len(tokens) - 1)] // page_size).to(torch.int32)
