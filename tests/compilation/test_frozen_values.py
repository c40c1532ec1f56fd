"""What changes along a run and is no tensor: a graph that would freeze it is given up, with a warning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

import nestor
from nestor import Engine, NestorWarning, Problem, Program, ReplayError, Variable
from nestor.callbacks import Callback


class _AfterStep(Callback):
    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function

    def on_level_step(self, engine: Any, level: str) -> None:
        if level == "theta":
            with torch.no_grad():
                self.function()


class _Rarely(_AfterStep):
    """Is due at no step: it may be called late."""

    def is_due(self, engine: Any, step: int) -> bool:
        return False


@pytest.fixture(autouse=True)
def _plain_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx

    monkeypatch.setattr(compile_fx, "compile_fx", lambda graph, examples, **options: graph)


def _run(
    loss: Callable[..., Tensor],
    after: Callable[[Variable], Any],
    *,
    compile: bool,
    response: nestor.Response,
    unroll_steps: int,
    callback: type[_AfterStep] = _AfterStep,
) -> tuple[Engine, list[Tensor]]:
    theta = Variable(torch.tensor([0.3, -0.4, 0.2], dtype=torch.float64))
    w = Variable(torch.tensor([0.1, 0.2, -0.5], dtype=torch.float64))
    program = Program(
        theta=Problem(
            theta, loss, optimizer=SGD(theta.parameters(), lr=0.1), response=response, unroll_steps=unroll_steps
        ),
        w=Problem(w, lambda theta, w: (theta().cos() * w()).sum(), optimizer=SGD(w.parameters(), lr=0.1)),
    )
    engine = Engine(program, seed=0, compile=compile, callbacks=[callback(lambda: after(theta))])
    engine.run(12)
    return engine, [theta().detach(), w().detach()]


def _plain(theta: Variable, w: Variable) -> Tensor:
    return ((theta() - w().tanh()) ** 2).sum() + (theta() ** 4).sum()


def _clock() -> tuple[Callable[..., Tensor], Callable[[Variable], Any]]:
    ticks = [0]

    def loss(theta: Variable, w: Variable) -> Tensor:
        return _plain(theta, w) / (1 + ticks[0])

    def tick(theta: Variable) -> None:
        ticks[0] += 1

    return loss, tick


def _schedule() -> tuple[Callable[..., Tensor], Callable[[Variable], Any]]:
    """A tensor that is a new one after every step."""
    ticks = [0]

    def loss(theta: Variable, w: Variable) -> Tensor:
        return _plain(theta, w) * torch.full((), 1.0 / (1 + ticks[0]), dtype=torch.float64)

    def tick(theta: Variable) -> None:
        ticks[0] += 1

    return loss, tick


@pytest.mark.parametrize("unroll_steps", [1, 3])
@pytest.mark.parametrize("make", [_clock, _schedule])
def test_a_value_that_moves(make: Any, unroll_steps: int) -> None:
    """The run is that of the eager engine, up to rounding."""
    options = {"response": nestor.T1T2(), "unroll_steps": unroll_steps}
    _, expected = _run(*make(), compile=False, **options)
    with pytest.warns(NestorWarning, match="values that it reads from outside, which a graph would freeze"):
        engine, found = _run(*make(), compile=True, **options)
    assert "theta" in engine.eager_reasons
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_unrolled_steps_are_guarded() -> None:
    """The first response of a compiled run compares its replays, as an eager one does."""
    with pytest.warns(NestorWarning, match="values that it reads"), pytest.raises(ReplayError, match="'theta'"):
        _run(*_clock(), compile=True, response=nestor.Unrolled(), unroll_steps=3)


@pytest.mark.parametrize("unroll_steps", [1, 3])
def test_a_projection(unroll_steps: int) -> None:
    """A callback of a level's step is called before the next level steps."""
    options = {"response": nestor.T1T2(), "unroll_steps": unroll_steps}
    project: Any = lambda theta: theta().clamp_(-0.05, 0.05)  # noqa: E731
    _, expected = _run(_plain, project, compile=False, **options)
    engine, found = _run(_plain, project, compile=True, **options)
    assert not engine.eager_reasons
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_a_callback_that_is_not_due_lets_graphs_be() -> None:
    """And is called nevertheless, after the graphs that were run at once."""
    calls: list[int] = []
    _, found = _run(
        _plain,
        lambda theta: calls.append(0),
        compile=True,
        response=nestor.T1T2(),
        unroll_steps=1,
        callback=_Rarely,
    )
    _, expected = _run(_plain, lambda theta: None, compile=False, response=nestor.T1T2(), unroll_steps=1)
    assert 0 < len(calls) <= 12
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_literals_of_tensors_do_not_move() -> None:
    """A tensor that every evaluation makes anew, with the same value."""

    def loss(theta: Variable, w: Variable) -> Tensor:
        return _plain(theta, w) * torch.tensor(2.0, dtype=torch.float64)

    engine, _ = _run(loss, lambda theta: None, compile=True, response=nestor.T1T2(), unroll_steps=3)
    assert not engine.eager_reasons
