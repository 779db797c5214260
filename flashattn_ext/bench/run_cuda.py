"""The measurement on a GPU: by the device's own clock, or for the cases of the host until a call returns.

A round queues one sample of every peer, in random order, while the device is kept busy; so it then runs them one after
the other without waiting for the host. Reported is what run.py reports: medians over the rounds, ratios within a round.
"""

import math
import random
import time
import warnings

import torch

from . import ceilings_cuda, run
from .cases import Case, Inputs, draw
from .check import Reference
from .peers import Peer
from .run import MIN_ROUNDS, Result, Sampled

SAMPLE_SECONDS = 3e-4  # calls of one sample take about so long together, or one call if that takes longer
MOST_CALLS = 10
FIRST_SLEEP = 1 << 20  # cycles that the device is kept busy for at first; doubled as long as the host is slower
LONGEST_SLEEP = 1 << 28
HOST_CALLS = 100  # of a burst: fewer than the device's queue holds
HOST_BURSTS = 5   # of a round, which gives the fastest


class Turn(run.Turn):
    """The same on a device; a sample is queued, of as many calls as _time_device decides."""

    def __init__(self, peer: Peer, bind) -> None:
        super().__init__(peer, bind)
        self.repeats = 1  # calls is how many one of the runs has

    def first_call(self):
        start = time.perf_counter()
        value, _ = super().first_call()
        torch.cuda.synchronize()
        return value, time.perf_counter() - start

    def warm_up(self) -> None:
        """The first call was that."""

    def sample(self) -> tuple:
        """Queues the calls of a sample: the events before and after."""
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        for _ in range(self.repeats):
            for one in self.runs:
                one()
        after.record()
        return before, after

    def seconds(self, before, after) -> float:
        """Of one call, of a sample that has run."""
        return before.elapsed_time(after) / 1e3 / (self.repeats * self.calls)


class GraphTurn(Turn):
    """The same in a CUDA graph of one call for each of the inputs, as a server runs its decode."""

    def warm_up(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.runs[0]()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for one in self.runs:
                one()
        self.calls, self.bound, self.runs = len(self.runs), self.runs, [self.graph.replay]
        self.graph.replay()


def measure_case(case: Case, peers: list[Peer], rounds: int, seconds: float, seed: int = 0) -> Result:
    """As run.measure_case; a case that the device's memory does not hold is left out."""
    peers = [peer for peer in peers if peer.concerns(case)]
    try:
        return _measured(case, peers, rounds, time.perf_counter() + seconds, seed)
    except torch.cuda.OutOfMemoryError as error:
        return Result(case, {peer.name: Sampled(skipped=str(error)) for peer in peers}, peers[0].name)
    finally:
        torch.cuda.empty_cache()


def _within_memory(what: str, function, *arguments):
    """What function returns; an error for want of memory says for what."""
    try:
        return function(*arguments)
    except torch.cuda.OutOfMemoryError:
        raise torch.cuda.OutOfMemoryError(f"the device's memory is too small for {what}") from None


def _measured(case: Case, peers: list[Peer], rounds: int, deadline: float, seed: int) -> Result:
    generator = torch.Generator("cuda").manual_seed(seed)
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    inputs = [_within_memory("the inputs", draw, case, generator) for _ in range(run.copies(case, cache))]
    result = Result(case, {}, peers[0].name)
    turns = _prepared(case, peers, inputs, result)
    if not turns:
        return result
    order = random.Random(seed)
    if case.host:
        _time_host(case, turns, rounds, order, result)
    else:
        _time_device(turns, rounds, deadline, order, result)
    return result


def _prepared(case: Case, peers: list[Peer], inputs: list[Inputs], result: Result) -> list[Turn]:
    """The turns of the peers that can be timed."""
    reference = _within_memory("the check", Reference, case, inputs[0])
    kind = GraphTurn if case.bound == "memory" else Turn
    turns = []
    for peer in peers:
        sampled = result.peers[peer.name] = Sampled()
        turn = _within_memory(peer.label, run.prepare, peer, case, inputs, reference, sampled, peer is peers[0],
                              math.inf, kind)
        if turn is not None:
            turns.append(turn)
    return turns


def _time_device(turns: list[Turn], rounds: int, deadline: float, order: random.Random, result: Result) -> None:
    sleep = FIRST_SLEEP
    _, times = _round(turns, sleep)
    for turn, seconds in zip(turns, times):
        turn.repeats = min(MOST_CALLS, max(1, math.ceil(SAMPLE_SECONDS / (seconds * turn.calls))))
    taken = 0
    while taken < rounds and (taken < MIN_ROUNDS or time.perf_counter() < deadline):
        order.shuffle(turns)
        kept_busy, times = _round(turns, sleep)
        if not kept_busy and sleep < LONGEST_SLEEP:
            sleep *= 2
            continue
        result.waited = result.waited or not kept_busy
        taken += 1
        for turn, seconds in zip(turns, times):
            result.peers[turn.peer.name].times.append(seconds)


def _round(turns: list[Turn], sleep: int) -> tuple[bool, list[float]]:
    """(did the device sleep until all was queued, the seconds of a call of each)."""
    torch.cuda._sleep(sleep)
    samples = [_within_memory(turn.peer.label, turn.sample) for turn in turns]
    kept_busy = not samples[0][0].query()
    torch.cuda.synchronize()
    return kept_busy, [turn.seconds(*sample) for turn, sample in zip(turns, samples)]


def _time_host(case: Case, turns: list[Turn], rounds: int, order: random.Random, result: Result) -> None:
    """Time until a call returns, of bursts that start on an idle device and do not fill its queue."""
    with torch.set_grad_enabled(case.op == "host_grad"):
        for _ in range(rounds):
            fastest = {turn.peer.name: math.inf for turn in turns}
            for _ in range(HOST_BURSTS):
                order.shuffle(turns)
                for turn in turns:
                    seconds = _within_memory(turn.peer.label, _burst, turn.runs[0])
                    fastest[turn.peer.name] = min(fastest[turn.peer.name], seconds)
            for name, seconds in fastest.items():
                result.peers[name].times.append(seconds)


def _burst(call) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(HOST_CALLS):
        call()
    return (time.perf_counter() - start) / HOST_CALLS


def measure_all(cases: list[Case], peers: list[Peer], rounds: int, seconds: float, on_case) -> tuple:
    """As run.measure_all. What torch warns of a backend that cannot do a case is not shown: the reason that the report
    gives is the error that follows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run.measure_all(cases, peers, rounds, seconds, on_case, measure_case, ceilings_cuda.measure)
