"""Losses that set the mode of a module."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nestor

X, Y = torch.randn(16, 5, generator=torch.Generator().manual_seed(0)).double(), torch.arange(16) % 3

RESPONSES = {
    "T1T2": nestor.T1T2(),
    "FiniteDifference": nestor.FiniteDifference(),
    "Unrolled": nestor.Unrolled(),
    "CG": nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=5), damping=1.0),
    "SAMA": nestor.SAMA(),
}


def run(lower: Callable[[nn.Module], Any], upper: Callable[[nn.Module], Any], name: str) -> tuple[Tensor, nn.Module]:
    """Take four lower and two upper steps; return the upper variables."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)).double()
    weights = nestor.Variable(torch.zeros(16, dtype=torch.float64))

    def low(net: nn.Module, weights: nn.Module) -> Tensor:
        lower(net)
        return (torch.sigmoid(weights()) * F.cross_entropy(net(X), Y, reduction="none")).mean()

    def top(net: nn.Module) -> Tensor:
        upper(net)
        return F.cross_entropy(net(X.flip(0)), Y)

    program = nestor.Program(
        net=nestor.Problem(
            net, low, optimizer=torch.optim.Adam(net.parameters(), 0.01), unroll_steps=2, response=RESPONSES[name]
        ),
        weights=nestor.Problem(weights, top, optimizer=torch.optim.Adam(weights.parameters(), 0.1)),
    )
    nestor.Engine(program, seed=0).run(4)
    return weights().detach(), net


@pytest.mark.filterwarnings("ignore:.*differs from the one with exact derivatives")
@pytest.mark.parametrize("name", RESPONSES)
def test_a_mode_that_an_upper_loss_leaves(name: str) -> None:
    """The lower loss and its derivatives are evaluated in the mode of the lower steps; the module keeps its mode."""
    found, net = run(lambda net: None, nn.Module.eval, name)
    wanted, _ = run(nn.Module.train, nn.Module.eval, name)
    assert torch.equal(found, wanted)
    assert all(module.training for module in net.modules())


@pytest.mark.filterwarnings("ignore:.*differs from the one with exact derivatives")
def test_a_mode_of_a_part() -> None:
    """A part of the module may be in another mode."""

    def freeze(net: nn.Module) -> None:
        net[1].eval()  # type: ignore[index]

    found, net = run(freeze, freeze, "T1T2")
    assert [module.training for module in net.modules()] == [True] * 6
    other, _ = run(lambda net: None, lambda net: None, "T1T2")
    assert not torch.equal(found, other)


@pytest.mark.parametrize("evaluation", [1, 2])
def test_an_error_after_a_mode_was_set(evaluation: int) -> None:
    """In the first evaluation, which is inspected, and in a later one."""
    count = 0

    def fails(net: nn.Module) -> None:
        nonlocal count
        count += 1
        net.eval()
        if count == evaluation:
            raise RuntimeError("here")

    kept: list[nn.Module] = []
    with pytest.raises(RuntimeError, match="here"):
        run(lambda net: kept.append(net), fails, "T1T2")
    assert all(module.training for module in kept[0].modules())
