"""The measurement on a CPU: in one process, the peers in turn within each round, medians over the rounds.

A round gives each peer one sample: the mean time of a few calls. Ratios are taken within a round and their median is
reported, so that a machine that slows down for a while slows both sides of a ratio. run_cuda.py does the same on a GPU.
"""

import dataclasses
import math
import os
import statistics
import time

import torch

from . import ceilings
from .cases import Case, Inputs, draw
from .check import PEER_SLACK, Reference
from .peers import OWN, Peer

SAMPLE_SECONDS = 0.01  # calls of one sample take about so long together, or one call if that takes longer
MIN_ROUNDS = 3
SLOW_SECONDS = 1.0  # a peer that needs longer for a call, and longer than the case has, is left out
REDRAW_BYTES = 16 << 20  # larger inputs are drawn once a case, smaller ones anew each round
COLD_BYTES = (64 << 20, 512 << 20)  # least and most of the key/value copies that a decode case cycles through


@dataclasses.dataclass
class Sampled:
    """What was found out about one peer in one case. Times are seconds a call, one for each round."""

    times: list[float] = dataclasses.field(default_factory=list)
    error: float | None = None   # largest error as a multiple of the bar; see check.Reference
    skipped: str | None = None   # why there are no times

    @property
    def median(self) -> float:
        return statistics.median(self.times)


@dataclasses.dataclass
class Result:
    case: Case
    peers: dict[str, Sampled]
    subject: str  # whose row it is: the first peer
    waited: bool = False  # a GPU may have waited for the host within samples, whose times are too long then

    def ratio(self, of: str) -> list[float] | None:
        """Speed of the subject over that of a peer, round by round; None where one was not timed."""
        ours, theirs = self.peers.get(self.subject), self.peers.get(of)
        if not (ours and theirs and ours.times and theirs.times):
            return None
        return [b / a for a, b in zip(ours.times, theirs.times)]

    def best_peer(self) -> str | None:
        """The fastest of the others whose result was right."""
        timed = {name: p.median for name, p in self.peers.items() if name not in (self.subject, OWN) and p.times}
        return min(timed, key=timed.get) if timed else None

    @property
    def wrong(self) -> bool:
        """Whether the subject's own result missed the bar."""
        error = self.peers[self.subject].error
        return error is not None and not error <= 1


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def cache_bytes() -> int:
    """Size of the last cache of the first processor; 32 MiB where the system does not tell."""
    base = "/sys/devices/system/cpu/cpu0/cache"
    sizes = []
    try:
        for index in os.listdir(base):
            if index.startswith("index"):
                with open(f"{base}/{index}/size", encoding="ascii") as file:
                    text = file.read().strip()
                sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    except (OSError, ValueError, KeyError):
        pass
    return max(sizes, default=32 << 20)


class Turn:
    """One peer's part of a case: bound to the current inputs, and how many calls make a sample."""

    def __init__(self, peer: Peer, bind) -> None:
        self.peer, self.bind = peer, bind
        self.runs, self.calls = [], 1

    def take(self, inputs: list[Inputs]) -> None:
        self.runs = [self.bind(one) for one in inputs]

    def first_call(self):
        """(what it returned, seconds taken), cold."""
        start = time.perf_counter()
        value = self.runs[0]()
        return value, time.perf_counter() - start

    def warm_up(self) -> None:
        """Sets the number of calls of a sample from a warm call."""
        start = time.perf_counter()
        self.runs[-1]()
        elapsed = time.perf_counter() - start
        self.calls = max(1, len(self.runs) if elapsed < SAMPLE_SECONDS else 1, math.ceil(SAMPLE_SECONDS / elapsed))

    def sample(self) -> float:
        """Seconds of one call. Where calls are short, an untimed one first lets the threads of the last peer rest."""
        runs, n = self.runs, len(self.runs)
        if self.calls > 1:
            runs[-1]()
        start = time.perf_counter()
        for i in range(self.calls):
            runs[i % n]()
        return (time.perf_counter() - start) / self.calls


