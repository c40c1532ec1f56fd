"""Reads a grid: the rate that the validation part chooses, means over seeds, and paired tests."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from shared.evidence import Cell, Found, Outcome
from shared.pages import holm, mean_and_error


@dataclass(frozen=True)
class Chosen:
    """A method at the rate that the validation part chose.

    Attributes:
        cell: One of its cells; all share everything but the seed.
        outcomes: What each seed reached.
        rates: Mean validation accuracy of each rate, over the seeds that all rates have.
    """

    cell: Cell
    outcomes: Mapping[int, Outcome]
    rates: Mapping[float, float]

    def values(self, name: str) -> list[float]:
        """Return a number of all seeds."""
        return [outcome[name] for outcome in self.outcomes.values() if name in outcome]

    @property
    def at_the_edge(self) -> bool:
        """Whether the chosen rate is the smallest or the largest of several."""
        return len(self.rates) > 1 and self.cell.rate in (min(self.rates), max(self.rates))


def by_rate(found: Found, like: Cell) -> dict[float, dict[int, Outcome]]:
    """Return the outcomes of the cells that differ from ``like`` in rate and seed only."""
    table: dict[float, dict[int, Outcome]] = {}
    for cell, outcome in sorted(found.items(), key=lambda item: (item[0].rate, item[0].seed)):
        if replace(cell, rate=like.rate, seed=like.seed) == like:
            table.setdefault(cell.rate, {})[cell.seed] = outcome
    return table


def failures(found: Found, like: Cell) -> dict[float, int]:
    """Return for each rate how many seeds ended with an error."""
    counts = {rate: sum("failure" in o for o in seeds.values()) for rate, seeds in by_rate(found, like).items()}
    return {rate: count for rate, count in counts.items() if count}


def choose(found: Found, like: Cell, rates: Iterable[float], seeds: Sequence[int]) -> Chosen | None:
    """Choose among rates by the mean validation accuracy; a rate at which a seed failed is not chosen.

    Only seeds that all rates have count, so that every rate gets the same trials. None if there is no such seed.
    """
    table = by_rate(found, like)
    wanted = list(rates)
    if any(rate not in table for rate in wanted):
        return None
    shared = [seed for seed in seeds if all(seed in table[rate] for rate in wanted)]
    works = [rate for rate in wanted if shared and not any("failure" in table[rate][seed] for seed in shared)]
    if not works:
        return None
    means = {rate: statistics.fmean(table[rate][seed]["validation"] for seed in shared) for rate in works}
    best = max(works, key=means.__getitem__)
    return Chosen(replace(like, rate=best), {seed: table[best][seed] for seed in shared}, means)


def choose_by_first(
    found: Found, like: Cell, rates: Iterable[float], first: Sequence[int], seeds: Sequence[int]
) -> Chosen | None:
    """Return all seeds of a method that have ended, at the rate that :func:`choose` finds by the first of them."""
    searched = choose(found, like, rates, first)
    if searched is None:
        return None
    every = choose(found, searched.cell, [searched.cell.rate], seeds)
    return replace(every, rates=searched.rates) if every else searched


@dataclass(frozen=True)
class Test:
    """A paired comparison of two methods over the seeds that both have.

    Attributes:
        difference, error: Mean of the differences and its standard error.
        seeds: Number of pairs.
        p: Of the paired t-test, before any correction.
    """

    difference: float
    error: float
    seeds: int
    p: float


def compare(ours: Chosen, theirs: Chosen, name: str = "test") -> Test | None:
    """Compare two methods; None with fewer than two common seeds."""
    from scipy.stats import ttest_rel

    seeds = [seed for seed in ours.outcomes if seed in theirs.outcomes]
    if len(seeds) < 2:
        return None
    a, b = ([side.outcomes[seed][name] for seed in seeds] for side in (ours, theirs))
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean, error = mean_and_error(differences)
    p = float(ttest_rel(a, b).pvalue) if error > 0 else math.nan
    return Test(mean, error, len(seeds), p if not math.isnan(p) else float(mean == 0))


def corrected(tests: Mapping[str, Test]) -> dict[str, float]:
    """Return the p-values of a family of tests, corrected by Holm's method."""
    return dict(zip(tests, holm([test.p for test in tests.values()]), strict=True))
