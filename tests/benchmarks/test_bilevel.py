"""The public benchmark: estimators tend to the closed form, counts are right, the page is that of the JSON file."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import nestor
from benchmarks.bilevel import __main__ as command
from benchmarks.bilevel import by_nestor, published, report
from benchmarks.bilevel.problems import Quadratics
from benchmarks.bilevel.study import METHODS, STUDIES, Results, key_of, marks, quality, run

ROOT = Path(__file__).parents[2]
SMALL = {"num_inner": 64, "num_outer": 64, "dims": (4, 3)}


@pytest.fixture(scope="module")
def problem() -> Quadratics:
    return Quadratics(**SMALL)


@pytest.fixture(scope="module")
def lam() -> Tensor:
    return torch.tensor([0.3, -1.2, 0.7], dtype=torch.float64)


def by_response(problem: Quadratics, lam: Tensor, response: nestor.Response, **options) -> Tensor:
    """Return nestor's hypergradient on all samples at the exact inner solution."""
    every = torch.arange(problem.num_inner)
    upper = lam.clone().requires_grad_()
    theta = nestor.best_response(
        lambda t, outer: problem.inner(t, outer, every), problem.solve_inner(lam), upper, response, **options
    )
    (gradient,) = torch.autograd.grad(problem.outer(theta, upper, torch.arange(problem.num_outer)), upper)
    return gradient


def identity_direction(problem: Quadratics, lam: Tensor, scale: float) -> Tensor:
    """Return the closed form with a scaled identity in the place of the inverse Hessian."""
    in_theta, in_lam = problem.direct_gradients(problem.solve_inner(lam), lam)
    return in_lam - scale * problem.inner_samples.matrices[2] @ in_theta


def test_closed_form_is_the_gradient_of_the_value_function(problem: Quadratics, lam: Tensor) -> None:
    """Central differences of the value, and zero at the minimiser."""
    step = 1e-5
    differences = torch.stack(
        [
            (problem.value(lam + step * e) - problem.value(lam - step * e)) / (2 * step) * e
            for e in torch.eye(3).double()
        ]
    ).sum(0)
    torch.testing.assert_close(problem.hypergradient(lam), differences, rtol=1e-7, atol=1e-8)
    assert problem.measure(lam, problem.minimiser()) < 1e-24
    assert problem.value(lam) > problem.value(problem.minimiser())


def test_conditioning_is_that_of_the_public_benchmark() -> None:
    """Eigenvalues of the mean Hessians lie near [0.1, 1], in lam there is a zero; mixed derivatives are at most 0.1."""
    inner = Quadratics().inner_samples
    in_theta, in_lam, mixed, *_ = inner.matrices
    values = torch.linalg.eigvalsh(in_theta)
    assert 0.07 < values[0] < 0.13
    assert 0.8 < values[-1] < 1.2
    assert torch.linalg.eigvalsh(in_lam)[0].abs() < 1e-12
    assert torch.linalg.svdvals(mixed)[0] < 0.3


def test_bias_of_an_inverse(problem: Quadratics) -> None:
    """None with the inverse Hessian, more with the identity."""
    hessian = problem.inner_samples.matrices[0]
    assert problem.bias(torch.linalg.inv(hessian)) < 1e-20
    assert problem.bias(torch.eye(4, dtype=torch.float64)) > 1e-6


EXACT: dict[str, Callable[[float], nestor.Response]] = {
    "ConjugateGradient": lambda rate: nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=50, rtol=1e-13)),
    "Neumann": lambda rate: nestor.Implicit(solver=nestor.Neumann(num_terms=600, step_size=rate)),
    "DenseSolve": lambda rate: nestor.Implicit(solver=nestor.DenseSolve()),
    "MINRES": lambda rate: nestor.Implicit(solver=nestor.MINRES(rtol=1e-13)),
}


@pytest.mark.parametrize("name", EXACT)
def test_implicit_responses_are_the_closed_form(problem: Quadratics, lam: Tensor, name: str) -> None:
    found = by_response(problem, lam, EXACT[name](0.5))
    torch.testing.assert_close(found, problem.hypergradient(lam), rtol=1e-9, atol=1e-10)


def test_unrolled_steps_tend_to_the_closed_form(problem: Quadratics, lam: Tensor) -> None:
    """The error of k steps is that of the truncated Neumann series, and vanishes."""
    errors = []
    for steps in (10, 50, 500):
        optimizer = torch.optim.SGD([problem.solve_inner(lam).requires_grad_()], lr=0.5)
        found = by_response(problem, lam, nestor.Unrolled(steps=steps), optimizer=optimizer)
        errors.append(float((found - problem.hypergradient(lam)).norm()))
    series = by_response(problem, lam, nestor.Implicit(solver=nestor.Neumann(num_terms=10, step_size=0.5)))
    assert errors[0] == pytest.approx(float((series - problem.hypergradient(lam)).norm()), rel=1e-8)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5


