"""What a run says of its own hypergradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

import nestor


def build(response: nestor.Response, rate: float = 0.1) -> nestor.Program:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    b = torch.randn(30, generator=generator, dtype=torch.float64)
    theta, penalty = nestor.Variable(torch.zeros(6).double()), nestor.Variable(torch.zeros(6).double())

    def lower(theta: Any, penalty: Any) -> Tensor:
        return ((a @ theta() - b) ** 2).mean() + (penalty().exp() * theta() ** 2).sum()

    return nestor.Program(
        theta=nestor.Problem(theta, lower, optimizer=torch.optim.SGD(theta.parameters(), lr=rate), response=response),
        penalty=nestor.Problem(
            penalty,
            lambda theta: ((a[:9] @ theta() - 1) ** 2).mean(),
            optimizer=torch.optim.SGD(penalty.parameters(), lr=0.01),
        ),
    )


def test_agreement_is_measured_when_due() -> None:
    """T1T2 points the right way with another length; an exact solve agrees with the reference; nothing changes."""
    runs = {}
    for name, callbacks in (("plain", []), ("watched", [nestor.callbacks.Agreement(every=10)])):
        program = build(nestor.T1T2())
        engine = nestor.Engine(program, callbacks=callbacks, seed=0)
        metrics = engine.run(20)
        runs[name] = [p.detach().clone() for level in program.levels.values() for p in level.parameters], metrics
    assert all(torch.equal(a, b) for a, b in zip(runs["plain"][0], runs["watched"][0], strict=True))
    watched = runs["watched"][1]
    assert 0.8 < watched["penalty/cosine"] < 1
    assert watched["penalty/relative_error"] > 0.1
    assert "penalty/cosine" not in runs["plain"][1]
    exact = nestor.Implicit(solver=nestor.DenseSolve())
    metrics = nestor.Engine(build(exact), callbacks=[nestor.callbacks.Agreement(every=5)], seed=0).run(5)
    assert metrics["penalty/cosine"] == pytest.approx(1)
    assert metrics["penalty/relative_error"] < 1e-6


def test_a_callback_evaluates_hypergradients_of_the_run() -> None:
    """With the level's own response or another one: those of the program at the present point."""
    other = nestor.Implicit(solver=nestor.DenseSolve())
    compared = []

    class Compare(nestor.callbacks.Callback):
        def on_start(self, engine: nestor.callbacks.Run) -> None:
            engine.keep_histories()

        def on_level_step(self, engine: nestor.callbacks.Run, level: str) -> None:
            if level == "penalty":
                for response, same in ((None, program), (other, program.with_responses({"theta": other}))):
                    (found,) = engine.hypergradient(level, response=response)
                    (expected,) = same.hypergradient(level).values()
                    compared.append(torch.equal(found, expected))

    program = build(nestor.T1T2())
    nestor.Engine(program, callbacks=[Compare()], seed=0).run(3)
    assert compared == [True] * 6


def test_stationarity_falls_and_a_distant_point_is_warned_of() -> None:
    """The lower gradient against that of the first step."""
    engine = nestor.Engine(build(nestor.Implicit()), seed=0)
    assert engine.run(1)["theta/stationarity"] == 1
    assert engine.run(60)["theta/stationarity"] < 0.01
    slow = nestor.Engine(build(nestor.Implicit(), rate=1e-5), seed=0)
    with pytest.warns(UserWarning, match=r"'theta': after 30 steps.*warmup_steps"):
        slow.run(30)
    slow.run(1)  # said once
    nestor.Engine(build(nestor.T1T2(), rate=1e-5), seed=0).run(30)  # promises no exactness
