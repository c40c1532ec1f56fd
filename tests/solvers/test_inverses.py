"""Nyström, L-BFGS inverses, preconditioners, truncation, power iteration, warm starts, curvatures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import SIZE, Matrix, flat, random, split
from torch import Tensor, nn

import nestor
from nestor.diagnostics import count_evaluations


def error(solution: list[Tensor], dense: Tensor, rhs: list[Tensor]) -> float:
    expected = torch.linalg.solve(dense, flat(rhs))
    return ((flat(solution) - expected).norm() / expected.norm()).item()


def test_nystrom_of_full_rank_is_the_inverse(system: tuple[Tensor, list[Tensor]]) -> None:
    """All columns, a vanishing regularizer."""
    dense, rhs = system
    solution = nestor.Nystrom(rank=SIZE, rho=1e-9).solve(Matrix(dense), rhs)
    assert error(solution.value, dense, rhs) <= 1e-7


def test_nystrom_of_a_low_rank_matrix() -> None:
    """Three columns of a matrix of rank three say it all: (A + rho I)^-1 b."""
    dense, rhs = random(1)
    low = dense[:, :3] @ dense[:, :3].T
    matrix = Matrix(0.5 * (low + low.T))
    solution = nestor.Nystrom(rank=3, rho=0.1).solve(matrix, rhs)
    assert matrix.products == 3
    assert error(solution.value, low + 0.1 * torch.eye(SIZE, dtype=torch.float64), rhs) <= 1e-9


def test_nystrom_reuses_its_columns(system: tuple[Tensor, list[Tensor]]) -> None:
    """Three solves share a sketch; the fourth takes other columns."""
    dense, rhs = system
    matrix, solver, memory, products, values = Matrix(dense), nestor.Nystrom(rank=4, refresh=3), [], [], []
    for _ in range(4):
        solution = solver.solve(matrix, rhs, memory=memory)
        memory = solution.memory
        products.append(matrix.products)
        values.append(flat(solution.value))
    assert products == [4, 4, 4, 8]
    assert torch.equal(values[0], values[2])
    assert not torch.equal(values[0], values[3])


def test_lbfgs_inverse_aims_at_the_right_hand_side(system: tuple[Tensor, list[Tensor]]) -> None:
    """On a quadratic, as many aimed pairs as variables are exact."""
    dense, rhs = system
    matrix = Matrix(dense)
    solution = nestor.LBFGSInverse(pairs=0, max_steps=40, rtol=1e-11).solve(matrix, rhs)
    assert error(solution.value, dense, rhs) <= 1e-8
    assert matrix.products <= 2 * SIZE
    assert solution.stats["residual"].item() <= 1e-11


def test_lbfgs_inverse_of_known_secants_costs_nothing(system: tuple[Tensor, list[Tensor]]) -> None:
    """Conjugate secants that span the space are the inverse; bad pairs among them are skipped."""
    dense, rhs = system
    basis: list[Tensor] = []
    for column in torch.eye(SIZE, dtype=torch.float64):  # Gram-Schmidt in the product of the matrix
        for other in basis:
            column = column - (other @ dense @ column) / (other @ dense @ other) * other
        basis.append(column)
    known = [(split(s), split(dense @ s)) for s in basis]
    known.insert(3, (split(basis[0]), split(-dense @ basis[0])))
    matrix = Matrix(dense, known)
    solution = nestor.LBFGSInverse(pairs=20).solve(matrix, rhs)
    assert matrix.products == 0
    assert error(solution.value, dense, rhs) <= 1e-8
    with pytest.raises(nestor.SolverError, match=r"LBFGSInverse\(max_steps=10\)"):
        nestor.LBFGSInverse().solve(Matrix(dense), rhs)


def test_preconditioner_helps_with_scales() -> None:
    """Variables in units that differ by a thousand: fewer iterations, the same solution."""
    dense, rhs = random(2)
    scales = torch.logspace(-1.5, 1.5, SIZE, dtype=torch.float64)
    coupled = scales[:, None] * (torch.eye(SIZE, dtype=torch.float64) + 0.02 * (dense + dense.T)) * scales
    coupled = 0.5 * (coupled + coupled.T)
    plain = nestor.ConjugateGradient(max_steps=200, rtol=1e-10)
    helped = nestor.ConjugateGradient(
        max_steps=200, rtol=1e-10, preconditioner=nestor.HutchinsonDiagonal(samples=64, floor=1e-8)
    )
    one, two = plain.solve(Matrix(coupled), rhs), helped.solve(Matrix(coupled), rhs)
    assert error(two.value, coupled, rhs) <= 1e-7
    assert two.stats["iterations"] < 0.8 * one.stats["iterations"]
    assert helped.max_products(12) == 264


def test_truncation_at_negative_curvature() -> None:
    """The iterate before; at the very first direction, that direction."""
    dense = torch.diag(torch.tensor([4.0, 3.0, 2.0, -1.0] + [1.0] * 8, dtype=torch.float64))
    rhs = split(torch.tensor([1.0, 1, 1, 0.1] + [0.5] * 8, dtype=torch.float64))
    for check_every in (1, 7):
        solver = nestor.ConjugateGradient(max_steps=30, check_every=check_every)
        solution = solver.solve(Matrix(dense), rhs)
        assert bool(solution.stats["truncated"])
        assert torch.isfinite(flat(solution.value)).all()
        assert flat(solution.value) @ flat(rhs) > 0
    first = nestor.ConjugateGradient().solve(Matrix(-dense), split(torch.eye(SIZE).double()[0]))
    assert torch.equal(flat(first.value), torch.eye(SIZE).double()[0])
    fine = nestor.ConjugateGradient(max_steps=30).solve(Matrix(dense.abs()), rhs)
    assert not bool(fine.stats["truncated"])


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_neumann_finds_its_step_size(system: tuple[Tensor, list[Tensor]], scale: float) -> None:
    """Whatever the units of the losses, the series converges."""
    dense, rhs = system
    solver = nestor.Neumann(num_terms=3000, step_size=None, power_steps=30)
    assert error(solver.solve(Matrix(scale * dense), rhs).value, scale * dense, rhs) <= 1e-6
    assert solver.max_products(SIZE) == 3029


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize(
    "solver",
    [
        nestor.ConjugateGradient(max_steps=80, rtol=1e-10),
        nestor.MINRES(max_steps=80, rtol=1e-10),
        nestor.GMRES(max_steps=80, rtol=1e-10),
        nestor.BiCGSTAB(max_steps=80, rtol=1e-10),
        nestor.NormalConjugateGradient(max_steps=400, rtol=1e-10),
        nestor.LBFGSInverse(pairs=0, max_steps=60, rtol=1e-10),
    ],
)
def test_scaled_systems_and_reference(
    system: tuple[Tensor, list[Tensor]], solver: nestor.LinearSolver, scale: float
) -> None:
    """Tolerances are relative: to the right-hand side, or to the reference."""
    dense, rhs = system
    assert error(solver.solve(Matrix(scale * dense), rhs).value, scale * dense, rhs) <= 1e-7
    loose = solver.solve(Matrix(scale * dense), rhs, reference=1e9 * flat(rhs).norm())
    assert loose.stats["iterations"] < solver.solve(Matrix(scale * dense), rhs).stats["iterations"]


def test_zero_and_one_step_systems() -> None:
    """A zero right-hand side, and a matrix that is a multiple of the identity."""
    identity = Matrix(3.0 * torch.eye(SIZE, dtype=torch.float64))
    zero = split(torch.zeros(SIZE, dtype=torch.float64))
    _, rhs = random()
    for solver in (
        nestor.ConjugateGradient(),
        nestor.ConjugateGradient(preconditioner=nestor.HutchinsonDiagonal()),
        nestor.LBFGSInverse(pairs=0, max_steps=3),
        nestor.Nystrom(rank=SIZE, rho=1e-9),
    ):
        assert flat(solver.solve(identity, zero).value).norm() == 0
        torch.testing.assert_close(flat(solver.solve(identity, rhs).value), flat(rhs) / 3, rtol=1e-7, atol=0)


def regression(response: nestor.Response, **options: Any) -> tuple[nestor.Program, nestor.Variable]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(40, 8, generator=generator, dtype=torch.float64)
    b = torch.randn(40, generator=generator, dtype=torch.float64)
    theta, penalty = nestor.Variable(torch.zeros(8).double()), nestor.Variable(torch.zeros(8).double())

    def lower(theta: Any, penalty: Any) -> Tensor:
        return ((a @ theta() - b) ** 2).mean() + (penalty().exp() * theta() ** 2).sum()

    return nestor.Program(
        theta=nestor.Problem(
            theta,
            lower,
            optimizer=torch.optim.SGD(theta.parameters(), lr=0.1),
            response=response,
            **options,
        ),
        penalty=nestor.Problem(
            penalty,
            lambda theta: ((a[:9] @ theta() - 1) ** 2).mean(),
            optimizer=torch.optim.SGD(penalty.parameters(), lr=0.01),
        ),
    ), penalty


def test_warm_start_needs_fewer_iterations() -> None:
    """The engine keeps the solution; the residual at a given cost falls from step to step."""
    residuals = {}
    for warm in (True, False):
        program, _ = regression(
            nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=2, rtol=0.0), warm_start=warm)
        )
        engine = nestor.Engine(program, seed=0)
        residuals[warm] = [engine.run(1)["penalty/theta_residual"] for _ in range(12)]
    assert residuals[True][-1] < 0.5 * residuals[False][-1]
    cold = nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=40, rtol=1e-8))
    hot = nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=40, rtol=1e-8), warm_start=True)
    iterations = []
    for response in (cold, hot):
        engine = nestor.Engine(regression(response)[0], seed=0)
        iterations.append(sum(engine.run(1)["penalty/theta_iterations"] for _ in range(30)))
    assert iterations[1] < iterations[0]
    program, _ = regression(hot)
    engine = nestor.Engine(program, seed=0)
    engine.run(3)
    assert [v.shape for v in engine.states["penalty"].solves["theta"].value] == [torch.Size([8])]
    with pytest.raises(ValueError, match="Identity does not solve"):
        nestor.Implicit(solver=nestor.Identity(), warm_start=True)


def test_single_loop_follows_the_exact_hypergradient() -> None:
    """SOBA: one Richardson step of the linear system an upper step; the adjoint catches up."""
    soba = nestor.Implicit(solver=nestor.Neumann(num_terms=1, step_size=0.2), warm_start=True)
    exact = nestor.Implicit(solver=nestor.DenseSolve())
    ends = []
    for response in (soba, exact):
        program, penalty = regression(response)
        nestor.Engine(program, seed=0).run(400)
        ends.append(penalty.value.detach())
    assert (ends[0] - ends[1]).norm() <= 0.02 * ends[1].norm()


def test_shine_uses_the_steps_of_the_run() -> None:
    """Full-batch gradient descent: its secants are exact, and no Hessian product is taken."""
    shine = nestor.Implicit(solver=nestor.LBFGSInverse(pairs=8))
    program, penalty = regression(shine, unroll_steps=12)
    before = penalty.value.detach().clone()
    engine = nestor.Engine(program, seed=0)
    with count_evaluations(program) as count:
        engine.run(12)
    assert count.hvps["theta"] == 0
    got = (before - penalty.value.detach()) / 0.01
    twin, other = regression(nestor.Implicit(solver=nestor.DenseSolve()), unroll_steps=12)
    nestor.Engine(twin, seed=0).run(12)
    expected = -other.value.detach() / 0.01
    crude, third = regression(nestor.T1T2(), unroll_steps=12)
    nestor.Engine(crude, seed=0).run(12)
    cosine = F.cosine_similarity(got, expected, dim=0)
    assert cosine > 0.9
    assert (got - expected).norm() < 0.5 * expected.norm()
    assert (got - expected).norm() < 0.5 * (-third.value.detach() / 0.01 - expected).norm()


def classifier(curvature: nestor.Curvature, seed: int = 0) -> nestor.Program:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    weight = nestor.Variable(torch.zeros(10).double())
    x, y = torch.randn(10, 4).double(), torch.randint(0, 3, (10,))

    def lower(net: Any, weight: Any) -> Tensor:
        losses = F.cross_entropy(nestor.outputs(net(x)), y, reduction="none")
        return (torch.sigmoid(weight()) * losses).mean() + 0.05 * sum(p.square().sum() for p in net.parameters())

    return nestor.Program(
        net=nestor.Problem(
            net,
            lower,
            response=nestor.Implicit(solver=nestor.DenseSolve(), condition=nestor.Stationarity(curvature=curvature)),
        ),
        weight=nestor.Problem(weight, lambda net: F.cross_entropy(net(x.flip(1)), y)),
    )


def test_gauss_newton_by_hand() -> None:
    """J^T L'' J plus the regularizer's curvature, from full Jacobians."""
    program = classifier(nestor.GaussNewton())
    net = program.levels["net"].problem.module
    lower = program.levels["net"].problem.loss
    x, y = (cell.cell_contents for name, cell in zip(lower.__code__.co_freevars, lower.__closure__, strict=True))
    names = [n for n, _ in net.named_parameters()]
    sizes = [p.numel() for p in net.parameters()]
    flat_parameters = torch.cat([p.detach().reshape(-1) for p in net.parameters()])

    def model(values: Tensor) -> Tensor:
        pieces = torch.split(values, sizes)
        tensors = {n: v.view_as(p) for n, v, p in zip(names, pieces, net.parameters(), strict=True)}
        return torch.func.functional_call(net, tensors, (x,)).reshape(-1)

    def loss(z: Tensor, weight: Tensor) -> Tensor:
        return (torch.sigmoid(weight) * F.cross_entropy(z.view(10, 3), y, reduction="none")).mean()

    zero = torch.zeros(10).double()
    jacobian = torch.autograd.functional.jacobian(model, flat_parameters)
    inner = torch.autograd.functional.hessian(lambda z: loss(z, zero), model(flat_parameters))
    matrix = jacobian.T @ inner @ jacobian + 0.1 * torch.eye(len(flat_parameters)).double()
    assert torch.linalg.eigvalsh(matrix).min() > 0.09
    cotangent = torch.cat(
        [g.reshape(-1) for g in torch.autograd.grad(F.cross_entropy(net(x.flip(1)), y), list(net.parameters()))]
    )

    def slope(weight: Tensor) -> Tensor:
        values = flat_parameters.clone().requires_grad_()
        return torch.autograd.grad(loss(model(values), weight), values, create_graph=True)[0]

    mixed = torch.autograd.functional.jacobian(slope, zero)
    expected = -mixed.T @ torch.linalg.solve(matrix, cotangent)
    got = program.hypergradient("weight")["value"]
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_finite_difference_hessian_is_near_the_hessian() -> None:
    """Two gradients a product, and no second derivative."""
    program = classifier(nestor.FiniteDifferenceHessian(rel_step=1e-4))
    exact = classifier(nestor.Hessian()).hypergradient("weight")["value"]
    with count_evaluations(program) as count:
        got = program.hypergradient("weight")["value"]
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-8)
    dimension = sum(p.numel() for p in program.levels["net"].parameters)
    assert count.gradients["net"] == 2 * dimension + 2


def test_gauss_newton_needs_marks() -> None:
    """Says where to put them."""
    net, weight = nn.Linear(2, 1), nestor.Variable(torch.ones(2))
    program = nestor.Program(
        net=nestor.Problem(
            net,
            lambda net, weight: net(weight()[None]).square().mean(),
            response=nestor.Implicit(condition=nestor.Stationarity(curvature=nestor.GaussNewton())),
        ),
        weight=nestor.Problem(weight, lambda net: net.weight.sum()),
    )
    with pytest.raises(nestor.SolverError, match=r"nestor\.outputs\(net\(x\)\)"):
        program.hypergradient("weight")


def test_batched_columns_are_counted_as_products() -> None:
    """One mapped reverse pass, n products."""
    program = classifier(nestor.Hessian())
    dimension = sum(p.numel() for p in program.levels["net"].parameters)
    with count_evaluations(program) as count:
        program.hypergradient("weight")
    assert count.hvps["net"] == dimension
    assert count.forwards["net"] == 1
