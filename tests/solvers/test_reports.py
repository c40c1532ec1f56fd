"""What a solver says of its solve: the true residual, the products it promised, and never a silent NaN."""

from __future__ import annotations

import pytest
import torch
from conftest import SIZE, Matrix, definite, flat, random, split
from hypothesis import given, settings
from hypothesis.strategies import floats, integers
from torch import Tensor

import nestor
from nestor.solvers import Diagonal, LinearOperator, NystromPreconditioner, Transposed

ITERATIVE: list[nestor.LinearSolver] = [
    nestor.ConjugateGradient(max_steps=5),
    nestor.ConjugateGradient(max_steps=5, check_every=3),
    nestor.ConjugateGradient(max_steps=5, preconditioner=nestor.HutchinsonDiagonal(samples=2)),
    nestor.ConjugateGradient(max_steps=5, preconditioner=NystromPreconditioner(rank=3)),
    nestor.MINRES(max_steps=5),
    nestor.GMRES(max_steps=5),
    nestor.GMRES(max_steps=9, restart=3),
    nestor.BiCGSTAB(max_steps=5),
    nestor.NormalConjugateGradient(max_steps=5),
    nestor.LBFGSInverse(pairs=0, max_steps=5),
]
ALL = [
    *ITERATIVE,
    nestor.Neumann(step_size=1e-3),
    nestor.Neumann(step_size=None),
    nestor.DenseSolve(),
    nestor.Nystrom(rank=4),
]
GIVEN = [nestor.ConjugateGradient(preconditioner=Diagonal([torch.ones(()), torch.ones(()), torch.ones(5)]))]


def shorten(value: object) -> str:
    return str(value)[:70]


@pytest.mark.parametrize("solver", ITERATIVE, ids=shorten)
@pytest.mark.parametrize("factor", [None, 1.0, 10.0])
def test_residual_is_relative_to_the_right_hand_side(
    system: tuple[Tensor, list[Tensor]], solver: nestor.LinearSolver, factor: float | None
) -> None:
    """Stopped early, by the budget or by a tolerance that refers to something else: |b - A x| / |b|."""
    dense, rhs = system
    matrix = Matrix(dense)
    length = flat(rhs).norm()
    solution = solver.solve(matrix, rhs, reference=None if factor is None else factor * length)
    true = (flat(rhs) - dense @ flat(solution.value)).norm() / length
    torch.testing.assert_close(solution.stats["residual"], true, rtol=1e-9, atol=1e-13)
    assert matrix.products <= solver.max_products(SIZE) + 1  # one may measure the residual


@settings(max_examples=20, deadline=None)
@given(seed=integers(0, 2**16), steps=integers(1, 14), exponent=floats(-6, 6))
def test_residual_of_any_definite_system(seed: int, steps: int, exponent: float) -> None:
    """Whatever the units, after any number of steps; and a solver keeps what it promised."""
    dense, rhs = random(seed)
    dense = 10**exponent * definite(dense)
    for solver in (
        nestor.ConjugateGradient(max_steps=steps),
        nestor.MINRES(max_steps=steps),
        nestor.GMRES(max_steps=steps, restart=5),
        nestor.NormalConjugateGradient(max_steps=steps),
        nestor.LBFGSInverse(pairs=0, max_steps=steps),
    ):
        matrix = Matrix(dense)
        solution = solver.solve(matrix, rhs)
        true = (flat(rhs) - dense @ flat(solution.value)).norm() / flat(rhs).norm()
        torch.testing.assert_close(solution.stats["residual"], true, rtol=1e-5, atol=1e-9)
        assert matrix.products <= solver.max_products(SIZE) + 1  # one may measure the residual


class Breaking(Matrix):
    """A matrix whose products turn bad after a few."""

    def __init__(self, dense: Tensor, good: int, value: float) -> None:
        super().__init__(dense)
        self.good, self.value = good, value

    def apply(self, vector: list[Tensor]) -> list[Tensor]:
        product = super().apply(vector)
        return [part * self.value for part in product] if self.products > self.good else product

    def apply_transposed(self, vector: list[Tensor]) -> list[Tensor]:
        return self.apply(vector)


