"""A solve that ends far from a solution warns where no metric would show it."""

import warnings

import pytest
import torch
from torch import Tensor

import nestor

VALUES = torch.tensor([1.0, 2.0, 30.0], dtype=torch.float64)


def derivative(response: nestor.Response) -> Tensor:
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    best = nestor.best_response(
        lambda t, w: (VALUES * t**2).sum() / 2 - (w * t).sum(), weight.detach() / VALUES, weight, response
    )
    return torch.autograd.grad(best.sum(), weight)[0]


def equilibrium(solver: nestor.LinearSolver) -> Tensor:
    a = 0.9 * torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    x = torch.ones(6, dtype=torch.float64, requires_grad=True)
    found = nestor.fixed_point(lambda z, x: a @ z + x, torch.linalg.solve(torch.eye(6) - a, x.detach()), x, solver)
    return torch.autograd.grad(found.sum(), x)[0]


@pytest.mark.parametrize(
    ("solver", "name"),
    [
        (nestor.ConjugateGradient(max_steps=1), "ConjugateGradient stopped after 1 iterations"),
        (nestor.MINRES(max_steps=1), "MINRES stopped after 1 iterations"),
    ],
)
def test_best_responses(solver: nestor.LinearSolver, name: str) -> None:
    with pytest.warns(nestor.NestorWarning, match=rf"'lower': {name}, and \|b - A x\| is still above 0.1 .*max_steps"):
        derivative(nestor.Implicit(solver=solver))


@pytest.mark.parametrize("solver", [nestor.GMRES(max_steps=1), nestor.BiCGSTAB(max_steps=1)])
def test_fixed_points(solver: nestor.LinearSolver) -> None:
    name = type(solver).__name__
    with pytest.warns(nestor.NestorWarning, match=rf"{name} stopped after 1 iterations.*far from that of the best"):
        equilibrium(solver)


@pytest.mark.parametrize(
    "solver",
    [
        nestor.ConjugateGradient(),
        nestor.MINRES(),
        nestor.DenseSolve(),
        nestor.NormalConjugateGradient(max_steps=1),  # least squares
        nestor.Neumann(num_terms=1, step_size=0.01),  # an approximation by definition
        nestor.Nystrom(rank=1, rho=1.0),
    ],
)
def test_no_warning(solver: nestor.LinearSolver) -> None:
    """What is solved, and what promises no solution."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        derivative(nestor.Implicit(solver=solver))


def test_in_a_run_it_is_a_metric() -> None:
    """Which says how far the solve was."""
    net, weight = nestor.Variable(torch.ones(3).double()), nestor.Variable(torch.ones(3).double())
    program = nestor.Program(
        net=nestor.Problem(
            net,
            lambda net, weight: (VALUES * net() ** 2).sum() / 2 - (weight() * net()).sum(),
            optimizer=torch.optim.SGD(net.parameters(), lr=0.03),
            response=nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=1)),
        ),
        weight=nestor.Problem(weight, lambda net: net().sum(), optimizer=torch.optim.SGD(weight.parameters(), lr=0.1)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = nestor.Engine(program, seed=0).run(1)
    assert metrics["weight/net_residual"] > 0.1
