"""Who is measured on a GPU: torch's backends one by one, its packed sequences, fa3-fwd, FlexAttention."""

import functools
import importlib
import importlib.util
import inspect

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import serving
from .cases import CACHE_OPS, DTYPES, Case, Inputs
from .peer_flex import FlexCuda
from .peers import Ours, Own, Peer, TorchPeer, TorchSDPA, package_version, timed_part

FA3_CONFIG = "fa3_fwd_config"
OTHER_DIAGONAL = "causal from the bottom right where SQ is not SK"


def no_device() -> str | None:
    """Why nothing can be measured on a GPU here."""
    if not torch.backends.cuda.is_built():
        return f"--device cuda: torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return (f"--device cuda: torch {torch.__version__} is built for CUDA {torch.version.cuda} and finds "
                f"{torch.cuda.device_count()} GPUs that it can use")
    return None


class OursCuda(Ours):
    def missing(self) -> str | None:
        reason = super().missing()
        if reason:
            return reason
        import flashattn_ext

        if not flashattn_ext.build_info()["cuda"]:
            return "flashattn_ext is built without CUDA"
        return None


class OwnCuda(Own):
    """Of packed sequences there is none: a call for each is the host's time."""

    def concerns(self, case: Case) -> bool:
        return not case.lengths and super().concerns(case)


class Backend(TorchPeer):
    """One of the backends among which torch's SDPA chooses."""

    def __init__(self, name: str, label: str, column: str, backend: SDPBackend, cannot: tuple[str, ...]) -> None:
        """cannot: of the names in refuses what it lacks."""
        self.name, self.label, self.column = name, label, column
        self.backend, self.cannot = backend, cannot

    def concerns(self, case: Case) -> bool:
        return not (case.host or case.lengths or case.option)

    def refuses(self, case: Case) -> str | None:
        asks = {"f32": case.dtype == "f32", "mask": bool(case.mask), "grad": case.mask_gradient,
                "gqa": case.shape.HQ != case.shape.HK, "dv": case.shape.D != case.shape.DV}
        lacks = {"f32": "no float32", "mask": "no masks", "grad": "no gradient of a bias",
                 "gqa": "as many key as query heads only", "dv": "DV must be D"}
        return next((lacks[what] for what in self.cannot if asks[what]), None)

    def call(self, inputs: Inputs):
        run = functools.partial(F.scaled_dot_product_attention, inputs.query, inputs.key, inputs.value, inputs.mask,
                                inputs.dropout, inputs.causal, enable_gqa=inputs.gqa)

        def chosen():
            with sdpa_kernel(self.backend):
                return run()

        return chosen


class TorchChoice(TorchSDPA):
    """torch's SDPA as it is called: its time on the device is that of one of the backends, its host time its own."""

    label = "SDPA"

    def concerns(self, case: Case) -> bool:
        return case.host


def _other_diagonal(case: Case) -> bool:
    """Whether FlashAttention's own functions mean another diagonal: theirs ends in the last query and key, while ours
    and that of torch's SDPA begins in the first."""
    return case.causal and case.shape.SQ != case.shape.SK and not case.lengths


class TorchVarlen(TorchPeer):
    """torch's packed sequences, which are FlashAttention-2; they have windows and lengths too."""

    name = "varlen"
    label = "torch varlen"
    column = "x varlen"

    def missing(self) -> str | None:
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            return f"torch {torch.__version__} has no torch.nn.attention.varlen"
        self.function = varlen_attn
        self.knows = inspect.signature(varlen_attn).parameters
        return None

    def concerns(self, case: Case) -> bool:
        return bool(case.lengths) or case.option in ("window", "lengths")

    def refuses(self, case: Case) -> str | None:
        if case.dtype == "f32":
            return "no float32"
        if case.option == "window" and "window_size" not in self.knows:
            return "no windows in this torch"
        if case.shape.HQ != case.shape.HK and "enable_gqa" not in self.knows:
            return "as many key as query heads only, in this torch"
        return OTHER_DIAGONAL if _other_diagonal(case) else None

    def call(self, inputs: Inputs):
        batch, _, queries, _ = inputs.query.shape
        rows = inputs.lengths or [queries] * batch
        keys = inputs.options["kv_seqlens"].tolist() if "kv_seqlens" in inputs.options else rows
        packed = (serving.pack(x, n) for x, n in ((inputs.query, rows), (inputs.key, keys), (inputs.value, keys)))
        bounds = (serving.starts(n, inputs.query.device) for n in (rows, keys))
        arguments = {"enable_gqa": True} if inputs.gqa else {}
        if inputs.causal and "window_size" in self.knows:
            arguments["window_size"] = inputs.options.get("window", (-1, 0))
        elif inputs.causal:
            arguments["is_causal"] = True
        return functools.partial(self.function, *packed, *bounds, max(rows), max(keys), **arguments)

    def collect(self, value, case: Case) -> list[torch.Tensor]:
        out, *gradients = super().collect(value, case)
        return unpacked(case, out) + gradients


