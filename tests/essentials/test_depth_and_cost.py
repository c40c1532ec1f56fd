"""Hypergradients at depth against re-solved programs and path sums, and what they cost."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import nestor
from nestor.diagnostics import count_evaluations

EXACT = nestor.Implicit(solver=nestor.DenseSolve())


def coupled_loss(index: int, size: int, names: list[str]) -> Callable[..., Tensor]:
    """A smooth non-quadratic loss of one level that reads every level."""
    generator = torch.Generator().manual_seed(index)
    couple = torch.randn(len(names), size, size, generator=generator, dtype=torch.float64) / size

    def loss(**modules: Any) -> Tensor:
        values = [modules[name]() for name in names]
        own = values[index]
        others = sum(couple[j] @ torch.tanh(v) for j, v in enumerate(values) if j != index)
        pair = sum((own**2 * v**2).sum() for j, v in enumerate(values) if j != index)
        return ((own - others) ** 2).sum() + 0.05 * (own**4).sum() + 0.1 * pair + 0.3 * (own * others).sum()

    source = f"def read({', '.join(names)}): return loss({', '.join(f'{n}={n}' for n in names)})"
    namespace: dict[str, Any] = {"loss": loss}
    exec(source, namespace)
    return namespace["read"]


def coupled_program(depth: int, size: int, nesting: str, response: nestor.Response) -> nestor.Program:
    """Every level reads every other."""
    names = [f"level{i}" for i in range(depth)]
    generator = torch.Generator().manual_seed(17)
    levels = {
        name: nestor.Problem(
            nestor.Variable(0.3 * torch.randn(size, generator=generator, dtype=torch.float64)),
            coupled_loss(index, size, names),
            response=response,
        )
        for index, name in enumerate(names)
    }
    return nestor.Program(nesting=nesting, **levels)


def hessian(program: nestor.Program, name: str) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian of the total objective."""
    (x,) = program.levels[name].parameters
    (gradient,) = torch.autograd.grad(program.objective(name), x, create_graph=True)
    return gradient.detach(), torch.stack([torch.autograd.grad(g, x, retain_graph=True)[0] for g in gradient])


def solve(program: nestor.Program, names: list[str]) -> None:
    """Newton's method on each level's total objective, the levels below solved inside."""
    if not names:
        return
    (x,) = program.levels[names[-1]].parameters
    for _ in range(50):
        solve(program, names[:-1])
        gradient, matrix = hessian(program, names[-1])
        if gradient.norm() < 1e-13:
            return
        with torch.no_grad():
            x -= torch.linalg.solve(matrix, gradient)


@pytest.mark.parametrize(("depth", "size"), [(2, 3), (3, 3), (4, 2)])
def test_exact_nesting_equals_finite_differences_of_the_resolved_program(depth: int, size: int) -> None:
    """The headline: right at any depth, non-quadratic, every level reading every other."""
    program = coupled_program(depth, size, "exact", EXACT)
    *lowers, top = program.levels
    solve(program, lowers)
    got = program.hypergradient(top)["value"]
    (x,) = program.levels[top].parameters
    step, expected = 1e-4, torch.zeros_like(got)
    for entry in range(size):
        for shift, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):  # fourth order
            with torch.no_grad():
                x[entry] += shift * step
            solve(program, lowers)
            expected[entry] += weight * program.objective(top).item() / (12 * step)
            with torch.no_grad():
                x[entry] -= shift * step
    assert (got - expected).norm() <= 1e-6 * expected.norm()


def test_total_hessian_of_a_middle_level_is_symmetric() -> None:
    """A derivative of a gradient of a function is symmetric only if both are right."""
    program = coupled_program(3, 4, "exact", EXACT)
    solve(program, ["level0"])
    _, matrix = hessian(program, "level1")
    assert (matrix - matrix.T).abs().max() < 1e-10
    frozen = coupled_program(3, 4, "frozen", EXACT)
    (x,) = frozen.levels["level1"].parameters
    assert x.shape == (4,)


