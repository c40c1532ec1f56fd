"""Few-shot learning of letters of unseen scripts: 5 and 20 ways, 1 and 5 shots, for MAML and its kin.

    PYTHONPATH=examples python -m evidence.few_shot [--processes N] [--quick] [--render]

Each method has four trials of its rate with the first seed: of the steps of adaptation, or of the training for the two
baselines, which do not adapt. Tasks of the validation scripts choose. The baselines take six steps for an update of
MAML, which need at most about its seconds. iMAML takes eight steps of adaptation, since its derivative is that of a
minimum: with three it was 14 points worse on validation tasks of seed 7.

Cut, for a grid of less than an hour on one core: half the channels of ``examples/few_shot.py``, 80 updates in every
setting, two tasks an update for 20 ways, 100 test tasks a seed for 20 ways and 200 for 5, rates searched with one seed.
"""

import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from few_shot import fit, fit_head
from torch import Tensor
from torch.optim import SGD, Adam

import nestor
from shared.data.glyphs import glyphs
from shared.evidence import Cell, Found
from shared.evidence_command import Grid
from shared.evidence_tables import choose
from shared.tasks import Batch, Letters, Network, Tasks

Learn = Callable[[Batch], Callable[[Tensor], Tensor]]
SEEDS, UPDATES, CHANNELS, META_RATE, STRENGTH, BASELINE_STEPS, VALIDATION = range(5), 80, 16, 3e-3, 0.1, 6, 40
SETTINGS = {  # shape of a task; tasks of an update, tasks of the test
    f"{ways}-way {shots}-shot": ({"ways": ways, "shots": shots}, tasks, tests)
    for (ways, tasks, tests), shots in product(((5, 4, 200), (20, 2, 100)), (1, 5))
}
PRETRAINED, PROTOTYPES = "pretrained, nearest drawing", "prototypical network"


def fit_near(batch, fast, meta):  # iMAML: the adapted network stays near the start
    distance = sum((p - q).square().sum() for p, q in zip(fast.parameters(), meta.parameters(), strict=True))
    return fit(batch, fast) + 0.5 * STRENGTH * distance


IMPLICIT = nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=5), damping=STRENGTH)
METHODS = {  # loss of the support, loss of the query, derivative of the adaptation, its steps
    "MAML": (fit, fit, nestor.Unrolled(), 3),
    "FOMAML": (fit, fit, nestor.FirstOrder(), 3),
    "ANIL": (fit_head, fit_head, nestor.Unrolled(), 3),
    "iMAML": (fit_near, fit, IMPLICIT, 8),
}
RATES = dict.fromkeys(METHODS, (0.05, 0.1, 0.2, 0.4)) | {"ANIL": (0.2, 0.4, 0.8, 1.6)}  # of the steps of adaptation
RATES |= dict.fromkeys((PRETRAINED, PROTOTYPES), (1e-3, 3e-3, 1e-2, 3e-2))  # of the training


