"""Reformulations on a program with a closed form."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import nestor
from nestor.diagnostics import count_evaluations

GENERATOR = torch.Generator().manual_seed(0)
A = torch.randn(3, 2, generator=GENERATOR, dtype=torch.float64)
H = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
B = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)


def inner(theta: Any, weight: Any) -> Tensor:
    """Minimal at A weight, where it is not zero: the value function matters."""
    gap = theta() - A @ weight()
    return 0.5 * gap @ H @ gap + torch.cos(weight()).sum()


def outer(theta: Any, weight: Any) -> Tensor:
    return 0.5 * (theta() - B).square().sum() + 0.05 * weight().square().sum()


def exact(weight: Tensor) -> Tensor:
    return A.T @ (A @ weight - B) + 0.1 * weight


def optimum() -> Tensor:
    return torch.linalg.solve(A.T @ A + 0.1 * torch.eye(2, dtype=torch.float64), A.T @ B)


def build(
    reformulation: nestor.Reformulation, rates: tuple[float, float] = (0.2, 0.05), **options: Any
) -> nestor.Program:
    theta = nestor.Variable(torch.zeros(3, dtype=torch.float64))
    weight = nestor.Variable(torch.tensor([0.4, -0.2], dtype=torch.float64))
    return nestor.Program(
        theta=nestor.Problem(
            theta,
            inner,
            optimizer=torch.optim.SGD(theta.parameters(), lr=rates[0]),
            reformulation=reformulation,
            **options,
        ),
        weight=nestor.Problem(weight, outer, optimizer=torch.optim.SGD(weight.parameters(), lr=rates[1])),
    )


@pytest.mark.parametrize("scaled", [True, False])
def test_hypergradient_tends_to_the_exact_one(scaled: bool) -> None:
    """Error 1/gamma: ten times the multiplier, a tenth of the error; equal to the formula at each."""
    errors = []
    for gamma in (10.0, 100.0, 1000.0):
        program = build(nestor.ValuePenalty(multiplier=gamma, scaled=scaled))
        assert list(program.levels) == ["theta_value", "theta", "weight"]
        weight = program.levels["weight"].parameters[0].detach()
        matrix = H + torch.eye(3, dtype=torch.float64) / gamma
        penalized = torch.linalg.solve(matrix, H @ A @ weight + B / gamma)
        with torch.no_grad():
            program.levels["theta"].parameters[0].copy_(penalized)
            program.levels["theta_value"].parameters[0].copy_(A @ weight)
        batches = dict.fromkeys(("theta_value", "theta", "weight"), (None, None, gamma))
        (lower,) = program.hypergradient("theta", batches).values()
        assert lower.norm() < 1e-9 * gamma
        (got,) = program.hypergradient("weight", batches).values()
        by_hand = 0.1 * weight - gamma * A.T @ H @ (penalized - A @ weight)
        torch.testing.assert_close(got, by_hand, rtol=1e-9, atol=1e-10)
        errors.append((got - exact(weight)).norm().item())
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.05)


@pytest.mark.parametrize(
    ("reformulation", "rates", "steps", "tolerance"),
    [
        (nestor.F2SA(multiplier=1.0, growth=0.1), (0.2, 0.05), 1500, 0.015),
        (nestor.PBGD(multiplier=50.0), (0.004, 0.02), 1500, 0.05),
        (nestor.BOME(eta=0.5), (0.1, 0.02), 2000, 0.15),
    ],
    ids=lambda value: value.describe() if isinstance(value, nestor.Reformulation) else "",
)
def test_run_ends_at_the_optimum(
    reformulation: nestor.Reformulation, rates: tuple[float, float], steps: int, tolerance: float
) -> None:
    """Each method's own schedule, to the solution of the nested problem."""
    program = build(reformulation, rates, unroll_steps=2)
    nestor.Engine(program, seed=0).run(steps)
    weight = program.levels["weight"].parameters[0].detach()
    theta = program.levels["theta"].parameters[0].detach()
    assert (weight - optimum()).norm() <= tolerance * optimum().norm()
    assert (theta - A @ weight).norm() <= 2 * tolerance * theta.norm()


