"""Meta-Weight-Net trained by Betty with each of its hypergradients, beside nestor's rows of `meta_weight_net.py`.

One setting (IF 100, guide set of 1,000, unroll 1), the same network, parts, batches, optimizers, schedule, steps and
upper rates. `cg` and `neumann` run with the iterations and the alpha that are Betty's defaults (1 and 1), and with more
careful ones. A training that ends in numbers that are not finite is a result.

    PYTHONPATH=examples python -m evidence.betty_training [--quick] [--render]       in the environment that holds Betty
"""

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from evidence.betty_problems import Method, trained
from evidence.grid import FIRST, LAST, RATES, like
from evidence.meta_weight_net import LOWER_RATE, STEPS, learned, load
from shared.evidence import Cell, Found
from shared.evidence_command import Grid
from shared.noisy_clothes import accuracy, small_cnn
from shared.weight_functions import WeightFunction

SETTING = "IF 100"
METHODS = {
    f"Betty, {method}": method
    for method in (
        Method("darts"),
        Method("neumann", 1, 1.0),
        Method("cg", 1, 1.0),
        Method("neumann", 3, 0.1),
        Method("cg", 3, 1.0),
    )
}


def run(cell: Cell, folder: Path) -> dict[str, Any]:
    """Train by Betty, and return the numbers of the cell."""
    data = load(folder, cell.setting, cell.guide, cell.seed)
    modules, parts = (small_cnn(cell.seed), WeightFunction()), (data.all_labelled(), data.guide)
    begin = time.process_time()
    classifier, weight = trained(METHODS[cell.method], *modules, parts, cell.steps, (LOWER_RATE, cell.rate), cell.seed)
    found = {"seconds": time.process_time() - begin}
    for module, what in ((classifier, "classifier"), (weight, "weight function")):
        if not all(parameter.isfinite().all() for parameter in module.parameters()):
            return {"failure": f"the {what} is not finite at the end"}
    found |= learned(classifier, weight, data)
    scores = {"validation": data.validation, "test": data.test}
    found |= {name: float(accuracy(classifier, part)) for name, part in scores.items()}
    return {name: round(value, 5) for name, value in found.items()}


def cells(found: Found, seeds: Sequence[int], steps: int = STEPS) -> list[Cell]:
    """Return all methods at all rates, seed by seed."""
    base = [replace(like(SETTING, "T1T2", steps=steps), method=name) for name in METHODS]
    return [replace(c, rate=rate, seed=seed) for seed, c, rate in product(seeds, base, RATES[1])]


BLOCKS: dict[str, Callable[[Found], list[Cell]]] = {
    "Betty, three seeds": partial(cells, seeds=FIRST),
    "Betty, two more seeds": partial(cells, seeds=LAST),
}


GRID = Grid(
    description="Train Meta-Weight-Net by Betty with each of its hypergradients.",
    name="betty",
    source=Path(__file__),
    config={"setting": SETTING, "steps": STEPS, "lower rate": LOWER_RATE, "rates": list(RATES[1])},
    run=run,
    blocks=BLOCKS,
    quick={"quick": partial(cells, seeds=(0,), steps=2)},
)

if __name__ == "__main__":
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    raise SystemExit(GRID.command())
