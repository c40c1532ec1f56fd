"""Solvers that depend on the eigenvalues: step sizes, low-rank inverses, secants."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import SIZE, Matrix, definite, flat, random, split
from hypothesis import given, settings
from hypothesis.strategies import floats, integers
from torch import Tensor

import nestor
from nestor.solvers import LinearOperator


class Spectrum(LinearOperator):
    """A large diagonal matrix."""

    symmetric = True

    def __init__(self, eigenvalues: Tensor) -> None:
        self.eigenvalues = eigenvalues

    @property
    def like(self) -> list[Tensor]:
        return [torch.zeros_like(self.eigenvalues)]

    def apply(self, vector: list[Tensor]) -> list[Tensor]:
        return [self.eigenvalues * vector[0]]

    def apply_transposed(self, vector: list[Tensor]) -> list[Tensor]:
        return self.apply(vector)


@settings(max_examples=40, deadline=None)
@given(top=floats(1.0, 1e3), scale=floats(-6, 6), power_steps=integers(5, 12))
def test_estimated_step_size_converges(top: float, scale: float, power_steps: int) -> None:
    """One eigenvalue above a bulk of 20,000: below 2 / lambda_max, and not needlessly small.

    The estimate is at most sqrt(2) times the eigenvalue. |A v| alone would fail: after five steps and with top = 2.3
    its inverse is 2.09 / lambda_max, that of the estimate 1.76 / lambda_max.
    """
    eigenvalues = torch.ones(20_000, dtype=torch.float64)
    eigenvalues[0] = top
    solver = nestor.Neumann(num_terms=1, step_size=None, power_steps=power_steps)
    unit = torch.ones_like(eigenvalues)
    step_size = solver.solve(Spectrum(10**scale * eigenvalues), [unit]).value[0][0]
    assert 0.999 / 2**0.5 <= step_size * 10**scale * top <= 1.8


def test_estimated_step_size_of_a_small_spike() -> None:
    """The spectrum at which |A v| alone diverges."""
    eigenvalues = torch.ones(20_000, dtype=torch.float64)
    eigenvalues[0] = 2.3
    solver = nestor.Neumann(num_terms=200, step_size=None, power_steps=5)
    solution = solver.solve(Spectrum(eigenvalues), [torch.ones_like(eigenvalues)])
    torch.testing.assert_close(solution.value[0], 1 / eigenvalues, rtol=1e-9, atol=0)


def test_neumann_of_matrices_that_are_not_symmetric() -> None:
    """Eigenvalues in a disk of the right half-plane converge; a rotation does not, and says so."""
    dense, rhs = random()
    general = dense + 8 * torch.eye(SIZE, dtype=torch.float64)
    found = nestor.Neumann(num_terms=400, step_size=None).solve(Matrix(general), rhs)
    expected = torch.linalg.solve(general, flat(rhs))
    assert (flat(found.value) - expected).norm() <= 1e-8 * expected.norm()
    rotation = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    rotation[torch.arange(0, SIZE, 2), torch.arange(1, SIZE, 2)] = 1.0
    with pytest.raises(nestor.SolverError, match="diverges"):
        nestor.Neumann(num_terms=60, step_size=None).solve(Matrix(rotation - rotation.T), rhs)


def test_neumann_counts_its_power_iteration() -> None:
    """In explain(), and in the matrix."""
    dense, rhs = random()
    for power_steps in (1, 5):
        solver = nestor.Neumann(num_terms=1, step_size=None, power_steps=power_steps)
        matrix = Matrix(definite(dense))
        solver.solve(matrix, rhs)
        assert matrix.products == solver.max_products(SIZE) == power_steps


@settings(max_examples=20, deadline=None)
@given(seed=integers(0, 2**16), scale=floats(-6, 6))
def test_nystrom_of_full_rank_is_the_damped_inverse(seed: int, scale: float) -> None:
    """(A + rho I)^-1, whatever the units and the order in which the columns are drawn."""
    dense, rhs = random(seed)
    dense = 10**scale * definite(dense)
    rho = 0.1 * 10**scale
    found = nestor.Nystrom(rank=SIZE, rho=rho, seed=seed).solve(Matrix(dense), rhs)
    expected = torch.linalg.solve(dense + rho * torch.eye(SIZE, dtype=torch.float64), flat(rhs))
    assert (flat(found.value) - expected).norm() <= 1e-8 * expected.norm()


def test_nystrom_of_a_decaying_spectrum() -> None:
    """More columns, a smaller error: far below that of the scaled identity once they are many."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))
    dense = basis @ torch.diag(10.0 ** -torch.arange(SIZE, dtype=torch.float64)) @ basis.T
    dense = 0.5 * (dense + dense.T)
    damped = dense + 1e-2 * torch.eye(SIZE, dtype=torch.float64)
    rhs = split(basis.sum(dim=1))
    expected = torch.linalg.solve(damped, flat(rhs))
    errors = []
    for rank in (1, 3, 5, 7):
        solution = nestor.Nystrom(rank=rank, rho=1e-2).solve(Matrix(dense), rhs)
        errors.append(((flat(solution.value) - expected).norm() / expected.norm()).item())
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[2] < 1e-2
    assert errors[3] < 1e-4


