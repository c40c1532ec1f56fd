"""W1: logistic regression whose weight decay, one rate a feature, is learned on validation data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

Batch = tuple[Tensor, Tensor]


@dataclass
class Regression:
    """Lower: weights ``w``, SGD. Upper: logarithms ``decay`` of the weight decay, Adam."""

    features: int = 20
    unroll: int = 1
    seed: int = 0
    lower_lr: float = 0.1
    upper_lr: float = 0.01
    terms: int = 10
    series_step: float = 0.1
    rel_step: float = 0.01
    weights: Tensor = field(init=False)
    decay: Tensor = field(init=False)
    train: Batch = field(init=False)
    validation: Batch = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        rows = 256 if self.features <= 100 else 1024
        truth = torch.randn(self.features, generator=generator) * (torch.rand(self.features, generator=generator) < 0.3)
        x = torch.randn(2 * rows, self.features, generator=generator)
        noise = 0.3 * torch.randn(2 * rows, generator=generator)
        y = ((x @ truth) / math.sqrt(self.features) + noise > 0).float()
        self.train, self.validation = (x[:rows], y[:rows]), (x[rows:], y[rows:])
        self.weights, self.decay = torch.zeros(self.features), torch.full((self.features,), -4.0)

    def train_loss(self, weights: Tensor, decay: Tensor, batch: Batch) -> Tensor:
        x, y = batch
        return F.binary_cross_entropy_with_logits(x @ weights, y) + 0.5 * (decay.exp() * weights * weights).sum()

    def validation_loss(self, weights: Tensor, batch: Batch) -> Tensor:
        x, y = batch
        return F.binary_cross_entropy_with_logits(x @ weights, y)

    def quality(self, weights: Tensor) -> float:
        return float(self.validation_loss(weights.detach(), self.validation))
