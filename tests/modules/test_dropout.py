"""One dropout mask per response."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nestor

ByHand = Callable[..., dict[str, Tensor]]
Error = Callable[[dict[str, Tensor], dict[str, Tensor]], float]
Bits = Callable[[Any], Any]
Batch = tuple[Tensor, Tensor]


def train_loss(batch: Batch, net: nn.Module, weights: nestor.Variable) -> Tensor:
    x, y = batch
    return (torch.sigmoid(weights()) * F.cross_entropy(net(x), y, reduction="none")).mean()


def valid_loss(batch: Batch, net: nn.Module) -> Tensor:
    x, y = batch
    return F.cross_entropy(net(x), y)


@pytest.fixture
def modules() -> dict[str, nn.Module]:
    """A network with much dropout and smooth activations, and one weight per example."""
    net = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Dropout(0.5), nn.Linear(24, 16), nn.Dropout(0.3), nn.Tanh())
    net.append(nn.Linear(16, 4))
    return {"net": net.double(), "weights": nestor.Variable(torch.zeros(16, dtype=torch.float64))}


@pytest.fixture
def batches() -> dict[str, Batch]:
    """A batch for each level."""
    return {name: (torch.randn(16, 8, dtype=torch.float64), torch.randint(0, 4, (16,))) for name in ("net", "weights")}


def make(modules: dict[str, nn.Module], response: nestor.Response) -> nestor.Program:
    return nestor.Program(
        net=nestor.Problem(modules["net"], train_loss, response=response),
        weights=nestor.Problem(modules["weights"], valid_loss),
    )


def hypergradient(
    modules: dict[str, nn.Module], response: nestor.Response, batches: dict[str, Batch], seed: int = 11
) -> dict[str, Tensor]:
    program = make(modules, response)
    torch.manual_seed(seed)
    return program.hypergradient("weights", batches)


def test_finite_difference_agrees_with_t1t2(
    modules: dict[str, nn.Module], batches: dict[str, Batch], relative_error: Error
) -> None:
    """Two masks would make the difference measure the masks: errors of a hundred times the norm."""
    exact = hypergradient(modules, nestor.T1T2(), batches)
    assert relative_error(hypergradient(modules, nestor.FiniteDifference(), batches), exact) < 1e-3
    # Other masks give other hypergradients, so the agreement means something.
    assert relative_error(hypergradient(modules, nestor.FiniteDifference(), batches, seed=12), exact) > 1e-1


@pytest.mark.parametrize("cross", [None, nestor.ForwardMode(), nestor.ReverseMode()])
def test_t1t2_equals_double_backward_on_the_same_mask(
    cross: nestor.CrossDerivative | None,
    modules: dict[str, nn.Module],
    batches: dict[str, Batch],
    by_hand: ByHand,
    relative_error: Error,
) -> None:
    """The masks are those that follow the generator's state at the call, in the lower and in the upper loss."""
    wanted = by_hand(modules, train_loss, valid_loss, batches["net"], batches["weights"], seed=11)
    assert relative_error(hypergradient(modules, nestor.T1T2(cross=cross), batches), wanted) < 1e-12


@pytest.mark.parametrize(
    "solver", [nestor.ConjugateGradient(max_steps=200, rtol=1e-13), nestor.DenseSolve()], ids=["cg", "dense"]
)
def test_a_solve_sees_one_mask(
    solver: nestor.LinearSolver,
    modules: dict[str, nn.Module],
    batches: dict[str, Batch],
    by_hand: ByHand,
    relative_error: Error,
) -> None:
    """The Hessian of every product is that of the mask of the mixed derivative."""
    response = nestor.Implicit(solver=solver, damping=1.0)
    wanted = by_hand(modules, train_loss, valid_loss, batches["net"], batches["weights"], seed=11, damping=1.0)
    # The oracle's residual is 1e-11, and the damped Hessian's condition number below 10.
    assert relative_error(hypergradient(modules, response, batches), wanted) < 1e-9


@pytest.mark.parametrize(
    "response",
    [
        nestor.T1T2(),
        nestor.T1T2(cross=nestor.ForwardMode()),
        nestor.FiniteDifference(),
        nestor.Implicit(damping=1.0),
        nestor.Implicit(solver=nestor.Neumann(num_terms=5, step_size=0.1), damping=1.0),
    ],
    ids=["t1t2", "forward", "finite-difference", "cg", "neumann"],
)
def test_hypergradient_is_repeatable(
    response: nestor.Response, modules: dict[str, nn.Module], batches: dict[str, Batch], bits: Bits
) -> None:
    """A hypergradient does not draw from the generator, so a second one is bitwise the first."""
    program = make(modules, response)
    first = program.hypergradient("weights", batches)
    assert bits(program.hypergradient("weights", batches)) == bits(first)
    torch.rand(1)
    assert bits(program.hypergradient("weights", batches)) != bits(first)


def test_best_response_sees_one_mask(
    modules: dict[str, nn.Module], batches: dict[str, Batch], by_hand: ByHand, relative_error: Error
) -> None:
    """The functional core draws its masks at the call, however many numbers are drawn before the backward pass."""
    net, weights = modules["net"], modules["weights"]
    assert isinstance(weights, nestor.Variable)

    def objective(theta: dict[str, Tensor], lam: Tensor) -> Tensor:
        x, y = batches["net"]
        losses = F.cross_entropy(torch.func.functional_call(net, theta, x), y, reduction="none")
        return (torch.sigmoid(lam) * losses).mean()

    torch.manual_seed(11)
    theta = nestor.best_response(objective, dict(net.named_parameters()), weights.value)
    torch.manual_seed(11)
    x, y = batches["weights"]
    value = F.cross_entropy(torch.func.functional_call(net, theta, x), y)
    torch.rand(5)
    (got,) = torch.autograd.grad(value, [weights.value])
    wanted = by_hand(modules, train_loss, valid_loss, batches["net"], batches["weights"], seed=11)
    assert relative_error({"value": got}, wanted) < 1e-12