def class_means(features: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of the features of each class, of a task or of several along the first dimension."""
    members = F.one_hot(labels).to(features).mT
    return members @ features / members.sum(-1, keepdim=True)


def nearest(network: Network, support: Batch, angle: bool) -> Callable[[Tensor], Tensor]:
    """Return a classifier by the squared distance to the mean of the features of a class, normalized or not."""

    def features(images: Tensor) -> Tensor:
        return F.normalize(network.body(images), dim=1) if angle else network.body(images)

    with torch.no_grad():
        centres = class_means(features(support[0]), support[1])
    return lambda images: -(features(images)[:, None] - centres).square().sum(-1)


def fit_prototypes(batch, fast):  # Snell et al., Prototypical networks for few-shot learning, NeurIPS 2017
    (shown, labels), (asked, answers) = batch
    known, queries = (fast(images.flatten(0, 1)).unflatten(0, images.shape[:2]) for images in (shown, asked))
    distances = (queries[:, :, None] - class_means(known, labels)[:, None]).square().sum(-1)
    return F.cross_entropy(-distances.flatten(0, 1), answers.flatten())


def adapting(cell: Cell, tasks: Tasks) -> tuple[nestor.Program, Learn]:
    support_loss, query_loss, response, steps = METHODS[cell.method]
    meta = Network(tasks.ways, CHANNELS)
    fast = copy.deepcopy(meta)
    if cell.method == "ANIL":  # all tasks share the body
        fast.body = meta.body
    variables = list((fast.head if cell.method == "ANIL" else fast).parameters())
    episodes = nestor.Episodes(tasks, steps=steps)  # both levels see the same tasks
    program = nestor.Program(
        fast=nestor.Problem(fast, support_loss, data=episodes.support, optimizer=SGD(variables, lr=cell.rate),
                            unroll_steps=steps, init="meta", tasks=tasks.tasks, response=response),
        meta=nestor.Problem(meta, query_loss, data=episodes.query, optimizer=Adam(meta.parameters(), lr=META_RATE)),
    )  # fmt: skip
    return program, partial(program.adapt, "fast")


def baseline(cell: Cell, tasks: Tasks) -> tuple[nestor.Program, Learn]:
    """Return a program of one level that learns features, and the classifier of a task by them."""
    network = Network(len(tasks.classes), CHANNELS)
    module, loss, data = network.body, fit_prototypes, tasks
    if cell.method == PRETRAINED:
        module, loss, data = network, fit, Letters(tasks.classes, 160)
    level = nestor.Problem(module, loss, data=data, optimizer=Adam(module.parameters(), lr=cell.rate))
    return nestor.Program(fast=level), partial(nearest, network, angle=cell.method == PRETRAINED)


def accuracy(tasks: Tasks, count: int, learn: Learn) -> float:
    right = 0.0
    for ((images, labels), (asked, answers)), _ in zip(tasks, range(count), strict=False):
        classify = learn((images[0], labels[0]))
        with torch.no_grad():
            right += float((classify(asked[0]).argmax(1) == answers[0]).float().mean())
    return right / count


letters = lru_cache(maxsize=3)(glyphs)


def run(cell: Cell, folder: Path) -> dict[str, Any]:
    """Train, and return the numbers of the cell; an error of a solver is its result."""
    shape, count, tests = SETTINGS[cell.setting]
    tasks = Tasks(letters(folder, "train"), count, **shape, seed=cell.seed)
    counts = {"validation": VALIDATION, "test": tests} if cell.steps == UPDATES else {"validation": 2, "test": 2}
    torch.manual_seed(cell.seed)
    begin = time.process_time()
    try:
        program, learn = (adapting if cell.method in METHODS else baseline)(cell, tasks)
        with warnings.catch_warnings():  # iMAML: conjugate gradients stop before a direction of negative curvature
            warnings.simplefilter("ignore", nestor.NestorWarning)
            nestor.Engine(program, seed=cell.seed).run(cell.steps * (cell.unroll or BASELINE_STEPS))
        found = {"seconds": time.process_time() - begin}
        for part, number in counts.items():  # the seed decides the tasks: they are the same for all methods
            unseen = Tasks(letters(folder, part), 1, **shape, seed=1_000_000 + cell.seed)
            found[part] = accuracy(unseen, number, learn)
    except nestor.NestorError as error:
        return {"failure": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    return {name: round(value, 5) for name, value in found.items()}


def like(setting: str, method: str, steps: int = UPDATES) -> Cell:
    """Return a cell of a method, whose rate and seed are to be replaced."""
    return Cell(setting, 0, METHODS[method][-1] if method in METHODS else 0, method, 0.0, steps, 0)


LIKE = tuple(like(setting, method) for setting, method in product(SETTINGS, RATES))


def more_seeds(found: Found) -> list[Cell]:
    """All methods at the rates that the validation tasks of the first seed choose."""
    best = [choice.cell for cell in LIKE if (choice := choose(found, cell, RATES[cell.method], SEEDS[:1]))]
    return [replace(cell, seed=seed) for seed, cell in product(SEEDS[1:], best)]


BLOCKS: dict[str, Callable[[Found], list[Cell]]] = {
    "rates, first seed": lambda found: [replace(cell, rate=rate) for cell in LIKE for rate in RATES[cell.method]],
    "chosen rates, four more seeds": more_seeds,
}
GRID = Grid(
    description="Run the grid of few-shot learning in docs/evidence.md.",
    name="few_shot",
    source=Path(__file__),
    config={"updates": UPDATES, "channels": CHANNELS, "upper rate": META_RATE, "rates": RATES},
    run=run,
    blocks=BLOCKS,
    quick={"quick": lambda found: [replace(like("5-way 5-shot", name, 2), rate=0.01) for name in RATES]},
)

if __name__ == "__main__":
    raise SystemExit(GRID.command())
