"""What is measured on a GPU: 16384 tokens and heads x D of 2048 unless a case says otherwise."""

import dataclasses

from .cases import DROPOUT_P, PAGE, STORED, Case, Shape

# bwd, and what ends in _bwd, is the backward alone; the four from decode on run in a CUDA graph; host is the time until
# a call returns, without gradients and (host_grad) with.
OPS = ("fwd", "bwd", "mask", "mask_bwd", "option", "dropout", "dropout_bwd", "gqa", "dv", "varlen", "decode", "paged",
       "quant", "multi", "host", "host_grad")
OPTIONS = ("softcap", "sinks", "alibi", "window", "lengths")
QUICK_OPS = tuple(op for op in OPS if op not in ("option", "dropout_bwd"))  # peers of those take longest to get ready
TOKENS, WIDTH = 16384, 2048
SHORTEST = 64  # packed sequences have lengths from S / 64 to S
NEW_TOKENS = 4


def _cells(lengths, dims, tokens: int = TOKENS) -> list[str]:
    """Shapes of so many tokens, for each head dimension and length."""
    return [f"B{tokens // s}H{WIDTH // d}S{s}D{d}" for d in dims for s in lengths]


_D64, _D128 = _cells((4096,), (64, 128))
_DECODE = ("B1HQ32HK8SQ1SK1024D128", "B1HQ32HK8SQ1SK8192D128", "B1HQ32HK8SQ1SK32768D128", "B4HQ32HK8SQ1SK8192D128",
           "B16HQ32HK8SQ1SK1024D128", "B16HQ32HK8SQ1SK8192D128", "B64HQ32HK8SQ1SK1024D128", "B16HQ32HK16SQ1SK8192D64",
           "B4HQ16HK4SQ1SK8192D256")
_CACHE = ("B16HQ32HK8SQ1SK8192D128",)
_HOST = ("B1H8S128D64",)
# Of each op (dtype, shapes).
_DEFAULT = {
    "fwd": [("bf16", _cells((512, 4096, 16384), (64, 128, 256))), ("f16", (_D128,)),
            ("f32", _cells((512, 4096), (64, 128), 8192))],
    "bwd": [("bf16", _cells((512, 4096), (64, 128, 256))), ("f32", _cells((4096,), (64, 128), 8192))],
    "mask": [("bf16", (_D64, _D128))],
    "mask_bwd": [("bf16", (_D128,))],
    "option": [("bf16", (_D64, _D128))],
    "dropout": [("bf16", (_D64, _D128))],
    "dropout_bwd": [("bf16", (_D128,))],
    "gqa": [("bf16", ("B4HQ32HK8S4096D128",))],
    "dv": [("bf16", ("B4H16S4096D192DV128",))],
    "varlen": [("bf16", ("B32H16S4096D128",))],
    "decode": [("bf16", _DECODE)],
    "paged": [("bf16", _CACHE)],
    "quant": [("bf16", _CACHE)],
    "multi": [("bf16", _CACHE)],
    "host": [("bf16", _HOST)],
    "host_grad": [("bf16", _HOST)],
}
_EXTENDED = {
    "fwd": [("f16", _cells((512, 4096, 16384), (64, 256))), ("bf16", _cells((2048, 8192), (64, 128, 256)))],
    "bwd": [("bf16", _cells((16384,), (64, 128, 256))), ("f16", (_D64, _D128))],
    "mask_bwd": [("bf16", (_D64,))],
    "dropout_bwd": [("bf16", (_D64,))],
    "decode": [("bf16", ("B1HQ32HK8SQ1SK131072D128", "B64HQ32HK8SQ1SK8192D128")), ("f16", _CACHE), ("f32", _CACHE)],
}
_QUICK = {**_DEFAULT, "fwd": [("bf16", _cells((512, 4096), (128,)))], "bwd": [("bf16", (_D128,))],
          "mask": [("bf16", (_D128,))], "option": [("bf16", (_D128,))], "dropout": [("bf16", (_D128,))],
          "decode": [("bf16", (_DECODE[1], *_CACHE))]}


def select(ops=None, shapes=None, dtypes=None, quick: bool = False, extended: bool = False) -> list[Case]:
    """The cases to run; the arguments are those of cases.select."""
    chosen = []
    for op in ops or (QUICK_OPS if quick else OPS):
        cells = (_QUICK if quick else _DEFAULT)[op] + (_EXTENDED.get(op, []) if extended else [])
        pairs = [(dtype, Shape.parse(text)) for dtype, texts in cells for text in texts]
        if shapes or dtypes:
            sizes = shapes or list(dict.fromkeys(shape for _, shape in pairs))
            kinds = dtypes or list(dict.fromkeys(dtype for dtype, _ in pairs))
            pairs = [(dtype, shape) for dtype in kinds for shape in sizes]
        for dtype, shape in pairs:
            chosen += _variants(Case(op, shape, dtype))
    return chosen


def _variants(base: Case) -> list[Case]:
    replace = dataclasses.replace
    if base.op in ("fwd", "bwd"):
        return [base, replace(base, causal=True)]
    if base.op == "mask":
        return [replace(base, mask=mask) for mask in ("random", "ragged", "head-bias")]
    if base.op == "mask_bwd":
        return [replace(base, mask="random"), replace(base, mask="head-bias"),
                replace(base, mask="head-bias", mask_gradient=True),
                replace(base, mask="batch-bias", mask_gradient=True)]
    if base.op == "option":
        return [replace(base, option=option, causal=option == "window") for option in OPTIONS]
    if base.op in ("dropout", "dropout_bwd"):
        return [replace(base, dropout=DROPOUT_P)]
    if base.op in ("gqa", "dv"):
        return [replace(base, causal=True)]
    if base.op == "varlen":
        return [replace(base, shortest=SHORTEST, causal=causal) for causal in (False, True)]
    if base.op == "paged":
        return [replace(base, page=PAGE)]
    if base.op == "quant":
        return [replace(base, stored=stored) for stored in STORED]
    if base.op == "multi":
        new = NEW_TOKENS if base.shape.SQ == 1 else base.shape.SQ
        return [replace(base, mask="lower-right", shape=replace(base.shape, SQ=new))]
    return [base]
