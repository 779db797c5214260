"""Who is measured: one adapter for each attention implementation, all with the same three methods.

`missing()` says why a peer cannot be used here, `refuses(case)` why it cannot do a case, and `open(case, threads)`
prepares it: it returns bind, bind(inputs) returns run, and run() is what is timed. Whatever run() returns,
`collect(value, case)` turns into [out] or [out, dq, dk, dv] as (B, H, S, D) tensors.
"""

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
    default = True  # timed unless --peers says otherwise

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

    def attention(self, inputs: Inputs) -> torch.Tensor:
        raise NotImplementedError

    def open(self, case: Case, threads: int):
        def bind(inputs: Inputs):
            def forward():
                with torch.no_grad():
                    return (self.attention(inputs),)

            def both():
                out = self.attention(inputs)
                leaves = (inputs.query, inputs.key, inputs.value)
                return (out, *torch.autograd.grad(out, leaves, inputs.gradient))

            return both if case.backward else forward

        return bind


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

    def attention(self, inputs: Inputs) -> torch.Tensor:
        return self.function(inputs.query, inputs.key, inputs.value, inputs.mask, inputs.dropout, inputs.causal,
                             enable_gqa=inputs.gqa)


class Own(Ours):
    """This package used in another way, for the ratio that says what the case's way is worth; see serving.other."""

    name = OWN
    label = "flashattn_ext, other way"

    def concerns(self, case: Case) -> bool:
        from . import serving

        return serving.has_other(case)

    def open(self, case: Case, threads: int):
        from . import serving

        return lambda inputs: serving.other(case, inputs)


class TorchSDPA(TorchPeer):
    name = "sdpa"
    label = "torch SDPA"

    def attention(self, inputs: Inputs) -> torch.Tensor:
        return F.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, inputs.mask, inputs.dropout,
                                              inputs.causal, enable_gqa=inputs.gqa)


class Eager(TorchPeer):
    name = "eager"
    label = "eager"

    def attention(self, inputs: Inputs) -> torch.Tensor:
        return check.eager(inputs.query, inputs.key, inputs.value, inputs.mask, inputs.causal, inputs.dropout)


class Flex(Peer):
    """torch's FlexAttention, compiled anew for each case: several seconds each, so only on request."""

    name = "flex"
    label = "FlexAttention"
    default = False

    def missing(self) -> str | None:
        try:
            from torch.nn.attention import flex_attention  # noqa: F401
        except ImportError as error:
            return str(error)
        return None

    def refuses(self, case: Case) -> str | None:
        if case.backward:
            return "no backward on the CPU"
        if case.dropout:
            return "no dropout"
        if case.lengths:
            return "no packed sequences"
        return None

    def open(self, case: Case, threads: int):
        from torch.nn.attention.flex_attention import flex_attention

        torch.compiler.reset()  # else the limit on recompilations turns later cases into the uncompiled fallback
        compiled = torch.compile(flex_attention, dynamic=False)

        def bind(inputs: Inputs):
            arguments = {**_flex_masking(inputs), "enable_gqa": inputs.gqa}

            def run():
                with torch.no_grad():
                    return (compiled(inputs.query, inputs.key, inputs.value, **arguments),)

            return run

        return bind


def _flex_masking(inputs: Inputs) -> dict:
    """FlexAttention's arguments for the case's mask; building a block mask is not timed, a model builds it once."""
    from torch.nn.attention.flex_attention import create_block_mask

    mask = inputs.mask
    if mask is None and not inputs.causal:
        return {}
    if mask is not None and mask.dtype != torch.bool:
        return {"score_mod": lambda score, b, h, q, k: score + mask[q, k]}
    if mask is None:
        def visible(b, h, q, k):
            return q >= k
    elif mask.dim() == 4:
        def visible(b, h, q, k):
            return mask[b, 0, 0, k]
    else:
        def visible(b, h, q, k):
            return mask[q, k]
    batches = mask.shape[0] if mask is not None and mask.dim() == 4 else None
    block = create_block_mask(visible, batches, None, inputs.query.shape[2], inputs.key.shape[2], device="cpu")
    return {"block_mask": block}


def all_peers() -> list[Peer]:
    """Every adapter; the first that runs is the one the others are compared with."""
    from .peer_onnxruntime import OnnxRuntime
    from .peer_openvino import OpenVinoPaged, OpenVinoSDPA

    return [Ours(), Own(), TorchSDPA(), Eager(), OpenVinoPaged(), OpenVinoSDPA(), OnnxRuntime(), Flex()]


def package_version(package: str) -> str:
    return importlib.metadata.version(package)
