"""Digits joined to their nearest neighbours, a few of them labelled."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from shared.data import images


@dataclass
class Digits:
    """Digits, the matrix that averages over their neighbours, and the indices of the labelled ones and of the rest."""

    inputs: Tensor
    labels: Tensor
    graph: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor


def digit_graph(folder: Path, seed: int, count: int, labelled: int, neighbours: int) -> Digits:
    """Return digits of MNIST, ``labelled`` of each class for training and as many for validation."""
    mnist, generator = images.mnist(folder), torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(mnist.train), generator=generator)[:count]
    inputs, labels = mnist.train[chosen].flatten(1), mnist.train_labels[chosen]
    distances = torch.cdist(inputs, inputs).fill_diagonal_(torch.inf)
    near = distances.topk(neighbours, largest=False).indices
    places = torch.stack([torch.arange(count).repeat_interleave(neighbours), near.flatten()])
    values = torch.full((count * neighbours,), 1 / neighbours)
    graph = torch.sparse_coo_tensor(places, values, (count, count), check_invariants=True)
    order = torch.stack([(labels == digit).nonzero().flatten()[: 2 * labelled] for digit in range(10)])
    rest = torch.ones(count, dtype=torch.bool)
    rest[order.flatten()] = False
    train, validation = order.split(labelled, dim=1)
    test = rest.nonzero().flatten()
    return Digits(inputs, labels, graph.coalesce(), train.flatten(), validation.flatten(), test)


@dataclass
class Accuracies:
    """Accuracy on validation and test digits at each validation of a training."""

    digits: Digits
    validation: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)

    def note(self, predicted: Tensor) -> None:
        """Compare the predicted labels of all digits with the true ones."""
        right = (predicted == self.digits.labels).float()
        self.validation.append(float(right[self.digits.validation].mean()))
        self.test.append(float(right[self.digits.test].mean()))

    @property
    def best_validation(self) -> float:
        """The best accuracy on the validation digits."""
        return max(self.validation)

    @property
    def early_stopped(self) -> float:
        """The accuracy on the test digits when that on the validation digits was best for the first time."""
        return self.test[self.validation.index(self.best_validation)]
