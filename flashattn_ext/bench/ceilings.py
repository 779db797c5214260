"""How fast this machine can multiply and read, measured here and now: what the cases are held against.

Two figures: fused multiply-adds in float32, GFLOP/s, and reading memory, GB/s, each for the threads in use. The C core
measures both with loops of its own where it offers them; otherwise torch's matrix product and sum stand in, which stay
below the true ceilings (and so make the shares look larger). `*_method` says which.
"""

import dataclasses
import time

import torch

SECONDS = 0.4  # spent on each figure


@dataclasses.dataclass
class Ceilings:
    fma_gflops: float
    fma_method: str
    read_gbs: float
    read_method: str
    threads: int
    raw: dict

    def of(self, bound: str) -> float | None:
        """The ceiling of a case in its own unit, GFLOP/s or GB/s; None for a case that neither limits."""
        return {"fma": self.fma_gflops, "memory": self.read_gbs}.get(bound)


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


def _from_core() -> dict:
    try:
        from flashattn_ext import _C
    except ImportError:
        return {}
    return dict(_C.ceilings()) if hasattr(_C, "ceilings") else {}


def measure() -> Ceilings:
    """Both ceilings for torch.get_num_threads() threads. Takes about a second."""
    threads = torch.get_num_threads()
    raw = _from_core()
    fma = raw.get("fma_gflops") or (raw["fma_gflops_1t"] * threads if "fma_gflops_1t" in raw else None)
    read = raw.get("read_gbs")
    fma_method = "FMA loop of the C core" if fma else "torch.mm, float32"
    read_method = "read loop of the C core" if read else "torch.sum over 256 MiB"
    return Ceilings(fma or _matrix_product(), fma_method, read or _sum(), read_method, threads, raw)


def best(a: Ceilings, b: Ceilings) -> Ceilings:
    """The higher of two measurements, figure by figure: the clock moves, and a ceiling is the most that was seen."""
    return dataclasses.replace(a, fma_gflops=max(a.fma_gflops, b.fma_gflops), read_gbs=max(a.read_gbs, b.read_gbs))
