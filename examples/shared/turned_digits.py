"""Upright digits for training, and digits that are turned, shrunk, moved and dimmed for validation and test."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from shared.augmentation import RandomTransformation
from shared.data import images

TRUE = {"centres": (0.3, -0.25, 0.0, 0.0, 0.0, -0.7), "half_widths": (0.5, 0.25, 0.0, 0.2, 0.2, 0.4)}
"""How the digits of validation and test are transformed; see ``shared.augmentation.KINDS``."""
USUAL = {"half_widths": (0.26, 0.1, 0.1, 0.1, 0.1, 0.2)}
"""An augmentation as one would choose it for digits."""
Set = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TurnedDigits:
    """Images and labels of MNIST: upright ones, and transformed ones of validation and test."""

    train: Set
    validation: Set
    test: Set


def turned_digits(folder: Path, train: int, validation: int, seed: int) -> TurnedDigits:
    """Return random training and validation images of MNIST, and its whole test part."""
    generator = torch.Generator().manual_seed(seed)
    data, true = images.mnist(folder), RandomTransformation(**TRUE)
    order = torch.randperm(len(data.train), generator=generator)
    first, second = order[: train + validation].split([train, validation])
    with torch.no_grad():
        return TurnedDigits(
            (data.train[first], data.train_labels[first]),
            (true(data.train[second], generator), data.train_labels[second]),
            (true(data.test, generator), data.test_labels),
        )


def new_network() -> nn.Module:
    convolutions = (nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*convolutions, nn.Linear(800, 64), nn.ReLU(), nn.Linear(64, 10))


def accuracy(network: nn.Module, digits: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (network(digits).argmax(1) == labels).float().mean().item()
