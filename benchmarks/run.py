"""Running a suite."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.case import Case
from benchmarks.libraries import builders
from benchmarks.measure import Timing, interleave, ratio
from benchmarks.suites import Suite


@dataclass(frozen=True)
class Verdict:
    """A bar, and what was measured."""

    case: str
    against: str
    ratio: float
    at_most: float

    @property
    def met(self) -> bool:
        return self.ratio <= self.at_most


@dataclass
class Results:
    """What came of a suite.

    Attributes:
        suite: The suite.
        timings: By case.
        evaluations: Loss evaluations an outer iteration, of the cases that count them.
        failures: Why other cases are missing.
        verdicts: On the bars whose cases were measured.
    """

    suite: Suite
    timings: dict[str, Timing] = field(default_factory=dict)
    evaluations: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)

    def ratio(self, case: str) -> float | None:
        """The time of a case over that of the reference."""
        reference = self.timings.get(self.suite.reference)
        return None if reference is None else ratio(self.timings[case], reference)


def run(suite: Suite, libraries: Iterable[str], *, quick: bool, tell: Callable[[str], None]) -> Results:
    """Build the cases of a suite, measure them in turn, and judge."""
    results = Results(suite)
    cases: dict[str, Case] = {}
    rounds, block = (3, max(suite.block // 4, 1)) if quick else (suite.rounds, suite.block)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library in libraries:
            for name, build in _methods(library, suite, results):
                tell(f"building {name}")
                try:
                    case = build(suite.workload())
                    case.run(1)
                except Exception as error:
                    results.failures[name] = _brief(error)
                else:
                    cases[name] = case
        warm_up = 1 if quick else suite.warm_up
        results.timings, broken = interleave(cases, rounds=rounds, block=block, warm_up=warm_up, tell=tell)
        for name, error in broken.items():
            results.failures[name] = _brief(error)
            del cases[name]
        for name, case in cases.items():
            if case.evaluations is not None:
                results.evaluations[name] = case.evaluations()
    for bar in suite.bars:
        there = [name for name in bar.against if name in results.timings]
        if bar.case in results.timings and there:
            fastest = min(there, key=lambda name: results.timings[name].median)
            found = ratio(results.timings[bar.case], results.timings[fastest])
            results.verdicts.append(Verdict(bar.case, fastest, found, bar.at_most))
    return results


def _methods(library: str, suite: Suite, results: Results) -> list[tuple[str, Callable[[Any], Case]]]:
    try:
        found = builders(library)
    except Exception as error:
        results.failures[library] = f"not available: {_brief(error)}"
        return []
    return [
        (f"{library} {method}", build)
        for family in suite.families
        for method, build in found.get(family, {}).items()
        if method not in suite.skipped
    ]


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:120]}"
