"""Meta-Weight-Net in one cell of a grid: a data setting, a guide set, an unroll length, a method, a rate and a seed.

    min_v  L_guide(theta*(v))   with   theta*(v) = argmin_theta  sum_i V(l_i; v) l_i(theta) / sum_i V(l_i; v)

The task and the network are those of `examples/meta_weight_net.py`. The training part has 800 images of each class and
wrong labels, or correct labels and a long tail: class k has 3,000 IF^(-k/9) images. Guide, validation and test parts
are balanced and clean. The guide images are among the training images, also for the weighted methods.

`rate` is the upper rate of a weighted method and the lower rate of plain training: each method gets the same number of
trials. The lower rate of the weighted methods is 0.1; 0.05 was worse with seed 7, which is not reported. A cell reports
the accuracy on the validation part, which chooses the rate, and on the test part; the CPU seconds of the training; and
what the weight function has learned: `auc` (correct against wrong labels), `rare` (mean weight of the three rarest
classes over that of the three commonest) and `spread` (standard deviation of the weights over their mean; it is 0 if
all images have the same weight, which is plain training).
"""

import time
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.optim import Adam

import nestor
from shared.batches import Batches
from shared.data.images import Images, fashion_mnist
from shared.evidence import Cell
from shared.noisy_clothes import BATCH, NoisyClothes, accuracy, level, outputs, plain_loss, small_cnn
from shared.weight_functions import WeightFunction

STEPS, LOWER_RATE, CLASSES = 600, 0.1, 10
VALIDATION, GUIDE_POOL, PER_CLASS, LARGEST = 100, 100, 800, 3_000  # images of a class
PLAIN, WITH_GUIDE = "plain", "plain, train + guide"
RESPONSES: dict[str, nestor.Response] = {
    "T1T2": nestor.T1T2(),
    "T1T2(reuse)": nestor.T1T2(reuse=True),
    "FiniteDifference": nestor.FiniteDifference(),
    "SAMA": nestor.SAMA(),
    "CG": nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=3), damping=1.0),
    "CG, damping 0.1": nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=3), damping=0.1),
    "CG, no damping": nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=3)),
    "CG, Gauss-Newton": nestor.Implicit(
        solver=nestor.ConjugateGradient(max_steps=3),
        condition=nestor.Stationarity(curvature=nestor.GaussNewton()),
        damping=0.1,
    ),
    "Neumann": nestor.Implicit(solver=nestor.Neumann(num_terms=3, step_size=LOWER_RATE)),
    "Unrolled(1)": nestor.Unrolled(steps=1),
    "T1T2, losses attached": nestor.T1T2(),
}


@dataclass(frozen=True)
class Setting:
    """How the training part is spoiled: a share of wrong labels, or a long tail."""

    noise: float = 0.0
    imbalance: float = 1.0

    def counts(self) -> list[int]:
        """Return the number of training images of each class."""
        if self.imbalance == 1:
            return [PER_CLASS] * CLASSES
        return [round(LARGEST * self.imbalance ** (-k / (CLASSES - 1))) for k in range(CLASSES)]


SETTINGS = {f"noise {share} %": Setting(noise=share / 100) for share in (20, 40, 60)}
SETTINGS |= {f"IF {factor}": Setting(imbalance=factor) for factor in (50, 100, 200)}


@lru_cache(maxsize=1)
def images(folder: Path) -> Images:
    return fashion_mnist(folder)


@lru_cache(maxsize=4)
def load(folder: Path, name: str, guide: int, seed: int) -> NoisyClothes:
    """Draw the parts; validation and training parts do not depend on the size of the guide set."""
    setting, data, generator = SETTINGS[name], images(folder), torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.train), generator=generator)
    classes = [order[data.train_labels[order] == k] for k in range(CLASSES)]
    validation = torch.cat([c[:VALIDATION] for c in classes])
    guides = torch.cat([c[VALIDATION:][: guide // CLASSES] for c in classes])
    first = VALIDATION + GUIDE_POOL
    train = torch.cat([c[first : first + n] for c, n in zip(classes, setting.counts(), strict=True)])
    wrong = torch.rand(len(train), generator=generator) < setting.noise
    shift = torch.randint(1, CLASSES, (len(train),), generator=generator)
    labels = (data.train_labels[train] + wrong * shift) % CLASSES
    parts = [(data.train[index], data.train_labels[index]) for index in (guides, validation)]
    return NoisyClothes((data.train[train], labels), wrong, parts[0], parts[1], (data.test, data.test_labels))


def losses_of(batch: Any, classifier: nn.Module) -> Tensor:
    inputs, labels = batch
    return F.cross_entropy(nestor.outputs(classifier(inputs)), labels, reduction="none")


def weighted(losses: Tensor, weights: Tensor) -> Tensor:
    return (weights * losses).sum() / weights.sum()


def weighted_loss(batch, classifier, weight):  # lower level: the weight function reads losses as numbers
    losses = losses_of(batch, classifier)
    return weighted(losses, weight(losses.detach()))


def attached_loss(batch, classifier, weight):  # the same, but the derivative goes through the weights' inputs too
    losses = losses_of(batch, classifier)
    return weighted(losses, weight(losses))


def meta_weight_net(classifier: nn.Module, weight: nn.Module, data: NoisyClothes, cell: Cell) -> nestor.Program:
    loss = attached_loss if cell.method == "T1T2, losses attached" else weighted_loss
    return nestor.Program(
        classifier=level(classifier, loss, data.all_labelled(), cell.steps, rate=LOWER_RATE,
                         response=RESPONSES[cell.method], unroll_steps=cell.unroll),
        weight=nestor.Problem(weight, plain_loss, data=Batches(*data.guide, size=BATCH),
                              optimizer=Adam(weight.parameters(), lr=cell.rate)),  # reads the best response
    )  # fmt: skip


def learned(classifier: nn.Module, weight: nn.Module, data: NoisyClothes) -> dict[str, float]:
    """Return what the weight function makes of the training images in the end."""
    inputs, labels = data.train
    weights = outputs(weight, F.cross_entropy(outputs(classifier, inputs), labels, reduction="none"))
    found = {"spread": float(weights.std() / weights.mean())}
    if data.wrong.any():
        return found | {"auc": float(roc_auc_score(~data.wrong, weights))}
    return found | {"rare": float(weights[labels >= CLASSES - 3].mean() / weights[labels < 3].mean())}


def run(cell: Cell, folder: Path) -> dict[str, Any]:
    """Train, and return the numbers of the cell; an error of a solver is its result."""
    data = load(folder, cell.setting, cell.guide, cell.seed)
    classifier, weight = small_cnn(cell.seed), WeightFunction()
    if cell.method in RESPONSES:
        program = meta_weight_net(classifier, weight, data, cell)
    else:
        part = data.all_labelled() if cell.method == WITH_GUIDE else data.train
        program = nestor.Program(classifier=level(classifier, plain_loss, part, cell.steps, rate=cell.rate))
    begin = time.process_time()
    try:
        with warnings.catch_warnings():  # what the warnings say is on the page: detached losses, negative curvature
            warnings.simplefilter("ignore", nestor.NestorWarning)
            nestor.Engine(program, seed=cell.seed).run(cell.steps)
    except nestor.NestorError as error:
        return {"failure": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    found = {"seconds": time.process_time() - begin}
    if cell.method in RESPONSES:
        found |= learned(classifier, weight, data)
    scores = {"validation": data.validation, "test": data.test}
    found |= {name: float(accuracy(classifier, part)) for name, part in scores.items()}
    return {name: round(value, 5) for name, value in found.items()}