def unpacked(case: Case, out: torch.Tensor) -> list[torch.Tensor]:
    """[out (B, H, S, DV)] of packed (T, H, DV)."""
    if case.lengths:
        return serving.collect(case, out)
    return [out.unflatten(0, (case.shape.B, case.shape.SQ)).transpose(1, 2)]


class FlashAttention3(TorchPeer):
    """The package fa3-fwd: FlashAttention-3, forward only, with what its build has switched on. Tensors as it wants
    them: (B, S, H, D)."""

    name = "fa3"
    label = "FA3"
    column = "x FA3"

    def missing(self) -> str | None:
        if importlib.util.find_spec(FA3_CONFIG) is None:
            return "fa3-fwd is not installed"
        try:
            self.module = importlib.import_module("fa3_fwd_interface")
        except (ImportError, OSError) as error:
            return f"fa3-fwd does not load: {error}"
        self.flags = importlib.import_module(FA3_CONFIG).CONFIG["build_flags"]
        return None

    def version(self) -> str:
        return package_version("fa3-fwd")

    def concerns(self, case: Case) -> bool:
        return not case.backward and case.op != "host_grad"

    def refuses(self, case: Case) -> str | None:
        off = {name for name, value in self.flags.items() if value}
        if case.dtype == "f32" or (case.dtype == "f16" and "FLASHATTENTION_DISABLE_FP16" in off):
            return f"no {DTYPES[case.dtype]}".replace("torch.", "")
        if case.page or case.stored:
            return "not compared over pages" if case.page else "no keys and values of another dtype"
        if case.dropout or (case.mask and case.op != "multi"):
            return "no dropout" if case.dropout else "no masks"
        if case.option == "window" and "FLASHATTENTION_DISABLE_LOCAL" in off:
            return "no windows in this build"
        if _other_diagonal(case):
            return OTHER_DIAGONAL
        return f"no {case.option}" if case.option in ("sinks", "alibi") else None

    def open(self, case: Case, threads: int):
        make = self.call
        if case.lengths:
            make = self._packed
        elif case.op in CACHE_OPS or case.option == "lengths":
            make = self._cached
        return lambda inputs: timed_part(case, inputs, make(inputs))

    def call(self, inputs: Inputs):
        tensors = (serving.by_tokens(x) for x in (inputs.query, inputs.key, inputs.value))
        arguments = {"window_size": inputs.options["window"]} if "window" in inputs.options else {}
        return functools.partial(self.module.flash_attn_func, *tensors, causal=inputs.causal,
                                 softcap=inputs.options.get("softcap", 0.0), **arguments)

    def _packed(self, inputs: Inputs):
        packed = (serving.pack(x, inputs.lengths) for x in (inputs.query, inputs.key, inputs.value))
        bounds, longest = serving.starts(inputs.lengths, inputs.query.device), max(inputs.lengths)
        return functools.partial(self.module.flash_attn_varlen_func, *packed, bounds, bounds, longest, longest,
                                 causal=inputs.causal)

    def _cached(self, inputs: Inputs):
        query, key, value = (serving.by_tokens(x) for x in (inputs.query, inputs.key, inputs.value))
        lengths = inputs.options.get("kv_seqlens")
        if lengths is None:
            lengths = torch.full((len(key),), key.shape[1], dtype=torch.int32, device=key.device)
        return functools.partial(self.module.flash_attn_with_kvcache, query, key, value, cache_seqlens=lengths,
                                 causal=inputs.mask is not None)

    def collect(self, value, case: Case) -> list[torch.Tensor]:
        out, = super().collect(value, case)
        return unpacked(case, out) if case.lengths else [out.transpose(1, 2)]


def all_peers() -> list[Peer]:
    """Every adapter; the first that runs is the one the others are compared with."""
    return [OursCuda(), TorchChoice(), OwnCuda(),
            Backend("cudnn", "cuDNN", "x cuDNN", SDPBackend.CUDNN_ATTENTION, ("f32", "grad")),
            Backend("fa2", "FA2", "x FA2", SDPBackend.FLASH_ATTENTION, ("f32", "mask", "dv")),
            Backend("efficient", "efficient", "x eff", SDPBackend.EFFICIENT_ATTENTION, ("gqa",)),
            TorchVarlen(), FlashAttention3(), FlexCuda()]