@pytest.mark.parametrize(
    ("response", "scale", "rtol"),
    [
        (nestor.T1T2(), 1.0, 1e-10),
        (nestor.T1T2(scale=0.3), 0.3, 1e-10),
        (nestor.FiniteDifference(), 1.0, 1e-8),
        (nestor.SAMA(), 0.5, 1e-8),
    ],
    ids=["T1T2", "T1T2 scaled", "FiniteDifference", "SAMA"],
)
def test_identity_responses_are_the_closed_form_with_the_identity(
    problem: Quadratics, lam: Tensor, response: nestor.Response, scale: float, rtol: float
) -> None:
    """SAMA with SGD: the identity, scaled by the learning rate."""
    optimizer = torch.optim.SGD([problem.solve_inner(lam).requires_grad_()], lr=0.5)
    found = by_response(problem, lam, response, optimizer=optimizer)
    torch.testing.assert_close(found, identity_direction(problem, lam, scale), rtol=rtol, atol=1e-9)


class Deterministic:
    """Turns a published method into its deterministic limit: every batch holds all samples."""

    def draw(self, count: int) -> Tensor:
        return torch.arange(count)


def settled(name: str, problem: Quadratics, lam: Tensor, updates: int, **options) -> Tensor:
    """Return the hypergradient of a method after updates that leave ``lam`` where it is."""
    kind = published.METHODS[name]
    solver = type(name, (Deterministic, kind), {})(problem, 0.5, 0.0, 0, batch=problem.num_inner, **options)
    solver.theta, solver.lam = problem.solve_inner(lam), lam
    for _ in range(updates):
        solver.update()
    solver.outer_step = 1.0
    before = solver.lam
    solver.update()
    return before - solver.lam


@pytest.mark.parametrize(
    ("name", "updates", "tolerance"), [("SOBA", 700, 1e-9), ("SABA", 700, 1e-9), ("AmIGO", 70, 1e-9)]
)
def test_published_estimators_tend_to_the_closed_form(
    problem: Quadratics, lam: Tensor, name: str, updates: int, tolerance: float
) -> None:
    found = settled(name, problem, lam, updates)
    torch.testing.assert_close(found, problem.hypergradient(lam), rtol=tolerance, atol=tolerance)


def test_stocbio_is_the_truncated_series(problem: Quadratics, lam: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten terms are nestor's Neumann series of ten terms; many terms are the closed form."""
    series = by_response(problem, lam, nestor.Implicit(solver=nestor.Neumann(num_terms=10, step_size=0.5)))
    torch.testing.assert_close(settled("stocBiO", problem, lam, 0), series, rtol=1e-8, atol=1e-9)
    monkeypatch.setattr(published, "TERMS", 600)
    torch.testing.assert_close(settled("stocBiO", problem, lam, 0), problem.hypergradient(lam), rtol=1e-6, atol=1e-7)


def test_f2sa_tends_to_the_closed_form_like_one_over_the_multiplier(problem: Quadratics, lam: Tensor) -> None:
    errors = []
    for multiplier in (1e2, 1e3, 1e4):
        found = settled("F2SA", problem, lam, 80, multiplier=multiplier, growth=0.0)
        errors.append(float((found - problem.hypergradient(lam)).norm()))
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.2)
    assert errors[2] < 1e-2


def test_nestor_f2sa_tends_to_the_closed_form(problem: Quadratics, lam: Tensor) -> None:
    """The hypergradient of the reformulated program, both copies at their minima."""
    errors = []
    for multiplier in (1e2, 1e3):
        recipe = by_nestor.Recipe(None, reformulation=nestor.F2SA(multiplier=multiplier, growth=0.0))
        program = by_nestor.make_program(problem, recipe, 0.5, 0.1, 0)
        every = torch.arange(problem.num_inner)
        hessian, _, mixed, linear, _ = problem.inner_samples.matrices
        above, _, mixed_above, linear_above, _ = problem.outer_samples.matrices
        penalized = torch.linalg.solve(
            hessian + above / multiplier, -(mixed.T @ lam + linear) - (mixed_above.T @ lam + linear_above) / multiplier
        )
        with torch.no_grad():
            for name, value in (("outer", lam), ("inner_value", problem.solve_inner(lam)), ("inner", penalized)):
                program.levels[name].parameters[0].copy_(value)
        batch = (every, every, multiplier)
        batches = {"outer": batch, "inner": batch, "inner_value": every}
        (found,) = program.hypergradient("outer", batches).values()
        errors.append(float((found - problem.hypergradient(lam)).norm()))
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.2)
    assert errors[1] < 0.1


