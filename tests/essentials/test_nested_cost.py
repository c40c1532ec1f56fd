"""The cost of exact nesting: computed without evaluating anything, and told before a run."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_depth_and_cost import EXACT, coupled_program
from torch.optim import SGD

import nestor
from nestor.errors import NestorWarning
from nestor.explain.nested_cost import MOST, evaluations
from nestor.program import evaluator_of


def products(count: int, **options: Any) -> nestor.Response:
    return nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=count, rtol=0.0), **options)


NEUMANN = nestor.Implicit(solver=nestor.Neumann(num_terms=3, step_size=0.01))


@pytest.mark.parametrize(
    ("response", "depth"),
    [
        (nestor.T1T2(), 5),
        (nestor.FiniteDifference(), 4),
        (nestor.FirstOrder(), 4),
        (products(5), 4),
        (products(2, cross=nestor.ReverseMode()), 4),
        (NEUMANN, 4),
        (EXACT, 4),
    ],
    ids=lambda value: value.describe() if isinstance(value, nestor.Response) else str(value),
)
def test_count_is_that_of_a_run(response: nestor.Response, depth: int) -> None:
    """Every level reads every other: the number of forwards that ``explain`` counts, for every level."""
    program = coupled_program(depth, 2, "exact", response)
    for row in program.explain().rows:
        assert evaluations(evaluator_of(program), program.levels[row.level]) == sum(row.cost.forwards.values())


def test_count_of_mixed_responses() -> None:
    """Each level with its own, and micro-batches."""
    program = coupled_program(4, 2, "exact", nestor.T1T2())
    mixed = {"level0": products(3), "level1": nestor.FiniteDifference(), "level2": nestor.T1T2()}
    program = program.with_responses(mixed)
    assert evaluations(evaluator_of(program), program.levels["level3"]) == sum(
        program.explain().rows[-1].cost.forwards.values()
    )


def runnable(depth: int, response: nestor.Response, nesting: str = "exact") -> nestor.Program:
    """The program with optimizers, for an engine."""
    program = coupled_program(depth, 2, nesting, response)
    problems = {
        name: nestor.Problem(
            level.problem.module,
            level.problem.loss,
            response=response,
            optimizer=SGD(level.problem.module.parameters(), lr=0.01),
        )
        for name, level in program.levels.items()
    }
    return nestor.Program(nesting=nesting, **problems)


@pytest.fixture
def told() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


@pytest.mark.parametrize(
    ("depth", "response"), [(8, nestor.T1T2()), (5, products(5)), (12, products(20))], ids=["T1T2", "CG", "deep"]
)
def test_a_costly_program_warns_once(
    depth: int, response: nestor.Response, told: list[warnings.WarningMessage]
) -> None:
    """With the level, the count, both remedies and what they give up; the frozen program is quiet."""
    nestor.Engine(runnable(depth, response))
    assert len(told) == 1
    assert told[0].category is NestorWarning
    assert told[0].filename == __file__
    message = str(told[0].message)
    for part in (
        "evaluates losses about",
        "nesting='frozen'",
        "approximation",
        "FirstOrder()",
        "leaves out",
        "'level1'",
    ):
        assert part in message
    nestor.Engine(runnable(depth, response, "frozen"))
    assert len(told) == 1


@pytest.mark.parametrize(
    ("depth", "response"),
    [(7, nestor.T1T2()), (4, products(5)), (2, products(5000)), (12, nestor.FirstOrder())],
    ids=["T1T2", "CG", "two levels", "first order"],
)
def test_a_cheap_program_is_quiet(depth: int, response: nestor.Response) -> None:
    """731 and 429 evaluations; a long solve of one lower level; no response in the middle."""
    program = runnable(depth, response)
    assert evaluations(evaluator_of(program), program.levels[f"level{depth - 1}"]) <= MOST
    nestor.Engine(program)


def test_first_order_in_the_middle_is_quiet() -> None:
    """The remedy of the message."""
    program = runnable(8, nestor.T1T2())
    program = program.with_responses({f"level{i}": nestor.FirstOrder() for i in range(3, 7)})
    assert evaluations(evaluator_of(program), program.levels["level7"]) <= MOST


def test_unrolled_steps_multiply() -> None:
    """A middle level of 20 steps above a lower level of 30: each pass pulls back through all of these."""

    def program(low_steps: int, middle_steps: int) -> nestor.Program:
        low, mid, top = (nestor.Variable(torch.tensor(0.5)) for _ in range(3))
        unrolled = nestor.Unrolled()

        def problem(variable: nestor.Variable, loss: Any, steps: int = 1) -> nestor.Problem:
            optimizer = SGD(variable.parameters(), lr=0.1)
            return nestor.Problem(variable, loss, optimizer=optimizer, response=unrolled, unroll_steps=steps)

        return nestor.Program(
            low=problem(low, lambda low, mid: (low() - mid()) ** 2, low_steps),
            mid=problem(mid, lambda mid, low, top: (low() - top()) ** 2 + mid() ** 2, middle_steps),
            top=problem(top, lambda top, mid: (mid() - 1) ** 2 + top() ** 2),
        )

    small = program(2, 3)
    count = evaluations(evaluator_of(small), small.levels["top"])
    assert count == 1 + 3 * (1 + 2 * 2)
    assert count <= sum(small.explain().rows[-1].cost.forwards.values())  # replays come on top
    with pytest.warns(NestorWarning, match="level 'top' evaluates losses about 1,221 times"):
        nestor.Engine(program(30, 20))
