"""What a GPU's cases are held against: a large matrix product of torch in bfloat16, and reading memory."""

import dataclasses

import torch

from .cases import Case

SIZE = 8192
READ_BYTES = 1 << 30
CALLS = 10


@dataclasses.dataclass
class Ceilings:
    product_gflops: float
    read_gbs: float
    method: str = "torch.mm of 8192 x 8192 in bfloat16, torch.sum over 1 GiB"

    def of(self, case: Case) -> float | None:
        """The ceiling of a case in its own unit, GFLOP/s or GB/s; None for one that neither limits. Of float32 there is
        none: its products may be split over several of another type."""
        if case.bound == "memory":
            return self.read_gbs
        return self.product_gflops if case.bound == "fma" and case.dtype != "f32" else None

    def best(self, other: "Ceilings") -> "Ceilings":
        """The higher of two measurements, figure by figure."""
        return Ceilings(max(self.product_gflops, other.product_gflops), max(self.read_gbs, other.read_gbs))

    def describe(self) -> str:
        return (f"ceilings ({self.method}): {self.product_gflops / 1e3:.0f} TFLOP/s bfloat16, "
                f"{self.read_gbs:.0f} GB/s read")


def measure() -> Ceilings:
    """Takes a tenth of a second and at most 1 GiB of the device's memory."""
    a, b = (torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = 2 * SIZE**3 / _shortest(lambda: torch.mm(a, b)) / 1e9
    x = torch.randn(READ_BYTES // 4, device="cuda")
    return Ceilings(product, READ_BYTES / _shortest(x.sum) / 1e9)


def _shortest(function) -> float:
    """Seconds of the fastest of a few calls, on the device."""
    function()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(CALLS + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize()
    return min(a.elapsed_time(b) for a, b in zip(events, events[1:])) / 1e3
