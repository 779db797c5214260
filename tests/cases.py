"""What the value tests run: a Case says shapes, dtype, layout and options; build() makes the tensors of one."""

import dataclasses
import math
import os
import zlib

import torch
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

FLOATS = ("float32", "bfloat16", "float16")
DTYPES = FLOATS + ("float64",)
# One below, at and above the sizes of the kernels' tiles: 6 keys, 16 or 64 queries, blocks of 96 and 192.
EDGES = (1, 2, 5, 6, 7, 15, 16, 17, 63, 64, 65, 95, 96, 97, 127, 128, 129, 191, 193)
HEAD_DIMS = (1, 2, 3, 5, 8, 15, 16, 17, 32, 33, 40, 63, 64, 65, 72, 80, 96, 100, 127, 128, 129, 192, 255, 256, 257, 511,
             512)
LAYOUTS = ("bhsd", "bshd", "packed", "strided", "transposed", "expanded", "offset")


@dataclasses.dataclass(frozen=True)
class Case:
    B: int = 2
    HQ: int = 2
    HK: int = 2
    SQ: int = 19
    SK: int = 35
    D: int = 16
    DV: int = 0  # 0: the same as D
    dtype: str = "float32"
    layout: str = "bhsd"
    options: tuple = ()

    @property
    def dv(self):
        return self.DV or self.D

    @property
    def torch_dtype(self):
        return getattr(torch, self.dtype)

    @property
    def id(self):
        heads = f"h{self.HQ}" if self.HQ == self.HK else f"h{self.HQ}over{self.HK}"
        dims = f"d{self.D}" if self.dv == self.D else f"d{self.D}v{self.dv}"
        parts = [f"b{self.B}", heads, f"s{self.SQ}x{self.SK}", dims, self.dtype]
        return "-".join(parts + ([self.layout] if self.layout != "bhsd" else []) + list(self.options))

    @property
    def seed(self):
        base = int(os.environ.get("FLASHATTN_EXT_TEST_SEED", "0"))
        return zlib.crc32(self.id.encode()) + base

    def but(self, **changes):
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass
class Inputs:
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    options: dict

    def floats(self):
        """The tensors a gradient may be asked for, by name."""
        named = {"query": self.query, "key": self.key, "value": self.value}
        mask = self.options.get("attn_mask")
        if type(mask) is torch.Tensor and mask.is_floating_point():
            named["attn_mask"] = mask
        if self.options.get("sinks") is not None:
            named["sinks"] = self.options["sinks"]
        return named

    def map(self, change):
        """The same inputs with every tensor that takes part in arithmetic put through change(name, tensor)."""
        options = dict(self.options)
        for name in ("attn_mask", "sinks", "alibi_slopes"):
            if type(options.get(name)) is torch.Tensor:
                options[name] = change(name, options[name])
        return Inputs(change("query", self.query), change("key", self.key), change("value", self.value), options)


# ---- layouts ---------------------------------------------------------------------------------------------------------


def arrange(x, layout):
    """x (B, H, S, D) with the same values in another memory layout; what lies around strided views is NaN."""
    B, H, S, D = x.shape
    if layout == "bhsd":
        return x.contiguous()
    if layout == "bshd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "transposed":  # D is the slowest of the last two: last stride S
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":  # the first batch and head for all, stride 0
        return x[:1, :1].contiguous().expand(B, H, S, D)
    nan = math.nan
    if layout == "packed":  # rows of a (B, S, H, D + 3) buffer, as in a fused QKV projection
        view = x.new_full((B, S, H, D + 3), nan)[..., 2:2 + D].transpose(1, 2)
    elif layout == "strided":  # last stride 2, rows apart
        view = x.new_full((B, H, 2 * S + 1, 2 * D + 1), nan)[:, :, 1:2 * S:2, 1:2 * D:2]
    elif layout == "offset":  # an odd storage offset, and rows longer than D
        strides = (H * S * (D + 1), S * (D + 1), D + 1, 1)
        view = x.new_full((B * strides[0] + 1,), nan).as_strided((B, H, S, D), strides, 1)
    else:
        raise ValueError(f"layout {layout!r}; allowed: {LAYOUTS}")
    return view.copy_(x)


# ---- options ---------------------------------------------------------------------------------------------------------


def _bool_mask(case, g, *shape):
    keep = torch.rand(shape, generator=g) > 0.3
    if keep.dim() >= 2 and shape[-2] > 2 and shape[-1] > 2:
        keep[..., 1, :] = False  # a row that sees nothing
        keep[..., :, 2] = False  # a key that nobody sees
    return keep


