"""explain: the plan of a call, without running it."""

import dataclasses

import torch

from . import _C
from .sdpa import allows_tf32, check_scalars, check_tensors, normalise


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one call would do (fa_plan in csrc/fa.h). Sizes in bytes, flops with a multiply-add as 2.

    str(plan) is the report of several lines that explain prints.
    """

    kernel: str         # its name, as kernels() lists it
    kind: str           # scalar, panel (many query rows), rows (few query rows against many keys) or cuda
    why: str            # one sentence: why this kernel and these splits
    block_rows: int     # query rows of a tile
    block_keys: int     # keys of a tile
    panels: int         # tiles of query rows for one key/value head of one batch
    chunk_panels: int   # panels that share one pass over the keys
    splits: int         # parts the keys are cut into; does not depend on the threads
    split_keys: int     # keys of one part
    tasks: int          # units of parallel work; of cuda the blocks of the grid
    threads: int        # workers that would start; threads of a block
    stages: int         # of cuda: tiles of what is streamed that a block holds at a time
    thread_bytes: int   # scratch of one worker; shared memory of a block
    shared_bytes: int   # partial results
    workspace: int      # all scratch
    flops: float
    bytes: float        # every input read once, every output written once; of cuda the workspace both
    launches: list      # on a GPU: the kernels in the order of their start, each a dict of its name, blocks, threads,
                        # shared_bytes (of a block), registers, local_bytes (stack and spills of a thread) and
                        # resident_blocks (that a multiprocessor holds)
    report: str = dataclasses.field(repr=False)

    def __str__(self):
        return self.report + "".join(
            "launch     {name}: {blocks} blocks of {threads} threads, {resident_blocks} on a multiprocessor; "
            "{registers} registers and {local_bytes} bytes of stack a thread, {shared_bytes} bytes of shared memory a "
            "block\n"
            .format_map(launch) for launch in self.launches)


def explain(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False,
            window=None, softcap=0.0, sinks=None, alibi_slopes=None, q_seqlens=None, kv_seqlens=None, return_lse=False,
            backward=False):
    """Prints which kernel, tiles, splits and workspace scaled_dot_product_attention would use for these arguments, the
    FLOPs and bytes of the call, and why; returns it all as a Plan. Nothing is computed and no random number drawn.

    The arguments are those of scaled_dot_product_attention; tensors on the device "meta" will do. The plan depends on
    shapes, dtypes and options and on torch.get_num_threads(), never on values: lengths count as full, and inputs are
    taken as densely laid out. backward=True: the plan of the gradients instead, of those that require grad or, if none
    does, of query, key and value.

    Raises what the call itself would raise for these arguments.
    """
    check_tensors(query, key, value)
    check_scalars(dropout_p, scale, softcap)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.device.type not in ("cpu", "meta", *(("cuda",) if _C.build_info()["cuda"] else ())):
            raise RuntimeError(f"{name} is on {x.device}, but this build plans for the CPU only: cpu or meta is "
                               "allowed")
    needs = sum(1 << place for place, x in enumerate((query, key, value, attn_mask, sinks))
                if isinstance(x, torch.Tensor) and x.requires_grad)
    # On meta tensors nothing of this computes. dropout_p is left out, as it would draw a seed.
    (q, k, v, mask, *_, left, right, bottom_right, _, _), _, _ = normalise(
        *map(_on_meta, (query, key, value, attn_mask)), 0.0, is_causal, scale, enable_gqa, window, softcap,
        *map(_on_meta, (sinks, alibi_slopes, q_seqlens, kv_seqlens)), device_type=query.device.type)
    _check_agreement(q, k, v)
    plan = Plan(**_C.plan(
        "backward" if backward else "forward", _name(q.dtype), *q.shape[:2], k.shape[1], q.shape[2], k.shape[2],
        q.shape[3], v.shape[3], window_left=left, window_right=right, bottom_right=bottom_right, softcap=float(softcap),
        dropout_p=float(dropout_p), mask_dtype=None if mask is None else _name(mask.dtype),
        mask_shape=None if mask is None else list(mask.shape), has_sinks=sinks is not None,
        has_alibi=alibi_slopes is not None, allow_tf32=allows_tf32(query), needs=needs or 7,
        threads=torch.get_num_threads(),
        device=query.device.index if query.device.type == "cuda" else -1))
    print(plan)
    return plan


def _on_meta(x):
    return x.detach().to("meta") if type(x) in (torch.Tensor, torch.nn.Parameter) else x


def _check_agreement(q, k, v):
    """What the plan, one number for each size, cannot see."""
    if not q.dtype == k.dtype == v.dtype:
        raise RuntimeError(f"query, key and value must have the same dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if q.shape[3] != k.shape[3] or k.shape[2] != v.shape[2]:
        raise RuntimeError("query and key must have the same head dimension, key and value the same length, got shapes "
                           f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}")


def _name(dtype):
    return str(dtype).removeprefix("torch.")
