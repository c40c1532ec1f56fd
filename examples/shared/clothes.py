"""Fashion-MNIST as the batches of one short training, and a small network for it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nestor
from shared.data.images import fashion_mnist

Batch = tuple[Tensor, Tensor]


class Losses(nestor.callbacks.Callback):
    """The training loss of each step of the level ``net``."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_step(self, engine) -> None:
        """Note the loss."""
        self.values.append(engine.read_metrics()["net/loss"])


def perceptron(seed: int) -> nn.Module:
    """Return a network of 50,890 weights."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.GELU(), nn.Linear(64, 10))


def cross_entropy(batch: Batch, net: nn.Module) -> Tensor:
    """Loss of training, and of validation."""
    images, labels = batch
    return F.cross_entropy(net(images), labels)


@dataclass(frozen=True)
class Clothes:
    """The batches of a training in their order, and all validation and test images as one batch each."""

    train: list[Batch]
    validation: Batch
    test: Batch

    def train_with(self, update: Callable[..., Any], seed: int) -> tuple[nn.Module, list[float]]:
        """Train a network with an update rule; return it and its loss at each step."""
        net, losses = perceptron(seed), Losses()
        program = nestor.Program(net=nestor.Problem(net, cross_entropy, data=self.train, update=update))
        nestor.Engine(program, seed=seed, callbacks=[losses]).run(len(self.train))
        return net.requires_grad_(False), losses.values


def clothes(folder: Path, seed: int, steps: int, *, train: int, validation: int, batch: int) -> Clothes:
    """Draw training and validation images from the training part of Fashion-MNIST."""
    images, generator = fashion_mnist(folder), torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(images.train), generator=generator)[: train + validation]
    pixels, labels = images.train[drawn], images.train_labels[drawn]
    epochs = [torch.randperm(train, generator=generator).split(batch) for _ in range(steps * batch // train + 1)]
    batches = [(pixels[index], labels[index]) for epoch in epochs for index in epoch]
    return Clothes(batches[:steps], (pixels[train:], labels[train:]), (images.test, images.test_labels))
