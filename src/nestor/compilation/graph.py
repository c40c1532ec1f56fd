"""A function of tensors, written down once and compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nestor.autodiff.torch_private import compile_graph
from nestor.autodiff.tracing import trace

Compiled: TypeAlias = Callable[..., Sequence[Tensor]]


Operator = type(torch.ops.aten.detach.default)


class Unsuitable(Exception):
    """Says why something cannot be one graph, or should not be."""


def compiled(function: Callable[..., Sequence[Tensor]], examples: Sequence[Tensor]) -> Compiled:
    """Write the operations of ``function(*examples)`` down as one graph, derivatives included, and compile it.

    The last output of the graph is whether every condition held that the function required (:func:`require_true`).

    Args:
        function: A function of tensors that changes nothing else; what it reads besides is taken to be constant.
        examples: Arguments of the shapes, strides, dtypes and devices of all later ones.

    Raises:
        Unsuitable: If the function looks at numbers, draws random ones, or is slower compiled.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    def whole(*arguments: Tensor) -> tuple[Tensor, ...]:
        with trace() as conditions:
            results = list(function(*arguments))
            holds = torch.stack([c.reshape(()) for c in conditions]).all() if conditions else torch.ones(()).bool()
        return (*results, holds)

    # Copies: two arguments that are one tensor now may be two later.
    examples = [example.detach().clone() for example in examples]
    try:
        with torch.no_grad():
            graph: Any = make_fx(whole)(*examples)
    except Unsuitable:
        raise
    except Exception as error:
        raise Unsuitable(f"it cannot be written down as a graph ({_brief(error)})") from error
    _check(graph, on_cpu=examples[0].device.type == "cpu")
    constants = _lift(graph)
    _drop_detaches(graph)
    try:
        with torch.no_grad():
            inner: Compiled = compile_graph(graph, [*constants, *examples])
            found: Compiled = partial(inner, *constants) if constants else inner
            found(*examples)
    except Exception as error:
        raise Unsuitable(
            f"torch's compiler failed on it ({_brief(error)}); does the machine have one for C++?"
        ) from error
    return found


def _lift(graph: Any) -> list[Tensor]:
    """Make the tensors that the function reads besides its arguments the first arguments of the graph.

    As constants the compiler would copy the numbers of small ones, and not see them change.
    """
    constants: list[Tensor] = []
    first = next(iter(graph.graph.nodes))
    for node in list(graph.graph.nodes):
        if node.op == "get_attr" and isinstance(value := getattr(graph, node.target), Tensor):
            with graph.graph.inserting_before(first):
                placeholder = graph.graph.placeholder(f"constant_{len(constants)}")
            node.replace_all_uses_with(placeholder)
            graph.graph.erase_node(node)
            constants.append(value.detach())
    return constants


def _drop_detaches(graph: Any) -> None:
    """Take the detached tensors for the tensors themselves: what is evaluated twice at the same point is then seen."""
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)


def _check(graph: Any, *, on_cpu: bool) -> None:
    for node in graph.graph.nodes:
        if not isinstance(node.target, Operator):
            continue
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            raise Unsuitable(f"it draws random numbers ({node.target}), and a graph would draw others")
        if on_cpu and "convolution" in str(node.target):
            raise Unsuitable("its convolutions are slower compiled, on a CPU (measured: twice the time)")


def _brief(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
