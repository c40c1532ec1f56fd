"""Pretrain, finetune, reweight in one cell of a grid: a pair of domains, a method, a rate and a seed.

    PYTHONPATH=examples python -m evidence.domain_adaptation [--processes N] [--quick] [--render]

The task is that of `examples/pretrain_finetune_reweight.py`. `three levels` learn a weight for each source image from
the validation images of the target, in one half of the steps. The other half trains the two lower levels anew with
these weights. `T1T2` and `CG` say how the middle level responds to the lowest one: with the identity or with five
iterations of conjugate gradients, damping 0.1, in place of the inverse Hessian. The lowest level has T1T2 in both.
The strength of the pull to the pretrained network is part of the method's name.

In the end every method trains on all target images, those for training and those for validation. Plain methods train
on them in all steps. The held-out part has other images of the target, on which no method trains. The accuracy on it is
`validation` of a cell, and chooses the rate. It is 100 images, and the test part is all that are left.

`rate` is the upper rate of three levels, and the lower rate of the other methods: three trials each. The first two
seeds choose. The lower rate of three levels is fixed. Steps, rates, strengths and the number of source emoji were
chosen with seed 7, by the held-out part and by the `auc` of the weights. Seed 7 is not reported. A cell reports the
accuracies, the CPU seconds of the training, and `auc`: right against wrong labels by weight.
"""

import time
import warnings
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pretrain_finetune_reweight import level, pretrain_loss, validation_loss
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.optim import Adam

import nestor
from shared import digit_domains, emoji_domains
from shared.batches import Batches
from shared.digit_domains import Domains
from shared.evidence import Cell, Found
from shared.evidence_command import Grid
from shared.evidence_tables import choose

TARGET, VALIDATION, HELD_OUT, STEPS, LOWER_RATE = 30, 100, 100, 1_000, 0.02
FIRST, LAST, RATES = (0, 1), (2, 3, 4), {0: (0.02, 0.05, 0.1), 1: (0.01, 0.03, 0.1)}  # rates by unroll
SOLVER = nestor.ConjugateGradient(max_steps=5)
CG = nestor.Implicit(solver=SOLVER, damping=0.1)
RESPONSES: dict[str, nestor.Response] = {"T1T2": nestor.T1T2(), "CG": CG}
STRENGTHS = (0.03, 1.0)
WEIGHTED = {f"three levels, {name}, strength {s:g}": (RESPONSES[name], s) for s, name in product(STRENGTHS, RESPONSES)}
UNWEIGHTED = {f"pretraining without weights, strength {s:g}": (None, s) for s in STRENGTHS}
TOGETHER, ALONE = "source and target together", "target alone"
PLAIN = (*UNWEIGHTED, TOGETHER, ALONE)
METHODS = (*WEIGHTED, *PLAIN)
PAIRS = {  # where domains and network come from, the number of source images, the share of wrong labels
    "MNIST to digits": (digit_domains, 1_000, 0.45),
    "Google to Twitter emoji": (emoji_domains, 1_300, 0.4),
}


@lru_cache(maxsize=2)
def load(folder: Path, setting: str, guide: int, seed: int) -> tuple[Domains, tuple[Tensor, Tensor]]:
    """Return both domains, and the held-out part, which is taken from the test part."""
    module, source, noise = PAIRS[setting]
    data = module.domains(folder, seed, source, TARGET, guide, noise)
    images, labels = data.test
    return replace(data, test=(images[HELD_OUT:], labels[HELD_OUT:])), (images[:HELD_OUT], labels[:HELD_OUT])


