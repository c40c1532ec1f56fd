"""Fashion-MNIST with wrong labels, a few clean images, and a small convolutional network for it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

import nestor
from shared.batches import Batches
from shared.data.images import fashion_mnist

Labelled = tuple[Tensor, Tensor]
RATE, BATCH = 0.05, 100
SETTINGS = {"rate": RATE, "batch": BATCH}
NAMES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


@dataclass(frozen=True)
class NoisyClothes:
    """Images with the labels that are given.

    Attributes:
        train: Images and labels, of which some are wrong.
        wrong: Which of them.
        guide: Clean images that a method may learn from.
        validation: Clean images that stop a training, and that rates were chosen on.
        test: The test part of the data.
    """

    train: Labelled
    wrong: Tensor
    guide: Labelled
    validation: Labelled
    test: Labelled

    def all_labelled(self) -> Labelled:
        """Return the training images and the guide together."""
        images, labels = zip(self.train, self.guide, strict=True)
        return torch.cat(images), torch.cat(labels)


def load(folder: Path, seed: int, noise: float, train: int, guide: int, validation: int) -> NoisyClothes:
    """Draw parts of Fashion-MNIST; a share of the training labels becomes another class, each equally often."""
    data, generator = fashion_mnist(folder), torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.train), generator=generator)[: train + guide + validation]
    parts = [(data.train[index], data.train_labels[index]) for index in order.split([train, guide, validation])]
    wrong = torch.rand(train, generator=generator) < noise
    shift = torch.randint(1, 10, (train,), generator=generator)
    noisy = (parts[0][0], (parts[0][1] + wrong * shift) % 10)
    return NoisyClothes(noisy, wrong, parts[1], parts[2], (data.test, data.test_labels))


def small_cnn(seed: int, width: int = 8) -> nn.Module:
    """Return a network of two convolutions with strides and two linear layers."""
    torch.manual_seed(seed)
    first = (nn.Conv2d(1, width, 5, stride=2, padding=2), nn.ReLU())
    second = (nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*first, *second, nn.Linear(98 * width, 64), nn.ReLU(), nn.Linear(64, 10))


def plain_loss(batch: Labelled, classifier: nn.Module) -> Tensor:
    """Return the mean loss of a batch, all images alike."""
    images, labels = batch
    return F.cross_entropy(classifier(images), labels)


def level(classifier: nn.Module, loss, images: Labelled, steps: int, rate=RATE, **options) -> nestor.Problem:
    """Return the level of a classifier: SGD with momentum and a cosine schedule."""
    optimizer = SGD(classifier.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    scheduler, data = CosineAnnealingLR(optimizer, steps), Batches(*images, size=BATCH)
    return nestor.Problem(classifier, loss, data=data, optimizer=optimizer, scheduler=scheduler, **options)


def outputs(network: nn.Module, images: Tensor) -> Tensor:
    """Return logits without a graph, computed in parts."""
    with torch.no_grad():
        return torch.cat([network(part) for part in images.split(1_000)])


def accuracy(network: nn.Module, labelled: Labelled) -> Tensor:
    """Return the share of images that a network classifies right."""
    images, labels = labelled
    return (outputs(network, images).argmax(1) == labels).float().mean()


def draw_row(line: Any, title: str, data: NoisyClothes, chosen: Tensor) -> None:
    """Draw training images with the labels that are given, wrong ones red, into a row of axes."""
    for axis in line:
        axis.set_axis_off()
    for index, axis in zip(chosen.tolist(), line, strict=False):
        axis.imshow(data.train[0][index, 0], cmap="gray_r")
        color = "C3" if data.wrong[index] else "black"
        axis.set_title(NAMES[int(data.train[1][index])], fontsize=8, color=color)
    line[0].text(-0.2, 0.5, title, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
