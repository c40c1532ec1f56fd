"""What one solve leaves for the next: solutions, columns, aimed pairs."""

from __future__ import annotations

import pytest
import torch
from conftest import SIZE, Matrix, flat, split
from torch import Tensor

import nestor
from nestor.solvers import Solution, SolveState
from nestor.vectors.space import LOCAL

EXACT = [
    nestor.ConjugateGradient(max_steps=80, rtol=1e-4),
    nestor.MINRES(max_steps=80, rtol=1e-4),
    nestor.GMRES(max_steps=80, rtol=1e-4),
    nestor.BiCGSTAB(max_steps=80, rtol=1e-4),
    nestor.NormalConjugateGradient(max_steps=400, rtol=1e-4),
    nestor.LBFGSInverse(pairs=0, max_steps=80, rtol=1e-4),
]


@pytest.mark.parametrize("solver", EXACT, ids=lambda value: type(value).__name__)
def test_a_correction_takes_fewer_iterations(system: tuple[Tensor, list[Tensor]], solver: nestor.LinearSolver) -> None:
    """A system that has moved a little, from the old solution: the tolerance refers to the whole of it.

    A loose tolerance, since any solve of twelve variables is exact after twelve iterations.
    """
    dense, rhs = system
    start = torch.linalg.solve(dense, flat(rhs))
    moved = dense + 3e-2 * torch.diag(torch.linspace(0, 1, SIZE, dtype=torch.float64))
    rest = flat(rhs) - moved @ start
    cold = solver.solve(Matrix(moved), rhs)
    warm = solver.solve(Matrix(moved), split(rest), reference=flat(rhs).norm())
    assert 0 < warm.stats["iterations"] < cold.stats["iterations"]
    residual = (flat(rhs) - moved @ (start + flat(warm.value))).norm()
    assert residual <= 1e-4 * flat(rhs).norm()
    torch.testing.assert_close(warm.stats["residual"] * rest.norm(), residual, rtol=1e-3, atol=1e-13)
    done = solver.solve(Matrix(moved), split(1e-4 * rest), reference=flat(rhs).norm())
    assert done.stats["iterations"] == 0
    assert flat(done.value).norm() == 0


def test_state_forgets_what_is_not_a_start() -> None:
    """Values that are not finite or were truncated; the memory of a truncated solve is as good as any."""
    value, memory = [torch.ones(2)], [torch.zeros(3)]
    state = SolveState()
    state.update(LOCAL, Solution(value, {}, memory), keep_value=True)
    assert (state.value, state.memory) == (value, memory)
    state.update(LOCAL, Solution(value, {"truncated": torch.tensor(False)}, memory), keep_value=True)
    assert state.value is value
    state.update(LOCAL, Solution(value, {"truncated": torch.tensor(True)}, memory), keep_value=True)
    assert (state.value, state.memory) == ([], memory)
    state.update(LOCAL, Solution([torch.tensor([1.0, torch.nan])], {}, memory), keep_value=True)
    assert (state.value, state.memory) == ([], [])


def test_truncated_solves_do_not_add_up() -> None:
    """An indefinite matrix, a hundred warm starts: corrections of truncated solutions would grow by e every three."""
    dense = torch.diag(torch.tensor([4.0, 3.0, 2.0, -1.0] + [1.0] * 8, dtype=torch.float64))
    rhs = torch.tensor([1.0, 1, 1, 0.1] + [0.5] * 8, dtype=torch.float64)
    solver, state = nestor.ConjugateGradient(max_steps=5), SolveState()
    cold = flat(solver.solve(Matrix(dense), split(rhs)).value).norm()
    for _ in range(100):
        start = flat(state.value) if state.value else torch.zeros_like(rhs)
        found = solver.solve(Matrix(dense), split(rhs - dense @ start), reference=rhs.norm())
        value = start + flat(found.value)
        state.update(LOCAL, Solution(split(value), found.stats), keep_value=True)
        assert value.norm() <= 3 * cold


