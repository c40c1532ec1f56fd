"""Tiny graphs keep intermediate results on the stack."""

import pytest
import torch
from torch import Tensor

from nestor.compilation.generated import OnStack, compiled
from nestor.compilation.graph import traced


@pytest.mark.usefixtures("on_stack")
def test_results_stay_when_the_graph_runs_again() -> None:
    """Generated code writes the results of every call into the same memory: they are copied."""

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (x.sin() * y, (x * y).sum(0), (x @ y).square())

    generator = torch.Generator().manual_seed(0)
    first, second = ([torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2)] for _ in range(2))
    graph, constants = traced(function, first)
    run = compiled(graph, constants, first)
    with torch.no_grad():
        found, other = run(*first), run(*second)
    for results, arguments in ((found, first), (other, second)):
        for one, expected in zip(results, function(*arguments), strict=False):
            torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("on_stack")
def test_also_after_a_graph_that_is_not() -> None:
    """Torch chooses by the first graph of a process, unless it is told otherwise."""
    examples = [torch.linspace(0, 1, 6, dtype=torch.float64).reshape(2, 3), torch.ones(3, 2, dtype=torch.float64)]
    product, constants = traced(lambda x, y: (x @ y,), examples)
    compiled(product, constants, examples)
    waves, constants = traced(lambda x, y: (x.sin(), y.cos()), examples)
    run = compiled(waves, constants, examples)
    assert isinstance(run, OnStack)
    with torch.no_grad():
        assert run.run(*examples)[0].data_ptr() == run.run(*examples)[0].data_ptr()
        assert run.keeping(examples, 0)[0].data_ptr() != run.keeping(examples, 0)[0].data_ptr()
