"""Every linear solver against dense matrices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import SIZE, Matrix, definite, flat, random
from torch import Tensor

import nestor

KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "definite": definite,
    "indefinite": lambda dense: dense + dense.T,
    "general": lambda dense: dense + 8 * torch.eye(SIZE, dtype=dense.dtype),
}
SOLVERS: list[tuple[nestor.LinearSolver, list[str]]] = [
    (nestor.ConjugateGradient(max_steps=60, rtol=1e-11), ["definite"]),
    (nestor.ConjugateGradient(max_steps=60, rtol=1e-11, check_every=7), ["definite"]),
    (nestor.Neumann(num_terms=4000, step_size=1 / 60), ["definite"]),
    (nestor.DenseSolve(), ["definite", "indefinite", "general"]),
    (nestor.MINRES(max_steps=60, rtol=1e-11), ["definite", "indefinite"]),
    (nestor.GMRES(max_steps=60, rtol=1e-11), ["definite", "indefinite", "general"]),
    (nestor.GMRES(max_steps=400, rtol=1e-11, restart=6), ["general"]),
    (nestor.BiCGSTAB(max_steps=60, rtol=1e-11), ["definite", "general"]),
    (nestor.NormalConjugateGradient(max_steps=400, rtol=1e-10), ["definite", "indefinite", "general"]),
]
CASES = [(solver, kind) for solver, kinds in SOLVERS for kind in kinds]


@pytest.mark.parametrize(("solver", "kind"), CASES, ids=lambda value: str(value)[:60])
def test_solves(solver: nestor.LinearSolver, kind: str) -> None:
    """A matrix that couples several tensors, one a scalar; the reported residual is the true one."""
    dense, rhs = random()
    matrix = Matrix(KINDS[kind](dense))
    before = [part.clone() for part in rhs]
    solution = solver.solve(matrix, rhs)
    residual = (flat(rhs) - matrix.dense @ flat(solution.value)).norm() / flat(rhs).norm()
    assert residual < 1e-9
    assert abs(solution.stats["residual"] - residual) < 1e-8
    assert all(torch.equal(a, b) for a, b in zip(before, rhs, strict=True))
    assert matrix.products <= solver.max_products(SIZE)


@pytest.mark.parametrize(("solver", "kind"), CASES, ids=lambda value: str(value)[:60])
@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_scale_does_not_matter(solver: nestor.LinearSolver, kind: str, size: float) -> None:
    """A scaled right-hand side has the scaled solution."""
    dense, rhs = random()
    matrix = Matrix(KINDS[kind](dense))
    scaled = solver.solve(matrix, [size * part for part in rhs])
    expected = size * torch.linalg.solve(matrix.dense, flat(rhs))
    assert (flat(scaled.value) - expected).norm() <= 1e-7 * expected.norm()


@pytest.mark.parametrize(("solver", "kind"), CASES, ids=lambda value: str(value)[:60])
def test_zero_gives_zero(solver: nestor.LinearSolver, kind: str) -> None:
    """No division by zero."""
    dense, rhs = random()
    solution = solver.solve(Matrix(KINDS[kind](dense)), [torch.zeros_like(part) for part in rhs])
    assert all(torch.equal(part, torch.zeros_like(part)) for part in solution.value)


@pytest.mark.parametrize(
    "solver",
    [solver for solver, _ in SOLVERS if not isinstance(solver, nestor.Neumann)],
    ids=lambda value: str(value)[:60],
)
def test_convergence_in_one_step(solver: nestor.LinearSolver) -> None:
    """A multiple of the identity: the first iterate must not be dropped."""
    _, rhs = random()
    solution = solver.solve(Matrix(3.0 * torch.eye(SIZE, dtype=torch.float64)), rhs)
    torch.testing.assert_close(flat(solution.value), flat(rhs) / 3, rtol=1e-12, atol=0)


def test_conjugate_gradient_runs_on_past_convergence() -> None:
    """rtol = 0 and many steps: no NaN from 0 / 0."""
    dense, rhs = random()
    matrix = Matrix(definite(dense))
    solution = nestor.ConjugateGradient(max_steps=200, rtol=0.0, check_every=50).solve(matrix, rhs)
    expected = torch.linalg.solve(matrix.dense, flat(rhs))
    torch.testing.assert_close(flat(solution.value), expected, rtol=1e-10, atol=1e-12)


def test_conjugate_gradient_refuses() -> None:
    """A matrix that is not symmetric, and NaN are errors with a remedy."""
    dense, rhs = random()
    with pytest.raises(nestor.SolverError, match="symmetric"):
        nestor.ConjugateGradient().solve(Matrix(dense), rhs)
    with pytest.raises(nestor.SolverError, match="no finite gradient"):
        nestor.ConjugateGradient().solve(Matrix(definite(dense)), [part * torch.nan for part in rhs])


def test_neumann_is_its_partial_sum_and_detects_divergence() -> None:
    """alpha sum (I - alpha A)^k b, term by term."""
    dense, rhs = random()
    matrix = Matrix(definite(dense))
    expected, term = torch.zeros(SIZE, dtype=torch.float64), flat(rhs)
    for _ in range(4):
        expected, term = expected + 0.01 * term, term - 0.01 * matrix.dense @ term
    solution = nestor.Neumann(num_terms=4, step_size=0.01).solve(matrix, rhs)
    torch.testing.assert_close(flat(solution.value), expected, rtol=1e-12, atol=0)
    assert matrix.products == 3
    with pytest.raises(nestor.SolverError, match="diverges"):
        nestor.Neumann(num_terms=30, step_size=1.0).solve(matrix, rhs)


def test_dense_solve_refuses() -> None:
    """A singular matrix, and a level that is too large."""
    _, rhs = random()
    with pytest.raises(nestor.SolverError, match="singular"):
        nestor.DenseSolve().solve(Matrix(torch.zeros(SIZE, SIZE, dtype=torch.float64)), rhs)
    with pytest.raises(nestor.SolverError, match="max_dimension=5"):
        nestor.DenseSolve(max_dimension=5).solve(Matrix(torch.eye(SIZE, dtype=torch.float64)), rhs)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nestor.ConjugateGradient(max_steps=0), "max_steps=0"),
        (lambda: nestor.ConjugateGradient(rtol=-1.0), "rtol=-1.0"),
        (lambda: nestor.Neumann(step_size=0.0), "step_size=0.0"),
        (lambda: nestor.Neumann(num_terms=0), "num_terms=0"),
        (lambda: nestor.Identity(scale=-1.0), "scale=-1.0"),
        (lambda: nestor.GMRES(restart=0), "restart=0"),
        (lambda: nestor.DenseSolve(max_dimension=0), "max_dimension=0"),
    ],
)
def test_options_are_checked(make: Callable[[], object], words: str) -> None:
    """ValueError at construction, with the value."""
    with pytest.raises(ValueError, match=words):
        make()


def test_root_of_a_non_symmetric_system_to_second_order() -> None:
    """A deep equilibrium: theta = tanh(W theta + lambda), against differences of the solved equation."""
    generator = torch.Generator().manual_seed(3)
    weight = 0.4 * torch.randn(5, 5, generator=generator, dtype=torch.float64)
    given = torch.randn(5, generator=generator, dtype=torch.float64)

    def solved(x: Tensor) -> Tensor:
        theta = torch.zeros(5, dtype=torch.float64)
        for _ in range(400):
            theta = torch.tanh(weight @ theta + x)
        return theta

    def gradient(x: Tensor, create_graph: bool = False) -> Tensor:
        x = x if create_graph else x.detach().requires_grad_()
        theta = nestor.fixed_point(
            lambda t, lam: torch.tanh(weight @ t + lam), solved(x.detach()), x, nestor.GMRES(rtol=1e-13)
        )
        return torch.autograd.grad((theta**3).sum(), x, create_graph=create_graph)[0]

    x = given.clone().requires_grad_()
    first = gradient(x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    step = 1e-5
    for entry in range(5):
        shift = step * torch.eye(5, dtype=torch.float64)[entry]
        value = ((solved(given + shift) ** 3).sum() - (solved(given - shift) ** 3).sum()) / (2 * step)
        assert abs(first[entry] - value) < 1e-8
        slope = (gradient(given + shift) - gradient(given - shift)).sum() / (2 * step)
        assert abs(second[entry] - slope) < 1e-6
