"""The first section of the page of evidence: the answers, in numbers of the grid of Meta-Weight-Net."""

from __future__ import annotations

from collections.abc import Callable

from evidence import grid
from evidence.grid import MAIN, like
from evidence.meta_weight_net import WITH_GUIDE

from shared.evidence import Found
from shared.evidence_grid import at_best, over_rates, versus
from shared.evidence_tables import Test
from shared.evidence_text import points

SHORT = """## In short

Differences in points of test accuracy, mean over seeds and standard error; the tables below have the tests.
"""


def in_short(found: Found) -> str:
    """Return the answers to the questions of the page."""
    return SHORT + "\n" + "\n".join([*exactness(found), *gains(found), *lengths(found)]) + "\n"


def exactness(found: Found) -> list[str]:
    """The exact default against its own finite difference, each at its best rate and over all rates."""
    best = _each(lambda s: versus(at_best(found, like(s, "T1T2")), at_best(found, like(s, "FiniteDifference"))))
    over = _each(lambda s: versus(over_rates(found, like(s, "T1T2")), over_rates(found, like(s, "FiniteDifference"))))
    solved = _each(lambda s: versus(at_best(found, like(s, "CG")), at_best(found, like(s, "T1T2"))))
    return [
        *_line("Exact minus finite difference, each at its best upper rate", best),
        *_line("The same, in the mean over six upper rates", over),
        *_line("Conjugate gradients minus T1T2, each at its best upper rate", solved),
    ]


def gains(found: Found) -> list[str]:
    """What Meta-Weight-Net gains, by conjugate gradients and by the default, on every setting."""
    lines = []
    for method in ("T1T2(reuse)", "CG"):
        found_of = _each(
            lambda s, m=method: versus(at_best(found, like(s, m)), at_best(found, like(s, WITH_GUIDE))),
            (*MAIN, *grid.OTHERS),
        )
        lines += _line(f"{method} minus plain training on training and guide images", found_of)
    return lines


def lengths(found: Found) -> list[str]:
    """A larger guide set, and a longer unroll, for the exact default."""
    guide = _each(lambda s: versus(at_best(found, like(s, "T1T2")), at_best(found, like(s, "T1T2", 100, 1))))
    unroll = _each(lambda s: versus(at_best(found, like(s, "T1T2", 1_000, 5)), at_best(found, like(s, "T1T2"))))
    return [
        *_line("A guide set of 1,000 minus one of 100, T1T2", guide),
        *_line("Five lower steps to an upper one minus one, T1T2", unroll),
    ]


def _each(test: Callable[[str], Test | None], settings: tuple[str, ...] = MAIN) -> dict[str, Test]:
    """Return the tests of all settings that have one."""
    return {setting: made for setting in sorted(settings) if (made := test(setting)) is not None}


def _line(title: str, tests: dict[str, Test]) -> list[str]:
    texts = [f"{setting} {points(test)} ({test.seeds} seeds)" for setting, test in tests.items()]
    return [f"- {title}: {', '.join(texts)}."] if texts else []
