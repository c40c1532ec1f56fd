"""Jacobians of steps in their gradients, from the optimizer's memory after the step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

import nestor
from nestor.explain.peak_memory import PeakMemory
from nestor.optim import step_jacobian
from nestor.optim.step_jacobian import apply_step_jacobian, step_jacobian_of

CASES: list[tuple[type[Optimizer], dict[str, Any]]] = [
    (SGD, {}),
    (SGD, {"momentum": 0.9}),
    (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (SGD, {"maximize": True}),
    (Adam, {}),
    (Adam, {"amsgrad": True}),
    (Adam, {"eps": 1e-2, "betas": (0.5, 0.9), "maximize": True}),
    (AdamW, {"weight_decay": 0.1}),
    (RMSprop, {}),
    (RMSprop, {"centered": True, "momentum": 0.5}),
    (RMSprop, {"centered": True, "maximize": True}),
    (Adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.2}),
    (Adagrad, {"maximize": True}),
]


def take(optimizer: Optimizer, gradient: Tensor) -> Tensor:
    """Step, and return minus the diagonal of the step's derivative in the gradient, by reverse mode."""
    (held,) = optimizer.param_groups[0]["params"]
    state = nestor.optim.optimizer_state(optimizer)
    probe = gradient.clone().requires_grad_()
    (after,), _ = nestor.optim.functional_step(optimizer, [held.detach()], [probe], state)
    (derivative,) = torch.autograd.grad(after.sum(), probe)
    held.grad = gradient
    optimizer.step()
    return -derivative


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
@pytest.mark.parametrize("whole", [True, False])
def test_slope_is_the_derivative_of_the_step(
    kind: type[Optimizer], options: dict[str, Any], whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step, the first one included; an entry never had a gradient. By pieces, the last one smaller."""
    monkeypatch.setattr(step_jacobian, "_PIECE", 64 if whole else 3)
    torch.manual_seed(0)
    held = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    optimizer = kind([held], lr=0.1, **options)
    slope = step_jacobian_of(optimizer, optimizer.param_groups)
    assert slope is not None
    for step in range(5):
        gradient = torch.randn(4, 5, dtype=torch.float64) / (1 + step)
        gradient[2, 3] = 0.0
        expected = take(optimizer, gradient)
        vector = torch.randn(4, 5, dtype=torch.float64)
        with torch.no_grad():
            found = apply_step_jacobian(slope, gradient, vector, optimizer.state[held], optimizer.param_groups[0])
        torch.testing.assert_close(found, expected * vector, rtol=1e-12, atol=1e-14)
    vector.requires_grad_()
    found = apply_step_jacobian(slope, gradient, vector, optimizer.state[held], optimizer.param_groups[0])
    (back,) = torch.autograd.grad(found.sum(), vector)
    torch.testing.assert_close(back, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SGD, {"momentum": 0.9, "dampening": 0.1}),
        (Adam, {"weight_decay": 0.1}),
        (RMSprop, {"weight_decay": 0.1}),
        (Adagrad, {"weight_decay": 0.1}),
        (torch.optim.NAdam, {}),
        (Adam, {"lr": torch.tensor(0.1, requires_grad=True)}),
    ],
    ids=str,
)
def test_rules_that_do_not_tell_it(kind: type[Optimizer], options: dict[str, Any]) -> None:
    """What they keep after a step is not enough."""
    optimizer = kind([torch.zeros(2, requires_grad=True)], **{"lr": 0.1, **options})
    assert step_jacobian_of(optimizer, optimizer.param_groups) is None


class Unknown(Adam):
    """Adam, of which nothing but the step is known: the state before it is kept."""


def nested(optimizer: type[Adam], *, uppers: int = 1, depth: int = 2, **options: Any) -> dict[str, float]:
    """Levels that all read each other, over the lowest one, whose response is SAMA's."""
    start = torch.tensor([0.3, -0.4, 1.2, 0.8], dtype=torch.float64)
    names = ["theta", *(f"upper{place}" for place in range(uppers * (depth - 1)))]
    modules = {name: nestor.Variable(start.roll(place)) for place, name in enumerate(names)}

    def lowest(theta: Any, upper0: Any) -> Tensor:
        return (upper0() * torch.sin(theta())).sum() + (theta() ** 2).sum() * (1 + 0.1 * upper0().sum())

    def both(theta: Any, upper0: Any, upper1: Any) -> Tensor:
        return lowest(theta, upper0) + (upper1() * theta()).sum()

    losses: dict[str, Any] = {
        "theta": lowest if len(names) == 2 else both,
        "upper0": lambda theta: (theta() ** 3).sum(),
        "upper1": lambda theta: (theta() ** 2).sum(),
    }
    if depth == 3:
        losses["upper0"] = lambda theta, upper0, upper1: (theta() ** 3).sum() + (upper0() ** 2 * upper1()).sum()
    problems = {
        name: nestor.Problem(
            module,
            losses[name],
            optimizer=optimizer(module.parameters(), lr=0.05) if name == "theta" else SGD(module.parameters(), lr=0.1),
            unroll_steps=2 if name == "theta" else 1,
            **({"response": nestor.SAMA(rel_step=1e-4)} if name == "theta" else {}),
        )
        for name, module in modules.items()
    }
    engine = nestor.Engine(nestor.Program(**problems), seed=0, **options)
    engine.run(6)
    values = {name: module.value.detach() for name, module in modules.items()}
    return {f"{name}/{place}": v.item() for name, value in values.items() for place, v in enumerate(value)}


@pytest.mark.parametrize("shape", [{}, {"depth": 3}, {"uppers": 2}], ids=str)
def test_run_is_that_of_the_recorded_state(shape: dict[str, Any]) -> None:
    """One level above, a chain, and two levels that read the same response."""
    assert nested(Adam, **shape) == pytest.approx(nested(Unknown, **shape), rel=1e-9)


def test_two_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """SAMA on Adam takes two vectors like the parameters beyond these and the optimizer's own, and little else."""
    monkeypatch.setattr(step_jacobian, "_PIECE", 500)  # the parameters of a large model are many pieces
    net = nn.Sequential(*(nn.Linear(100, 100) for _ in range(12)))
    scale = nn.Linear(1, 4)
    x, one = torch.randn(4, 100), torch.ones(1)
    program = nestor.Program(
        net=nestor.Problem(
            net,
            lambda net, scale: (scale(one) * net(x).square().mean(1)).sum(),
            optimizer=Adam(net.parameters()),
            response=nestor.SAMA(),
        ),
        scale=nestor.Problem(scale, lambda net: net(x).sum(), optimizer=SGD(scale.parameters(), lr=0.1)),
    )
    engine = nestor.Engine(program, seed=0)
    engine.run(2)
    with PeakMemory() as memory:
        engine.run(2)
    assert memory.peak < 2.2 * sum(p.numel() * p.element_size() for p in net.parameters())


@pytest.fixture(autouse=True)
def _small_levels_count_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A response may overwrite what large levels send it."""
    monkeypatch.setattr("nestor.vectors.algebra.LARGE", 0)


def test_callbacks_that_evaluate_responses() -> None:
    """Agreement sees what the step saw; one that did not ask for the histories is told."""
    plain = nested(Adam)
    cosines = []

    class Look(nestor.callbacks.Callback):
        def on_level_step(self, engine: nestor.Engine, level: str) -> None:
            if level == "upper0":
                cosines.append(engine.read_metrics()["upper0/cosine"])

    same = nestor.callbacks.Agreement(every=1, reference=nestor.SAMA(rel_step=1e-4))
    assert nested(Adam, callbacks=[same, Look()]) == plain
    assert cosines == pytest.approx([1.0] * 3)

    class Careless(nestor.callbacks.Callback):
        def on_level_step(self, engine: nestor.Engine, level: str) -> None:
            if level == "upper0":
                engine.hypergradient(level)

    with pytest.raises(nestor.NestorError, match=r"call run.keep_histories\(\) in its on_start"):
        nested(Adam, callbacks=[Careless()])
