"""Generated code is called without torch's wrappers only where it does the same."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from nestor.autodiff.torch_compiler import GeneratedCode


class Code:
    """What a compiler returns: a function of a list."""

    def __init__(self, function: Callable[[list[Tensor]], Sequence[Tensor]]) -> None:
        self.current_callable = function


def wrapped(x: Tensor, y: Tensor) -> Sequence[Tensor]:
    return [x + y, x * y]


EXAMPLES = [torch.tensor([1.0, torch.nan]), torch.tensor([2.0, 3.0])]


def chosen(function: Callable[[list[Tensor]], Sequence[Tensor]], examples: Sequence[Any]) -> Callable[..., Any]:
    code = GeneratedCode(lambda graph, examples: Code(function))
    code(None, examples)
    return code.unwrapped(wrapped, [t.clone() for t in EXAMPLES])


def test_code_that_does_the_same_is_called() -> None:
    calls: list[int] = []

    def same(arguments: list[Tensor]) -> Sequence[Tensor]:
        calls.append(len(arguments))
        found = wrapped(*arguments)
        arguments.clear()
        return found

    run = chosen(same, EXAMPLES)
    assert run is not wrapped
    torch.testing.assert_close(run(*EXAMPLES), wrapped(*EXAMPLES), rtol=0, atol=0, equal_nan=True)
    assert calls == [2, 2]


def in_place(arguments: list[Tensor]) -> Sequence[Tensor]:
    found = wrapped(*arguments)
    arguments[0].add_(1)
    return found


def fails(arguments: list[Tensor]) -> Sequence[Tensor]:
    raise TypeError


DIFFERENT: dict[str, Callable[[list[Tensor]], Sequence[Tensor]]] = {
    "another value": lambda a: [a[0] + a[1], a[0] * a[1] * (1 + 1e-6)],
    "another number of results": lambda a: [a[0] + a[1]],
    "another dtype": lambda a: [(a[0] + a[1]).double(), a[0] * a[1]],
    "a change in place": in_place,
    "an error": fails,
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_code_that_does_something_else_is_not(name: str) -> None:
    assert chosen(DIFFERENT[name], EXAMPLES) is wrapped


@pytest.mark.parametrize("examples", [EXAMPLES[:1], [*EXAMPLES, torch.ones(())], [EXAMPLES[0], torch.ones(3)], [1, 2]])
def test_code_with_other_arguments_is_never_called(examples: Sequence[Any]) -> None:
    """It reads them by address."""
    calls: list[int] = []
    assert chosen(lambda arguments: calls.append(0) or wrapped(*arguments), examples) is wrapped
    assert not calls


def test_two_graphs_are_left_to_torch() -> None:
    code = GeneratedCode(lambda graph, examples: Code(lambda arguments: wrapped(*arguments)))
    for _ in range(2):
        code(None, EXAMPLES)
    assert code.unwrapped(wrapped, EXAMPLES) is wrapped
