"""explain(batches, seconds=True) foresees the time of an update."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nestor

RESPONSES: dict[str, nestor.Response] = {
    "T1T2": nestor.T1T2(),
    "FiniteDifference": nestor.FiniteDifference(),
    "ConjugateGradient": nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=4, rtol=0.0), damping=10.0),
    "Unrolled": nestor.Unrolled(),
}


def build(response: nestor.Response, unroll: int) -> tuple[nestor.Program, dict[str, Any]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(400, 500), nn.ReLU(), nn.Linear(500, 500), nn.ReLU(), nn.Linear(500, 5))
    weights = nestor.Variable(torch.zeros(200))
    x, y = torch.randn(200, 400), torch.randint(0, 5, (200,))

    def fit(batch: Any, net: nn.Module, weights: nn.Module) -> Tensor:
        return (weights().sigmoid() * F.cross_entropy(net(batch[0]), batch[1], reduction="none")).mean()

    def judge(batch: Any, net: nn.Module) -> Tensor:
        return F.cross_entropy(net(batch[0]), batch[1])

    program = nestor.Program(
        net=nestor.Problem(
            net,
            fit,
            data=[(x, y)],
            optimizer=torch.optim.SGD(net.parameters(), 0.01),
            unroll_steps=unroll,
            response=response,
        ),
        weights=nestor.Problem(weights, judge, data=[(x, y)], optimizer=torch.optim.SGD(weights.parameters(), 0.1)),
    )
    return program, {"net": (x, y), "weights": (x, y)}


@pytest.mark.parametrize("name", RESPONSES)
def test_within_a_factor_of_two(name: str) -> None:
    """Of the time of a run's steps; a machine that does other things is asked again."""
    unroll = 5 if name == "Unrolled" else 1
    program, batches = build(RESPONSES[name], unroll)
    engine = nestor.Engine(program, seed=0)
    engine.run(2 * unroll)
    ratios = []
    for _ in range(8):
        rows = {row.level: row.seconds for row in program.explain(batches, seconds=True).rows}
        foreseen = unroll * (rows["net"] or 0.0) + (rows["weights"] or 0.0)
        start = time.perf_counter()
        engine.run(2 * unroll)
        ratios.append(foreseen / ((time.perf_counter() - start) / 2))
        if 0.5 < ratios[-1] < 2:
            return
    pytest.fail(f"foreseen / taken: {ratios}")


def test_it_is_asked_for() -> None:
    program, batches = build(nestor.T1T2(), 1)
    assert all(row.seconds is None for row in program.explain(batches).rows)
    assert ", time" in str(program.explain(batches, seconds=True))
    with pytest.raises(ValueError, match="seconds=True"):
        program.explain(seconds=True)
