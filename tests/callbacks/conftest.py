"""A small bilevel program to watch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nestor


def rows(seed: int) -> Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low(batch: Tensor, net: Any, lam: Any) -> dict[str, Tensor]:
    fit = (net(batch) - 1).square().mean()
    return {"loss": fit + (lam().exp() * net.weight**2).sum(), "fit": fit}


def up(batch: Tensor, net: Any) -> Tensor:
    return (net(batch) - 1).square().mean()


def build(**options: Any) -> nestor.Engine:
    """An engine whose upper level steps first after two lower steps."""
    torch.manual_seed(0)
    net, lam = nn.Linear(3, 1).double(), nestor.Variable(torch.zeros(1, 3).double())
    groups = [{"params": [net.weight]}, {"params": [net.bias], "lr": 0.02}]
    program = nestor.Program(
        net=nestor.Problem(net, low, data=[rows(1)], optimizer=torch.optim.SGD(groups, 0.1), unroll_steps=2),
        lam=nestor.Problem(lam, up, data=[rows(2)], optimizer=torch.optim.Adam(lam.parameters(), 0.1)),
    )
    return nestor.Engine(program, seed=0, **options)


@pytest.fixture
def make() -> Callable[..., nestor.Engine]:
    """Build engines."""
    return build
