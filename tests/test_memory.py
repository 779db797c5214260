"""Memory: what a call may take beyond its inputs and outputs, measured as the process's peak and read from its plan."""

import mmap
import os
import subprocess
import sys

import pytest
import torch

import flashattn_ext as fa
from conftest import ISAS
from flashattn_ext import _C

MiB = 1 << 20

CHILD = """
import sys
import torch
import flashattn_ext as fa

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024

torch.set_num_threads(2)
torch.manual_seed(0)
# Once small, so that code and thread pools are there.
small = torch.randn(1, 1, 300, 64, requires_grad=True)
fa.scaled_dot_product_attention(small, small, small, dropout_p=0.1).sum().backward()
{setup}
before = status("VmRSS")
{call}
# The high-water mark covers whatever came before too: the difference can only be too large.
print(status("VmHWM") - before)
"""


def peak(setup, call):
    """Bytes by which the peak of a fresh process passes what it held just before the call."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    environment.pop("FLASHATTN_EXT_ISA", None)
    done = subprocess.run([sys.executable, "-c", CHILD.format(setup=setup, call=call)], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
class TestPeak:
    @pytest.mark.slow
    def test_forward_of_131072_tokens(self):
        """Causal, one head, D 64: under 200 MiB more than inputs and output. Its scores would take 64 GiB."""
        S, D = 131072, 64
        extra = peak(f"q, k, v = torch.randn(3, 1, 1, {S}, {D}).unbind()",
                     "out = fa.scaled_dot_product_attention(q, k, v, is_causal=True)\n"
                     "assert torch.isfinite(out[0, 0, ::1001]).all()")
        output = S * D * 4
        assert extra - output < 200 * MiB, f"{(extra - output) / MiB:.0f} MiB beyond inputs and output"

    def test_no_matrix_of_scores_forward_or_backward(self):
        """S = 8192: one byte a score would be 64 MiB. Allowed: three gradients, their fp32 sums, and 32 MiB of noise.

        One process for all, as the high-water mark only grows: the first that is too much is the one told."""
        S, D = 8192, 32
        setup = f"""
q, k, v = torch.randn(3, 1, 1, {S}, {D}).requires_grad_().unbind()
padding = torch.arange({S})[None] < {S} - 192
ways = {{
    "causal": dict(is_causal=True),
    "padding": dict(attn_mask=padding),
    "expanded padding": dict(attn_mask=padding.expand(1, 1, {S}, {S})),
    "bias with gradient": dict(attn_mask=torch.zeros({S}, 1, requires_grad=True)),
    "dropout": dict(dropout_p=0.2),
    "the rest": dict(alibi_slopes=torch.ones(1), softcap=2.0, window=(3000, None), sinks=torch.zeros(1)),
}}
"""
        call = f"""
for name, options in ways.items():
    torch.autograd.grad(fa.scaled_dot_product_attention(q, k, v, **options).sum(), (q, k, v))
    extra = status("VmHWM") - before
    assert extra < {8 * S * D * 4 + 32 * MiB}, f"{{name}}: {{extra >> 20}} MiB"
