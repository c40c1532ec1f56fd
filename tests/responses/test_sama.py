"""Implicit differentiation of the optimizer's own fixed point, and SAMA."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import nestor

CONSTANT = torch.linspace(0.5, 2.0, 4, dtype=torch.float64)


def objective(theta: Any, weight: Any) -> Tensor:
    """Mixed second derivative: a full matrix."""
    return (weight() * torch.sin(theta())).sum() + (theta() ** 2 * CONSTANT).sum() * (1 + 0.1 * weight().sum())


def mixed(theta: Tensor, weight: Tensor) -> Tensor:
    """d2 objective / d weight d theta, written out."""
    return torch.diag(torch.cos(theta)) + 0.1 * (2 * theta * CONSTANT).expand(4, 4)


def gradient(theta: Tensor, weight: Tensor) -> Tensor:
    return weight * torch.cos(theta) + 2 * theta * CONSTANT * (1 + 0.1 * weight.sum())


class Ridge(nestor.callbacks.Callback):
    """Keeps what the optimizer saw at its last step of the lower level."""

    def __init__(self, theta: Tensor) -> None:
        self.theta = theta
        self.points = [theta.detach().clone()]

    def on_level_step(self, engine: nestor.Engine, level: str) -> None:
        if level == "theta":
            self.points.append(self.theta.detach().clone())


def run(
    optimizer: Callable[[Any], torch.optim.Optimizer], response: nestor.Response, steps: int
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Take some lower steps and one upper step of SGD with rate 1: the hypergradient, and the points."""
    theta = nestor.Variable(torch.tensor([0.3, -0.4, 1.2, 0.8], dtype=torch.float64))
    weight = nestor.Variable(torch.tensor([0.2, 0.5, -0.3, 0.9], dtype=torch.float64))
    program = nestor.Program(
        theta=nestor.Problem(
            theta, objective, optimizer=optimizer(theta.parameters()), unroll_steps=steps, response=response
        ),
        weight=nestor.Problem(
            weight, lambda theta: (theta() ** 3).sum(), optimizer=torch.optim.SGD(weight.parameters(), lr=1.0)
        ),
    )
    look = Ridge(theta.value)
    before = weight.value.detach().clone()
    nestor.Engine(program, callbacks=[look], seed=0).run(steps)
    return before - weight.value.detach(), look.points, before


def adam(points: list[Tensor], weight: Tensor) -> Tensor:
    """du/dg of Adam's last step with bias correction (lr 0.05, beta 0.9 and 0.99, eps 1e-3), from its definition."""
    m = v = torch.zeros_like(weight)
    for g in (gradient(p, weight) for p in points[:-1]):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
    t = len(points) - 1
    g = gradient(points[-2], weight)
    root = torch.sqrt(v / (1 - 0.99**t))
    first = 0.1 / (1 - 0.9**t) / (root + 1e-3)
    second = (m / (1 - 0.9**t)) / (root + 1e-3) ** 2 * 0.01 * g / ((1 - 0.99**t) * root)
    return 0.05 * (first - second)


def adagrad(points: list[Tensor], weight: Tensor) -> Tensor:
    total = sum(gradient(p, weight) ** 2 for p in points[:-1])
    g = gradient(points[-2], weight)
    root = torch.sqrt(torch.as_tensor(total))
    return 0.05 * (1 / (root + 1e-3) - g / (root + 1e-3) ** 2 * g / root)


def rmsprop(points: list[Tensor], weight: Tensor) -> Tensor:
    v = torch.zeros_like(weight)
    for p in points[:-1]:
        v = 0.9 * v + 0.1 * gradient(p, weight) ** 2
    g = gradient(points[-2], weight)
    root = torch.sqrt(v)
    return 0.05 * (1 / (root + 1e-3) - g / (root + 1e-3) ** 2 * 0.1 * g / root)


