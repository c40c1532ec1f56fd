"""A difference that takes one of its sides from the lower step."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nestor
from nestor.diagnostics import count_evaluations


def build(response: nestor.Response, dropout: float = 0.3, **options: Any) -> tuple[nestor.Program, nestor.Variable]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)).double()
    weights = nestor.Variable(torch.zeros(12).double())
    x, y = torch.randn(12, 4).double(), torch.randint(0, 3, (12,))

    def train(batch: Any, net: Any, weights: Any) -> Tensor:
        return (torch.sigmoid(weights()) * F.cross_entropy(net(x) * batch, y, reduction="none")).mean()

    return nestor.Program(
        net=nestor.Problem(
            net,
            train,
            data=[torch.tensor(1.0), torch.tensor(1.5)],
            optimizer=torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9),
            response=response,
            **options,
        ),
        weights=nestor.Problem(
            weights,
            lambda net: F.cross_entropy(net[3](net[1](net[0](x.flip(1)))), y),
            optimizer=torch.optim.SGD(weights.parameters(), lr=1.0),
        ),
    ), weights


def hypergradient(response: nestor.Response, **options: Any) -> Tensor:
    program, weights = build(response, **options)
    nestor.Engine(program, seed=0).run(3 * options.get("unroll_steps", 1))
    after_two = weights.value.detach().clone()
    program, weights = build(response, **options)
    nestor.Engine(program, seed=0).run(2 * options.get("unroll_steps", 1))
    return weights.value.detach() - after_two


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"unroll_steps": 3}], ids=str)
def test_near_the_central_difference(options: dict[str, Any]) -> None:
    """With small steps, one dropout mask and the same batch: the same direction and length."""
    central = hypergradient(nestor.FiniteDifference(rel_step=1e-3), **options)
    reused = hypergradient(nestor.FiniteDifference(rel_step=1e-3, reuse=True), **options)
    assert (central - reused).norm() < 0.02 * central.norm()


def test_error_is_of_first_order() -> None:
    """Ten times the step, ten times the error, at the point before the last step."""
    exact = hypergradient(nestor.FiniteDifference(rel_step=1e-5, reuse=True), dropout=0.0)
    errors = [
        (hypergradient(nestor.FiniteDifference(rel_step=step, reuse=True), dropout=0.0) - exact).norm()
        for step in (1e-2, 1e-1)
    ]
    assert 5 < errors[1] / errors[0] < 20


def test_one_more_evaluation() -> None:
    """The lower step's own, and one; ``explain`` knows."""
    program, _ = build(nestor.FiniteDifference(reuse=True))
    engine = nestor.Engine(program, seed=0)
    with count_evaluations(program) as count:
        engine.run(5)
    assert (count.forwards["net"], count.gradients["net"]) == (10, 10)
    row = {row.level: row for row in program.explain().rows}["weights"]
    assert row.cost.forwards["net"] == 1
    # Without an engine there is nothing to reuse.
    got = program.hypergradient("weights", {"net": torch.tensor(1.0)})["value"]
    plain = program.with_responses({"net": nestor.FiniteDifference()})
    torch.testing.assert_close(got, plain.hypergradient("weights", {"net": torch.tensor(1.0)})["value"])
