"""What the graph of a loss shows of its second derivatives: functions that have none, or another one than the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nestor.autodiff.custom_functions import CustomFunction, custom_nodes, has_processes, nodes

Move: TypeAlias = Callable[[Sequence[Tensor]], list[Tensor]]
"""Maps the values of all variables to leaves at another point."""
Evaluate: TypeAlias = Callable[[Move], tuple[Sequence[Tensor], Sequence[Tensor]]]
"""Evaluates a loss at another point; returns the roots of its graph, the loss first, and the leaves."""

# Operations that make a sparse tensor of one that requires a gradient, as the nodes of a graph are called.
_SPARSE = ("SparseCooTensor", "SparseCompressedTensor", "ToSparse", "SparseMask")


def without_second_derivative(roots: Sequence[Tensor], evaluate: Evaluate) -> Iterator[str]:
    """Say which nodes of a graph have no second derivative, or a wrong one, and what to write instead.

    A function of the same class is looked at once.

    Args:
        roots: The roots of the graph.
        evaluate: Evaluates the loss again.
    """
    if any(node.name().startswith(_SPARSE) for node in nodes(roots)):
        yield f"The loss computes with a sparse tensor that requires a gradient{_ONLY_ONCE}{_OF_SPARSE}"
    for function in custom_functions(roots):
        name = function.kind.__name__
        if name == "CompiledFunction":
            yield f"The loss contains code that torch.compile has compiled{_ONLY_ONCE}{_OF_COMPILED}"
        elif function.is_users and not function.is_differentiable_twice(lambda step: evaluate(relative(step))[0]):
            yield f"The backward of the custom function {name} is not differentiable{_ONLY_ONCE}{_OF_CUSTOM}"


def custom_functions(roots: Sequence[Tensor]) -> list[CustomFunction]:
    """List the custom functions of a graph, one of each class."""
    found: dict[type, CustomFunction] = {}
    for node in custom_nodes(roots):
        function = CustomFunction(node)
        found.setdefault(function.kind, function)
    return list(found.values())


def is_derivative(evaluate: Evaluate) -> bool:
    """Return whether the gradient of a loss is its derivative, along the gradient, as far as differences tell.

    Differences at two distances must agree; otherwise the answer is True. It is True in several processes too, which
    may hold parts of the variables only.
    """
    if has_processes():
        return True
    try:
        return _is_derivative(evaluate)
    except Exception:  # whatever the user's code raises at other points
        return True


def _is_derivative(evaluate: Evaluate) -> bool:
    roots, leaves = evaluate(lambda values: [value.requires_grad_() for value in values])
    grads = torch.autograd.grad(roots[0], leaves, allow_unused=True)
    directions = [torch.zeros_like(leaf) if g is None else g.detach() for g, leaf in zip(grads, leaves, strict=True)]
    slope = sum(float(d.double().square().sum()) for d in directions)
    size = sum(float(leaf.detach().double().square().sum()) for leaf in leaves)
    if not slope > 0.0:
        return True
    # The loss changes by a thousandth, and the variables by a hundredth at most.
    step = min(1e-3 * abs(float(roots[0].detach())) / slope, 1e-2 * (size / slope) ** 0.5)
    if not step > 0.0:
        return True
    one, two = (_difference(evaluate, directions, factor * step) for factor in (1.0, 2.0))
    is_smooth = abs(one - two) < 0.02 * abs(one)
    return not is_smooth or abs(one - slope) < 0.1 * max(abs(one), slope)


def _difference(evaluate: Evaluate, directions: Sequence[Tensor], step: float) -> float:
    def value(sign: float) -> float:
        def move(values: Sequence[Tensor]) -> list[Tensor]:
            return [(v + sign * step * d).requires_grad_() for v, d in zip(values, directions, strict=True)]

        return float(evaluate(move)[0][0].detach())

    return (value(1.0) - value(-1.0)) / (2 * step)


def relative(step: float) -> Move:
    """Return a map that moves all entries by a part of their size."""

    def move(values: Sequence[Tensor]) -> list[Tensor]:
        return [_moved(value, step) for value in values]

    return move


def _moved(value: Tensor, step: float) -> Tensor:
    size: Any = value.abs().mean() if value.numel() else 0.0
    return (value + step * (value.abs() + (size or 1.0))).requires_grad_()


_ONLY_ONCE = ", but a response needs second derivatives of the loss: a part of them would be zero, or wrong. "
_OF_COMPILED = (
    "Leave the code uncompiled, and let the engine compile whole steps, Engine(program, compile=True); or use a "
    "response with first derivatives only, FiniteDifference()."
)
_OF_CUSTOM = (
    "It is marked once_differentiable, detaches what it saved, reads what its forward has computed beside its outputs "
    "(an intermediate result, the gradients of a fused kernel, an attribute of ctx), or computes outside of torch. "
    "Save inputs and outputs, and compute the rest from ctx.saved_tensors by differentiable operations; or use a "
    "response with first derivatives only, FiniteDifference()."
)
_OF_SPARSE = (
    "torch's second derivatives in the values of sparse tensors are wrong. Multiply the values with the rows that they "
    "meet, out.index_add(0, row, values[:, None] * dense[column]), or use a dense tensor; a sparse tensor that "
    "requires no gradient is right. Or use a response with first derivatives only, FiniteDifference()."
)
NOT_A_DERIVATIVE = (
    "the gradient of the loss is not its derivative: the backward of a custom function is not the derivative of its "
    "forward (a reversed or scaled gradient, a straight-through estimator), or a hook changes a gradient, or a value "
    "is detached. Second derivatives go through that backward again, so the hypergradient is not that of the "
    "training, but of a loss with this derivative. For a reversed gradient, write two levels with two losses."
)