def test_nystrom_in_single_precision() -> None:
    """Columns that are almost dependent do not blow up."""
    basis, _ = torch.linalg.qr(random(5)[0])
    dense = (basis @ torch.diag(10.0 ** -torch.arange(SIZE, dtype=torch.float64)) @ basis.T).float()
    dense = 0.5 * (dense + dense.T)
    rhs = split(torch.ones(SIZE))
    solution = nestor.Nystrom(rank=SIZE, rho=1e-3).solve(Matrix(dense), rhs)
    expected = torch.linalg.solve(dense + 1e-3 * torch.eye(SIZE), torch.ones(SIZE))
    assert (flat(solution.value) - expected).norm() <= 1e-2 * expected.norm()


def test_secants_whose_aimed_direction_curves_down() -> None:
    """A saddle that the run has not seen: what the known pairs give, its true residual, and a word of it."""
    dense, rhs = random()
    dense = definite(dense)
    known = [(rhs, split(dense @ flat(rhs)))]
    aimed, free = nestor.LBFGSInverse(max_steps=3), nestor.LBFGSInverse()
    solution = aimed.solve(Matrix(-dense, known), rhs)
    assert torch.equal(flat(solution.value), flat(free.solve(Matrix(-dense, known), rhs).value))
    assert flat(solution.value).norm() > 0
    residual = (flat(rhs) + dense @ flat(solution.value)).norm() / flat(rhs).norm()
    torch.testing.assert_close(solution.stats["residual"], residual)
    assert bool(solution.stats["truncated"])
    assert not bool(aimed.solve(Matrix(dense, known), rhs).stats["truncated"])
    blind = aimed.solve(Matrix(-dense), rhs)
    assert bool(blind.stats["truncated"])
    length, image = flat(rhs).norm(), (dense @ flat(rhs)).norm()
    torch.testing.assert_close(flat(blind.value), flat(rhs) * min(1.0, (29 * length / image).item()))


@pytest.mark.parametrize(("dtype", "cosine", "used"), [(torch.float32, 1e-7, False), (torch.float64, 1e-7, True)])
def test_secants_below_rounding_are_skipped(dtype: torch.dtype, cosine: float, used: bool) -> None:
    """The sign of s^T y is noise in single precision and information in double precision."""
    s, y = torch.zeros(SIZE, dtype=dtype), torch.zeros(SIZE, dtype=dtype)
    s[0], y[0], y[1] = 1.0, cosine, 1.0
    matrix = Matrix(torch.eye(SIZE, dtype=dtype), [(split(s), split(y))])
    if used:
        nestor.LBFGSInverse().solve(matrix, split(s))
    else:
        with pytest.raises(nestor.SolverError, match="no secant pair"):
            nestor.LBFGSInverse().solve(matrix, split(s))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pairs": 0}, "nothing to work with"),
        ({"pairs": -1, "max_steps": 3}, "pairs=-1"),
        ({"rtol": float("inf")}, "rtol=inf"),
        ({"keep": 2}, "keep=2"),
    ],
)
def test_lbfgs_options_are_checked(options: dict[str, float], words: str) -> None:
    """ValueError at construction, with the value."""
    with pytest.raises(ValueError, match=words):
        nestor.LBFGSInverse(**options)


@pytest.mark.parametrize("seed", range(40))
def test_an_indefinite_matrix_that_is_regular_is_truncated(seed: int) -> None:
    """Never called singular, also where the first curvature is slightly positive and no iterate is better than none."""
    torch.manual_seed(seed)
    n = 2 + seed % 4
    a = torch.randn(n, dtype=torch.float64) * 10 ** (2 * torch.randn(n, dtype=torch.float64))
    c = torch.randn(n, dtype=torch.float64)
    if seed == 0:
        a, c = torch.tensor([-0.43, 0.0036]).double(), torch.tensor([-0.0028, -0.0345]).double()
    x = torch.ones(len(a), dtype=torch.float64, requires_grad=True)
    solver = nestor.ConjugateGradient(max_steps=20, rtol=1e-8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = nestor.best_response(
            lambda t, x: (a * t**2).sum() / 2 - (x * t).sum(), x.detach() / a, x, nestor.Implicit(solver=solver)
        )
        (found,) = torch.autograd.grad((c * y).sum(), x)
    assert found.norm() > 0
    if (found - c / a).norm() > 1e-6 * (c / a).norm():
        assert any("curvature" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("seed", range(20))
def test_few_steps_on_a_badly_conditioned_matrix_are_truncated(seed: int) -> None:
    """Residuals grow at first, though the matrix is definite: it is not called singular, and the direction descends."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.cat([torch.logspace(-3, -2, 30), torch.logspace(3, 5, 10)]).double()
    weights = torch.cat([torch.ones(30), 1e-4 * torch.ones(10)]).double()  # hardly anything where the curvature is high
    rhs = weights * torch.randn(40, generator=generator, dtype=torch.float64)
    solution = nestor.ConjugateGradient(max_steps=1 + seed % 3).solve(Spectrum(values), [rhs])
    assert bool(solution.stats["truncated"]) or float(solution.stats["residual"]) < 30
    assert float(solution.value[0] @ rhs) > 0
    assert solution.value[0].norm() <= rhs.norm() / values[0]
