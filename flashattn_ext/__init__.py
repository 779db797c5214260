"""Fused attention for PyTorch: exact, on any strides, for training and inference."""

from . import reference
from .sdpa import scaled_dot_product_attention, set_deterministic
from .override import use_as_sdpa
from .varlen import varlen_attn
from .decode import decode_attention
from .cache import CacheFull, PagedKVCache
from .merge import merge_attention
from ._C import build_info, kernels
from .explain import explain

__version__ = "0.1.0"

__all__ = [
    "CacheFull",
    "PagedKVCache",
    "__version__",
    "build_info",
    "decode_attention",
    "explain",
    "kernels",
    "merge_attention",
    "reference",
    "scaled_dot_product_attention",
    "set_deterministic",
    "use_as_sdpa",
    "varlen_attn",
]
