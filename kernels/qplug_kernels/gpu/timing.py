"""How long a call takes on a GPU: CUDA graphs of many calls over weights that no cache holds.

A kernel of a few microseconds is shorter than its launch from Python, so calls are captured and
replayed. A linear in a model finds none of its weights in the cache, so calls take turns over
copies of them that are larger than any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import median

import torch
from torch import Tensor

CALLS = 20
"""Fewest calls of a graph."""

COLD = 256 << 20
"""Bytes of weights that take turns: four times the largest cache of a card (60 MB, H200)."""

WARM = 3
"""Replays before the clock counts: clocks rise, pages and code arrive."""

REPLAYS = 9

NOISY = 0.05
"""The spread above which a median is measured again, and above which it is marked."""

Call = Callable[[], object]
Clock = Callable[[Sequence[Call]], list[float]]
"""Runs calls several times; returns seconds of one call, of each time."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Times of one call.

    Attributes
    ----------
    seconds
        Their median.
    spread
        The longest less the shortest, of the median.
    """

    seconds: float
    spread: float

    @property
    def noisy(self) -> bool:
        """Whether times differ too much for their median to mean much."""
        return self.spread > NOISY

    @staticmethod
    def of(times: Sequence[float]) -> Measured:
        """Reduce times to their median and spread."""
        middle = median(times)
        return Measured(middle, (max(times) - min(times)) / middle if middle else 0.0)


def rotate(call: Callable[[Sequence[Tensor]], object], tensors: Sequence[Tensor]) -> list[Call]:
    """Return calls that take turns over copies of `tensors`, `CALLS` of them at least.

    All tensors of a kernel together are rotated, whether it reads them all or not.
    """
    nbytes = max(1, sum(tensor.nbytes for tensor in tensors))
    on_cuda = any(tensor.device.type == "cuda" for tensor in tensors)
    count = COLD // nbytes + 1 if on_cuda else 2
    copies = [tensors] + [[tensor.clone() for tensor in tensors] for _ in range(count - 1)]

    def bind(operands: Sequence[Tensor]) -> Call:
        return lambda: call(operands)

    return list(islice(cycle([bind(operands) for operands in copies]), max(CALLS, count)))


def graph_clock(calls: Sequence[Call]) -> list[float]:
    """Capture calls in a CUDA graph, replay it, and time the replays by events."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()  # what a kernel compiles, tunes or allocates at its first call
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Not `torch.cuda.graph`, which collects garbage and gives memory back: 0.1 s for each graph.
    with torch.cuda.stream(side):
        graph.capture_begin()
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    for _ in range(WARM):
        graph.replay()
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3 / len(calls))
    return times


def measure(calls: Sequence[Call], clock: Clock = graph_clock) -> Measured:
    """Time calls; once more where times differ too much, and take the steadier of the two."""
    first = Measured.of(clock(calls))
    if not first.noisy:
        return first
    return min(first, Measured.of(clock(calls)), key=lambda measured: measured.spread)
