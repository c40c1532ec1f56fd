"""The grid of Meta-Weight-Net in ``docs/evidence.md``: which cells, and in which order.

    PYTHONPATH=examples python -m evidence.grid [--processes N] [--quick] [--render]

The blocks come in the order in which they are needed: a run that is
cut off has answered the first questions. Rates are chosen by the validation part, each method among equally many.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

from evidence import meta_weight_net as task
from evidence.meta_weight_net import PLAIN, STEPS, WITH_GUIDE
from shared.evidence import Cell, Found
from shared.evidence_command import Grid
from shared.evidence_tables import Chosen, choose

MAIN, OTHERS = ("noise 40 %", "IF 100"), ("noise 20 %", "noise 60 %", "IF 50", "IF 200")
FIRST, LAST = (0, 1, 2), (3, 4)
RATES = {0: (0.05, 0.1, 0.2, 0.4), 1: (1e-4, 3e-4, 1e-3), 5: (3e-4, 1e-3, 3e-3)}  # by unroll; 0: plain training
WIDE = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
ATTACHED = "T1T2, losses attached"
UNDAMPED = ("CG, no damping", "CG, damping 0.1")
CHEAP = ("T1T2", "FiniteDifference", "SAMA", "Unrolled(1)")
COSTLY = ("T1T2(reuse)", "CG", "CG, Gauss-Newton", "Neumann")
METHODS = (*CHEAP, *COSTLY)
SMALL_GUIDE = ("T1T2", "FiniteDifference", "SAMA", "CG", "Unrolled(1)")
SENSITIVE = (*CHEAP, ATTACHED)
BASELINES = ((PLAIN, 0), (WITH_GUIDE, 1_000))


def like(setting: str, method: str, guide: int = 1_000, unroll: int = 1, steps: int = STEPS) -> Cell:
    """Return a cell of a method, whose rate and seed are to be replaced."""
    plain = method in (PLAIN, WITH_GUIDE)
    return Cell(setting, 0 if method == PLAIN else guide, 0 if plain else unroll, method, 0.0, steps, 0)


def spread(cells: Sequence[Cell], seeds: Sequence[int], rates: Sequence[float] | None = None) -> Iterator[Cell]:
    """Give each cell all rates and seeds, seed by seed."""
    for seed, cell in product(seeds, cells):
        yield from (replace(cell, rate=rate, seed=seed) for rate in rates or RATES[cell.unroll])


def baselines(settings: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    return list(spread([like(s, method, guide) for s, (method, guide) in product(settings, BASELINES)], seeds))


def full(found: Found, methods: Sequence[str], unroll: int, seeds: Sequence[int]) -> list[Cell]:
    """Methods with the large guide set on the two main settings; plain training with the first methods."""
    cells = [like(setting, method, unroll=unroll) for setting, method in product(MAIN, methods)]
    return [*(baselines(MAIN, seeds) if unroll == 1 and methods == CHEAP else ()), *spread(cells, seeds)]


def undamped(found: Found, seeds: Sequence[int]) -> list[Cell]:
    """Conjugate gradients on the Hessian of a batch as it is, at one rate: does the run end?"""
    return list(spread([like(setting, method) for setting, method in product(MAIN, UNDAMPED)], seeds, RATES[1][1:2]))


def small_guide(found: Found, seeds: Sequence[int]) -> list[Cell]:
    """A guide set of 100 images, both unroll lengths."""
    cells = [like(s, method, 100, unroll) for s, method, unroll in product(MAIN, SMALL_GUIDE, (1, 5))]
    return list(spread([*(like(s, WITH_GUIDE, 100) for s in MAIN), *cells], seeds))


def sensitivity(found: Found, seeds: Sequence[int]) -> list[Cell]:
    """Upper rates over two and a half orders of magnitude, for exact derivatives and differences."""
    return list(spread([like(setting, method) for setting, method in product(MAIN, SENSITIVE)], seeds, WIDE))


def best(found: Found) -> tuple[str, ...]:
    """Return the three methods with the largest mean validation accuracy on the main settings, by the first seeds."""
    scores: dict[str, float] = {}
    for method in METHODS:
        chosen = [choose(found, like(setting, method), RATES[1], FIRST) for setting in MAIN]
        scores[method] = sum(max(c.rates.values()) if c else 0.0 for c in chosen)
    return tuple(sorted(scores, key=lambda method: -scores[method])[:3])


def other_settings(found: Found, seeds: Sequence[int]) -> list[Cell]:
    """The three best methods on the other noise levels and imbalance factors."""
    cells = [like(setting, method) for setting, method in product(OTHERS, best(found))]
    return [*baselines(OTHERS, seeds), *spread(cells, seeds)]


def seconds_of_a_step(found: Found, method: str, unroll: int) -> float | None:
    """Return the mean CPU seconds of a lower step, upper ones included, over the first seeds of the main settings."""
    values = [
        outcome["seconds"] / cell.steps
        for cell, outcome in found.items()
        if (cell.method, cell.unroll, cell.steps) == (method, unroll, STEPS)
        and (cell.seed in FIRST and cell.setting in MAIN and cell.guide in (0, 1_000))
        and (cell.rate in RATES[unroll] and "seconds" in outcome)
    ]
    return sum(values) / len(values) if values else None


def equal_steps(found: Found, method: str, unroll: int) -> int | None:
    """Return how many lower steps take as many seconds as T1T2 at unroll 1 takes for its own."""
    ours, theirs = seconds_of_a_step(found, "T1T2", 1), seconds_of_a_step(found, method, unroll)
    return None if ours is None or theirs is None else 20 * max(round(STEPS * ours / theirs / 20), 1)


CONTENDERS = (*((method, 1) for method in METHODS if method != "T1T2"), ("T1T2", 5), ("FiniteDifference", 5))


def at_equal_compute(found: Found, setting: str, method: str, unroll: int) -> tuple[Cell, Chosen | None] | None:
    """Return the cell of a method at equal compute, and its choice of a rate at equal steps."""
    steps = equal_steps(found, method, unroll)
    if steps is None:
        return None
    cell = like(setting, method, unroll=unroll, steps=steps)
    return cell, choose(found, replace(cell, steps=STEPS), RATES[cell.unroll], FIRST)


def equal_compute(found: Found, seeds: Sequence[int]) -> list[Cell]:
    """As many seconds as T1T2 at unroll 1; the rate is that of equal steps, and searched anew for plain training."""
    cells: list[Cell] = []
    for setting, (method, unroll) in product(MAIN, ((PLAIN, 0), (WITH_GUIDE, 0), *CONTENDERS)):
        pair = at_equal_compute(found, setting, method, unroll)
        if pair is not None and (unroll == 0 or pair[1] is not None):
            rates = RATES[0] if unroll == 0 else (pair[1].cell.rate,)
            cells += spread([pair[0]], seeds, rates)
    return cells


BLOCKS: dict[str, Callable[[Found], list[Cell]]] = {
    "exact and differences, three seeds": partial(full, methods=CHEAP, unroll=1, seeds=FIRST),
    "upper rates, three seeds": partial(sensitivity, seeds=FIRST),
    "solvers, three seeds": partial(full, methods=COSTLY, unroll=1, seeds=FIRST),
    "solvers without damping": partial(undamped, seeds=FIRST),
    "unroll 5, three seeds": partial(full, methods=METHODS, unroll=5, seeds=FIRST),
    "other settings, three seeds": partial(other_settings, seeds=FIRST),
    "exact and differences, two more seeds": partial(full, methods=CHEAP, unroll=1, seeds=LAST),
    "equal compute, three seeds": partial(equal_compute, seeds=FIRST),
    "guide of 100, three seeds": partial(small_guide, seeds=FIRST),
    "unroll 5, two more seeds": partial(full, methods=METHODS, unroll=5, seeds=LAST),
    "other settings, two more seeds": partial(other_settings, seeds=LAST),
    "solvers, two more seeds": partial(full, methods=COSTLY, unroll=1, seeds=LAST),
    "upper rates, two more seeds": partial(sensitivity, seeds=LAST),
}
QUICK: dict[str, Callable[[Found], list[Cell]]] = {
    "quick": lambda found: [
        replace(like(setting, method, steps=2), rate=1e-3)
        for setting, method in product(MAIN, (PLAIN, WITH_GUIDE, *task.RESPONSES))
    ]
}


CONFIG = {"steps": STEPS, "lower rate": task.LOWER_RATE, "rates": {str(k): list(v) for k, v in RATES.items()}}
GRID = Grid(
    description="Run the grid of Meta-Weight-Net in docs/evidence.md.",
    name="meta_weight_net",
    source=Path(task.__file__),
    config=CONFIG,
    run=task.run,
    blocks=BLOCKS,
    quick=QUICK,
)

if __name__ == "__main__":
    raise SystemExit(GRID.command(processes=os.cpu_count() or 1))
