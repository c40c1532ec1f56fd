"""The derivative of 200 Adam steps of an MLP in the weights of its samples."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Unrolling:
    """Lower: the MLP, Adam. Upper: one weight a sample, SGD."""

    width: int = 256
    steps: int = 200
    seed: int = 0
    lower_lr: float = 1e-4
    upper_lr: float = 1.0
    model: nn.Module = field(init=False)
    weights: Tensor = field(init=False)
    train: tuple[Tensor, Tensor] = field(init=False)
    validation: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        w = self.width
        self.model = nn.Sequential(nn.Linear(32, w), nn.Tanh(), nn.Linear(w, w), nn.Tanh(), nn.Linear(w, 1))
        self.weights = torch.zeros(64)
        self.train, self.validation = ((torch.randn(64, 32), torch.randn(64, 1)) for _ in range(2))

    def train_loss(self, model: nn.Module, weights: Tensor) -> Tensor:
        x, y = self.train
        return (torch.sigmoid(weights) * ((model(x) - y) ** 2).squeeze(1)).mean()

    def validation_loss(self, model: nn.Module) -> Tensor:
        x, y = self.validation
        return F.mse_loss(model(x), y)

    def quality(self) -> float:
        with torch.no_grad():
            return float(self.validation_loss(self.model))