def test_nystrom_draws_by_its_seed(system: tuple[Tensor, list[Tensor]]) -> None:
    """The same columns from the same seed, others from another; global generators are left alone."""
    dense, rhs = system
    before = torch.get_rng_state()
    values = [flat(nestor.Nystrom(rank=3, seed=seed).solve(Matrix(dense), rhs).value) for seed in (0, 0, 1)]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_nystrom_reuses_columns_for_another_right_hand_side(system: tuple[Tensor, list[Tensor]]) -> None:
    """The memory is the inverse of the old matrix, whatever it is multiplied onto."""
    dense, rhs = system
    solver = nestor.Nystrom(rank=SIZE, rho=1e-9, refresh=2)
    memory = solver.solve(Matrix(dense), rhs).memory
    other = split(torch.linspace(-1, 1, SIZE, dtype=torch.float64))
    matrix = Matrix(2 * dense)
    solution = solver.solve(matrix, other, memory=memory)
    assert matrix.products == 0
    assert solution.stats["iterations"] == 0
    expected = torch.linalg.solve(dense, flat(other))
    assert (flat(solution.value) - expected).norm() <= 1e-7 * expected.norm()
    again = solver.solve(matrix, other, memory=solution.memory)
    assert matrix.products == SIZE
    assert (flat(again.value) - expected / 2).norm() <= 1e-7 * expected.norm()


def test_aimed_pairs_are_kept(system: tuple[Tensor, list[Tensor]]) -> None:
    """The pairs of the last system make the next one, which has moved a little, cheaper."""
    dense, rhs = system
    keeping = nestor.LBFGSInverse(pairs=0, max_steps=60, keep=20, rtol=1e-8)
    first = keeping.solve(Matrix(dense), rhs)
    assert len(first.memory) == 2 * len(rhs) * int(first.stats["iterations"])
    moved = Matrix(dense + 1e-3 * torch.eye(SIZE, dtype=torch.float64))
    # Another right-hand side: it is the inverse that is kept, not the solution.
    other = split(torch.linspace(-1, 1, SIZE, dtype=torch.float64))
    cold, warm = keeping.solve(moved, other), keeping.solve(moved, other, memory=first.memory)
    assert warm.stats["iterations"] < 0.6 * cold.stats["iterations"]
    expected = torch.linalg.solve(moved.dense, flat(other))
    assert (flat(warm.value) - expected).norm() <= 1e-6 * expected.norm()
    few = nestor.LBFGSInverse(pairs=0, max_steps=60, keep=2).solve(Matrix(dense), rhs, memory=first.memory)
    assert len(few.memory) == 2 * 2 * len(rhs)
    assert nestor.LBFGSInverse(pairs=0, max_steps=3).solve(Matrix(dense), rhs).memory == []


@pytest.mark.parametrize(
    "solver",
    [nestor.Nystrom(rank=3, refresh=2), nestor.LBFGSInverse(pairs=0, max_steps=3, keep=2)],
    ids=lambda value: type(value).__name__,
)
def test_a_foreign_memory_is_refused(system: tuple[Tensor, list[Tensor]], solver: nestor.LinearSolver) -> None:
    """Of another level, rank or solver: an error with a remedy, not a guess."""
    dense, rhs = system
    for memory in ([torch.zeros(3)], [torch.zeros(4, 3), torch.zeros(3), torch.tensor(1), torch.tensor(1)]):
        with pytest.raises(nestor.SolverError, match=r"memory=\(\)"):
            solver.solve(Matrix(dense), rhs, memory=memory)


def test_solvers_keep_no_state(system: tuple[Tensor, list[Tensor]]) -> None:
    """The same call twice gives the same numbers: nothing is remembered but in the memory."""
    dense, rhs = system
    for solver in [*EXACT, nestor.Nystrom(rank=3, refresh=5), nestor.LBFGSInverse(pairs=0, max_steps=3, keep=2)]:
        one, two = solver.solve(Matrix(dense), rhs), solver.solve(Matrix(dense), rhs)
        # Up to the alignment that BLAS finds.
        torch.testing.assert_close(flat(one.value), flat(two.value), rtol=1e-9, atol=1e-12)
        assert not any(part.requires_grad for part in [*one.value, *one.memory])
        hash(solver)