def sgd(points: list[Tensor], weight: Tensor) -> Tensor:
    return torch.full_like(weight, 0.05)


CASES: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], Callable[[list[Tensor], Tensor], Tensor]]] = {
    "adam": (lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.9, 0.99), eps=1e-3), adam),
    "adamw": (lambda p: torch.optim.AdamW(p, lr=0.05, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.3), adam),
    "adagrad": (lambda p: torch.optim.Adagrad(p, lr=0.05, eps=1e-3), adagrad),
    "rmsprop": (lambda p: torch.optim.RMSprop(p, lr=0.05, alpha=0.9, eps=1e-3), rmsprop),
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.05), sgd),
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), sgd),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_preconditioner_of_the_last_step(name: str, steps: int) -> None:
    """-M^T D c with D derived by hand from the optimizer's definition, bias correction included."""
    optimizer, diagonal = CASES[name]
    got, points, weight = run(optimizer, nestor.SAMA(cross=nestor.ReverseMode()), steps)
    theta = points[-1]
    cotangent = 3 * theta**2
    expected = -mixed(theta, weight) @ (diagonal(points, weight) * cotangent)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    difference, _, _ = run(optimizer, nestor.SAMA(rel_step=1e-4), steps)
    torch.testing.assert_close(difference, expected, rtol=1e-6, atol=1e-8)


def test_every_differentiable_optimizer() -> None:
    """D is the derivative of the step itself: against a finite difference in the gradient."""
    for kind in (torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax, torch.optim.Adadelta, torch.optim.ASGD):
        theta = torch.tensor([0.3, -0.4], dtype=torch.float64)
        held = theta.clone().requires_grad_()
        optimizer = kind([held], lr=0.1)
        for _ in range(6):
            held.grad = torch.sin(held.detach()) + 0.3
            optimizer.step()
        weight = torch.tensor([0.5, 0.2], dtype=torch.float64, requires_grad=True)

        def lower(t: Tensor, w: Tensor) -> Tensor:
            return (w * t + 0.3 * t**2).sum()  # the gradient moves with w one to one

        point = held.detach()
        theta_star = nestor.best_response(
            lower, point, weight, nestor.SAMA(cross=nestor.ReverseMode()), optimizer=optimizer
        )
        (got,) = torch.autograd.grad(theta_star.sum(), weight)

        def after(w: Tensor, optimizer: Any = optimizer, point: Tensor = point) -> Tensor:
            state = nestor.optim.optimizer_state(optimizer)
            (new,), _ = nestor.optim.functional_step(optimizer, [point], [w + 0.6 * point], state)
            return new

        step = 1e-6
        for entry in range(2):
            shift = torch.zeros(2, dtype=torch.float64)
            shift[entry] = step
            difference = (after(weight.detach() + shift) - after(weight.detach() - shift)).sum() / (2 * step)
            assert math.isclose(got[entry].item(), difference.item(), rel_tol=1e-6, abs_tol=1e-9), kind


