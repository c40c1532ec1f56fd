"""One way to compute one workload."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """One library's way to compute a workload, built and ready to run.

    Attributes:
        run: Takes so many outer iterations: the lower steps and one upper step each (a meta-batch for MAML).
        quality: The number that the workload is after, by now; a loss or an accuracy.
        evaluations: Takes one more iteration and counts the evaluations of losses; None if nobody asks.
        foreseen: The bytes that the library says it will hold at the most; None if it does not say.
    """

    run: Callable[[int], Any]
    quality: Callable[[], float]
    evaluations: Callable[[], float] | None = None
    foreseen: Callable[[], int] | None = None


def repeated(step: Callable[[], Any], quality: Callable[[], float]) -> Case:
    """Make a case of one outer iteration."""

    def run(times: int) -> None:
        for _ in range(times):
            step()

    return Case(run, quality)
