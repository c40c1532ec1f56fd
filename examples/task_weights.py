"""Eight tasks, a learned centre, and how strongly each task is drawn to it.

Each task has 40 labelled images and its own linear classifier. A term pulls the classifiers to a common centre, which
is the best one for the training images of all tasks. How strongly it pulls each task is learned on validation images:

    min_s  mean_t L_val,t(theta_t*)
    with  (theta*, c*)(s) = argmin_{theta, c}  mean_t [L_train,t(theta_t) + exp(s_t) |theta_t - c|^2 / 2] + b |c|^2 / 2

The lower level is convex, and its hypergradient is implicit, by conjugate gradients. Five tasks are digits turned by
different angles and belong together; in one the labels run backwards, and two are clothes. Nobody says which.

Baselines, of the same classifiers: each task alone, all tasks pooled, and the same centre with one common strength.
Their decay or strength (0.0001 to 0.3) is searched on the same validation images. In the end every method is fitted
anew with what it has chosen, by L-BFGS, to training and validation images. The test has 1,000 images for each task.

Data: MNIST and Fashion-MNIST. Evgeniou, Pontil, Regularized multi-task learning, KDD 2004; strengths by a bilevel
program: Frecon, Salzo, Pontil, Bilevel learning of the group lasso structure, NeurIPS 2018.
"""

from functools import partial

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import LBFGS, Adam

import nestor
from shared.experiment import Case, Experiment, main
from shared.related_tasks import NAMES, related_tasks

DECAY, RATE, STRENGTH_RATE, STEPS, START = 1e-3, 3e-3, 0.2, 20, -3.0
SEARCHED = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
LEARNED, COMMON, ALONE, POOLED = "learned strengths", "one common strength", "each alone", "pooled"


class Classifiers(nn.Module):
    """A linear classifier for each task, and their centre."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(tasks, 10, 784)), nn.Parameter(torch.zeros(tasks, 1, 10))
        self.centre = nn.Parameter(torch.zeros(10, 784))

    def forward(self, images: Tensor) -> Tensor:
        return images @ self.weight.transpose(1, 2) + self.bias


def training_loss(batch, classifiers, strength):  # lower level
    distances = (classifiers.weight - classifiers.centre).square().sum((1, 2))
    penalty = (strength().exp() * distances).mean() + DECAY * classifiers.centre.square().sum()
    return validation_loss(batch, classifiers) + penalty / 2


def validation_loss(batch, classifiers):  # upper level: the mean over tasks
    images, labels = batch
    return F.cross_entropy(classifiers(images).flatten(0, 1), labels.flatten())


def learn(case: Case, train: tuple, validation: tuple, updates: int) -> list[Tensor]:
    classifiers, strength = Classifiers(len(NAMES)), nestor.Variable(torch.full((len(NAMES),), START))
    implicit = nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=20, rtol=1e-2))
    program = nestor.Program(
        classifiers=nestor.Problem(classifiers, training_loss, data=[train], unroll_steps=STEPS, response=implicit,
                                   optimizer=Adam(classifiers.parameters(), lr=RATE)),
        strength=nestor.Problem(strength, validation_loss, data=[validation],
                                optimizer=Adam(strength.parameters(), lr=STRENGTH_RATE)),
    )  # fmt: skip
    path: list[Tensor] = []

    def validate(strength):
        path.append(strength().exp())
        return {}

    case.train(LEARNED, program, updates * STEPS, validate=validate, validate_every=STEPS)
    return path


def fit(images: Tensor, labels: Tensor, strength: Tensor, own: bool = True) -> Classifiers:
    """Minimise the training loss for given strengths; the centre is zero if it is not their own."""
    classifiers = Classifiers(len(images))
    classifiers.centre.requires_grad_(own)
    optimizer = LBFGS([p for p in classifiers.parameters() if p.requires_grad], max_iter=60)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = training_loss((images, labels), classifiers, strength.log)
        loss.backward()
        return loss

    optimizer.step(closure)
    return classifiers


@torch.no_grad()
def accuracies(classifiers: Classifiers, images: Tensor, labels: Tensor) -> Tensor:
    return (classifiers(images).argmax(2) == labels).float().mean(1)


def common(images: Tensor, labels: Tensor, value: float, own: bool = True) -> Classifiers:
    return fit(images, labels, torch.full((len(images),), value), own)


def pooled(images: Tensor, labels: Tensor, value: float) -> Classifiers:
    return common(images.flatten(0, 1)[None], labels.flatten()[None], value, own=False)


def search(method, train: tuple, validation: tuple, whole: tuple) -> Classifiers:
    scores = {value: accuracies(method(*train, value), *validation).mean() for value in SEARCHED}
    return method(*whole, max(scores, key=scores.__getitem__))


def run(case: Case):
    count, updates = (40, 4) if case.quick else (40, 100)
    (images, labels, *test), half = related_tasks(case.data, case.seed, count, 1_000), count // 2
    train, validation = (images[:, :half], labels[:, :half]), (images[:, half:], labels[:, half:])
    case.note(updates=updates, lower_steps=STEPS, rate=RATE, strength_rate=STRENGTH_RATE, searched=SEARCHED)
    found = {}
    with case.method(LEARNED) as method:
        path = learn(case, train, validation, updates)
        found[LEARNED] = accuracies(fit(images, labels, path[-1]), *test)
        method.report(accuracy=found[LEARNED].mean(), worst=found[LEARNED].min())
    for name, baseline in ((COMMON, common), (ALONE, partial(common, own=False)), (POOLED, pooled)):
        with case.method(name) as method:
            found[name] = accuracies(search(baseline, train, validation, (images, labels)), *test)
            method.report(accuracy=found[name].mean(), worst=found[name].min())
    return found, torch.stack(path)


def draw(figure: Figure, picture) -> None:
    found, path = picture
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    for offset, (name, values) in enumerate(found.items()):
        left.bar(torch.arange(len(NAMES)) + 0.2 * (offset - 1.5), 100 * values, 0.2, label=name)
    left.set_xticks(range(len(NAMES)), NAMES, rotation=15)
    left.set(title="Test accuracy of each task, %", ylim=(0, 100))
    left.legend(ncols=4, loc="upper center", fontsize=9)
    for name, curve in zip(NAMES, path.T, strict=True):
        right.semilogy(curve, label=name)
    right.set(title="Learned strength of the pull to the centre", xlabel="upper steps")
    right.legend(fontsize=8, ncols=2)


EXPERIMENT = Experiment(
    "Eight tasks, one centre", run, draw, metric="accuracy", ours=LEARNED, baselines=(COMMON, ALONE, POOLED)
)

if __name__ == "__main__":
    main(EXPERIMENT)
