"""Solves that are truncated in a run: the run goes on, warns once and counts them; errors say where and what to do."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import nestor

F64 = torch.float64
SGD = torch.optim.SGD


def program(
    curvatures: list[float], response: nestor.Response, weights: list[float] | None = None, **options: Any
) -> nestor.Program:
    """A lower quadratic with the given curvatures, and an upper loss with the given gradient."""
    h = torch.tensor(curvatures, dtype=F64)
    c = torch.ones_like(h) if weights is None else torch.tensor(weights, dtype=F64)
    inner, outer = nestor.Variable(torch.ones_like(h)), nestor.Variable(torch.zeros_like(h))

    def fit(inner: Any, outer: Any) -> Tensor:
        return 0.5 * (h * inner() ** 2).sum() - (inner() * outer()).sum()

    def judge(inner: Any) -> Tensor:
        return (c * inner()).sum()

    return nestor.Program(
        inner=nestor.Problem(inner, fit, optimizer=SGD(inner.parameters(), lr=1e-3), response=response),
        outer=nestor.Problem(outer, judge, optimizer=SGD(outer.parameters(), lr=1.0)),
        **options,
    )


def step(levels: nestor.Program) -> Tensor:
    """Return the hypergradient of one step of the engine."""
    nestor.Engine(levels, seed=0).run(1)
    return -levels.levels["outer"].parameters[0].detach()


def warned(run: Callable[[], Any]) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run()
    return result, [str(w.message) for w in caught if issubclass(w.category, nestor.NestorWarning)]


CURVED = nestor.Implicit(solver=nestor.ConjugateGradient())
NEUMANN = nestor.Implicit(solver=nestor.Neumann(num_terms=3, step_size=0.1))
LBFGS = nestor.Implicit(solver=nestor.LBFGSInverse(pairs=0, max_steps=3))
STALLED = nestor.Implicit(solver=nestor.GMRES(restart=1, rtol=1e-10))
# The eigenvalue -0.005 makes the third term 1.001 times the first.
CASES = {
    "cg": (CURVED, [4.0, -1.0], [1.0, 0.1], "negative"),
    "cg at once": (CURVED, [-1.0, -1.0], [1.0, 1.0], "negative"),
    "neumann": (NEUMANN, [-0.0051, -0.0051], [1.0, 1.0], "diverged"),
    "lbfgs": (LBFGS, [-1.0, -2.0], [1.0, 1.0], "negative"),
    "gmres": (STALLED, [1.0, -1.0, 100.0], [1.0, 1.0, 1.0], "stagnated"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_warns_once_and_counts(case: str) -> None:
    """Ten upper steps, ten truncated solves, one warning that names level, reason and remedies."""
    response, curvatures, weights, word = CASES[case]
    engine = nestor.Engine(program(curvatures, response, weights), seed=0)
    metrics, messages = warned(lambda: [engine.run(1) for _ in range(10)][-1])
    assert metrics["outer/inner_truncated"] == 10
    (message,) = messages
    residual = f"|b - A x| is {metrics['outer/inner_residual']:.2g} |b|"
    for text in ("level 'inner'", "'outer'", word, residual, "Set damping", "strict=True"):
        assert text.lower() in message.lower()
    assert torch.isfinite(engine.program.levels["outer"].parameters[0]).all()


@pytest.mark.parametrize("case", CASES)
def test_strict_raises(case: str) -> None:
    """The error names the level, its own loss, the step and the damping that is set."""
    response, curvatures, weights, word = CASES[case]
    strict = nestor.Implicit(
        solver=response.solver, damping=1e-9 if case != "neumann" else 0.0, strict=True, label="strict"
    )
    with pytest.raises(nestor.SolverError, match=word) as caught:
        nestor.Engine(program(curvatures, strict, weights), seed=0).run(1)
    error = caught.value
    assert error.level == "inner"
    assert error.where is not None
    assert "fit" in error.where
    assert "judge" not in str(error)
    assert error.step == 1
    assert ("Raise damping above 1e-09" if strict.damping else "Set damping") in str(error)
    with pytest.raises(nestor.SolverError, match=word):
        program(curvatures, strict, weights).hypergradient("outer")


def test_what_a_truncated_solve_returns() -> None:
    """CG: the iterate before, here c times c^T c / c^T H c, or at the first direction c. Neumann: the first term."""
    (got, _), h, c = warned(lambda: step(program([4.0, -1.0], CURVED, [1.0, 0.1]))), [4.0, -1.0], [1.0, 0.1]
    c, h = torch.tensor(c, dtype=F64), torch.tensor(h, dtype=F64)
    torch.testing.assert_close(got, (c @ c) / (c @ (h * c)) * c)
    got, _ = warned(lambda: step(program([-1.0, -1.0], CURVED)))
    torch.testing.assert_close(got, torch.ones(2, dtype=F64))
    got, _ = warned(lambda: step(program([-0.0051, -0.0051], NEUMANN)))
    torch.testing.assert_close(got, 0.1 * torch.ones(2, dtype=F64))
    # In units of 1e6, c itself would be a million times too long.
    got, _ = warned(lambda: step(program([-1e6, -1e6], CURVED)))
    torch.testing.assert_close(got, 29e-6 * torch.ones(2, dtype=F64))


def test_no_truncation_is_told_of_convex_levels() -> None:
    """The count is there, and zero; no warning."""
    metrics = nestor.Engine(program([4.0, 1.0], CURVED), seed=0).run(3)
    assert metrics["outer/inner_truncated"] == 0
    assert metrics["outer/inner_residual"] <= 1e-6


def test_the_count_is_saved() -> None:
    """A resumed run counts on, and does not warn again."""
    engine = nestor.Engine(program([4.0, -1.0], CURVED, [1.0, 0.1]), seed=0)
    warned(lambda: engine.run(3))
    saved = copy.deepcopy(engine.state_dict())
    other = nestor.Engine(program([4.0, -1.0], CURVED, [1.0, 0.1]), seed=0)
    other.load_state_dict(saved)
    metrics, messages = warned(lambda: other.run(2))
    assert metrics["outer/inner_truncated"] == 5
    assert messages == []


def test_a_hypergradient_by_hand_warns() -> None:
    """So does a response inside the objective of a middle level, whose level is named."""
    _, (message,) = warned(lambda: program([-1.0, 2.0], CURVED, [1.0, 0.1]).hypergradient("outer"))
    assert "Level 'inner'" in message
    weight = torch.ones(2, dtype=F64, requires_grad=True)

    def objective(theta: Tensor, weight: Tensor) -> Tensor:
        return -(theta**2).sum() + theta @ weight

    theta = nestor.best_response(objective, torch.zeros(2, dtype=F64), weight, CURVED)
    _, (message,) = warned(lambda: torch.autograd.grad(theta.sum(), weight))
    assert "Level 'lower'" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flat_directions_are_singular(dtype: torch.dtype) -> None:
    """A flat direction that the upper loss reads: an error of the lower level, which names its loss and its damping."""
    for damping, words in ((0.0, "Set damping"), (1e-30, "Raise damping above 1e-30")):
        levels = program([0.0, 1.0, 2.0], nestor.Implicit(damping=damping))
        for level in levels.levels.values():
            level.problem.module.to(dtype)
        with pytest.raises(nestor.SingularError, match=words) as caught:
            nestor.Engine(levels, seed=0).run(1)
        assert caught.value.level == "inner"
        assert "fit" in str(caught.value.where)
        assert "judge" in caught.value.__notes__[0]
    got = step(program([0.0, 1.0, 2.0], nestor.Implicit(solver=nestor.NormalConjugateGradient())))
    torch.testing.assert_close(got, torch.tensor([0.0, 1.0, 0.5], dtype=F64), rtol=1e-9, atol=1e-9)


def test_errors_of_a_chain_pair_level_and_loss() -> None:
    """Three levels, exact nesting: the lowest one fails inside the response of the middle one."""
    low, mid, top = (nestor.Variable(torch.full((2,), 0.5, dtype=F64)) for _ in range(3))
    strict = nestor.Implicit(strict=True)

    def lowest(low: Any, mid: Any) -> Tensor:
        return -((low() - mid()) ** 2).sum()

    def middle(mid: Any, low: Any, top: Any) -> Tensor:
        return ((mid() - top()) ** 2).sum() + (low() ** 2).sum()

    def highest(mid: Any) -> Tensor:
        return (mid() ** 2).sum()

    levels = nestor.Program(
        low=nestor.Problem(low, lowest, optimizer=SGD(low.parameters(), lr=0.1), response=strict),
        mid=nestor.Problem(mid, middle, optimizer=SGD(mid.parameters(), lr=0.1), response=strict),
        top=nestor.Problem(top, highest, optimizer=SGD(top.parameters(), lr=0.1)),
    )
    for name in ("mid", "top"):
        with pytest.raises(nestor.SolverError) as caught:
            levels.hypergradient(name)
        assert caught.value.level == "low"
        assert "lowest" in str(caught.value.where)


def test_gauss_newton_of_a_middle_level() -> None:
    """Its model is the identity, so its matrix is the Hessian; explain() knows the marks as well."""

    def make(curvature: nestor.Curvature) -> nestor.Program:
        low, mid, top = (nestor.Variable(torch.full((3,), 0.5, dtype=F64)) for _ in range(3))
        middle = nestor.Implicit(solver=nestor.DenseSolve(), condition=nestor.Stationarity(curvature=curvature))

        def lowest(low: Any, mid: Any, top: Any) -> Tensor:
            return ((nestor.outputs(low()) - mid() * top()) ** 2).sum()

        return nestor.Program(
            low=nestor.Problem(low, lowest, optimizer=SGD(low.parameters(), lr=0.1), response=CURVED),
            mid=nestor.Problem(
                mid,
                lambda mid, low, top: ((nestor.outputs(mid()) - top().tanh()) ** 2).sum() + ((low() - 1) ** 2).sum(),
                optimizer=SGD(mid.parameters(), lr=0.1),
                response=middle,
            ),
            top=nestor.Problem(
                top,
                lambda top, mid, low: (mid() * low()).sum() + (top() ** 2).sum(),
                optimizer=SGD(top.parameters(), lr=0.1),
            ),
        )

    exact, found = make(nestor.Hessian()), make(nestor.GaussNewton())
    torch.testing.assert_close(found.hypergradient("top"), exact.hypergradient("top"), rtol=1e-9, atol=1e-12)
    assert "GaussNewton" in str(found.explain())


TINY = {
    "t1t2": (nestor.T1T2(), 1.0),
    "differences": (nestor.FiniteDifference(), 1.0),
    "sama": (nestor.SAMA(), 1e-3),
    "cg": (nestor.Implicit(), 0.5),
    "warm": (nestor.Implicit(warm_start=True), 0.5),
    "dense": (nestor.Implicit(solver=nestor.DenseSolve()), 0.5),
    "gmres": (nestor.Implicit(solver=nestor.GMRES()), 0.5),
    "minres, differences": (
        nestor.Implicit(
            solver=nestor.MINRES(), condition=nestor.Stationarity(curvature=nestor.FiniteDifferenceHessian())
        ),
        0.5,
    ),
    "neumann": (nestor.Implicit(solver=nestor.Neumann(num_terms=50, step_size=0.4)), 0.5),
    "unrolled": (nestor.Unrolled(), 1e-3),
}


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e-20), (F64, 1e-200)])
@pytest.mark.parametrize("name", TINY)
def test_hypergradients_of_a_tiny_loss(name: str, dtype: torch.dtype, size: float) -> None:
    """An upper loss of size 1e-20: the hypergradient is 1e-20 times that of a loss of size 1, and not zero."""
    response, factor = TINY[name]
    inner, outer = (nestor.Variable(torch.full((3,), 0.5, dtype=dtype)) for _ in range(2))
    c = torch.tensor([1.0, -2.0, 0.5], dtype=dtype)
    levels = nestor.Program(
        inner=nestor.Problem(
            inner,
            lambda inner, outer: (inner() ** 2).sum() - (inner() * outer()).sum(),
            optimizer=SGD(inner.parameters(), lr=1e-3),
            response=response,
        ),
        outer=nestor.Problem(
            outer, lambda inner: size * (c * inner()).sum(), optimizer=SGD(outer.parameters(), lr=0.1 / size)
        ),
    )
    nestor.Engine(levels, seed=0).run(1)
    torch.testing.assert_close((0.5 - outer().detach()) / 0.1, factor * c, rtol=1e-4, atol=1e-4)
