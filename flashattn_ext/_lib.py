"""Loads the compiled parts: the op library into torch, then the module flashattn_ext._C, which shares its C core."""

import os

import torch

_PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "libflashattn_ext.so")
_TORCH = (2, 10)  # the stable ABI that the op library is built for


def _load():
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _TORCH:
        raise ImportError(f"flashattn_ext needs torch 2.10 or later, found {torch.__version__}")
    if not os.path.exists(_PATH):
        raise ImportError("flashattn_ext is not built: run `pip install --no-build-isolation -e .` in its source tree")
    try:
        torch.ops.load_library(_PATH)
    except OSError as error:
        raise ImportError(f"flashattn_ext does not load under torch {torch.__version__}: {error}") from None
    try:
        from . import _C
    except ImportError as error:
        raise ImportError(f"flashattn_ext was built for another Python, build it again: {error}") from None
    _C.refresh_cpu()


_load()