def _bias(case, g, *shape, dtype=None):
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype or case.torch_dtype)


def _bias_inf(case, g):
    bias = _bias(case, g, case.B, 1, case.SQ, case.SK)
    return bias.masked_fill(~_bool_mask(case, g, case.B, 1, case.SQ, case.SK), -math.inf)


def _lengths(case, g, longest, dtype=torch.int32):
    some = torch.randint(0, longest + 1, (case.B,), generator=g)
    some[0] = longest - longest // 3
    if case.B > 2:
        some[2] = 0
    return some.to(dtype)


def _padding(case, g, kind):
    """The same keys for all queries of a head: (B, 1, 1, SK), "holes" (B, HQ, 1, SK) with a head that sees nothing."""
    j = torch.arange(case.SK)
    lengths = _lengths(case, g, case.SK)[:, None, None, None]
    if kind == "right":
        return j < lengths
    if kind == "left":
        return j >= case.SK - lengths
    if kind == "strided":  # every third byte of a buffer, with a stride of 0 for queries
        keep = torch.zeros(case.B, 1, 1, case.SK + 1, 3, dtype=torch.bool)[..., 1:, 1]
        return keep.copy_(j >= case.SK - lengths).expand(-1, -1, case.SQ, -1)
    keep = torch.ones(case.B, case.HQ, 1, case.SK, dtype=torch.bool)
    for row in keep.view(-1, case.SK):
        for _ in range(4):
            first, run = (int(torch.randint(case.SK, (), generator=g)) for _ in range(2))
            row[first:first + 1 + run // 4] = False
    keep[-1, -1] = False
    return keep


def _f32_or_wider(case):
    return torch.float64 if case.dtype == "float64" else torch.float32


OPTIONS = {
    "causal": lambda c, g: dict(is_causal=True),
    "upper_left": lambda c, g: dict(attn_mask=causal_upper_left(c.SQ, c.SK)),
    "lower_right": lambda c, g: dict(attn_mask=causal_lower_right(c.SQ, c.SK)),
    "window": lambda c, g: dict(window=(3, 2)),
    "window_left": lambda c, g: dict(window=(7, None)),
    "window_right": lambda c, g: dict(window=(-1, 4)),
    "window_self": lambda c, g: dict(window=(0, 0)),
    "mask_full": lambda c, g: dict(attn_mask=_bool_mask(c, g, c.B, c.HQ, c.SQ, c.SK)),
    "mask_2d": lambda c, g: dict(attn_mask=_bool_mask(c, g, c.SQ, c.SK)),
    "mask_head": lambda c, g: dict(attn_mask=_bool_mask(c, g, c.HQ, c.SQ, c.SK)),
    "mask_key": lambda c, g: dict(attn_mask=_bool_mask(c, g, c.B, 1, 1, c.SK)),
    "mask_query": lambda c, g: dict(attn_mask=torch.arange(c.SQ)[:, None] % 3 != 1),
    "mask_strided": lambda c, g: dict(attn_mask=_bool_mask(c, g, c.B, 1, 2 * c.SK, c.SQ).transpose(2, 3)[..., ::2]),
    "pad_right": lambda c, g: dict(attn_mask=_padding(c, g, "right")),
    "pad_left": lambda c, g: dict(attn_mask=_padding(c, g, "left")),
    "pad_holes": lambda c, g: dict(attn_mask=_padding(c, g, "holes")),
    "pad_strided": lambda c, g: dict(attn_mask=_padding(c, g, "strided")),
    "bias_full": lambda c, g: dict(attn_mask=_bias(c, g, c.B, c.HQ, c.SQ, c.SK)),
    "bias_2d": lambda c, g: dict(attn_mask=_bias(c, g, c.SQ, c.SK)),
    "bias_head": lambda c, g: dict(attn_mask=_bias(c, g, c.HQ, c.SQ, c.SK)),
    "bias_key": lambda c, g: dict(attn_mask=_bias(c, g, c.B, 1, 1, c.SK)),
    "bias_query": lambda c, g: dict(attn_mask=_bias(c, g, c.SQ, 1)),
    "bias_batch": lambda c, g: dict(attn_mask=_bias(c, g, c.B, 1, c.SQ, c.SK)),
    "bias_one": lambda c, g: dict(attn_mask=_bias(c, g, 1, 1, 1, 1)),
    "bias_f32": lambda c, g: dict(attn_mask=_bias(c, g, c.B, 1, c.SQ, c.SK, dtype=_f32_or_wider(c))),
    "bias_inf": lambda c, g: dict(attn_mask=_bias_inf(c, g)),
    "bias_strided": lambda c, g: dict(attn_mask=_bias(c, g, c.HQ, 2 * c.SK, c.SQ).transpose(1, 2)[..., ::2]),
    "alibi": lambda c, g: dict(alibi_slopes=torch.rand(c.HQ, generator=g) * 0.3),
    "alibi_batch": lambda c, g: dict(alibi_slopes=torch.rand(c.B, c.HQ, generator=g) * 0.3),
    "softcap": lambda c, g: dict(softcap=1.5),
    "sinks": lambda c, g: dict(sinks=torch.randn(c.HQ, generator=g).to(_f32_or_wider(c))),
    "sinks_same": lambda c, g: dict(sinks=torch.randn(c.HQ, generator=g).to(c.torch_dtype)),
    "kv_lengths": lambda c, g: dict(kv_seqlens=_lengths(c, g, c.SK)),
    "kv_lengths64": lambda c, g: dict(kv_seqlens=_lengths(c, g, c.SK, torch.int64)),
    "q_lengths": lambda c, g: dict(q_seqlens=_lengths(c, g, c.SQ)),
    "dropout": lambda c, g: dict(dropout_p=0.3),
    "dropout_often": lambda c, g: dict(dropout_p=0.8),
    "scale": lambda c, g: dict(scale=0.7),
    "scale_zero": lambda c, g: dict(scale=0.0),
    "scale_negative": lambda c, g: dict(scale=-0.4),
}

# Each option by itself, then the pairs that share code in a kernel, then everything that goes together.
ALONE = ((),) + tuple((name,) for name in OPTIONS)
TOGETHER = (
    ("causal", "dropout"),
    ("causal", "window"),
    ("causal", "kv_lengths", "q_lengths"),
    ("lower_right", "kv_lengths", "q_lengths"),
    ("lower_right", "window_left", "alibi"),
    ("lower_right", "kv_lengths", "alibi", "window_left"),
    ("mask_full", "window", "sinks"),
    ("mask_key", "dropout", "softcap"),
    ("pad_left", "window_right", "kv_lengths"),
    ("pad_holes", "q_lengths", "sinks"),
    ("bias_full", "softcap", "sinks", "kv_lengths"),
    ("bias_inf", "dropout", "window_left"),
    ("sinks", "causal", "window_left"),
    ("sinks", "mask_2d", "q_lengths"),
    ("bias_batch", "alibi_batch", "softcap", "sinks", "kv_lengths", "q_lengths", "window", "dropout", "scale"),
)


def moved(x, device):
    """x on the device, with its strides and what lies between."""
    if x.device == torch.device(device):
        return x
    flat = torch.empty(0, dtype=x.dtype, device="cpu").set_(x.untyped_storage())
    return flat.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def build(case, device=None):
    """Inputs of a case, the same for the same case: normal values, rounded from float64. device: None = the default."""
    device = device or torch.get_default_device()
    with torch.device("cpu"):
        made = _build(case)
    made = made.map(lambda name, x: moved(x, device))
    made.options.update({n: moved(made.options[n], device) for n in ("q_seqlens", "kv_seqlens") if n in made.options})
    return made


def _build(case):
    g = torch.Generator().manual_seed(case.seed)

    def normal(*shape):
        return arrange(torch.randn(shape, generator=g, dtype=torch.float64).to(case.torch_dtype), case.layout)

    query = normal(case.B, case.HQ, case.SQ, case.D)
    key = normal(case.B, case.HK, case.SK, case.D)
    value = normal(case.B, case.HK, case.SK, case.dv)
    options = dict(enable_gqa=True) if case.HQ != case.HK else {}
    for name in case.options:
        options.update(OPTIONS[name](case, g))
    return Inputs(query, key, value, options)


def upstream(case, device=None):
    """Gradients that come down: grad_out (B, HQ, SQ, DV) and grad_lse (B, HQ, SQ). device: None = the default."""
    device = device or torch.get_default_device()
    g = torch.Generator().manual_seed(case.seed + 1)
    shape = (case.B, case.HQ, case.SQ)
    out = torch.randn(*shape, case.dv, generator=g, dtype=torch.float64, device="cpu").to(case.torch_dtype)
    lse = torch.randn(shape, generator=g, dtype=torch.float64, device="cpu").to(_f32_or_wider(case))
    return out.to(device), lse.to(device)
