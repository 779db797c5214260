"""Attention of Hugging Face transformers (5 and later) under the name "fused_ext".

    import flashattn_ext.integrations.transformers as fused
    fused.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fused_ext")

The name does not contain "flash": transformers takes such a name for a kernel to download.
"""

import threading

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ..sdpa import scaled_dot_product_attention

__all__ = ["NAME", "attention_forward", "calls", "register"]

NAME = "fused_ext"

_lock = threading.Lock()
_calls = 0


def register():
    """Makes attn_implementation="fused_ext" work, with the boolean masks that transformers builds for SDPA.

    May be called again. Without the mask function a padded batch would silently be attended without its mask.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def calls():
    """How many times attention_forward has run in this process; runs of a compiled graph are not counted."""
    return _calls


def attention_forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None,
                      sliding_window=None, softcap=None, s_aux=None, position_bias=None, **kwargs):
    """One attention layer, as transformers calls it.

    query (B, HQ, SQ, D), key (B, HK, SK, D), value (B, HK, SK, DV); K and V are not repeated. attention_mask: bool
    (True = attend) or float, broadcastable to (B, HQ, SQ, SK), or None. Then it is causal if is_causal, or
    module.is_causal, says so and SQ > 1, in the top-left alignment that a static cache's prefill (SK > SQ) needs.
    sliding_window: tokens a query sees, itself included; used where there is no mask, which would say it already.
    s_aux: sinks (HQ,). position_bias: float, broadcastable to (B, HQ, SQ, SK), added to the scaled scores.

    Returns (out (B, SQ, HQ, DV), None). Raises RuntimeError for what it would otherwise have to ignore: packed
    sequences (cu_seq_lens_q, cu_seq_lens_k), a paged cache, and weights asked for by output_attentions.
    """
    _refuse(kwargs)
    _count()
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    window = None
    if is_causal and attention_mask is None and query.shape[2] > 1:
        window = (None if sliding_window is None else sliding_window - 1, 0)
    if position_bias is not None:
        attention_mask = _with_bias(attention_mask, position_bias, query.dtype)
    if s_aux is not None and s_aux.dtype != query.dtype:
        s_aux = s_aux.float()
    out = scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=True,
                                       window=window, softcap=softcap or 0.0, sinks=s_aux)
    return out.transpose(1, 2).contiguous(), None


def _refuse(kwargs):
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "block_table", "cache"):
        if kwargs.get(name) is not None:
            raise RuntimeError(f'attention "{NAME}" does not take {name} yet: packed sequences and paged caches need '
                               'attn_implementation="sdpa" or "eager"')
    if kwargs.get("output_attentions"):
        raise RuntimeError(f'attention "{NAME}" stores no weights: output_attentions=True needs '
                           'attn_implementation="eager"')


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
