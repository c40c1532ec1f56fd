"""The problems of BOLIB: their optima by grid search, and the page is that of the JSON file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import bolib
from benchmarks.bolib import PROBLEMS, Box, Outcome, Problem

ROOT = Path(__file__).parents[2]
# Points of the grid in a variable, by the dimensions of both levels.
COUNTS = {(1, 1): (801, 2001), (2, 2): (33, 33), (1, 2): (301, 201)}
# Lower values that differ by less are equal: all their points are lower minima.
EQUAL = 1e-6


def grid_search(problem: Problem) -> tuple[float, float]:
    """Return F and f at the best pair of a grid: over x, the best of all y whose lower value is least."""
    x_count, y_count = COUNTS[problem.x.dim, problem.y.dim]
    x, y = problem.x.grid(x_count), problem.y.grid(y_count)
    best = (float("inf"), float("nan"))
    for rows in x.split(max(1, 2_000_000 // len(y))):
        shape = (len(rows), len(y), -1)
        pairs = rows[:, None].expand(*shape), y[None].expand(*shape)
        lower = problem.lower(*pairs)
        least = lower.min(1, keepdim=True).values
        upper = torch.where(lower <= least + EQUAL, problem.upper(*pairs), torch.inf)
        place = int(upper.argmin())
        if float(upper.flatten()[place]) < best[0]:
            best = float(upper.flatten()[place]), float(lower.flatten()[place])
    return best


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.y.dim <= 2], ids=lambda p: p.name)
def test_optimum_by_grid_search(problem: Problem) -> None:
    """F within one percent; f at the listed point is the least one there."""
    upper, _ = grid_search(problem)
    assert upper == pytest.approx(problem.best[0], rel=0.01, abs=0.01)
    if problem.listed is not None:  # the library's table has another value, which is not the optimum
        assert abs(upper - problem.listed) > 0.01


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_values_at_the_optimum(problem: Problem) -> None:
    """The point lies in the boxes and has the listed values, and no y of a grid is lower."""
    at = torch.tensor(problem.at, dtype=torch.float64)
    x, y = at[: problem.x.dim], at[problem.x.dim :]
    assert float(problem.upper(x, y)) == pytest.approx(problem.best[0], rel=0.01, abs=0.005)
    assert float(problem.lower(x, y)) == pytest.approx(problem.best[1], rel=0.01, abs=0.005)
    for box, point in ((problem.x, x), (problem.y, y)):
        assert box.kind == "free" or bool((point >= box.low).all())
        assert box.kind != "interval" or bool((point <= box.high).all())
    if problem.y.dim <= 2:
        assert float(problem.lower(x, y)) <= bolib.least_lower(problem, x) + 2e-3 * max(1, abs(problem.best[1]))


@pytest.mark.parametrize("name", ["SinhaMaloDeb2014TP9", "SinhaMaloDeb2014TP10"])
def test_optimum_of_ten_variables(name: str) -> None:
    """F is never negative and zero at the point, whose y is a lower minimum: Griewank's function is never negative."""
    problem = next(p for p in PROBLEMS if p.name == name)
    x = torch.ones(10, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    y = torch.pi * (2 * torch.rand(100_000, 10, generator=generator, dtype=torch.float64) - 1)
    assert float(problem.lower(x.expand(len(y), -1), y).min()) >= 1.0
    assert float(problem.lower(x, 0 * x)) == 1.0
    assert float(problem.upper(x, 0 * x)) == 0.0


def test_at_least_twenty_problems_with_names_of_their_own() -> None:
    assert len({problem.name for problem in PROBLEMS}) == len(PROBLEMS) >= 20


@pytest.mark.parametrize("kind", ["interval", "above", "free"])
def test_starts_lie_in_the_box(kind: str) -> None:
    """Any start, and for a bounded box any s."""
    box = Box(2.0, 5.0, kind, 3)
    points = torch.stack([box(box.start(torch.Generator().manual_seed(seed))) for seed in range(50)])
    assert bool(((points >= 2) & (points <= 5)).all())
    if kind != "free":
        assert bool((box(torch.linspace(-9, 9, 100)) >= 2).all())


def test_best_response_at_a_bound_has_no_derivative() -> None:
    """Where y is held by its bound, the hypergradient is the partial derivative of F."""
    problem = Problem(
        "bound",
        bolib.scalar(lambda x, y: x**2 + x * y),
        bolib.scalar(lambda x, y: (y - 3 - x) ** 2),
        Box(-1.0, 1.0, "free"),
        Box(0.0, 1.0),
        (0.0, 0.0),
        (0.0, 0.0),
        "bound",
    )
    for method, make in bolib.METHODS.items():
        program = bolib.make_program(problem, make(0.1), 0, 0.1)
        with torch.no_grad():
            program.levels["lower"].parameters[0].fill_(torch.pi / 2)  # y = 1
        (gradient,) = program.hypergradient("upper").values()
        x = program.levels["upper"].parameters[0].detach()
        assert gradient == pytest.approx(2 * x + 1, abs=1e-6), method


@pytest.mark.filterwarnings("ignore::nestor.NestorWarning")
@pytest.mark.parametrize("method", ["ConjugateGradient", "DenseSolve"])
def test_a_smooth_problem_is_solved(method: str) -> None:
    problem = next(p for p in PROBLEMS if p.name == "HendersonQuandt1958")
    outcome = bolib.solve(problem, method, 0, bolib.lower_rate(problem))
    assert outcome.verdict(problem) == "found"
    assert outcome.evaluations > 0


def test_verdicts() -> None:
    """Found, at a lower minimum that is only local, elsewhere, and ended by an error."""
    problem = PROBLEMS[0]
    upper, lower = problem.best
    assert Outcome(upper, lower, 0.0, 1, 0.1).verdict(problem) == "found"
    assert Outcome(upper, lower, 0.5, 1, 0.1).verdict(problem) == "local"
    assert Outcome(upper + 1, lower, 0.0, 1, 0.1).verdict(problem) == "elsewhere"
    assert Outcome(upper, lower, float("nan"), 1, 0.1).verdict(problem) == "local"
    assert Outcome(upper, lower, 0.0, 1, 0.1, "SolverError").verdict(problem) == "error"


def test_page_is_that_of_the_json_file() -> None:
    """The page of docs is what the program writes from the JSON file beside it."""
    results = bolib.Results(ROOT / "docs" / "bolib.json")
    assert (ROOT / "docs" / "bolib.md").read_text(encoding="utf-8") == bolib.page(results)
    assert {len(runs) for runs in results.runs.values()} == {bolib.STARTS}