def partials(program: nestor.Program, name: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The plain loss of a level as a function of all levels' values."""
    values = [level.parameters[0].detach() for level in program.levels.values()]

    def loss(*arguments: Tensor) -> Tensor:
        named = dict(zip(program.levels, arguments, strict=True))
        return program.levels[name].problem.loss(**{key: lambda value=value: value for key, value in named.items()})

    return loss, values


@pytest.mark.parametrize("depth", [3, 4])
def test_frozen_nesting_is_the_sum_over_downward_paths(depth: int) -> None:
    """Written out by hand: every chain of levels from the top's loss down to where the top enters."""
    program = coupled_program(depth, 3, "frozen", EXACT)
    top = depth - 1
    names = list(program.levels)
    second = []
    for name in names[:top]:
        loss, values = partials(program, name)
        second.append(torch.autograd.functional.hessian(loss, tuple(values)))
    loss, values = partials(program, names[top])
    first = torch.autograd.functional.jacobian(loss, tuple(values))

    def jacobian(level: int, upper: int) -> Tensor:
        """d theta*_level / d theta_upper, every other level a constant."""
        return -torch.linalg.solve(second[level][level][level], second[level][level][upper])

    expected = first[top].clone()
    for length in range(1, top + 1):
        for path in itertools.combinations(range(top - 1, -1, -1), length):
            cotangent = first[path[0]]
            for higher, lower in itertools.pairwise(path):
                cotangent = cotangent @ jacobian(higher, lower)
            expected += cotangent @ jacobian(path[-1], top)
    got = program.hypergradient(names[top])["value"]
    assert (got - expected).norm() <= 1e-8 * expected.norm()


@pytest.mark.parametrize("depth", range(2, 8))
def test_frozen_nesting_evaluates_each_response_once(depth: int) -> None:
    """d - 1 responses for d levels, though the number of paths doubles with each."""
    program = coupled_program(depth, 2, "frozen", nestor.T1T2())
    with count_evaluations(program) as count:
        program.hypergradient(f"level{depth - 1}")
    assert dict(count.responses) == {f"level{i}": 1 for i in range(depth - 1)}
    assert dict(count.forwards) == {f"level{i}": 1 for i in range(depth)}


@pytest.mark.parametrize("nesting", ["exact", "frozen"])
@pytest.mark.parametrize(
    "response",
    [
        nestor.T1T2(),
        nestor.FiniteDifference(),
        nestor.Implicit(solver=nestor.Neumann(num_terms=4, step_size=0.01)),
        EXACT,
    ],
    ids=lambda r: r.describe(),
)
def test_explain_predicts_what_is_counted(nesting: str, response: nestor.Response) -> None:
    """The miniature does what the program does."""
    program = coupled_program(3, 3, nesting, response)
    for row in program.explain().rows:
        with count_evaluations(program) as count:
            program.hypergradient(row.level)
        assert count.forwards == row.cost.forwards
        assert count.gradients == row.cost.gradients
        assert count.hvps == row.cost.hvps


def bilevel(response: nestor.Response) -> nestor.Program:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    target = torch.randn(8, generator=generator, dtype=torch.float64)
    weight, penalty = nestor.Variable(torch.zeros(5).double()), nestor.Variable(torch.zeros(5).double())

    def ridge(batch: Any, weight: Any, penalty: Any) -> Tensor:
        return ((matrix @ weight() - target) ** 2).mean() + (penalty().exp() * weight() ** 2).sum()

    def validation(batch: Any, weight: Any) -> Tensor:
        return ((matrix[:3] @ weight() - 1) ** 2).mean()

    return nestor.Program(
        weight=nestor.Problem(
            weight, ridge, data=[0], response=response, optimizer=torch.optim.SGD(weight.parameters(), lr=0.01)
        ),
        penalty=nestor.Problem(penalty, validation, data=[0], optimizer=torch.optim.SGD(penalty.parameters(), lr=0.01)),
    )


@pytest.mark.parametrize(
    ("response", "forwards", "hvps"),
    [
        (nestor.FiniteDifference(), 3, 0),
        (nestor.T1T2(cross=nestor.ForwardMode()), 2, 0),
        (nestor.T1T2(cross=nestor.ReverseMode()), 2, 0),
        (nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=4, rtol=0.0)), 2, 4),
        (nestor.Implicit(solver=nestor.Neumann(num_terms=5, step_size=0.01)), 2, 4),
    ],
)
def test_cost_of_one_engine_step(response: nestor.Response, forwards: int, hvps: int) -> None:
    """Lower forwards 1 + 2 with finite differences and 1 + 1 otherwise, upper forwards 1, nothing else."""
    program = bilevel(response)
    engine = nestor.Engine(program, seed=0)
    with count_evaluations(program) as count:
        engine.run(1)
    assert dict(count.forwards) == {"weight": forwards, "penalty": 1}
    assert dict(count.gradients) == {"weight": forwards, "penalty": 1}
    assert count.hvps["weight"] == hvps


@pytest.mark.parametrize("solver", [nestor.ConjugateGradient(max_steps=50, rtol=1e-12), nestor.DenseSolve()])
def test_ridge_regression_has_a_closed_form(solver: nestor.LinearSolver) -> None:
    """d/d penalty of the validation loss of ridge regression: -diag(e^p w) H^-1 v with H = 2 A'A/8 + 2 diag(e^p)."""
    program = bilevel(nestor.Implicit(solver=solver))
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    b = torch.randn(8, generator=generator, dtype=torch.float64)
    h = 2 * a.T @ a / 8 + 2 * torch.eye(5, dtype=torch.float64)
    w = torch.linalg.solve(h, 2 * a.T @ b / 8)
    with torch.no_grad():
        program.levels["weight"].parameters[0].copy_(w)
    v = 2 * a[:3].T @ (a[:3] @ w - 1) / 3
    expected = -2 * w * torch.linalg.solve(h, v)
    got = program.hypergradient("penalty", {"weight": 0, "penalty": 0})["value"]
    assert (got - expected).norm() <= 1e-8 * expected.norm()
