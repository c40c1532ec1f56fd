"""Learned augmentation: the ranges of random transformations, fitted to digits of another kind.

The training images are 1,000 upright digits. The digits to be classified are turned, shrunk, moved and dimmed by
unknown amounts; 300 labelled ones are there for validation. Each training image is transformed at random (rotation,
zoom, shear, two shifts, contrast) by amounts c + h u with u uniform in [-1, 1]. The upper level learns the six centres
c and six half-widths h from the validation loss of the network that the lower level trains on transformed images:

    min_{c, h}  L_validation(theta*(c, h))
    with  theta*(c, h) = argmin_theta  E_u L_train(theta, transform(images, c + h u))

The network takes many cheap steps, so the response is `T1T2`. Every method has the same network, optimizer and number
of lower steps. The baselines are: no augmentation; a usual one (15 degrees, 10 % of zoom, shear and shift, 20 % of
contrast); both again with the validation images among the training images; and one half-width for all kinds, chosen by
validation from 0.15, 0.3 and 0.6. The oracle draws from the true ranges. The rate of the upper level is 0.02; 0.01
without a schedule was the only other one that was tried.

The learned ranges of rotation and shear are wider than the true ones, and that of contrast is narrower: `T1T2` looks
one step ahead, where a wide range costs little. Therefore the oracle stays better.

Data: MNIST, transformed. Lorraine, Vicol, Duvenaud, Optimizing millions of hyperparameters by implicit differentiation,
AISTATS 2020 (its experiment with learned data augmentation); Hataya, Zdenek, Yoshizoe, Nakayama, Meta approach to data
augmentation optimization, WACV 2022, section 3.
"""

from functools import partial

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

import nestor
from shared.augmentation import KINDS, RandomTransformation
from shared.batches import Batches
from shared.experiment import Case, Experiment, Method, main
from shared.turned_digits import TRUE, USUAL, accuracy, new_network, turned_digits

STRENGTHS, STEPS, BATCH, UPPER_RATE, TRAIN, VALIDATION = (0.15, 0.3, 0.6), 1_000, 100, 0.02, 1_000, 300


def augmented_loss(batch, classifier, augmentation):  # lower level: upright digits, transformed at random
    digits, labels = batch
    return F.cross_entropy(classifier(augmentation(digits)), labels)


def target_loss(batch, classifier):  # upper level: digits of the other kind, as they are
    digits, labels = batch
    return F.cross_entropy(classifier(digits), labels)


def level(network: nn.Module, loss, data: Batches, steps: int, **options) -> nestor.Problem:
    optimizer = SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    scheduler = CosineAnnealingLR(optimizer, steps)
    return nestor.Problem(network, loss, data=data, optimizer=optimizer, scheduler=scheduler, **options)


def learn(case: Case, network: nn.Module, train: Batches, validation: Batches, steps: int) -> list[nn.Module]:
    augmentation = RandomTransformation(half_widths=[0.1] * 6)
    optimizer = Adam(augmentation.parameters(), lr=UPPER_RATE)
    program = nestor.Program(
        classifier=level(network, augmented_loss, train, steps, unroll_steps=2, response=nestor.T1T2()),
        augmentation=nestor.Problem(augmentation, target_loss, data=validation, optimizer=optimizer,
                                    scheduler=CosineAnnealingLR(optimizer, steps // 2, eta_min=UPPER_RATE / 20)),
    )  # fmt: skip
    film = Film(augmentation, every=max(steps // 40, 1))
    case.train("learned", program, steps, callbacks=[film])
    return [*film.frames, augmentation]


class Film(nestor.callbacks.Callback):
    """Keeps the ranges of some steps."""

    def __init__(self, augmentation: RandomTransformation, every: int) -> None:
        self.augmentation, self.every, self.frames = augmentation, every, []

    def on_step(self, engine):
        if (engine.step - 1) % self.every == 0:
            self.frames.append(self.augmentation.copy())


def run(case: Case) -> tuple[list[nn.Module], Tensor, Tensor]:
    steps = 20 if case.quick else STEPS
    data = turned_digits(case.data, TRAIN, VALIDATION, case.seed)
    upright = Batches(*data.train, size=BATCH)
    mixed = Batches(*map(torch.cat, zip(data.train, data.validation, strict=True)), size=BATCH)

    def train(name: str, batches: Batches, ranges: nn.Module) -> nn.Module:
        network, loss = new_network(), partial(augmented_loss, augmentation=ranges.requires_grad_(False))
        case.train(name, nestor.Program(classifier=level(network, loss, batches, steps)), steps)
        return network

    def report(method: Method, network: nn.Module) -> None:
        method.report(accuracy=accuracy(network, *data.test), validation=accuracy(network, *data.validation))

    none, usual, true = (RandomTransformation(**r) for r in ({}, USUAL, TRUE))
    fixed = {"none": (upright, none), "usual": (upright, usual), "true ranges (oracle)": (upright, true)}
    fixed |= {"none, train + validation": (mixed, none), "usual, train + validation": (mixed, usual)}
    for name, (batches, ranges) in fixed.items():
        with case.method(name) as method:
            report(method, train(name, batches, ranges))
    with case.method("one strength, by validation") as method:
        ranges = {f"strength {strength}": RandomTransformation(half_widths=[strength] * 6) for strength in STRENGTHS}
        networks = [train(name, upright, each) for name, each in ranges.items()]
        report(method, max(networks, key=lambda network: accuracy(network, *data.validation)))
    with case.method("learned") as method:
        network = new_network()
        frames = learn(case, network, upright, Batches(*data.validation, size=BATCH), steps)
        report(method, network)
    case.note(steps=steps, batch=BATCH, train=TRAIN, validation=VALIDATION, lower_rate=0.05, upper_rate=UPPER_RATE)
    return frames, data.train[0][:9], data.validation[0][:9]


def draw(figure: Figure, picture: tuple[list[nn.Module], Tensor, Tensor]) -> None:
    frames, digits, targets = picture
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    middle = torch.stack([frame.centres.detach() for frame in frames])
    half = torch.stack([frame.half_widths.detach().abs() for frame in frames])
    steps = torch.linspace(0, STEPS, len(middle))
    for i, axis in enumerate(left.subplots(2, 3, sharex=True, sharey=True).flat):
        axis.fill_between(steps, (middle - half)[:, i], (middle + half)[:, i], alpha=0.35)
        for sign in (-1, 1):
            axis.axhline(TRUE["centres"][i] + sign * TRUE["half_widths"][i], color="black", ls="--", lw=0.9)
        axis.set_title(KINDS[i], fontsize=10)
    left.suptitle("Learned ranges over the lower steps (true ones dashed)", fontsize=11)
    rows = {"train": digits}
    with torch.no_grad():
        rows |= {f"step {int(steps[i])}": frames[i](digits) for i in (0, len(frames) // 3, len(frames) - 1)}
    rows["target"] = targets
    for axes, (name, images) in zip(right.subplots(len(rows), 9), rows.items(), strict=True):
        for axis, image in zip(axes, images, strict=True):
            axis.imshow(image[0], cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        axes[0].set_ylabel(name, rotation=0, ha="right", va="center")
    right.suptitle("The same digits, transformed as learned", fontsize=11)


EXPERIMENT = Experiment(
    title="Learned augmentation for digits of another kind",
    run=run,
    draw=draw,
    metric="accuracy",
    ours="learned",
    baselines=("usual, train + validation", "one strength, by validation", "usual", "none, train + validation", "none"),
)

if __name__ == "__main__":
    main(EXPERIMENT)