@pytest.mark.parametrize("solver", [*ALL, *GIVEN], ids=shorten)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("good", [0, 1, 3])
def test_products_that_are_not_finite_are_errors(
    system: tuple[Tensor, list[Tensor]], solver: nestor.LinearSolver, value: float, good: int
) -> None:
    """At once, in the middle, or in the last product."""
    dense, rhs = system
    with pytest.raises(nestor.SolverError, match=r"finite|diverges"):
        solver.solve(Breaking(dense, good, value), rhs)


@pytest.mark.parametrize("solver", [*ALL, *GIVEN], ids=shorten)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_right_hand_side_that_is_not_finite_is_an_error(
    system: tuple[Tensor, list[Tensor]], solver: nestor.LinearSolver, value: float
) -> None:
    """It says that the upper loss is to blame, not the matrix."""
    dense, rhs = system
    with pytest.raises(nestor.SolverError, match="no finite gradient"):
        solver.solve(Matrix(dense), [rhs[0], rhs[1] * value, rhs[2]])


@pytest.mark.parametrize("solver", [*ALL, *GIVEN], ids=shorten)
def test_single_precision_and_an_empty_variable(solver: nestor.LinearSolver) -> None:
    """float32 stays float32; a variable without elements is carried along."""
    found = solver.solve(Scaled(), [torch.ones(3), torch.ones(0, 2), torch.ones(5)]).value
    assert [part.dtype for part in found] == 3 * [torch.float32]
    assert [part.shape for part in found] == [part.shape for part in Scaled().like]


class Scaled(LinearOperator):
    """Three times the identity, on a space with an empty variable."""

    symmetric = True

    @property
    def like(self) -> list[Tensor]:
        return [torch.zeros(3), torch.zeros(0, 2), torch.zeros(5)]

    def apply(self, vector: list[Tensor]) -> list[Tensor]:
        return [3.0 * part for part in vector]

    def apply_transposed(self, vector: list[Tensor]) -> list[Tensor]:
        return self.apply(vector)


class Batched(Matrix):
    """Counts the calls that multiply many vectors at once."""

    calls = 0

    def apply_many(self, vectors: list[Tensor]) -> list[Tensor]:
        self.calls += 1
        return super().apply_many(vectors)


def test_transposed_operators() -> None:
    """A symmetric one keeps its secants and its batched products; another one must not."""
    dense, rhs = random()
    known = [(rhs, rhs)]
    symmetric, general = Batched(definite(dense), known), Batched(dense, known)
    assert Transposed(symmetric).secants() == known
    assert Transposed(general).secants() == []
    stacked = [torch.stack([part, 2 * part]) for part in rhs]
    for matrix, calls in ((symmetric, 1), (general, 0)):
        product = Transposed(matrix).apply_many(stacked)
        expected = flat([part[1] for part in product])
        torch.testing.assert_close(expected, 2 * matrix.dense.T @ flat(rhs), rtol=1e-12, atol=1e-12)
        assert matrix.calls == calls
    solution = nestor.DenseSolve().solve(Transposed(general), rhs)
    torch.testing.assert_close(flat(solution.value), torch.linalg.solve(dense.T, flat(rhs)), rtol=1e-9, atol=1e-12)


def test_bicgstab_breaks_down_loudly() -> None:
    """A rotation: its recursion divides by zero at once."""
    rotation = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    rotation[torch.arange(0, SIZE, 2), torch.arange(1, SIZE, 2)] = 1.0
    rotation = rotation - rotation.T
    _, rhs = random()
    with pytest.raises(nestor.SolverError, match=r"GMRES\(\)"):
        nestor.BiCGSTAB().solve(Matrix(rotation), split(torch.eye(SIZE).double()[0]))
    solution = nestor.GMRES(rtol=1e-12).solve(Matrix(rotation), rhs)
    torch.testing.assert_close(flat(solution.value), -rotation @ flat(rhs), rtol=1e-10, atol=1e-12)
