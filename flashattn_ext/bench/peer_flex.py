"""torch's FlexAttention, compiled anew for each case: several seconds each."""

import functools

import torch

from .cases import CACHE_OPS, Case, Inputs
from .peers import TorchPeer


class Flex(TorchPeer):
    """On a CPU; see peers_cuda.py for a GPU."""

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
        return refuses(case)

    def open(self, case: Case, threads: int):
        from torch.nn.attention.flex_attention import flex_attention

        torch.compiler.reset()  # else the limit on recompilations turns later cases into the uncompiled fallback
        self.compiled = torch.compile(_with_sinks if case.option == "sinks" else flex_attention, dynamic=False)
        return super().open(case, threads)

    def call(self, inputs: Inputs):
        arguments = {"block_mask": _block_mask(inputs), "score_mod": _score_change(inputs), "enable_gqa": inputs.gqa}
        if "sinks" in inputs.options:
            arguments["sinks"] = inputs.options["sinks"]
        return functools.partial(self.compiled, inputs.query, inputs.key, inputs.value, **arguments)


def refuses(case: Case) -> str | None:
    if case.dropout:
        return "no dropout"
    if case.lengths:
        return "no packed sequences"
    if case.mask_gradient:
        return "no gradient of a bias here"
    return None


def _with_sinks(query, key, value, sinks, **arguments):
    """A sink takes its share of the weights: what is left of the output follows from the log-sum-exp without it."""
    from torch.nn.attention.flex_attention import flex_attention

    out, lse = flex_attention(query, key, value, return_lse=True, **arguments)
    return out * torch.sigmoid(lse - sinks[:, None])[..., None].to(out.dtype)


def _block_mask(inputs: Inputs):
    """Which keys are seen, or None for all; building it is not timed, a model builds it once."""
    from torch.nn.attention.flex_attention import create_block_mask

    visible, batches = _visible(inputs)
    if visible is None:
        return None
    return create_block_mask(visible, batches, None, inputs.query.shape[2], inputs.key.shape[2],
                             device=str(inputs.query.device))


def _visible(inputs: Inputs):
    """(function of batch, head, query and key position; B if it depends on the batch, else None)."""
    mask, lengths = inputs.mask, inputs.options.get("kv_seqlens")
    if mask is not None and mask.dtype == torch.bool:
        if mask.dim() == 4:
            return (lambda b, h, q, k: mask[b, 0, 0, k]), mask.shape[0]
        return (lambda b, h, q, k: mask[q, k]), None
    if lengths is not None:
        return (lambda b, h, q, k: k < lengths[b]), lengths.shape[0]
    if "window" in inputs.options:
        left = inputs.options["window"][0]
        return (lambda b, h, q, k: (q >= k) & (q - k <= left)), None
    return ((lambda b, h, q, k: q >= k) if inputs.causal else None), None


def _score_change(inputs: Inputs):
    mask, options = inputs.mask, inputs.options
    if mask is not None and mask.dtype != torch.bool:
        if mask.dim() == 2:
            return lambda score, b, h, q, k: score + mask[q, k]
        if mask.shape[0] == 1:
            return lambda score, b, h, q, k: score + mask[0, h, q, k]
        return lambda score, b, h, q, k: score + mask[b, h, q, k]
    if "softcap" in options:
        cap = options["softcap"]
        return lambda score, b, h, q, k: cap * torch.tanh(score / cap)
    if "alibi_slopes" in options:
        slopes = options["alibi_slopes"]
        return lambda score, b, h, q, k: score - slopes[h] * (q - k).abs()
    return None


class FlexCuda(Flex):
    """On a GPU, unasked, only for the options, which few others have."""

    label = "Flex"
    column = "x Flex"
    default = True

    def concerns(self, case: Case) -> bool:
        return self.asked or bool(case.option)

    def refuses(self, case: Case) -> str | None:
        if case.host or case.op in CACHE_OPS:
            return "compiled calls are not compared in this"
        return refuses(case)