def test_multiplier_grows_with_upper_steps() -> None:
    """And the metrics say what it is."""
    program = build(nestor.F2SA(multiplier=2.0, growth=0.5, most=3.2), unroll_steps=3)
    engine = nestor.Engine(program, seed=0)
    seen = [engine.run(3)["weight/multiplier"] for _ in range(5)]
    assert seen == [2.0, 2.5, 3.0, 3.2, 3.2]


def test_first_derivatives_only() -> None:
    """No Hessian product; the lower loss is evaluated once for each copy's step and twice for the upper step."""
    program = build(nestor.F2SA())
    engine = nestor.Engine(program, seed=0)
    with count_evaluations(program) as count:
        engine.run(1)
    assert sum(count.hvps.values()) == 0
    assert dict(count.gradients) == {"theta_value": 1, "theta": 1, "weight": 1}
    assert "F2SA" in str(program.explain())


def test_same_dropout_on_both_copies() -> None:
    """With equal copies the difference is exactly zero, dropout or not."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    weight = nestor.Variable(torch.ones(2))
    x = torch.randn(5, 2)
    program = nestor.Program(
        net=nestor.Problem(
            net,
            lambda batch, net, weight: net(batch * weight()).square().mean(),
            data=[x],
            optimizer=torch.optim.SGD(net.parameters(), lr=0.0),
            reformulation=nestor.F2SA(multiplier=1e3),
        ),
        weight=nestor.Problem(
            weight,
            lambda batch, net: net(batch).mean(),
            data=[x],
            optimizer=torch.optim.SGD(weight.parameters(), lr=0.1),
        ),
    )
    metrics = nestor.Engine(program, seed=0).run(1)
    assert metrics["weight/gap"] == 0.0
    assert torch.equal(weight.value, torch.ones(2))


def test_three_levels() -> None:
    """The middle level's lower level is reformulated; the top differentiates through the middle as usual."""
    theta, weight, top = (nestor.Variable(torch.full((n,), 0.1, dtype=torch.float64)) for n in (3, 2, 2))

    def middle(theta: Any, weight: Any, top: Any) -> Tensor:
        return outer(theta, weight) + (weight() * top()).sum()

    program = nestor.Program(
        theta=nestor.Problem(
            theta, inner, optimizer=torch.optim.SGD(theta.parameters(), lr=0.2), reformulation=nestor.F2SA()
        ),
        weight=nestor.Problem(weight, middle, optimizer=torch.optim.SGD(weight.parameters(), lr=0.1)),
        top=nestor.Problem(
            top, lambda weight: (weight() - 1).square().sum(), optimizer=torch.optim.SGD(top.parameters(), lr=0.1)
        ),
    )
    start = (weight.value - 1).square().sum().item()
    metrics = nestor.Engine(program, seed=0).run(600)
    assert metrics["top/loss"] < 0.05 * start


