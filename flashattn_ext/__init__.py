"""Fused attention for PyTorch: exact, on any strides, for training and inference."""

from . import reference
from .sdpa import scaled_dot_product_attention, set_deterministic
from .override import use_as_sdpa
from ._C import build_info, kernels
from .explain import explain

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "build_info",
    "explain",
    "kernels",
    "reference",
    "scaled_dot_product_attention",
    "set_deterministic",
    "use_as_sdpa",
]