"""
        assert peak(setup, call) > 0

    def test_broadcast_inputs_are_not_copied(self):
        """64 heads read one K and V through a stride of 0: a copy of either would be 64 MiB."""
        extra = peak("q = torch.randn(1, 64, 4, 64); k = torch.randn(1, 1, 4096, 64).expand(1, 64, 4096, 64)",
                     "fa.scaled_dot_product_attention(q, k, k)")
        assert extra < 32 * MiB, f"{extra / MiB:.0f} MiB"

    def test_a_strided_view_is_not_copied(self):
        """K and V as views into a packed (B, S, 3, H, D) buffer: copies would be 32 MiB each."""
        extra = peak("packed = torch.randn(1, 8192, 3, 16, 64)\n"
                     "_, k, v = (x.transpose(1, 2) for x in packed.unbind(2))\n"
                     "q = torch.randn(1, 16, 4, 64)", "fa.scaled_dot_product_attention(q, k, v)")
        assert extra < 24 * MiB, f"{extra / MiB:.0f} MiB"


# ---- plans -----------------------------------------------------------------------------------------------------------

DIMS = [(1, 1), (16, 16), (64, 64), (65, 63), (128, 128), (192, 128), (256, 256), (512, 512),
        (512, 1), (1, 512), (500, 301)]
SHAPES = [(1, 1, 1, 1 << 20, 1 << 20), (8, 32, 8, 1, 1 << 17), (1, 64, 1, 1, 1 << 24),
          (2, 12, 12, 2048, 2048), (64, 16, 2, 7, 600),
          (1, 1, 1, 3, 5), (1, 2, 1, 64, 1 << 22), (512, 128, 1, 1, 4096)]
OPTIONS = [dict(), dict(window_right=0), dict(mask_dtype="bool", softcap=3.0, dropout_p=0.1),
           dict(mask_dtype="float32", has_sinks=True, has_alibi=True, window_left=100)]


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("threads", [1, 2, 64])
def test_forward_workspace_is_at_most_2_mib_a_thread(isa, dtype, threads):
    """Whatever the length, head dimension, options or instruction set."""
    for shape in SHAPES:
        for dims in DIMS:
            for options in OPTIONS:
                plan = _C.plan("forward", dtype, *shape, *dims, threads=threads, **options)
                seen = f"{plan['kernel']} {shape} {dims} {options}: {plan['thread_bytes']} a thread"
                assert plan["thread_bytes"] <= 2 * MiB, seen
                assert plan["workspace"] <= 2 * MiB * threads, seen
                assert 1 <= plan["threads"] <= threads and plan["tasks"] >= 1, seen


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("threads", [1, 2, 64])
def test_backward_workspace_is_at_most_its_outputs_and_2_mib_a_thread(isa, dtype, threads):
    """The outputs counted in fp32: gradients of query, key, value, and of the mask where it is asked for."""
    for B, HQ, HK, SQ, SK in SHAPES:
        for D, DV in DIMS:
            for options in OPTIONS:
                plan = _C.plan("backward", dtype, B, HQ, HK, SQ, SK, D, DV, threads=threads, needs=7, **options)
                outputs = 4 * B * (HQ * SQ * D + HK * SK * (D + DV))
                seen = f"{plan['kernel']} {(B, HQ, HK, SQ, SK)} {(D, DV)} {options}: {plan['workspace']} bytes"
                assert plan["thread_bytes"] <= 2 * MiB, seen
                assert plan["workspace"] <= outputs + 2 * MiB * threads, f"{seen}, outputs {outputs}"


def test_splits_are_the_same_for_any_number_of_threads():
    """Splits and tiles come from the shape alone: that is why results do not depend on threads."""
    for shape in SHAPES:
        for op in ("forward", "backward"):
            plans = [_C.plan(op, "float32", *shape, 64, 64, threads=threads) for threads in (1, 2, 7, 64)]
            for plan in plans[1:]:
                for field in ("kernel", "block_rows", "block_keys", "panels", "splits", "split_keys"):
                    assert plan[field] == plans[0][field], f"{op} {shape}: {field}"


# ---- 64-bit offsets --------------------------------------------------------------------------------------------------


def test_offsets_past_two_to_the_31_elements():
    """Rows 2^30 elements apart: the last one starts past 2^32. Only the rows' own pages are touched."""
    S, D, far = 5, 8, 1 << 30
    query, key, value = torch.randn(3, 1, 1, S, D).bfloat16().unbind()
    try:
        space = mmap.mmap(-1, 2 * ((S - 1) * far + D))
    except OSError:
        pytest.skip("this machine does not hand out 8 GiB of address space")
    wide = torch.frombuffer(space, dtype=torch.bfloat16).as_strided((1, 1, S, D), (0, 0, far, 1))
    want = fa.scaled_dot_product_attention(query, key, value, is_causal=True)
    for which in range(3):
        given = [query, key, value]
        given[which] = wide.copy_(given[which])
        assert torch.equal(fa.scaled_dot_product_attention(*given, is_causal=True), want), which


@pytest.mark.big
def test_more_than_two_to_the_31_elements():
    """An output of 2^31 + 2^20 elements, compared where a 32-bit index would wrap."""
    rows = (1 << 22) + (1 << 11)
    value = torch.randn(1, 1, 1, 512).bfloat16()
    out = fa.scaled_dot_product_attention(torch.zeros(1, 1, 1, 1).bfloat16().expand(1, 1, rows, 1),
                                          torch.zeros(1, 1, 1, 1).bfloat16(), value)
    assert out.numel() > 1 << 31
    for at in (0, 1 << 21, (1 << 22) - 1, 1 << 22, rows - 1):
        assert torch.equal(out[0, 0, at], value[0, 0, 0])
