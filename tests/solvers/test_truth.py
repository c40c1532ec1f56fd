"""Solvers tell the truth: 200 systems of all kinds, flat directions, and right-hand sides that underflow."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import nestor
from nestor.solvers import LinearOperator

F32, F64 = torch.float32, torch.float64
SYMMETRIC = ["definite", "semidefinite", "indefinite", "singular indefinite"]
KINDS = [*SYMMETRIC, "general", "singular general"]
SIGNED = [nestor.ConjugateGradient, nestor.MINRES]
SOLVERS = [*SIGNED, nestor.GMRES, nestor.BiCGSTAB, nestor.NormalConjugateGradient, nestor.DenseSolve]


class Whole(LinearOperator):
    """A matrix on vectors of one tensor, which counts its products."""

    def __init__(self, dense: Tensor) -> None:
        self.dense, self.products = dense, 0
        self.symmetric = torch.equal(dense, dense.T)

    def apply(self, vector: list[Tensor]) -> list[Tensor]:
        self.products += 1
        return [self.dense @ vector[0]]

    def apply_transposed(self, vector: list[Tensor]) -> list[Tensor]:
        self.products += 1
        return [self.dense.T @ vector[0]]


class System(NamedTuple):
    """A system in double precision, whether it has a solution, and its (least-squares) solution of minimum norm."""

    kind: str
    matrix: Tensor
    rhs: Tensor
    consistent: bool
    shortest: Tensor


@cache
def system(seed: int, dtype: torch.dtype) -> System:
    """Eigenvalues over up to ten orders of magnitude (three in single precision), in units from 1e-8 to 1e4."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=F64)

    kind = KINDS[seed % 6]
    size = int(torch.randint(2, 40, (), generator=generator))
    spread = [1, 3, 6, 10][seed // 6 % 4] / (1 if dtype == F64 else 3)
    values = 10 ** (-spread * uniform(size))
    if "indefinite" in kind:
        values = torch.where(uniform(size) < 0.5, -values, values)
    rank = size
    if kind.startswith(("s", "singular")):
        rank = max(1, size - 1 - int(uniform() * (size // 2)))
        values[rank:] = 0
    left, right = (torch.linalg.qr(normal(size, size))[0] for _ in range(2))
    right = left if kind in SYMMETRIC else right
    unit = 10.0 ** ([0, -8, 4][seed // 24 % 3] / (1 if dtype == F64 else 2))
    matrix = unit * left @ torch.diag(values) @ right.T
    matrix = 0.5 * (matrix + matrix.T) if kind in SYMMETRIC else matrix
    is_consistent = rank == size or bool(uniform() < 0.4)
    rhs = matrix @ normal(size) if bool(uniform() < 0.5) and is_consistent else normal(size)
    rhs = matrix @ rhs if is_consistent and rank < size else rhs
    inverse = torch.where(values == 0, 0.0, 1 / (unit * torch.where(values == 0, 1.0, values)))
    return System(kind, matrix, rhs, is_consistent, right @ (inverse * (left.T @ rhs)))


OPTIONS = [(F64, {}), (F64, {"max_steps": 100, "rtol": 0.0}), (F64, {"max_steps": 7}), (F32, {})]
CASES = [(solver, *given) for solver in SOLVERS for given in OPTIONS if solver is not nestor.DenseSolve or not given[1]]


@pytest.mark.parametrize(("solver", "dtype", "options"), CASES, ids=str)
def test_told_residuals_and_lengths(solver: type[nestor.LinearSolver], dtype: torch.dtype, options: dict) -> None:
    """The told residual is the true one within a factor 2; no solution is long, unless an error says singular."""
    solved = refused = unclear = 0
    eps = torch.finfo(dtype).eps
    for seed in range(200):
        given = system(seed, dtype)
        if given.kind not in SYMMETRIC and solver in SIGNED:
            continue
        matrix, rhs = given.matrix.to(dtype), given.rhs.to(dtype)
        try:
            solution = solver(**options).solve(Whole(matrix), [rhs])
        except nestor.SolverError as error:
            # Only what has no solution, or more than the budget's worth of condition, is refused.
            refused += given.consistent
            unclear += "singular" not in str(error)
            continue
        solved += 1
        x, b, a = solution.value[0].double(), rhs.double(), matrix.double()
        true, told = ((b - a @ x).norm() / b.norm()).item(), solution.stats["residual"].item()
        rounding = 20 * eps * (1 + (a.norm() * x.norm() / b.norm()).item())
        assert told <= 2 * true + rounding, (seed, given.kind, told, true)
        assert true <= 2 * told + rounding, (seed, given.kind, told, true)
        assert x.norm() <= 1e3 * given.shortest.norm(), (seed, given.kind)
    assert solved >= 60
    assert not unclear
    # Systems that have a solution are refused by methods that break down, and where rounding hides the solution.
    assert refused <= (30 if solver is nestor.BiCGSTAB else 6)


@pytest.mark.parametrize("solver", [nestor.ConjugateGradient(max_steps=200), *(s() for s in SOLVERS[1:])], ids=str)
def test_singular_systems(solver: nestor.LinearSolver) -> None:
    """In the range: the solution of minimum norm. Outside of it: an error that says singular, or least squares."""
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=F64))[0]
    dense = basis @ torch.diag(torch.cat([torch.zeros(4), torch.linspace(1, 3, 8)]).double()) @ basis.T
    dense = 0.5 * (dense + dense.T)
    vector = torch.randn(12, generator=generator, dtype=F64)
    inverse = torch.linalg.pinv(dense, rtol=1e-10, hermitian=True)
    found = solver.solve(Whole(dense), [dense @ vector]).value[0]
    torch.testing.assert_close(found, inverse @ dense @ vector, rtol=1e-5, atol=1e-5)
    if isinstance(solver, nestor.NormalConjugateGradient):
        found = solver.solve(Whole(dense), [vector]).value[0]
        torch.testing.assert_close(found, inverse @ vector, rtol=1e-8, atol=1e-8)
    elif isinstance(solver, nestor.BiCGSTAB):
        found = solver.solve(Whole(dense), [vector])
        assert bool(found.stats["truncated"])
        assert found.value[0].norm() <= 1e3 * (inverse @ vector).norm()
    else:
        with pytest.raises(nestor.SingularError, match=r"singular.*not in its range"):
            solver.solve(Whole(dense), [vector])


def test_zeros_never_explode() -> None:
    """The matrix diag(0, 1, 2), at every number of steps: 1e146 before curvatures were compared with the largest."""
    dense, ones = torch.diag(torch.tensor([0.0, 1, 2])).double(), [torch.ones(3).double()]
    for dtype in (F64, F32):
        for steps in range(1, 20):
            try:
                found = nestor.ConjugateGradient(max_steps=steps).solve(Whole(dense.to(dtype)), [ones[0].to(dtype)])
            except nestor.SingularError:
                assert steps >= 3  # two steps see no third eigenvalue
                continue
            true = (ones[0] - dense @ found.value[0].double()).norm() / 3**0.5
            torch.testing.assert_close(found.stats["residual"].double(), true, rtol=1e-5, atol=0)
            assert found.value[0].norm() <= 10


def test_a_zero_matrix_and_a_zero_right_hand_side() -> None:
    """The one has no solution, the other has zero, whatever the matrix."""
    zero = torch.zeros(3, 3).double()
    for solver in (s() for s in SOLVERS):
        assert not solver.solve(Whole(zero), [torch.zeros(3).double()]).value[0].any()
        if solver == nestor.NormalConjugateGradient():
            assert not solver.solve(Whole(zero), [torch.ones(3).double()]).value[0].any()
        else:
            with pytest.raises(nestor.SolverError, match="singular"):
                solver.solve(Whole(zero), [torch.ones(3).double()])


@pytest.mark.parametrize(("dtype", "size"), [(F32, 1e-20), (F32, 1e-37), (F32, 1e25), (F64, 1e-200), (F64, 1e-300)])
@pytest.mark.parametrize(
    "solver",
    [*(s() for s in SOLVERS), nestor.Neumann(num_terms=400), nestor.LBFGSInverse(pairs=0, max_steps=20)],
    ids=lambda value: type(value).__name__,
)
def test_right_hand_sides_whose_squares_underflow(solver: nestor.LinearSolver, dtype: torch.dtype, size: float) -> None:
    """The solution is that of a right-hand side of size 1, times the size; the residual is the same."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(5, 5, generator=generator, dtype=F64)
    dense = 0.2 * dense @ dense.T + torch.eye(5).double()
    dense = (0.5 * (dense + dense.T)).to(dtype)
    rhs = torch.randn(5, generator=generator, dtype=F64).to(dtype)
    small = solver.solve(Whole(dense), [(size * rhs.double()).to(dtype)])
    expected = torch.linalg.solve(dense.double(), rhs.double())
    torch.testing.assert_close(small.value[0].double() / size, expected, rtol=1e-4, atol=1e-4)
    assert small.stats["residual"] <= 1e-5


def test_products_that_measure_are_rare_and_counted() -> None:
    """A well-conditioned solve that stops at its tolerance or its budget takes no product more."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(30, 30, generator=generator, dtype=F64)
    dense = dense @ dense.T / 30 + torch.eye(30).double()
    dense, rhs = 0.5 * (dense + dense.T), [torch.randn(30, generator=generator, dtype=F64)]
    for solver in SOLVERS[:4]:
        for options in ({"max_steps": 5}, {"rtol": 1e-8, "max_steps": 60}):
            matrix = Whole(dense)
            steps = int(solver(**options).solve(matrix, rhs).stats["iterations"])
            assert matrix.products in ((2 * steps - 1, 2 * steps) if solver is nestor.BiCGSTAB else (steps,))
    matrix = Whole(dense)
    exact = nestor.ConjugateGradient(max_steps=100, rtol=0.0).solve(matrix, rhs)
    assert matrix.products == int(exact.stats["iterations"]) + 1 < 100