@pytest.mark.filterwarnings("ignore::nestor.NestorWarning")
@pytest.mark.parametrize(
    ("method", "cost"),
    [
        ("SOBA", 4),  # gradient, HVP, mixed product; gradient of F
        ("SABA", 4),
        ("AmIGO", 10 + 1 + 20 + 2),  # a new batch for each HVP costs its gradient too
        ("stocBiO", 10 + 1 + 18 + 2),
        ("F2SA", 10 + 20 + 3),
        ("nestor T1T2", 4),
        ("nestor FiniteDifference", 4),
        ("nestor ConjugateGradient", 10 + 1 + 1 + 10 + 1),  # inner steps; F; gradient with a graph, HVPs, mixed product
        ("nestor Neumann", 10 + 1 + 1 + 9 + 1),
        ("nestor Neumann, warm, 1 term", 1 + 1 + 1 + 1 + 1),
        ("nestor Unrolled", 10 + 1 + 30),
        ("nestor F2SA", 10 + 20 + 3),
    ],
)
def test_evaluations_of_an_update(method: str, cost: int) -> None:
    """Derivatives of one sample, per sample of a batch."""
    problem = Quadratics(num_inner=128, num_outer=128)
    if method.startswith("nestor "):
        solver = by_nestor.Solved(problem, by_nestor.METHODS[method.removeprefix("nestor ")], 0.1, 0.1, 0)
        solver.advance(1)
        assert solver.cost == cost * 64
        return
    solver = published.METHODS[method](problem, 0.1, 0.1, 0)
    before = solver.evaluations
    solver.update()
    assert solver.evaluations - before == cost * 64


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_down(method: str) -> None:
    """A short run on the quadratics."""
    study = STUDIES["quadratics"]
    curve = run(study, method, 0.1, 0.1, 0, 8_000)
    assert curve[-1][0] >= 8_000
    assert quality(curve) < curve[0][1]


def test_a_run_that_diverges_has_no_quality() -> None:
    assert math.isinf(quality(run(STUDIES["quadratics"], "SOBA", 1e6, 1.0, 0, 20_000)))
    assert math.isinf(quality(run(STUDIES["quadratics"], "nestor T1T2", 1e6, 1.0, 0, 20_000)))


def test_what_is_in_the_file_is_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "bilevel.json"
    assert Results(path).ensure("quadratics", "SOBA", 0.1, 0.1, 0, 2_000)
    again = Results(path)
    assert not again.ensure("quadratics", "SOBA", 0.1, 0.1, 0, 2_000)
    assert list(again.curves) == [key_of("quadratics", "SOBA", 0.1, 0.1, 0)]


def test_marks_end_at_the_budget() -> None:
    assert marks(1_000)[-1] == 1_000
    assert marks(1_000) == sorted(marks(1_000))


def test_pages_are_those_of_the_json_files() -> None:
    """The page of docs is what the program writes from the JSON file beside it, and every method is in its tables."""
    results = Results(ROOT / "docs" / "bilevel.json")
    page = (ROOT / "docs" / "bilevel.md").read_text(encoding="utf-8")
    assert page == report.page(results)
    for name in STUDIES:
        assert (ROOT / "docs" / f"bilevel-{name}.png").exists()
        for method in METHODS:
            assert len(results.trials(name, method)) == 9
            assert len(results.reported(name, method)) == 5


def test_pictures_and_page_are_drawn_from_the_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--draw`` as a user calls it, without runs."""
    pytest.importorskip("matplotlib")
    content = (ROOT / "docs" / "bilevel.json").read_text(encoding="utf-8")
    (tmp_path / "bilevel.json").write_text(content, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["benchmarks.bilevel", "--draw", "--out", str(tmp_path)])
    threads = torch.get_num_threads()
    assert command.main() == 0
    torch.set_num_threads(threads)
    assert (tmp_path / "bilevel.json").read_text(encoding="utf-8") == content
    assert (tmp_path / "bilevel.md").read_text(encoding="utf-8").startswith("# Public benchmark")
    for name in STUDIES:
        assert (tmp_path / f"bilevel-{name}.png").stat().st_size > 20_000
