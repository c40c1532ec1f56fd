"""Interleaved measurement: a ratio holds while the machine drifts."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.case import Case


@dataclass(frozen=True)
class Timing:
    """Seconds an outer iteration.

    Attributes:
        rounds: One mean a round, in the order measured.
        quality: What the workload is after, at the end.
        iterations: Outer iterations taken before ``quality`` was read.
    """

    rounds: tuple[float, ...]
    quality: float
    iterations: int

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> tuple[float, float]:
        """The quartiles."""
        low, _, high = statistics.quantiles(self.rounds, n=4)
        return low, high


def interleave(
    cases: Mapping[str, Case], *, rounds: int, block: int, warm_up: int, tell: Callable[[str], None] = lambda _: None
) -> tuple[dict[str, Timing], dict[str, Exception]]:
    """Run blocks of iterations of each case in turn, A B C C B A, and time each block.

    A case does not always follow the same other one, which leaves caches and free memory in a state of its own.

    Returns:
        The timings, and the errors of the cases that came to one.
    """
    taken: dict[str, list[float]] = {name: [] for name in cases}
    broken: dict[str, Exception] = {}
    for number in range(rounds + 1):
        tell(f"round {number} of {rounds}" if number else "warming up")
        for name, case in reversed(cases.items()) if number % 2 else cases.items():
            if name in broken:
                continue
            times = block if number else warm_up
            start = time.perf_counter()
            try:
                case.run(times)
            except Exception as error:
                broken[name] = error
                continue
            if number:
                taken[name].append((time.perf_counter() - start) / block)
        if not number:
            # What libraries hold once they are warm is not looked through again at every collection, in others' time.
            gc.collect()
            gc.freeze()
    gc.unfreeze()
    timings = {
        name: Timing(tuple(taken[name]), case.quality(), 1 + warm_up + rounds * block)
        for name, case in cases.items()
        if name not in broken
    }
    return timings, broken


def ratio(a: Timing, b: Timing) -> float:
    """The median of the ratios of rounds, which were measured one after the other."""
    return statistics.median(x / y for x, y in zip(a.rounds, b.rounds, strict=True))
