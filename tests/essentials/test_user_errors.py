"""Exceptions of the user's code pass unchanged; a note says which level, loss, callback or validation, and the step."""

import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nestor


class Odd(Exception):
    """An exception that nestor does not know."""

    def __init__(self, first: int, second: str) -> None:
        super().__init__(first, second)


def failing(*_: Any) -> Tensor:
    raise Odd(3, "frames")


class FailsLater:
    """Data, a loss, a validation or a callback that works once."""

    def __init__(self) -> None:
        self.calls = 0

    def tick(self) -> None:
        self.calls += 1
        if self.calls > 1:
            failing()


class Data(FailsLater):
    def __iter__(self) -> Iterator[Tensor]:
        while True:
            self.tick()
            yield torch.ones(3, 2)


class LateCallback(nestor.callbacks.Callback):
    def __init__(self) -> None:
        self.late = FailsLater()

    def on_step(self, engine: nestor.callbacks.Run) -> None:
        self.late.tick()


def engine(late: str, **options: Any) -> nestor.Engine:
    """A program in which one part fails at its second call."""
    net, weight, later = nn.Linear(2, 1), nestor.Variable(torch.zeros(1)), FailsLater()
    later.calls = -1 if late == "lower" else 0  # the response of the first step evaluates the lower loss as well

    def lower(batch: Tensor, net: nn.Module, weight: nn.Module) -> Tensor:
        if late == "lower":
            later.tick()
        return (net(batch) - weight()).square().mean()

    def upper(batch: Tensor, net: nn.Module) -> Tensor:
        if late == "upper":
            later.tick()
        return net(batch).square().mean()

    def validate(net: nn.Module) -> Mapping[str, float]:
        if late == "validate":
            later.tick()
        return {"loss": 0.0}

    batches = [torch.ones(3, 2)]
    program = nestor.Program(
        net=nestor.Problem(
            net, lower, data=Data() if late == "data" else batches, optimizer=torch.optim.SGD(net.parameters(), lr=0.1)
        ),
        weight=nestor.Problem(weight, upper, data=batches, optimizer=torch.optim.SGD(weight.parameters(), lr=0.1)),
    )
    callbacks = [LateCallback()] if late == "callback" else []
    return nestor.Engine(program, seed=0, validate=validate, validate_every=1, callbacks=callbacks, **options)


@pytest.mark.parametrize(
    ("late", "words"),
    [
        ("lower", ["level 'net'", "loss engine.<locals>.lower", __file__, "step"]),
        ("upper", ["level 'weight'", "loss engine.<locals>.upper", __file__, "step 2"]),
        ("data", ["level 'net'", "its data", "step 2"]),
        ("validate", ["validate engine.<locals>.validate", __file__, "step 2"]),
        ("callback", ["callback LateCallback", "on_step", "step 2"]),
    ],
)
@pytest.mark.parametrize("rollback", [False, True])
def test_the_exception_passes(late: str, words: list[str], rollback: bool) -> None:
    """The same type with the same arguments; the last frame is the user's; the note names the place."""
    with pytest.raises(Odd) as caught:
        engine(late, rollback=rollback).run(3)
    assert type(caught.value) is Odd
    assert caught.value.args == (3, "frames")
    assert caught.value.__cause__ is None
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "failing"
    (text, *_) = [note for note in caught.value.__notes__ if words[0] in note]
    assert all(word in text for word in words)


def test_within_a_response() -> None:
    """A lower loss that fails while it is differentiated for a level above: both levels are named."""
    net, weight, fails = nn.Linear(2, 1), nestor.Variable(torch.zeros(1)), [False]

    def lower(net: nn.Module, weight: nn.Module) -> Tensor:
        if fails[0]:
            failing()
        return (net(torch.ones(3, 2)) - weight()).square().mean()

    def upper(net: nn.Module) -> Tensor:
        fails[0] = True  # the next evaluation of the lower loss is the response's
        return net(torch.ones(3, 2)).square().mean()

    program = nestor.Program(
        net=nestor.Problem(net, lower, optimizer=torch.optim.SGD(net.parameters(), lr=0.1)),
        weight=nestor.Problem(weight, upper, optimizer=torch.optim.SGD(weight.parameters(), lr=0.1)),
    )
    with pytest.raises(Odd) as caught:
        nestor.Engine(program, seed=0).run(1)
    first, second = caught.value.__notes__
    assert first == "[best response of level 'net']"
    assert "level 'weight'" in second


REPRS: list[tuple[Callable[[], nestor.Response], str]] = [
    (nestor.T1T2, "T1T2()"),
    (lambda: nestor.T1T2(scale=0.1), "T1T2(scale=0.1)"),
    (lambda: nestor.T1T2(cross=nestor.ForwardMode()), "T1T2(cross=ForwardMode())"),
    (nestor.SAMA, "SAMA()"),
    (lambda: nestor.SAMA(rel_step=0.1), "SAMA(rel_step=0.1)"),
    (nestor.FiniteDifference, "FiniteDifference()"),
    (lambda: nestor.FiniteDifference(scale=0.5, reuse=True), "FiniteDifference(scale=0.5, reuse=True)"),
    (nestor.Implicit, "Implicit()"),
    (lambda: nestor.Implicit(solver=nestor.GMRES(max_steps=3)), "Implicit(solver=GMRES(max_steps=3))"),
    (
        lambda: nestor.Implicit(condition=nestor.Stationarity(curvature=nestor.GaussNewton()), damping=0.1),
        "Implicit(condition=Stationarity(curvature=GaussNewton()), damping=0.1)",
    ),
]


@pytest.mark.parametrize(("make", "text"), REPRS, ids=[text for _, text in REPRS])
def test_a_response_prints_as_it_is_written(make: Callable[[], nestor.Response], text: str) -> None:
    """The text is an expression that makes an equal response."""
    assert repr(make()) == text
    assert eval(text, vars(nestor)) == make()


def test_a_changed_response_prints_as_what_it_is() -> None:
    changed = replace(nestor.T1T2(), damping=0.5)
    assert repr(changed) == "Implicit(solver=Identity(), damping=0.5, label='T1T2')"
