"""Compiled steps that keep what their pullbacks need: the numbers of eager steps, and one evaluation less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nestor
from nestor.compilation.graph import traced
from nestor.compilation.split_graph import split_graph
from nestor.diagnostics import count_evaluations

pytestmark = pytest.mark.filterwarnings("error")


def metagradient(response: nestor.Response, optimizer: Any, *, compile: bool) -> tuple[Tensor, int]:
    """Weights of samples after three cycles of twelve steps, and the evaluations of the level below in the last one."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 3).double(), torch.randn(12, 1).double()
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    weights = nestor.Variable(torch.linspace(-1, 1, 12).double())

    def fit(net: nn.Module, weights: Any) -> Tensor:
        return (torch.sigmoid(weights()) * (net(x) - y).square().squeeze(1)).mean()

    program = nestor.Program(
        net=nestor.Problem(
            net,
            fit,
            optimizer=optimizer(net.parameters(), lr=0.05),
            unroll_steps=12,
            response=response,
        ),
        weights=nestor.Problem(
            weights, lambda net: (net(x) - y).square().mean(), optimizer=torch.optim.SGD(weights.parameters(), lr=1.0)
        ),
    )
    engine = nestor.Engine(program, seed=0, compile=compile)
    engine.run(24)
    with count_evaluations(program) as count:
        engine.run(12)
    return weights.value.detach().clone(), count.forwards["net"]


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_compiled_steps_keep_graphs(optimizer: Any) -> None:
    """Three cycles; with graphs and without. The first step of Adam makes its memory; SGD has none."""
    expected, _ = metagradient(nestor.Unrolled(), optimizer, compile=False)
    for keep_graphs, forwards in ((None, 24), (False, 12 + 12 + 8)):
        response = nestor.Unrolled(checkpoint="sqrt", keep_graphs=keep_graphs)
        found, count = metagradient(response, optimizer, compile=True)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
        assert count == forwards


def test_a_split_graph() -> None:
    """A function and its pullback: products are kept, what is pointwise is repeated, constants are arguments."""
    torch.manual_seed(0)
    weight, outside = torch.randn(4, 4), torch.randn(4)

    def both(x: Tensor, cotangent: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            y = torch.tanh(leaf @ weight) * outside
            (pulled,) = torch.autograd.grad(y, leaf, cotangent)
        return [y.detach(), pulled]

    x, cotangent = torch.randn(3, 4), torch.randn(3, 4)
    graph, constants = traced(both, [x, cotangent])
    split = split_graph(graph, constants, [x, cotangent], 1, 1)
    x, cotangent = torch.randn(3, 4), torch.randn(3, 4)
    y, *saved = split(x, cotangent)
    assert [tuple(t.shape) for t in saved] == [(3, 4)]
    expected = both(x, cotangent)
    torch.testing.assert_close(y, expected[0])
    torch.testing.assert_close(split.pull_back([x, cotangent], saved, [cotangent])[0], expected[1])
