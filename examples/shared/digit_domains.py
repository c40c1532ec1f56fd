"""Two domains of handwritten digits: MNIST with wrong labels as the source, scikit-learn's digits as the target."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from shared.batches import Batches
from shared.data.images import digits_28, mnist


@dataclass(frozen=True)
class Domains:
    """Batches of the two domains; those of the source hold the indices of the images, too.

    Attributes:
        source: MNIST.
        target: Few images of the target, for training.
        validation: Few other images of the target.
        given: The images of ``target`` and of ``validation``.
        test: All other images of the target, and their labels.
        wrong: Which labels of the source are wrong.
    """

    source: Batches
    target: Batches
    validation: Batches
    given: Batches
    test: tuple[Tensor, Tensor]
    wrong: Tensor

    def accuracy(self, net: nn.Module) -> float:
        """Return the accuracy on the test images."""
        with torch.no_grad():
            return float((net(self.test[0]).argmax(1) == self.test[1]).float().mean())


def domains(folder: Path, seed: int, source: int, target: int, validation: int, noise: float) -> Domains:
    """Draw the images of both domains, and the share ``noise`` of the labels that are wrong."""
    digits, others, generator = mnist(folder), digits_28(), torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(digits.train), generator=generator)[:source]
    wrong = torch.rand(source, generator=generator) < noise
    labels = (digits.train_labels[drawn] + wrong) % 10  # a wrong label is the next digit
    order, count = torch.randperm(len(others.labels), generator=generator), target + validation

    def part(index: Tensor) -> Batches:
        return Batches(others.images[index], others.labels[index], size=100)

    return Domains(
        Batches(digits.train[drawn], labels, torch.arange(source), size=100),
        part(order[:target]),
        part(order[target:count]),
        part(order[:count]),
        (others.images[order[count:]], others.labels[order[count:]]),
        wrong,
    )


def network() -> nn.Module:
    """Return a small convolutional network."""
    layers = (nn.Conv2d(1, 16, 7, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 64), nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(64, 10))
