"""Peak memory of this process above a baseline, in bytes of resident memory (Linux)."""

import ctypes
import gc
import threading
import time
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def _status_bytes(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no line {field}")


def _give_back_freed_memory() -> None:
    """What the allocator holds of memory that was freed would serve what comes next, and hide it (glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class PeakMemory:
    """`start()`, work, then `extra()`: how far resident memory rose above what it was at `start()`.

    The kernel's own high-water mark is used where it can be reset (`method` is "high-water mark"); elsewhere a thread
    reads resident memory every 2 ms and can miss a shorter peak ("sampled"); without /proc there is no figure ("none").
    """

    def __init__(self) -> None:
        self.method = "none"
        self._base = 0
        self._peak = 0
        self._stop = threading.Event()

    def start(self) -> None:
        gc.collect()
        if not STATUS.exists():
            return
        _give_back_freed_memory()
        self._base = _status_bytes("VmRSS")
        try:
            CLEAR_REFS.write_text("5")
            self._base = _status_bytes("VmHWM")
            self.method = "high-water mark"
        except OSError:
            self.method = "sampled"
            threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while not self._stop.is_set():
            self._peak = max(self._peak, _status_bytes("VmRSS"))
            time.sleep(0.002)

    def extra(self) -> int | None:
        """Bytes above the baseline at the peak since `start()`; None where it cannot be measured."""
        if self.method == "none":
            return None
        self._stop.set()
        peak = self._peak if self.method == "sampled" else _status_bytes("VmHWM")
        return max(0, peak - self._base)
