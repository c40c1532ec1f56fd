"""Small problems with dense closed forms."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class Cell(nn.Module):
    """A contraction ``z -> tanh(W z + b + x)``, with a frozen parameter and a buffer."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        nn.init.normal_(self.linear.weight, std=0.3)
        self.frozen = nn.Parameter(torch.full((size,), 0.1), requires_grad=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.linear(z) + x + self.frozen)


def iterate(update: Callable[[Tensor, Tensor], Tensor], start: Tensor, x: Tensor, steps: int = 200) -> Tensor:
    """Find a fixed point by iteration; with gradients enabled, the graph of all iterations."""
    for _ in range(steps):
        start = update(start, x)
    return start


def dense_pull_back(
    residual: Callable[[Tensor], Tensor], z: Tensor, wrt: Sequence[Tensor], cotangent: Tensor
) -> list[Tensor]:
    """The implicit function theorem with a dense matrix: ``-(dr/dwrt)^T (dr/dz)^{-T} c``."""
    matrix = torch.autograd.functional.jacobian(residual, z.detach()).reshape(z.numel(), z.numel())
    adjoint = torch.linalg.solve(matrix.T.detach(), cotangent.reshape(-1)).reshape(z.shape)
    return list(torch.autograd.grad(residual(z.detach()), wrt, -adjoint))
