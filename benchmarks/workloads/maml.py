"""W4: second-order MAML: five SGD steps a task, four tasks a meta-batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FewShotCNN(nn.Module):
    """Images 28 x 28, five classes."""

    def __init__(self, width: int = 32, classes: int = 5) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(1, width, 3, padding=1)
        self.c2 = nn.Conv2d(width, width, 3, padding=1)
        self.c3 = nn.Conv2d(width, width, 3, padding=1)
        self.f = nn.Linear(width * 9, classes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.c1, self.c2, self.c3):
            x = F.max_pool2d(F.relu(layer(x)), 2)
        return self.f(x.flatten(1))


@dataclass
class MAML:
    """The model, and one meta-batch: tensors with a leading dimension of tasks."""

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    support: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]
    inner_lr: float
    outer_lr: float = 1e-3
    inner_steps: int = 5

    @property
    def tasks(self) -> int:
        return len(self.support[0])

    def quality(self) -> float:
        """The loss on the first task's queries after one step from the model's parameters."""
        parameters = dict(self.model.named_parameters())
        x, y = self.support[0][0], self.support[1][0]
        grads = torch.autograd.grad(self.loss(self.model(x), y), list(parameters.values()))
        moved = {k: p - self.inner_lr * g for (k, p), g in zip(parameters.items(), grads, strict=True)}
        with torch.no_grad():
            out = torch.func.functional_call(self.model, moved, (self.query[0][0],))
            return float(self.loss(out, self.query[1][0]))


def sinusoid(tasks: int = 4, seed: int = 0) -> MAML:
    """Regression on sine waves, a small MLP, ten shots."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    height, phase = torch.rand(tasks, 1, 1) * 4.9 + 0.1, torch.rand(tasks, 1, 1) * math.pi
    points = [torch.rand(tasks, 10, 1) * 10 - 5 for _ in range(2)]
    support, query = [(x, height * torch.sin(x + phase)) for x in points]
    return MAML(model, F.mse_loss, support, query, inner_lr=0.01)


def few_shot(tasks: int = 4, seed: int = 0) -> MAML:
    """Five-way, five-shot images, a small CNN."""
    torch.manual_seed(seed)
    labels = [torch.arange(5).repeat(shots).expand(tasks, -1).contiguous() for shots in (5, 15)]
    images = [torch.randn(tasks, y.shape[1], 1, 28, 28) for y in labels]
    model = FewShotCNN()
    return MAML(model, F.cross_entropy, (images[0], labels[0]), (images[1], labels[1]), inner_lr=0.1)
