"""The custom ops, complete: kernels from the compiled library, shapes for the compiler, rules for vmap.

docs/ops.md has their schemas. Gradients are in autograd.py: called here directly, an op has none.
"""

import torch

from . import _lib  # noqa: F401  (loads the library)
from . import batching, fake  # noqa: F401  (registers the fake kernels)

forward = torch.ops.flashattn_ext.forward.default
forward_plain = torch.ops.flashattn_ext.forward_plain.default
backward = torch.ops.flashattn_ext.backward.default
varlen_forward = torch.ops.flashattn_ext.varlen_forward.default
varlen_backward = torch.ops.flashattn_ext.varlen_backward.default
decode = torch.ops.flashattn_ext.decode.default
decode_plain = torch.ops.flashattn_ext.decode_plain.default
decode_append_ = torch.ops.flashattn_ext.decode_append_.default
cache_append_ = torch.ops.flashattn_ext.cache_append_.default
merge = torch.ops.flashattn_ext.merge.default

batching.register(forward, backward)
