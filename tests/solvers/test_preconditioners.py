"""Preconditioners change the path of conjugate gradients, and never the solution."""

from __future__ import annotations

import pytest
import torch
from conftest import SIZE, Matrix, definite, flat, random, split
from hypothesis import given, settings
from hypothesis.strategies import integers
from torch import Tensor

import nestor
from nestor.solvers import Diagonal, NystromPreconditioner


def solve(dense: Tensor, rhs: list[Tensor], preconditioner: nestor.Preconditioner | None) -> tuple[Tensor, int]:
    """Return the solution and the iterations."""
    solver = nestor.ConjugateGradient(max_steps=300, rtol=1e-10, preconditioner=preconditioner)
    solution = solver.solve(Matrix(dense), rhs)
    return flat(solution.value), int(solution.stats["iterations"])


def with_spectrum(eigenvalues: Tensor, seed: int) -> tuple[Tensor, list[Tensor]]:
    dense, rhs = random(seed)
    basis, _ = torch.linalg.qr(dense)
    matrix = basis @ torch.diag(eigenvalues) @ basis.T
    return 0.5 * (matrix + matrix.T), rhs


@settings(max_examples=15, deadline=None)
@given(seed=integers(0, 2**16), rank=integers(1, SIZE))
def test_the_solution_stays(seed: int, rank: int) -> None:
    """Columns by chance, a diagonal that has nothing to do with the matrix: only the iterations differ."""
    dense, rhs = random(seed)
    dense = definite(dense)
    expected = torch.linalg.solve(dense, flat(rhs))
    generator = torch.Generator().manual_seed(seed)
    guess = split(0.5 + torch.rand(SIZE, generator=generator, dtype=torch.float64))
    for preconditioner in (NystromPreconditioner(rank=rank, seed=seed), Diagonal(guess)):
        found, _ = solve(dense, rhs, preconditioner)
        assert (found - expected).norm() <= 1e-7 * expected.norm()


def test_the_exact_inverse_takes_one_iteration() -> None:
    """The diagonal of a diagonal matrix, and all the columns but for the scale of the bulk."""
    _, rhs = random()
    entries = torch.logspace(-3, 3, SIZE, dtype=torch.float64)
    found, iterations = solve(torch.diag(entries), rhs, Diagonal(split(entries)))
    assert iterations == 1
    torch.testing.assert_close(found, flat(rhs) / entries, rtol=1e-12, atol=0)
    dense, rhs = with_spectrum(torch.logspace(-2, 2, SIZE, dtype=torch.float64), seed=1)
    assert solve(dense, rhs, NystromPreconditioner(rank=SIZE))[1] <= 2


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_columns_remove_large_eigenvalues(scale: float) -> None:
    """Five eigenvalues far above a bulk: the columns see them, in whatever units."""
    bulk = torch.linspace(1, 2, SIZE - 5, dtype=torch.float64)
    eigenvalues = scale * torch.cat([torch.logspace(2, 5, 5, dtype=torch.float64), bulk])
    for seed in range(4):
        dense, rhs = with_spectrum(eigenvalues, seed)
        _, plain = solve(dense, rhs, None)
        found, helped = solve(dense, rhs, NystromPreconditioner(rank=5))
        expected = torch.linalg.solve(dense, flat(rhs))
        assert helped < 0.7 * plain
        assert (found - expected).norm() <= 1e-7 * expected.norm()


def test_a_scalar_for_each_variable_is_enough() -> None:
    """Layers in different units: three numbers broadcast over three variables, nested as they like."""
    dense, rhs = random(3)
    units = torch.cat([torch.full((6,), 1e-3), torch.ones(1), torch.full((5,), 1e3)]).double()
    dense = units[:, None] * (torch.eye(SIZE).double() + 0.02 * (dense + dense.T)) * units
    dense = 0.5 * (dense + dense.T)
    layers = {"weight": torch.tensor(1e-6), "rest": [torch.tensor(1.0), torch.tensor(1e6)]}
    _, plain = solve(dense, rhs, None)
    found, helped = solve(dense, rhs, Diagonal(layers))
    assert helped < plain
    # What converges is the residual, so the error is the tolerance times the condition number of each part.
    torch.testing.assert_close(dense @ found, flat(rhs), rtol=1e-6, atol=1e-8)


def test_truncation_with_a_preconditioner() -> None:
    """At once: the direction that the preconditioner gives, which is a descent direction."""
    _, rhs = random()
    entries = torch.linspace(1, 2, SIZE, dtype=torch.float64)
    solver = nestor.ConjugateGradient(preconditioner=Diagonal(split(entries)))
    solution = solver.solve(Matrix(-torch.eye(SIZE).double()), rhs)
    torch.testing.assert_close(flat(solution.value), flat(rhs) / entries, rtol=1e-12, atol=0)
    assert bool(solution.stats["truncated"])


def test_preconditioners_count_their_products() -> None:
    """In explain(), and in the matrix."""
    dense, rhs = random()
    for preconditioner, products in (
        (nestor.HutchinsonDiagonal(samples=3), 3),
        (NystromPreconditioner(rank=4), 4),
        (NystromPreconditioner(rank=400), SIZE),
        (Diagonal([part.abs() for part in rhs]), 0),
    ):
        matrix = Matrix(definite(dense))
        preconditioner.prepare(matrix, rhs)
        assert matrix.products == preconditioner.max_products(SIZE) == products
        assert nestor.ConjugateGradient(max_steps=7, preconditioner=preconditioner).max_products(SIZE) == 7 + products


def test_a_zero_matrix_is_prepared() -> None:
    """Nothing is seen, nothing is divided by zero."""
    _, rhs = random()
    zero = Matrix(torch.zeros(SIZE, SIZE, dtype=torch.float64))
    for preconditioner in (NystromPreconditioner(rank=3), nestor.HutchinsonDiagonal(samples=2)):
        assert torch.equal(flat(preconditioner.prepare(zero, rhs)(rhs)), flat(rhs))


def test_preconditioners_refuse() -> None:
    """Values that are not positive, shapes that do not fit, columns of a matrix that is not symmetric."""
    dense, rhs = random()
    for bad in ([], [torch.tensor([1.0, 0.0])], [torch.tensor([1.0, torch.nan])]):
        with pytest.raises(ValueError, match="positive and finite"):
            Diagonal(bad)
    for shapes in ([()], [(3, 2), (), (4,)], [(3, 2), (1,), (5,)]):
        with pytest.raises(nestor.SolverError, match=r"one tensor for each variable"):
            solve(definite(dense), rhs, Diagonal([torch.ones(shape) for shape in shapes]))
    with pytest.raises(ValueError, match="rank=0"):
        NystromPreconditioner(rank=0)
    with pytest.raises(nestor.SolverError, match="symmetric"):
        NystromPreconditioner().prepare(Matrix(dense), rhs)
