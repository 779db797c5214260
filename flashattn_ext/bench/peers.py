"""Who is measured on a CPU: one adapter for each attention implementation, all with the same three methods. Those of a
GPU are in peers_cuda.py.

`missing()` says why a peer cannot be used here, `refuses(case)` why it cannot do a case, and `open(case, threads)`
prepares it: it returns bind, bind(inputs) returns run, and run() is what is timed. Whatever run() returns,
`collect(value, case)` turns into [out] or [out, dq, dk, dv] as (B, H, S, D) tensors.
"""

import functools
import importlib.metadata

import torch
import torch.nn.functional as F

from . import check
from .cases import Case, Inputs


OWN = "own"  # the peer that is this package again, used in another way


class Peer:
    """What all adapters share. name is what --peers takes, label what tables show."""

    name = ""
    label = ""
    column = ""  # head of the column with the ratio to this peer, if the table has one
    default = True  # timed unless --peers says otherwise
    asked = False   # --peers names it

    def missing(self) -> str | None:
        return None

    def concerns(self, case: Case) -> bool:
        """Whether there is anything to say about this peer in a case, be it that it refuses."""
        return True

    def refuses(self, case: Case) -> str | None:
        return None

    def version(self) -> str:
        return torch.__version__

    def open(self, case: Case, threads: int):
        raise NotImplementedError

    def collect(self, value, case: Case) -> list[torch.Tensor]:
        return list(value)


class TorchPeer(Peer):
    """A peer that is a function on tensors; differentiated by autograd where the case has a backward."""

    def call(self, inputs: Inputs):
        """A function without arguments that returns the output."""
        raise NotImplementedError

    def open(self, case: Case, threads: int):
        return lambda inputs: timed_part(case, inputs, self.call(inputs))

    def collect(self, value, case: Case) -> list[torch.Tensor]:
        return [value] if isinstance(value, torch.Tensor) else list(value)


def timed_part(case: Case, inputs: Inputs, attention):
    """What is timed of a case for a function without arguments that returns the output."""
    def forward():
        with torch.no_grad():
            return (attention(),)

    def both():
        out = attention()
        return (out, *torch.autograd.grad(out, inputs.leaves, inputs.gradient))

    if case.host:
        return attention
    if not case.backward_alone:
        return both if case.backward else forward
    out, leaves = attention(), inputs.leaves
    return lambda: (out, *torch.autograd.grad(out, leaves, inputs.gradient, retain_graph=True))


class Ours(TorchPeer):
    name = "ours"
    label = "flashattn_ext"

    def missing(self) -> str | None:
        try:
            import flashattn_ext
        except (ImportError, OSError) as error:
            return f"flashattn_ext is not built: {error}"
        self.function = flashattn_ext.scaled_dot_product_attention
        return None

    def version(self) -> str:
        import flashattn_ext

        return flashattn_ext.__version__

    def open(self, case: Case, threads: int):
        from . import serving

        if serving.concerns(case):
            return lambda inputs: serving.ours(case, inputs)
        return super().open(case, threads)

    def collect(self, value, case: Case) -> list[torch.Tensor]:
        from . import serving

        return serving.collect(case, value) if serving.concerns(case) else super().collect(value, case)

    def call(self, inputs: Inputs):
        return functools.partial(self.function, inputs.query, inputs.key, inputs.value, inputs.mask, inputs.dropout,
                                 inputs.causal, enable_gqa=inputs.gqa, **inputs.options)


class Own(Ours):
    """This package used in another way, for the ratio that says what the case's way is worth; see serving.other."""

    name = OWN
    label = "flashattn_ext, other way"
    column = "x own"

    def concerns(self, case: Case) -> bool:
        from . import serving

        return serving.has_other(case)

    def open(self, case: Case, threads: int):
        from . import serving

        return lambda inputs: serving.other(case, inputs)


class TorchSDPA(TorchPeer):
    name = "sdpa"
    label = "torch SDPA"
    column = "x SDPA"

    def call(self, inputs: Inputs):
        return functools.partial(F.scaled_dot_product_attention, inputs.query, inputs.key, inputs.value, inputs.mask,
                                 inputs.dropout, inputs.causal, enable_gqa=inputs.gqa)


class Eager(TorchPeer):
    name = "eager"
    label = "eager"

    def call(self, inputs: Inputs):
        return functools.partial(check.eager, inputs.query, inputs.key, inputs.value, inputs.mask, inputs.causal,
                                 inputs.dropout)


def all_peers() -> list[Peer]:
    """Every adapter; the first that runs is the one the others are compared with."""
    from .peer_flex import Flex
    from .peer_onnxruntime import OnnxRuntime
    from .peer_openvino import OpenVinoPaged, OpenVinoSDPA

    return [Ours(), TorchSDPA(), Own(), Eager(), OpenVinoPaged(), OpenVinoSDPA(), OnnxRuntime(), Flex()]


def package_version(package: str) -> str:
    return importlib.metadata.version(package)
