"""The derivative of a whole training run in the weights of its samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.workloads.reweighting import SmallCNN

Batch = tuple[Tensor, Tensor, Tensor]


@dataclass
class Metagradient:
    """Lower: a whole training run with Adam. Upper: one weight for each sample, SGD, on the loss of clean samples.

    Attributes:
        model: The model.
        weights: The weights, ones.
        batches: Inputs, labels and indices of the samples of each step of the run.
        clean: Inputs and labels for the upper loss.
    """

    model: nn.Module
    weights: Tensor
    batches: list[Batch]
    clean: tuple[Tensor, Tensor]
    lower_lr: float = 1e-3
    upper_lr: float = 1.0

    @property
    def steps(self) -> int:
        return len(self.batches)

    def train_loss(self, model: Callable[[Tensor], Tensor], weights: Tensor, batch: Batch) -> Tensor:
        x, y, indices = batch
        return (weights[indices] * F.cross_entropy(model(x), y, reduction="none")).mean()

    def validation_loss(self, model: Callable[[Tensor], Tensor]) -> Tensor:
        x, y = self.clean
        return F.cross_entropy(model(x), y)

    def quality(self) -> float:
        with torch.no_grad():
            return float(self.validation_loss(self.model))


def digits(steps: int = 150, batch: int = 200, hidden: int = 32) -> Metagradient:
    """An MLP of 2,400 weights on the 1,797 digits of 8 x 8 pixels that scikit-learn contains."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    samples = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, hidden), nn.GELU(), nn.Linear(hidden, 10))
    return _of(model, samples, steps, batch)


def images(steps: int = 60, batch: int = 50, width: int = 8) -> Metagradient:
    """A small CNN on random images of 28 x 28 pixels."""
    torch.manual_seed(0)
    samples = torch.randn(1000, 1, 28, 28), torch.randint(0, 10, (1000,))
    return _of(SmallCNN(width), samples, steps, batch)


def _of(model: nn.Module, samples: tuple[Tensor, Tensor], steps: int, batch: int) -> Metagradient:
    x, y = samples
    count = len(x) - 100  # the last hundred are the clean ones
    order = [torch.randperm(count)[:batch] for _ in range(steps)]
    batches = [(x[indices], y[indices], indices) for indices in order]
    return Metagradient(model, torch.ones(count), batches, (x[count:], y[count:]))