def measure_case(case: Case, peers: list[Peer], rounds: int, seconds: float, seed: int = 0) -> Result:
    """One case: check every peer's result once, then up to `rounds` rounds within about `seconds` (at least three)."""
    peers = [peer for peer in peers if peer.concerns(case)]
    deadline = time.perf_counter() + seconds
    generator = torch.Generator().manual_seed(seed)
    inputs = [draw(case, generator) for _ in range(copies(case, cache_bytes()))]
    reference = Reference(case, inputs[0])
    result = Result(case, {peer.name: Sampled() for peer in peers}, peers[0].name)
    turns = []
    for peer in peers:
        turn = prepare(peer, case, inputs, reference, result.peers[peer.name], own=peer is peers[0], seconds=seconds)
        if turn is not None:
            turns.append(turn)
    redraw = len(inputs) == 1 and case.bytes < REDRAW_BYTES
    for index in range(rounds):
        if index >= MIN_ROUNDS and time.perf_counter() > deadline:
            break
        if redraw and index:
            inputs = [draw(case, generator)]
            for turn in turns:
                turn.take(inputs)
        first = index % max(1, len(turns))
        for turn in turns[first:] + turns[:first]:
            result.peers[turn.peer.name].times.append(turn.sample())
    return result


def copies(case: Case, cache: int) -> int:
    """How many inputs a case cycles through. A model's decode finds each layer's keys and values in memory, not in a
    cache of the processor, so decode gets more of them than the last cache holds, which has so many bytes."""
    if case.bound != "memory":
        return 1
    low, high = COLD_BYTES
    return max(2, math.ceil(min(max(low, 2 * cache), high) / case.bytes))


def prepare(peer: Peer, case: Case, inputs: list[Inputs], reference: Reference, sampled: Sampled, own: bool,
            seconds: float, kind=Turn):
    """Opens, checks and warms up a peer: a turn of that kind, or None, with the reason in sampled, if it is not to be
    timed.

    A peer that needs longer for one call than the case has in all is left out, except torch's SDPA.
    """
    sampled.skipped = peer.refuses(case)
    if sampled.skipped:
        return None
    try:
        turn = kind(peer, peer.open(case, torch.get_num_threads()))
        turn.take(inputs)
        value, elapsed = turn.first_call()
        sampled.error = reference.error(peer.collect(value, case))
        if not own:
            sampled.skipped = _unfit(peer, sampled.error, elapsed, seconds)
        if sampled.skipped is None:
            turn.warm_up()
    except Exception as error:  # a peer of any make may fail in any way; ours may not
        if own:
            raise
        lines = str(error).strip().splitlines() or [""]
        sampled.skipped = f"{type(error).__name__}: {lines[0][:200]}"
    return turn if sampled.skipped is None else None


def _unfit(peer: Peer, error: float, elapsed: float, seconds: float) -> str | None:
    if not error <= PEER_SLACK:
        return f"its result is wrong: {error:.3g} times the error allowed"
    if elapsed > max(seconds, SLOW_SECONDS) and peer.name != "sdpa":
        return "a call takes over a second, longer than the case has (--seconds)"
    return None


def measure_all(cases: list[Case], peers: list[Peer], rounds: int, seconds: float, on_case, measure_case=measure_case,
                measure_ceilings=ceilings.measure) -> tuple:
    """All cases in about `seconds` -> (results, ceilings).

    on_case(case) is called before each case, on_case(None) at the end.
    """
    machine = measure_ceilings()
    end = time.perf_counter() + seconds
    results = []
    for index, case in enumerate(cases):
        on_case(case)
        share = max(0.0, end - time.perf_counter()) / (len(cases) - index)
        results.append(measure_case(case, peers, rounds, share, seed=index))
    on_case(None)
    return results, machine.best(measure_ceilings())
