"""W5: ``depth`` levels, each a small MLP whose loss is near to those of the levels it reads."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Depth:
    """Levels from the lowest up; each reads every other one (``full``), or those beside it."""

    depth: int = 3
    full: bool = True
    seed: int = 0
    lr: float = 0.01
    rel_step: float = 0.01
    levels: list[nn.Module] = field(init=False)
    x: Tensor = field(init=False)
    y: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.levels = [nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1)) for _ in range(self.depth)]
        self.x = torch.randn(64, 16)
        self.y = [torch.randn(64, 1) for _ in range(self.depth)]

    def reads(self, index: int) -> list[int]:
        """The levels that the loss of a level reads besides its own."""
        return [i for i in range(self.depth) if i != index and (self.full or abs(i - index) == 1)]

    def loss(self, index: int, modules: dict[int, nn.Module]) -> Tensor:
        total = F.mse_loss(modules[index](self.x), self.y[index])
        for other in self.reads(index):
            pairs = zip(modules[index].parameters(), modules[other].parameters(), strict=True)
            total = total + 0.05 * sum(((p - q) ** 2).sum() for p, q in pairs)
        return total

    def quality(self) -> float:
        with torch.no_grad():
            return float(self.loss(self.depth - 1, dict(enumerate(self.levels))))
