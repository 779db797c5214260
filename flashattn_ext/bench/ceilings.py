"""How fast this machine can multiply and read, measured here and now: what the cases are held against.

Fused multiply-adds in float32 and dot products in bfloat16 (where the processor has an instruction for them), GFLOP/s,
and reading memory, GB/s, each for the threads in use. The C core measures them with loops of its own; without it
torch's matrix product and sum stand in, which stay below the true ceilings (and so make the shares look larger).
`method` says which.
"""

import dataclasses
import time

import torch

from .cases import Case

SECONDS = 0.4  # spent on each figure


@dataclasses.dataclass
class Ceilings:
    threads: int
    fma_gflops: float
    dot_bf16_gflops: float  # 0: no such instruction
    read_gbs: float
    method: str

    def of(self, case: Case) -> float | None:
        """The ceiling of a case in its own unit, GFLOP/s or GB/s; None for one that neither limits."""
        if case.bound == "memory":
            return self.read_gbs
        if case.bound == "fma":
            return (case.dtype == "bf16" and self.dot_bf16_gflops) or self.fma_gflops
        return None

    def best(self, other: "Ceilings") -> "Ceilings":
        """The higher of two measurements, figure by figure: the clock moves, a ceiling is the most that was seen."""
        names = ("fma_gflops", "dot_bf16_gflops", "read_gbs")
        return dataclasses.replace(self, **{name: max(getattr(self, name), getattr(other, name)) for name in names})

    def describe(self) -> str:
        bf16 = f"{self.dot_bf16_gflops:.0f} GFLOP/s bfloat16, " if self.dot_bf16_gflops else ""
        return (f"ceilings with {self.threads} threads ({self.method}): {self.fma_gflops:.0f} GFLOP/s float32, {bf16}"
                f"{self.read_gbs:.1f} GB/s read")


def best_of(function, seconds: float = SECONDS) -> float:
    """Shortest time of a call, in seconds; calls for so long, at least twice."""
    function()
    shortest, spent, calls = float("inf"), 0.0, 0
    while spent < seconds or calls < 2:
        start = time.perf_counter()
        function()
        elapsed = time.perf_counter() - start
        shortest, spent, calls = min(shortest, elapsed), spent + elapsed, calls + 1
    return shortest


def _matrix_product() -> float:
    n = 1024
    a, b, out = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    return 2 * n**3 / best_of(lambda: torch.mm(a, b, out=out)) / 1e9


def _sum() -> float:
    x = torch.randn(64 << 20)  # 256 MiB, more than any cache it should not sit in
    return x.numel() * 4 / best_of(lambda: x.sum()) / 1e9


def measure() -> Ceilings:
    """The ceilings of torch.get_num_threads() threads. Takes a second or two."""
    threads = torch.get_num_threads()
    try:
        from flashattn_ext import _C
    except ImportError:
        return Ceilings(threads, _matrix_product(), 0.0, _sum(), "torch.mm in float32, torch.sum over 256 MiB")
    found = _C.ceilings(threads)
    return Ceilings(threads, found["fma_gflops"], found["dot_bf16_gflops"], found["read_gbs"], "loops of the C core")
