"""Compiled runs of peers: the note of what a peer was is an argument of a graph, or is made inside of it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

import nestor
from nestor.compilation.compiled_steps import CompiledSteps

F64 = torch.float64


def problem(value: float, loss: Any, **options: Any) -> nestor.Problem:
    variable = nestor.Variable(torch.tensor([value, 0.5 * value], dtype=F64))
    return nestor.Problem(variable, loss, optimizer=SGD(variable.parameters(), lr=0.05, momentum=0.5), **options)


def shared(low: Any, a: Any, b: Any) -> Tensor:
    return ((low() - a() * b()) ** 2).sum() + 0.1 * (low() ** 4).sum()


def program(response: nestor.Response, *, waits: bool) -> nestor.Program:
    """Two uppers of one lower; if one ``waits`` for a lower of its own, it steps where the shared lower does not."""
    a = problem(0.9, lambda a, low: (low() - 1).square().sum() + (a() - 1).square().sum())
    if not waits:
        low = problem(0.4, shared, response=response, unroll_steps=2)
        b = problem(1.2, lambda b, low: (low() - 2).square().sum() + (b() - 2).square().sum())
        return nestor.Program(low=low, a=a, b=b)

    def middle(low: Any, leaf: Any, a: Any, b: Any) -> Tensor:
        return shared(low, a, b) + 0.1 * (low() * leaf()).sum()

    return nestor.Program(
        leaf=problem(0.1, lambda leaf, low: (leaf() - 0.2 * low()).square().sum(), unroll_steps=2),
        low=problem(0.4, middle, response=response),
        own=problem(0.3, lambda own, b: (own() - 1).square().sum() + 0.0 * b().sum(), unroll_steps=3),
        a=a,
        b=problem(1.2, lambda b, low, own: (low() - 2).square().sum() + (b() - 2).square().sum()),
    )


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("response", [nestor.T1T2(), nestor.Unrolled()], ids=lambda r: r.describe())
def test_compiled_run_equals_the_eager_one(
    response: nestor.Response, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole cycles, and a peer that steps after the other in a graph of its own."""
    taken: list[tuple[str, ...]] = []
    take = CompiledSteps.run

    def noted(self: CompiledSteps, names: Any, *arguments: Any) -> bool:
        done = take(self, names, *arguments)
        if done:
            taken.append(tuple(names))
        return done

    monkeypatch.setattr(CompiledSteps, "run", noted)
    ends = []
    for compile in (False, True):
        built = program(response, waits=waits)
        nestor.Engine(built, seed=0, compile=compile).run(15 if waits else 8)
        ends.append([p.detach() for level in built.levels.values() for p in level.parameters])
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-11, atol=0)
    if not waits:
        assert ("low", "low", "a", "b") in taken
    elif response == nestor.T1T2():
        assert any("b" in names and "low" not in names for names in taken)