class Fit(torch.nn.Module):
    """A loss that is a module with a parameter of its own: ``forward`` states the arguments."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = torch.nn.Parameter(target, requires_grad=False)


class LowerFit(Fit):
    def forward(self, batch: Any, theta: Any, weight: Any) -> Tensor:
        return (batch @ theta() - self.target).square().mean() + weight()[0].exp() * theta().square().sum()


class UpperFit(Fit):
    def forward(self, batch: Any, *, theta: Any, scale: float = 1.0) -> dict[str, Tensor]:
        loss = scale * (batch @ theta() - self.target).square().mean()
        return {"loss": loss, "error": loss.sqrt()}


METHODS = [
    None,
    nestor.F2SA(multiplier=1.0, growth=0.5),
    nestor.PBGD(multiplier=5.0),
    nestor.BOME(),
    nestor.ValuePenalty(multiplier=3.0),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.describe() if method else "nested")
@pytest.mark.parametrize("which", ["lower", "upper", "both", "partial"])
def test_loss_that_is_a_module(method: nestor.Reformulation | None, which: str) -> None:
    """Equals the program with a plain function in its place, with and without a reformulation."""
    draws = torch.Generator().manual_seed(3)
    batches = [torch.randn(4, 3, generator=draws, dtype=torch.float64) for _ in range(6)]
    lower_loss, upper_loss = LowerFit(torch.ones(4)), UpperFit(torch.arange(4.0))

    def lower(batch: Any, theta: Any, weight: Any) -> Tensor:
        return lower_loss(batch, theta=theta, weight=weight)

    def upper(batch: Any, theta: Any) -> dict[str, Tensor]:
        return upper_loss(batch, theta=theta)

    def run(lower: Any, upper: Any) -> tuple[dict[str, Any], list[Tensor]]:
        theta, weight = (nestor.Variable(torch.full((n,), 0.5, dtype=torch.float64)) for n in (3, 1))
        program = nestor.Program(
            theta=nestor.Problem(
                theta,
                lower,
                data=batches[:3],
                optimizer=torch.optim.SGD(theta.parameters(), lr=0.02),
                unroll_steps=2,
                reformulation=method,
            ),
            weight=nestor.Problem(
                weight, upper, data=batches[3:], optimizer=torch.optim.SGD(weight.parameters(), lr=0.1)
            ),
        )
        assert [level.links.direct_reads for level in program.levels.values()][-1][-2:] == (
            ("theta", "weight") if method else ("theta",)
        )
        metrics = nestor.Engine(program, seed=0).run(6)
        return dict(metrics), [p.detach().clone() for level in program.levels.values() for p in level.parameters]

    modules = {
        "lower": (lower_loss, upper),
        "upper": (lower, upper_loss),
        "both": (lower_loss, upper_loss),
        "partial": (functools.partial(lower_loss), functools.partial(upper_loss, scale=1.0)),
    }
    metrics, variables = run(*modules[which])
    expected, other = run(lower, upper)
    assert metrics.keys() == expected.keys()
    assert all(metrics[key] == expected[key] for key in metrics if "loss" in key)
    assert all(torch.equal(a, b) for a, b in zip(variables, other, strict=True))
    assert variables[-1] != 0.5


def test_reformulated_upper_level() -> None:
    """The second rewriting starts from the loss that the first one wrote."""
    theta, weight, top = (nestor.Variable(torch.full((n,), 0.1, dtype=torch.float64)) for n in (3, 2, 2))
    program = nestor.Program(
        theta=nestor.Problem(theta, inner, reformulation=nestor.F2SA(multiplier=2.0)),
        weight=nestor.Problem(
            weight,
            lambda theta, weight, top: outer(theta, weight) + (weight() * top()).sum(),
            reformulation=nestor.F2SA(multiplier=3.0),
        ),
        top=nestor.Problem(top, lambda weight: (weight() - 1).square().sum()),
    )
    assert list(program.levels) == ["theta_value", "theta", "weight_value", "weight", "top"]
    with torch.no_grad():
        program.levels["theta_value"].parameters[0].fill_(0.3)
    batch = (None, None, 2.0)
    (got,) = program.hypergradient("weight", {"theta": batch, "weight": (batch, None, 3.0)}).values()
    at = weight.value.detach().requires_grad_()
    gap = inner(theta, lambda: at) - inner(program.levels["theta_value"].problem.module, lambda: at)
    by_hand = (at - 1).square().sum() / 3.0 + outer(theta, lambda: at) + (at * top()).sum() + 2.0 * gap
    torch.testing.assert_close(got, torch.autograd.grad(by_hand, at)[0], rtol=1e-12, atol=0)


def test_errors() -> None:
    """No reader, a name that is taken, bad numbers."""
    theta = nestor.Variable(torch.zeros(3))
    with pytest.raises(ValueError, match="exactly one level above"):
        nestor.Program(theta=nestor.Problem(theta, lambda theta: theta().sum(), reformulation=nestor.F2SA()))
    for make in (
        lambda: nestor.F2SA(multiplier=0.0),
        lambda: nestor.F2SA(growth=-1.0),
        lambda: nestor.F2SA(multiplier=2.0, most=1.0),
        lambda: nestor.BOME(eta=0.0),
    ):
        with pytest.raises(ValueError, match="must be"):
            make()
    with pytest.raises(TypeError, match="must be a Reformulation"):
        build(nestor.F2SA)  # type: ignore[arg-type]