@pytest.mark.parametrize("name", ["adam", "momentum", "adamw", "rmsprop"])
def test_exact_solve_of_the_fixed_point_is_implicit_differentiation(name: str) -> None:
    """At a minimum the fixed point's equations and stationarity have the same solution, for any optimizer."""
    optimizer, _ = CASES[name]
    if name == "adamw":  # decoupled decay moves the fixed point: it is the minimum with decay 0 only
        optimizer = lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.0)  # noqa: E731
    theta = torch.zeros(4, dtype=torch.float64)
    weight = torch.tensor([0.2, 0.5, -0.3, 0.9], dtype=torch.float64, requires_grad=True)

    def flat(t: Tensor, w: Tensor) -> Tensor:
        return objective(lambda: t, lambda: w)

    for _ in range(50):  # Newton
        t = theta.clone().requires_grad_()
        (g,) = torch.autograd.grad(flat(t, weight.detach()), t)
        h = torch.autograd.functional.hessian(lambda s: flat(s, weight.detach()), theta)
        theta = theta - torch.linalg.solve(h, g)
    held = optimizer([theta.clone()])
    results = []
    for response in (
        nestor.Implicit(solver=nestor.DenseSolve()),
        nestor.Implicit(solver=nestor.DenseSolve(), condition=nestor.FixedPoint()),
        nestor.Implicit(solver=nestor.GMRES(max_steps=20, rtol=1e-12), condition=nestor.FixedPoint()),
    ):
        star = nestor.best_response(flat, theta, weight, response, optimizer=held)
        results.append(torch.autograd.grad((star**3).sum(), weight)[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(results[2], results[0], rtol=1e-8, atol=1e-10)


def test_update_rule_of_ones_own() -> None:
    """Lion, smoothed so that it has a derivative: SAMA preconditions with any differentiable rule."""

    def lion(params: list[Tensor], grads: list[Tensor], state: Any) -> tuple[list[Tensor], Any]:
        moment = torch.zeros_like(grads[0]) if state is None else state["moment"]
        step = torch.tanh(3 * (0.9 * moment + 0.1 * grads[0]))
        return [params[0] - 0.05 * step], {"moment": 0.99 * moment + 0.01 * grads[0]}

    theta = nestor.Variable(torch.tensor([0.3, -0.4, 1.2, 0.8], dtype=torch.float64))
    weight = nestor.Variable(torch.tensor([0.2, 0.5, -0.3, 0.9], dtype=torch.float64))
    program = nestor.Program(
        theta=nestor.Problem(
            theta, objective, update=lion, unroll_steps=3, response=nestor.SAMA(cross=nestor.ReverseMode())
        ),
        weight=nestor.Problem(
            weight, lambda theta: (theta() ** 3).sum(), optimizer=torch.optim.SGD(weight.parameters(), lr=1.0)
        ),
    )
    look = Ridge(theta.value)
    before = weight.value.detach().clone()
    nestor.Engine(program, callbacks=[look], seed=0).run(3)
    moment = torch.zeros(4, dtype=torch.float64)
    for point in look.points[:-2]:
        moment = 0.99 * moment + 0.01 * gradient(point, before)
    inner = 3 * (0.9 * moment + 0.1 * gradient(look.points[-2], before))
    diagonal = 0.05 * 0.3 / torch.cosh(inner) ** 2
    end = look.points[-1]
    expected = -mixed(end, before) @ (diagonal * 3 * end**2)
    torch.testing.assert_close(before - weight.value.detach(), expected, rtol=1e-10, atol=1e-12)


def test_cost_of_sama() -> None:
    """Two forwards and two gradients beyond the run's own: the last gradient is not computed again."""
    theta, weight = (nestor.Variable(torch.ones(4, dtype=torch.float64)) for _ in range(2))
    program = nestor.Program(
        theta=nestor.Problem(theta, objective, optimizer=torch.optim.Adam(theta.parameters()), response=nestor.SAMA()),
        weight=nestor.Problem(
            weight, lambda theta: (theta() ** 3).sum(), optimizer=torch.optim.Adam(weight.parameters())
        ),
    )
    engine = nestor.Engine(program, seed=0)
    with nestor.diagnostics.count_evaluations(program) as count:
        engine.run(1)
    assert (count.forwards["theta"], count.gradients["theta"], count.hvps["theta"]) == (3, 3, 0)
    assert {row.level: row for row in program.explain().rows}["weight"].cost.forwards["theta"] == 2


def test_needs_an_optimizer() -> None:
    """Said with the remedy."""
    theta = torch.ones(4, dtype=torch.float64)
    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
    star = nestor.best_response(lambda t, w: (t * w).sum(), theta, weight, nestor.SAMA())
    with pytest.raises(nestor.NestorError, match=r"optimizer=torch\.optim\.Adam"):
        star.sum().backward()
