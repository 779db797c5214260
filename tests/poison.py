"""Poison for what must not be read or left unwritten: NaN, infinity and huge values where a kernel may not look."""

import contextlib
import ctypes
import math

import torch

M_PERTURB = -6  # mallopt(3): fill memory with a byte when it is handed out, and with another when it is freed
VALUES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "huge": None}


def value(kind, dtype):
    """The poison of that kind; huge is the largest finite number of the dtype."""
    return torch.finfo(dtype).max if kind == "huge" else VALUES[kind]


def fill_malloc(byte=0x80):
    """From here on glibc hands out memory full of ~byte: 0x7f7f... is 3.4e38 in float32 and bfloat16, NaN in float16,
    1.4e306 in float64. A result that was not written, or a workspace that was not set, cannot pass for zeros.
    byte=0 turns it off. Returns whether this C library can."""
    try:
        return bool(ctypes.CDLL(None).mallopt(M_PERTURB, byte))
    except (AttributeError, OSError):
        return False


@contextlib.contextmanager
def free_memory(*shapes, dtype=torch.float32, device=None):
    """Allocates NaN tensors of these shapes and frees them before the block, so that the next allocation of that size
    is likely to be full of NaN."""
    full = [torch.full(shape, math.nan, dtype=dtype, device=device) for shape in shapes for _ in range(4)]
    del full
    yield


def hidden_keys(inputs, see, kind="nan"):
    """A copy of inputs where every key and value row that no query of its group sees holds poison.

    see: bool, broadcastable to (B, HQ, SQ, SK)."""
    B, HQ, SQ = inputs.query.shape[:3]
    HK, SK = inputs.key.shape[1:3]
    seen = see.expand(B, HQ, SQ, SK).any(2).view(B, HK, HQ // HK, SK).any(2)
    assert not seen.all(), "the case hides no key: nothing to poison"
    return _replace(inputs, kind, key=~seen, value=~seen)


def hidden_rows(inputs, q_seqlens, kind="nan"):
    """A copy of inputs where the query rows past q_seqlens hold poison."""
    B, HQ, SQ = inputs.query.shape[:3]
    past = torch.arange(SQ, device=q_seqlens.device)[None, :] >= q_seqlens.reshape(B, 1)
    return _replace(inputs, kind, query=past[:, None].expand(B, HQ, SQ))


def _replace(inputs, kind, **rows):
    def change(name, x):
        if name not in rows:
            return x
        copy = x.clone()
        copy[rows[name].to(x.device)] = value(kind, x.dtype)
        return copy

    return inputs.map(change)
