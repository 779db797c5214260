"""The public functions of the package flash-attn (2.8): same names, argument order, defaults and meaning, also on the CPU.

    from flashattn_ext.compat.flash_attn import flash_attn_func
    from flashattn_ext.compat.flash_attn.bert_padding import pad_input, unpad_input

Tensors are (B, S, H, D), packed ones (T, H, D). float32 and float64 are taken too, and every head dimension up to 512.
Two things differ, both on purpose: the log-sum-exp of a row that sees no key is -inf (there: +inf), and it is
differentiable. An argument that cannot be honoured raises; none is ignored.
"""

from . import bert_padding
from .flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__all__ = [
    "bert_padding",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
