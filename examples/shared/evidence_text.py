"""How the page of evidence writes numbers, tables and comparisons."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from shared.evidence_tables import Chosen, Test, corrected
from shared.pages import mean_and_error, number


def percent(values: Sequence[float]) -> str:
    """Return mean and standard error in percent; the mean alone for one seed, a dash for none."""
    if len(values) < 2:
        return f"{100 * values[0]:.1f} %".replace(" ", "&nbsp;") if values else "-"
    return number(values, percent=True)


def plain(values: Sequence[float], digits: int = 2) -> str:
    """Return mean and standard error as they are."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else "-"
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f} ± {error:.{digits}f}".replace(" ", "&nbsp;")


def rate(chosen: Chosen) -> str:
    """Return the chosen rate, with a star if it is the smallest or the largest of those that were tried."""
    return f"{chosen.cell.rate:g}{'*' if chosen.at_the_edge else ''}"


def points(test: Test) -> str:
    """Return a difference in points of accuracy with its standard error."""
    return f"{100 * test.difference:+.1f} ± {100 * test.error:.1f}".replace(" ", "&nbsp;")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; all columns but the first are right-aligned. An empty one says so."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if not lines:
        return "No cell of this table has ended yet.\n"
    return "\n".join([f"| {' | '.join(head)} |", "| --- " + "| ---: " * (len(head) - 1) + "|", *lines]) + "\n"


def family(tests: Mapping[str, Test | None]) -> dict[str, tuple[Test, float]]:
    """Return the tests that could be made, with their p-values corrected by Holm's method over all of them."""
    made = {name: test for name, test in tests.items() if test is not None}
    values = corrected(made)
    return {name: (test, values[name]) for name, test in made.items()}


def difference(tests: Mapping[str, tuple[Test, float]], name: str) -> tuple[str, str]:
    """Return the cells of a comparison: difference in points, corrected p-value."""
    if name not in tests:
        return "", ""
    test, p = tests[name]
    return points(test), f"{p:.2g}"


def significant(tests: Mapping[str, tuple[Test, float]], sign: int) -> list[str]:
    """Return the names of the tests whose difference has the sign and whose corrected p-value is below 5 %."""
    return [name for name, (test, p) in tests.items() if sign * test.difference > 0 and p < 0.05]


def listed(names: Sequence[str]) -> str:
    """Return names as a list in a sentence."""
    if len(names) < 2:
        return names[0] if names else "none"
    return f"{'; '.join(names[:-1])} and {names[-1]}"
