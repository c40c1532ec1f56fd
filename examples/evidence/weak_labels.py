"""Weakly labelled texts in one cell of a grid: a data set, a method, a rate and a seed; three data sets, one protocol.

    PYTHONPATH=examples python -m evidence.weak_labels [--processes N] [--quick] [--render]

The task, the losses and the networks are those of `examples/reweight_and_correct.py`. Keywords label the documents;
documents without a keyword are left out. Guide documents with true labels, validation documents and the rest, on which
the methods train, are disjoint parts of the training split. Every method keeps the parameters of the best validation
accuracy, and the mean of that accuracy over the first seeds chooses its rate: the lower rate of plain training, the
upper rate of the others, which all upper levels of a method share. Their lower rate, the steps, the trials of the rates
and the number of guide documents were set with seed 7, which is not reported, on its validation part.

A cell reports the accuracy on the validation and the test part, the CPU seconds of the training, and for the covered
documents: their share (`covered`), the share of right weak labels (`right`), the AUC of the weights for right weak
labels (`auc`), and the share of right labels after the correction (`corrected`).
"""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from reweight_and_correct import accuracy, correct_loss, plain_loss, reweight_and_correct_loss, reweight_loss
from sklearn.metrics import roc_auc_score
from torch import nn

import nestor
from shared.batches import Batches
from shared.evidence import Cell, Found
from shared.evidence_command import Grid
from shared.evidence_tables import choose
from shared.label_networks import Correction, Weights
from shared.weak_labels import GUIDES, SETTINGS, Documents, load

STEPS, BATCH, LOWER_RATE, DROPOUT, REPEATS = 500, 100, 0.05, 0.3, 5
FIRST, LAST = (0, 1), (2, 3, 4)
RATES = {0: (0.01, 0.03, 0.1), 1: (1e-3, 3e-3, 1e-2)}  # by unroll; 0: plain training
WEAK, GUIDE, WITH_GUIDE = PLAIN = ("weak labels", "guide documents alone", "weak + guide")
BOTH, DIFFERENCES = "reweight and correct", "reweight and correct, FiniteDifference"
UPPERS = {
    "reweight": (reweight_loss, ("weights",)),
    "correct": (correct_loss, ("correction",)),
    BOTH: (reweight_and_correct_loss, ("weights", "correction")),
    DIFFERENCES: (reweight_and_correct_loss, ("weights", "correction")),
}
METHODS = (*PLAIN, *UPPERS)


def program(cell: Cell, data: Documents) -> nestor.Program:
    """Return one level, or a classifier below upper levels that are peers, as in the example."""
    weak, guide = (data.train[0], data.weak), tuple(part[: cell.guide] for part in data.guide)
    width, loss, names, rate, part = weak[0].shape[1], plain_loss, (), cell.rate, weak
    if cell.method == GUIDE:
        part = guide
    elif cell.method == WITH_GUIDE:
        part = tuple(torch.cat([w, *[g] * REPEATS]) for w, g in zip(weak, guide, strict=True))
    elif cell.method in UPPERS:
        (loss, names), rate = UPPERS[cell.method], LOWER_RATE
    net = nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Dropout(DROPOUT), nn.Linear(256, data.groups))
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    response = nestor.FiniteDifference() if cell.method == DIFFERENCES else nestor.T1T2()
    options = {"response": response, "unroll_steps": cell.unroll} if names else {}
    levels = {"classifier": nestor.Problem(net, loss, data=Batches(*part, size=BATCH), optimizer=optimizer, **options)}
    for name in names:
        module = Weights(data.groups) if name == "weights" else Correction(width, data.groups)
        adam = torch.optim.Adam(module.parameters(), cell.rate)
        levels[name] = nestor.Problem(module, plain_loss, data=Batches(*guide, size=BATCH), optimizer=adam)
    return nestor.Program(**levels)


@torch.no_grad()
def learned(modules: dict[str, nn.Module], data: Documents) -> dict[str, float]:
    """Return what the upper levels make of the weak labels in the end."""
    (inputs, truth), found, labels = data.train, {}, data.weak
    if "correction" in modules:
        labels = modules["correction"](inputs, data.weak)
        found["corrected"] = float((labels.argmax(1) == truth).float().mean())
    if "weights" in modules:
        losses = F.cross_entropy(modules["classifier"](inputs), labels, reduction="none")
        found["auc"] = float(roc_auc_score(data.weak == truth, modules["weights"](losses, data.weak)))
    return found


def run(cell: Cell, folder: Path) -> dict[str, Any]:
    """Train, and return the numbers of the cell; an error of nestor is its result."""
    data = load(folder, cell.setting, cell.seed)
    torch.manual_seed(cell.seed)
    trained, best = program(cell, data), nestor.callbacks.BestWeights("accuracy", "max", restore=True)
    every, begin = max(cell.steps // 20, 1), time.process_time()
    try:
        with warnings.catch_warnings():  # detached losses: the page says what they do to differences
            warnings.simplefilter("ignore", nestor.NestorWarning)
            nestor.Engine(trained, seed=cell.seed, callbacks=[best], validate_every=every,
                          validate=lambda classifier: {"accuracy": accuracy(classifier, *data.validation)},
                          ).run(cell.steps)  # fmt: skip
    except nestor.NestorError as error:
        return {"failure": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    found = {"seconds": time.process_time() - begin, "covered": data.covered}
    found["right"] = float((data.weak == data.train[1]).float().mean())
    modules = {name: level.problem.module.eval() for name, level in trained.levels.items()}
    parts = {"validation": data.validation, "test": data.test}
    found |= {name: float(accuracy(modules["classifier"], *part)) for name, part in parts.items()}
    return {name: round(value, 5) for name, value in (found | learned(modules, data)).items()}


def like(setting: str, method: str, steps: int = STEPS) -> Cell:
    """Return a cell of a method, whose rate and seed are to be replaced."""
    return Cell(setting, 0 if method == WEAK else GUIDES, int(method in UPPERS), method, 0.0, steps, 0)


def all_rates(found: Found, seeds: Sequence[int], steps: int = STEPS) -> list[Cell]:
    """Return all methods on all data sets at all rates, seed by seed."""
    cells = [(seed, like(*pair, steps)) for seed, pair in product(seeds, product(SETTINGS, METHODS))]
    return [replace(cell, rate=rate, seed=seed) for seed, cell in cells for rate in RATES[cell.unroll]]


def chosen_rates(found: Found, seeds: Sequence[int]) -> list[Cell]:
    """Return the methods at the rates that the validation part of the first seeds chooses."""
    likes = [like(*pair) for pair in product(SETTINGS, METHODS)]
    chosen = [choose(found, cell, RATES[cell.unroll], FIRST) for cell in likes]
    return [replace(c.cell, seed=seed) for seed, c in product(seeds, chosen) if c]


BLOCKS: dict[str, Callable[[Found], list[Cell]]] = {
    "rates, first two seeds": partial(all_rates, seeds=FIRST),
    "chosen rates, three more seeds": partial(chosen_rates, seeds=LAST),
}
GRID = Grid(
    description="Train on weakly labelled texts: reweight, correct, or both.",
    name="weak_labels",
    source=Path(__file__),
    config={"steps": STEPS, "lower rate": LOWER_RATE, "rates": {str(k): list(v) for k, v in RATES.items()}},
    run=run,
    blocks=BLOCKS,
    quick={"quick": partial(all_rates, seeds=(0,), steps=2)},
)

if __name__ == "__main__":
    raise SystemExit(GRID.command())
