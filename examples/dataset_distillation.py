"""Dataset distillation: ten images that stand for 60,000.

One image for each digit is learned, with a soft label and the learning rate of each step, so that a network that is
trained on these ten images alone classifies real digits. The lower level takes T steps of gradient descent on the ten
images, from a new initialisation each time. The upper level compares the trained network with real images:

    min_{x, y, a}  L_real(theta_T)   with   theta_{t+1} = theta_t - a_t grad_theta CE(f_theta(x), y),   theta_0 random

The steps are few and the network is far from a minimum, so the derivative is that of the steps (`Unrolled`).

Every set of ten images is judged in the same way: new networks that no method has seen are trained on it for at most
T full-batch steps, and classify the 10,000 test images. The baselines are ten real images (random ones; those nearest
to a cluster centre of their class) and ten mean images. Their learning rate and number of steps are searched on 5,000
images that were held out of the training part; the distilled set brings its own rates. The last method draws its ten
images at random 20 times and keeps the set that is best on the held-out images.

Data: MNIST. Wang, Zhu, Torralba, Efros, Dataset distillation, arXiv:1811.10959, sections 3.1 to 3.3; soft labels:
Sucholutsky, Schonlau, Soft-label dataset distillation and text dataset distillation, IJCNN 2021.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.optim import SGD, Adam

import nestor
from shared.data import images
from shared.experiment import Case, Experiment, main

BATCH, HELD_OUT, RATES, JUDGES = 256, 5_000, (0.01, 0.02, 0.05, 0.1, 0.2), 5


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


class NewStart(nestor.callbacks.Callback):
    """Starts each inner loop from a new initialisation of the network."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def on_level_step(self, engine, level):
        if level == "distilled":
            initialise(self.network)


def distil(case: Case, start: Tensor, real: "Batches", updates: int, steps: int) -> tuple[Distilled, list[Tensor]]:
    network, distilled = new_network(), Distilled(start, rate=0.05)
    learned = [{"params": [distilled.images, distilled.logits]}, {"params": [distilled.rate], "lr": 1e-3}]
    program = nestor.Program(
        network=nestor.Problem(network, distilled_loss, optimizer=SGD(network.parameters(), lr=distilled.rate),
                               unroll_steps=steps, response=nestor.Unrolled()),
        distilled=nestor.Problem(distilled, real_loss, data=real, optimizer=Adam(learned, lr=0.02)),
    )  # fmt: skip
    case.train("distilled", program, updates * steps, callbacks=[NewStart(network)])
    return distilled
