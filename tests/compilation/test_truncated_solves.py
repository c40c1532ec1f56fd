"""Truncated solves inside a graph: the numbers, the count and the warning of an eager run."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

import nestor

F64 = torch.float64


def engine(h: Tensor, steps: int, *, compile: bool) -> nestor.Engine:
    """A lower quadratic with the given curvatures, whose response is a solve by conjugate gradients."""
    inner, outer = nestor.Variable(torch.ones_like(h)), nestor.Variable(torch.zeros_like(h))
    c = torch.linspace(1.0, 0.1, len(h), dtype=F64)

    def fit(inner: Any, outer: Any) -> Tensor:
        return 0.5 * (h * inner() ** 2).sum() - (inner() * outer()).sum()

    response = nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=steps))
    program = nestor.Program(
        inner=nestor.Problem(inner, fit, optimizer=SGD(inner.parameters(), lr=1e-3), response=response),
        outer=nestor.Problem(outer, lambda inner: (c * inner()).sum(), optimizer=SGD(outer.parameters(), lr=1.0)),
    )
    return nestor.Engine(program, seed=0, compile=compile)


def test_truncated_solves_equal_eager_ones() -> None:
    """One warning, although no value of a graph is read; the count includes the solves of graphs."""

    def run(compile: bool) -> tuple[Tensor, float, list[str]]:
        made = engine(torch.tensor([4.0, -1.0], dtype=F64), 2, compile=compile)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", nestor.NestorWarning)
            metrics = [made.run(2) for _ in range(4)][-1]
        messages = [str(w.message) for w in caught if issubclass(w.category, nestor.NestorWarning)]
        if compile:
            assert made.eager_reasons == {}
        return made.program.levels["outer"].parameters[0].detach(), metrics["outer/inner_truncated"], messages

    eager, compiled = run(False), run(True)
    torch.testing.assert_close(compiled[0], eager[0], rtol=1e-12, atol=0)
    assert compiled[1:] == eager[1:]
    assert compiled[1] == 8
    assert len(compiled[2]) == 1


def test_a_singular_matrix_is_the_error_of_the_eager_step() -> None:
    """The graph says that something is wrong, the eager step says what."""
    h = torch.tensor([1.0, 1.0, 2.0], dtype=F64)
    made = engine(h, 4, compile=True)
    made.run(4)
    h[0] = 0.0
    with pytest.raises(nestor.SingularError, match=r"level 'inner'.*singular"):
        made.run(1)
