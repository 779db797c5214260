"""What is measured: attention problems by shape, dtype and mask, and the random inputs of each. The lists at the end
are those of a CPU; cases_cuda.py has a GPU's.

Scalars are named as in the whole project: B batch, HQ and HK query and key/value heads, SQ and SK queries and keys,
D head dimension of query and key, DV of value and output.
"""

import dataclasses
import math
import re

import torch

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
DTYPE_ALIASES = {"fp32": "f32", "float32": "f32", "bfloat16": "bf16", "fp16": "f16", "float16": "f16", "half": "f16"}
# decode and the three after it: new tokens against a cache of SK tokens, the last of them among these.
OPS = ("fwd", "fwd+bwd", "mask", "dropout", "dv", "decode", "paged", "quant", "multi", "varlen", "tiny", "decode_tiny")
CACHE_OPS = ("decode", "paged", "quant", "multi")
DROPOUT_P = 0.1
PADDED = 0.75  # share of the keys that the last sequence of a padded batch keeps
RAGGED = 0.25  # the sequences of a ragged batch hide so much at most, in even steps
PAGE = 16      # tokens of a page of the cache
SHORTEST = 16  # packed sequences have lengths from S / 16 to S
SOFTCAP = 20.0
WINDOW = 1024  # keys before its own that a query sees at most; a quarter of SK in a smaller case
NEW_TOKENS = (2, 4, 8, 16)
STORED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one problem; written as letters and numbers, e.g. B1H8S512D64 or HQ32HK8SQ1SK4096D128DV64."""

    B: int
    HQ: int
    HK: int
    SQ: int
    SK: int
    D: int
    DV: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """H stands for HQ and HK, S for SQ and SK; DV is D unless given, B is 1. ValueError if the text is no shape."""
        if not re.fullmatch(r"((HQ|HK|SQ|SK|DV|B|H|S|D)\d+)+", text):
            raise ValueError(f"shape {text!r}: write letters and numbers, e.g. B1H8S512D64 or HQ32HK8SQ1SK4096D128")
        sizes = {name: int(number) for name, number in re.findall(r"(HQ|HK|SQ|SK|DV|B|H|S|D)(\d+)", text)}
        try:
            heads, length = sizes.get("H"), sizes.get("S")
            shape = cls(B=sizes.get("B", 1), HQ=sizes.get("HQ") or heads, HK=sizes.get("HK") or heads or sizes["HQ"],
                        SQ=sizes.get("SQ") or length, SK=sizes.get("SK") or length or sizes["SQ"], D=sizes["D"],
                        DV=sizes.get("DV") or sizes["D"])
        except KeyError as error:
            raise ValueError(f"shape {text!r} does not say {error.args[0]}") from None
        if not all(dataclasses.astuple(shape)):
            raise ValueError(f"shape {text!r} does not say H and S, or has a size of 0")
        if shape.HQ % shape.HK:
            raise ValueError(f"shape {text!r}: HK {shape.HK} does not divide HQ {shape.HQ}")
        return shape

    def __str__(self) -> str:
        heads = f"H{self.HQ}" if self.HQ == self.HK else f"HQ{self.HQ}HK{self.HK}"
        length = f"S{self.SQ}" if self.SQ == self.SK else f"SQ{self.SQ}SK{self.SK}"
        return f"B{self.B}{heads}{length}D{self.D}" + (f"DV{self.DV}" if self.DV != self.D else "")


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the benchmark."""

    op: str     # one of OPS, here or in cases_cuda.py; "bwd" alone is timed without the forward before it
    shape: Shape
    dtype: str  # one of DTYPES
    causal: bool = False
    # "" or, over (SQ, SK), "random", "tril" and "lower-right" (the last query sees all) bool and "bias" float;
    # "padding" and "ragged" are bool (B, 1, 1, SK), "head-bias" (1, HQ, SQ, SK) and "batch-bias" (B, HQ, SQ, SK)
    mask: str = ""
    mask_gradient: bool = False
    option: str = ""  # "" or one of OPTIONS in cases_cuda.py
    dropout: float = 0.0
    page: int = 0     # tokens of a page; 0 = the cache of a sequence is one piece
    stored: str = ""  # one of STORED; "" = the cache has the query's dtype
    shortest: int = SHORTEST

    @property
    def name(self) -> str:
        kind = self.option or self.mask or ("causal" if self.causal else "")
        if not kind and self.op in ("fwd", "fwd+bwd", "bwd", "varlen"):
            kind = "full"
        if self.op in CACHE_OPS:
            kind = f"page{self.page}" if self.page else self.stored
        kind += "+grad" if self.mask_gradient else ""
        return "_".join(part for part in (self.op, self.dtype, str(self.shape), kind) if part)

    @property
    def backward(self) -> bool:
        return self.op.endswith("bwd")

    @property
    def backward_alone(self) -> bool:
        """Whether the forward that a backward needs is left out of the time."""
        return self.backward and self.op != "fwd+bwd"

    @property
    def host(self) -> bool:
        """Whether the time is that until a call returns, be the device done or not."""
        return self.op in ("host", "host_grad")

    @property
    def bound(self) -> str:
        """Which ceiling of the machine limits it: "fma", "memory", or "" for the cost of a call."""
        if self.op in CACHE_OPS:
            return "memory"
        return "" if self.host or self.op in ("tiny", "decode_tiny") else "fma"

    @property
    def lengths(self) -> list[int] | None:
        """Of packed sequences: from S / shortest to S in equal ratios; None for sequences of one length."""
        if self.op != "varlen":
            return None
        s = self.shape
        return [max(1, round(s.SQ * self.shortest ** -(b / max(1, s.B - 1)))) for b in range(s.B)]

    @property
    def kept(self) -> list[int] | None:
        """Of a padded batch: the keys of each sequence that count, the first so many; None where all do."""
        s = self.shape
        if self.mask == "padding":
            return [s.SK] * (s.B - 1) + [math.ceil(PADDED * s.SK)]
        if self.mask == "ragged" or self.option == "lengths":
            return [math.ceil(s.SK * (1 - RAGGED * (b + 0.5) / s.B)) for b in range(s.B)]
        return None

    @property
    def window(self) -> int | None:
        """Keys before its own that a query sees at most."""
        return min(WINDOW, max(1, self.shape.SK // 4)) if self.option == "window" else None

    @property
    def scores(self) -> float:
        """Pairs of a query and a key that it sees, over all query heads. A "random" mask, which hides one in five all
        over, and "lower-right", which hides few of the last keys, count in full."""
        s = self.shape
        if self.lengths:
            return s.HQ * sum(n * (n + 1) / 2 if self.causal else n * n for n in self.lengths)
        if self.kept:
            return s.HQ * s.SQ * sum(self.kept)
        if self.causal or self.mask == "tril":
            most = s.SK if self.window is None else self.window + 1
            return s.B * s.HQ * sum(min(i + 1, most) for i in range(s.SQ))
        return s.B * s.HQ * s.SQ * s.SK

    @property
    def flops(self) -> float:
        """Multiply-adds that the problem needs, each counted twice; backward has 5 products to forward's 2."""
        s = self.shape
        forward = 0 if self.backward_alone else 2 * self.scores * (s.D + s.DV)
        return forward + 2 * self.scores * (3 * s.D + 2 * s.DV) if self.backward else forward

    @property
    def bytes(self) -> int:
        """Query, key and value read once, the output written once; of the forward."""
        s, size = self.shape, DTYPES[self.dtype].itemsize
        queries, keys = s.B * s.HQ * s.SQ * (s.D + s.DV), s.B * s.HK * s.SK * (s.D + s.DV)
        if self.lengths:
            queries, keys = (n * sum(self.lengths) // (s.B * s.SQ) for n in (queries, keys))
        if self.stored:  # and a float32 scale for each token and head
            return queries * size + keys + 2 * s.B * s.HK * s.SK * 4
        return (queries + keys) * size


@dataclasses.dataclass
class Inputs:
    """Arguments of one call. query (B, HQ, SQ, D), key (B, HK, SK, D), value (B, HK, SK, DV); gradient is that of the
    output (B, HQ, SQ, DV), or None for a forward. lengths: of packed sequences, the rows of each that count."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    gradient: torch.Tensor | None
    causal: bool
    dropout: float
    lengths: list[int] | None = None
    # Of a quantised cache, key and value as they are stored and float32 scales (B, HK, S): key = stored[0] * scales[0].
    stored: tuple[torch.Tensor, torch.Tensor] | None = None
    scales: tuple[torch.Tensor, torch.Tensor] | None = None
    # Further keyword arguments of flashattn_ext.scaled_dot_product_attention.
    options: dict = dataclasses.field(default_factory=dict)

    @property
    def leaves(self) -> list[torch.Tensor]:
        """What the case has gradients of."""
        return [x for x in (self.query, self.key, self.value, self.mask) if x is not None and x.requires_grad]

    @property
    def gqa(self) -> bool:
        return self.query.shape[1] != self.key.shape[1]


def draw(case: Case, generator: torch.Generator) -> Inputs:
    """Fresh normal random inputs of a case (never zeros: those multiply and exponentiate faster on some machines), on
    the generator's device."""
    s, dtype = case.shape, DTYPES[case.dtype]

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=generator.device).to(dtype)

    query, key, value = normal(s.B, s.HQ, s.SQ, s.D), normal(s.B, s.HK, s.SK, s.D), normal(s.B, s.HK, s.SK, s.DV)
    if case.backward or case.op == "host_grad":
        for tensor in (query, key, value):
            tensor.requires_grad_()
    gradient = normal(s.B, s.HQ, s.SQ, s.DV) if case.backward else None
    inputs = Inputs(query, key, value, _mask(case, generator), gradient, case.causal, case.dropout, case.lengths,
                    options=_options(case, generator))
    return _quantised(inputs, STORED[case.stored]) if case.stored else inputs


def _quantised(inputs: Inputs, stored: torch.dtype) -> Inputs:
    """With key and value rounded to what a cache of that type can hold. Scales are powers of two here, so that the
    values that they give are exact in every dtype, and results can be checked as any others."""
    largest = 127 if stored is torch.int8 else torch.finfo(stored).max
    parts = []
    for x in (inputs.key, inputs.value):
        x = x.float()
        scale = (x.abs().amax(-1, keepdim=True) / largest).log2().ceil().exp2()
        held = (x / scale).round() if stored is torch.int8 else x / scale
        parts.append((held.to(stored), scale))
    key, value = ((held.float() * scale).to(inputs.query.dtype) for held, scale in parts)
    return dataclasses.replace(inputs, key=key, value=value, stored=tuple(held for held, _ in parts),
                               scales=tuple(scale.squeeze(-1) for _, scale in parts))


def _mask(case: Case, generator: torch.Generator) -> torch.Tensor | None:
    s, device = case.shape, generator.device
    if case.mask == "random":
        mask = torch.rand(s.SQ, s.SK, generator=generator, device=device) < 0.8
        mask[:, 0] = True  # no row without a key: torch's paths disagree on it
        return mask
    if case.mask == "tril":
        return torch.ones(s.SQ, s.SK, dtype=torch.bool, device=device).tril()
    if case.mask == "lower-right":
        return torch.ones(s.SQ, s.SK, dtype=torch.bool, device=device).tril(s.SK - s.SQ)
    if case.mask in ("padding", "ragged"):
        lengths = torch.tensor(case.kept, device=device)
        return (torch.arange(s.SK, device=device) < lengths[:, None]).view(s.B, 1, 1, s.SK)
    if case.mask:
        size = {"bias": (s.SQ, s.SK), "head-bias": (1, s.HQ, s.SQ, s.SK), "batch-bias": (s.B, s.HQ, s.SQ, s.SK)}
        mask = torch.randn(size[case.mask], generator=generator, device=device).to(DTYPES[case.dtype])
        return mask.requires_grad_(case.mask_gradient)
    return None


def _options(case: Case, generator: torch.Generator) -> dict:
    heads, device = case.shape.HQ, generator.device
    if case.option == "softcap":
        return {"softcap": SOFTCAP}
    if case.option == "sinks":
        return {"sinks": torch.randn(heads, generator=generator, device=device)}
    if case.option == "alibi":
        return {"alibi_slopes": 2.0 ** (-8.0 / heads * torch.arange(1, heads + 1, device=device))}
    if case.option == "window":
        return {"window": (case.window, 0)}
    if case.option == "lengths":
        return {"kv_seqlens": torch.tensor(case.kept, dtype=torch.int32, device=device)}
    return {}


_FWD = ("B1H8S128D64", "B1H8S512D64", "B1H8S2048D64", "B1H8S2048D128", "B16H12S128D64")
_FWD_EXTENDED = ("B1H8S128D128", "B1H8S512D128")
_BWD = ("B1H8S512D64", "B16H12S128D64")
_BWD_EXTENDED = ("B1H8S2048D64", "B1H8S2048D128")
_DECODE = ("B1HQ32HK8SQ1SK4096D128", "B1H32SQ1SK4096D128", "B1HQ8HK1SQ1SK16384D128", "B8HQ32HK8SQ1SK1024D128",
           "B1HQ9HK3SQ1SK4096D64")  # the last is a layer of the demo's model
_DECODE_EXTENDED = ("B1HQ8HK8SQ1SK65536D64", "B4HQ32HK4SQ1SK4096D64", "B32HQ32HK8SQ1SK1024D64",
                    "B32HQ8HK8SQ1SK1024D128")
_LONG = ("B1HQ32HK8SQ1SK8192D128", "B8HQ32HK8SQ1SK8192D64")
_VARLEN = ("B8H8S2048D64", "B32HQ9HK3S512D64")
_DEFAULT_SHAPES = {"fwd": _FWD, "fwd+bwd": _BWD, "mask": ("B1H8S1024D64",), "dropout": ("B1H8S1024D64",),
                   "dv": ("B1H8S1024D64DV32",), "decode": _DECODE, "paged": _DECODE[::3], "quant": _LONG,
                   "multi": _DECODE[::3], "varlen": _VARLEN, "tiny": ("B1H2S8D16",), "decode_tiny": ("B1H2SQ1SK8D16",)}
_EXTENDED_SHAPES = {"fwd": _FWD_EXTENDED, "fwd+bwd": _BWD_EXTENDED, "decode": _DECODE_EXTENDED,
                    "paged": _DECODE_EXTENDED}
_QUICK_SHAPES = {"fwd": ("B1H8S128D64", "B1H8S512D64"), "fwd+bwd": ("B1H8S256D64",), "mask": ("B1H8S256D64",),
                 "dropout": ("B1H8S256D64",), "dv": ("B1H8S256D64DV32",), "decode": _DECODE[:1], "paged": _DECODE[:1],
                 "quant": _DECODE[:1], "multi": _DECODE[:1], "varlen": ("B8H4S256D64",), "tiny": ("B1H2S8D16",),
                 "decode_tiny": ("B1H2SQ1SK8D16",)}
# By default an op is measured in the dtypes that the project states a figure for.
_DEFAULT_DTYPES = {"fwd": ("f32", "bf16", "f16"), "fwd+bwd": ("f32", "bf16"), "mask": ("f32", "bf16"),
                   "dropout": ("f32", "bf16"), "dv": ("f32", "bf16"), "decode": ("f32", "bf16", "f16"),
                   "paged": ("f32", "bf16"), "quant": ("bf16",), "multi": ("bf16",), "varlen": ("f32", "bf16"),
                   "tiny": ("f32",), "decode_tiny": ("f32",)}


def select(ops=None, shapes=None, dtypes=None, quick: bool = False, extended: bool = False) -> list[Case]:
    """The cases to run.

    ops: names of OPS; shapes: Shape objects, instead of the built-in ones; dtypes: names of DTYPES; None means the
    default. extended adds some larger cases.
    """
    chosen = []
    for op in ops or OPS:
        if shapes:
            sizes = list(shapes)
        else:
            texts = (_QUICK_SHAPES if quick else _DEFAULT_SHAPES)[op]
            sizes = [Shape.parse(text) for text in texts + (_EXTENDED_SHAPES.get(op, ()) if extended else ())]
        for shape in sizes:
            for dtype in dtypes or _DEFAULT_DTYPES[op]:
                chosen += _variants(op, shape, dtype)
    return chosen


def _variants(op: str, shape: Shape, dtype: str) -> list[Case]:
    base = Case(op, shape, dtype)
    if op in ("fwd", "fwd+bwd"):
        return [base, dataclasses.replace(base, causal=True)]
    if op == "mask":
        padded = dataclasses.replace(shape, B=max(2, shape.B))
        return [dataclasses.replace(base, mask="random"), dataclasses.replace(base, mask="tril"),
                dataclasses.replace(base, mask="bias"), dataclasses.replace(base, mask="padding", shape=padded)]
    if op == "dropout":
        return [dataclasses.replace(base, dropout=DROPOUT_P)]
    if op == "paged":
        return [dataclasses.replace(base, page=PAGE)]
    if op == "quant":
        return [dataclasses.replace(base, stored=stored) for stored in STORED]
    if op == "multi":
        counts = NEW_TOKENS if shape.SQ == 1 else (shape.SQ,)
        return [dataclasses.replace(base, mask="lower-right", shape=dataclasses.replace(shape, SQ=new))
                for new in counts]
    if op == "varlen":
        return [dataclasses.replace(base, causal=True)]
    return [base]
