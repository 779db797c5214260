"""Which functions torch.compile puts into its graph as they are, instead of tracing into them.

Its tracer refuses an autograd Function with a jvp, and under torch.func.grad it would see the bare op, which has no
gradient. A function in the graph is traced by autograd itself, as it runs outside of torch.compile.
"""

import torch

_functions = []


def whole(function):
    """Decorator: `function` takes and returns tensors and numbers only, and goes into the graph as it is."""
    _functions.append(function)
    return function


def mark():
    """To be called by the traced code before it calls one of them.

    Not done when they are defined: torch.compiler.allow_in_graph loads the whole compiler, for more than a second.
    """
    for function in _functions:
        torch.compiler.allow_in_graph(function)


# Has the tracer run `mark` when it meets a call of it; torch.compiler.assume_constant_result sets the same attribute,
# and loads the compiler too.
mark._dynamo_marked_constant = True
