"""A loss that is a module, with a reformulation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nestor


class Lower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mse = nn.MSELoss()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, batch: Tensor, net: nn.Module, weight: nn.Module) -> Tensor:
        return self.scale * self.mse(net(batch), weight().expand(len(batch), 1))


class Upper(nn.Module):
    def forward(self, batch: Tensor, net: nn.Module) -> dict[str, Tensor]:
        return {"loss": net(batch).square().mean()}


def metrics(method: nestor.Reformulation, lower: Callable[..., Any], upper: Callable[..., Any]) -> dict[str, float]:
    torch.manual_seed(0)
    net, weight, data = nn.Linear(2, 1), nestor.Variable(torch.zeros(1)), [torch.ones(3, 2)]
    program = nestor.Program(
        net=nestor.Problem(
            net, lower, data=data, optimizer=torch.optim.SGD(net.parameters(), lr=0.01), reformulation=method
        ),
        weight=nestor.Problem(weight, upper, data=data, optimizer=torch.optim.SGD(weight.parameters(), lr=0.01)),
    )
    program.explain()
    return nestor.Engine(program, seed=0).run(3)


@pytest.mark.parametrize("method", [nestor.F2SA(), nestor.PBGD(), nestor.BOME()], ids=lambda method: method.describe())
def test_equals_a_function(method: nestor.Reformulation) -> None:
    """The run of the modules' ``forward`` written as functions."""

    def lower(batch: Tensor, net: nn.Module, weight: nn.Module) -> Tensor:
        return 2.0 * (net(batch) - weight()).square().mean()

    def upper(batch: Tensor, net: nn.Module) -> Tensor:
        return net(batch).square().mean()

    found, expected = metrics(method, Lower(), Upper()), metrics(method, lower, upper)
    assert found.keys() == expected.keys()
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-3)