def levels(net: nn.Module, loss: Any, data: Domains, target: Batches, cell: Cell) -> dict[str, nestor.Problem]:
    """Return the two lower levels of half of the steps if the method has weights, of all steps if it has none."""
    response, strength = (WEIGHTED | UNWEIGHTED)[cell.method]
    rate, steps = (LOWER_RATE, cell.steps // 2) if response else (cell.rate, cell.steps)

    def finetune_loss(batch, finetuned, pretrained):  # as in the example, with another strength
        pairs = zip(finetuned.parameters(), pretrained.parameters(), strict=True)
        return validation_loss(batch, finetuned) + strength * sum((f - p).square().sum() for f, p in pairs)

    middle = level(deepcopy(net), finetune_loss, target, rate, steps)
    return {"pretrained": level(net, loss, data.source, rate, steps), "finetuned": replace(middle, response=response)}


def learned(net: nn.Module, data: Domains, cell: Cell) -> Tensor:
    """Learn the weights by three levels; return their logits."""
    logits = nestor.Variable(torch.zeros(len(data.wrong)))
    optimizer = Adam(logits.parameters(), lr=cell.rate)
    weights = nestor.Problem(logits, validation_loss, data=data.validation, optimizer=optimizer)
    lower = levels(net, pretrain_loss, data, data.target, cell)
    nestor.Engine(nestor.Program(**lower, weights=weights), seed=cell.seed).run(cell.steps // 2)
    return logits().detach()


def trained(net: nn.Module, data: Domains, cell: Cell, logits: Tensor) -> nn.Module:
    """Train on all target images: two levels with given weights, or one network."""

    def fixed_loss(batch, pretrained):
        return pretrain_loss(batch, pretrained, lambda: logits)

    def loss(batch, finetuned):
        return sum(F.cross_entropy(finetuned(images), labels) for images, labels, *_ in batch)

    if cell.method in (TOGETHER, ALONE):
        parts = (data.source, data.given) if cell.method == TOGETHER else (data.given,)
        program = nestor.Program(finetuned=level(net, loss, parts, cell.rate, cell.steps))
    else:
        program = nestor.Program(**levels(net, fixed_loss, data, data.given, cell))
    nestor.Engine(program, seed=cell.seed).run(cell.steps // (1 + cell.unroll))
    return program.levels["finetuned"].problem.module


def run(cell: Cell, folder: Path) -> dict[str, Any]:
    """Train, and return the numbers of the cell; an error of a training is its result."""
    data, held_out = load(folder, cell.setting, cell.guide, cell.seed)
    torch.manual_seed(cell.seed)
    net, logits = PAIRS[cell.setting][0].network(), torch.full((len(data.wrong),), 20.0)  # all weights are 1
    begin = time.process_time()
    try:
        with warnings.catch_warnings():  # a solve that is truncated at negative curvature is no error
            warnings.simplefilter("ignore", nestor.NestorWarning)
            if cell.method in WEIGHTED:
                logits = learned(deepcopy(net), data, cell)
            net = trained(net, data, cell, logits)
    except nestor.NestorError as error:
        return {"failure": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    found = {"seconds": time.process_time() - begin, "test": data.accuracy(net)}
    found["validation"] = replace(data, test=held_out).accuracy(net)
    if cell.method in WEIGHTED:
        found["auc"] = float(roc_auc_score(~data.wrong, logits))
    return {name: round(value, 5) for name, value in found.items()}


def like(setting: str, method: str, steps: int = STEPS) -> Cell:
    """Return a cell of a method, whose rate and seed are to be replaced."""
    return Cell(setting, VALIDATION, int(method in WEIGHTED), method, 0.0, steps, 0)


def first(found: Found, steps: int = STEPS) -> list[Cell]:
    """Return all methods at all rates, seed by seed."""
    base = [like(setting, method, steps) for setting, method in product(PAIRS, METHODS)]
    return [replace(cell, rate=rate, seed=seed) for seed, cell in product(FIRST, base) for rate in RATES[cell.unroll]]


def chosen(found: Found) -> list[Cell]:
    """Return each method at the rate that the held-out part chooses with the first seeds, for the other seeds."""
    choices = [choose(found, like(s, m), RATES[like(s, m).unroll], FIRST) for s, m in product(PAIRS, METHODS)]
    return [replace(choice.cell, seed=seed) for seed, choice in product(LAST, choices) if choice]


GRID = Grid(
    description="Run the grid of trilevel domain adaptation in docs/evidence.md.",
    name="domain_adaptation",
    source=Path(__file__),
    config={"steps": STEPS, "lower rate": LOWER_RATE, "rates": {str(k): list(v) for k, v in RATES.items()}},
    run=run,
    blocks={"rates, first two seeds": first, "chosen rates, three more seeds": chosen},
    quick={"quick": lambda found: [cell for cell in first(found, 2) if cell.seed == 0]},
)

if __name__ == "__main__":
    raise SystemExit(GRID.command())
