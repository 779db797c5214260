"""use_as_sdpa: torch's scaled_dot_product_attention, for models that cannot be changed, goes through this package."""

import contextlib
import types

from torch.compiler import is_dynamo_compiling
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from . import graph
from .sdpa import scaled_dot_product_attention


class use_as_sdpa(TorchFunctionMode, contextlib.ContextDecorator):  # noqa: N801  (reads as a function)
    """Context manager, or decorator, in which torch's scaled_dot_product_attention is the one of this package.

        with flashattn_ext.use_as_sdpa():
            model(inputs)

    It holds for calls through any name, inside torch.nn.MultiheadAttention and the Transformer layers too, and inside
    torch.compile. It is local to the thread, may be nested, and ends with the block, also by an exception. What this
    package refuses, a dtype or a device, is an error inside the block and not a fallback to torch.

    Every torch function called in the block passes through Python once more, about a microsecond each. Models that let
    the attention be chosen (transformers: flashattn_ext.integrations.transformers) need not pay that.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is functional.scaled_dot_product_attention:
            func = scaled_dot_product_attention
        elif func is functional.multi_head_attention_forward:
            if is_dynamo_compiling():
                graph.mark()
            func = _multi_head_attention_forward
        return func(*args, **(kwargs or {}))


def _with_our_attention():
    function = functional.multi_head_attention_forward
    names = dict(function.__globals__, scaled_dot_product_attention=scaled_dot_product_attention)
    copy = types.FunctionType(function.__code__, names, "_multi_head_attention_forward", function.__defaults__,
                              function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    names[function.__name__] = copy  # what it hands to other modes is itself
    copy.__module__ = __name__  # torch.compile finds the function of a graph by this
    return copy


# While a mode handles a function, the calls inside that function do not come to the mode; so instead of this one, a
# copy is called that knows another attention.
_multi_head_attention_forward = graph.whole(_with_our_attention())
