"""Dataset distillation: ten images that stand for 59,000.

One image for each digit is learned, with a soft label and the learning rate, so that a network that is trained on these
ten images alone classifies real digits. The lower level takes T = 20 steps of gradient descent on the ten images, from
a new initialisation each time. The upper level compares the trained network with batches of real images:

    min_{x, y, a}  L_real(theta_T)   with   theta_{t+1} = theta_t - a grad_theta CE(f_theta(x), y),   theta_0 random

The steps are few and the network is far from a minimum, so the derivative is that of the steps (`Unrolled`).

All sets of ten images are judged in the same way: five networks of new initialisations are trained on each, by gradient
descent on all ten images, and classify the 10,000 test images. The distilled set brings its learning rate and its 20
steps. The baselines are ten random images, one of a class; the best of 20 such sets on held-out images; ten means; and
the ten images nearest to these. Their learning rate (0.05, 0.1, 0.2) and number of steps (20, 100 or 300) are searched
on 1,000 images that are held out of the training part. The rate of the upper level (0.05) was not searched: 0.02, in a
short run, was the only other one that was tried.

Data: MNIST. Wang, Zhu, Torralba, Efros, Dataset distillation, arXiv:1811.10959, section 3; soft labels: Sucholutsky,
Schonlau, Soft-label dataset distillation and text dataset distillation, IJCNN 2021.
"""

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

import nestor
from shared import small_sets
from shared.batches import Batches
from shared.data import images
from shared.experiment import Case, Experiment, Method, main

STEPS, UPDATES, UPPER_RATE, BATCH, HELD_OUT = 20, 240, 0.05, 256, 1_000


class Distilled(nn.Module):
    """Ten images, their soft labels, and the learning rate of the steps on them."""

    def __init__(self, start: Tensor, rate: float) -> None:
        super().__init__()
        self.images = nn.Parameter(start.clone())
        self.logits = nn.Parameter(4.0 * torch.eye(len(start)))
        self.rate = nn.Parameter(torch.tensor(rate))


def distilled_loss(network, distilled):  # lower level: the ten images are all that it sees
    return F.cross_entropy(network(distilled.images), distilled.logits.softmax(1))


def real_loss(batch, network):  # upper level: reads the trained network
    inputs, labels = batch
    return F.cross_entropy(network(inputs), labels)


class Restart(nestor.callbacks.Callback):
    """Starts each inner loop from a new initialisation of the network; keeps the images of some updates."""

    def __init__(self, network: nn.Module, distilled: Distilled, every: int) -> None:
        self.network, self.distilled, self.every = network, distilled, every
        self.updates, self.frames = 0, [distilled.images.detach().clone()]

    def on_level_step(self, engine, level):
        if level == "distilled":
            small_sets.initialise(self.network)
            self.updates += 1
            if self.updates % self.every == 0:
                self.frames.append(self.distilled.images.detach().clone())


def distil(case: Case, start: Tensor, real: Batches, updates: int) -> tuple[Distilled, list[Tensor]]:
    network, distilled = small_sets.new_network(), Distilled(start, rate=0.1)
    groups = [{"params": [distilled.images, distilled.logits]}, {"params": [distilled.rate], "lr": 2e-3}]
    optimizer = Adam(groups, lr=UPPER_RATE)
    program = nestor.Program(
        network=nestor.Problem(network, distilled_loss, optimizer=SGD(network.parameters(), lr=distilled.rate),
                               unroll_steps=STEPS, response=nestor.Unrolled(checkpoint="none")),
        distilled=nestor.Problem(distilled, real_loss, data=real, optimizer=optimizer,
                                 scheduler=CosineAnnealingLR(optimizer, updates, eta_min=UPPER_RATE / 20)),
    )  # fmt: skip
    restart = Restart(network, distilled, every=max(updates // 4, 1))
    case.train("distilled", program, updates * STEPS, callbacks=[restart])
    return distilled, restart.frames


def run(case: Case) -> list[Tensor]:
    updates, networks, lengths = (4, 1, (5,)) if case.quick else (UPDATES, 5, small_sets.LENGTHS)
    data = images.mnist(case.data)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(case.seed))
    first, others = order[:2_200].split([200, 2_000]) if case.quick else order.split([HELD_OUT, 60_000 - HELD_OUT])
    held, test = (data.train[first], data.train_labels[first]), (data.test, data.test_labels)
    inputs, labels = data.train[others], data.train_labels[others]
    digits = [inputs[labels == digit] for digit in range(10)]

    def judge(method: Method, chosen: Tensor, targets: Tensor, rate: float, steps: int) -> None:
        ends = [small_sets.train(chosen, targets, rate, steps) for _ in range(networks)]
        for metric, images_of in {"accuracy": test, "held_out": held}.items():
            method.report(**{metric: sum(small_sets.accuracy(network, *images_of) for network in ends) / networks})
        method.report(rate=rate, steps=steps)

    for name, choose in small_sets.CHOICES.items():
        with case.method(name) as method:
            chosen = choose(digits, held)
            judge(method, chosen, torch.arange(10), *small_sets.search(chosen, held, lengths))
    with case.method("distilled") as method:
        start = small_sets.random_images(digits, held)
        distilled, frames = distil(case, start, Batches(inputs, labels, size=BATCH), updates)
        judge(method, distilled.images.detach(), distilled.logits.detach().softmax(1), distilled.rate.item(), STEPS)
    case.note(updates=updates, steps=STEPS, batch=BATCH, upper_rate=UPPER_RATE, networks=networks)
    return frames


def draw(figure: Figure, frames: list[Tensor]) -> None:
    grid = figure.subplots(len(frames), 10)
    for row, (axes, frame) in enumerate(zip(grid, frames, strict=True)):
        for axis, image in zip(axes, frame, strict=True):
            bound = image.abs().max().item()
            axis.imshow(image[0], cmap="gray" if row == 0 else "RdGy_r", vmin=0 if row == 0 else -bound, vmax=bound)
            axis.set(xticks=[], yticks=[])
        axes[0].set_ylabel(f"update\n{row * max(UPDATES // 4, 1)}", rotation=0, ha="right", va="center")
    figure.suptitle("Ten real digits become ten training images (red: positive, grey: negative)", fontsize=11)


EXPERIMENT = Experiment(
    title="Dataset distillation: ten images of MNIST",
    run=run,
    draw=draw,
    metric="accuracy",
    ours="distilled",
    baselines=("best of 20 random sets", "mean images", "central images", "random images"),
)

if __name__ == "__main__":
    main(EXPERIMENT)
